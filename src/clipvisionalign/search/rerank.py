"""Re-ranking: the first hits of a query in the order of their pair scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from clipvisionalign.images import ImageError
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.models.pair_scorer import EncodedCaption, PairScorer
from clipvisionalign.search.hits import Hit
from clipvisionalign.search.storage import Storage


@torch.no_grad()
def rerank_hits(
    aligner: Aligner,
    storage: Storage,
    hits: Sequence[Hit],
    raw_paths: Mapping[int, bytes],
    captions: list[EncodedCaption],
    weights: Sequence[float],
) -> list[Hit]:
    """Order hits by the weighted sum of their pair scores with a query's terms; images that are gone come last.

    Args:
        aligner: A model with late interaction.
        storage: Where the images are.
        hits: N hits.
        raw_paths: For each hit's id the path of its image.
        captions: The T terms of the query.
        weights: The T weights of the terms.

    Returns:
        The N hits, those that were scored first.

    Raises:
        ValueError: An image cannot be opened.
    """
    available: list[Hit] = []
    missing: list[Hit] = []
    for hit in hits:
        (available if storage.has_file(raw_paths[hit.id]) else missing).append(hit)
    if not available:
        return missing
    sources = [storage.image_source(raw_paths[hit.id]) for hit in available]
    try:
        with eval_mode(aligner):
            scorer = PairScorer(aligner, aligner.encode_images_for_pairs(aligner.image_chunks(sources)), captions)
    except ImageError as error:
        raise ValueError(f"{error}; index the folder again") from None
    image_index = np.repeat(np.arange(len(available)), len(captions))
    caption_index = np.tile(np.arange(len(captions)), len(available))
    scores = scorer(image_index, caption_index).reshape(len(available), len(captions)) @ np.array(weights)
    order = np.argsort(-scores, kind="stable")
    return [replace(available[i], pair_score=round(float(scores[i]), 5)) for i in order] + missing
