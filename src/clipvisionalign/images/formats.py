"""Formats whose decoders are optional packages: recognised by their first bytes, and registered with Pillow.

Each is opened by one decoder only, so that what is in a file, and not its ending, decides which package it needs.
"""

from __future__ import annotations

from functools import lru_cache

from PIL import Image

from clipvisionalign.images import jxl, raw

#: What installs every optional decoder.
INSTALL_DECODERS = 'pip install "clipvisionalign[photos]"'

#: The name of each format in messages, by the name that its decoder has in Pillow's registry.
OPTIONAL_FORMATS = {"HEIF": "HEIC", "JXL": "JPEG XL", "RAW": "camera raw", "AVIF": "AVIF"}

#: Brands of the HEIF container (ISO/IEC 23008-12): of HEVC, and those that leave the codec open.
_HEIF_BRANDS = frozenset(
    {
        b"heic",
        b"heix",
        b"heim",
        b"heis",
        b"hevc",
        b"hevx",
        b"hevm",
        b"hevs",
        b"mif1",
        b"mif2",
        b"msf1",
        b"avci",
        b"avcs",
    }
)
_AVIF_BRANDS = frozenset({b"avif", b"avis"})


def optional_format(head: bytes) -> str:
    """The format of a file that an optional package decodes.

    Args:
        head: Its first bytes, at least 256 of a longer file. A raw file in the structure of a TIFF may look like any
            other by them, see `raw.is_raw_tiff`.

    Returns:
        A key of `OPTIONAL_FORMATS`; "" for any other content.

    >>> optional_format(bytes.fromhex("0000001c") + b"ftypheic" + bytes(16)), optional_format(b"II*" + bytes(5))
    ('HEIF', '')
    """
    if head[4:8] == b"ftyp":
        end = min(int.from_bytes(head[:4], "big"), 256)
        brands = [head[start : start + 4] for start in (8, *range(16, end, 4))]
        if brands[0] == b"crx ":
            return "RAW"
        if _AVIF_BRANDS & set(brands):
            return "AVIF"
        return "HEIF" if _HEIF_BRANDS & set(brands) else ""
    if jxl.is_jxl(head):
        return "JXL"
    return "RAW" if head.startswith(raw.SIGNATURES) or (head[8:10] == b"CR" and head.startswith(b"II*\0")) else ""


@lru_cache
def is_decodable(name: str) -> bool:
    """Whether a format can be decoded here; its package is registered with Pillow, but for raw files.

    Args:
        name: A key of `OPTIONAL_FORMATS`.

    Returns:
        Whether its package is installed.
    """
    Image.init()
    try:
        if name == "HEIF" and name not in Image.OPEN:
            import pi_heif

            pi_heif.register_heif_opener()
        elif name == "JXL" and name not in Image.OPEN:
            import pillow_jxl  # noqa: F401 registers itself
        elif name == "RAW":
            import rawpy  # noqa: F401 `raw` opens such files, Pillow's registry has no opener

            return True
        elif name == "AVIF":
            from PIL import features

            return name in Image.OPEN and bool(features.check("avif"))
    except ImportError:
        return False
    return name in Image.OPEN
