"""Re-ranking the hits of a query with the model of an index: as many as are asked for, or as far as a time lasts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from clipvisionalign.search.encoder import QueryEncoder
from clipvisionalign.search.hits import Hit
from clipvisionalign.search.late import LateQuery, LateReader, late_query, score_patches
from clipvisionalign.search.patches import STORED_COLUMNS, StoredImages, read_stored
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.rerank_margin import MARGIN_DEPTH, RerankMargin, unsure_hits
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.time_limit import ScoreHits, TimedReranker, TimeSpent

if TYPE_CHECKING:
    from clipvisionalign.export.onnx_text import CaptionTokens
    from clipvisionalign.models.pair_scorer import EncodedCaption
    from clipvisionalign.search.patches import PatchReader

#: What is told of a query with a time, where the index does not have the model's margin.
UNCALIBRATED_NOTE = (
    "which hits are worth re-ranking is not calibrated: as many are as the time allows; 'clipvisionalign calibrate' "
    "with captioned images measures it"
)


def _in_order(
    scores_of: Callable[[Sequence[int]], np.ndarray], numbers: Sequence[int], hits: Sequence[Hit]
) -> list[Hit]:
    """Hits with their pair scores, best first, those that are not among some numbers last."""
    known = set(numbers)
    there = [hit for hit in hits if hit.id in known]
    scores = scores_of([hit.id for hit in there])
    order = np.argsort(-scores, kind="stable")
    scored = [replace(there[number], pair_score=round(float(scores[number]), 5)) for number in order]
    return scored + [hit for hit in hits if hit.id not in known]


def _score_stored(query: LateQuery, stored: StoredImages, numbers: Sequence[int]) -> np.ndarray:
    if not numbers:
        return np.empty(0, dtype=np.float32)
    vectors = np.stack([stored.vectors[number] for number in numbers])
    return score_patches(query, vectors, [stored.patches[number] for number in numbers])


class HitReranker:
    """Orders the first hits of queries by pair scores.

    Args:
        encoder: That of the index.
        storage: Where its images are.
        read_rows: Reads columns of images, by their numbers.
        read_patches: Gives what reads the patches that the index keeps; None where it keeps none.
        read_late: Gives the patches that are mapped into memory, which are read first; None where there are none.
    """

    def __init__(
        self, encoder: QueryEncoder, storage: Storage,
        read_rows: Callable[[Sequence[int], Sequence[str]], list[dict[str, Any]]],
        read_patches: Callable[[], PatchReader | None], read_late: Callable[[], LateReader | None] = lambda: None,
    ) -> None:  # fmt: skip
        self.encoder, self.storage = encoder, storage
        self.read_rows, self.read_patches, self.read_late = read_rows, read_patches, read_late
        self._timed = TimedReranker()

    def scorer(
        self, query: SearchQuery, captions: list[EncodedCaption] | list[CaptionTokens], hits: Sequence[Hit]
    ) -> ScoreHits:
        """Read what is stored of hits, to score any of them.

        Args:
            query: The query.
            captions: Its terms, encoded.
            hits: The hits.

        Returns:
            What gives some of the hits with their pair scores, best first, those that are gone last.
        """
        weights, numbers = [term.weight for term in query.terms], [hit.id for hit in hits]
        asked, late, patches = late_query(self.encoder, captions, weights), self.read_late(), self.read_patches()
        if late is not None and asked is not None and (scores_of := late.scorer(numbers, asked)) is not None:
            return partial(_in_order, scores_of, numbers)
        rows = self.read_rows(sorted(set(numbers)), ("id", "raw", *(STORED_COLUMNS if patches is not None else ())))
        stored = None if patches is None else read_stored(patches, rows)
        if asked is not None and stored is not None and stored.patches.keys() == {row["id"] for row in rows}:
            return partial(_in_order, partial(_score_stored, asked, stored), list(stored.patches))
        from clipvisionalign.search.rerank import rerank_hits

        # Some images are read from their files, by the model: so are the words.
        by_model: Any = (
            self.encoder.encode_words_for_pairs([str(term.content) for term in query.terms])
            if self.encoder.late_scales is not None else captions
        )  # fmt: skip
        raw_paths, aligner = {row["id"]: row["raw"] for row in rows}, self.encoder.aligner
        return lambda some: rerank_hits(aligner, self.storage, list(some), raw_paths, by_model, weights, stored)

    def rerank(
        self, query: SearchQuery, captions: list[EncodedCaption] | list[CaptionTokens], hits: Sequence[Hit]
    ) -> list[Hit]:
        """Hits, the first `query.rerank` of them ordered by pair scores.

        Args:
            query: The query.
            captions: Its terms, encoded.
            hits: N hits, best first.

        Returns:
            The N hits.

        Raises:
            ValueError: An image cannot be opened.
        """
        first, others = hits[: query.rerank], hits[query.rerank :]
        return [*self.scorer(query, captions, first)(first), *others]

    def rerank_within(
        self,
        query: SearchQuery,
        captions: list[EncodedCaption] | list[CaptionTokens],
        hits: Sequence[Hit],
        margin: RerankMargin | None,
        start: float,
    ) -> tuple[list[Hit], TimeSpent]:
        """Hits, those of unsure order ordered by pair scores as far as the time of the query lasts.

        The model is loaded when it is first needed; that is not counted.

        Args:
            query: The query.
            captions: Its terms, encoded; empty where they are to be when they are first needed.
            hits: N hits, best first.
            margin: Which are worth it; None where that is not calibrated: all are.
            start: When the query began, of `time.perf_counter`.

        Returns:
            The N hits, and what was done.

        Raises:
            ValueError: An image cannot be opened.
        """
        depth = query.rerank or (MARGIN_DEPTH if margin is None else margin.depth)
        cosines = [hit.score for hit in hits[:depth]]
        unsure = unsure_hits(cosines, math.inf if margin is None else margin.margin, depth)
        loaded_before = self.encoder.loading_seconds

        def loading() -> float:
            return self.encoder.loading_seconds - loaded_before

        def begin() -> ScoreHits:
            encoded = captions or self.encoder.encode_for_pairs([str(term.content) for term in query.terms])
            return self.scorer(query, encoded, hits[:unsure])

        ordered, reranked = self._timed.rerank(hits, unsure, start + query.within, begin, loading)
        return ordered, TimeSpent(time.perf_counter() - start - loading(), query.within, unsure, reranked)
