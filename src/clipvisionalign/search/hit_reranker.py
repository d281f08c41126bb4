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
from clipvisionalign.search.late import LateReader, late_query
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.rerank_margin import MARGIN_DEPTH, RerankMargin, unsure_hits
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.time_limit import ScoreHits, TimedReranker, TimeSpent

if TYPE_CHECKING:
    from clipvisionalign.models.pair_scorer import EncodedCaption
    from clipvisionalign.search.patches import PatchReader

#: What is told of a query with a time, where the index does not have the model's margin.
UNCALIBRATED_NOTE = (
    "which hits are worth re-ranking is not calibrated: as many are as the time allows; 'clipvisionalign calibrate' "
    "with captioned images measures it"
)


def _in_order(scores_of: Callable[[Sequence[int]], np.ndarray], hits: Sequence[Hit]) -> list[Hit]:
    """Hits with their pair scores, best first."""
    scores = scores_of([hit.id for hit in hits])
    order = np.argsort(-scores, kind="stable")
    return [replace(hits[number], pair_score=round(float(scores[number]), 5)) for number in order]


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

    def scorer(self, query: SearchQuery, captions: list[EncodedCaption], hits: Sequence[Hit]) -> ScoreHits:
        """Read what is stored of hits, to score any of them.

        Args:
            query: The query.
            captions: Its terms, encoded.
            hits: The hits.

        Returns:
            What gives some of the hits with their pair scores, best first, those that are gone last.
        """
        from clipvisionalign.search.rerank import STORED_COLUMNS, read_stored, rerank_hits

        weights = [term.weight for term in query.terms]
        aligner, late = self.encoder.aligner, self.read_late()
        if late is not None and aligner.late is not None and aligner.fusion is None:
            scores_of = late.scorer([hit.id for hit in hits], late_query(aligner, captions, weights))
            if scores_of is not None:
                return partial(_in_order, scores_of)
        patches = self.read_patches()
        rows = self.read_rows(
            sorted({hit.id for hit in hits}), ("id", "raw", *(STORED_COLUMNS if patches is not None else ()))
        )
        stored = None if patches is None else read_stored(patches, rows)
        raw_paths = {row["id"]: row["raw"] for row in rows}
        return lambda some: rerank_hits(aligner, self.storage, list(some), raw_paths, captions, weights, stored)

    def rerank(self, query: SearchQuery, captions: list[EncodedCaption], hits: Sequence[Hit]) -> list[Hit]:
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
        self, query: SearchQuery, hits: Sequence[Hit], margin: RerankMargin | None, start: float
    ) -> tuple[list[Hit], TimeSpent]:
        """Hits, those of unsure order ordered by pair scores as far as the time of the query lasts.

        The model is loaded when it is first needed; that is not counted.

        Args:
            query: The query; its words are not encoded for pair scores yet.
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
        if unsure:
            before = time.perf_counter()
            _ = self.encoder.aligner
            start += time.perf_counter() - before

        def begin() -> ScoreHits:
            captions = self.encoder.encode_words_for_pairs([str(term.content) for term in query.terms])
            return self.scorer(query, captions, hits[:unsure])

        ordered, reranked = self._timed.rerank(hits, unsure, start + query.within, begin)
        return ordered, TimeSpent(time.perf_counter() - start, query.within, unsure, reranked)
