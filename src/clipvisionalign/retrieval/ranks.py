"""Exact ranks of the true partners, streamed: memory grows with the gallery, not with gallery x queries.

The rank of a partner is 1 + the number of others that score at least as high: a tie counts against the model, so that
one that gives every pair the same score finds nothing. Another partner of the same query takes a place too, as it does
in any list of results: of two of them the one with fewer strangers before it stands first. What a tie is, `ties` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.ties import (
    Alike,
    Numbers,
    lengths_of,
    lowest_tying,
    numbers_of,
    product_rounding,
    vectors_of,
)

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
    distractors: images in the gallery beside those N, of which no caption is asked for.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray
    distractors: int = 0


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
    def of(
        cls, caption_image: Any, images: int, identity: Any = None, caption_group: Any = None, distractors: bool = False
    ) -> Partners:
        """Check and build. Raises ValueError where numbers are out of range, or an image has no caption, which only
        `distractors` may."""
        owner = np.asarray(caption_image)
        if owner.ndim != 1 or (owner.size and not np.issubdtype(owner.dtype, np.integer)):
            raise ValueError(f"caption_image should be a row of whole numbers (M,), not {owner.dtype} {owner.shape}")
        if images < 1 or not owner.size:
            raise ValueError(f"nothing to rank: {images} images and {owner.size} captions")
        if owner.min() < 0 or owner.max() >= images:
            raise ValueError(f"caption_image names image {owner.min()} to {owner.max()}, but there are {images} images")
        group = None if identity is None else _numbered(identity)
        if group is not None and group.shape != (images,):
            raise ValueError(f"identity should have one entry per image ({images},), not {group.shape}")
        equal = None if caption_group is None else np.unique(np.asarray(caption_group), return_inverse=True)[1]
        if equal is not None and equal.shape != owner.shape:
            raise ValueError(f"caption_group should have one entry per caption {owner.shape}, not {equal.shape}")
        found = cls(owner.astype(np.int64), images, group, equal)
        bare = np.flatnonzero(np.bincount(found.pairs()[0], minlength=images) == 0)
        if bare.size and not distractors:
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


def _numbered(identity: Any) -> np.ndarray:
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

    Vectors are arrays, tensors of any floating-point format (bfloat16 too) on any device, or lists of them.
    Raises ValueError for shapes that do not fit, and for vectors that are not finite.

    >>> vectors = np.eye(3, dtype=np.float16)
    >>> ranks_of_vectors(vectors, vectors, Partners.of([0, 1, 2], 3)).text_to_image.tolist()
    [[1], [1], [1]]
    """
    by_image, by_caption = rank_vectors(image_vectors, caption_vectors, partners, share)
    return PartnerRanks(by_image.ranks, by_caption.ranks)


def ranks_of_scores(scores: Any, partners: Partners) -> PartnerRanks:
    """Exact ranks by a table of scores (N, M), in the format in which it was made.

    -inf, or what a masked array hides, is a pair that was not scored: a stranger that stands before nobody.
    Raises ValueError for another shape, for NaN and +inf, and where a true pair was not scored.
    """
    table = numbers_of(scores)
    values = table.values
    if values.shape != (partners.images, len(partners.caption_image)):
        raise ValueError(f"scores should be {(partners.images, len(partners.caption_image))}, not {values.shape}")
    pair_images, pair_captions = partners.pairs()
    true = values[pair_images, pair_captions].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(true))
    if bad.size:
        told = f"image {pair_images[bad[0]]} with its caption {pair_captions[bad[0]]}: {true[bad[0]]}"
        raise ValueError(f"{bad.size} scores of true pairs are not finite numbers, such as that of {told}")
    step = max(1, BLOCK // values.shape[1])
    for start in range(0, len(values), step):
        if not (values[start : start + step] < np.inf).all():
            told = "-inf stands for a pair that was not scored, NaN and inf for nothing"
            raise ValueError(f"some scores are not finite numbers: {told}")

    def block(first: int, last: int, start: int, stop: int) -> np.ndarray:
        return values[first:last, start:stop].astype(np.float64)

    bar = lowest_tying(true, table.rounding)
    by_image = Side(pair_images, pair_captions, bar, bar, partners.images)
    by_caption = Side(pair_captions, pair_images, bar, bar, len(partners.caption_image))
    _count(block, by_image, by_caption, partners, WHOLE)
    return PartnerRanks(by_image.ranks, by_caption.ranks)


def rank_vectors(
    image_vectors: Any, caption_vectors: Any, partners: Partners, share: Share = WHOLE
) -> tuple[Side, Side]:
    """`ranks_of_vectors`, with the partners that the ranks are of: by image, by caption."""
    images, captions = vectors_of(image_vectors, "image"), vectors_of(caption_vectors, "caption")
    width = images.values.shape[1]
    if width != captions.values.shape[1]:
        raise ValueError(f"image vectors are {width} wide, caption vectors {captions.values.shape[1]}")
    numbers = len(images.values), len(captions.values)
    if numbers != (partners.images, len(partners.caption_image)):
        told = f"{numbers[0]} x {numbers[1]} vectors, {partners.images} x {len(partners.caption_image)} partners"
        raise ValueError(f"vectors and partners differ in number: {told}")
    image_lengths, caption_lengths = lengths_of(images.values), lengths_of(captions.values)
    share_of = product_rounding(width)
    # One column more adds to each score what rounding can do to it: (D + 1,) instead of another pass over a block.
    left, right = (images.values, share_of * image_lengths), (captions.values, caption_lengths)

    def block(first: int, last: int, start: int, stop: int) -> np.ndarray:
        return _widened(*left, slice(first, last)) @ _widened(*right, slice(start, stop)).T

    pair_images, pair_captions = partners.pairs()
    true = true_scores(images, captions, pair_images, pair_captions)
    sizes = image_lengths[pair_images] * caption_lengths[pair_captions]
    bar = true - share_of * sizes

    def side(query: np.ndarray, partner: np.ndarray, gallery: Numbers, lengths: np.ndarray, queries: int) -> Side:
        # Vectors that are alike score alike within this: |s_a - s_b| <= |x| |y_a - y_b| and |y_b| <= |y_a| / (1 - r).
        reach = gallery.rounding / (1.0 - gallery.rounding)
        if reach <= share_of:
            return Side(query, partner, bar, bar, queries)
        return Side(query, partner, bar, bar - reach * sizes, queries, Alike(gallery, lengths))

    by_image = side(pair_images, pair_captions, captions, caption_lengths, partners.images)
    by_caption = side(pair_captions, pair_images, images, image_lengths, len(partners.caption_image))
    _count(block, by_image, by_caption, partners, share)
    return by_image, by_caption


def true_scores(images: Numbers, captions: Numbers, image_index: np.ndarray, caption_index: np.ndarray) -> np.ndarray:
    """The products of some pairs (Q,), in float64."""
    found = np.empty(len(image_index))
    for start in range(0, len(found), 1 << 14):
        part = slice(start, start + (1 << 14))
        left, right = images.values[image_index[part]], captions.values[caption_index[part]]
        found[part] = np.einsum("pd,pd->p", left.astype(np.float64), right.astype(np.float64))
    return found


def _widened(vectors: np.ndarray, column: np.ndarray, rows: slice) -> np.ndarray:
    """Some vectors in float64 with one column more."""
    found = np.empty((len(vectors[rows]), vectors.shape[1] + 1))
    found[:, :-1] = vectors[rows]
    found[:, -1] = column[rows]
    return found


def _count(block: ScoreBlock, by_image: Side, by_caption: Side, partners: Partners, share: Share) -> None:
    """Count, for every true pair, the strangers that score at least as high: one pass over the blocks for both ways."""
    images, captions = partners.images, len(partners.caption_image)
    pair_images, pair_captions = partners.pairs()
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
            by_image.count(scores, slice(first, last), start, across=True)
            by_caption.count(scores, slice(start, stop), first, across=False)
    for side in (by_image, by_caption):
        side.strangers = share.total(side.strangers)


class Side:
    """One direction: each query's partners (Q, R), and the strangers that were counted before each so far.

    bar: what a stranger has to score to stand before a partner; wide: from which on it does if the two are alike.
    """

    def __init__(
        self,
        query: np.ndarray,
        partner: np.ndarray,
        bar: np.ndarray,
        wide: np.ndarray,
        queries: int,
        alike: Alike | None = None,
    ) -> None:
        order = np.argsort(query, kind="stable")
        counts = np.bincount(query, minlength=queries)
        place = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.alike = alike
        self.there: np.ndarray = np.arange(counts.max(initial=1)) < counts[:, None]
        self.partner: np.ndarray = np.full(self.there.shape, -1)
        self.bar: np.ndarray = np.full(self.there.shape, np.inf)
        self.wide: np.ndarray = np.full(self.there.shape, np.inf)
        for of, given in ((self.partner, partner), (self.bar, bar), (self.wide, wide)):
            of[query[order], place] = given[order]
        self.lowest: np.ndarray = self.wide.min(axis=1)
        self.strangers: np.ndarray = np.zeros(self.there.shape, dtype=np.int64)

    def count(self, scores: np.ndarray, queries: slice, start: int, across: bool) -> None:
        """Count within a block. queries: those of its rows (across) or columns; start: the first of its candidates."""
        lowest = self.lowest[queries]
        above = scores >= (lowest[:, None] if across else lowest[None, :])
        number = int(np.count_nonzero(above))
        if number > above.size // 4:
            self._count_all(scores if across else scores.T, queries, start)
            return
        rows, columns = np.divmod(np.flatnonzero(above), scores.shape[1])
        value = scores[rows, columns]
        query, candidate = (rows, columns) if across else (columns, rows)
        for place in range(self.there.shape[1]):
            before = value >= self.bar[queries, place][query]
            if self.alike is not None:
                near = np.flatnonzero((value >= self.wide[queries, place][query]) & ~before)
                before[near] = self.alike(self.partner[queries, place][query[near]], candidate[near] + start)
            self.strangers[queries, place] += np.bincount(query[before], minlength=len(lowest))

    def _count_all(self, scores: np.ndarray, queries: slice, start: int) -> None:
        """`count` where many candidates score above a query's lowest partner."""
        for place in range(self.there.shape[1]):
            bar, wide = self.bar[queries, place, None], self.wide[queries, place, None]
            before = (scores >= bar).sum(axis=1)
            if self.alike is not None:
                rows = np.flatnonzero((scores >= wide).sum(axis=1) > before)
                row, candidate = np.nonzero((scores[rows] >= wide[rows]) & (scores[rows] < bar[rows]))
                same = self.alike(self.partner[queries, place][rows[row]], candidate + start)
                before += np.bincount(rows[row[same]], minlength=len(bar))
            self.strangers[queries, place] += before

    @property
    def order(self) -> np.ndarray:
        """(Q, R) the places of a query's partners, that with the fewest strangers before it first, then by score."""
        strangers = np.where(self.there, self.strangers, np.iinfo(np.int64).max)
        return np.lexsort((-self.bar, strangers), axis=1)

    @property
    def ranks(self) -> np.ndarray:
        """(Q, R) strangers before it, partners before it, and itself; padded with 0."""
        strangers = np.take_along_axis(self.strangers, self.order, axis=1)
        return np.where(self.there, strangers + np.arange(1, self.there.shape[1] + 1), 0)

    @property
    def partners(self) -> np.ndarray:
        """(Q, R) which partner each rank is of; padded with -1."""
        return np.take_along_axis(self.partner, self.order, axis=1)
