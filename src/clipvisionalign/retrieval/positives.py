"""Which captions belong to which images, as ranks, audits and minimal pairs take it: `Positives`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Positives:
    """Which captions belong to which images.

    Without identities a caption belongs to its own image. With them, to every image of that image's identity. With
    groups of captions, to all images that any caption of its group belongs to: a relation between groups and images, so
    that two images that share one caption do not share their others. `of` checks what the constructor takes unchecked.

    Attributes:
        caption_image: (M,) number of each caption's image, int64.
        images: Number N of images.
        identity: (N,) numbers from 0, equal for images of one identity; None if each is its own.
        caption_group: (M,) numbers from 0, equal for equal captions; None if captions are compared by their images
            only.
    """

    caption_image: np.ndarray
    images: int
    identity: np.ndarray | None = None
    caption_group: np.ndarray | None = None

    @classmethod
    def of(
        cls, caption_image: Any, images: int, identity: Any = None, caption_group: Any = None, distractors: bool = False
    ) -> Positives:
        """Check which captions belong to which images, and number identities and groups from 0.

        Args:
            caption_image: (M,) whole numbers below `images`, each caption's image.
            images: Number N of images.
            identity: (N,) numbers, strings or None; equal for images of one identity. An entry None or NaN is an
                identity of its own. None if each image is its own.
            caption_group: (M,) equal for captions that are equal; None if captions are compared by their images only.
            distractors: Whether images may have no caption.

        Returns:
            The positives.

        Raises:
            ValueError: There is no image or no caption, a number is out of range, an entry is missing, or an image has
                no caption without `distractors`.

        >>> Positives.of([0, 0, 1], 2).pairs()[1].tolist()
        [0, 1, 2]
        """
        owner = np.asarray(caption_image)
        if owner.ndim != 1 or (owner.size and not np.issubdtype(owner.dtype, np.integer)):
            raise ValueError(f"caption_image should be a row of whole numbers (M,), not {owner.dtype} {owner.shape}")
        if images < 1 or not owner.size:
            raise ValueError(f"nothing to rank: {images} images and {owner.size} captions")
        if owner.min() < 0 or owner.max() >= images:
            raise ValueError(f"caption_image names image {owner.min()} to {owner.max()}, but there are {images} images")
        group = None if identity is None else _identity_ids(identity)
        if group is not None and group.shape != (images,):
            raise ValueError(f"identity should have one entry per image ({images},), not {group.shape}")
        caption_groups = None if caption_group is None else np.unique(np.asarray(caption_group), return_inverse=True)[1]
        if caption_groups is not None and caption_groups.shape != owner.shape:
            raise ValueError(
                f"caption_group should have one entry per caption {owner.shape}, not {caption_groups.shape}"
            )
        positives = cls(owner.astype(np.int64), images, group, caption_groups)
        uncaptioned = np.flatnonzero(np.bincount(positives.pairs()[0], minlength=images) == 0)
        if uncaptioned.size and not distractors:
            raise ValueError(
                f"image {uncaptioned[0]} has no caption ({uncaptioned.size} such images): leave them out first"
            )
        return positives

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every true pair.

        Returns:
            Image numbers (Q,) and caption numbers (Q,), sorted by image, then by caption.
        """
        if self.identity is None and self.caption_group is None:
            order = np.argsort(self.caption_image, kind="stable")
            return self.caption_image[order], order
        identity = np.arange(self.images) if self.identity is None else self.identity
        caption_identity = identity[self.caption_image]
        if self.caption_group is None:
            captions, image_numbers = _group_members(caption_identity, identity)
        else:
            # From the groups of captions to the identities that have one of them, and on to those identities' images.
            groups, identities = np.unique(np.stack([self.caption_group, caption_identity]), axis=1)
            which, members = _group_members(identities, identity)
            captions, positions = _group_members(self.caption_group, groups[which])
            image_numbers = members[positions]
        order = np.lexsort((captions, image_numbers))
        return image_numbers[order], captions[order]

    def contains(self, images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Which pairs are true.

        Args:
            images: Image numbers, of any shape.
            captions: Caption numbers, of the same shape.

        Returns:
            Whether each caption belongs to the image at the same position, of that shape.
        """
        width = len(self.caption_image)
        pair_images, pair_captions = self.pairs()
        keys, queried_keys = pair_images * width + pair_captions, images * width + captions
        return keys[np.searchsorted(keys, queried_keys).clip(max=len(keys) - 1)] == queried_keys


def _identity_ids(identity: Any) -> np.ndarray:
    """Identities (N,) as numbers from 0; an entry that is missing (None, NaN) is an identity of its own."""
    entries = np.asarray(identity)
    if entries.ndim == 1 and entries.dtype.kind in "biuSU":
        return np.unique(entries, return_inverse=True)[1]
    numbers: dict[Any, int] = {}
    if entries.ndim != 1:
        return entries
    return np.array([
        numbers.setdefault(object() if entry is None or entry != entry else entry, len(numbers))
        for entry in entries.tolist()
    ])  # fmt: skip


def _group_members(queries: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each number in `queries` (Q,) the positions in `groups` that hold it: (position in queries, position in
    groups), a row each."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups, minlength=int(queries.max(initial=-1)) + 1)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    counts = sizes[queries]
    rows = np.repeat(np.arange(len(queries)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, order[starts[queries[rows]] + within]
