"""The ONNX graphs of an aligner: towers of any batch and any length, and the fusion of pairs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.batch import TokenGroup
from clipvisionalign.export.onnx_aligner import CAPTIONS, FUSION_FILE, IMAGES
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.late_interaction import prune_weights
from clipvisionalign.models.pretrained import PretrainedTextTower


class ImageExport(nn.Module):
    """The image tower as a graph: pixels to vectors; for a design that scores pairs also patches, and keys and values.

    Args:
        aligner: The model.
    """

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Encode images.

        Args:
            pixels: (B, 3, S, S) scaled, float32.

        Returns:
            Vectors (B, D); with a late interaction also patches (B, P, E); with a fusion also keys and values (B, L, P,
            2 D).
        """
        states = self.aligner.embed_image_features(self.aligner.image_tower(pixels))
        if self.aligner.late is None:
            return (states.vectors,)
        parts = self.aligner.project_images_for_pairs(states)
        return tuple(part for part in parts if part is not None)


class CaptionExport(nn.Module):
    """The text tower as a graph: tokens to vectors; for a design that scores pairs also what pairs are scored with.

    Args:
        aligner: The model.
    """

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Encode captions.

        Args:
            ids: (M, T) token ids.
            mask: (M, T) 1 on tokens, 0 on padding.

        Returns:
            Vectors (M, D); with a late interaction also token vectors (M, T, E) and weights (M, T), 0 for pruned
            tokens; with a fusion also tokens (M, T, W).
        """
        aligner = self.aligner
        states = aligner.embed_caption_group(TokenGroup(ids, mask, torch.empty(0, dtype=torch.long)))
        if aligner.late is None:
            return (states.vectors,)
        assert states.tokens is not None
        late_tokens = aligner.late.project_all_tokens(states.tokens, states.mask)
        weights = prune_weights(late_tokens.weights, aligner.late.config.keep_tokens)
        tokens = () if aligner.fusion is None else (states.tokens,)
        return states.vectors, late_tokens.vectors, weights, *tokens


class FusionExport(nn.Module):
    """The fusion as a graph.

    Args:
        aligner: A model of the design `cross`.
    """

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, patches: Tensor, key_values: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The fusion's corrections of pairs.

        Args:
            patches: (Q, P, E) unit vectors of the late interaction.
            key_values: (Q, L, P, 2 D).
            tokens: (Q, T, W).
            mask: (Q, T) 1 on tokens, 0 on padding.

        Returns:
            (Q,) corrections, before their weight.
        """
        late, fusion = self.aligner.late, self.aligner.fusion
        assert late is not None
        assert fusion is not None
        return fusion(tokens, mask, key_values, late.matches(tokens, patches))


def write_graphs(aligner: Aligner, folder: Path) -> None:
    """Write the graphs of both towers, and of the fusion where there is one.

    Args:
        aligner: The model, on the CPU, its weights not packed.
        folder: Where the .onnx files are written.
    """
    size = aligner.image_tower.image_transform.size
    pixels = torch.randn(3, 3, size, size)
    fixed = fixed_length(aligner)
    ids, mask = random_tokens(aligner, 3, fixed or 9)
    batch = torch.export.Dim("batch", min=1, max=4096)
    length = {1: torch.export.Dim("length", min=2, max=aligner.text_tower.max_tokens)}
    scores_pairs, fuses = aligner.late is not None, aligner.fusion is not None
    of_patches = ["patches"] * scores_pairs + ["key_values"] * fuses
    of_tokens = ["parts", "weights"] * scores_pairs + ["tokens"] * fuses
    _export_module(
        ImageExport(aligner), (pixels,), folder / IMAGES, ["pixels"], ["vectors", *of_patches], ({0: batch},)
    )
    both = {0: batch, **({} if fixed else length)}
    _export_module(
        CaptionExport(aligner), (ids, mask), folder / CAPTIONS, ["ids", "mask"], ["vectors", *of_tokens], (both, both)
    )
    if not fuses:
        return
    with torch.no_grad():
        _, patches, key_values = ImageExport(aligner)(pixels)
        tokens = CaptionExport(aligner)(ids, mask)[-1]
    names = ["patches", "key_values", "tokens", "mask"]
    # A pair's tokens are those of its caption, without the padding of a fixed length.
    unpadded = {0: batch, **length}
    shapes = ({0: batch}, {0: batch}, unpadded, unpadded)
    _export_module(
        FusionExport(aligner), (patches, key_values, tokens, mask), folder / FUSION_FILE, names, ["corrections"], shapes
    )


def fixed_length(aligner: Aligner) -> int:
    """Tokens that every caption is padded to.

    Args:
        aligner: The model.

    Returns:
        The number; 0 where captions are not padded to a fixed length.
    """
    tower = aligner.text_tower
    return tower.max_positions if isinstance(tower, PretrainedTextTower) and tower.fixed_length else 0


def random_tokens(aligner: Aligner, captions: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random captions, for tracing and comparing graphs.

    Args:
        aligner: The model, whose vocabulary is used.
        captions: Number M of captions.
        length: Number T of tokens; the first caption has all of them.
        seed: Seed.

    Returns:
        Token ids (M, T), and mask (M, T), 1 on tokens.
    """
    rng = np.random.default_rng(seed)
    top = aligner.text_tower.vocab_size
    ids = torch.from_numpy(rng.integers(5, top, (captions, length)))
    lengths = torch.from_numpy(np.concatenate([[length], rng.integers(1, length + 1, captions - 1)]))
    mask = (torch.arange(length) < lengths[:, None]).long()
    return torch.where(mask.bool(), ids, aligner.text_tower.pad), mask


def _export_module(
    module: nn.Module, example: tuple[Tensor, ...], path: Path, inputs: list[str], outputs: list[str], shapes: Any
) -> None:
    with warnings.catch_warnings(), torch.no_grad(), without_fast_path():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), example, str(path), input_names=inputs, output_names=outputs, dynamic_shapes=shapes,
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip


@contextmanager
def without_fast_path() -> Iterator[None]:
    """PyTorch's fused layers, which open_clip's towers take, are off within a block: they have no counterpart in ONNX.

    Yields:
        Nothing.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
