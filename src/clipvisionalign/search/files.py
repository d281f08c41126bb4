"""Where pictures and indexes lie, on this machine or behind a URL, and the pictures of a folder, each once."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from clipvisionalign.files import written_aside
from clipvisionalign.pictures import HEAD_BYTES, NotTaken, PictureError, first_bytes, not_for_images


@dataclass(frozen=True)
class PictureFile:
    """A file that may be a picture. raw: its path below the folder, in the bytes that the system has for it."""

    raw: bytes
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """The path as text; bytes that are no UTF-8 are shown as \\xNN."""
        return self.raw.decode("utf-8", "backslashreplace")


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
        """Whether it is a folder without anything in it, or none yet."""
        if self.is_local:
            return not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir()))
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

    def pictures(self, not_taken: NotTaken | None = None) -> list[PictureFile]:
        """Every file below that may be an image (`pictures.why_no_image`), in order of their paths; the others are
        counted in `not_taken`. Raises FileNotFoundError."""
        not_taken = NotTaken() if not_taken is None else not_taken
        if self.is_local:
            if not self.folder.is_dir():
                raise FileNotFoundError(f"{self.location}: no such folder")
            return list(picture_files(self.folder, not_taken))
        if not self.files.isdir(self.root):
            raise FileNotFoundError(f"{self.location}: no such folder")
        found = self.files.find(self.root, detail=True)
        start = len(self.root.rstrip("/")) + 1
        return [
            PictureFile(path[start:].encode("utf-8", "surrogatepass"), int(about["size"] or 0), _changed_ns(about))
            for path, about in sorted(found.items())
            if about["type"] == "file" and not_taken.takes(path[start:], partial(self._head, path))
        ]

    def _head(self, path: str) -> bytes:
        return bytes(self.files.cat_file(path, start=0, end=HEAD_BYTES))

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


def _changed_ns(about: dict[str, Any]) -> int:
    """When storage says that a file was changed, by the names that its kinds have for it; 0 where it does not."""
    when = next((about[name] for name in ("mtime", "LastModified", "last_modified", "updated", "created")
                 if about.get(name)), 0)  # fmt: skip
    if isinstance(when, str):
        from datetime import datetime

        when = datetime.fromisoformat(when)
    return int(1e9 * (when if isinstance(when, (int, float)) else when.timestamp()))


def picture_files(folder: Path, not_taken: NotTaken | None = None) -> Iterator[PictureFile]:
    """Every file below `folder` that may be an image, in order of their paths; each file and each folder once. The
    others are counted in `not_taken`.

    Links are followed; one that leads back to a folder or a file that was seen already, or nowhere, is left out.
    """
    not_taken = NotTaken() if not_taken is None else not_taken
    seen: set[tuple[int, int]] = set()
    waiting = [b""]
    root = os.fsencode(folder)
    while waiting:
        below = waiting.pop()
        try:
            about = os.stat(os.path.join(root, below))
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            entries = sorted(os.scandir(os.path.join(root, below)), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError:
            continue  # gone meanwhile, or not for this user
        folders = []
        for entry in entries:
            path = os.path.join(below, entry.name)
            try:
                if entry.is_dir():
                    folders.append(path)
                    continue
                about = entry.stat()
            except OSError:
                continue  # a link that leads nowhere, or in a circle
            if not entry.is_file() or (about.st_dev, about.st_ino) in seen:
                continue
            if not not_taken.takes(path, partial(first_bytes, os.path.join(root, path))):
                continue
            seen.add((about.st_dev, about.st_ino))
            yield PictureFile(path, about.st_size, about.st_mtime_ns)
        # Hidden ones last: a link elsewhere may lead to what is stored there under no name of its own.
        hidden = {path for path in folders if not_for_images(os.fsdecode(os.path.basename(path)))}
        waiting = [*sorted(hidden, reverse=True), *waiting, *(path for path in reversed(folders) if path not in hidden)]
