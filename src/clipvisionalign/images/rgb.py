"""From any mode that Pillow opens to upright 8-bit RGB.

- The orientation of EXIF or XMP is applied: of EXIF that one tag is read, and nothing of it is ever written.
- Deep greys (10 to 32 bits, floating point) are scaled to 8 bits (`_white_level`) instead of being clipped or left
  black.
- CMYK and palettes are converted, transparency is laid on white, that of a colour key too; an animation gives its
  first frame.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

#: The share of a float's range by which its values may lie outside of it.
OVERSHOOT = 0.05

#: What undoes each orientation of the EXIF standard (CIPA DC-008, tag 274) but the upright one.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip

_XMP_ORIENTATION = re.compile(r"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])""")


def to_rgb(opened: Image.Image) -> Image.Image:
    """Convert an image of any of Pillow's modes to upright 8-bit RGB.

    Args:
        opened: An image; its pixels are decoded if they are not yet.

    Returns:
        A new image without the file's metadata.

    Raises:
        ValueError: It has no pixel.
        Exception: Whatever Pillow raises for damaged content; `open_image` raises ImageError alone.

    >>> to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
    (255, 255, 255)
    """
    layout = _raw_layout(opened)
    for name, kind in (("xmp", bytes), ("XML:com.adobe.xmp", str)):
        if not isinstance(opened.info.get(name), kind):
            opened.info.pop(name, None)  # a tag of a wrong type, in which Pillow searches for text while it decodes
    opened.load()
    if 0 in opened.size:
        raise ValueError("there is no pixel in it")
    rgb = turn_upright(_convert_to_rgb(opened, layout), read_orientation(opened))
    if rgb is opened:
        rgb = opened.copy()
    # What is turned already must not be turned again by the next who reads its EXIF.
    rgb.info = {}
    return rgb


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Undo an orientation.

    Args:
        image: The image as it is stored.
        orientation: 1 (upright) to 8, as EXIF numbers them.

    Returns:
        The upright image; the same object where nothing is to be turned.
    """
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def read_orientation(opened: Image.Image) -> int:
    """The orientation of EXIF or else XMP.

    `ImageOps.exif_transpose` also rewrites the remaining tags, and fails where one of them is of a wrong type.

    Args:
        opened: An image that Pillow opened and loaded: some decoders apply the orientation as they load, and others
            load as soon as their tags are read.

    Returns:
        1 (upright) to 8; 1 where the orientation cannot be read, makes no sense, or is applied by the decoder.
    """
    # JPEG XL's own orientation, which its decoder applies, overrides that of EXIF; but a JPEG that is stored in it
    # comes as it was (`jpeg`).
    if opened.format == "JXL" and not getattr(opened, "jpeg", False):
        return 1
    try:
        orientation = opened.getexif().get(ExifTags.Base.Orientation) or _orientation_of_xmp(opened)
        orientation = orientation[0] if isinstance(orientation, (bytes, tuple)) else orientation
        orientation = int(orientation)
    except Exception:  # a damaged block is none: its pixels may be whole
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _orientation_of_xmp(opened: Image.Image) -> int:
    """The orientation in an XMP packet, in any form of XML: Pillow reads only that with double quotes."""
    packet = opened.info.get("XML:com.adobe.xmp") or opened.info.get("xmp") or b""
    text = packet if isinstance(packet, str) else packet.decode("utf-8", "replace")
    match = _XMP_ORIENTATION.search(text)
    return int(match[1]) if match else 1


def _raw_layout(opened: Image.Image) -> str:
    """How the file packs a pixel ("L;4", "I;12", "RGB;16B", ...); "" where Pillow has none.

    Available before decoding only.
    """
    for tile in getattr(opened, "tile", None) or ():
        arguments = tile[3]
        layout = arguments[0] if isinstance(arguments, (tuple, list)) and arguments else arguments
        return layout if isinstance(layout, str) else ""
    return ""


def _convert_to_rgb(opened: Image.Image, layout: str) -> Image.Image:
    """8-bit RGB of a decoded image, not turned; the image itself where it is that already."""
    if opened.mode.startswith("I") or opened.mode == "F":
        grey = np.asarray(opened)
        if opened.format == "TIFF" and layout.startswith("I;32") and "S" not in layout:
            grey = grey.view(np.uint32)  # Pillow's own greys of 32 bits have a sign
        rgb = _grey_to_rgb(grey, _white_level(opened, layout), opened.info.get("transparency"))
        return ImageOps.invert(rgb) if _white_is_zero(opened) else rgb
    if opened.mode in ("1", "L", "RGB"):
        key = _colour_key(opened, layout)
        opaque = opened if key is None else _colour_to_white(opened, key)
        return opaque if opaque.mode == "RGB" else opaque.convert("RGB")
    if "transparency" in opened.info or {"A", "a"} & set(opened.getbands()):
        layered = (opened.convert("LA") if opened.mode == "La" else opened).convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return opened.convert("RGB")


def _colour_key(opened: Image.Image, layout: str) -> tuple[int, ...] | None:
    """The one colour that is transparent, as it stands in the decoded pixels; None where there is none."""
    key = opened.info.get("transparency")
    key = (key,) if isinstance(key, int) else key
    if not isinstance(key, (tuple, list)) or len(key) != len(opened.getbands()):
        return None
    # Pillow widens greys of 2 and 4 bits, keeps 8 bits of colours of 16, and leaves the key as it is in the file.
    widen = {"L;2": 85, "L;4": 17}.get(layout, 1)
    return tuple(int(channel) >> 8 if layout.startswith("RGB;16") else int(channel) * widen for channel in key)


def _colour_to_white(opened: Image.Image, key: tuple[int, ...]) -> Image.Image:
    """With white where `key` stands."""
    pixels = np.array(opened.convert("L") if opened.mode == "1" else opened)
    pixels[(pixels.reshape(*pixels.shape[:2], -1) == key).all(-1)] = 255
    return Image.fromarray(pixels)


def _white_is_zero(opened: Image.Image) -> bool:
    """Whether the greatest value of a deep grey is black: by TIFF's tag, which Pillow undoes up to 8 bits only."""
    return opened.format == "TIFF" and getattr(opened, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0


def _white_level(opened: Image.Image, layout: str) -> float:
    """The value that is white by the file's own word; 0 where a container of 16 or 32 bits leaves it open."""
    if opened.format == "PPM" and opened.mode == "I":
        return 65535.0  # to which Pillow has scaled its maxval
    if layout.startswith("I;16S"):
        grey = np.asarray(opened)
        # A sign leaves 15 bits, where nothing is below 0; and where no more than 14 are used, those may be all.
        return 32767.0 if grey.min() >= 0 and grey.max() > 16383 else 0.0
    bits = layout.partition(";")[2].rstrip("BLNRS")
    return 2.0 ** int(bits) - 1 if bits.isdecimal() and 8 < int(bits) < 16 else 0.0


def _grey_to_rgb(grey: np.ndarray, white: float, key: Any = None) -> Image.Image:
    """Scale a deep grey to 8 bits; a pixel of the value `key` is transparent. white: 0 if unknown."""
    # Beyond single precision's resolution no difference is visible.
    values = np.clip(np.nan_to_num(grey.astype(np.float32)), -1e37, 1e37)
    black, white = (0.0, white) if white else _black_and_white_levels(values[np.isfinite(grey)], grey.dtype.kind == "f")
    scaled = (np.clip((values - black) / (white - black), 0.0, 1.0) * 255.0).astype(np.uint8)
    if isinstance(key, int):
        scaled[grey == key] = 255
    return Image.fromarray(scaled).convert("RGB")


def _black_and_white_levels(values: np.ndarray, is_float: bool) -> tuple[float, float]:
    """The range of a grey whose file has none: from 0 to the least of 1, 255, and what 10, 12, 14 and 16
    bits hold that no value exceeds; from least to greatest where there are values below 0 or beyond 16 bits.

    A float's values may overshoot a range by `OVERSHOOT` of it on either side, as a filter leaves them: they are cut.

    A 12-bit camera's image in a 16-bit file is thus no black one; a 16-bit image that is all but black becomes a
    brighter one.
    """
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    tolerance = 1 + OVERSHOOT if is_float else 1.0
    top = next((top for top in (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0) if high <= top * tolerance), 0.0)
    return (0.0, top) if top and low >= top * (1 - tolerance) else (low, high)
