"""Frozen towers' outputs for a whole data set: computed once, where there is room on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.text_tower import TextTower
from clipvisionalign.training.config import RunConfig, keeps_captions, keeps_features
from clipvisionalign.training.feature_cache import (
    CaptionCache,
    FeatureCache,
    NoRoomError,
    View,
    cache_folder,
    captions_are_there,
    features_are_there,
    open_captions,
    open_features,
    room_for,
    size_on_disk,
    views_of,
)
from clipvisionalign.training.processes import Processes
from clipvisionalign.training.records import Say
from clipvisionalign.training.training_data import TrainingData

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Wanted:
    """A split whose picture features are wanted, see `open_features`."""

    data: CaptionedImages
    views: list[View]
    dtype: torch.dtype
    what: str


@dataclass(frozen=True)
class Room:
    """What a frozen tower's outputs need on the disk of a cache. sizes: bytes of each part; what: what they are."""

    root: Path
    sizes: list[int]
    what: str

    def there(self, parts: Callable[[], Sequence[bool]], decided: bool | None) -> bool:
        """Whether there is room for what is not there already. parts: whether each part is.

        decided: whether the run, which goes on, has used them. Raises OSError where it has, and there is no room.
        """
        if room_for(self.root, sum(self.sizes)):
            return True
        # Whether they are there takes a hash of all weights to know: asked where it matters.
        missing = sum(size for size, there in zip(self.sizes, parts(), strict=True) if not there)
        if not missing or room_for(self.root, missing):
            return True
        if decided:
            raise OSError(f"{self}, which this run was begun with: make room there")
        return False

    def __str__(self) -> str:
        size = sum(self.sizes)
        told = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
        return f"{self.root}: no room for {told} of {self.what}"


def _kept(
    room: Room,
    there: Callable[[], Sequence[bool]],
    opened: Callable[[], list[Kept]],
    processes: Processes,
    decided: bool | None,
) -> list[Kept] | None:
    """What `opened` gives on every process, computed once by the first; None where there is no room for it."""

    def compute() -> bool:
        found = room.there(there, decided)
        try:
            if found:
                opened()
        except NoRoomError:
            # Others have written to the disk meanwhile.
            if decided:
                raise
            return False
        return found

    # Computed once more where a disk is another process's own.
    return processes.each(opened, patient=True) if processes.first_does(compute) else None


def frozen_features(
    config: RunConfig,
    aligner: Aligner,
    data: TrainingData,
    dtype: torch.dtype,
    say: Say,
    processes: Processes,
    decided: bool | None = None,
) -> tuple[FeatureCache | None, FeatureCache | None]:
    """The picture tower's features of both splits, if it is frozen: computed once, by the first process.

    Pictures that turn out not to be decodable are left out of `data`. decided: whether the run, which goes on, has used
    features; None for one that begins, which uses them where there is room. Raises OSError where there no longer is.
    """
    if decided is False:
        return None, None
    if not keeps_features(config):
        return None, None
    train = data.train
    if not isinstance(train, CaptionedImages):
        return None, None
    root, tower = cache_folder(config.cache), aligner.image_tower
    wanted = [Wanted(train, views_of(config.augment, config.views), dtype, "train")]
    if not config.profile:
        # A profile measures no dev gallery.
        wanted.append(Wanted(data.dev, views_of("none", 1), torch.float32, "dev"))
    room = Room(root, [size_on_disk(len(each.data), len(each.views), tower) for each in wanted], "picture features")

    def opened() -> list[FeatureCache]:
        return [open_features(root, each.data, tower, each.views, each.dtype, each.what) for each in wanted]

    def there() -> list[bool]:
        return [features_are_there(root, each.data, tower, each.views, each.dtype) for each in wanted]

    found = _kept(room, there, opened, processes, decided)
    if found is None:
        say(f"{room}: pictures go through the tower in every epoch")
        return None, None
    features, *dev = found
    data.without_failures(features, say)
    return features, dev[0] if dev else None


def frozen_captions(
    config: RunConfig,
    aligner: Aligner,
    data: TrainingData,
    say: Say,
    processes: Processes,
    decided: bool | None = None,
) -> tuple[CaptionCache | None, CaptionCache | None]:
    """What the text tower gives for all captions of both splits, if it is frozen: computed once, by the first process.

    Of training captions not the pooled vectors alone, but those of every token, for a design that scores pairs.
    decided: as for `frozen_features`. Raises OSError where there no longer is room. A stream's captions are not kept.
    """
    if decided is False or not keeps_captions(config):
        return None, None
    root, tower = cache_folder(config.cache), aligner.text_tower
    wanted: list[tuple[CaptionedImages, bool]] = []
    if isinstance(data.train, CaptionedImages):
        wanted.append((data.train, aligner.late is not None))
    if not config.profile:
        wanted.append((data.dev, False))
    room = Room(root, [_captions_on_disk(*each, tower) for each in wanted], "caption features")

    def opened() -> list[CaptionCache]:
        return [open_captions(root, some, tower, tokens) for some, tokens in wanted]

    def there() -> list[bool]:
        return [captions_are_there(root, some, tower, tokens) for some, tokens in wanted]

    found = _kept(room, there, opened, processes, decided)
    if found is None:
        say(f"{room}: captions go through the tower in every epoch")
        return None, None
    train = found[0] if isinstance(data.train, CaptionedImages) else None
    return train, None if config.profile else found[-1]


def _captions_on_disk(data: CaptionedImages, tokens: bool, tower: TextTower) -> int:
    """Bytes that the outputs for all captions take: pooled vectors, and the tokens too, at most."""
    count = len(data.captions)
    words = sum(len(caption.split()) for caption in data.captions) if tokens else 0
    return count * tower.width * 4 + min(2 * words + 2 * count * tokens, tower.max_tokens * count) * tower.width * 2
