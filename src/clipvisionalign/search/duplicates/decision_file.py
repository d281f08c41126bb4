"""The file of an index with what a person has decided on duplicates: pairs that are none, and images to keep.

`not_duplicates.json` is written atomically and survives every update of the index: decisions name images by their
content, so moved and renamed images keep theirs, an image whose content changes is another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from clipvisionalign.search.storage import InvalidIndexError, Storage, as_storage

DECISIONS_FILE = "not_duplicates.json"
_FORMAT = 1
#: Seconds that a decision waits for another process's.
_LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Decision:
    """A decision that two images are no duplicates.

    Attributes:
        hashes: Their content hashes, the smaller first.
        paths: Where they were when it was taken, in that order.
        decided: When, in ISO 8601.
    """

    hashes: tuple[str, str]
    paths: tuple[str, str]
    decided: str


@dataclass(frozen=True)
class Keeper:
    """A decision to keep an image of every group that it is in.

    Attributes:
        hash: Its content hash.
        path: Where it was when it was chosen; of files of the same bytes the one that is kept.
        decided: When, in ISO 8601.
    """

    hash: str
    path: str
    decided: str


def read_decisions(index: str | Path | Storage) -> list[Decision]:
    """All decisions of an index.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The decisions, oldest first.

    Raises:
        InvalidIndexError: The file cannot be read.
    """
    return read_all(index)[0]


def read_keepers(index: str | Path | Storage) -> list[Keeper]:
    """The images of an index that a person has chosen to keep.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The images, in the order in which they were chosen.

    Raises:
        InvalidIndexError: The file cannot be read.
    """
    return read_all(index)[1]


def read_all(index: str | Path | Storage) -> tuple[list[Decision], list[Keeper]]:
    """All that was decided, by one reading of the file.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The decisions and the images to keep, oldest first.

    Raises:
        InvalidIndexError: The file cannot be read.
    """
    text = as_storage(index).read(DECISIONS_FILE)
    if text is None:
        return [], []
    try:
        return _parse_file(json.loads(text))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidIndexError(f"{index}/{DECISIONS_FILE}: cannot be read: {error}; mend or remove it") from None


def _parse_keeper(entry: Any) -> Keeper:
    return Keeper(str(entry["hash"]), str(entry["path"]), str(entry["decided"]))


def _parse_file(content: Any) -> tuple[list[Decision], list[Keeper]]:
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']}, not {_FORMAT}")
    decisions = [_parse(entry) for entry in content["not_duplicates"]]
    return decisions, [_parse_keeper(entry) for entry in content.get("kept", [])]


def _parse(entry: Any) -> Decision:
    first, second = entry["hashes"]
    paths = entry["paths"]
    return Decision((str(first), str(second)), (str(paths[0]), str(paths[1])), str(entry["decided"]))


def time_now() -> str:
    """The time of a decision, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def locked(index: Storage) -> Iterator[Storage]:
    """An index whose decisions no other process writes; not checked behind a URL.

    Args:
        index: The storage of the index.

    Yields:
        The same.
    """
    if not index.is_local:
        yield index
        return
    with FileLock(index.folder / f"{DECISIONS_FILE}.lock", timeout=_LOCK_SECONDS):
        yield index


def write_all(index: Storage, decisions: Sequence[Decision], keepers: Sequence[Keeper]) -> None:
    """Replace all that was decided; only within `locked`.

    Args:
        index: The storage of the index.
        decisions: Pairs that are no duplicates.
        keepers: Images to keep.
    """
    content = {
        "format": _FORMAT,
        "not_duplicates": [asdict(each) for each in decisions],
        "kept": [asdict(each) for each in keepers],
    }
    index.write(DECISIONS_FILE, json.dumps(content, indent=2) + "\n")
