"""Photographs as phones, cameras and programs write them, each with a colour of its own in every corner."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from odd_images import ORIENTATION, encoded, psd
from PIL import Image

#: Upper left, upper right, lower left, lower right.
CORNERS = ((220, 20, 20), (20, 180, 20), (20, 20, 220), (230, 220, 40))
GREYS = ((20,) * 3, (90,) * 3, (160,) * 3, (235,) * 3)
BITS = ((0,) * 3, (255,) * 3, (255,) * 3, (0,) * 3)

_TURN = Image.Transpose
#: From the upright image to what a camera of this orientation stores.
STORED_BY_ORIENTATION = {
    1: None, 2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_90, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_270,
}  # fmt: skip

#: Formats that the tests' encoders write: what Pillow calls it, the mode, and options.
PLAIN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": ("PNG", "RGB", {}), "palette.png": ("PNG", "P", {}), "grey16.png": ("PNG", "I;16", {}), "la.png": ("PNG", "LA", {}),
    "rgba.png": ("PNG", "RGBA", {}), "progressive.jpg": ("JPEG", "RGB", {"progressive": True}), "cmyk.jpg": ("JPEG", "CMYK", {}),
    "grey.jpg": ("JPEG", "L", {}), "gif": ("GIF", "P", {}), "lossless.webp": ("WEBP", "RGB", {"lossless": True}),
    "lzw.tif": ("TIFF", "RGB", {"compression": "tiff_lzw"}), "deflate.tiff": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    "jpeg.tif": ("TIFF", "RGB", {"compression": "jpeg"}), "cmyk.tif": ("TIFF", "CMYK", {}), "grey16.tif": ("TIFF", "I;16", {}),
    "bmp": ("BMP", "RGB", {}), "dib": ("DIB", "RGB", {}), "tga": ("TGA", "RGB", {"compression": "tga_rle"}), "ppm": ("PPM", "RGB", {}),
    "pgm": ("PPM", "L", {}), "pbm": ("PPM", "1", {}), "pcx": ("PCX", "P", {}), "ico": ("ICO", "RGBA", {}), "icns": ("ICNS", "RGBA", {}),
    "dds": ("DDS", "RGBA", {}), "jp2": ("JPEG2000", "RGB", {}), "j2k": ("JPEG2000", "RGB", {"no_jp2": True}), "sgi": ("SGI", "RGB", {}),
    "im": ("IM", "RGB", {}), "qoi": ("QOI", "RGB", {}), "xbm": ("XBM", "1", {}), "msp": ("MSP", "1", {}),
    "lossless.jxl": ("JXL", "RGB", {"lossless": True}), "jxl": ("JXL", "RGB", {}), "grey.jxl": ("JXL", "L", {}),
}  # fmt: skip

#: Endings of files without a magic number: under another ending they could be anything.
UNSIGNED = ("tga", "im", "msp", "xbm")


def corners(size: tuple[int, int] = (96, 64), colours: tuple[tuple[int, ...], ...] = CORNERS) -> Image.Image:
    """An image whose quarters have these colours."""
    image = Image.new("RGB", size)
    width, height = size[0] // 2, size[1] // 2
    for number, colour in enumerate(colours):
        left, top = number % 2 * width, number // 2 * height
        image.paste(colour, (left, top, size[0] if number % 2 else width, size[1] if number > 1 else height))
    return image


def wrong_corners(image: Image.Image, colours: tuple[tuple[int, ...], ...] = CORNERS, tolerance: int = 48) -> list[str]:
    """The corners whose colour is not the expected one."""
    x, y = image.width // 6, image.height // 6
    points = ((x, y), (image.width - 1 - x, y), (x, image.height - 1 - y), (image.width - 1 - x, image.height - 1 - y))
    pairs = zip(points, colours, strict=True)
    return [
        f"{point}: {image.getpixel(point)} is not {colour}"
        for point, colour in pairs
        if max(abs(a - b) for a, b in zip(image.getpixel(point), colour, strict=True)) > tolerance
    ]


def exif_of(orientation: int) -> Image.Exif:
    """The tags of a phone: orientation, maker, date."""
    tags = Image.Exif()
    tags[ORIENTATION], tags[271], tags[306] = orientation, "Phone", "2024:05:06 07:08:09"
    return tags


def stored(image: Image.Image, orientation: int) -> Image.Image:
    """What a camera that is held so stores of an upright image."""
    transpose = STORED_BY_ORIENTATION[orientation]
    return image if transpose is None else image.transpose(transpose)


def heic(
    image: Image.Image, orientation: int = 1, bits: int = 8, thumbnails: tuple[int, ...] = (), quality: int = 80
) -> bytes:
    """A HEIC file, which turns by irot and imir and has the orientation in its EXIF as well, as phones write it."""
    import pillow_heif

    pixels = stored(image, orientation)
    if bits > 8:
        data = (np.asarray(pixels).astype("<u2") * 257).tobytes()
        file = pillow_heif.from_bytes("RGB;16", pixels.size, data)
    else:
        file = pillow_heif.from_bytes(pixels.mode, pixels.size, pixels.tobytes())
    file.info["exif"] = exif_of(orientation).tobytes()
    out = io.BytesIO()
    file.save(out, quality=quality, thumbnails=list(thumbnails), enc_params={"preset": "ultrafast"})
    return out.getvalue()


def mpo(image: Image.Image, orientation: int) -> bytes:
    """Two images in one file; the second is another."""
    second = Image.new("RGB", image.size, "black")
    return encoded(
        stored(image, orientation), "MPO", save_all=True, append_images=[second], exif=exif_of(orientation), quality=90
    )


def animated(image: Image.Image, kind: str) -> bytes:
    """An animation whose second frame is black."""
    return encoded(image, kind, save_all=True, append_images=[Image.new("RGB", image.size)], duration=100)


def transcoded_jxl(image: Image.Image, orientation: int, folder: Path) -> bytes:
    """A JPEG that JPEG XL holds byte by byte; its encoder takes it from a file."""
    path = folder / "transcoded.jpg"
    path.write_bytes(encoded(stored(image, orientation), "JPEG", quality=95, exif=exif_of(orientation)))
    with Image.open(path) as opened:
        return encoded(opened, "JXL", lossless_jpeg=True)


def _directory(entries: dict[int, tuple[int, Any]], at: int) -> bytes:
    """A directory of a TIFF at this place, what does not fit into its entries behind it."""
    letters = {1: "B", 3: "H", 4: "I", 5: "I", 10: "i"}
    body, tail = struct.pack("<H", len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        data = values if kind == 2 else struct.pack(f"<{len(values)}{letters[kind]}", *values)
        count = len(values) // 2 if kind in (5, 10) else len(values)
        if len(data) > 4:
            location = at + 2 + 12 * len(entries) + 4 + len(tail)
            tail += data + bytes(len(data) % 2)
            data = struct.pack("<I", location)
        body += struct.pack("<HHI4s", tag, kind, count, data)
    return body + bytes(4) + tail


def dng(image: Image.Image, orientation: int = 1, preview: tuple[int, int] | None = None) -> bytes:
    """A raw file of Adobe's format: what a sensor behind red, green and blue filters records, and a JPEG preview.

    preview: size of the preview while the camera is upright; None for the image's.
    """
    pixels = stored(image, orientation)
    # Twice as many sensor pixels on a side as the image has, RG above GB, linear light.
    sensor = (np.asarray(pixels) / 255.0) ** 2.2 * 4000
    mosaic = np.empty((2 * pixels.height, 2 * pixels.width), "<u2")
    mosaic[0::2, 0::2], mosaic[0::2, 1::2] = sensor[..., 0], sensor[..., 1]
    mosaic[1::2, 0::2], mosaic[1::2, 1::2] = sensor[..., 1], sensor[..., 2]
    small = stored(image.resize(preview) if preview else image, orientation)
    jpeg, raw = encoded(small, "JPEG", quality=95), mosaic.tobytes()
    height, width = mosaic.shape
    unit = (1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1)

    def directories(second: int, raw_at: int, jpeg_at: int) -> tuple[bytes, bytes]:
        first = _directory({
            254: (4, [0]), 256: (4, [width]), 257: (4, [height]), 258: (3, [16]), 259: (3, [1]), 262: (3, [32803]),
            271: (2, b"Test\0"), 272: (2, b"Camera\0"), 273: (4, [raw_at]), 274: (3, [orientation]), 277: (3, [1]),
            278: (4, [height]), 279: (4, [len(raw)]), 284: (3, [1]), 330: (4, [second]), 33421: (3, [2, 2]),
            33422: (1, [0, 1, 1, 2]), 50706: (1, [1, 4, 0, 0]), 50707: (1, [1, 1, 0, 0]), 50708: (2, b"Test Camera\0"),
            50717: (4, [4095]), 50721: (10, unit), 50728: (5, (1, 1, 1, 1, 1, 1)), 50778: (3, [21]),
        }, 8)  # fmt: skip
        return first, _directory({
            254: (4, [1]), 256: (4, [small.width]), 257: (4, [small.height]), 258: (3, [8, 8, 8]), 259: (3, [7]),
            262: (3, [6]), 273: (4, [jpeg_at]), 277: (3, [3]), 278: (4, [small.height]), 279: (4, [len(jpeg)]),
        }, second)  # fmt: skip

    first, second = directories(0, 0, 0)
    second_at = 8 + len(first)
    raw_at = second_at + len(second)
    first, second = directories(second_at, raw_at, raw_at + len(raw))
    return b"II*\0" + struct.pack("<I", 8) + first + second + raw + jpeg


def _plain(ending: str) -> tuple[bytes, tuple[tuple[int, ...], ...]]:
    kind, mode, options = PLAIN[ending]
    colours = BITS if mode == "1" else GREYS if mode in ("L", "LA", "I;16") else CORNERS
    image = corners((64, 64) if ending in ("ico", "icns") else (96, 64), colours)
    if mode == "I;16":
        converted = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "CMYK":
        # Colours that the conversion from CMYK, which has no profile here, returns as they are.
        converted = image.convert("CMYK")
    else:
        converted = image.convert(mode)
    return encoded(converted, kind, **options), colours


def photo_kinds(folder: Path) -> dict[str, tuple[bytes, tuple[tuple[int, ...], ...]]]:
    """Files by ending, with the colours of their upright corners; those that a camera turned are named by how."""
    image = corners()
    kinds = {ending: _plain(ending) for ending in PLAIN}
    turned: dict[str, bytes] = {
        "psd": psd(image),
        "anim.gif": animated(image, "GIF"),
        "anim.webp": animated(image, "WEBP"),
    }
    for orientation in (1, 3, 6, 8):
        pixels = stored(image, orientation)
        for ending, kind in (("jpg", "JPEG"), ("webp", "WEBP"), ("avif", "AVIF"), ("tif", "TIFF"), ("exif.png", "PNG")):
            options = {} if kind in ("TIFF", "PNG") else {"quality": 90}
            turned[f"{orientation}.{ending}"] = encoded(pixels, kind, exif=exif_of(orientation), **options)
        turned[f"{orientation}.mpo"] = mpo(image, orientation)
        turned[f"{orientation}.dng"] = dng(image, orientation)
        turned[f"{orientation}.transcoded.jxl"] = transcoded_jxl(image, orientation, folder)
    for orientation in (1, 6):
        turned[f"{orientation}.heic"] = heic(image, orientation)
    turned["2.heif"], turned["10bit.hif"] = heic(image, 2), heic(image, bits=10)
    turned["alpha.heic"] = heic(image.convert("RGBA"))
    return kinds | {ending: (data, CORNERS) for ending, data in turned.items()}
