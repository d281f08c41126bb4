"""Where pictures and indexes lie, on this machine or behind a URL, and the pictures of a folder, each once.

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

from clipvisionalign.files import written_aside
from clipvisionalign.images import HEAD_BYTES, NotTaken, PictureError, files_below, first_bytes


@dataclass(frozen=True)
class PictureFile:
    """A file that may be a picture. raw: its path below the folder, in the bytes that the system has for it."""

    raw: bytes
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """The path as text; bytes that are no UTF-8 are shown as \\xNN."""
        return name_of(self.raw)


def name_of(raw: bytes) -> str:
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


class BadIndex(ValueError):
    """An index that cannot be used: the message says why, and what to do."""


@dataclass
class Listing:
    """What lies below a folder, every entry once. Paths are bytes below the folder, as in `PictureFile.raw`.

    other_names: path -> that of the same file, which stands in `files`; not_taken: files that are no images;
    unreadable: path -> why the file cannot be looked at; missing: images that a data set names and that are gone;
    dead_links: links that lead nowhere; unlisted: folder -> why it cannot be listed; known: path, or device and number,
    of each file that was put in -> the path under which it stands in `files`.
    """

    files: list[PictureFile] = field(default_factory=list)
    other_names: dict[bytes, bytes] = field(default_factory=dict)
    not_taken: NotTaken = field(default_factory=NotTaken)
    unreadable: dict[bytes, str] = field(default_factory=dict)
    missing: dict[bytes, str] = field(default_factory=dict)
    dead_links: list[bytes] = field(default_factory=list)
    unlisted: dict[bytes, str] = field(default_factory=dict)
    known: dict[bytes | tuple[int, int], bytes] = field(default_factory=dict, repr=False)

    def add(self, file: PictureFile, number: tuple[int, int]) -> bytes:
        """Put in a file with the device and number that the system knows it by; the path under which it stands here,
        which is another one where it was put in before."""
        # A file system that numbers no files tells none from another.
        first = self.known.setdefault(number if number[1] else file.raw, file.raw)
        if first == file.raw:
            self.files.append(file)
        else:
            self.other_names[file.raw] = first
        return first

    def __iter__(self) -> Iterator[PictureFile]:
        return iter(self.files)

    @property
    def total(self) -> int:
        """Files and links that were found."""
        each = (self.files, self.other_names, self.unreadable, self.missing, self.dead_links)
        return sum(map(len, each)) + self.not_taken.total

    def hidden_below(self, raw: bytes) -> bytes | None:
        """The folder that cannot be looked into and that a path lies below; None where there is none.

        A link that leads nowhere is one: the folder that it led to may be on a drive that is not there.
        """
        if not self._hidden:
            return None
        parts = raw.split(b"/")
        above = (b"/".join(parts[:count]) for count in range(1, len(parts)))
        return next((folder for folder in above if folder in self._hidden), None)

    @cached_property
    def _hidden(self) -> set[bytes]:
        return {*self.unlisted, *self.dead_links, *self.unreadable}


class Place:
    """A folder: a path of this machine, or a URL that fsspec reaches, such as s3://bucket/pictures."""

    def __init__(self, location: str | Path) -> None:
        self.is_local = "://" not in str(location)
        #: What to write down, and to open it by again.
        self.location = str(Path(location).resolve()) if self.is_local else str(location).rstrip("/")
        self.folder = Path(self.location)
        if not self.is_local:
            import fsspec

            try:
                self.files, self.root = fsspec.core.url_to_fs(self.location)
            except (ImportError, ValueError) as error:
                way_out = (
                    'S3 needs pip install "clipvisionalign[s3]"; other storage the package of fsspec that reaches it'
                )
                raise ValueError(f"{location}: {error}; {way_out}") from None

    def __str__(self) -> str:
        return self.location

    def exists(self) -> bool:
        """Whether anything lies there."""
        return self.folder.exists() if self.is_local else bool(self.files.exists(self.root))

    def is_empty(self) -> bool:
        """Whether it is a folder without anything in it, or none yet. What was begun and never finished is nothing."""
        if self.is_local:
            return not self.folder.exists() or (
                self.folder.is_dir() and all(path.name.endswith(".part") for path in self.folder.iterdir())
            )
        return not self.files.exists(self.root) or not self.files.ls(self.root)

    def read(self, name: str) -> str | None:
        """The text of a file; None where there is none."""
        if self.is_local:
            path = self.folder / name
            return path.read_text(encoding="utf-8") if path.is_file() else None
        key = f"{self.root}/{name}"
        return self.files.cat_file(key).decode() if self.files.exists(key) else None

    def write(self, name: str, text: str) -> None:
        """Write a file whole: half of it is never read."""
        if not self.is_local:
            self.files.pipe_file(f"{self.root}/{name}", text.encode())
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_aside(self.folder / name) as aside:
            aside.write_text(text, encoding="utf-8")

    def listing(self) -> Listing:
        """What lies below. Raises FileNotFoundError, and OSError where the folder itself cannot be listed."""
        if not (self.folder.is_dir() if self.is_local else self.files.isdir(self.root)):
            raise FileNotFoundError(f"{self.location}: no such folder")
        return picture_files(self.folder) if self.is_local else self._listing_of_url()

    def pictures(self) -> list[PictureFile]:
        """Every image below, in order of their paths. Raises what `listing` raises."""
        return self.listing().files

    def _listing_of_url(self) -> Listing:
        found, start = Listing(), len(self.root.rstrip("/")) + 1

        def raw(path: str) -> bytes:
            return path[start:].encode("utf-8", "surrogatepass")

        for path, about in sorted(self._below(found, raw).items()):
            if found.not_taken.takes(path[start:], partial(self._head, path, about)):
                found.files.append(PictureFile(raw(path), int(about["size"] or 0), _changed_ns(about)))
        return found

    def _head(self, path: str, about: dict[str, Any]) -> bytes:
        return bytes(self.files.cat_file(path, start=0, end=HEAD_BYTES)) if about["type"] == "file" else b""

    def _below(self, found: Listing, raw: Callable[[str], bytes]) -> dict[str, dict[str, Any]]:
        """All that is no folder, by its path; folders that cannot be listed are put into `found`."""
        from fsspec.asyn import AsyncFileSystem

        own = getattr(type(self.files), "_find", AsyncFileSystem._find)
        if own is not AsyncFileSystem._find:
            # Storage without true folders lists all below at once, and raises what goes wrong.
            listed: dict[str, dict[str, Any]] = self.files.find(self.root, detail=True)
            return listed
        # fsspec's own walk passes over folders that it cannot list.
        everything, waiting = {}, [self.root]
        while waiting:
            folder = waiting.pop()
            try:
                entries = self.files.ls(folder, detail=True)
            except OSError as error:
                if folder == self.root:
                    raise
                found.unlisted[raw(folder)] = _reason(error)
                continue
            for entry in entries:
                if entry["type"] != "directory":
                    everything[entry["name"]] = entry
                elif entry["name"].rstrip("/") != folder.rstrip("/"):
                    waiting.append(entry["name"])
        return everything

    def picture(self, raw: bytes) -> Path | bytes:
        """A picture below, as what `open_picture` takes. Raises PictureError where a URL has it no longer."""
        if self.is_local:
            return self.folder / os.fsdecode(raw)
        try:
            return bytes(self.files.cat_file(f"{self.root}/{raw.decode('utf-8', 'surrogatepass')}"))
        except OSError as error:
            name = raw.decode("utf-8", "backslashreplace")
            raise PictureError("missing picture", f"{self.location}/{name}: {error}") from None

    def has(self, raw: bytes) -> bool:
        """Whether a picture is still there."""
        if self.is_local:
            return (self.folder / os.fsdecode(raw)).is_file()
        return bool(self.files.isfile(f"{self.root}/{raw.decode('utf-8', 'surrogatepass')}"))

    @contextmanager
    def held(self) -> Iterator[None]:
        """While this process writes here. Raises TimeoutError where another one does; of a URL nothing is known."""
        if not self.is_local:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock", blocking=False):
            yield


def content_hash(picture: Path | bytes) -> str:
    """A hash of a picture's bytes. Raises OSError."""

    def new() -> Any:
        return hashlib.blake2b(digest_size=16)

    with io.BytesIO(picture) if isinstance(picture, bytes) else picture.open("rb") as file:
        return hashlib.file_digest(file, new).hexdigest()


def _reason(error: OSError) -> str:
    """What went wrong, without the path, which is told before it."""
    return error.strerror or str(error)


def time_ns(when: int) -> int:
    """A file's time as the index holds it: 64 bits, which reach from 1678 to 2262; other times are the first or the
    last of these."""
    return max(-(2**63), min(when, 2**63 - 1))


def _changed_ns(about: dict[str, Any]) -> int:
    """When storage says that a file was changed, by the names that its kinds have for it; 0 where it does not."""
    when = next((about[name] for name in ("mtime", "LastModified", "last_modified", "updated", "created")
                 if about.get(name)), 0)  # fmt: skip
    if isinstance(when, str):
        from datetime import datetime

        when = datetime.fromisoformat(when)
    return time_ns(int(1e9 * (when if isinstance(when, (int, float)) else when.timestamp())))


def picture_files(folder: Path, not_taken: NotTaken | None = None) -> Listing:
    """What lies below a folder: images, each file and each folder once, as `files_below` lists them.

    not_taken: where the other files are counted. A link that leads back to a file that was seen already is another name
    of it. Raises OSError where the folder itself cannot be listed; any other is put into the listing.
    """
    found = Listing(not_taken=not_taken or NotTaken())
    root = os.fsencode(folder)
    for path, entry in files_below(folder, found.unlisted):
        try:
            about = entry.stat()
        except OSError as error:
            _put_unseen(found, path, entry.is_symlink(), error)
            continue
        number = (about.st_dev, about.st_ino)
        if number in found.known or found.not_taken.takes(path, partial(first_bytes, os.path.join(root, path))):
            found.add(PictureFile(path, about.st_size, time_ns(about.st_mtime_ns)), number)
    return found


def _put_unseen(found: Listing, path: bytes, is_link: bool, error: OSError) -> None:
    """An entry that cannot be looked at: a link that leads nowhere or in a circle, or a file that may not be read."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        if is_link:
            found.dead_links.append(path)
    elif found.not_taken.takes(path, bytes):
        found.unreadable[path] = f"{name_of(path)}: cannot be read: {_reason(error)}"
