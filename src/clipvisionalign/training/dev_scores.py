"""Scores of one model over the dev gallery, computed once, from which pair weights are selected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages, text_id
from clipvisionalign.retrieval.equal_captions import count_equal_captions
from clipvisionalign.retrieval.evaluate import rerank_depths
from clipvisionalign.retrieval.metrics import metrics_of_ranks
from clipvisionalign.retrieval.ranks import PositiveRanks, ranks_of_scores, ranks_of_vectors
from clipvisionalign.retrieval.rerank import Candidates, RerankResult, rerank_at_depths
from clipvisionalign.training.halves import GallerySubset, positives_of
from clipvisionalign.training.pair_weights import PAIR_WEIGHTS, PairWeights, set_pair_weights
from clipvisionalign.training.validation import DistributedAligner


class RankingResult(NamedTuple):
    """Ranks over the whole gallery.

    Attributes:
        ranks: The model's own.
        dual: Those of the dual encoder of a model that re-ranks; None for another model.
        depths: Those by depth, of a model that re-ranks.
    """

    ranks: PositiveRanks
    dual: PositiveRanks | None
    depths: list[RerankResult]


class DevScores:
    """What one model makes of a gallery: every image, caption and pair is computed once, whatever weights are tried.

    Args:
        model: The model; every process makes the same calls.
        data: The gallery.
        candidates: How many are re-ranked; 0 for a model without a fusion.
    """

    def __init__(self, model: DistributedAligner, data: CaptionedImages, candidates: int) -> None:
        self.model, self.late, self.fusion = model, model.aligner.late, model.aligner.fusion
        self.positives = positives_of(data)
        self.equal_captions = count_equal_captions([text_id(caption) for caption in data.captions], self.positives)
        self.candidates = candidates
        #: Pairs that were scored, sorted, and their parts.
        self._scored = np.empty(0, dtype=np.int64), np.empty((0, 3), dtype=np.float32)
        self._timed_results: list[RerankResult] = []
        if self.late is None:
            self.image_vectors = model.encode_images(data.images).numpy()
            self.caption_vectors = model.encode_captions(data.captions).numpy()
            return
        self.scorer = model.pair_scorer(data.images, data.captions)
        self.image_vectors, self.caption_vectors = (
            self.scorer.image_vectors.numpy(),
            self.scorer.caption_vectors.numpy(),
        )
        if self.fusion is None:
            self.late.weight.fill_(1.0)
            self._dual = (self.image_vectors @ self.caption_vectors.T) * model.aligner.scale().item()
            self._late = self.scorer.score_matrix().numpy() - self._dual
        else:
            # Timed with every pair new; the weights are tried on these scores.
            _, self._timed_results = self._rerank(PairWeights())

    def full_gallery(self) -> GallerySubset:
        """The whole gallery.

        Returns:
            It, as a part that has all images.
        """
        return GallerySubset.of(np.ones(len(self.image_vectors), dtype=bool), self.positives)

    def choose(self, part: GallerySubset) -> PairWeights:
        """The weights with the best rsum in a part as a gallery of its own.

        The towers have seen the training captions many times and are surer there than on new images, so that the
        weights cannot be learned with them. A re-ranking looks at the same share of a part as of the whole.

        Args:
            part: The part.

        Returns:
            The weights; on a tie the smaller, as what shows no gain is not trusted. A model without a late score has
            nothing to choose, and gets the default.
        """
        if self.late is None:
            return PairWeights()
        ranks = self._part_ranking(part)
        fusion_weights = (0.0,) if self.fusion is None else PAIR_WEIGHTS
        grid = [PairWeights(late, fusion) for late in PAIR_WEIGHTS for fusion in fusion_weights]

        def rsum(weights: PairWeights) -> float:
            return metrics_of_ranks(ranks(weights), part.positives.caption_image, resamples=0).rsum.value

        return max(grid, key=lambda weights: (rsum(weights), -sum(weights)))

    def rsum_of_part(self, part: GallerySubset, weights: PairWeights) -> float:
        """The rsum of a part as a gallery of its own, by which `choose` chooses.

        Args:
            part: The part.
            weights: The weights of a pair's parts.

        Returns:
            The rsum, from 0 to 600.
        """
        ranks = self._part_ranking(part)(weights)
        return metrics_of_ranks(ranks, part.positives.caption_image, resamples=0).rsum.value

    def _part_ranking(self, part: GallerySubset) -> Callable[[PairWeights], PositiveRanks]:
        """What ranks a part as a gallery of its own by given weights."""
        image_vectors, caption_vectors = self.image_vectors[part.images], self.caption_vectors[part.captions]
        if self.late is None:
            ranks = ranks_of_vectors(image_vectors, caption_vectors, part.positives)
            return lambda weights: ranks
        if self.fusion is None:
            block = np.ix_(part.images, part.captions)
            dual, late = self._dual[block], self._late[block]
            return lambda weights: ranks_of_scores(dual + np.float32(weights.late) * late, part.positives)
        count = max(1, round(self.candidates * len(part.images) / len(self.image_vectors)))
        candidates = Candidates.of(image_vectors, caption_vectors, part.positives, count)
        images, captions = candidates.index
        components = self._pair_components(part.images[images], part.captions[captions])
        return lambda weights: candidates.ranks(components @ np.array([1.0, *weights], dtype=np.float32))

    def rank(self, weights: PairWeights) -> RankingResult:
        """Rank the whole gallery, as `retrieval.evaluate` does.

        Args:
            weights: The weights of a pair's parts, which the model has from then on.

        Returns:
            The ranks.
        """
        if self.late is None:
            return RankingResult(
                ranks_of_vectors(self.image_vectors, self.caption_vectors, self.positives, self.model.worker_shard),
                None,
                [],
            )
        set_pair_weights(self.model.aligner, weights)
        if self.fusion is None:
            return RankingResult(ranks_of_scores(self.scorer.score_matrix(), self.positives), None, [])
        dual_ranks, results = self._rerank(weights)
        return RankingResult(results[-1].ranks, dual_ranks, results)

    def with_timings(self, depths: Sequence[RerankResult]) -> list[RerankResult]:
        """Depths with the pairs and seconds that they took with no cached pair.

        Args:
            depths: Those of a ranking of this gallery.

        Returns:
            The same ranks, with these figures.

        Raises:
            ValueError: There are not as many as the model has depths.
        """
        return [
            RerankResult(d.candidates, d.ranks, t.scored_pairs, t.seconds)
            for d, t in zip(depths, self._timed_results, strict=True)
        ]

    def _rerank(self, weights: PairWeights) -> tuple[PositiveRanks, list[RerankResult]]:
        counts = np.array([1.0, *weights], dtype=np.float32)
        depths = rerank_depths(self.candidates)
        return rerank_at_depths(
            self.image_vectors,
            self.caption_vectors,
            self.positives,
            lambda i, c: self._pair_components(i, c) @ counts,
            depths,
        )

    def _pair_components(self, images: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """The parts of pairs' scores (Q, 3), each pair computed once."""
        keys = images * len(self.caption_vectors) + captions
        scored_keys, components = self._scored
        new = np.setdiff1d(keys, scored_keys)
        if len(new):
            fresh = self.scorer.components(new // len(self.caption_vectors), new % len(self.caption_vectors))
            order = np.argsort(np.concatenate([scored_keys, new]), kind="stable")
            scored_keys, components = (
                np.concatenate([scored_keys, new])[order],
                np.concatenate([components, fresh])[order],
            )
            self._scored = scored_keys, components
        return components[np.searchsorted(scored_keys, keys)]
