"""Folders and URLs that hold images and indexes.

What a folder holds is listed whole (`listing.py`): images, other names of one image, files that are none, and what
could not be examined. An index drops a row only where its file is known to be gone.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from clipvisionalign.files import PARTIAL_SUFFIX, atomic_write
from clipvisionalign.images import HEAD_BYTES, ImageError
from clipvisionalign.search.listing import (
    FileListing,
    ImageFile,
    clamp_time_ns,
    decode_path,
    error_reason,
    list_local_images,
    printable,
)

__all__ = [
    "FileListing",
    "ImageFile",
    "InvalidIndexError",
    "Storage",
    "as_storage",
    "clamp_time_ns",
    "content_hash",
    "decode_path",
    "list_local_images",
    "printable",
]


class InvalidIndexError(ValueError):
    """An index that cannot be used: the message has the reason and the remedy."""


class Storage:
    """A folder: a path of this machine, or a URL that fsspec reaches, such as s3://bucket/images.

    Args:
        location: The path or URL; it need not exist.

    Raises:
        ValueError: fsspec has no package for this kind of URL.
    """

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
        """Whether it is a folder without anything in it, or none yet.

        Unfinished files of an interrupted write do not count.

        Returns:
            Whether it is.
        """
        if self.is_local:
            return not self.folder.exists() or (
                self.folder.is_dir() and all(path.name.endswith(PARTIAL_SUFFIX) for path in self.folder.iterdir())
            )
        return not self.filesystem.exists(self.root) or not self.filesystem.ls(self.root)

    def read(self, name: str) -> str | None:
        """The text of a file.

        Args:
            name: Its path below the folder.

        Returns:
            The text; None where there is no such file.
        """
        if self.is_local:
            path = self.folder / name
            return path.read_text(encoding="utf-8") if path.is_file() else None
        key = f"{self.root}/{name}"
        return self.filesystem.cat_file(key).decode() if self.filesystem.exists(key) else None

    def write(self, name: str, text: str) -> None:
        """Write a file atomically; its folder is made if it is not there.

        Args:
            name: Its path below the folder.
            text: Its content.
        """
        if not self.is_local:
            self.filesystem.pipe_file(f"{self.root}/{name}", text.encode())
            return
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / name) as aside:
            aside.write_text(text, encoding="utf-8")

    def has_folder(self, name: str) -> bool:
        """Whether there is a folder.

        Args:
            name: Its path below this one.

        Returns:
            Whether it is there.
        """
        return (self.folder / name).is_dir() if self.is_local else bool(self.filesystem.isdir(f"{self.root}/{name}"))

    def put_file(self, name: str, source: Path) -> None:
        """Put a file of this machine here: on the same disk as a second name of it, else as a copy.

        Args:
            name: Its path below the folder.
            source: The file, which nothing writes to any more.
        """
        if not self.is_local:
            self.filesystem.put_file(str(source), f"{self.root}/{name}")
            return
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / name, sync=False, unique_name=True) as aside:
            try:
                os.link(source, aside)
            except OSError:
                shutil.copyfile(source, aside)

    def get_file(self, name: str, target: Path) -> None:
        """Copy a file to this machine.

        Args:
            name: Its path below the folder.
            target: Where it is written.

        Raises:
            OSError: The file is not there, or cannot be written.
        """
        if self.is_local:
            shutil.copyfile(self.folder / name, target)
        else:
            self.filesystem.get_file(f"{self.root}/{name}", str(target))

    def list_files(self) -> FileListing:
        """Everything below the folder.

        Returns:
            The files, and what cannot be read or listed.

        Raises:
            FileNotFoundError: There is no such folder.
            OSError: The folder itself cannot be listed.
        """
        if not (self.folder.is_dir() if self.is_local else self.filesystem.isdir(self.root)):
            raise FileNotFoundError(f"{self.location}: no such folder")
        return list_local_images(self.folder) if self.is_local else self._list_url()

    def list_images(self) -> list[ImageFile]:
        """Every file below that may be an image, in order of their paths.

        Returns:
            The files.

        Raises:
            FileNotFoundError: There is no such folder.
            OSError: The folder itself cannot be listed.
        """
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
                listing.unlisted[raw(folder)] = error_reason(error)
                continue
            for entry in entries:
                if entry["type"] != "directory":
                    everything[entry["name"]] = entry
                elif entry["name"].rstrip("/") != folder.rstrip("/"):
                    waiting.append(entry["name"])
        return everything

    def image_source(self, raw: bytes) -> Path | bytes:
        """An image, as `open_image` takes it.

        Args:
            raw: Its path below the folder, in bytes.

        Returns:
            The path on this machine, which need not exist; behind a URL the bytes of the file.

        Raises:
            ImageError: The file behind a URL cannot be read.
        """
        if self.is_local:
            return self.folder / os.fsdecode(raw)
        try:
            return bytes(self.filesystem.cat_file(f"{self.root}/{raw.decode('utf-8', 'surrogatepass')}"))
        except OSError as error:
            name = raw.decode("utf-8", "backslashreplace")
            raise ImageError("missing image", f"{self.location}/{name}: {error}") from None

    def has_file(self, raw: bytes) -> bool:
        """Whether a file is there.

        Args:
            raw: Its path below the folder, in bytes.

        Returns:
            Whether it is.
        """
        if self.is_local:
            return (self.folder / os.fsdecode(raw)).is_file()
        return bool(self.filesystem.isfile(f"{self.root}/{raw.decode('utf-8', 'surrogatepass')}"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Let this process alone write here within a block; not checked behind a URL.

        Yields:
            Nothing.

        Raises:
            TimeoutError: Another process writes here.
        """
        if not self.is_local:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock", blocking=False):
            yield


def content_hash(source: Path | bytes) -> str:
    """A hash of an image's bytes.

    Args:
        source: The file, or its bytes.

    Returns:
        32 hex digits (blake2b of 16 bytes).

    Raises:
        OSError: The file cannot be read.
    """

    def new() -> Any:
        return hashlib.blake2b(digest_size=16)

    if not isinstance(source, bytes) and source.exists() and not source.is_file():
        raise OSError(errno.EINVAL, "no regular file", str(source))
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        return hashlib.file_digest(file, new).hexdigest()


def _modified_ns(info: dict[str, Any]) -> int:
    """When a file was changed, by the names that its kinds have for it; 0 where it does not."""
    when = next((info[name] for name in ("mtime", "LastModified", "last_modified", "updated", "created")
                 if info.get(name)), 0)  # fmt: skip
    if isinstance(when, str):
        from datetime import datetime

        when = datetime.fromisoformat(when)
    return clamp_time_ns(int(1e9 * (when if isinstance(when, (int, float)) else when.timestamp())))


def as_storage(index: str | Path | Storage) -> Storage:
    """The storage of an index.

    Args:
        index: A path, a URL, or a storage, which is returned as it is.

    Returns:
        The storage.
    """
    return index if isinstance(index, Storage) else Storage(index)
