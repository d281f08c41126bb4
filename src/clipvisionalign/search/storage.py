"""Folders and URLs that hold images and indexes, and the images of a folder, each once.

What a folder holds is listed whole: images, other names of one image, files that are none, and what could not be looked
at. An index drops a row only where its file is known to be gone.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from clipvisionalign.files import PARTIAL_SUFFIX, atomic_write
from clipvisionalign.images import HEAD_BYTES, ExcludedFiles, ImageError, first_bytes, walk_files


@dataclass(frozen=True)
class ImageFile:
    """A file that may be an image. raw: its path below the folder, in the bytes that the system has for it."""

    raw: bytes
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """The path as text; bytes that are no UTF-8 are shown as \\xNN."""
        return decode_path(self.raw)


def decode_path(raw: bytes) -> str:
    """A path as text; bytes that are no UTF-8 are shown as \\xNN."""
    return raw.decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """A name as it may be printed on a terminal: control characters, and bytes that are no UTF-8, are written out.

    >>> printable("red\\x1b[31m\\nline")
    'red\\\\x1b[31m\\\\nline'
    """

    def is_plain(each: str) -> bool:
        return each.isprintable() or unicodedata.category(each) == "Zs"

    return "".join(each if is_plain(each) else each.encode("unicode_escape").decode() for each in text)


class InvalidIndexError(ValueError):
    """An index that cannot be used: the message has the reason and the remedy."""


@dataclass
class FileListing:
    """What lies below a folder, every entry once. Paths are bytes below the folder, as in `ImageFile.raw`.

    other_names: path -> that of the same file, which stands in `files`; not_taken: files that are no images;
    unreadable: path -> why the file cannot be looked at; missing: images that a data set names and that are gone;
    dead_links: links that lead nowhere; unlisted: folder -> why it cannot be listed; path_by_file_id: path, or device
    and number, of each file that was put in -> the path under which it stands in `files`.
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
        """Add a file with its device and inode; the path under which it is listed,
        which is another one where it was put in before."""
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
        """The folder that cannot be looked into and that a path lies below; None where there is none.

        A link that leads nowhere is one: the folder that it led to may be on a drive that is not there.
        """
        if not self._inaccessible:
            return None
        segments = raw.split(b"/")
        parents = (b"/".join(segments[:count]) for count in range(1, len(segments)))
        return next((folder for folder in parents if folder in self._inaccessible), None)

    @cached_property
    def _inaccessible(self) -> set[bytes]:
        return {*self.unlisted, *self.dead_links, *self.unreadable}


class Storage:
    """A folder: a path of this machine, or a URL that fsspec reaches, such as s3://bucket/images."""

    def __init__(self, location: str | Path) -> None:
        self.is_local = "://" not in str(location)
        #: What to write down, and to open it by again.
        self.location = str(Path(location).resolve()) if self.is_local else str(location).rstrip("/")
        self.folder = Path(self.location)
        if not self.is_local:
            import fsspec

            try:
                self.filesystem, self.root = fsspec.core.url_to_fs(self.location)
            except (ImportError, ValueError) as error:
                hint = 'S3 needs pip install "clipvisionalign[s3]"; other storage the package of fsspec that reaches it'
                raise ValueError(f"{location}: {error}; {hint}") from None

    def __str__(self) -> str:
        return self.location

    def exists(self) -> bool:
        """Whether anything is there."""
        return self.folder.exists() if self.is_local else bool(self.filesystem.exists(self.root))

    def is_empty(self) -> bool:
        """Whether it is a folder without anything in it, or none yet. What was begun and never finished is nothing."""
        if self.is_local:
            return not self.folder.exists() or (
                self.folder.is_dir() and all(path.name.endswith(PARTIAL_SUFFIX) for path in self.folder.iterdir())
            )
        return not self.filesystem.exists(self.root) or not self.filesystem.ls(self.root)

    def read(self, name: str) -> str | None:
        """The text of a file; None where there is none."""
        if self.is_local:
            path = self.folder / name
            return path.read_text(encoding="utf-8") if path.is_file() else None
        key = f"{self.root}/{name}"
        return self.filesystem.cat_file(key).decode() if self.filesystem.exists(key) else None

    def write(self, name: str, text: str) -> None:
        """Write a file whole: half of it is never read."""
        if not self.is_local:
            self.filesystem.pipe_file(f"{self.root}/{name}", text.encode())
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / name) as aside:
            aside.write_text(text, encoding="utf-8")

    def list_files(self) -> FileListing:
        """What lies below. Raises FileNotFoundError, and OSError where the folder itself cannot be listed."""
        if not (self.folder.is_dir() if self.is_local else self.filesystem.isdir(self.root)):
            raise FileNotFoundError(f"{self.location}: no such folder")
        return list_local_images(self.folder) if self.is_local else self._list_url()

    def list_images(self) -> list[ImageFile]:
        """Every image below, in order of their paths. Raises what `listing` raises."""
        return self.list_files().files

    def _list_url(self) -> FileListing:
        listing, start = FileListing(), len(self.root.rstrip("/")) + 1

        def raw(path: str) -> bytes:
            return path[start:].encode("utf-8", "surrogatepass")

        for path, info in sorted(self._walk(listing, raw).items()):
            if listing.not_taken.accept(path[start:], partial(self._read_head, path, info)):
                listing.files.append(ImageFile(raw(path), int(info["size"] or 0), _modified_ns(info)))
        return listing

    def _read_head(self, path: str, info: dict[str, Any]) -> bytes:
        return bytes(self.filesystem.cat_file(path, start=0, end=HEAD_BYTES)) if info["type"] == "file" else b""

    def _walk(self, listing: FileListing, raw: Callable[[str], bytes]) -> dict[str, dict[str, Any]]:
        """All that is no folder, by its path; folders that cannot be listed are put into `listing`."""
        from fsspec.asyn import AsyncFileSystem

        find_method = getattr(type(self.filesystem), "_find", AsyncFileSystem._find)
        if find_method is not AsyncFileSystem._find:
            # Storage without true folders lists all below at once, and raises its errors.
            entries_by_path: dict[str, dict[str, Any]] = self.filesystem.find(self.root, detail=True)
            return entries_by_path
        # fsspec's own walk passes over folders that it cannot list.
        everything, waiting = {}, [self.root]
        while waiting:
            folder = waiting.pop()
            try:
                entries = self.filesystem.ls(folder, detail=True)
            except OSError as error:
                if folder == self.root:
                    raise
                listing.unlisted[raw(folder)] = _error_reason(error)
                continue
            for entry in entries:
                if entry["type"] != "directory":
                    everything[entry["name"]] = entry
                elif entry["name"].rstrip("/") != folder.rstrip("/"):
                    waiting.append(entry["name"])
        return everything

    def image_source(self, raw: bytes) -> Path | bytes:
        """An image below, as what `open_image` takes. Raises ImageError where a URL has it no longer."""
        if self.is_local:
            return self.folder / os.fsdecode(raw)
        try:
            return bytes(self.filesystem.cat_file(f"{self.root}/{raw.decode('utf-8', 'surrogatepass')}"))
        except OSError as error:
            name = raw.decode("utf-8", "backslashreplace")
            raise ImageError("missing image", f"{self.location}/{name}: {error}") from None

    def has_file(self, raw: bytes) -> bool:
        """Whether an image is still there."""
        if self.is_local:
            return (self.folder / os.fsdecode(raw)).is_file()
        return bool(self.filesystem.isfile(f"{self.root}/{raw.decode('utf-8', 'surrogatepass')}"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """While this process writes here. Raises TimeoutError where another one does; not checked for a URL."""
        if not self.is_local:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock", blocking=False):
            yield


def content_hash(source: Path | bytes) -> str:
    """A hash of an image's bytes. Raises OSError."""

    def new() -> Any:
        return hashlib.blake2b(digest_size=16)

    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        return hashlib.file_digest(file, new).hexdigest()


def _error_reason(error: OSError) -> str:
    """The error without the path, which precedes it."""
    return error.strerror or str(error)


def clamp_time_ns(when: int) -> int:
    """A file's time as the index holds it: 64 bits, which reach from 1678 to 2262; other times are the first or the
    last of these."""
    return max(-(2**63), min(when, 2**63 - 1))


def _modified_ns(info: dict[str, Any]) -> int:
    """When a file was changed, by the names that its kinds have for it; 0 where it does not."""
    when = next((info[name] for name in ("mtime", "LastModified", "last_modified", "updated", "created")
                 if info.get(name)), 0)  # fmt: skip
    if isinstance(when, str):
        from datetime import datetime

        when = datetime.fromisoformat(when)
    return clamp_time_ns(int(1e9 * (when if isinstance(when, (int, float)) else when.timestamp())))


def list_local_images(folder: Path, not_taken: ExcludedFiles | None = None) -> FileListing:
    """What lies below a folder: images, each file and each folder once, as `walk_files` lists them.

    not_taken: where the other files are counted. A link that leads back to a file that was seen already is another name
    of it. Raises OSError where the folder itself cannot be listed; any other is put into the listing.
    """
    listing = FileListing(not_taken=not_taken or ExcludedFiles())
    root = os.fsencode(folder)
    for path, entry in walk_files(folder, listing.unlisted):
        try:
            file_stat = entry.stat()
        except OSError as error:
            _add_inaccessible(listing, path, entry.is_symlink(), error)
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
        listing.unreadable[path] = f"{decode_path(path)}: cannot be read: {_error_reason(error)}"


def as_storage(index: str | Path | Storage) -> Storage:
    """The storage of an index.

    Args:
        index: A path, a URL, or a storage, which is returned as it is.

    Returns:
        The storage.
    """
    return index if isinstance(index, Storage) else Storage(index)
