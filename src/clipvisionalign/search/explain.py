"""Why a picture and a caption match: which patches carried which word.

- `late`: each word's cosines with the patches, under the weight that the caption gives the word.
- `cross`: how much each word attends to the patches in the fusion, mean over layers and heads.
- `self`, `sparse`: one vector a side has no words any more; a gradient map shows which patches carry the match.

A map says what the model used, not what is true of the picture. Two checks tell whether it says even that: maps change
when the weights are drawn anew, and taking away the marked patches lowers the score more than taking away others.

Sources: Selvaraju et al., "Grad-CAM", arXiv:1610.02391, for the gradient map; Adebayo et al., arXiv:1810.03292, for the
check by drawn weights; Petsiuk et al., "RISE", arXiv:1806.07421, for the check by deletion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.models.aligner import Aligner, evaluating
from clipvisionalign.pictures import Picture


@dataclass(frozen=True)
class Explanation:
    """Maps over a picture, (h, w) from 0 to 1. whole: of the caption; words: of each of its words, empty for a model
    that has one vector a side; method: how they were made."""

    caption: str
    score: float
    whole: np.ndarray
    words: list[tuple[str, np.ndarray]]
    method: str


def explain(aligner: Aligner, image: Picture, caption: str) -> Explanation:
    """Maps of one picture and one caption. Raises PictureError, and ValueError for patches that are not on a square."""
    if aligner.late is None:
        return _by_gradient(aligner, image, caption)
    return _by_words(aligner, image, caption)


def _by_gradient(aligner: Aligner, image: Picture, caption: str) -> Explanation:
    text = aligner.encode_captions([caption])[0].to(aligner.device)
    pixels = aligner.image_tower.input.look()(image)[None].to(aligner.device)
    with evaluating(aligner), torch.enable_grad():
        with torch.no_grad():
            features = aligner.image_tower.feature_map(pixels)
        features = features.detach().requires_grad_(True)
        score = aligner.image_head(aligner.image_tower.features_of(features)).vectors[0] @ text
        (gradient,) = torch.autograd.grad(score, features)
    # Both taken apart into patches the way the tower itself does it.
    with torch.no_grad():
        patches = aligner.image_tower.features_of(features * gradient).patches[0]
    return Explanation(caption, float(score.detach()), _grid(patches.sum(-1).clamp(min=0)), [], "gradient")


@torch.no_grad()
def _by_words(aligner: Aligner, image: Picture, caption: str) -> Explanation:
    assert aligner.late is not None
    pairs = aligner.pair_scorer([image], [caption])
    score = float(pairs(np.array([0]), np.array([0]))[0])
    patches, own = pairs.images.patches[0], pairs.captions[0]
    with evaluating(aligner):
        if aligner.fusion is None:
            maps = (own.parts @ patches.T).clamp(min=0) * own.weights[:, None]
            method = "late interaction"
        else:
            assert own.tokens is not None
            assert pairs.images.key_values is not None
            tokens = own.tokens[None]
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
            matches = aligner.late.matches(tokens, patches[None])
            maps = aligner.fusion.attention_maps(tokens, mask, pairs.images.key_values, matches)[0]
            method = "cross-attention"
    words = [(word, maps[places].mean(dim=0)) for word, places in words_of_tokens(aligner, caption, len(maps))]
    whole = torch.stack([found for _, found in words]).sum(dim=0) if words else maps.mean(dim=0)
    return Explanation(caption, score, _grid(whole), [(word, _grid(found)) for word, found in words], method)


def words_of_tokens(aligner: Aligner, caption: str, tokens: int) -> list[tuple[str, list[int]]]:
    """The caption's words without its punctuation, each with the places of its tokens, as far as there are so many."""
    found = aligner.text_tower.tokenizer(caption, truncation=True, max_length=aligner.text_tower.max_tokens)
    places: dict[int, list[int]] = {}
    for place, word in enumerate(found.word_ids()[:tokens]):
        if word is not None:
            places.setdefault(word, []).append(place)
    spans = {word: found.word_to_chars(word) for word in places}
    words = [(caption[spans[word].start : spans[word].end], rows) for word, rows in places.items()]
    return [(word, rows) for word, rows in words if any(letter.isalnum() for letter in word)]


def _grid(values: Tensor) -> np.ndarray:
    """(P,) -> (h, w), from 0 for the least to 1 for the greatest; what is nearly even everywhere stays so."""
    side = math.isqrt(len(values))
    if side * side != len(values):
        raise ValueError(f"{len(values)} patches are on no square: they cannot be shown over a picture")
    found = values.float().cpu().numpy().reshape(side, side)
    low, high = float(found.min()), float(found.max())
    return (found - low) / max(high - low, 0.05 * abs(high), 1e-12)


def overlay(image: Picture, grid: np.ndarray, size: int = 224) -> np.ndarray:
    """The picture with a map over it, bytes (height, width, 3), the longer side `size`: what it leaves out is grey.

    The tower sees the whole picture, squeezed into a square; here both have the picture's own shape.
    """
    from PIL import Image

    from clipvisionalign.pictures import open_picture

    picture = open_picture(image)
    picture.thumbnail((size, size), Image.Resampling.BICUBIC)
    low = Image.fromarray((255 * grid.clip(0, 1)).astype(np.uint8))
    share = np.asarray(low.resize(picture.size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    colours = np.asarray(picture, dtype=np.float32)
    grey = 0.35 * colours.mean(axis=-1, keepdims=True) + 20
    return (colours * share + grey * (1 - share)).clip(0, 255).astype(np.uint8)
