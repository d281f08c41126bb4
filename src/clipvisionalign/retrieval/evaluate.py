"""Measure a model over a whole gallery: anything that answers `encode_images` and `encode_captions`, or `score`.

A model that also answers `pair_scorer` is measured twice: as the dual encoder that it is, and with the dual encoder's
first candidates re-ranked. One whose `scores_all_pairs` is true is measured by `score`, though it may encode as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import text_number
from clipvisionalign.lists import check_lists
from clipvisionalign.retrieval.equal_captions import EqualCaptions, equal_captions
from clipvisionalign.retrieval.metrics import RESAMPLES, Figure, RetrievalMetrics, metrics_of_ranks, rsum_gain
from clipvisionalign.retrieval.protocols import PairModel, RetrievalModel, can_encode, can_rerank, can_score
from clipvisionalign.retrieval.ranks import WHOLE, PartnerRanks, Partners, Share, ranks_of_scores, ranks_of_vectors
from clipvisionalign.retrieval.rerank import Depth, reranked_at
from clipvisionalign.retrieval.ties import Numbers, numbers_of

#: The file of a run folder that holds the ranks of its dev gallery.
RANKS = "ranks.npz"

#: Scores in memory; a larger table of a model that only answers `score` goes to a temporary file.
IN_MEMORY = 1 << 26


@dataclass(frozen=True)
class Evaluation:
    """What was measured. metrics: the model's own figures; where it re-ranks also its dual encoder's, what re-ranking
    gains in rsum (paired), and the same at smaller depths with what they cost. equal: captions of different images that
    are equal word by word, and what they can cost."""

    metrics: RetrievalMetrics
    dual: RetrievalMetrics | None = None
    candidates: int = 0
    gain: Figure | None = None
    depths: tuple[dict[str, Any], ...] = ()
    equal: EqualCaptions | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures; for a model that re-ranks also the blocks "dual" and "reranked" of the same form."""
        found = self.metrics.to_dict()
        if self.equal is not None:
            found["equal_captions"] = self.equal.to_dict()
        if self.dual is not None:
            found |= {"candidates": self.candidates, "dual": self.dual.to_dict(), "reranked": self.metrics.to_dict()}
            found |= {"gain": self.gain.to_dict() if self.gain else None, "depths": list(self.depths)}
        return found

    def save_ranks(self, path: Path) -> None:
        """Keep the ranks, from which every figure can be made anew."""
        blocks = {"ranks": self.metrics.ranks} | ({"dual": self.dual.ranks} if self.dual is not None else {})
        ways = ("image_to_text", "text_to_image")
        np.savez_compressed(path, **{f"{name}_{way}": getattr(of, way) for name, of in blocks.items() for way in ways})


def load_ranks(path: Path) -> dict[str, PartnerRanks]:
    """What `save_ranks` kept: "ranks", and for a model that re-ranks also "dual". Raises OSError, ValueError."""
    with np.load(path, allow_pickle=False) as kept:
        names = {name.partition("_")[0] for name in kept.files}
        return {
            name: PartnerRanks(kept[f"{name}_image_to_text"], kept[f"{name}_text_to_image"]) for name in sorted(names)
        }


def evaluate(
    model: RetrievalModel,
    images: Sequence[Any],
    captions: Sequence[str],
    caption_image: Any,
    identity: Any = None,
    candidates: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
    share: Share = WHOLE,
    caption_group: Any = None,
) -> Evaluation:
    """Measure `model` on N images and M captions.

    images: whatever the model takes. caption_image: (M,) each caption's image. identity: (N,) or None. candidates: how
    many are re-ranked if the model answers `pair_scorer(images, captions)`; 0 measures the dual encoder alone.
    share: what of the ranking of vectors is done here, where several processes do it together. caption_group: (M,) or
    None, the same number for captions that are equal: each belongs to every image that has one of them.
    The model's vectors and scores are taken in the format in which it gives them, of which `retrieval.ties` makes what
    counts as equal. Raises TypeError for a model that answers neither way and for one image or one string where a list
    belongs, ValueError where what it gives does not fit.
    """
    check_lists(images, captions)
    partners = Partners.of(caption_image, len(images), identity, caption_group)
    if len(captions) != len(partners.caption_image):
        raise ValueError(f"{len(captions)} captions, but caption_image says of {len(partners.caption_image)} whose")
    owners = partners.caption_image
    equal = equal_captions([text_number(caption) for caption in captions], partners)
    if not can_encode(model) or (getattr(model, "scores_all_pairs", False) and not candidates):
        if not can_score(model):
            name = type(model).__name__
            raise TypeError(f"{name} answers neither encode_images and encode_captions, nor score: nothing to measure")
        ranks = ranks_of_scores(_score_table(model, images, captions), partners)
        return Evaluation(metrics_of_ranks(ranks, owners, resamples, seed, partners.identity), equal=equal)
    if not candidates:
        ranks = ranks_of_vectors(model.encode_images(images), model.encode_captions(captions), partners, share)
        return Evaluation(metrics_of_ranks(ranks, owners, resamples, seed, partners.identity), equal=equal)
    if not can_rerank(model):
        raise TypeError(f"{type(model).__name__} answers no pair_scorer: it re-ranks no candidates")
    pairs = model.pair_scorer(images, captions)
    image_vectors, caption_vectors = numbers_of(pairs.image_vectors), numbers_of(pairs.caption_vectors)
    before, found = reranked_at(image_vectors, caption_vectors, partners, pairs, depths_to(candidates))
    after = found[-1].ranks
    return Evaluation(
        metrics_of_ranks(after, owners, resamples, seed, partners.identity),
        metrics_of_ranks(before, owners, resamples, seed, partners.identity),
        candidates,
        rsum_gain(after, before, owners, resamples, seed, partners.identity),
        depth_rows(found, owners),
        equal,
    )


def depths_to(candidates: int) -> list[int]:
    """The depths of re-ranking that are measured beside the one asked for."""
    return sorted({max(1, candidates // share) for share in (1, 2, 4, 8)})


def depth_rows(found: Sequence[Depth], caption_image: np.ndarray) -> tuple[dict[str, Any], ...]:
    """What re-ranking gives and costs at each depth."""
    rows = []
    for depth in found:
        metrics = metrics_of_ranks(depth.ranks, caption_image, 0)
        rows.append(
            {
                "candidates": depth.candidates,
                "recall_at_1": [metrics.image_to_text["recall_at_1"].value, metrics.text_to_image["recall_at_1"].value],
                "rsum": metrics.rsum.value,
                "pairs": depth.pairs,
                "ms_per_query": round(1000 * depth.seconds / (metrics.images + metrics.captions), 3),
            }
        )
    return tuple(rows)


def _score_table(model: PairModel, images: Sequence[Any], captions: Sequence[str]) -> Numbers:
    """The scores of all pairs (N, M) in the format in which the model gives them, some images at a time."""
    shape = (len(images), len(captions))
    table: np.ndarray | None = None
    coarsest: Numbers | None = None
    step = max(1, IN_MEMORY // max(1, len(captions)))
    for start in range(0, len(images), step):
        part = numbers_of(model.score(images[start : start + step], captions))
        count = min(step, len(images) - start)
        if part.values.shape != (count, len(captions)):
            told = f"{part.values.shape} for {count} images and {len(captions)} captions"
            raise ValueError(
                f"{type(model).__name__}.score gave {told}: every image has to be scored with every caption"
            )
        if table is None:
            table, coarsest = _empty_table(shape, part.values.dtype), part
        elif np.result_type(table, part.values) != table.dtype:
            wider = _empty_table(shape, part.values.dtype)
            wider[:start] = table[:start]
            table = wider
        table[start : start + count] = part.values
        coarsest = part if coarsest is None or part.rounding > coarsest.rounding else coarsest
    assert table is not None
    assert coarsest is not None
    return Numbers(table, coarsest.format, coarsest.rounding)


def _empty_table(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """In memory, or in a temporary file that lives as long as the table."""
    if shape[0] * shape[1] <= IN_MEMORY:
        return np.empty(shape, dtype=dtype)
    return np.memmap(tempfile.TemporaryFile(), dtype, "w+", shape=shape)
