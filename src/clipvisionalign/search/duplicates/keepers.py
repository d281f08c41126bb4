"""Images that a person has chosen to keep, in the place of the best ones by their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipvisionalign.search.duplicate_decisions import (
    Keeper,
    locked,
    read_all,
    read_keepers,
    time_now,
    write_all,
)
from clipvisionalign.search.duplicates.quality import ImageFile
from clipvisionalign.search.storage import Storage, as_storage

#: Why an image is kept that a person has chosen.
CHOSEN_REASON = "chosen by hand"


class KeptMeanwhileError(ValueError):
    """Another image of a group has been chosen since its choice was read."""


class Keepers:
    """The images that were chosen, by their content.

    Args:
        keepers: Of the index, the last chosen last.
    """

    def __init__(self, keepers: Sequence[Keeper] = ()) -> None:
        self._by_hash: dict[str, list[tuple[int, Keeper]]] = {}
        for rank, keeper in enumerate(keepers):
            self._by_hash.setdefault(keeper.hash, []).append((rank, keeper))

    def mark(self, images: Sequence[ImageFile]) -> tuple[list[ImageFile], int | None]:
        """Mark the images of a group that were chosen.

        Args:
            images: Of the group.

        Returns:
            The images, and the position of the one that was chosen last; None where none was.
        """
        group = [(image.hash, image.path) for image in images]
        ranks = [
            max((rank for rank, each in self._by_hash.get(image[0], ()) if _is_kept(image, each, group)), default=-1)
            for image in group
        ]
        if max(ranks) < 0:
            return list(images), None
        marked = [replace(image, chosen=rank >= 0) for image, rank in zip(images, ranks, strict=True)]
        return marked, ranks.index(max(ranks))


def add_keepers(index: str | Path | Storage, images: Sequence[tuple[str, str]]) -> list[Keeper]:
    """Decide that some images are kept, of every group that each is in.

    Args:
        index: Path, URL or storage of an index.
        images: Content hash and path of each.

    Returns:
        The decisions that are new.

    Raises:
        OSError: The index cannot be written.
        InvalidIndexError: The file cannot be read.
    """
    with locked(as_storage(index)) as storage:
        decisions, keepers = read_all(storage)
        # The last one counts: what was decided already is so again, after those that were decided meanwhile.
        former = keepers[-len(images) :] if images else []
        if [(each.hash, each.path) for each in former] == list(images):
            return []
        added = [Keeper(hash_, path, time_now()) for hash_, path in images]
        chosen = {(each.hash, each.path) for each in added}
        others = [each for each in keepers if (each.hash, each.path) not in chosen]
        write_all(storage, decisions, [*others, *added])
    return added


def choose_keeper(
    index: str | Path | Storage,
    group: Sequence[tuple[str, str]],
    keep: tuple[str, str] | None,
    replaces: Sequence[tuple[str, str]] = (),
) -> list[Keeper]:
    """Decide which image of a group is kept in the place of those that were chosen before.

    Args:
        index: Path, URL or storage of an index.
        group: Content hash and path of its images.
        keep: That of the image to keep; None to take the choice back.
        replaces: Of those images that are known to be chosen: of two people who choose at once, the second is told.

    Returns:
        The images of the group that are chosen now: one, or none.

    Raises:
        KeptMeanwhileError: Others of its images are chosen.
        OSError: The index cannot be written.
        InvalidIndexError: The file cannot be read.
    """
    with locked(as_storage(index)) as storage:
        decisions, keepers = read_all(storage)
        chosen = {image for image in group if any(_is_kept(image, each, group) for each in keepers)}
        if chosen != set(replaces):
            names = ", ".join(sorted(path for _, path in chosen)) or "none"
            raise KeptMeanwhileError(f"another image of this group has been chosen meanwhile: {names}")
        others = [each for each in keepers if not any(_is_kept(image, each, group) for image in group)]
        added = [] if keep is None else [Keeper(*keep, time_now())]
        write_all(storage, decisions, [*others, *added])
    return added


def remove_keepers(index: str | Path | Storage, images: Sequence[str | tuple[str, str]]) -> list[Keeper]:
    """Take back that some images are kept.

    Args:
        index: Path, URL or storage of an index.
        images: Content hashes, or content hash and path.

    Returns:
        The decisions that were taken back; those that are not there are left out.

    Raises:
        OSError: The index cannot be written.
        InvalidIndexError: The file cannot be read.
    """
    given = set(images)

    def concerns(keeper: Keeper) -> bool:
        return keeper.hash in given or (keeper.hash, keeper.path) in given

    if not any(map(concerns, read_keepers(index))):
        return []
    with locked(as_storage(index)) as storage:
        decisions, keepers = read_all(storage)
        write_all(storage, decisions, [each for each in keepers if not concerns(each)])
    return [each for each in keepers if concerns(each)]


def _is_kept(image: tuple[str, str], keeper: Keeper, group: Sequence[tuple[str, str]]) -> bool:
    """Whether an image of a group, (hash, path), is one that was chosen.

    Among equal files its path decides; where it is gone, the first of them counts: its bytes are the same.
    """
    if image[0] != keeper.hash:
        return False
    paths = [path for hash_, path in group if hash_ == image[0]]
    return image[1] == (keeper.path if keeper.path in paths else min(paths, default=image[1]))
