"""Heat maps: which patches support which word of a caption.

- `late`: each word's cosines with the patches, under the weight that the caption gives the word.
- `cross`: how much each word attends to the patches in the fusion, mean over layers and heads; for the whole caption a
  gradient map of the pair's score, of which the fusion is one part.
- `self`, `sparse`: one vector a side has no words any more; a gradient map shows which patches carry the match.

A map shows what the model used, not what is true of the image. Two checks test whether it shows even that: maps change
when the weights are drawn again, and taking away the marked patches lowers the score more than taking away others.

Sources: Selvaraju et al., "Grad-CAM", arXiv:1610.02391, for the gradient map; Adebayo et al., arXiv:1810.03292, for the
check by drawn weights; Petsiuk et al., "RISE", arXiv:1806.07421, for the check by deletion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.explain.colours import MAP_OPACITY, colour_map
from clipvisionalign.images import ImageSource
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.models.heads import ImageEmbeddings
from clipvisionalign.models.image_tower import ImageTower
from clipvisionalign.models.pair_scorer import PairScorer


@dataclass(frozen=True)
class Explanation:
    """Maps of one caption over one image, each (h, w) from 0 to 1.

    Attributes:
        caption: The caption.
        score: Score of the pair: a cosine, or for designs that score pairs the score of the pair.
        heatmap: (h, w) of the whole caption.
        word_heatmaps: Each word that counts with its map; empty for designs that compare vectors only.
        method: How the maps were computed.
        ignored_words: Words without a part in the score: cut off, or left out by `keep_tokens`.
    """

    caption: str
    score: float
    heatmap: np.ndarray
    word_heatmaps: list[tuple[str, np.ndarray]]
    method: str
    ignored_words: list[str] = field(default_factory=list)


def explain(aligner: Aligner, image: ImageSource, caption: str) -> Explanation:
    """Which patches of an image support a caption.

    `late`: the cosines of words and patches; `cross`: the attention of the fusion for words, a gradient for the
    caption; other designs: a gradient.

    Args:
        aligner: The model; its mode is restored.
        image: A path, the bytes of a file, or a Pillow image.
        caption: The caption.

    Returns:
        The maps.

    Raises:
        ImageError: The image cannot be opened.
        ValueError: The model's patches are not on a square.

    Source: Selvaraju et al., "Grad-CAM", arXiv:1610.02391, for the gradient.
    """
    if aligner.late is None:
        return _explain_by_gradient(aligner, image, caption)
    return _explain_by_words(aligner, image, caption)


def _explain_by_gradient(aligner: Aligner, image: ImageSource, caption: str) -> Explanation:
    text = aligner.encode_captions([caption])[0].to(aligner.device)
    score, heatmap = _gradient_map(aligner, image, lambda states: states.vectors[0] @ text)
    truncated_words = [word for word, tokens in word_tokens(aligner, caption) if not tokens]
    return Explanation(caption, score, heatmap, [], "gradient", truncated_words)


def _gradient_map(
    aligner: Aligner, image: ImageSource, score_of: Callable[[ImageEmbeddings], Tensor]
) -> tuple[float, np.ndarray]:
    """The score, and which patches carry it: activation times gradient, summed over channels, where it is above 0."""
    pixels = aligner.image_tower.image_transform.image_loader()(image)[None].to(aligner.device)
    block = getattr(aligner.image_tower, "last_block", None)
    if block is not None:
        return _block_gradient_map(aligner, pixels, block, score_of)
    with eval_mode(aligner), torch.enable_grad():
        with torch.no_grad():
            features = aligner.image_tower.feature_map(pixels)
        features = features.detach().requires_grad_(True)
        seen = aligner.image_tower.features_of(features)
        if isinstance(aligner.image_tower, ImageTower):
            seen = aligner.image_tower.both_ways(seen, pixels)
        score = score_of(aligner.embed_image_features(seen))
        (gradient,) = torch.autograd.grad(score, features)
    # Both taken apart into patches the way the tower itself does it.
    with torch.no_grad():
        patches = aligner.image_tower.features_of(features * gradient).patches[0]
    return float(score.detach()), _to_grid(patches.sum(-1).clamp(min=0))


def _block_gradient_map(
    aligner: Aligner, pixels: Tensor, block: Any, score_of: Callable[[ImageEmbeddings], Tensor]
) -> tuple[float, np.ndarray]:
    """The same by what goes into a block: behind it, a tower that is pooled from a class token forgets its patches."""
    inputs: list[Tensor] = []

    def take_input(
        _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
        inputs.append(tokens)
        return ((tokens, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": tokens})

    handle = block.register_forward_pre_hook(take_input, with_kwargs=True)
    try:
        with eval_mode(aligner), torch.enable_grad():
            score = score_of(aligner.embed_image_features(aligner.image_tower(pixels)))
            (gradient,) = torch.autograd.grad(score, inputs[0])
    finally:
        handle.remove()
    carried = (inputs[0].detach() * gradient)[0, aligner.image_tower.prefix_tokens :]
    return float(score.detach()), _to_grid(carried.sum(-1).clamp(min=0))


def _pair_gradient_map(aligner: Aligner, image: ImageSource, pairs: PairScorer) -> np.ndarray:
    """What carries the whole score of a pair: both vectors, late interaction and fusion, by what each counts."""
    index, weights = np.array([0]), torch.from_numpy(pairs.component_weights()).to(aligner.device)

    def score_of(states: ImageEmbeddings) -> Tensor:
        scorer = PairScorer(aligner, aligner.project_images_for_pairs(states), pairs.captions)
        return scorer.score_batch(index, index)[0].float() @ weights

    return _gradient_map(aligner, image, score_of)[1]


@torch.no_grad()
def _explain_by_words(aligner: Aligner, image: ImageSource, caption: str) -> Explanation:
    assert aligner.late is not None
    pairs = aligner.pair_scorer([image], [caption])
    score = float(pairs(np.array([0]), np.array([0]))[0])
    patches, encoded_caption = pairs.images.patches[0], pairs.captions[0]
    with eval_mode(aligner):
        if aligner.fusion is None:
            maps = (encoded_caption.token_vectors @ patches.T).clamp(min=0) * encoded_caption.token_weights[:, None]
            method = "late interaction"
        else:
            assert encoded_caption.tokens is not None
            assert pairs.images.key_values is not None
            tokens = encoded_caption.tokens[None]
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            matches = aligner.late.matches(tokens, patches[None])
            maps = aligner.fusion.attention_maps(tokens, mask, pairs.images.key_values, matches)[0]
            method = "cross-attention; the whole by gradient"
    # Which token of the caption each row of the maps is of; a fusion attends with all of them.
    row_tokens = (
        range(len(maps))
        if encoded_caption.positions is None or aligner.fusion is not None
        else encoded_caption.positions.tolist()
    )
    rows = {token: row for row, token in enumerate(row_tokens)}
    tokens_by_word = word_tokens(aligner, caption)
    rows_by_word = [(word, [rows[token] for token in tokens if token in rows]) for word, tokens in tokens_by_word]
    word_maps = [(word, maps[row_indices].mean(dim=0)) for word, row_indices in rows_by_word if row_indices]
    if aligner.fusion is None:
        heatmap = _to_grid(
            torch.stack([word_map for _, word_map in word_maps]).sum(dim=0) if word_maps else maps.mean(dim=0)
        )
    else:
        # What a fusion attends to is a part of a part of the score: it shows little of what the score depends on.
        heatmap = _pair_gradient_map(aligner, image, pairs)
    not_counted = [word for word, row_indices in rows_by_word if not row_indices]
    return Explanation(
        caption, score, heatmap, [(word, _to_grid(word_map)) for word, word_map in word_maps], method, not_counted
    )


def word_tokens(aligner: Aligner, caption: str) -> list[tuple[str, list[int]]]:
    """The words of a caption without its punctuation, each with its tokens.

    Args:
        aligner: The model.
        caption: The caption.

    Returns:
        Each word with the positions of its tokens among those that the text tower reads: none for a word that is cut
            off.
        Empty for a tokenizer that does not map tokens to words.
    """
    tower = aligner.text_tower
    if not getattr(tower.tokenizer, "is_fast", False):
        return []
    encoding = tower.tokenizer(caption, truncation=True, max_length=tower.max_tokens)
    # A word that is cut in two has its whole name in the caption alone.
    full_encoding = tower.tokenizer(caption, truncation=False)
    positions_by_word: dict[int, list[int]] = {word: [] for word in full_encoding.word_ids() if word is not None}
    for position, word in enumerate(encoding.word_ids()):
        if word is not None:
            positions_by_word[word].append(position)
    spans = {word: full_encoding.word_to_chars(word) for word in positions_by_word}
    words = [
        (caption[spans[word].start : spans[word].end].strip(), tokens) for word, tokens in positions_by_word.items()
    ]
    return [(word, tokens) for word, tokens in words if any(letter.isalnum() for letter in word)]


def _to_grid(values: Tensor) -> np.ndarray:
    """(P,) -> (h, w), from 0 for the least to 1 for the greatest; what is nearly even everywhere stays so."""
    side = math.isqrt(len(values))
    if side * side != len(values):
        raise ValueError(f"{len(values)} patches are on no square: they cannot be shown over an image")
    grid = values.float().cpu().numpy().reshape(side, side)
    low, high = float(grid.min()), float(grid.max())
    return (grid - low) / max(high - low, 0.05 * abs(high), 1e-12)


def overlay(image: ImageSource, grid: np.ndarray, size: int = 224) -> np.ndarray:
    """A map in colours (`colours.py`) over the image in grey.

    The tower takes the whole image, squeezed into a square; here both have the image's own shape.

    Args:
        image: A path, the bytes of a file, or a Pillow image.
        grid: (h, w) from 0 to 1.
        size: Pixels of the longer side.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ImageError: The image cannot be opened.

    >>> from PIL import Image
    >>> overlay(Image.new("RGB", (40, 20)), np.ones((7, 7)), size=20).shape
    (10, 20, 3)
    """
    from PIL import Image

    from clipvisionalign.images import open_image

    pil_image = open_image(image)
    pil_image.thumbnail((size, size), Image.Resampling.BICUBIC)
    mask = Image.fromarray(grid.clip(0, 1).astype(np.float32))
    values = np.asarray(mask.resize(pil_image.size, Image.Resampling.BICUBIC))
    grey = np.asarray(pil_image.convert("L"), dtype=np.float32)[..., None]
    return (MAP_OPACITY * colour_map(values) + (1 - MAP_OPACITY) * grey).clip(0, 255).astype(np.uint8)
