"""Folders of files beside the tables of an index that nothing changes any more, each named by a record.

The record is written last, at once. A process that is killed leaves the former record with its folder, and a process
that has mapped the former files keeps them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from clipvisionalign.files import new_folder, remove
from clipvisionalign.search.storage import Storage

#: Openings of files that another process replaces at the same time.
_ATTEMPTS = 5


class FilesRecord(Protocol):
    """What the record of a folder has, whatever else."""

    @property
    def folder(self) -> str:
        """Name of the folder."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""

    @property
    def format(self) -> int:
        """Version of the files."""


Record = TypeVar("Record", bound=FilesRecord)
Files = TypeVar("Files")


@dataclass(frozen=True)
class RecordedFiles(Generic[Record]):
    """One kind of such folders.

    Args:
        record_file: Name of the record.
        prefix: What the name of a folder begins with.
        parse: The record of its fields; TypeError or ValueError for others.
        format: Version of the files that is understood.
        names: Of the files, as `sizes` has them.
        suffix: What their names end in beyond that.
    """

    record_file: str
    prefix: str
    parse: Callable[..., Record]
    format: int
    names: Sequence[str]
    suffix: str = ""

    def paths(self, folder: Path) -> dict[str, Path]:
        """The files of a folder.

        Args:
            folder: The folder.

        Returns:
            For each name the path.
        """
        return {name: folder / f"{name}{self.suffix}" for name in self.names}

    def sizes(self, folder: Path) -> dict[str, int]:
        """Bytes of each file of a folder.

        Args:
            folder: The folder.

        Returns:
            For each name the bytes.

        Raises:
            OSError: A file is not there.
        """
        return {name: path.stat().st_size for name, path in self.paths(folder).items()}

    def read(self, index: Storage) -> Record | None:
        """Read the record of an index.

        Args:
            index: The storage of the index.

        Returns:
            The record; None where there is none that this version understands, or one of its files is not there whole.
        """
        try:
            text = index.read(self.record_file) if index.is_local else None
            if text is None:
                return None
            record = self.parse(**json.loads(text))
            whole = all(record.sizes[name] == size for name, size in self.sizes(index.folder / record.folder).items())
        except (TypeError, ValueError, KeyError, OSError):
            return None
        return record if whole and record.format == self.format else None

    def stamp(self, index: Storage) -> tuple[int, int] | None:
        """What changes with every record that is written.

        Args:
            index: The storage of the index.

        Returns:
            The identity of the record's file; None where there is none.
        """
        try:
            status = (index.folder / self.record_file).stat() if index.is_local else None
        except OSError:
            return None
        return None if status is None else (status.st_ino, status.st_mtime_ns)

    def open(self, index: Storage, files: Callable[[Storage, Record], Files]) -> Files | None:
        """Open the files of an index, also while another process replaces them.

        Args:
            index: The storage of the index.
            files: Opens those of a record; OSError, ValueError or RuntimeError where they are not there or damaged.

        Returns:
            What `files` gives; None where they are not there whole.
        """
        for _ in range(_ATTEMPTS):
            record = self.read(index)
            if record is None:
                continue
            try:
                return files(index, record)
            except (OSError, ValueError, RuntimeError):
                # Replaced between the record and them.
                continue
        return None

    @contextmanager
    def new_folder(self, index: Storage) -> Iterator[Path]:
        """A new folder that the body fills; it is removed where the body raises.

        Args:
            index: The storage of the index.

        Yields:
            The folder.

        Raises:
            OSError: It cannot be made.
        """
        folder = index.folder / f"{self.prefix}{uuid.uuid4().hex[:12]}"
        with new_folder(folder):
            yield folder

    def remove_others(self, index: Storage, kept: str = "") -> None:
        """Remove the folders of former records.

        Args:
            index: The storage of the index.
            kept: The name of the folder that stays, "" for none.
        """
        for path in index.folder.glob(f"{self.prefix}*"):
            if path.name != kept and path.is_dir():
                remove(path)
