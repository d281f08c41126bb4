"""Deciding that images are no duplicates, and taking it back; images by their paths or numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

from clipvisionalign.search.duplicate_decisions import (
    Decision,
    locked,
    read_all,
    read_decisions,
    time_now,
    write_all,
)
from clipvisionalign.search.manifest import read_manifest
from clipvisionalign.search.storage import Storage, as_storage
from clipvisionalign.search.tables import read_image_table


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
        names: Paths or numbers, as `find_images` takes them, paths of a decision, or content hashes. A path is that of
            the image that is there now, if something was decided on it.

    Returns:
        A hash for each.

    Raises:
        KeyError: There is no such image, neither in the index nor in a decision.
        InvalidIndexError: There is no index, or its decisions cannot be read.
    """
    decided: dict[str | int, str] = {}
    decisions, keepers = read_all(index)
    for keeper in keepers:
        decided |= {keeper.path: keeper.hash, keeper.hash: keeper.hash}
    for each in decisions:
        decided |= dict(zip((*each.paths, *each.hashes), (*each.hashes, *each.hashes), strict=True))
    return [_hash_of(index, name, decided) for name in names]


def _hash_of(index: str | Path | Storage, name: str | int, decided: Mapping[str | int, str]) -> str:
    """The content that a name means: what is there now, unless only a former image of that path was decided on."""
    if name in decided.values():
        return str(name)
    try:
        current = find_images(index, [name])[0][0]
    except KeyError:
        if name not in decided:
            raise
        return decided[name]
    return current if current in decided.values() else decided.get(name, current)


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
    with locked(as_storage(index)) as storage:
        former, keepers = read_all(storage)
        decisions = {each.hashes: each for each in former}
        added = [
            Decision((first, second), (first_path, second_path), time_now())
            for (first, first_path), (second, second_path) in pairs
            if (first, second) not in decisions
        ]
        if added:
            write_all(storage, [*decisions.values(), *added], keepers)
    return added


def remove_decisions(index: str | Path | Storage, hashes: Sequence[str], missing_ok: bool = False) -> list[Decision]:
    """Take back the decisions on some images.

    Args:
        index: Path, URL or storage of an index.
        hashes: Content hashes of two images or more: decisions on two of them are taken back; of one, all on it.
        missing_ok: Whether none may be there.

    Returns:
        The decisions that were taken back.

    Raises:
        ValueError: There is none on them.
        OSError: The index cannot be written.
        InvalidIndexError: The file cannot be read.
    """
    given = set(hashes)
    wanted = min(2, len(given))
    removed = _remove(index, lambda each: len(given & set(each.hashes)) == wanted)
    if not removed and not missing_ok:
        raise ValueError(f"{index}: no decision on these images; 'duplicates {index} --decisions' lists them")
    return removed


def remove_pairs(index: str | Path | Storage, pairs: Sequence[tuple[str, str]]) -> list[Decision]:
    """Take back the decisions on some pairs of images, and on no other.

    Args:
        index: Path, URL or storage of an index.
        pairs: Two content hashes each, in any order.

    Returns:
        The decisions that were taken back; those that are not there are left out.

    Raises:
        OSError: The index cannot be written.
        InvalidIndexError: The file cannot be read.
    """
    given = {tuple(sorted(pair)) for pair in pairs}
    return _remove(index, lambda each: each.hashes in given)


def _remove(index: str | Path | Storage, concerns: Callable[[Decision], bool]) -> list[Decision]:
    if not any(map(concerns, read_decisions(index))):
        return []
    with locked(as_storage(index)) as storage:
        decisions, keepers = read_all(storage)
        write_all(storage, [each for each in decisions if not concerns(each)], keepers)
    return [each for each in decisions if concerns(each)]
