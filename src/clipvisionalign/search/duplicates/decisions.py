"""Pairs of images that a person has decided to be no duplicates, kept in the index by the content of the images.

`not_duplicates.json` is written atomically and survives every update of the index: moved and renamed images keep their
decisions, an image whose content changes is another one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from filelock import FileLock

from clipvisionalign.search.manifest import read_manifest
from clipvisionalign.search.storage import InvalidIndexError, Storage, as_storage
from clipvisionalign.search.tables import read_image_table

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


def read_decisions(index: str | Path | Storage) -> list[Decision]:
    """All decisions of an index.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The decisions, oldest first.

    Raises:
        InvalidIndexError: The file cannot be read.
    """
    text = as_storage(index).read(DECISIONS_FILE)
    if text is None:
        return []
    try:
        return _parse_file(json.loads(text))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidIndexError(f"{index}/{DECISIONS_FILE}: cannot be read: {error}; mend or remove it") from None


def _parse_file(content: Any) -> list[Decision]:
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']}, not {_FORMAT}")
    return [_parse(entry) for entry in content["not_duplicates"]]


def _parse(entry: Any) -> Decision:
    first, second = entry["hashes"]
    paths = entry["paths"]
    return Decision((str(first), str(second)), (str(paths[0]), str(paths[1])), str(entry["decided"]))


def find_images(index: str | Path | Storage, names: Sequence[str | int]) -> list[tuple[str, str]]:
    """Images of an index by their paths or numbers.

    Args:
        index: Path, URL or storage of an index.
        names: Paths below its folder, whole paths, or numbers.

    Returns:
        Content hash and path of each.

    Raises:
        KeyError: The index has no such image.
        InvalidIndexError: There is no index.
    """
    storage = as_storage(index)
    folder, reader = read_manifest(storage).folder, read_image_table(storage)
    images = []
    for name in names:
        conditions = [] if isinstance(name, int) else [f"path = {_quoted(each)}" for each in _paths(name, folder)]
        if isinstance(name, int) or (name.isascii() and name.isdecimal() and len(name) < 19):
            conditions.append(f"id = {int(name)}")
        rows = next(filter(None, (reader.read(["hash", "path"], each).to_pylist() for each in conditions)), None)
        if rows is None:
            raise KeyError(f"{index}: no image {name!r}; give its path below {folder}, or its number")
        images.append((rows[0]["hash"], rows[0]["path"]))
    return images


def find_hashes(index: str | Path | Storage, names: Sequence[str | int]) -> list[str]:
    """Content hashes of images on which something was decided, also of those that are no longer in the index.

    Args:
        index: Path, URL or storage of an index.
        names: Paths or numbers, as `find_images` takes them, paths of a decision, or content hashes.

    Returns:
        A hash for each.

    Raises:
        KeyError: There is no such image, neither in the index nor in a decision.
        InvalidIndexError: There is no index, or its decisions cannot be read.
    """
    decided: dict[str | int, str] = {}
    for each in read_decisions(index):
        decided |= dict(zip((*each.paths, *each.hashes), (*each.hashes, *each.hashes), strict=True))
    return [decided[name] if name in decided else find_images(index, [name])[0][0] for name in names]


def _paths(name: str, folder: str) -> list[str]:
    """What a path below a folder may be called in the index."""
    prefix = f"{folder.rstrip('/')}/"
    whole = name if "://" in folder else str(Path(name).absolute())
    return [name, *([whole.removeprefix(prefix)] if whole.startswith(prefix) else [])]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def add_decisions(index: str | Path | Storage, images: Sequence[tuple[str, str]]) -> list[Decision]:
    """Decide that no two of some images are duplicates.

    Args:
        index: Path, URL or storage of an index.
        images: Content hash and path of each image, two or more.

    Returns:
        The decisions that are new.

    Raises:
        ValueError: Fewer than two images are given, or two have the same bytes.
        OSError: The index cannot be written.
        InvalidIndexError: The file cannot be read.
    """
    if len(images) < 2:
        raise ValueError("a decision is on two images or more")
    pairs = [tuple(sorted(pair)) for pair in combinations(images, 2)]
    for (first, first_path), (second, second_path) in pairs:
        if first == second:
            raise ValueError(f"{first_path} and {second_path} have the same bytes: they cannot be told apart")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with _locked(as_storage(index)) as storage:
        decisions = {each.hashes: each for each in read_decisions(storage)}
        added = [
            Decision((first, second), (first_path, second_path), now)
            for (first, first_path), (second, second_path) in pairs
            if (first, second) not in decisions
        ]
        if added:
            _write(storage, [*decisions.values(), *added])
    return added


def remove_decisions(index: str | Path | Storage, hashes: Sequence[str]) -> list[Decision]:
    """Take back the decisions on some images.

    Args:
        index: Path, URL or storage of an index.
        hashes: Content hashes of two images or more: decisions on two of them are taken back; of one, all on it.

    Returns:
        The decisions that were taken back.

    Raises:
        ValueError: There is none on them.
        OSError: The index cannot be written.
        InvalidIndexError: The file cannot be read.
    """
    given = set(hashes)

    def concerns(decision: Decision) -> bool:
        return len(given & set(decision.hashes)) == min(2, len(given))

    if not any(map(concerns, read_decisions(index))):
        raise ValueError(f"{index}: no decision on these images; 'duplicates {index} --decisions' lists them")
    with _locked(as_storage(index)) as storage:
        decisions = read_decisions(storage)
        _write(storage, [each for each in decisions if not concerns(each)])
    return [each for each in decisions if concerns(each)]


@contextmanager
def _locked(index: Storage) -> Iterator[Storage]:
    """An index whose decisions no other process writes; not checked behind a URL."""
    if not index.is_local:
        yield index
        return
    with FileLock(index.folder / f"{DECISIONS_FILE}.lock", timeout=_LOCK_SECONDS):
        yield index


def _write(index: Storage, decisions: Sequence[Decision]) -> None:
    content = {"format": _FORMAT, "not_duplicates": [asdict(each) for each in decisions]}
    index.write(DECISIONS_FILE, json.dumps(content, indent=2) + "\n")
