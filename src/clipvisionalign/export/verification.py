"""An export compared with PyTorch: every array of its files, and the components of pair scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.batch import TokenGroup
from clipvisionalign.export.graphs import ImageExport, fixed_length, random_tokens
from clipvisionalign.export.onnx_aligner import OnnxAligner, OnnxPairScorer, unpad_rows
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.heads import CaptionEmbeddings
from clipvisionalign.models.pair_scorer import EncodedCaption, EncodedImages, PairScorer

#: How far a number of an export may be from PyTorch's, as a share of the largest of its kind, or of 1.
TOLERANCE = 1e-4
#: Texts by which an exported tokenizer is compared with the run's.
TOKENIZER_SAMPLES = ("a dog on the grass", "", "Zwölf  Boxkämpfer, jagen!", "\u72ac \U0001f415 e\u0301", "word " * 500)


def verify_export(
    aligner: Aligner, folder: Path, batches: Sequence[int] = (1, 2, 33), lengths: Sequence[int] = (2, 9, 77)
) -> float:
    """Compare an export with PyTorch, over batches and lengths: every array, and the components of scores.

    Args:
        aligner: The model that was exported.
        folder: The folder of the export.
        batches: Numbers of images and captions.
        lengths: Numbers of tokens; captions of a fixed length have that one.

    Returns:
        The largest difference, as a share of the largest number of its kind, or of 1.

    Raises:
        RuntimeError: It is above `TOLERANCE`, or the tokenizers differ.
    """
    exported = OnnxAligner(folder)
    for text in TOKENIZER_SAMPLES:
        if exported.tokenizer.encode(text).ids != list(aligner.text_tower.tokenize([text])[0]):
            raise RuntimeError(f"{folder}: the exported tokenizer reads {text[:40]!r} otherwise than the run's own")
    worst = 0.0
    with torch.no_grad():
        for batch in batches:
            pixels = torch.randn(
                batch,
                3,
                *2 * (aligner.image_tower.image_transform.size,),
                generator=torch.Generator().manual_seed(batch),
            )
            expected = ImageExport(aligner.eval())(pixels)
            images = _run_session(exported.image_session, pixels=pixels)
            worst = max(worst, *map(_difference, images.values(), expected))
            fixed = fixed_length(aligner)
            for length in (fixed,) if fixed else lengths:
                size = min(length, fixed or aligner.text_tower.max_tokens)
                ids, mask = random_tokens(aligner, batch, size, seed=batch + length)
                group = TokenGroup(ids, mask, torch.arange(batch))
                states = aligner.embed_caption_group(group)
                arrays = _run_session(exported.text_session, ids=ids, mask=mask)
                captions = unpad_rows(list(arrays), list(arrays.values()), mask.numpy())
                worst = max(worst, _difference(arrays["vectors"], states.vectors))
                if aligner.late is not None and "parts" in arrays:
                    worst = max(worst, _pair_difference(aligner, exported, expected, states, images, captions))
    if worst > TOLERANCE or ("late" in exported.manifest) != (aligner.late is not None):
        raise RuntimeError(f"{folder}: what is exported differs from PyTorch's by {worst:.2g}")
    return worst


def _run_session(onnx_session: Any, **inputs: Tensor) -> dict[str, np.ndarray]:
    """What a file gives, by name."""
    names = [each.name for each in onnx_session.get_outputs()]
    return dict(zip(names, onnx_session.run(names, {name: t.numpy() for name, t in inputs.items()}), strict=True))


def _difference(actual: np.ndarray, expected: Tensor | np.ndarray) -> float:
    """The largest, as a share of the largest number that is expected, or of 1."""
    reference = np.asarray(expected)
    if actual.shape != reference.shape:
        return float("inf")
    return float(np.abs(actual - reference).max() / max(1.0, np.abs(reference).max()))


def _pair_difference(
    aligner: Aligner, exported: OnnxAligner, parts: Sequence[Tensor], states: CaptionEmbeddings,
    images: dict[str, np.ndarray], captions: list[dict[str, np.ndarray]],
) -> float:  # fmt: skip
    """The largest difference of captions' arrays, and of the score's parts of each caption with two images."""
    encoded_captions = aligner.project_captions_for_pairs(states)
    worst = max(map(_caption_difference, captions, encoded_captions))
    torch_scorer = PairScorer(
        aligner, EncodedImages(parts[0], parts[1], parts[2] if aligner.fusion is not None else None), encoded_captions
    )
    onnx_scorer = OnnxPairScorer(exported.manifest, exported.fusion_session, images, captions)
    index = np.arange(len(captions))
    pairs = np.concatenate([index, index[::-1]]), np.concatenate([index, index])
    return max(
        worst,
        _difference(onnx_scorer.components(*pairs), torch_scorer.components(*pairs)),
        _difference(onnx_scorer.weights(), torch_scorer.component_weights()),
    )


def _caption_difference(actual: dict[str, np.ndarray], expected: EncodedCaption) -> float:
    """The largest difference of what is exported of a caption's tokens; those that are pruned have to count nothing."""
    positions = slice(None) if expected.positions is None else expected.positions.numpy()
    weights = np.zeros_like(actual["weights"])
    weights[positions] = expected.token_weights.numpy()
    worst = max(
        _difference(actual["weights"], weights), _difference(actual["parts"][positions], expected.token_vectors)
    )
    return worst if expected.tokens is None else max(worst, _difference(actual["tokens"], expected.tokens))
