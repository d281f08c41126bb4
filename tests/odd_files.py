"""Folders as they are found: odd names, links in circles, and files that are no images, in twelve ways."""

from __future__ import annotations

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image

#: Names that a file can have, in bytes.
ODD_NAMES = [
    b"with space.jpg", b"it's \"quoted\".jpg", b"new\nline.jpg", b"not-utf8-\xff\xfe.jpg", "ümlaut-日本.jpg".encode(),
    b"--flag.jpg", b"UPPER.JPG", b"sub/100%_sure.jpg", b"; DROP TABLE pictures.jpg",
]  # fmt: skip


def encoded_image(kind: str = "JPEG", colour: str = "green") -> bytes:
    """A small image's file."""
    out = BytesIO()
    Image.new("RGB", (60, 40), colour).save(out, kind)
    return out.getvalue()


def broken() -> dict[str, bytes]:
    """Twelve files that cannot be decoded, by name."""
    jpeg, png = encoded_image("JPEG"), encoded_image("PNG")
    return {
        "empty.jpg": b"", "text.jpg": b"no picture at all", "cut.jpg": jpeg[: len(jpeg) // 2], "cut.png": png[:60],
        "head.jpg": jpeg[:20], "zeros.png": bytes(500), "html.gif": b"<html></html>",
        "half.webp": b"RIFF\x10\x00\x00\x00WEBP", "tiff.tif": b"II*\x00\xff\xff\xff\xff", "bmp.bmp": b"BM" + bytes(30),
        "pdf.png": b"%PDF-1.4\n", "gif.gif": b"GIF89a" + bytes(4),
    }  # fmt: skip


def huge_header() -> bytes:
    """A PNG that says it has 40,000 x 40,000 pixels, without them."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + b"\0\0\0\0IDAT"


def write_odd_files(folder: Path) -> tuple[set[bytes], set[str]]:
    """Odd names, broken files and links in circles; what has to be indexed, and what has to be listed as broken."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(ODD_NAMES):
        # Different bytes, so that none is taken for a copy.
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(encoded_image() + bytes([number]))
    for name, data in broken().items():
        (folder / name).write_bytes(data)
    (folder / "huge.png").write_bytes(huge_header())
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "sub" / "up").symlink_to("..", target_is_directory=True)
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "nowhere.jpg").symlink_to("gone.jpg")
    (folder / "again.jpg").symlink_to("with space.jpg")
    (folder / "notes.txt").write_text("no picture")
    return set(ODD_NAMES), {*broken(), "huge.png"}
