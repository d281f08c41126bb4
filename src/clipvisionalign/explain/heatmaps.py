"""Why a picture and a caption match: which patches carried which word.

- `late`: each word's cosines with the patches, under the weight that the caption gives the word.
- `cross`: how much each word attends to the patches in the fusion, mean over layers and heads; for the whole caption a
  gradient map of the pair's score, of which the fusion is one part.
- `self`, `sparse`: one vector a side has no words any more; a gradient map shows which patches carry the match.

A map says what the model used, not what is true of the picture. Two checks tell whether it says even that: maps change
when the weights are drawn anew, and taking away the marked patches lowers the score more than taking away others.

Sources: Selvaraju et al., "Grad-CAM", arXiv:1610.02391, for the gradient map; Adebayo et al., arXiv:1810.03292, for the
check by drawn weights; Petsiuk et al., "RISE", arXiv:1806.07421, for the check by deletion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.images import Picture
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.eval_mode import evaluating
from clipvisionalign.models.heads import ImageStates
from clipvisionalign.models.pair_scorer import PairScorer


@dataclass(frozen=True)
class Explanation:
    """Maps over an image, (h, w) from 0 to 1. whole: of the caption; words: of each of its words that counts, empty for
    a model that has one vector a side; method: how they were made; not_counted: words that have no part in the score:
    cut off, or left out by `keep_tokens`."""

    caption: str
    score: float
    whole: np.ndarray
    words: list[tuple[str, np.ndarray]]
    method: str
    not_counted: list[str] = field(default_factory=list)


def explain(aligner: Aligner, image: Picture, caption: str) -> Explanation:
    """Maps of one picture and one caption. Raises PictureError, and ValueError for patches that are not on a square."""
    if aligner.late is None:
        return _by_gradient(aligner, image, caption)
    return _by_words(aligner, image, caption)


def _by_gradient(aligner: Aligner, image: Picture, caption: str) -> Explanation:
    text = aligner.encode_captions([caption])[0].to(aligner.device)
    score, whole = _gradient_map(aligner, image, lambda states: states.vectors[0] @ text)
    cut_off = [word for word, tokens in words_of_tokens(aligner, caption) if not tokens]
    return Explanation(caption, score, whole, [], "gradient", cut_off)


def _gradient_map(
    aligner: Aligner, image: Picture, score_of: Callable[[ImageStates], Tensor]
) -> tuple[float, np.ndarray]:
    """The score, and which patches carry it: activation times gradient, summed over channels, where it is above 0."""
    pixels = aligner.image_tower.input.look()(image)[None].to(aligner.device)
    with evaluating(aligner), torch.enable_grad():
        with torch.no_grad():
            features = aligner.image_tower.feature_map(pixels)
        features = features.detach().requires_grad_(True)
        score = score_of(aligner.image_states(aligner.image_tower.features_of(features)))
        (gradient,) = torch.autograd.grad(score, features)
    # Both taken apart into patches the way the tower itself does it.
    with torch.no_grad():
        patches = aligner.image_tower.features_of(features * gradient).patches[0]
    return float(score.detach()), _grid(patches.sum(-1).clamp(min=0))


def _gradient_of_pair(aligner: Aligner, image: Picture, pairs: PairScorer) -> np.ndarray:
    """What carries the whole score of a pair: both vectors, late interaction and fusion, by what each counts."""
    first, weights = np.array([0]), torch.from_numpy(pairs.weights()).to(aligner.device)

    def score_of(states: ImageStates) -> Tensor:
        own = PairScorer(aligner, aligner.image_parts(states), pairs.captions)
        return own.some(first, first)[0].float() @ weights

    return _gradient_map(aligner, image, score_of)[1]


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
            method = "cross-attention; the whole by gradient"
    # Which token of the caption each row of the maps is of; a fusion attends with all of them.
    of_rows = range(len(maps)) if own.positions is None or aligner.fusion is not None else own.positions.tolist()
    rows = {token: row for row, token in enumerate(of_rows)}
    by_word = words_of_tokens(aligner, caption)
    counted = [(word, [rows[token] for token in tokens if token in rows]) for word, tokens in by_word]
    words = [(word, maps[places].mean(dim=0)) for word, places in counted if places]
    if aligner.fusion is None:
        whole = _grid(torch.stack([found for _, found in words]).sum(dim=0) if words else maps.mean(dim=0))
    else:
        # What a fusion attends to is a part of a part of the score: it says little of what the score hangs on.
        whole = _gradient_of_pair(aligner, image, pairs)
    not_counted = [word for word, places in counted if not places]
    return Explanation(caption, score, whole, [(word, _grid(found)) for word, found in words], method, not_counted)


def words_of_tokens(aligner: Aligner, caption: str) -> list[tuple[str, list[int]]]:
    """The caption's words without its punctuation, each with the places of its tokens among those that the text tower
    reads: none for a word that is cut off. Empty for a tokenizer that does not tell which token is of which word."""
    tower = aligner.text_tower
    if not tower.tokenizer.is_fast:
        return []
    read = tower.tokenizer(caption, truncation=True, max_length=tower.max_tokens)
    # A word that is cut in two has its whole name in the caption alone.
    uncut = tower.tokenizer(caption, truncation=False)
    places: dict[int, list[int]] = {word: [] for word in uncut.word_ids() if word is not None}
    for place, word in enumerate(read.word_ids()):
        if word is not None:
            places[word].append(place)
    spans = {word: uncut.word_to_chars(word) for word in places}
    words = [(caption[spans[word].start : spans[word].end].strip(), tokens) for word, tokens in places.items()]
    return [(word, tokens) for word, tokens in words if any(letter.isalnum() for letter in word)]


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

    from clipvisionalign.images import open_picture

    picture = open_picture(image)
    picture.thumbnail((size, size), Image.Resampling.BICUBIC)
    low = Image.fromarray((255 * grid.clip(0, 1)).astype(np.uint8))
    share = np.asarray(low.resize(picture.size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    colours = np.asarray(picture, dtype=np.float32)
    grey = 0.35 * colours.mean(axis=-1, keepdims=True) + 20
    return (colours * share + grey * (1 - share)).clip(0, 255).astype(np.uint8)
