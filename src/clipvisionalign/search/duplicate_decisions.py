"""The file of an index with what a person has decided on duplicates: pairs that are none, and images to keep.

`not_duplicates.json` is written atomically and survives every update of the index: decisions name images by their
content, so moved and renamed images keep theirs, an image whose content changes is another one. Their paths follow
moved files (`move_decisions`): of files with the same bytes the path decides which one is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
        paths: Where they are, as far as updates of the index have seen it, in that order.
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
        path: Where it is, as far as updates of the index have seen it; of files of the same bytes the one that is kept.
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


def move_decisions(
    index: Storage, renamed: Mapping[tuple[str, str], str], deleted: Set[tuple[str, str]] = frozenset()
) -> None:
    """Update the paths of decisions whose files were moved; nothing is written where there is none.

    Of files with the same bytes an update cannot tell which of those that are gone was moved: an image to keep is the
    one that was.

    Args:
        index: The storage of the index.
        renamed: The new path by content hash and old path.
        deleted: Content hash and path of images whose files are gone.

    Raises:
        OSError: The index cannot be written.
        InvalidIndexError: The file cannot be read.
    """
    decisions, keepers = read_all(index) if renamed else ([], [])
    if _moved(decisions, keepers, renamed, deleted) == (decisions, keepers):
        return
    with locked(index):
        write_all(index, *_moved(*read_all(index), renamed, deleted))


def _moved(
    decisions: Sequence[Decision], keepers: Sequence[Keeper], renamed: Mapping[tuple[str, str], str],
    deleted: Set[tuple[str, str]],
) -> tuple[list[Decision], list[Keeper]]:  # fmt: skip
    """The same decisions with the paths that their images have now."""
    chosen = {(keeper.hash, keeper.path) for keeper in keepers}
    spare: dict[str, list[str]] = {}
    for (hash_, old), new in renamed.items():
        if (hash_, old) not in chosen:
            spare.setdefault(hash_, []).append(new)

    def path_of(image: tuple[str, str]) -> str:
        return renamed.get(image, image[1])

    moved = []
    for keeper in keepers:
        image = (keeper.hash, keeper.path)
        path = spare[keeper.hash].pop(0) if image in deleted and spare.get(keeper.hash) else path_of(image)
        moved.append(replace(keeper, path=path))
    pairs = []
    for each in decisions:
        first, second = map(path_of, zip(each.hashes, each.paths, strict=True))
        pairs.append(replace(each, paths=(first, second)))
    return pairs, moved


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
