"""Captions in one row are encoded as each is alone: outputs and gradients, every encoder that is packed, any order."""

from __future__ import annotations

import pytest
import torch
from test_text_families import READ, ROWS, WORDS, save

from clipvisionalign.batch import group_by_length
from clipvisionalign.models import text_tower
from clipvisionalign.models.dropout import Dropout
from clipvisionalign.models.packed_captions import PACKABLE, PackedCaptions
from clipvisionalign.models.text_families import BERT_FAMILY
from clipvisionalign.models.text_tower import TextTower, TextTowerConfig


@pytest.fixture
def packing(monkeypatch):
    """All towers pack, in whatever number format."""
    monkeypatch.setattr(TextTower, "packs", lambda self: True)


def captions(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, WORDS, (length,), generator=generator).tolist() for length in lengths]


def as_groups(tokens: list[list[int]], pad: int, shuffled: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if not shuffled:
        return [(group.ids, group.mask) for group in group_by_length(tokens, pad, 4)]
    width = max(map(len, tokens))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])
    # Groups whose captions are not in the order of their lengths, as those of a sharded batch.
    return [(ids[:3], mask[:3]), (ids[3:], mask[3:])]


LENGTHS = [3, 12, 5, 3, 9, 5, 5, ROWS - 2, 4, 12, 3]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("attention", ["dense", "sliding"])
@pytest.mark.parametrize("kind", sorted(PACKABLE))
def test_packed_captions_are_what_padded_ones_are(kind, attention, shuffled, tmp_path, packing):
    save(tmp_path, kind, READ[kind])
    config = TextTowerConfig(str(tmp_path), attention=attention, window=4, max_tokens=ROWS - 2)
    for pooling in ("mean", "first"):
        tower = TextTower(config).double().eval()
        tower.pooling = pooling
        groups = as_groups(captions(LENGTHS), tower.pad, shuffled)
        padded = [tower(ids, mask) for ids, mask in groups]
        packed = tower.encode_groups(groups)
        assert len(packed) == len(padded)
        weights = [torch.randn_like(each.pooled) for each in padded]
        gradients = []
        for outputs in (padded, packed):
            tower.zero_grad()
            loss = sum(
                (each.pooled * weight).sum() + (each.tokens * each.mask[..., None]).pow(2).sum()
                for each, weight in zip(outputs, weights, strict=True)
            )
            loss.backward()
            gradients.append({name: value.grad for name, value in tower.named_parameters() if value.grad is not None})
        for ours, theirs, (_, mask) in zip(packed, padded, groups, strict=True):
            assert torch.allclose(ours.pooled, theirs.pooled, atol=1e-10)
            assert torch.allclose(ours.tokens, theirs.tokens * mask[..., None], atol=1e-10)
            assert torch.equal(ours.mask, mask)
        assert gradients[0].keys() == gradients[1].keys()
        for name, expected in gradients[0].items():
            assert torch.allclose(gradients[1][name], expected, atol=1e-9), name


def test_without_tokens_the_vectors_are_the_same(tmp_path, packing):
    save(tmp_path, "bert", READ["bert"])
    tower = TextTower(TextTowerConfig(str(tmp_path))).eval()
    groups = as_groups(captions(LENGTHS), tower.pad, False)
    for ours, theirs in zip(tower.encode_groups(groups, False), tower.encode_groups(groups), strict=True):
        assert ours.tokens is None
        assert torch.equal(ours.pooled, theirs.pooled)
    assert tower.encode_groups([]) == []


def test_one_caption_says_nothing_of_another(tmp_path, packing):
    save(tmp_path, "roberta", READ["roberta"])
    tower = TextTower(TextTowerConfig(str(tmp_path))).double().eval()
    first, other = captions([6, 6, 6]), captions([6, 6, 6], seed=1)
    one, two = (
        tower.encode_groups(as_groups([first[0], *rest], tower.pad, False))[0].pooled[0]
        for rest in (first[1:], other[1:])
    )
    assert torch.allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("kind", sorted(BERT_FAMILY - PACKABLE))
def test_an_encoder_that_does_not_hand_the_layout_on_is_never_packed(kind, tmp_path):
    save(tmp_path, kind, READ[kind])
    tower = TextTower(TextTowerConfig(str(tmp_path)))
    with torch.autocast("cpu", torch.bfloat16):
        assert not tower.packs()


def test_a_layout_that_no_attention_used_is_not_believed(tmp_path, monkeypatch):
    save(tmp_path, "bert", READ["bert"])
    tower = TextTower(TextTowerConfig(str(tmp_path))).eval()
    monkeypatch.setattr(PackedCaptions, "attend", lambda self, attention, q, k, v: q.transpose(1, 2))
    groups = as_groups(captions(LENGTHS), tower.pad, False)
    with torch.autocast("cpu", torch.bfloat16):
        assert tower.packs()
        outputs = tower.encode_groups(groups)
        assert not tower.packs()
        for ours, (ids, mask) in zip(outputs, groups, strict=True):
            assert torch.equal(ours.pooled, tower(ids, mask).pooled)


def test_captions_that_do_not_begin_a_row_are_padded(tmp_path, packing):
    save(tmp_path, "bert", READ["bert"])
    tower = TextTower(TextTowerConfig(str(tmp_path))).double().eval()
    (ids, mask), *_ = as_groups(captions([5, 5, 5]), tower.pad, False)
    left, none = mask.clone(), mask.clone()
    left[1, 0] = 0
    none[1] = 0
    tower.pooling = "first"
    for odd in (left, none):
        (ours,) = tower.encode_groups([(ids, odd)])
        assert torch.equal(ours.pooled, tower(ids, odd).pooled)


def test_only_half_precision_on_a_cpu_is_packed(tmp_path, monkeypatch):
    save(tmp_path, "bert", READ["bert"])
    tower = TextTower(TextTowerConfig(str(tmp_path))).train()
    groups = as_groups(captions(LENGTHS), tower.pad, False)
    packed = []
    monkeypatch.setattr(text_tower, "PackedCaptions", lambda given: packed.append(1) or PackedCaptions(given))
    tower.encode_groups(groups)
    assert packed == []
    with torch.autocast("cpu", torch.bfloat16):
        outputs = tower.encode_groups(groups)
    assert packed == [1]
    sum(each.pooled.float().sum() for each in outputs).backward()
    assert any(isinstance(module, Dropout) and module.p for module in tower.modules())
    assert all(torch.isfinite(value.grad).all() for value in tower.parameters() if value.grad is not None)
    tower.compile()
    with torch.autocast("cpu", torch.bfloat16):
        assert not tower.packs()
