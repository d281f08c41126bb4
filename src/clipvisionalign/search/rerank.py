"""Re-ranking: the first hits of a query in the order of their pair scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from clipvisionalign.images import ImageError
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.models.pair_scorer import EncodedCaption, EncodedImages, PairScorer
from clipvisionalign.search.hits import Hit
from clipvisionalign.search.patch_vectors import encode_stored, stored_patches
from clipvisionalign.search.patches import StoredImages
from clipvisionalign.search.storage import Storage


@torch.no_grad()
def rerank_hits(
    aligner: Aligner,
    storage: Storage,
    hits: Sequence[Hit],
    raw_paths: Mapping[int, bytes],
    captions: list[EncodedCaption],
    weights: Sequence[float],
    stored: StoredImages | None = None,
) -> list[Hit]:
    """Order hits by the weighted sum of their pair scores with a query's terms; images that are gone come last.

    An image whose patches the index holds is not opened, and needs not be there.

    Args:
        aligner: A model with late interaction.
        storage: Where the images are.
        hits: N hits.
        raw_paths: For each hit's id the path of its image.
        captions: The T terms of the query.
        weights: The T weights of the terms.
        stored: What the index holds of the images; None where it keeps no patches.

    Returns:
        The N hits, those that were scored first.

    Raises:
        ValueError: An image cannot be opened.
    """
    available: list[Hit] = []
    missing: list[Hit] = []
    for hit in hits:
        is_stored = stored is not None and hit.id in stored.patches
        # An image that an update has taken away meanwhile is gone, whatever the database had of it.
        is_there = hit.id in raw_paths and (is_stored or storage.has_file(raw_paths[hit.id]))
        (available if is_there else missing).append(hit)
    if not available:
        return missing
    try:
        with eval_mode(aligner):
            scorer = PairScorer(aligner, _encode(aligner, storage, available, raw_paths, stored), captions)
    except ImageError as error:
        raise ValueError(f"{error}; index the folder again") from None
    image_index = np.repeat(np.arange(len(available)), len(captions))
    caption_index = np.tile(np.arange(len(captions)), len(available))
    scores = scorer(image_index, caption_index).reshape(len(available), len(captions)) @ np.array(weights)
    order = np.argsort(-scores, kind="stable")
    return [replace(available[i], pair_score=round(float(scores[i]), 5)) for i in order] + missing


def _encode(
    aligner: Aligner, storage: Storage, hits: Sequence[Hit], raw_paths: Mapping[int, bytes], stored: StoredImages | None
) -> EncodedImages:
    """The images of hits, by what the index holds of them; the others are read from their files.

    Raises:
        ImageError: A file cannot be opened.
    """
    if stored is None:
        sources = [storage.image_source(raw_paths[hit.id]) for hit in hits]
        return aligner.encode_images_for_pairs(aligner.image_chunks(sources))
    vectors, patches = dict(stored.vectors), dict(stored.patches)
    unstored = [hit.id for hit in hits if hit.id not in patches]
    for embeddings in aligner.image_chunks([storage.image_source(raw_paths[number]) for number in unstored]):
        numbers = unstored[: len(embeddings.vectors)]
        del unstored[: len(numbers)]
        patches |= zip(numbers, stored_patches(aligner, embeddings, stored.settings), strict=True)
        vectors |= zip(numbers, embeddings.vectors.cpu().numpy(), strict=True)
    numbers = [hit.id for hit in hits]
    rows = np.stack([vectors[number] for number in numbers])
    return encode_stored(aligner, rows, [patches[number] for number in numbers], stored.settings)
