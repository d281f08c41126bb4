"""Which image of a group to keep: the largest, then the sharpest, the one without loss by its format, the oldest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from clipvisionalign.images import open_header, open_image
from clipvisionalign.search.duplicates.cache import ImageQuality

#: Pixels of the middle part whose sharpness is measured.
SHARPNESS_SIDE = 1024
#: Share of the sharpest by which another may be less sharp, and counts as equal.
SHARPNESS_TOLERANCE = 0.03
#: Formats by what they lose: the smaller the better. Others are between.
FORMAT_RANKS = {
    "RAW": 0, "DNG": 0, "TIFF": 1, "PNG": 1, "BMP": 1, "JXL": 2, "HEIF": 2, "AVIF": 2, "JPEG": 3, "MPO": 3, "WEBP": 3,
    "GIF": 4,
}  # fmt: skip
_OTHER_FORMATS = 3


@dataclass(frozen=True)
class ImageFile:
    """An image of a group, as the index has it.

    Attributes:
        id: Its number in the index.
        path: Below the folder.
        hash: Of its content.
        size: Bytes of the file.
        width: Pixels.
        height: Pixels.
        mtime_ns: Time of the file's last change, in nanoseconds.
        taken: When it was photographed, in ISO 8601; "" if unknown.
        raw: Its path, in bytes.
        chosen: Whether a person has chosen to keep it.
    """

    id: int
    path: str
    hash: str
    size: int
    width: int
    height: int
    mtime_ns: int
    taken: str = ""
    raw: bytes = b""
    chosen: bool = False


def sharpness_of(image: Image.Image) -> float:
    """How much fine detail an image has.

    Args:
        image: RGB, at its full size.

    Returns:
        The root mean square of the Laplacian of the brightness, from 0 to 1, over the middle of the image, after pixels
        were averaged in fours: the edges of compressed blocks are no detail.
    """
    side = min(SHARPNESS_SIDE, *image.size) if min(image.size) >= 8 else min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    grey = np.asarray(image.crop((left, top, left + side, top + side)).convert("L"), dtype=np.float32) / 255
    if side >= 8:
        side -= side % 2
        grey = grey[:side, :side].reshape(side // 2, 2, side // 2, 2).mean(axis=(1, 3))
    padded = np.pad(grey, 1, mode="edge")
    neighbours = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return float(np.sqrt(np.mean((neighbours - 4 * grey) ** 2)))


def measure_quality(data: bytes) -> ImageQuality:
    """Sharpness and format of an image.

    Args:
        data: The bytes of its file.

    Returns:
        Both.

    Raises:
        ImageError: It cannot be decoded.
    """
    with open_header(data) as opened:
        name = opened.format or ""
    return ImageQuality(sharpness_of(open_image(data)), name)


def choose_best(
    images: Sequence[ImageFile], qualities: Callable[[Sequence[ImageFile]], Sequence[ImageQuality | None]]
) -> tuple[int, str]:
    """Which image of a group to keep.

    Args:
        images: Two and more.
        qualities: Measures images; None for one that cannot be read. Asked only where the largest are of one size and
            have different bytes.

    Returns:
        Its position, and why: the first of these by which it is better than all others.

    >>> small, large = (ImageFile(n, f"{n}.jpg", str(n), 9, 100 * n, 100, 0) for n in (1, 2))
    >>> choose_best([small, large], lambda images: [])
    (1, 'largest, 200 x 100 pixels')
    """
    remaining = list(range(len(images)))

    def narrow(values: dict[int, Any]) -> bool:
        best = min(values.values())
        remaining[:] = [position for position in remaining if values[position] == best]
        return len(remaining) == 1

    if narrow({position: -images[position].width * images[position].height for position in remaining}):
        best = images[remaining[0]]
        return remaining[0], f"largest, {best.width} x {best.height} pixels"
    if len({images[position].hash for position in remaining}) > 1:
        measured = dict(zip(remaining, qualities([images[position] for position in remaining]), strict=True))
        sharpness = {position: each.sharpness if each else 0.0 for position, each in measured.items()}
        least = max(sharpness.values()) * (1 - SHARPNESS_TOLERANCE)
        if narrow({position: sharpness[position] < least for position in remaining}):
            return remaining[0], "sharpest"
        formats = {position: each.format if each else "" for position, each in measured.items()}
        ranks = {position: FORMAT_RANKS.get(formats[position], _OTHER_FORMATS) for position in remaining}
        if narrow(ranks):
            return remaining[0], f"format, {formats[remaining[0]]}"
    # An image without a date comes after all that have one.
    if narrow({position: images[position].taken or "~" for position in remaining}):
        return remaining[0], f"oldest, taken {images[remaining[0]].taken}"
    if narrow({position: -images[position].size for position in remaining}):
        return remaining[0], f"most bytes, {images[remaining[0]].size:,}"
    if narrow({position: images[position].mtime_ns for position in remaining}):
        return remaining[0], "oldest file"
    return min(remaining, key=lambda position: (len(images[position].path), images[position].path)), "shortest path"
