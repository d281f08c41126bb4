"""Each loss against a double loop in float64, written from its paper."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from clipvisionalign.training import contrastive
from clipvisionalign.training.contrastive import (
    LOSSES,
    DualEncoderLoss,
    LossConfig,
    contrastive_loss,
    hard_weighted_terms,
    hardest_terms,
    sigmoid_terms,
)
from clipvisionalign.training.gathered_batch import GatheredBatch

OWNERS = [[0, 1, 2], [0, 0, 1, 2, 2, 2], [2, 1, 0, 0, 1]]


def problem(owners: list[int]) -> tuple[Tensor, Tensor]:
    positives = torch.arange(3)[:, None] == torch.tensor(owners)[None, :]
    torch.manual_seed(0)
    return torch.randn(positives.shape, dtype=torch.float64, requires_grad=True), positives


def both_ways(logits: Tensor, positives: Tensor, term) -> float:
    """The mean over rows of the mean over a row's partners of term(true score, wrong scores); the same for columns."""
    total = 0.0
    for table, own in ((logits, positives), (logits.T, positives.T)):
        rows = []
        for row, true in zip(table.tolist(), own.tolist(), strict=True):
            wrong = [score for score, t in zip(row, true, strict=True) if not t]
            terms = [term(score, wrong) for score, t in zip(row, true, strict=True) if t]
            rows.append(sum(terms) / len(terms))
        total += sum(rows) / len(rows) / 2
    return total


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax(owners, smoothing):
    logits, positives = problem(owners)

    def term(true, wrong):
        total = math.log(sum(map(math.exp, [true, *wrong])))
        mean = sum([true, *wrong]) / (1 + len(wrong))
        return (1 - smoothing) * (total - true) + smoothing * (total - mean)

    assert contrastive_loss(logits, positives, smoothing).item() == pytest.approx(
        both_ways(logits, positives, term), rel=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, positives, smoothing), logits)


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("beta", [0.0, 0.7])
def test_hard_weighted(owners, beta):
    logits, positives = problem(owners)

    def term(true, wrong):
        weights = [math.exp(beta * score) for score in wrong]
        negatives = sum(w * math.exp(s) for w, s in zip(weights, wrong, strict=True)) * len(wrong) / sum(weights)
        return -math.log(math.exp(true) / (math.exp(true) + negatives))

    def loss(table):
        return sum(hard_weighted_terms(t, p, beta).mean() for t, p in ((table, positives), (table.T, positives.T))) / 2

    assert loss(logits).item() == pytest.approx(both_ways(logits, positives, term), rel=1e-12)
    if not beta:
        torch.testing.assert_close(loss(logits), contrastive_loss(logits, positives))
        assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("owners", OWNERS)
def test_sigmoid(owners):
    logits, positives = problem(owners)
    total = 0.0
    for row, true in zip(logits.tolist(), positives.tolist(), strict=True):
        for score, t in zip(row, true, strict=True):
            total += -math.log(1 / (1 + math.exp(-score if t else score)))
    assert sigmoid_terms(logits, positives).sum().item() == pytest.approx(total, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: sigmoid_terms(x, positives), logits)


@pytest.mark.parametrize("owners", OWNERS)
def test_hardest(owners):
    logits, positives = problem(owners)
    total, margin = 0.0, 0.2
    for b in range(3):
        for m in range(len(owners)):
            if positives[b, m]:
                wrong_captions = [logits[b, j].item() for j in range(len(owners)) if not positives[b, j]]
                wrong_images = [logits[i, m].item() for i in range(3) if not positives[i, m]]
                for wrong in (wrong_captions, wrong_images):
                    total += max(0.0, margin - logits[b, m].item() + max(wrong))

    def both(table):
        return hardest_terms(table, positives, margin).sum() + hardest_terms(table.T, positives.T, margin).sum()

    assert both(logits).item() == pytest.approx(total, rel=1e-12)
    assert torch.autograd.gradcheck(both, logits)


@pytest.mark.parametrize("name", LOSSES)
def test_captions_of_one_image_are_never_negatives_of_it(name):
    """No true pair's cosine is ever pushed down, and no wrong one's up, however many captions an image has."""
    torch.manual_seed(0)
    positives = torch.arange(3)[:, None] == torch.tensor([0, 0, 0, 1, 1, 2])[None, :]
    loss = DualEncoderLoss(LossConfig(name))
    moved = torch.zeros(positives.shape)
    for _ in range(20):
        images = F.normalize(torch.randn(3, 8), dim=-1)
        captions = F.normalize(torch.randn(6, 8), dim=-1)
        cosines = (images @ captions.T).requires_grad_()
        # The gradient with respect to the cosines, through vectors that give exactly these.
        value = loss(torch.eye(3), cosines.T, positives, torch.tensor(10.0))
        (slope,) = torch.autograd.grad(value, cosines)
        assert (slope[positives] <= 0).all()
        assert (slope[~positives] >= 0).all()
        moved += slope.abs()
    assert (moved > 0).all()


@pytest.mark.parametrize("name", LOSSES)
@given(
    identities=st.lists(st.integers(0, 3), min_size=1, max_size=6), owners=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    beta=st.sampled_from([0.0, 0.5, 3.0]), smoothing=st.sampled_from([0.0, 0.2]), scale=st.sampled_from([1.0, 100.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_loss_is_finite_with_finite_gradients_for_every_table_of_partners(
    name, identities, owners, beta, smoothing, scale
):
    """One identity alone in a batch, captions of nobody, images without a caption, one image: all of them come."""
    torch.manual_seed(len(owners))
    identity, own = torch.tensor(identities), torch.tensor(owners)
    positives = identity[:, None] == own[None, :]
    images, captions = (F.normalize(torch.randn(n, 4), dim=1).requires_grad_() for n in positives.shape)
    temperature = torch.tensor(scale, requires_grad=True)
    loss_of = DualEncoderLoss(LossConfig(name, beta=beta, smoothing=smoothing))
    loss = loss_of(images, captions, positives, temperature)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(t.grad is None or torch.isfinite(t.grad).all() for t in (images, captions, temperature))
    with mock.patch.object(contrastive, "MAX_CHUNK_SCORES", 1):
        chunks = list(loss_of.chunks(GatheredBatch(images, captions, identity, own), temperature))
    assert len(chunks) >= len(images)
    in_pieces = sum(chunks)
    assert torch.isfinite(in_pieces)
    assert in_pieces.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)


def mean_cosine(images, captions, positives):
    """A loss of one's own."""
    return -(images @ captions.T)[positives].mean()


def test_a_loss_of_ones_own_is_named_and_an_unknown_one_told(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mine", sys.modules[__name__])
    positives = torch.eye(2, dtype=torch.bool)
    images = F.normalize(torch.randn(2, 4), dim=-1)
    assert DualEncoderLoss(LossConfig("mine:mean_cosine"))(
        images, images, positives, torch.ones(())
    ).item() == pytest.approx(-1)
    for name in ("contrastive", "mine:nothing", "no.such.module:loss"):
        with pytest.raises(ValueError, match="neither softmax, sigmoid"):
            DualEncoderLoss(LossConfig(name))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "softmax"])
def test_a_run_trains_with_it(tmp_path, scenes_folder, tiny_model, name):
    from clipvisionalign.models.io import load_aligner
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train

    config = RunConfig(
        data=str(scenes_folder), out=str(tmp_path / "run"), model=tiny_model("self"), epochs=1, batch=16, augment="none",
        precision="float32", cache=str(tmp_path / "cache"), loss=LossConfig(name, learn_temperature=False),
    )  # fmt: skip
    results = train(config, say=lambda line: None)
    assert results["rsum"]["value"] > 0
    assert load_aligner(tmp_path / "run").scale().item() == pytest.approx(1 / config.model.temperature)
