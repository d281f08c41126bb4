"""Outputs of frozen towers for a whole data set, computed once if the disk has space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from clipvisionalign.counts import count_noun
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.models.aligner import Aligner, AnyTextTower
from clipvisionalign.training.caption_features import CaptionFeatureCache, caption_features_exist, open_caption_features
from clipvisionalign.training.config import RunConfig, caches_caption_features, caches_image_features, frozen_blocks
from clipvisionalign.training.data import TrainingData
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.feature_cache import (
    AnyFeatureCache,
    DiskFullError,
    View,
    augmentation_views,
    cache_folder,
    has_free_space,
    image_features_exist,
    image_features_size,
    open_image_features,
)
from clipvisionalign.training.fine_tuning import divided_tower

logger = logging.getLogger(__name__)

CacheT = TypeVar("CacheT")


@dataclass(frozen=True)
class FeatureRequest:
    """A split whose image features are wanted, see `open_image_features`.

    Attributes:
        data: The split.
        views: The variants of each image.
        dtype: Dtype of the tower.
        what: Name of the split, for the progress line.
    """

    data: CaptionedImages
    views: list[View]
    dtype: torch.dtype
    what: str


@dataclass(frozen=True)
class CacheSpace:
    """The disk space that a frozen tower's outputs need.

    Attributes:
        root: The folder of the cache.
        sizes: Bytes of each part.
        what: What the parts are, for messages.
    """

    root: Path
    sizes: list[int]
    what: str

    def has_space(self, parts_exist: Callable[[], Sequence[bool]], used_before: bool | None) -> bool:
        """Whether there is room for the parts that are not there.

        Args:
            parts_exist: Returns which parts are there; called only where all of them would not fit.
            used_before: Whether the run, which resumes, has used them; None for a run that starts.

        Returns:
            Whether there is.

        Raises:
            OSError: There is none, and the run has used them.
        """
        if has_free_space(self.root, sum(self.sizes)):
            return True
        # Whether they are there takes a hash of all weights: checked where it matters.
        missing = sum(size for size, exists in zip(self.sizes, parts_exist(), strict=True) if not exists)
        if not missing or has_free_space(self.root, missing):
            return True
        if used_before:
            raise OSError(f"{self}, which this run was begun with: make room there")
        return False

    def __str__(self) -> str:
        return f"{self.root}: no room for {_size_text(sum(self.sizes))} of {self.what}"


def _size_text(size: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _compute_once(
    room: CacheSpace,
    parts_exist: Callable[[], Sequence[bool]],
    open_caches: Callable[[], list[CacheT]],
    distributed: Distributed,
    used_before: bool | None,
) -> list[CacheT] | None:
    """What `open_caches` gives on every process, computed once by the first; None where there is no room for it."""

    def compute() -> bool:
        has_space = room.has_space(parts_exist, used_before)
        try:
            if has_space:
                open_caches()
        except DiskFullError:
            # Others have written to the disk meanwhile.
            if used_before:
                raise
            return False
        return has_space

    # Computed once more where a disk is another process's own.
    return distributed.run_on_all(open_caches, long_timeout=True) if distributed.run_on_main(compute) else None


def load_frozen_image_features(
    config: RunConfig,
    aligner: Aligner,
    data: TrainingData,
    dtype: torch.dtype,
    distributed: Distributed,
    used_before: bool | None = None,
) -> tuple[AnyFeatureCache | None, AnyFeatureCache | None]:
    """Features of both splits by a frozen image tower, or by the first blocks of one that are frozen.

    They are computed once by the main process and kept on disk. Training images that turn out not to be decodable are
    left out of `data`.

    Args:
        config: The settings of the run.
        aligner: The model.
        data: The data; rows may be dropped from it.
        dtype: Dtype of the image tower.
        distributed: The processes, all of which call this.
        used_before: Whether the run, which resumes, has used features; None for a run that starts, which uses them
            where there is room.

    Returns:
        Features of the training split and of dev; None where the tower is not frozen, of a stream, or without room.

    Raises:
        OSError: There is no room any longer for a run that has used them.
    """
    if used_before is False or not config.epochs:
        return None, None
    if not caches_image_features(config.freezing):
        return None, None
    train = data.train
    if not isinstance(train, CaptionedImages):
        return None, None
    root, tower, blocks = cache_folder(config.cache), aligner.image_tower, frozen_blocks(config.freezing)
    requests = [FeatureRequest(train, augmentation_views(config.augment, config.views), dtype, "train")]
    if not (config.profile or (blocks and config.model.image_tower.mirrored)):
        # A profile measures no dev gallery; mirrored images go through all blocks twice.
        requests.append(FeatureRequest(data.dev, augmentation_views("none", 1), torch.float32, "dev"))
    room = CacheSpace(
        root,
        [image_features_size(len(each.data), len(each.views), tower, blocks) for each in requests],
        "image features",
    )

    def open_caches() -> list[AnyFeatureCache]:
        return [
            open_image_features(root, each.data, tower, each.views, each.dtype, each.what, blocks) for each in requests
        ]

    def parts_exist() -> list[bool]:
        return [image_features_exist(root, each.data, tower, each.views, each.dtype, blocks) for each in requests]

    caches = _compute_once(room, parts_exist, open_caches, distributed, used_before)
    if caches is None:
        logger.info(f"{room}: images go through the tower in every epoch")
        return None, None
    features, *dev = caches
    data.drop_unreadable(features)
    return features, dev[0] if dev else None


def load_frozen_caption_features(
    config: RunConfig,
    aligner: Aligner,
    data: TrainingData,
    distributed: Distributed,
    used_before: bool | None = None,
) -> tuple[CaptionFeatureCache | None, CaptionFeatureCache | None]:
    """Outputs of a frozen text tower for the captions of both splits.

    They are computed once by the main process and kept on disk; of training captions also the outputs of all tokens,
    for a design that scores pairs. A stream's are not kept, nor are joined ones, which are others in each epoch.

    Args:
        config: The settings of the run.
        aligner: The model.
        data: The data.
        distributed: The processes, all of which call this.
        used_before: As for `load_frozen_image_features`.

    Returns:
        Outputs for the training split and for dev; None where the tower is not frozen, or without room.

    Raises:
        OSError: There is no room any longer for a run that has used them.
    """
    if used_before is False or not config.epochs or not caches_caption_features(config.freezing):
        return None, None
    root, tower = cache_folder(config.cache), aligner.text_tower
    requests: list[tuple[CaptionedImages, bool]] = []
    keeps_train = isinstance(data.train, CaptionedImages) and not data.joined
    if isinstance(data.train, CaptionedImages) and keeps_train:
        requests.append((data.train, aligner.late is not None))
    if not config.profile:
        requests.append((data.dev, False))
    room = CacheSpace(root, [_caption_features_size(*each, tower) for each in requests], "caption features")

    def open_caches() -> list[CaptionFeatureCache]:
        return [open_caption_features(root, split, tower, tokens) for split, tokens in requests]

    def parts_exist() -> list[bool]:
        return [caption_features_exist(root, split, tower, tokens) for split, tokens in requests]

    caches = _compute_once(room, parts_exist, open_caches, distributed, used_before)
    if caches is None:
        logger.info(f"{room}: captions go through the tower in every epoch")
        return None, None
    train = caches[0] if keeps_train else None
    return train, None if config.profile else caches[-1]


def describe_frozen_towers(
    config: RunConfig,
    aligner: Aligner,
    data: TrainingData,
    images: Sequence[AnyFeatureCache | None],
    captions: Sequence[CaptionFeatureCache | None],
) -> list[str]:
    """Which blocks of the image tower are frozen, and what is kept on disk of frozen towers, how large, and where.

    Args:
        config: The settings of the run.
        aligner: The model.
        data: The data.
        images: What `load_frozen_image_features` returned.
        captions: What `load_frozen_caption_features` returned.

    Returns:
        Lines for the log: of the image tower, and of the text tower; none of a tower of which nothing is to be stated.
    """
    lines, names, root = [], ("train", "dev"), cache_folder(config.cache)
    # Of a stream no features are kept.
    counts = {"train": len(data.train) if isinstance(data.train, CaptionedImages) else 0, "dev": len(data.dev)}
    image_caches = {name: cache for name, cache in zip(names, images, strict=True) if cache is not None}
    caption_caches = {name: cache for name, cache in zip(names, captions, strict=True) if cache is not None}
    frozen, blocks = "frozen", frozen_blocks(config.freezing)
    if blocks:
        frozen = f"first {blocks} of {len(divided_tower(aligner, blocks).parts().blocks)} blocks frozen"
    if image_caches:
        kept = " and ".join(
            f"{count_noun(cache.views, 'view')} of {count_noun(counts[name], f'{name} image')}"
            for name, cache in image_caches.items()
        )
        size = _size_text(sum(cache.nbytes for cache in image_caches.values()))
        lines.append(f"image tower: {frozen}; {kept} kept in {root / 'features'} ({size})")
    elif blocks:
        lines.append(f"image tower: {frozen}; their outputs are not kept: images pass through them in every step")
    if caption_caches:
        kept = " and ".join(count_noun(len(cache.pooled), f"{name} caption") for name, cache in caption_caches.items())
        size = _size_text(sum(cache.nbytes for cache in caption_caches.values()))
        lines.append(f"text tower: frozen; outputs of {kept} kept in {root / 'captions'} ({size})")
    return lines


def _caption_features_size(data: CaptionedImages, tokens: bool, tower: AnyTextTower) -> int:
    """Bytes that the outputs for all captions take: pooled vectors, and the tokens too, at most."""
    count = len(data.captions)
    word_count = sum(len(caption.split()) for caption in data.captions) if tokens else 0
    return (
        count * tower.width * 4 + min(2 * word_count + 2 * count * tokens, tower.max_tokens * count) * tower.width * 2
    )
