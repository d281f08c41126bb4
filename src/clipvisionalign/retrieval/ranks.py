"""Exact ranks of the true partners, streamed: memory grows with the gallery, not with gallery x queries.

The rank of a partner is 1 + the number of others that score at least as high: a tie counts against the model, so that
one that gives every pair the same score finds nothing. Another partner of the same query that scores at least as high
takes a place before it too, as it does in any list of results.

Blocks of scores are computed in float64, in which two equal vectors score alike to 1e-15 wherever they stand in a
block, and scores within `TIE` count as equal: whether two scores tie must not depend on how a matrix product rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Cosines closer than this are equal; float32 vectors that differ at all differ by more.
TIE = 1e-12

#: Scores that a model gives in float32 are equal within this share of their size.
TIE_FLOAT32 = 1e-6

#: Scores in a block, 4 million float64 take 32 MiB, and captions across it.
BLOCK = 1 << 22
BLOCK_WIDTH = 4096

#: scores(first image, last image, first caption, last caption) -> (images, captions)
ScoreBlock = Callable[[int, int, int, int], np.ndarray]


@dataclass(frozen=True)
class PartnerRanks:
    """Ranks of the true partners, both ways; the first is 1.

    image_to_text: (N, R) the ranks of each image's captions among all captions, best first, padded with 0.
    text_to_image: (M, S) the ranks of each caption's images among all images, best first, padded with 0.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray


def _alone(counts: np.ndarray) -> np.ndarray:
    return counts


@dataclass(frozen=True)
class Share:
    """One worker's part of a gallery: every `count`-th block of images, from `number` on.

    total: the sum of an array over all workers, who call it together; every one of them then has all ranks.
    """

    number: int = 0
    count: int = 1
    total: Callable[[np.ndarray], np.ndarray] = _alone


#: The whole gallery.
WHOLE = Share()


@dataclass(frozen=True)
class Partners:
    """Which captions belong to which images. caption_image: (M,) each caption's image; identity: (N,) or None;
    caption_group: (M,) or None, the same number for captions that are equal.

    Without identities a caption belongs to its own image. With them, to every image of that image's identity. With
    groups of captions, to all images that any caption of its group belongs to: a relation between groups and images, so
    that two images that share one caption do not share their others.
    """

    caption_image: np.ndarray
    images: int
    identity: np.ndarray | None = None
    caption_group: np.ndarray | None = None

    @classmethod
    def of(cls, caption_image: Any, images: int, identity: Any = None, caption_group: Any = None) -> Partners:
        """Check and build. Raises ValueError where numbers are out of range, or an image has no caption."""
        owner = np.asarray(caption_image)
        if owner.ndim != 1 or (owner.size and not np.issubdtype(owner.dtype, np.integer)):
            raise ValueError(f"caption_image should be a row of whole numbers (M,), not {owner.dtype} {owner.shape}")
        if images < 1 or not owner.size:
            raise ValueError(f"nothing to rank: {images} images and {owner.size} captions")
        if owner.min() < 0 or owner.max() >= images:
            raise ValueError(f"caption_image names image {owner.min()} to {owner.max()}, but there are {images} images")
        group = None if identity is None else np.unique(np.asarray(identity), return_inverse=True)[1]
        if group is not None and group.shape != (images,):
            raise ValueError(f"identity should have one entry per image ({images},), not {group.shape}")
        equal = None if caption_group is None else np.unique(np.asarray(caption_group), return_inverse=True)[1]
        if equal is not None and equal.shape != owner.shape:
            raise ValueError(f"caption_group should have one entry per caption {owner.shape}, not {equal.shape}")
        found = cls(owner.astype(np.int64), images, group, equal)
        bare = np.flatnonzero(np.bincount(found.pairs()[0], minlength=images) == 0)
        if bare.size:
            raise ValueError(f"image {bare[0]} has no caption ({bare.size} such images): leave them out first")
        return found

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Every true pair as (image numbers, caption numbers), sorted by image, then by caption."""
        if self.identity is None and self.caption_group is None:
            order = np.argsort(self.caption_image, kind="stable")
            return self.caption_image[order], order
        identity = np.arange(self.images) if self.identity is None else self.identity
        own = identity[self.caption_image]
        if self.caption_group is None:
            captions, image_numbers = _members(own, identity)
        else:
            # From the groups of captions to the identities that have one of them, and on to those identities' images.
            groups, identities = np.unique(np.stack([self.caption_group, own]), axis=1)
            which, members = _members(identities, identity)
            captions, places = _members(self.caption_group, groups[which])
            image_numbers = members[places]
        order = np.lexsort((captions, image_numbers))
        return image_numbers[order], captions[order]

    def are_true(self, images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Whether each caption belongs to the image at the same place, in two arrays of numbers of one shape."""
        width = len(self.caption_image)
        pair_images, pair_captions = self.pairs()
        keys, asked = pair_images * width + pair_captions, images * width + captions
        return keys[np.searchsorted(keys, asked).clip(max=len(keys) - 1)] == asked


def _members(asked: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each number in `asked` (Q,) the places in `groups` that hold it: (place in asked, place in groups), a row
    each."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups, minlength=int(asked.max(initial=-1)) + 1)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    counts = sizes[asked]
    rows = np.repeat(np.arange(len(asked)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, order[starts[asked[rows]] + within]


def ranks_of_vectors(
    image_vectors: Any, caption_vectors: Any, partners: Partners, share: Share = WHOLE
) -> PartnerRanks:
    """Exact ranks by the dot product. image_vectors: (N, D); caption_vectors: (M, D). share: of the work, not of the
    gallery.

    Raises ValueError for shapes that do not fit, and for vectors that are not finite.
    """
    images, captions = _vectors(image_vectors, "image"), _vectors(caption_vectors, "caption")
    if images.shape[1] != captions.shape[1]:
        raise ValueError(f"image vectors are {images.shape[1]} wide, caption vectors {captions.shape[1]}")
    if len(images) != partners.images or len(captions) != len(partners.caption_image):
        told = f"{len(images)} x {len(captions)} vectors, {partners.images} x {len(partners.caption_image)} partners"
        raise ValueError(f"vectors and partners differ in number: {told}")

    def block(first: int, last: int, start: int, stop: int) -> np.ndarray:
        return images[first:last].astype(np.float64) @ captions[start:stop].astype(np.float64).T

    pair_images, pair_captions = partners.pairs()
    true = np.empty(len(pair_images))
    for start in range(0, len(true), 1 << 14):
        part = slice(start, start + (1 << 14))
        left, right = images[pair_images[part]], captions[pair_captions[part]]
        true[part] = np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64))
    size = np.abs(images).max(initial=0.0) * np.abs(captions).max(initial=0.0) * images.shape[1]
    return _count(block, true, partners, TIE * max(1.0, float(size)), share)


def ranks_of_scores(scores: Any, partners: Partners, tie: float = TIE_FLOAT32) -> PartnerRanks:
    """Exact ranks by a table of scores (N, M); those within `tie` of their largest size count as equal."""
    table = np.asarray(scores)
    if table.shape != (partners.images, len(partners.caption_image)):
        raise ValueError(f"scores should be {(partners.images, len(partners.caption_image))}, not {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("some scores are not finite numbers")
    pair_images, pair_captions = partners.pairs()

    def block(first: int, last: int, start: int, stop: int) -> np.ndarray:
        return table[first:last, start:stop].astype(np.float64)

    true = table[pair_images, pair_captions].astype(np.float64)
    return _count(block, true, partners, tie * float(np.abs(table).max()))


def _vectors(vectors: Any, kind: str) -> np.ndarray:
    found = np.asarray(vectors)
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.floating):
        raise ValueError(f"{kind} vectors should be floating-point (number, width), not {found.dtype} {found.shape}")
    for start in range(0, len(found), 1 << 14):
        if not np.isfinite(found[start : start + (1 << 14)]).all():
            raise ValueError(f"some {kind} vectors are not finite numbers")
    return found


def _count(block: ScoreBlock, true: np.ndarray, partners: Partners, tie: float, share: Share = WHOLE) -> PartnerRanks:
    """Count, for every true pair, the strangers that score at least as high: one pass over the blocks for both ways."""
    images, captions = partners.images, len(partners.caption_image)
    pair_images, pair_captions = partners.pairs()
    by_image = _Side(pair_images, true, images)
    by_caption = _Side(pair_captions, true, captions)
    width = min(captions, BLOCK_WIDTH)
    height = max(1, min(-(-images // share.count), BLOCK // width))
    firsts = np.searchsorted(pair_images, np.arange(0, images + height, height))
    for number, first in enumerate(range(0, images, height)):
        if number % share.count != share.number:
            continue
        last = min(first + height, images)
        own_images = pair_images[firsts[number] : firsts[number + 1]]
        own_captions = pair_captions[firsts[number] : firsts[number + 1]]
        for start in range(0, captions, width):
            stop = min(start + width, captions)
            scores = block(first, last, start, stop)
            inside = (own_captions >= start) & (own_captions < stop)
            # Partners do not count as strangers, in either direction.
            scores[own_images[inside] - first, own_captions[inside] - start] = -np.inf
            by_image.count(scores, first, last, tie)
            by_caption.count(scores.T, start, stop, tie)
    for side in (by_image, by_caption):
        side.strangers = share.total(side.strangers)
    return PartnerRanks(by_image.ranks(), by_caption.ranks())


class _Side:
    """One direction: for each query its partners' scores, best first (Q, R), and the strangers counted so far."""

    def __init__(self, query: np.ndarray, true: np.ndarray, queries: int) -> None:
        order = np.lexsort((-true, query))
        counts = np.bincount(query, minlength=queries)
        place = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.there: np.ndarray = np.arange(counts.max(initial=1)) < counts[:, None]
        self.scores: np.ndarray = np.full(self.there.shape, np.inf)
        self.scores[query[order], place] = true[order]
        self.strangers: np.ndarray = np.zeros(self.there.shape, dtype=np.int64)

    def count(self, scores: np.ndarray, first: int, last: int, tie: float) -> None:
        for place in range(self.scores.shape[1]):
            bar = self.scores[first:last, place, None] - tie
            self.strangers[first:last, place] += (scores >= bar).sum(axis=1)

    def ranks(self) -> np.ndarray:
        """Strangers before it, partners before it, and itself."""
        return np.where(self.there, self.strangers + np.arange(1, self.there.shape[1] + 1), 0)
