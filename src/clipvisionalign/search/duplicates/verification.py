"""Comparing images by their pixels, pair by pair: each image is decoded once, and what was compared is kept.

An image that cannot be read now, or whose file has other content than the index has recorded, is named with the
reason; its pairs are not verified.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from clipvisionalign.images import ImageError, decode_image, open_header
from clipvisionalign.progress import progress
from clipvisionalign.search.duplicates.appearance import THUMBNAIL_BYTES, Thumbnails, compare, thumbnail_of
from clipvisionalign.search.duplicates.cache import ComparisonCache
from clipvisionalign.search.storage import Storage, clamp_time_ns, content_hash

#: Value of a pair that was not compared, beside those of `Appearance`.
NOT_VERIFIED = 255
#: Pixels of the shorter side at which images are decoded.
_DECODED_SIZE = 128
#: Formats whose further images are content: frames and pages. Those of a phone's MPO or HEIC are previews and depths.
_FORMATS_OF_FRAMES = ("GIF", "TIFF", "WEBP", "PNG", "AVIF")
#: Images that are handed to the threads at a time, and pairs between two updates of the progress.
_CHUNK = 512


class ImageReader(Protocol):
    """Reads the pixels of images by their positions."""

    def __call__(self, position: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Read an image.

        Args:
            position: Of the image.

        Returns:
            Its thumbnails (`thumbnail_of`), and its width and height.

        Raises:
            ImageError: It cannot be read, or has other content.
        """
        ...


def read_content(storage: Storage, raw: bytes, expected: str) -> bytes:
    """The bytes of an image's file, if they are those that an index has recorded.

    Args:
        storage: Where the images are.
        raw: Its path below, in bytes.
        expected: Its content hash.

    Returns:
        The bytes.

    Raises:
        ImageError: The file cannot be read, or has other content.
    """
    source = storage.image_source(raw)
    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise ImageError("missing image", f"cannot be read: {error.strerror or error}", transient=True) from None
    if content_hash(data) != expected:
        raise ImageError("changed image", "changed since it was indexed: index the folder again")
    return data


def read_thumbnails(data: bytes) -> tuple[np.ndarray, tuple[int, int]]:
    """The thumbnails and the size of an image.

    Args:
        data: The bytes of its file.

    Returns:
        `thumbnail_of` it, and width and height.

    Raises:
        ImageError: It cannot be decoded, or holds several frames or pages: that the first are alike shows nothing of
            the others.
    """
    with open_header(data) as header:
        frames = getattr(header, "n_frames", 1)
        if frames > 1 and header.format in _FORMATS_OF_FRAMES:
            raise ImageError("several images", f"holds {frames} frames or pages, which are not compared")
    decoded = decode_image(data, _DECODED_SIZE)
    return thumbnail_of(decoded.image), (decoded.width, decoded.height)


class PairVerifier:
    """Compares pairs of images, each once.

    Args:
        hashes: Content hash of each image.
        reader: Reads an image by its position.
        cache: What was compared before; None for none.
        show_progress: Whether progress is shown on standard error.

    Attributes:
        failures: Why images could not be read, by their positions.
        decoded: Number of images that were decoded.
        compared: Number of pairs that were compared, and not taken from the cache.
    """

    def __init__(
        self,
        hashes: Sequence[str],
        reader: ImageReader,
        cache: ComparisonCache | None = None,
        show_progress: bool = True,
    ) -> None:
        self.hashes, self.reader, self.cache, self.show_progress = hashes, reader, cache, show_progress
        self.failures: dict[int, str] = {}
        self.decoded = self.compared = 0
        self._verdicts = {} if cache is None else cache.read_verdicts()
        self._slots: dict[int, int] = {}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the object
        self._sizes = np.zeros((0, 2), dtype=np.int64)

    def __call__(self, pairs: np.ndarray) -> np.ndarray:
        """What the pixels of pairs have in common.

        Args:
            pairs: (E, 2) positions.

        Returns:
            (E,) uint8, values of `Appearance`, or `NOT_VERIFIED`.
        """
        keys = [self._key(first, second) for first, second in pairs.tolist()]
        unverified = [row for row, key in enumerate(keys) if key not in self._verdicts]
        if unverified:
            self._read_images(np.unique(pairs[unverified]).tolist())
            self._compare(pairs[unverified], [keys[row] for row in unverified])
        return np.array([self._verdicts.get(key, NOT_VERIFIED) for key in keys], dtype=np.uint8)

    def save(self) -> None:
        """Keep what was compared, if anything was."""
        if self.cache is not None and self.compared:
            self.cache.write_verdicts(self.cache.read_verdicts() | self._verdicts)

    def close(self) -> None:
        """Remove the thumbnails."""
        self._file.close()

    def _key(self, first: int, second: int) -> tuple[str, str]:
        left, right = self.hashes[first], self.hashes[second]
        return (left, right) if left < right else (right, left)

    def _read_images(self, positions: Sequence[int]) -> None:
        missing = [each for each in positions if each not in self._slots and each not in self.failures]
        first_slot = len(self._slots)
        sizes: list[tuple[int, int]] = []

        def read(position: int) -> tuple[np.ndarray, tuple[int, int]] | str:
            try:
                return self.reader(position)
            except ImageError as error:
                return str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = (
                result
                for start in range(0, len(missing), _CHUNK)
                for result in pool.map(read, missing[start : start + _CHUNK])
            )
            shown = progress(results, "decoding images to compare", len(missing), self.show_progress)
            self._file.seek(0, os.SEEK_END)
            for position, result in zip(missing, shown, strict=True):
                if isinstance(result, str):
                    self.failures[position] = result
                    continue
                pixels, size = result
                self._file.write(pixels.tobytes())
                self._slots[position] = first_slot + len(sizes)
                sizes.append(size)
        self._file.flush()
        self.decoded += len(sizes)
        self._sizes = np.concatenate([self._sizes, np.array(sizes, dtype=np.int64).reshape(-1, 2)])

    def _compare(self, pairs: np.ndarray, keys: Sequence[tuple[str, str]]) -> None:
        there = np.array([each not in self.failures for each in pairs.ravel().tolist()]).reshape(-1, 2).all(axis=1)
        rows = np.flatnonzero(there)
        if not len(rows):
            return
        # In the page cache of the system, and on the disk where memory is short.
        pixels = np.memmap(self._file, dtype=np.uint8, mode="r", shape=(len(self._slots), THUMBNAIL_BYTES))
        slots = np.array([self._slots[each] for each in pairs[rows].ravel().tolist()]).reshape(-1, 2)
        starts = range(0, len(rows), _CHUNK)
        for start in progress(starts, "comparing pairs of images", len(rows), self.show_progress, _CHUNK):
            part = slots[start : start + _CHUNK]
            first, second = (Thumbnails(pixels[part[:, side]], self._sizes[part[:, side]]) for side in (0, 1))
            for row, verdict in zip(
                rows[start : start + _CHUNK].tolist(), compare(first, second).tolist(), strict=True
            ):
                self._verdicts[keys[row]] = verdict
        self.compared += len(rows)


def index_reader(storage: Storage, raw_paths: Callable[[int], bytes], hashes: Sequence[str]) -> ImageReader:
    """A reader of the images of an index.

    Args:
        storage: Where the images are.
        raw_paths: The path of an image below, in bytes, by its position.
        hashes: Content hash of each image.

    Returns:
        The reader.
    """

    def read(position: int) -> tuple[np.ndarray, tuple[int, int]]:
        return read_thumbnails(read_content(storage, raw_paths(position), hashes[position]))

    return read


def change_since_indexed(storage: Storage, raw: bytes, size: int, mtime_ns: int, expected: str) -> str:
    """Whether a file is still as an index has recorded it: by size and time, where these differ by its content.

    Files behind a URL are not asked for.

    Args:
        storage: Where the images are.
        raw: Its path below, in bytes.
        size: Bytes of the file.
        mtime_ns: Time of its last change, in nanoseconds.
        expected: Its content hash.

    Returns:
        "" if it is; else what is different.
    """
    if not storage.is_local:
        return ""
    path: Path = storage.folder / os.fsdecode(raw)
    try:
        status = path.stat()
        if (status.st_size, clamp_time_ns(status.st_mtime_ns)) == (size, mtime_ns):
            return ""
        read_content(storage, raw, expected)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ImageError as error:
        return str(error)
    return ""
