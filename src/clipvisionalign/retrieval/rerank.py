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

from clipvisionalign.retrieval.ranks import BLOCK, TIE, TIE_FLOAT32, PartnerRanks, Partners, ranks_of_vectors

#: score_pairs(image numbers (Q,), caption numbers (Q,)) -> (Q,)
ScorePairs = Callable[[np.ndarray, np.ndarray], np.ndarray]


def first_candidates(
    queries: np.ndarray, gallery: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], count: int
) -> np.ndarray:
    """The `count` best of the gallery for each query (Q, count), in no order; on a tie a partner stays behind.

    pairs: every true pair as (query numbers, gallery numbers), in any order.
    """
    order = np.argsort(pairs[0], kind="stable")
    own, true = pairs[0][order], pairs[1][order]
    count = min(count, len(gallery))
    best = np.empty((len(queries), count), dtype=np.int64)
    wide = gallery.astype(np.float64).T
    step = max(1, BLOCK // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        stop = min(start + step, len(queries))
        scores = queries[start:stop].astype(np.float64) @ wide
        some = slice(*np.searchsorted(own, [start, stop]))
        scores[own[some] - start, true[some]] -= TIE
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
        dual = ranks_of_vectors(image_vectors, caption_vectors, partners)
        images, captions = np.asarray(image_vectors), np.asarray(caption_vectors)
        true_images, true_captions = partners.pairs()
        forth = first_candidates(images, captions, (true_images, true_captions), count)
        back = first_candidates(captions, images, (true_captions, true_images), count)
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
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != self.pairs.shape or not np.isfinite(scores).all():
            raise ValueError(f"score_pairs should give {len(self.pairs)} finite numbers, not {scores.shape}")
        scored, true = scores[self.place], self.true[self.place]
        tie, size = TIE_FLOAT32 * float(np.abs(scores).max(initial=0.0)), self.forth.size
        return PartnerRanks(
            _new_ranks(self.dual.image_to_text, true[:size].reshape(self.forth.shape), scored[:size], tie),
            _new_ranks(self.dual.text_to_image, true[size:].reshape(self.back.shape), scored[size:], tie),
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
    width = len(caption_vectors)
    found: list[Depth] = []
    asked = 0

    def remembered(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        nonlocal known, scores, seconds, asked
        keys = images * width + captions
        new = np.setdiff1d(keys, known, assume_unique=True)
        if len(new):
            start = time.perf_counter()
            fresh = np.asarray(score_pairs(new // width, new % width), dtype=np.float64)
            seconds += time.perf_counter() - start
            order = np.argsort(np.concatenate([known, new]), kind="stable")
            known, scores = np.concatenate([known, new])[order], np.concatenate([scores, fresh])[order]
        asked = len(keys)
        return scores[np.searchsorted(known, keys)]

    for depth in sorted(set(depths)):
        before, after = reranked(image_vectors, caption_vectors, partners, remembered, depth)
        found.append(Depth(depth, after, asked, seconds))
    return before, found


def _new_ranks(old: np.ndarray, is_partner: np.ndarray, scored: np.ndarray, tie: float) -> np.ndarray:
    """Ranks (Q, R) after re-ranking. old: (Q, R); is_partner: (Q, k) which candidates are true; scored: (Q * k,)."""
    scores = scored.reshape(is_partner.shape) - tie * is_partner
    order = np.argsort(-scores, axis=1, kind="stable")
    partner_in_order = np.take_along_axis(is_partner, order, axis=1)
    new = np.where(old > is_partner.shape[1], old, 0)
    for query in np.flatnonzero(is_partner.any(axis=1)):
        found = np.flatnonzero(partner_in_order[query]) + 1
        new[query, : len(found)] = found
    return new
