"""An export compared with PyTorch: every array of its files, and the components of pair scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.batch import TokenGroup
from clipvisionalign.export.graphs import ImageExport, random_tokens
from clipvisionalign.export.onnx_aligner import OnnxAligner, OnnxPairs, rows_of
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.heads import CaptionStates
from clipvisionalign.models.pair_scorer import EncodedCaption, EncodedImages, PairScorer

#: How far a number of an export may be from PyTorch's, as a share of the largest of its kind, or of 1.
TOLERANCE = 1e-4
#: Texts by which an exported tokenizer is compared with the run's.
TEXTS = ("a dog on the grass", "", "Zwölf  Boxkämpfer, jagen!", "\u72ac \U0001f415 e\u0301", "word " * 500)


def checked(
    aligner: Aligner, folder: Path, batches: Sequence[int] = (1, 2, 33), lengths: Sequence[int] = (2, 9, 77)
) -> float:
    """The largest difference between what is exported and PyTorch, over batches and lengths: every array that the files
    give, and the parts of pairs' scores; as a share of the largest number of its kind, or of 1.

    Raises RuntimeError where it is larger than `TOLERANCE`, or where the tokenizers differ.
    """
    found = OnnxAligner(folder)
    for text in TEXTS:
        if found.tokenizer.encode(text).ids != list(aligner.text_tower.tokenize([text])[0]):
            raise RuntimeError(f"{folder}: the exported tokenizer reads {text[:40]!r} otherwise than the run's own")
    worst = 0.0
    with torch.no_grad():
        for batch in batches:
            pixels = torch.randn(
                batch, 3, *2 * (aligner.image_tower.input.size,), generator=torch.Generator().manual_seed(batch)
            )
            expected = ImageExport(aligner.eval())(pixels)
            images = _outputs(found.images, pixels=pixels)
            worst = max(worst, *map(_difference, images.values(), expected))
            for length in lengths:
                size = min(length, aligner.text_tower.max_tokens)
                ids, mask = random_tokens(aligner, batch, size, seed=batch + length)
                group = TokenGroup(ids, mask, torch.arange(batch))
                states = aligner.caption_states(group)
                arrays = _outputs(found.captions, ids=ids, mask=mask)
                captions = rows_of(list(arrays), list(arrays.values()), mask.numpy())
                worst = max(worst, _difference(arrays["vectors"], states.vectors))
                if aligner.late is not None and "parts" in arrays:
                    worst = max(worst, _difference_of_pairs(aligner, found, expected, states, images, captions))
    if worst > TOLERANCE or ("late" in found.about) != (aligner.late is not None):
        raise RuntimeError(f"{folder}: what is exported differs from PyTorch's by {worst:.2g}")
    return worst


def _outputs(of: Any, **inputs: Tensor) -> dict[str, np.ndarray]:
    """What a file gives, by name."""
    names = [each.name for each in of.get_outputs()]
    return dict(zip(names, of.run(names, {name: given.numpy() for name, given in inputs.items()}), strict=True))


def _difference(found: np.ndarray, expected: Tensor | np.ndarray) -> float:
    """The largest, as a share of the largest number that is expected, or of 1."""
    right = np.asarray(expected)
    if found.shape != right.shape:
        return float("inf")
    return float(np.abs(found - right).max() / max(1.0, np.abs(right).max()))


def _difference_of_pairs(
    aligner: Aligner, exported: OnnxAligner, parts: Sequence[Tensor], states: CaptionStates,
    images: dict[str, np.ndarray], captions: list[dict[str, np.ndarray]],
) -> float:  # fmt: skip
    """The largest difference of captions' arrays, and of the score's parts of each caption with two images."""
    encoded = aligner.caption_parts(states)
    worst = max(map(_difference_of_caption, captions, encoded))
    here = PairScorer(
        aligner, EncodedImages(parts[0], parts[1], parts[2] if aligner.fusion is not None else None), encoded
    )
    there = OnnxPairs(exported.about, exported.fusion, images, captions)
    index = np.arange(len(captions))
    pairs = np.concatenate([index, index[::-1]]), np.concatenate([index, index])
    return max(
        worst,
        _difference(there.parts(*pairs), here.parts(*pairs)),
        _difference(there.weights(), here.weights()),
    )


def _difference_of_caption(found: dict[str, np.ndarray], expected: EncodedCaption) -> float:
    """The largest difference of what is exported of a caption's tokens; those that are pruned have to count nothing."""
    every = slice(None) if expected.positions is None else expected.positions.numpy()
    weights = np.zeros_like(found["weights"])
    weights[every] = expected.weights.numpy()
    worst = max(_difference(found["weights"], weights), _difference(found["parts"][every], expected.parts))
    return worst if expected.tokens is None else max(worst, _difference(found["tokens"], expected.tokens))
