"""Why an image and a caption match: a map is labelled with the word that it is of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from clipvisionalign.explain.heatmaps import _to_grid, explain
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.models.late_interaction import LateTokens

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
#: Words of one token, of several, punctuation, what stands for a special token, accents, another script, one cut in two.
CAPTIONS = {
    "a small red circle": ["a", "small", "red", "circle"],
    "Two dogs, [SEP] elephants: grass!": ["Two", "dogs", "[SEP]", "elephants", "grass"],
    "[MASK] a [CLS] ring... Éclair 犬": ["[MASK]", "a", "[CLS]", "ring", "Éclair", "犬"],
    "a red elephant on the grass": ["a", "red", "elephant", "on", "the", "grass"],
    "!": [],
}


@pytest.fixture(scope="module")
def aligners(tiny_model):
    """Of the designs that have tokens, their tokens' weights drawn: those of a new one are all equal."""
    torch.manual_seed(0)
    made = {design: Aligner(tiny_model(design)).eval() for design in ("late", "cross")}
    for aligner in made.values():
        torch.nn.init.normal_(aligner.late.token_weight.weight)
        torch.nn.init.normal_(aligner.fusion.correction.weight) if aligner.fusion else None
    return made


def tokens_of(aligner: Aligner, caption: str) -> LateTokens:
    """The late interaction's tokens of a caption, all of them."""
    with torch.no_grad(), eval_mode(aligner):
        ids = torch.tensor(aligner.text_tower.tokenize([caption]))
        states = aligner.text_tower(ids, torch.ones_like(ids)).tokens
        return aligner.late.project_all_tokens(states, torch.ones_like(ids))


def maps_by_token(aligner: Aligner, tokens: LateTokens) -> torch.Tensor:
    """(T, P): the map of each token, as if all of them counted."""
    with torch.no_grad():
        patches = aligner.late.project_patches(next(aligner.image_chunks([IMAGE])).patches)[0]
        return (tokens.vectors[0] @ patches.T).clamp(min=0) * tokens.weights[0][:, None]


def spans(aligner: Aligner, caption: str) -> list[tuple[int, int]]:
    """The characters of each token that is read; (0, 0) for one that the tokenizer puts in."""
    tower = aligner.text_tower
    read = tower.tokenizer(caption, truncation=True, max_length=tower.max_tokens, return_offsets_mapping=True)
    return read["offset_mapping"]


@pytest.mark.parametrize("keep", [0, 1, 3, 6])
@pytest.mark.parametrize("max_tokens", [128, 6])
@pytest.mark.parametrize("caption", CAPTIONS)
def test_a_map_is_labelled_with_its_own_word(aligners, caption, max_tokens, keep, monkeypatch):
    aligner = aligners["late"]
    monkeypatch.setattr(aligner.text_tower, "max_tokens", max_tokens)
    monkeypatch.setattr(aligner.late.config, "keep_tokens", keep)
    tokens, where = tokens_of(aligner, caption), spans(aligner, caption)
    every, weights = maps_by_token(aligner, tokens), tokens.weights[0].tolist()
    heaviest = sorted(range(len(every)), key=lambda token: -weights[token])[: keep or None]
    explanation = explain(aligner, IMAGE, caption)
    at = 0
    for word, grid in explanation.word_heatmaps:
        start = caption.index(word, at)
        at = start + len(word)
        own = [token for token in heaviest if where[token][1] and start <= where[token][0] < at]
        np.testing.assert_allclose(grid, _to_grid(every[own].mean(dim=0)), atol=1e-4)
    assert sorted([word for word, _ in explanation.word_heatmaps] + explanation.ignored_words) == sorted(
        CAPTIONS[caption]
    )
    assert len(explanation.word_heatmaps) <= len(heaviest)


@pytest.mark.parametrize("keep", [0, 2])
def test_a_fusion_attends_with_all_tokens_however_many_the_late_interaction_keeps(aligners, keep, monkeypatch):
    aligner, caption = aligners["cross"], "Two dogs, [SEP] elephants: grass!"
    word_maps = explain(aligner, IMAGE, caption).word_heatmaps
    monkeypatch.setattr(aligner.late.config, "keep_tokens", keep)
    explanation = explain(aligner, IMAGE, caption)
    assert [word for word, _ in explanation.word_heatmaps] == CAPTIONS[caption]
    assert not explanation.ignored_words
    for (_, grid), (_, all_counted) in zip(explanation.word_heatmaps, word_maps, strict=True):
        np.testing.assert_allclose(grid, all_counted, atol=1e-4)


@pytest.mark.parametrize("design", ["self", "late", "cross"])
def test_words_that_are_cut_off_are_named(aligners, tiny_model, design, monkeypatch):
    aligner = aligners.get(design) or Aligner(tiny_model(design)).eval()
    monkeypatch.setattr(aligner.text_tower, "max_tokens", 6)
    explanation = explain(aligner, IMAGE, "a red circle on the grass")
    # Two of the six mark the caption's ends.
    assert explanation.ignored_words == ["the", "grass"]
    assert [word for word, _ in explanation.word_heatmaps] == ([] if design == "self" else ["a", "red", "circle", "on"])
