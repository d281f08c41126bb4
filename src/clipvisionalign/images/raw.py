"""Raw files of cameras, as images of Pillow: the preview that the camera embeds, else what the sensor recorded.

LibRaw opens them (through rawpy). Pixels stand upright after loading, whatever the file's orientation.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import ExifTags, Image, ImageFile

from clipvisionalign.images.rgb import turn_upright

if TYPE_CHECKING:
    import rawpy

#: Files that begin so are raw files of FUJIFILM, Olympus, Panasonic, Minolta, Sigma and early Canon cameras.
SIGNATURES = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"\0MRM", b"FOVb", b"II\x1a\0\0\0HEAPCCDR")

#: The least shorter side of a preview that stands for the whole image where no size is required.
MIN_PREVIEW = 512

#: How much more than the required size a preview is decoded at, as a JPEG file is.
_PREVIEW_SCALE = 2

#: The orientation of EXIF, by LibRaw's flip.
_ORIENTATION_OF_FLIP = {1: 2, 2: 4, 3: 3, 4: 5, 5: 8, 6: 6, 7: 7}

# Tags of TIFF, TIFF/EP and DNG.
_COMPRESSION, _PHOTOMETRIC, _STRIPS, _STRIP_BYTES, _SUB_IFDS, _DNG_VERSION = 259, 262, 273, 279, 330, 50706
_CFA, _LINEAR_RAW = 32803, 34892
#: Compressions that only raw files have: of Sony, Nikon and Pentax.
_RAW_COMPRESSIONS = frozenset({32767, 34713, 65535})
#: Directories of one file that are looked into.
_MAX_DIRECTORIES = 16
_TYPE_FORMATS = {1: "B", 3: "H", 4: "I", 13: "I"}


def is_raw_tiff(file: BinaryIO) -> bool:
    """Whether a file in the structure of a TIFF holds what a sensor recorded (DNG, NEF, ARW, CR2, PEF, ...).

    Args:
        file: The file; it is read from its beginning.

    Returns:
        Whether it is a raw file; False for what is no TIFF.

    >>> is_raw_tiff(io.BytesIO(b"II*" + bytes(5)))
    False
    """
    return any(_is_raw_directory(tags) for tags in _directories(file))


def _is_raw_directory(tags: dict[int, tuple[int, ...]]) -> bool:
    if _DNG_VERSION in tags or set(tags.get(_PHOTOMETRIC, ())) & {_CFA, _LINEAR_RAW}:
        return True
    return bool(set(tags.get(_COMPRESSION, ())) & _RAW_COMPRESSIONS)


def _directories(file: BinaryIO) -> list[dict[int, tuple[int, ...]]]:
    """The tags of each directory that hold whole numbers; none of what is no TIFF."""
    file.seek(0)
    head = file.read(8)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(head[:4])
    if order is None or len(head) < 8:
        return []
    waiting, visited = [struct.unpack(f"{order}I", head[4:])[0]], set[int]()
    directories: list[dict[int, tuple[int, ...]]] = []
    while waiting and len(directories) < _MAX_DIRECTORIES:
        at = waiting.pop(0)
        if not at or at in visited:
            continue
        visited.add(at)
        tags, following = _read_directory(file, at, order)
        directories.append(tags)
        waiting += [*tags.get(_SUB_IFDS, ()), following]
    return directories


def _read_directory(file: BinaryIO, at: int, order: str) -> tuple[dict[int, tuple[int, ...]], int]:
    """The tags of a directory, and where the next one is."""
    file.seek(at)
    count = int.from_bytes(file.read(2), "little" if order == "<" else "big")
    body = file.read(12 * count + 4)
    tags: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(body) - 11, 12):
        if start // 12 == count:
            break
        tag, kind, length = struct.unpack_from(f"{order}HHI", body, start)
        letter = _TYPE_FORMATS.get(kind)
        if letter is None or not 0 < length <= 1 << 16:
            continue
        size = struct.calcsize(f"{order}{length}{letter}")
        value = body[start + 8 : start + 8 + size]
        if size > 4:
            file.seek(struct.unpack_from(f"{order}I", body, start + 8)[0])
            value = file.read(size)
        if len(value) == size:
            tags[tag] = struct.unpack(f"{order}{length}{letter}", value)
    return tags, struct.unpack_from(f"{order}I", body, 12 * count)[0] if len(body) == 12 * count + 4 else 0


def _is_cut_off(data: bytes) -> bool:
    """Whether a raw file in the structure of a TIFF ends before its pixels do."""
    return any(
        at + length > len(data)
        for tags in _directories(io.BytesIO(data))
        for at, length in zip(tags.get(_STRIPS, ()), tags.get(_STRIP_BYTES, ()), strict=False)
    )


class RawImageFile(ImageFile.ImageFile):
    """A raw file of a camera as an image of Pillow, which does not open such files by itself.

    It is made of a path, or of a file that is open for reading.

    Raises:
        OSError: It is truncated, or of no camera that LibRaw reads.
        ImportError: rawpy is not installed.
    """

    format = "RAW"
    format_description = "Raw file of a camera"

    def _open(self) -> None:
        import rawpy

        assert self.fp is not None
        data = self.fp.read()
        if _is_cut_off(data):
            raise OSError("the raw file is truncated: its pixels lie beyond its end")
        try:
            self._raw: rawpy.RawPy | None = rawpy.imread(io.BytesIO(data))
            sizes = self._raw.sizes
        except rawpy.LibRawError as error:
            raise OSError(f"a raw file that LibRaw cannot read: {_reason(error)}") from None
        self._flip = int(sizes.flip)
        self._size = (sizes.height, sizes.width) if self._flip & 4 else (sizes.width, sizes.height)
        self._mode = "RGB"
        self._required = self._reachable(MIN_PREVIEW)
        self._camera_tags = _camera_tags(data)

    def draft(self, mode: str | None, size: tuple[int, int] | None) -> None:
        """Accept a preview whose shorter side has the shorter of these sizes; a raw image then loads faster.

        Args:
            mode: Not used.
            size: Width and height that are required.
        """
        if size and self._raw is not None:
            self._required = self._reachable(min(size))

    def _reachable(self, size: int) -> int:
        """The size, or what the sensor's pixels would give instead of a preview, where that is less."""
        return min(size, min(self._size) // 2)

    def getexif(self) -> Image.Exif:
        """The camera's tags, without the orientation, which is applied."""
        return self._camera_tags

    def load(self) -> Any:
        """Decode the preview, or the sensor's pixels at half of their size where no preview is large enough."""
        if self._raw is not None:
            image = self._decode(self._raw)
            self._size = image.size
            self.im, self.tile = image.im, []
            self._raw.close()
            self._raw = None
        return super().load()

    def _decode(self, raw: rawpy.RawPy) -> Image.Image:
        import rawpy

        try:
            preview = self._preview(raw)
            if preview is not None and min(preview.size) >= self._required:
                return preview
            # Half of the size takes one pixel of each four of the sensor: nothing is interpolated.
            pixels = raw.postprocess(half_size=True, use_camera_wb=True)
        except rawpy.LibRawError as error:
            raise OSError(f"a raw file that LibRaw cannot decode: {_reason(error)}") from None
        return Image.fromarray(pixels)

    def _preview(self, raw: rawpy.RawPy) -> Image.Image | None:
        """The largest preview, upright; None where there is none."""
        import rawpy

        try:
            thumbnail = raw.extract_thumb()
        except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError):
            return None
        if not isinstance(thumbnail.data, bytes):
            return turn_upright(Image.fromarray(thumbnail.data).convert("RGB"), _ORIENTATION_OF_FLIP.get(self._flip, 1))
        opened: Image.Image = Image.open(io.BytesIO(thumbnail.data), formats=["JPEG"])
        opened.draft("RGB", (_PREVIEW_SCALE * self._required, _PREVIEW_SCALE * self._required))
        # LibRaw writes the orientation into a preview that has none of its own.
        orientation = opened.getexif().get(ExifTags.Base.Orientation, _ORIENTATION_OF_FLIP.get(self._flip, 1))
        return turn_upright(opened.convert("RGB"), orientation)


def _reason(error: Exception) -> str:
    text = error.args[0] if error.args else error
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def _camera_tags(data: bytes) -> Image.Exif:
    """The tags of a raw file in the structure of a TIFF; none of another's."""
    tags = Image.Exif()
    if data[:4] in (b"II*\0", b"MM\0*"):
        try:
            tags.load_from_fp(io.BytesIO(data))
            tags.pop(ExifTags.Base.Orientation, None)
        except Exception:  # a damaged block is none
            return Image.Exif()
    return tags
