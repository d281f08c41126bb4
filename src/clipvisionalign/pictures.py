"""Opening images safely: the ground floor that every other module stands on.

An image comes as a path, as bytes, or already opened by Pillow, and leaves as an upright RGB image. What cannot be
opened raises `PictureError`, whose message names the image and what is wrong with it: whatever a decoder raises of
damaged bytes, nothing else leaves this module.

- The orientation of EXIF or XMP is applied: of EXIF that one tag is read, and nothing of it is ever written.
- Deep greys (10 to 32 bits, floating point) are scaled to 8 bits (`_white_of`) instead of being clipped or left black.
- CMYK and palettes are converted, transparency is laid on white, that of a colour key too; an animation gives its
  first frame.
- The header's size is checked before a pixel is decoded: a 30,000 x 30,000 image does not eat 2.7 GB first.
- An image is known by its content. When a folder is listed, `why_no_image` says which files may be images: by their
  ending, and by their first bytes where the ending says nothing.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

#: Pixels in the largest image that is decoded: 100 million, above any camera's and below a bomb's.
MAX_PIXELS = 100_000_000

#: How much more than the wanted size a JPEG is decoded at: what is then resized is hardly to be told from all of it.
MARGIN = 2

#: Formats of Pillow that are not opened: EPS runs Ghostscript on a program, IPTC takes any bytes for its own, and the
#: others know a header without being able to decode what follows.
NOT_OPENED = frozenset({"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})

#: Bytes from the beginning of a file by which an image is recognised when its ending says nothing.
HEAD_BYTES = 4096

#: The share of a float's range by which its values may lie outside of it.
OVERSHOOT = 0.05

Picture = Path | str | bytes | Image.Image


class PictureError(ValueError):
    """An image that cannot be used; `kind` says in which way, as `check` lists it.

    passing: the reason lies outside the file and may pass (an I/O error, a decoder that is not installed), so that the
    file is worth another try though it has not changed.
    """

    def __init__(self, kind: str, message: str, passing: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.passing = passing

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross processes; the default takes __init__ for one of the message alone.
        return type(self), (self.kind, str(self), self.passing)


def describe_picture(picture: Picture) -> str:
    """What to call `picture` in a message."""
    if isinstance(picture, bytes):
        return f"<{len(picture)} bytes>"
    return str(picture) if isinstance(picture, (str, Path)) else f"<{picture.mode} picture {picture.size}>"


@contextmanager
def _picture_errors(picture: Picture) -> Iterator[None]:
    """Raises as PictureError whatever is raised within: of damaged bytes decoders raise all sorts."""
    try:
        with warnings.catch_warnings():
            # What Pillow warns of (odd EXIF, a size near its own limit) is either decoded all the same or raised.
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            yield
    except PictureError:
        raise
    except MemoryError:
        told = f"{describe_picture(picture)}: decoding it takes more memory than there is"
        raise PictureError("enormous picture", told, passing=True) from None
    except Exception as error:
        kind, reason = _kind_and_reason(error)
        message = f"{describe_picture(picture)}: {reason}"
        raise PictureError(kind, message, isinstance(error, OSError) and error.errno is not None) from None


def _kind_and_reason(error: Exception) -> tuple[str, str]:
    if isinstance(error, UnidentifiedImageError):
        return "unreadable picture", "not a picture that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return "enormous picture", f"larger than any that is decoded: {error}"
    kind = "truncated picture" if "truncated" in str(error).lower() else "unreadable picture"
    if isinstance(error, (OSError, SyntaxError)) or (type(error) is ValueError and str(error)):
        return kind, str(error)
    # A bare IndexError's words say little without its name.
    return kind, f"damaged: the decoder ends in {type(error).__name__}: {error}".rstrip(": ")


def open_header(picture: Path | str | bytes) -> Image.Image:
    """Open an image as far as its header: format and size are known, no pixel is decoded yet.

    Raises PictureError: missing, empty, unreadable, enormous, or of a format whose decoder is not installed.
    """
    name = describe_picture(picture)
    with _picture_errors(picture):
        if isinstance(picture, bytes):
            if not picture:
                raise PictureError("unreadable picture", f"{name}: no bytes at all")
            head = picture[:HEAD_BYTES]
        else:
            if not Path(picture).is_file():
                raise PictureError("missing picture", f"{name}: no such picture file")
            if not (head := first_bytes(picture)):
                raise PictureError("unreadable picture", f"{name}: the file is empty (0 bytes)")
        if _is_heif(head) and not _heif_opener():
            way_out = 'a HEIF picture, which needs pip install "clipvisionalign[heif]"'
            raise PictureError("decoder not installed", f"{name}: {way_out}", passing=True)
        source = io.BytesIO(picture) if isinstance(picture, bytes) else Path(picture)
        opened: Image.Image = Image.open(source, formats=_formats())
    width, height = opened.size
    if width * height > MAX_PIXELS:
        opened.close()
        message = f"{name}: {width:,} x {height:,} pixels are more than the {MAX_PIXELS:,} that are decoded"
        raise PictureError("enormous picture", message)
    return opened


def open_picture(picture: Picture, size: int = 0) -> Image.Image:
    """Decode an image to upright 8-bit RGB. Raises PictureError where it cannot be.

    size: pixels on a side that are wanted of it in the end; a large JPEG is then decoded at a half, a quarter or an
    eighth of its size, which takes less time, as long as `MARGIN` times what is wanted is left. 0 for all there is.
    """
    if isinstance(picture, Image.Image):
        with _picture_errors(picture):
            return to_rgb(picture)
    with open_header(picture) as opened, _picture_errors(picture):
        if size:
            opened.draft(None, (MARGIN * size, MARGIN * size))
        return to_rgb(opened)


# --- formats ---------------------------------------------------------------------------------------------------------

#: Brands of the HEIF container (ISO/IEC 23008-12) that say HEVC inside; AVIF is the same container with AV1.
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
    names = [name for name in Image.ID if name not in NOT_OPENED]
    return sorted(names, key=lambda name: Image.OPEN[name][1] is None)


# --- pixels ----------------------------------------------------------------------------------------------------------

#: What undoes each orientation of the EXIF standard (CIPA DC-008, tag 274) but the upright one.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


_XMP_ORIENTATION = re.compile(r"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])""")


def to_rgb(opened: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of any mode that Pillow opens; a new image, without what the file said besides its pixels.

    Raises what Pillow raises: `open_picture` is what to call.
    """
    layout = _raw_layout(opened)
    for name, kind in (("xmp", bytes), ("XML:com.adobe.xmp", str)):
        if not isinstance(opened.info.get(name), kind):
            opened.info.pop(name, None)  # a tag of a wrong type, in which Pillow searches for text while it decodes
    opened.load()
    if 0 in opened.size:
        raise ValueError("there is no pixel in it")
    orientation = _orientation(opened)
    rgb = _colours(opened, layout)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    elif rgb is opened:
        rgb = opened.copy()
    # What is turned already must not be turned again by the next who reads its EXIF.
    rgb.info = {}
    return rgb


def _orientation(opened: Image.Image) -> int:
    """The orientation, 1 (upright) to 8, that EXIF or else XMP says; 1 where that cannot be read or makes no sense.

    `ImageOps.exif_transpose` also writes the remaining tags anew, and fails where one of them is of a wrong type.
    """
    try:
        found = opened.getexif().get(ExifTags.Base.Orientation) or _orientation_of_xmp(opened)
        found = found[0] if isinstance(found, (bytes, tuple)) else found
        found = int(found)
    except Exception:  # a damaged block is none: its pixels may be whole
        return 1
    return found if 1 <= found <= 8 else 1


def _orientation_of_xmp(opened: Image.Image) -> int:
    """The orientation in an XMP packet, in any form that XML has for it: Pillow knows only that with double quotes."""
    packet = opened.info.get("XML:com.adobe.xmp") or opened.info.get("xmp") or b""
    text = packet if isinstance(packet, str) else packet.decode("utf-8", "replace")
    found = _XMP_ORIENTATION.search(text)
    return int(found[1]) if found else 1


def _raw_layout(opened: Image.Image) -> str:
    """How the file packs a pixel ("L;4", "I;12", "RGB;16B", ...); "" where Pillow does not tell. Known before
    decoding only."""
    for tile in getattr(opened, "tile", None) or ():
        arguments = tile[3]
        layout = arguments[0] if isinstance(arguments, (tuple, list)) and arguments else arguments
        return layout if isinstance(layout, str) else ""
    return ""


def _colours(opened: Image.Image, layout: str) -> Image.Image:
    """8-bit RGB of a decoded image, not turned; the image itself where it is that already."""
    if opened.mode.startswith("I") or opened.mode == "F":
        grey = np.asarray(opened)
        if opened.format == "TIFF" and layout.startswith("I;32") and "S" not in layout:
            grey = grey.view(np.uint32)  # Pillow's own greys of 32 bits have a sign
        rgb = _grey_to_rgb(grey, _white_of_format(opened, layout), opened.info.get("transparency"))
        return ImageOps.invert(rgb) if _black_is_most(opened) else rgb
    if opened.mode in ("1", "L", "RGB"):
        key = _colour_key(opened, layout)
        opaque = opened if key is None else _without_colour(opened, key)
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
    return tuple(int(part) >> 8 if layout.startswith("RGB;16") else int(part) * widen for part in key)


def _without_colour(opened: Image.Image, key: tuple[int, ...]) -> Image.Image:
    """With white where `key` stands."""
    pixels = np.array(opened.convert("L") if opened.mode == "1" else opened)
    pixels[(pixels.reshape(*pixels.shape[:2], -1) == key).all(-1)] = 255
    return Image.fromarray(pixels)


def _black_is_most(opened: Image.Image) -> bool:
    """Whether the greatest value of a deep grey is black: as TIFF says it, which Pillow undoes up to 8 bits only."""
    return opened.format == "TIFF" and getattr(opened, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0


def _white_of_format(opened: Image.Image, layout: str) -> float:
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
    """Scale a deep grey to 8 bits; a pixel of the value `key` is transparent. white: 0 where it is not known."""
    # Beyond single precision's reach of a difference nothing is told apart.
    values = np.clip(np.nan_to_num(grey.astype(np.float32)), -1e37, 1e37)
    black, white = (0.0, white) if white else _black_and_white_of(values[np.isfinite(grey)], grey.dtype.kind == "f")
    scaled = (np.clip((values - black) / (white - black), 0.0, 1.0) * 255.0).astype(np.uint8)
    if isinstance(key, int):
        scaled[grey == key] = 255
    return Image.fromarray(scaled).convert("RGB")


def _black_and_white_of(values: np.ndarray, is_float: bool) -> tuple[float, float]:
    """The range of a grey whose file does not tell it: from 0 to the least of 1, 255, and what 10, 12, 14 and 16
    bits hold that no value exceeds; from least to greatest where there are values below 0 or beyond 16 bits.

    A float's values may overshoot a range by `OVERSHOOT` of it on either side, as a filter leaves them: they are cut.

    A 12-bit camera's image in a 16-bit file is thus no black one; a 16-bit image that is all but black becomes a
    brighter one.
    """
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    room = 1 + OVERSHOOT if is_float else 1.0
    top = next((top for top in (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0) if high <= top * room), 0.0)
    return (0.0, top) if top and low >= top * (1 - room) else (low, high)


# --- which files of a folder are images ------------------------------------------------------------------------------


def _endings(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


#: Endings of images that Pillow's registry does not have.
_MORE_ENDINGS = _endings("heic heif hif jxl jif jfi pjpeg pjp jps jpg2")

#: Endings of Pillow's registry that mostly stand for something else (fitness records, point clouds, circuit boards,
#: installers): such a file is looked into.
_SHARED_ENDINGS = _endings("fit pcd gbr msp")

#: Formats with a magic number of three bytes and more: that alone shows what a file is meant to be.
_CLEAR = frozenset({"JPEG", "PNG", "GIF", "WEBP", "AVIF", "HEIF", "JPEG2000", "TIFF", "PSD", "QOI", "DDS", "ICNS"})

#: Files that are no images, whatever their bytes resemble: texts and tables, documents, arrays, archives, sources,
#: sound and film, what other programs leave.
_OTHER_FILES = _endings("""
    txt text md rst rtf tex bib log csv tsv tab json jsonl ndjson geojson xml html htm xhtml yaml yml toml ini cfg conf
    doc docx odt xls xlsx ods ppt pptx odp epub parquet arrow feather orc avro lance db sqlite sqlite3 sql mdb
    npy npz pt pth ckpt safetensors onnx pkl pickle joblib mat h5 hdf hdf5 nc tfrecord lmdb idx
    tar tgz gz bz2 xz zst zip 7z rar iso dmg cab deb rpm whl jar
    py pyc ipynb sh bat ps1 js ts css scss c h cc cpp hpp java go rs rb php pl r m lua swift
    mp3 wav flac ogg oga opus m4a aac wma aiff mid mp4 m4v mov avi mkv webm wmv flv mpg mpeg m2ts mts 3gp ogv srt vtt
    xmp aae lrf thm url lnk desktop exe dll so dylib md5 sha1 sha256 sfv torrent ttf otf woff woff2
""")  # fmt: skip

#: Images of kinds that are not decoded: camera raws, drawings and documents, projects of image editors.
_NOT_DECODED = _endings("""
    3fr arw cr2 cr3 crw dcr dng erf fff iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f
    svg svgz pdf eps ps ai wmf emf cdr dxf psb xcf kra clip afphoto palm exr hdr dcm nii
""")  # fmt: skip

#: Folders and files that systems, network drives and programs put beside images; hidden ones begin with a dot.
_OF_THE_SYSTEM = frozenset({
    "@eadir", "@recycle", "#recycle", "#snapshot", "@__thumb", "__macosx", "$recycle.bin", "system volume information",
    "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
})  # fmt: skip

HIDDEN, OF_THE_SYSTEM = "hidden", "of the system, a network drive or an archiver"
OTHER_FILE, NOT_DECODED, NO_IMAGE = "no image by its ending", "of a kind that is not decoded", "no image by its content"


#: Endings, in small letters, by which a file counts as an image without a look into it.
PICTURE_SUFFIXES = (
    frozenset(ending for ending, name in Image.registered_extensions().items() if name not in NOT_OPENED)
    | _MORE_ENDINGS
) - (_SHARED_ENDINGS | _OTHER_FILES | _NOT_DECODED)


def not_for_images(part: str) -> str:
    """Why nothing in a folder, or no file, of this name is taken for an image, by the name alone; else ""."""
    if part.casefold() in _OF_THE_SYSTEM:
        return OF_THE_SYSTEM
    return HIDDEN if part.startswith(".") and part not in (".", "..") else ""


def why_no_image(name: str | bytes, head: Callable[[], bytes]) -> str:
    """Why a file of a folder is not taken for an image; "" where it may be one.

    name: its path below the folder that is listed. head: gives its first `HEAD_BYTES` bytes; asked only where the
    ending says nothing. A file whose bytes cannot be read (`head` raises OSError) may be one.
    """
    parts = os.fsdecode(name).replace(os.sep, "/").split("/")
    reason = next(filter(None, map(not_for_images, parts)), "")
    if reason:
        return reason
    ending = _ending(parts[-1])
    if ending in PICTURE_SUFFIXES:
        return ""
    if ending in _OTHER_FILES:
        return OTHER_FILE
    if ending in _NOT_DECODED:
        return NOT_DECODED
    try:
        return "" if looks_like_image(head(), guess=ending in _SHARED_ENDINGS) else NO_IMAGE
    except OSError:
        return ""


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def first_bytes(path: str | bytes | Path) -> bytes:
    """What `why_no_image` wants to see of a file; nothing of a pipe or a device, which would be waited for. Raises
    OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return b""
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def looks_like_image(head: bytes, guess: bool = False) -> bool:
    """Whether a file that begins with these bytes is an image, whole or damaged, of a format that is opened.

    By Pillow's own magic numbers; where these are short enough to stand at the beginning of something else, by a whole
    header. guess: try the formats that have no magic number as well (TGA, Photo CD, ...).
    """
    if _is_heif(head):
        return True
    weak = []
    for name in _formats():
        accept = Image.OPEN[name][1]
        if not (guess if accept is None else _accepts(accept, head)):
            continue
        if name in _CLEAR:
            return True
        weak.append(name)
    if not weak:
        return False
    try:
        with _picture_errors(head), Image.open(io.BytesIO(head), formats=weak):
            return True
    except PictureError as error:
        # A header that is longer than what was read of the file.
        return error.kind == "truncated picture" and len(head) == HEAD_BYTES


def _accepts(accept: Callable[[bytes], bool | str], head: bytes) -> bool:
    try:
        return bool(accept(head[:16]))
    except Exception:  # of fewer bytes than it counts on
        return False


@dataclass
class NotTaken:
    """The files below a folder that were not taken for images: how many, by reason and ending.

    Files that are there are those that `takes` took and these; `check` and `index` print both. unlisted: folder -> why
    nobody can tell what lies in it.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    unlisted: dict[str, str] = field(default_factory=dict)

    def takes(self, name: str | bytes, head: Callable[[], bytes]) -> bool:
        """Whether a file may be an image, as `why_no_image` says; else it is counted."""
        reason = why_no_image(name, head)
        if reason:
            last = os.fsdecode(name).replace(os.sep, "/").rpartition("/")[2]
            self.counts[reason, _ending(last) or "no ending"] += 1
        return not reason

    @property
    def total(self) -> int:
        """How many files there are."""
        return self.counts.total()

    def lines(self) -> list[str]:
        """A line for each reason, the most files first: "12 no image by its ending: 10 .txt, 2 .json"; and one for the
        folders that cannot be listed."""
        by_reason = self.to_dict()
        order = sorted(by_reason, key=lambda reason: -sum(by_reason[reason].values()))
        return [
            f"{sum(by_reason[reason].values()):,} {reason}: "
            + ", ".join(f"{count:,} {ending}" for ending, count in by_reason[reason].items())
            for reason in order
        ] + self._unlisted_line()

    def _unlisted_line(self) -> list[str]:
        first = [f"{folder}: {reason}" for folder, reason in self.unlisted.items()][:1]
        return [f"{len(self.unlisted):,} folders that cannot be listed, such as {each}" for each in first]

    def to_dict(self) -> dict[str, dict[str, int]]:
        """For `--json`: reason -> ending -> how many, the most first."""
        found: dict[str, dict[str, int]] = {}
        for (reason, ending), count in self.counts.most_common():
            found.setdefault(reason, {})[ending] = count
        return found


def files_below(root: str | Path, unlisted: dict[bytes, str]) -> Iterator[tuple[bytes, os.DirEntry[bytes]]]:
    """Everything below a folder that is no folder: its path below it, in the system's bytes, and its entry.

    Links to folders are followed, each folder is listed once: by its own name where it has one below `root`, and by a
    hidden one last. A folder that cannot be listed is put into `unlisted`, with the reason; raises OSError where that
    is `root` itself.
    """
    top = os.fsencode(root)
    seen: set[tuple[int, int]] = set()
    # Hidden ones last: a link elsewhere may lead to what is stored there under no name of its own.
    plain, linked, hidden = [b""], list[bytes](), list[bytes]()
    while plain or linked or hidden:
        below = (plain or linked or hidden).pop()
        try:
            about = os.stat(os.path.join(top, below))
            number = (about.st_dev, about.st_ino)
            if about.st_ino and number in seen:
                continue
            seen.add(number)
            entries = sorted(os.scandir(os.path.join(top, below)), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            if not below:
                raise
            unlisted[below] = error.strerror or str(error)
            continue
        folders = []
        for entry in entries:
            if _is_folder(entry):
                folders.append(entry)
            else:
                yield os.path.join(below, entry.name), entry
        for entry in reversed(folders):
            waiting = hidden if not_for_images(os.fsdecode(entry.name)) else linked if entry.is_symlink() else plain
            waiting.append(os.path.join(below, entry.name))


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is, or leads to, a folder; what cannot be looked at is a file, and told when it is read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def image_files(folder: Path, not_taken: NotTaken | None = None) -> list[Path]:
    """The files below a folder that may be images, in order of their paths; links are followed as in `files_below`.

    The others are counted in `not_taken`, and folders that cannot be listed as well: without it, such a folder raises
    OSError, unless it is one of those that no image is taken from.
    """
    counted = NotTaken() if not_taken is None else not_taken
    unlisted: dict[bytes, str] = {}
    taken = []
    for below, _ in files_below(folder, unlisted):
        path = folder / os.fsdecode(below)
        if counted.takes(os.fsdecode(below), partial(first_bytes, path)):
            taken.append(path)
    for below, reason in unlisted.items():
        name = os.fsdecode(below)
        if not any(map(not_for_images, name.split(os.sep))):
            if not_taken is None:
                raise OSError(
                    f"{folder / name}: this folder cannot be listed: {reason}; make it readable, or move it away"
                )
            counted.unlisted[name] = reason
    return sorted(taken)


# --- what a tower wants ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureInput:
    """What a picture tower wants to see: `size` x `size` pixels, each channel (value - mean) / std.

    The whole picture is squeezed into the square, so that nothing a caption may speak of is cropped away.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def transform(self, augment: bool = False, flip: float = 0.0) -> Callable[[Image.Image], Any]:
        """A function from an RGB picture to a tensor (3, size, size) of bytes, which the tower scales itself.

        `augment` crops and recolours at random, `flip` is the share mirrored. Neither belongs into an evaluation.
        """
        from torchvision.transforms import v2

        bicubic = v2.InterpolationMode.BICUBIC
        steps: list[Any] = []
        if augment:
            # Cropped by Pillow, which reads the crop alone, then recoloured as bytes: four times less to move.
            steps.append(v2.RandomResizedCrop(self.size, scale=(0.5, 1.0), interpolation=bicubic, antialias=True))
        else:
            steps.append(v2.Resize((self.size, self.size), interpolation=bicubic, antialias=True))
        if flip:
            steps.append(v2.RandomHorizontalFlip(p=flip))
        steps.append(v2.PILToTensor())
        if augment:
            steps.append(v2.ColorJitter(0.2, 0.2, 0.2))
        return v2.Compose(steps)

    def look(self, augment: bool = False, flip: float = 0.0) -> Callable[[Picture], Any]:
        """`transform` after opening: a function from a path, bytes or a Pillow picture; raises PictureError."""
        transform = self.transform(augment, flip)
        return lambda picture: transform(open_picture(picture, self.size))

    def scaled(self, pixels: Any) -> Any:
        """Bytes (B, 3, S, S) -> what the tower's backbone takes, float32; what is no bytes is taken as scaled."""
        import torch

        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) * 255 for v in (self.mean, self.std))
        return (pixels - mean) / std
