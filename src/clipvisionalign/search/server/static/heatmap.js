// Heat maps over images: a grid of values, enlarged smoothly, in colours over the image in grey.

/** Of each of `size` samples: the values that it is made of, with their weights, by cubic convolution (Keys 1981, a = -1/2). */
function tapsOf(count, size) {
  const cubic = (x) => (x < 1 ? 1.5 * x ** 3 - 2.5 * x ** 2 + 1 : x < 2 ? -0.5 * x ** 3 + 2.5 * x ** 2 - 4 * x + 2 : 0);
  return Array.from({ length: size }, (_, at) => {
    const position = ((at + 0.5) * count) / size - 0.5, start = Math.floor(position) - 1, taps = [];
    for (let each = Math.max(0, start); each <= Math.min(count - 1, start + 3); each++) taps.push([each, cubic(Math.abs(position - each))]);
    // At the ends there are fewer values: those that there are make up the whole.
    const sum = taps.reduce((total, [, weight]) => total + weight, 0);
    return taps.map(([each, weight]) => [each, weight / sum]);
  });
}

/** A grid of values enlarged to width x height values from 0 to 1, row by row. */
export function enlarge(grid, width, height) {
  const across = tapsOf(grid[0].length, width), down = tapsOf(grid.length, height);
  const rows = grid.map((row) => across.map((taps) => taps.reduce((sum, [at, weight]) => sum + weight * row[at], 0)));
  const values = new Float32Array(width * height);
  down.forEach((taps, y) => {
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (const [at, weight] of taps) sum += weight * rows[at][x];
      values[y * width + x] = Math.min(1, Math.max(0, sum));
    }
  });
  return values;
}

export function colourOf(anchors, value) {
  const place = value * (anchors.length - 1), low = Math.min(anchors.length - 2, Math.floor(place)), share = place - low;
  return [0, 1, 2].map((channel) => anchors[low][channel] * (1 - share) + anchors[low + 1][channel] * share);
}

/** Draw an image in grey with a map over it; `opacity` is the share of the map's colour. */
export function drawMap(canvas, image, grid, anchors, opacity, width, height) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height), { data } = pixels;
  const table = Array.from({ length: 256 }, (_, at) => colourOf(anchors, at / 255));
  enlarge(grid, width, height).forEach((value, at) => {
    const place = 4 * at, grey = 0.299 * data[place] + 0.587 * data[place + 1] + 0.114 * data[place + 2];
    const colour = table[Math.round(255 * value)];
    for (let channel = 0; channel < 3; channel++) data[place + channel] = opacity * colour[channel] + (1 - opacity) * grey;
  });
  context.putImageData(pixels, 0, 0);
}

export function drawScale(canvas, anchors) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${colourOf(anchors, x / (canvas.width - 1)).map(Math.round).join(" ")})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}
