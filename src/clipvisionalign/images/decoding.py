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
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from clipvisionalign.images import jxl
from clipvisionalign.images.formats import INSTALL_DECODERS, OPTIONAL_FORMATS, is_decodable, optional_format
from clipvisionalign.images.heif import with_thumbnail_as_primary
from clipvisionalign.images.raw import RawImageFile, is_raw_tiff
from clipvisionalign.images.rgb import read_orientation, to_rgb

#: Pixels in the largest image that is decoded: 100 million, above any camera's and below a bomb's.
MAX_PIXELS = 100_000_000

#: How much more than the wanted size a JPEG is decoded at: what is then resized hardly differs from all of it.
JPEG_DRAFT_SCALE = 2

#: How much more than the required size an embedded thumbnail has, which its encoder has filtered and compressed.
THUMBNAIL_SCALE = 1.5

#: Formats of Pillow that are not opened: EPS runs Ghostscript on a program, IPTC takes any bytes for its own, and the
#: others read a header without being able to decode what follows.
UNSUPPORTED_FORMATS = frozenset({"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})

#: Bytes from the beginning of a file by which an image is recognised without an ending.
HEAD_BYTES = 4096

ImageSource = Path | str | bytes | Image.Image

_NOT_INSTALLED = " decoder not installed"


class ImageError(ValueError):
    """An image that cannot be used.

    Args:
        kind: Name of the fault, as `check` lists it: "missing image", "unreadable image", "truncated image", "enormous
            image", "HEIC decoder not installed" (and so on for other formats).
        message: The image, and what is wrong with it.
        transient: Whether the reason lies outside of the file and may pass (an I/O error, a decoder that is not
            installed), so that the file is worth another try though it has not changed; the attribute `passing`.
    """

    def __init__(self, kind: str, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.passing = transient

    @property
    def missing_decoder(self) -> str:
        """The format whose decoder is not installed, such as "HEIC"; "" for any other fault."""
        return self.kind.removesuffix(_NOT_INSTALLED) if self.kind.endswith(_NOT_INSTALLED) else ""

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
        with _opened_file(image) as file:
            opened = _open_format(image, optional_format(head) or ("RAW" if is_raw_tiff(file) else ""), file)
    _check_size(name, opened.size, opened)
    return opened


def _opened_file(image: Path | str | bytes) -> BinaryIO:
    return io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb")


def _open_format(image: Path | str | bytes, optional: str, file: BinaryIO) -> Image.Image:
    """Open a file of an optional format by its one decoder, and any other by whichever of Pillow's takes it."""
    name = describe_image(image)
    if optional and not is_decodable(optional):
        format_name = OPTIONAL_FORMATS[optional]
        article = "an" if format_name[0] == "A" else "a"
        message = f"{name}: {article} {format_name} image, which needs {INSTALL_DECODERS}"
        raise ImageError(format_name + _NOT_INSTALLED, message, transient=True)
    source = io.BytesIO(image) if isinstance(image, bytes) else Path(image)
    if optional == "RAW":
        return RawImageFile(source)
    if optional == "JXL":
        file.seek(0)
        _check_size(name, jxl.read_size(file))
    return Image.open(source, formats=[optional] if optional else _formats())


def _check_size(name: str, size: tuple[int, int], opened: Image.Image | None = None) -> None:
    """Raise ImageError for too many pixels, and close the image."""
    width, height = size
    if width * height > MAX_PIXELS:
        if opened is not None:
            opened.close()
        message = f"{name}: {width:,} x {height:,} pixels are more than the {MAX_PIXELS:,} that are decoded"
        raise ImageError("enormous image", message)


class DecodedImage(NamedTuple):
    """An image, and the size that it has in its file.

    Attributes:
        image: Upright 8-bit RGB, at its full size or less.
        width: Pixels of the whole upright image.
        height: Likewise.
    """

    image: Image.Image
    width: int
    height: int


def decode_image(image: Path | str | bytes, size: int = 0, longer: int = 0, embedded: bool = True) -> DecodedImage:
    """Decode an image to upright 8-bit RGB, at the size that is needed.

    Args:
        image: A path, or the bytes of a file.
        size: Pixels that are required of the shorter side; 0 for full size. A large JPEG is decoded at a half, a
            quarter or an eighth, as long as `JPEG_DRAFT_SCALE` times `size` remains.
        longer: Pixels that are required of the longer side.
        embedded: Whether the thumbnail of a HEIC file is taken for it, where it has `THUMBNAIL_SCALE` times
            `size` and its shape.

    Returns:
        The image and its full size.

    Raises:
        ImageError: It cannot be decoded, or it is too large; the message has the reason.

    >>> import io
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (1600, 1200)).save(file, "JPEG")
    >>> decoded = decode_image(file.getvalue(), size=100)
    >>> decoded.image.size, decoded.width, decoded.height
    ((400, 300), 1600, 1200)
    """
    with open_header(image) as opened, _raising_image_errors(image):
        width, height = opened.size
        if size:
            thumbnail = _embedded_thumbnail(image, opened, size, longer) if embedded else None
            if thumbnail is not None:
                return DecodedImage(thumbnail, width, height)
            # Of a raw file the preview is taken, if it is as large as this.
            required = max(size, longer) if opened.format == "RAW" else JPEG_DRAFT_SCALE * max(size, longer)
            opened.draft(None, (required, required))
        rgb = to_rgb(opened)
        # Read after loading, by which some decoders apply it, and take it out of the tags.
        return DecodedImage(rgb, height, width) if read_orientation(opened) > 4 else DecodedImage(rgb, width, height)


def _embedded_thumbnail(image: Path | str | bytes, opened: Image.Image, size: int, longer: int) -> Image.Image | None:
    """The upright thumbnail of a HEIC file; None where it has none that will do."""
    if opened.format != "HEIF" or max(opened.size) <= JPEG_DRAFT_SCALE * max(size, longer):
        return None
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    changed = with_thumbnail_as_primary(data, round(THUMBNAIL_SCALE * size), longer)
    if not changed:
        return None
    try:
        with Image.open(io.BytesIO(changed), formats=["HEIF"]) as thumbnail:
            return to_rgb(thumbnail)
    except Exception:  # a damaged thumbnail says nothing about the image
        return None


def open_image(image: ImageSource, size: int = 0, embedded: bool = True) -> Image.Image:
    """Decode an image to upright 8-bit RGB.

    Args:
        image: A path, the bytes of a file, or a Pillow image.
        size: Pixels on a side that are required in the end; a large image is then decoded at less than its size where
            that is faster, see `decode_image`. 0 for full size.
        embedded: As in `decode_image`.

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
    return decode_image(image, size, embedded=embedded).image


def _formats() -> list[str]:
    """The formats that Pillow opens by itself, those without a magic number last: they take what nothing else is."""
    Image.init()
    names = [name for name in Image.ID if name not in UNSUPPORTED_FORMATS and name not in OPTIONAL_FORMATS]
    return sorted(names, key=lambda name: Image.OPEN[name][1] is None)


#: Formats with a magic number of three bytes and more: that alone shows what a file is meant to be.
_DISTINCT_SIGNATURES = frozenset({"JPEG", "PNG", "GIF", "WEBP", "JPEG2000", "TIFF", "PSD", "QOI", "DDS", "ICNS"})


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
    if optional_format(head):
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
