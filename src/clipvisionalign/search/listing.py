"""The files below a folder, each once: images, other names of one image, files that are none, what cannot be read."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from clipvisionalign.images import NOT_REGULAR, ExcludedFiles, first_bytes, is_special, walk_files


@dataclass(frozen=True)
class ImageFile:
    """A file that may be an image.

    Attributes:
        raw: Its path below the folder, in the bytes of the system.
        size: Its size in bytes.
        mtime_ns: Time of its last change, in nanoseconds.
    """

    raw: bytes
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """The path as text; bytes that are no UTF-8 are written as \\xNN."""
        return decode_path(self.raw)


def decode_path(raw: bytes) -> str:
    """A path as text; bytes that are no UTF-8 are written as \\xNN.

    Args:
        raw: The path, in the bytes of the system.

    Returns:
        The text, which need not lead back to the path.
    """
    return raw.decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """A name as it may be printed on a terminal: control characters, and bytes that are no UTF-8, are written out.

    Args:
        text: The name.

    Returns:
        The text.

    >>> printable("red\\x1b[31m\\nline")
    'red\\\\x1b[31m\\\\nline'
    """

    def is_plain(each: str) -> bool:
        return each.isprintable() or unicodedata.category(each) == "Zs"

    return "".join(each if is_plain(each) else each.encode("unicode_escape").decode() for each in text)


@dataclass
class FileListing:
    """What is below a folder, every entry once. Paths are bytes below the folder, as in `ImageFile.raw`.

    Attributes:
        files: Files that may be images, in order of their paths.
        other_names: Path of another name of a file, and the path that is in `files`.
        not_taken: Files that are no images.
        unreadable: Files that cannot be examined, with the reason.
        missing: Images that a data set names and that are not there, with the reason.
        dead_links: Links without a target.
        unlisted: Folders that cannot be listed, with the reason.
        path_by_file_id: Path (or device and inode) of each file that was added, and the path that is in `files`.
    """

    files: list[ImageFile] = field(default_factory=list)
    other_names: dict[bytes, bytes] = field(default_factory=dict)
    not_taken: ExcludedFiles = field(default_factory=ExcludedFiles)
    unreadable: dict[bytes, str] = field(default_factory=dict)
    missing: dict[bytes, str] = field(default_factory=dict)
    dead_links: list[bytes] = field(default_factory=list)
    unlisted: dict[bytes, str] = field(default_factory=dict)
    path_by_file_id: dict[bytes | tuple[int, int], bytes] = field(default_factory=dict, repr=False)

    def add(self, file: ImageFile, file_id: tuple[int, int]) -> bytes:
        """Add a file.

        Args:
            file: The file.
            file_id: Its device and inode; inode 0 where the file system has none.

        Returns:
            The path under which it is listed: another one where the file was added before under another name.
        """
        # A file system without inodes distinguishes none.
        canonical_path = self.path_by_file_id.setdefault(file_id if file_id[1] else file.raw, file.raw)
        if canonical_path == file.raw:
            self.files.append(file)
        else:
            self.other_names[file.raw] = canonical_path
        return canonical_path

    def __iter__(self) -> Iterator[ImageFile]:
        return iter(self.files)

    @property
    def total(self) -> int:
        """Files and links that were found."""
        each = (self.files, self.other_names, self.unreadable, self.missing, self.dead_links)
        return sum(map(len, each)) + self.not_taken.total

    def inaccessible_parent(self, raw: bytes) -> bytes | None:
        """The folder that cannot be listed and that a path is below.

        A link without a target is one: the folder that it led to may be on a drive that is not mounted.

        Args:
            raw: The path, in bytes.

        Returns:
            The folder, in bytes; None where there is none.
        """
        if not self._inaccessible:
            return None
        segments = raw.split(b"/")
        parents = (b"/".join(segments[:count]) for count in range(1, len(segments)))
        return next((folder for folder in parents if folder in self._inaccessible), None)

    @cached_property
    def _inaccessible(self) -> set[bytes]:
        return {*self.unlisted, *self.dead_links, *self.unreadable}


def error_reason(error: OSError) -> str:
    """An error of a file without its path, which precedes it in a message.

    Args:
        error: The error.

    Returns:
        The system's words for it, else its message.
    """
    return error.strerror or str(error)


def clamp_time_ns(when: int) -> int:
    """A file's time as the index holds it: 64 bits, which reach from 1678 to 2262.

    Args:
        when: Nanoseconds since 1970.

    Returns:
        The same, or the first or the last of these times.
    """
    return max(-(2**63), min(when, 2**63 - 1))


def list_local_images(folder: Path, not_taken: ExcludedFiles | None = None) -> FileListing:
    """Everything below a folder of this machine, as `walk_files` lists it.

    A link to a file that was listed already is another name of it.

    Args:
        folder: The folder.
        not_taken: Receives the counts of files that are no images; None for new counts.

    Returns:
        The files, and what cannot be read or listed.

    Raises:
        OSError: The folder itself cannot be listed.
    """
    listing = FileListing(not_taken=not_taken or ExcludedFiles())
    root = os.fsencode(folder)
    for path, entry in walk_files(folder, listing.unlisted):
        try:
            file_stat = entry.stat()
        except OSError as error:
            _add_inaccessible(listing, path, entry.is_symlink(), error)
            continue
        if is_special(entry):
            listing.not_taken.exclude(path, NOT_REGULAR)
            continue
        file_id = (file_stat.st_dev, file_stat.st_ino)
        if file_id in listing.path_by_file_id or listing.not_taken.accept(
            path, partial(first_bytes, os.path.join(root, path))
        ):
            listing.add(ImageFile(path, file_stat.st_size, clamp_time_ns(file_stat.st_mtime_ns)), file_id)
    return listing


def _add_inaccessible(listing: FileListing, path: bytes, is_link: bool, error: OSError) -> None:
    """An entry that cannot be looked at: a link that leads nowhere or in a circle, or a file that may not be read."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        if is_link:
            listing.dead_links.append(path)
    elif listing.not_taken.accept(path, bytes):
        listing.unreadable[path] = f"{decode_path(path)}: cannot be read: {error_reason(error)}"
