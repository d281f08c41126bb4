"""Re-ranking: the first candidates of a dual encoder, put into a new order by a score of pairs.

Every candidate is scored alike, the true partner included if it is among them, and never if it is not. Partners beyond
the first k keep the rank that the dual encoder gave them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.ranks import BLOCK, PartnerRanks, Partners, Side, rank_vectors
from clipvisionalign.retrieval.ties import Numbers, lowest_tying, numbers_of, vectors_of

#: score_pairs(image numbers (Q,), caption numbers (Q,)) -> (Q,)
ScorePairs = Callable[[np.ndarray, np.ndarray], Any]


def first_candidates(queries: np.ndarray, gallery: np.ndarray, ranked: Side, count: int) -> np.ndarray:
    """The `count` best of the gallery for each query (Q, count), in no order: partners of those ranks, and the
    strangers that score highest. ranked: the same queries' partners, ranked in this gallery."""
    count = min(count, len(gallery))
    best = np.empty((len(queries), count), dtype=np.int64)
    wide = gallery.astype(np.float64).T
    partners, ranks = ranked.partners, ranked.ranks
    step = max(1, BLOCK // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        stop = min(start + step, len(queries))
        scores = queries[start:stop].astype(np.float64) @ wide
        rows, places = np.nonzero(ranked.there[start:stop])
        first = ranks[start:stop][rows, places] <= count
        # Whether a partner is among the first its rank says, which minds ties.
        scores[rows, partners[start:stop][rows, places]] = np.where(first, np.inf, -np.inf)
        best[start:stop] = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return best


@dataclass(frozen=True)
class Candidates:
    """What re-ranking looks at, known before any pair is scored: found once, it serves any number of scores.

    dual: the dual encoder's ranks. forth: (N, k) captions of each image, back: (M, k) images of each caption.
    pairs: the pairs to score, (Q,) image number x M + caption number, each once though it be a candidate both ways.
    true: (Q,) which of them are true.
    """

    dual: PartnerRanks
    true: np.ndarray
    forth: np.ndarray
    back: np.ndarray
    pairs: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, image_vectors: Any, caption_vectors: Any, partners: Partners, count: int) -> Candidates:
        """The first `count` both ways. Raises ValueError for fewer than one."""
        if count < 1:
            raise ValueError(f"at least 1 candidate can be re-ranked, not {count}")
        image_numbers, caption_numbers = vectors_of(image_vectors, "image"), vectors_of(caption_vectors, "caption")
        by_image, by_caption = rank_vectors(image_numbers, caption_numbers, partners)
        dual = PartnerRanks(by_image.ranks, by_caption.ranks)
        images, captions = image_numbers.values, caption_numbers.values
        forth = first_candidates(images, captions, by_image, count)
        back = first_candidates(captions, images, by_caption, count)
        # A pair that is a candidate both ways is scored once.
        keys = np.concatenate(
            [
                (np.arange(len(images))[:, None] * len(captions) + forth).ravel(),
                (back * len(captions) + np.arange(len(captions))[:, None]).ravel(),
            ]
        )
        pairs, place = np.unique(keys, return_inverse=True)
        true = partners.are_true(pairs // len(captions), pairs % len(captions))
        return cls(dual, true, forth, back, pairs, place)

    @property
    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """Image numbers and caption numbers of the pairs (Q,), (Q,)."""
        return self.pairs // len(self.back), self.pairs % len(self.back)

    def ranks(self, scores: Any) -> PartnerRanks:
        """The ranks by the pairs' scores (Q,). Raises ValueError for scores of another shape or not finite."""
        given = numbers_of(scores)
        scores = given.values.astype(np.float64)
        if scores.shape != self.pairs.shape or not np.isfinite(scores).all():
            raise ValueError(f"score_pairs should give {len(self.pairs)} finite numbers, not {scores.shape}")
        tied, true, size = lowest_tying(scores, given.rounding), self.true[self.place], self.forth.size

        def new(old: np.ndarray, candidates: np.ndarray, part: slice) -> np.ndarray:
            some = self.place[part]
            return _new_ranks(
                old, true[part].reshape(candidates.shape), scores[some].reshape(candidates.shape), tied[some]
            )

        return PartnerRanks(
            new(self.dual.image_to_text, self.forth, slice(None, size)),
            new(self.dual.text_to_image, self.back, slice(size, None)),
        )


def reranked(
    image_vectors: Any, caption_vectors: Any, partners: Partners, score_pairs: ScorePairs, candidates: int
) -> tuple[PartnerRanks, PartnerRanks]:
    """Ranks of the dual encoder, and after re-ranking its first `candidates` both ways.

    image_vectors: (N, D); caption_vectors: (M, D). Raises ValueError for fewer than one candidate.
    """
    found = Candidates.of(image_vectors, caption_vectors, partners, candidates)
    return found.dual, found.ranks(score_pairs(*found.index))


@dataclass(frozen=True)
class Depth:
    """Re-ranking at one depth: ranks, how many pairs had to be scored, and the seconds that took."""

    candidates: int
    ranks: PartnerRanks
    pairs: int
    seconds: float


def reranked_at(
    image_vectors: Any, caption_vectors: Any, partners: Partners, score_pairs: ScorePairs, depths: Sequence[int]
) -> tuple[PartnerRanks, list[Depth]]:
    """`reranked` at several depths. A deeper one scores only the pairs that no shallower one had; its seconds are those
    of all its pairs. Raises ValueError for a depth below one."""
    known = np.empty(0, dtype=np.int64)
    scores = np.empty(0)
    seconds = 0.0
    width = len(partners.caption_image)
    found: list[Depth] = []
    asked = 0
    coarsest = Numbers(scores, "float64", 0.0)
    image_vectors, caption_vectors = vectors_of(image_vectors, "image"), vectors_of(caption_vectors, "caption")

    def remembered(images: np.ndarray, captions: np.ndarray) -> Numbers:
        nonlocal known, scores, seconds, asked, coarsest
        keys = images * width + captions
        new = np.setdiff1d(keys, known, assume_unique=True)
        if len(new):
            start = time.perf_counter()
            given = numbers_of(score_pairs(new // width, new % width))
            seconds += time.perf_counter() - start
            fresh, coarsest = given.values.astype(np.float64), max(coarsest, given, key=lambda each: each.rounding)
            order = np.argsort(np.concatenate([known, new]), kind="stable")
            known, scores = np.concatenate([known, new])[order], np.concatenate([scores, fresh])[order]
        asked = len(keys)
        return Numbers(scores[np.searchsorted(known, keys)], coarsest.format, coarsest.rounding)

    for depth in sorted(set(depths)):
        before, after = reranked(image_vectors, caption_vectors, partners, remembered, depth)
        found.append(Depth(depth, after, asked, seconds))
    return before, found


def _new_ranks(old: np.ndarray, is_partner: np.ndarray, scores: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Ranks (Q, R) after re-ranking. old: (Q, R); is_partner, scores: (Q, k) of the candidates; tied: (Q * k,) the
    lowest score that ties with each."""
    # A partner stands where the lowest score that ties with its own would, and behind whatever is there.
    standing = np.where(is_partner, tied.reshape(scores.shape), scores)
    order = np.lexsort((is_partner, -standing), axis=1)
    partner_in_order = np.take_along_axis(is_partner, order, axis=1)
    new = np.where(old > is_partner.shape[1], old, 0)
    for query in np.flatnonzero(is_partner.any(axis=1)):
        found = np.flatnonzero(partner_in_order[query]) + 1
        new[query, : len(found)] = found
    return new
