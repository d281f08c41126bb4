"""The header of a JPEG XL file (ISO/IEC 18181-1 and -2): its decoder decodes every pixel before it has a size."""

from __future__ import annotations

from typing import BinaryIO

_CODESTREAM = b"\xff\x0a"
_CONTAINER = bytes.fromhex("0000000c4a584c200d0a870a")
#: Width over height, by the three bits of a header that has no width.
_RATIOS = ((1, 1), (1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
#: Bits of a length, by two bits in front of it.
_LENGTH_BITS = (9, 13, 18, 30)
#: Bytes of a codestream that hold its size, and then some.
_HEADER_BYTES = 32


def is_jxl(head: bytes) -> bool:
    """Whether a file with these first bytes is a JPEG XL image.

    Args:
        head: The first bytes of the file.

    Returns:
        Whether it is one. The two bytes of a bare codestream count only if a plausible size follows.
    """
    if head.startswith(_CONTAINER):
        return True
    return head.startswith(_CODESTREAM) and len(head) > 8 and max(_codestream_size(head)) <= 1 << 20


def read_size(file: BinaryIO) -> tuple[int, int]:
    """The size of an image, before its orientation is applied.

    Args:
        file: The file, at its beginning.

    Returns:
        Width and height in pixels; (0, 0) where there is no header.
    """
    head = file.read(len(_CONTAINER))
    if head.startswith(_CODESTREAM):
        return _codestream_size(head + file.read(_HEADER_BYTES))
    codestream = b""
    while len(codestream) < _HEADER_BYTES and len(box := file.read(8)) == 8:
        length, kind, header = int.from_bytes(box[:4], "big"), box[4:], 8
        if length == 1:
            length, header = int.from_bytes(file.read(8), "big"), 16
        start = file.tell()
        if kind in (b"jxlc", b"jxlp"):
            skipped = 4 if kind == b"jxlp" else 0  # the number of the part
            limit = _HEADER_BYTES if length == 0 else min(_HEADER_BYTES, length - header)
            codestream += file.read(max(0, limit))[skipped:]
        if length == 0:
            break
        if length < header:
            return 0, 0
        file.seek(start + length - header)
    return _codestream_size(codestream)


def _codestream_size(codestream: bytes) -> tuple[int, int]:
    """The SizeHeader that follows the signature; bits are read from the lowest on."""
    if not codestream.startswith(_CODESTREAM):
        return 0, 0
    bits = int.from_bytes(codestream[2:_HEADER_BYTES], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def length() -> int:
        return 8 * (take(5) + 1) if small else take(_LENGTH_BITS[take(2)]) + 1

    height = length()
    ratio = take(3)
    width = height * _RATIOS[ratio][0] // _RATIOS[ratio][1] if ratio else length()
    return width, height
