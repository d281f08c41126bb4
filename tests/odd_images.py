"""Images as people have them: in two dozen formats, whole and damaged, with odd EXIF, colour keys and deep greys."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

#: 32 x 16 pixels, red on the left and green on the right, as HEVC in HEIF: nothing that is installed writes it.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAAAERAAAEA"
    "AQAAAAABoAABAAAAAAAAADQAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmND"
    "AQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAA"
    "AAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAAAAIAAAAAEAAAAQAAAAAf///+AAAAAC"
    "////0AAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYECAwWEAAAAPG1kYXQAAAAwKAGvGSFuUkDvXaW//6ow/3UF/ltk7WYUJ14v+JP1"
    "Stq18qLfZoCrdmf0KKbtbq2A"
)

#: Formats that Pillow writes, the mode they take, and options.
WRITTEN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpg": ("JPEG", "RGB", {}), "progressive.jpg": ("JPEG", "RGB", {"progressive": True}), "cmyk.jpg": ("JPEG", "CMYK", {}),
    "png": ("PNG", "RGB", {}), "palette.png": ("PNG", "P", {}), "gif": ("GIF", "P", {}), "webp": ("WEBP", "RGB", {}),
    "avif": ("AVIF", "RGB", {}), "bmp": ("BMP", "RGB", {}), "dib": ("DIB", "RGB", {}), "tif": ("TIFF", "RGB", {}),
    "lzw.tif": ("TIFF", "RGB", {"compression": "tiff_lzw"}), "tga": ("TGA", "RGB", {"compression": "tga_rle"}),
    "ppm": ("PPM", "RGB", {}), "pgm": ("PPM", "L", {}), "pcx": ("PCX", "P", {}), "ico": ("ICO", "RGBA", {}),
    "icns": ("ICNS", "RGBA", {}), "dds": ("DDS", "RGBA", {}), "jp2": ("JPEG2000", "RGB", {}), "sgi": ("SGI", "RGB", {}),
    "mpo": ("MPO", "RGB", {}), "xbm": ("XBM", "1", {}), "im": ("IM", "RGB", {}), "qoi": ("QOI", "RGB", {}),
}  # fmt: skip


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image's file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(size: tuple[int, int] = (48, 32), seed: int = 0) -> Image.Image:
    """An image whose every part is different from the others."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def intact_files(seed: int = 0) -> dict[str, bytes]:
    """A file in every format, by its ending. Formats that this Pillow does not write are left out."""
    Image.init()
    files = {}
    for ending, (kind, mode, options) in WRITTEN.items():
        if kind in Image.SAVE:
            files[ending] = encoded(noise(seed=seed).convert(mode), kind, **options)
    return files | {"psd": psd(noise(seed=seed)), "heic": HEIC}


def psd(image: Image.Image) -> bytes:
    """Photoshop's format, not compressed."""
    width, height = image.size
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3)
    return head + bytes(12) + bytes(2) + np.asarray(image).transpose(2, 0, 1).tobytes()


DAMAGES = ("whole", "cut", "header alone", "bits", "zeros", "noise", "shifted", "doubled")


def damaged(data: bytes, how: str, rng: random.Random) -> bytes:
    """A file that something happened to."""
    content, where = bytearray(data), rng.randrange(len(data))
    length = rng.randrange(1, max(2, len(data) // 4))
    if how == "cut":
        del content[where:]
    elif how == "header alone":
        del content[rng.randrange(4, 64) :]
    elif how == "bits":
        for _ in range(rng.randrange(1, 12)):
            content[rng.randrange(min(len(content), rng.choice((64, 10**6))))] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        content[where : where + length] = bytes(length)
    elif how == "noise":
        content[where : where + length] = rng.randbytes(length)
    elif how == "shifted":
        content[where:where] = rng.randbytes(length)
    elif how == "doubled":
        content += content[where:]
    return bytes(content)


def damaged_files(count: int = 200, seed: int = 0) -> dict[str, bytes]:
    """So many files, by name: every format in turn, one damage after the other."""
    rng = random.Random(seed)
    files = list(intact_files(seed).items())
    files_by_name = {}
    for number in range(count):
        ending, data = files[number % len(files)]
        how = DAMAGES[number // len(files) % len(DAMAGES)]
        # Something at the end that is different, so that no file is a copy of another.
        files_by_name[f"{number:03} {how}.{ending}"] = damaged(data, how, rng) + number.to_bytes(2, "big")
    return files_by_name


# --- EXIF ------------------------------------------------------------------------------------------------------------

ORIENTATION, RESOLUTION = 274, 282
BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, FLOAT = 1, 2, 3, 4, 5, 7, 11

#: A tag, its type, its count, and four bytes of value or place.
Entry = tuple[int, int, int, bytes]


def exif_block(entries: Sequence[Entry], order: str = "<", tail: bytes = b"", following: int = 0) -> bytes:
    """The TIFF structure of an EXIF block with these tags, as they come."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    body = b"".join(struct.pack(f"{order}HHI4s", *entry) for entry in entries)
    return head + struct.pack(f"{order}H", len(entries)) + body + struct.pack(f"{order}I", following) + tail


def turned(orientation: int, order: str = "<") -> Entry:
    """The tag of an orientation, as the standard has it."""
    return ORIENTATION, SHORT, 1, struct.pack(f"{order}HH", orientation, 0)


#: Tags of a wrong type, count or place, each of which some camera, phone or program writes.
ODD_TAGS: dict[str, Entry] = {
    "resolution as text": (RESOLUTION, ASCII, 3, b"72\0\0"), "resolution as a short": (RESOLUTION, SHORT, 1, b"\x48\0\0\0"),
    "resolution by zero": (RESOLUTION, RATIONAL, 1, struct.pack("<I", 0)), "resolution as bytes": (RESOLUTION, BYTE, 4, b"abcd"),
    "resolution as a float": (RESOLUTION, FLOAT, 1, struct.pack("<f", 72.0)), "two resolutions": (RESOLUTION, SHORT, 2, b"HHHH"),
    "maker as a number": (271, LONG, 1, b"\1\0\0\0"), "date as bytes": (306, BYTE, 4, b"2024"), "no type": (305, 0, 1, b"abcd"),
    "type 13": (305, 13, 1, b"\1\0\0\0"), "type 99": (305, 99, 1, b"\1\0\0\0"), "no values": (305, SHORT, 0, b"\0\0\0\0"),
    "beyond the end": (305, ASCII, 1000, b"\xf0\xff\xff\x0f"), "a billion values": (305, LONG, 10**9, b"\x08\0\0\0"),
    "EXIF nowhere": (34665, LONG, 1, b"\xf0\xff\xff\xff"), "EXIF as text": (34665, ASCII, 4, b"abc\0"),
    "EXIF in itself": (34665, LONG, 1, b"\x08\0\0\0"), "GPS as text": (34853, ASCII, 4, b"abc\0"),
    "GPS as shorts": (34853, SHORT, 2, b"\1\0\2\0"), "XMP as text": (700, ASCII, 4, b"abc\0"), "XMP as numbers": (700, SHORT, 2, b"\1\0\2\0"),
    "thumbnail nowhere": (513, LONG, 1, b"\xff\xff\xff\x7f"), "padding": (59932, UNDEFINED, 4, b"\0\0\0\0"),
    "text without an end": (270, ASCII, 4, b"\xff\xfe\xfd\xfc"), "signed maker": (271, 9, 1, b"\xff\xff\xff\xff"),
}  # fmt: skip


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(size: tuple[int, int], bit_depth: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG of any depth and kind of colour. rows: packed, a filter's byte before each; chunks: before the pixels."""
    head = struct.pack(">IIBBBBB", *size, bit_depth, colour, 0, 0, 0)
    more = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    body = chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_of_greys(values: np.ndarray, bits: int) -> bytes:
    """A TIFF of unsigned greys, packed in so many bits each, the highest first."""
    height, width = values.shape
    if bits == 16:
        values = values.byteswap()
    rows = ["".join(f"{value:0{bits}b}" for value in row) for row in values.tolist()]
    content = b"".join(int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big") for row in rows)
    return _tiff((width, height), content, {258: bits, 262: 1})


def tiff_of(values: np.ndarray, photometric: int, packed: bool) -> bytes:
    """A TIFF of greys of any type. photometric: 0 where the greatest value is black; packed: compressed."""
    height, width = values.shape
    content = zlib.compress(values.tobytes()) if packed else values.tobytes()
    tags = {258: 8 * values.itemsize, 259: 8 if packed else 1, 262: photometric}
    return _tiff((width, height), content, tags | {339: "uif".index(values.dtype.kind) + 1})


def _tiff(size: tuple[int, int], content: bytes, tags: dict[int, int]) -> bytes:
    width, height = size
    usual = {256: width, 257: height, 259: 1, 273: 8, 277: 1, 278: height, 279: len(content)}
    entries = b"".join(
        struct.pack("<HHIHxx" if tag in (258, 259, 262, 277, 339) else "<HHII", tag,
                    SHORT if tag in (258, 259, 262, 277, 339) else LONG, 1, value)
        for tag, value in sorted((usual | tags).items())
    )  # fmt: skip
    count = struct.pack("<H", len(usual | tags))
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + count + entries + bytes(4)


def tiff_with(image: Image.Image, tags: Sequence[Entry]) -> bytes:
    """A TIFF of colours with more tags than it needs."""
    (width, height), pixels = image.size, np.asarray(image).tobytes()
    end = 8 + 2 + 12 * (9 + len(tags)) + 4
    numbers = [
        (256, LONG, 1, width), (257, LONG, 1, height), (258, SHORT, 3, end), (259, SHORT, 1, 1), (262, SHORT, 1, 2),
        (273, LONG, 1, end + 6), (277, SHORT, 1, 3), (278, LONG, 1, height), (279, LONG, 1, len(pixels)),
    ]  # fmt: skip
    own = [(tag, kind, count, struct.pack("<I", value)) for tag, kind, count, value in numbers]
    return exif_block(sorted([*own, *tags])) + struct.pack("<3H", 8, 8, 8) + pixels


def with_exif(image: Image.Image, kind: str, block: bytes) -> bytes:
    """A JPEG, PNG or WebP with an EXIF block, byte by byte as it is given."""
    if kind == "PNG":
        data = encoded(image, "PNG")
        return data[:33] + chunk(b"eXIf", block) + data[33:]
    if kind == "WEBP":
        return encoded(image, "WEBP", exif=b"Exif\0\0" + block, quality=90)
    body = b"Exif\0\0" + block
    data = encoded(image, "JPEG", quality=95)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


@st.composite
def exif_blocks(draw: st.DrawFn) -> bytes:
    """EXIF blocks: mostly a list of tags that begins rightly, of any types, counts and places; else any bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    order = draw(st.sampled_from("<>"))
    known = st.sampled_from(
        [ORIENTATION, RESOLUTION, 271, 283, 296, 305, 306, 330, 513, 514, 700, 34665, 34853, 37500, 40965]
    )
    counts = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 255, 2**16, 2**31, 2**32 - 1])
    values = st.one_of(
        st.binary(min_size=4, max_size=4), st.integers(0, 200).map(lambda n: struct.pack(f"{order}I", n))
    )
    entries = st.tuples(known | st.integers(0, 65535), st.integers(0, 18), counts, values)
    block_entries = draw(st.lists(entries, max_size=8))
    if draw(st.booleans()):
        block_entries.insert(draw(st.integers(0, len(block_entries))), turned(draw(st.integers(0, 9)), order))
    block = exif_block(
        block_entries, order, draw(st.binary(max_size=120)), draw(st.sampled_from([0, 8, 14, 50, 2**32 - 1]))
    )
    return block[: draw(st.integers(0, len(block)))] if draw(st.integers(0, 4)) == 0 else block


def check_exif(block: bytes) -> None:
    """An EXIF block, whatever stands in it, costs no image: its pixels are whole, and are what is opened."""
    from clipvisionalign.images import open_image

    for kind in ("JPEG", "PNG", "WEBP"):
        opened = open_image(with_exif(Image.new("RGB", (6, 4), "red"), kind, block))
        assert opened.mode == "RGB"
        assert opened.size in ((6, 4), (4, 6))
        assert not opened.info
