// One image large: what is known of it, its neighbours in the result, and why the model takes it for a match.
import { ask, breakable, button, by, copyText, element, shortTime, visible } from "./dom.js";
import { drawMap, drawScale } from "./heatmap.js";
import { wholePath } from "./selection.js";

//: Pixels of a map's longer side: of the large one, and of those to choose from.
const LARGE_MAP = 900, SMALL_MAP = 112;

export class Viewer {
  constructor(about, actions, selection) {
    Object.assign(this, { about, actions, selection, column: null, position: 0, maps: null, shown: 0, asked: 0 });
    by("previous").addEventListener("click", () => this.step(-1));
    by("next").addEventListener("click", () => this.step(1));
    by("large").addEventListener("load", () => this.note(""));
    by("large").addEventListener("error", () => { if (by("large").getAttribute("src")) this.note("This image cannot be shown: it may have moved."); });
    by("why").addEventListener("submit", (event) => { event.preventDefault(); this.explain(); });
    by("opacity").addEventListener("input", () => this.draw());
    by("viewer-similar").addEventListener("click", () => { by("viewer").close(); this.actions.similar(this.column, this.position); });
    by("viewer-captions").addEventListener("click", () => this.captions());
    by("viewer-copy").addEventListener("click", () => this.copy());
    by("viewer-select").addEventListener("click", () => { this.selection.toggle(this.column, this.position); this.mark(); });
    by("viewer").addEventListener("close", () => this.column?.focus(this.position));
    by("viewer").addEventListener("click", (event) => { if (event.target === by("viewer")) by("viewer").close(); });
    by("viewer").addEventListener("keydown", (event) => {
      if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "ArrowRight") this.step(1);
      else if (event.key === "ArrowLeft") this.step(-1);
      else if (this.actions.singleKeys() && event.key === "w") this.explain();
    });
  }

  get hit() { return this.column.hits[this.position]; }

  open(column, position, words, why = false) {
    Object.assign(this, { column, position });
    by("why-words").value = words;
    this.show();
    if (!by("viewer").open) by("viewer").showModal();
    by("close").focus();
    if (why) this.explain();
  }

  async step(direction) {
    const target = this.position + direction;
    if (target >= this.column.hits.length) await this.column.more().catch(() => {});
    if (target < 0 || target >= this.column.hits.length) return;
    const explained = this.maps !== null;
    this.position = target;
    this.show();
    if (explained) this.explain();
  }

  show() {
    const { hit, column } = this, name = hit.path.slice(hit.path.lastIndexOf("/") + 1);
    this.asked++;
    this.maps = null;
    by("viewer-title").replaceChildren(breakable(name));
    by("map").hidden = by("why-result").hidden = by("captions").hidden = true;
    by("large").hidden = false;
    by("large").alt = visible(hit.path);
    by("large").src = `/image/${hit.id}?large=true&index=${column.index}`;
    this.note("Loading …");
    by("previous").disabled = this.position === 0;
    by("next").disabled = column.done && this.position === column.hits.length - 1;
    by("viewer-captions").hidden = !this.about.indexes[column.index].captions;
    const rows = {
      Path: breakable(wholePath(this.about, { index: column.index, hit })), Size: `${hit.width} × ${hit.height} pixels, ${Math.max(1, Math.round(hit.size / 1000)).toLocaleString("en")} kB`,
      Time: hit.time && shortTime(hit.time), Score: hit.score?.toFixed(4), "Pair score": hit.pair_score?.toFixed(4),
      ...Object.fromEntries(Object.entries(hit.metadata || {}).filter(([, value]) => value !== null && value !== "").map(([key, value]) => [key.replaceAll("_", " "), String(value)])),
    };
    by("details").replaceChildren(...Object.entries(rows).filter(([, value]) => value).flatMap(([key, value]) => [element("dt", {}, key), element("dd", {}, value)]));
    this.mark();
  }

  mark() {
    const selected = this.selection.has(this.column, this.position);
    by("viewer-select").setAttribute("aria-pressed", selected);
    by("viewer-select").textContent = selected ? "Selected" : "Select";
  }

  note(text, bad = false) {
    by("stage-note").textContent = text;
    by("stage-note").hidden = !text;
    by("stage-note").classList.toggle("bad", bad);
  }

  /** Ask for the maps of the words and show that of all of them. */
  async explain() {
    const words = by("why-words").value.trim(), mine = ++this.asked;
    if (!words) { by("why-words").focus(); return; }
    by("why-result").hidden = false;
    by("why-maps").replaceChildren();
    by("why-note").textContent = "Computing the maps …";
    try {
      const { index } = this.column;
      const [maps] = await Promise.all([ask(`/explanation?${new URLSearchParams({ id: this.hit.id, caption: words, index })}`), loaded(by("large"))]);
      if (mine !== this.asked) return;
      this.maps = { ...maps, all: [{ word: maps.words.length ? "all words" : words, map: maps.map }, ...maps.words] };
      by("opacity").value = Math.round(100 * maps.opacity);
      drawScale(by("scale"), maps.colours);
      by("why-maps").replaceChildren(...this.maps.all.map((each, at) => this.choice(each, at)));
      const ignored = maps.ignored.length ? ` Without a part in the score: ${maps.ignored.join(", ")}.` : "";
      by("why-note").textContent = `Method: ${maps.method}${maps.score === null ? "" : `, score ${maps.score.toFixed(3)}`}. Each map is scaled by itself, from its least to its greatest value.${ignored}`;
      this.choose(0);
    } catch (error) {
      if (mine === this.asked) by("why-note").textContent = error.message;
    }
  }

  choice({ word, map }, at) {
    const canvas = element("canvas"), [width, height] = fit(by("large"), SMALL_MAP);
    drawMap(canvas, by("large"), map, this.maps.colours, this.maps.opacity, width, height);
    const made = button("", () => this.choose(at), { "aria-pressed": "false", class: "choice" });
    made.append(canvas, element("span", {}, word));
    return made;
  }

  choose(at) {
    this.shown = at;
    [...by("why-maps").children].forEach((each, position) => each.setAttribute("aria-pressed", position === at));
    this.draw();
  }

  draw() {
    if (!this.maps) return;
    const { word, map } = this.maps.all[this.shown], [width, height] = fit(by("large"), LARGE_MAP);
    drawMap(by("map"), by("large"), map, this.maps.colours, by("opacity").value / 100, width, height);
    by("map").setAttribute("aria-label", `Map of ${word} over ${this.hit.path}`);
    by("map").hidden = false;
    by("large").hidden = true;
  }

  async captions() {
    const list = by("captions"), mine = this.asked;
    list.hidden = false;
    list.replaceChildren(element("li", {}, "Loading …"));
    try {
      const { found } = await ask(`/captions?${new URLSearchParams({ id: this.hit.id, index: this.column.index, count: 10 })}`);
      if (mine === this.asked) list.replaceChildren(...found.map((caption) => element("li", {}, `${caption.text} `, element("span", { class: "value" }, caption.score.toFixed(3)))));
    } catch (error) { if (mine === this.asked) list.replaceChildren(element("li", {}, error.message)); }
  }

  async copy() {
    const told = by("viewer-copy");
    try { await copyText(wholePath(this.about, { index: this.column.index, hit: this.hit })); told.textContent = "Copied"; } catch { told.textContent = "Not copied"; }
    setTimeout(() => { told.textContent = "Copy path"; }, 2000);
  }
}

/** Width and height of an image whose longer side has `side` pixels. */
function fit(image, side) {
  const scale = side / Math.max(image.naturalWidth, image.naturalHeight, 1);
  return [Math.max(1, Math.round(image.naturalWidth * scale)), Math.max(1, Math.round(image.naturalHeight * scale))];
}

function loaded(image) {
  if (image.complete && image.naturalWidth) return Promise.resolve();
  return new Promise((resolve, reject) => {
    image.addEventListener("load", resolve, { once: true });
    image.addEventListener("error", () => reject(new Error("This image cannot be shown: it may have moved.")), { once: true });
  });
}
