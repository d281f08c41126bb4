"""Opening images safely: from a path, bytes or a Pillow image to an upright 8-bit RGB image.

What cannot be opened raises `ImageError`, whose message names the image and what is wrong with it: whatever a decoder
raises of damaged bytes, nothing else leaves this module.

- The header's size is checked before a pixel is decoded: a 30,000 x 30,000 image does not take 2.7 GB first.
- An image is recognised by its content (`is_image_content`), not by its ending.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from clipvisionalign.images.rgb import to_rgb

#: Pixels in the largest image that is decoded: 100 million, above any camera's and below a bomb's.
MAX_PIXELS = 100_000_000

#: How much more than the wanted size a JPEG is decoded at: what is then resized hardly differs from all of it.
JPEG_DRAFT_SCALE = 2

#: Formats of Pillow that are not opened: EPS runs Ghostscript on a program, IPTC takes any bytes for its own, and the
#: others read a header without being able to decode what follows.
UNSUPPORTED_FORMATS = frozenset({"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})

#: Bytes from the beginning of a file by which an image is recognised without an ending.
HEAD_BYTES = 4096

ImageSource = Path | str | bytes | Image.Image


class ImageError(ValueError):
    """An image that cannot be used.

    Args:
        kind: Name of the fault, as `check` lists it: "missing image", "unreadable image", "truncated image", "enormous
            image", "decoder not installed".
        message: The image, and what is wrong with it.
        transient: Whether the reason lies outside of the file and may pass (an I/O error, a decoder that is not
            installed), so that the file is worth another try though it has not changed; the attribute `passing`.
    """

    def __init__(self, kind: str, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.passing = transient

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross processes; the default takes __init__ for one of the message alone.
        return type(self), (self.kind, str(self), self.passing)


def describe_image(image: ImageSource) -> str:
    """What to call an image in a message.

    Args:
        image: A path, the bytes of a file, or a Pillow image.

    Returns:
        The path, or "<1234 bytes>", or "<RGB image (64, 64)>".
    """
    if isinstance(image, bytes):
        return f"<{len(image)} bytes>"
    return str(image) if isinstance(image, (str, Path)) else f"<{image.mode} image {image.size}>"


@contextmanager
def _raising_image_errors(image: ImageSource) -> Iterator[None]:
    """Raises as ImageError whatever is raised within: of damaged bytes decoders raise all sorts."""
    try:
        with warnings.catch_warnings():
            # What Pillow warns of (odd EXIF, a size near its own limit) is either decoded all the same or raised.
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            yield
    except ImageError:
        raise
    except MemoryError:
        memory_message = f"{describe_image(image)}: decoding it takes more memory than there is"
        raise ImageError("enormous image", memory_message, transient=True) from None
    except Exception as error:
        kind, reason = _kind_and_reason(error)
        message = f"{describe_image(image)}: {reason}"
        raise ImageError(kind, message, isinstance(error, OSError) and error.errno is not None) from None


def _kind_and_reason(error: Exception) -> tuple[str, str]:
    if isinstance(error, UnidentifiedImageError):
        return "unreadable image", "not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return "enormous image", f"larger than any that is decoded: {error}"
    kind = "truncated image" if "truncated" in str(error).lower() else "unreadable image"
    if isinstance(error, (OSError, SyntaxError)) or (type(error) is ValueError and str(error)):
        return kind, str(error)
    # A bare IndexError's message needs its name.
    return kind, f"damaged: the decoder ends in {type(error).__name__}: {error}".rstrip(": ")


def open_header(image: Path | str | bytes) -> Image.Image:
    """Open an image as far as its header: format and size, no pixel is decoded yet.

    Args:
        image: A path, or the bytes of a file.

    Returns:
        Pillow's image, which the caller closes; not turned upright.

    Raises:
        ImageError: It is missing, empty, unreadable, has more than `MAX_PIXELS` pixels, or its decoder is not
            installed.
    """
    name = describe_image(image)
    with _raising_image_errors(image):
        if isinstance(image, bytes):
            if not image:
                raise ImageError("unreadable image", f"{name}: no bytes at all")
            head = image[:HEAD_BYTES]
        else:
            if not Path(image).is_file():
                raise ImageError("missing image", f"{name}: no such image file")
            if not (head := first_bytes(image)):
                raise ImageError("unreadable image", f"{name}: the file is empty (0 bytes)")
        if _is_heif(head) and not _heif_opener():
            way_out = 'a HEIF image, which needs pip install "clipvisionalign[heif]"'
            raise ImageError("decoder not installed", f"{name}: {way_out}", transient=True)
        source = io.BytesIO(image) if isinstance(image, bytes) else Path(image)
        opened: Image.Image = Image.open(source, formats=_formats())
    width, height = opened.size
    if width * height > MAX_PIXELS:
        opened.close()
        message = f"{name}: {width:,} x {height:,} pixels are more than the {MAX_PIXELS:,} that are decoded"
        raise ImageError("enormous image", message)
    return opened


def open_image(image: ImageSource, size: int = 0) -> Image.Image:
    """Decode an image to upright 8-bit RGB.

    Args:
        image: A path, the bytes of a file, or a Pillow image.
        size: Pixels on a side that are required in the end; a large JPEG is then decoded at a half, a quarter or an
            eighth of its size, which is faster, as long as `JPEG_DRAFT_SCALE` times `size` remains. 0 for full size.

    Returns:
        The image.

    Raises:
        ImageError: It cannot be decoded, or it is too large; the message has the reason.

    >>> open_image(Image.new("L", (3, 2), 255)).getpixel((0, 0))
    (255, 255, 255)
    """
    if isinstance(image, Image.Image):
        with _raising_image_errors(image):
            return to_rgb(image)
    with open_header(image) as opened, _raising_image_errors(image):
        if size:
            opened.draft(None, (JPEG_DRAFT_SCALE * size, JPEG_DRAFT_SCALE * size))
        return to_rgb(opened)


#: Brands of the HEIF container (ISO/IEC 23008-12) of HEVC; AVIF is the same container with AV1.
_HEVC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})


def _is_heif(head: bytes) -> bool:
    if head[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(head[:4], "big"), 256)
    brands = {head[start : start + 4] for start in (8, *range(16, end, 4))}
    return bool(brands & _HEVC_BRANDS) and not brands & {b"avif", b"avis"}


@lru_cache
def _heif_opener() -> bool:
    """Whether Pillow opens HEIF; pi-heif is taught to it where it is installed and nothing else does."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        try:
            import pi_heif
        except ImportError:
            return False
        pi_heif.register_heif_opener()
    return True


def _formats() -> list[str]:
    """The formats that are opened, those without a magic number last: they take what nothing else is."""
    Image.init()
    names = [name for name in Image.ID if name not in UNSUPPORTED_FORMATS]
    return sorted(names, key=lambda name: Image.OPEN[name][1] is None)


#: Formats with a magic number of three bytes and more: that alone shows what a file is meant to be.
_DISTINCT_SIGNATURES = frozenset(
    {"JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "JPEG2000", "TIFF", "PSD", "QOI", "DDS", "ICNS"}
)


def first_bytes(path: str | bytes | Path) -> bytes:
    """The first bytes of a file, as `exclusion_reason` takes them.

    Args:
        path: The file; links are followed.

    Returns:
        At most `HEAD_BYTES` bytes; none of a pipe or a device, which would block.

    Raises:
        OSError: It cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        return b""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def is_image_content(head: bytes, guess: bool = False) -> bool:
    """Whether a file with these first bytes is an image, whole or damaged, of a format that is opened.

    Decided by Pillow's magic numbers; those that are short enough to stand at the beginning of something else count
    only if the whole header can be read.

    Args:
        head: The first `HEAD_BYTES` bytes of the file, or all of a shorter one.
        guess: Whether formats without a magic number are tried as well (TGA, Photo CD, ...).

    Returns:
        Whether it is one.

    >>> is_image_content(bytes.fromhex("89504e470d0a1a0a")), is_image_content(b"a,b")
    (True, False)
    """
    if _is_heif(head):
        return True
    weak = []
    for name in _formats():
        accept = Image.OPEN[name][1]
        if not (guess if accept is None else _accepts(accept, head)):
            continue
        if name in _DISTINCT_SIGNATURES:
            return True
        weak.append(name)
    if not weak:
        return False
    try:
        with _raising_image_errors(head), Image.open(io.BytesIO(head), formats=weak):
            return True
    except ImageError as error:
        # A header that is longer than what was read of the file.
        return error.kind == "truncated image" and len(head) == HEAD_BYTES


def _accepts(accept: Callable[[bytes], bool | str], head: bytes) -> bool:
    try:
        return bool(accept(head[:16]))
    except Exception:  # of fewer bytes than it counts on
        return False
