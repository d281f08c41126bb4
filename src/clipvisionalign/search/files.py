"""The pictures of a folder, each once: whatever their names, links and loops."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipvisionalign.pictures import PICTURE_SUFFIXES


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

    def below(self, folder: Path) -> Path:
        """Where the file is."""
        return folder / os.fsdecode(self.raw)


def picture_files(folder: Path) -> Iterator[PictureFile]:
    """Every file below `folder` with a picture's ending, in order of their paths; each file and each folder once.

    Links are followed; one that leads back to a folder or a file that was seen already, or nowhere, is left out.
    """
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
                suffix = os.fsdecode(os.path.splitext(entry.name)[1]).lower()
                about = entry.stat()
            except OSError:
                continue  # a link that leads nowhere, or in a circle
            if suffix not in PICTURE_SUFFIXES or not entry.is_file() or (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            yield PictureFile(path, about.st_size, about.st_mtime_ns)
        waiting += folders[::-1]


def content_hash(path: Path) -> str:
    """A hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
