"""Gradients in chunks are those of the undivided batch, dropout included."""

from __future__ import annotations

import weakref
from typing import ClassVar

import pytest
import torch
from tolerance import TIMES, in_float64, unit_roundoff

from clipvisionalign import read_captioned_images
from clipvisionalign.data.batches import CaptionedBatches
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.training import contrastive as losses
from clipvisionalign.training.contrastive import LOSSES, DualEncoderLoss, LossConfig
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.forward import PrecomputedFeatures, Towers
from clipvisionalign.training.gathered_batch import GatheredBatch
from clipvisionalign.training.step import Step

FLOAT32 = (torch.float32, torch.float32)


@pytest.fixture
def build(tiny_model, scenes_folder):
    """An aligner in training with its step, and what deals batches of drawn scenes."""

    def made(design: str = "self", loss: str = "softmax", double: bool = False):
        torch.manual_seed(0)
        aligner = Aligner(tiny_model(design))
        aligner = in_float64(aligner) if double else aligner
        aligner.train()
        # Statistics of its own: those of a batch are not those of its chunks.
        aligner.image_tower.eval()
        step = Step(
            Towers(aligner, DualEncoderLoss(LossConfig(loss, beta=0.3)), FLOAT32), Distributed(torch.device("cpu"))
        )
        data = read_captioned_images(scenes_folder).split("train")
        transform = aligner.image_tower.image_transform.image_loader(augment=True)
        batches = CaptionedBatches(data, aligner.text_tower.tokenize, aligner.text_tower.pad, transform)
        return step, batches

    return made


def gradients(step: Step) -> dict[str, torch.Tensor]:
    named_gradients = {name: p.grad for name, p in step.towers.named_parameters() if p.grad is not None}
    step.towers.zero_grad(set_to_none=True)
    return named_gradients


def in_one(step: Step, parts):
    """The gradients of a batch whose towers are called part by part, as a cache calls them, but kept whole."""
    outputs = [step.towers(part, PrecomputedFeatures()) for part in parts]
    leaves = [state.detached() for state in outputs]
    figures = step._backward_loss(parts, leaves)
    for state, leaf in zip(outputs, leaves, strict=True):
        step._backward_towers(list(zip(state.tensors(), leaf.tensors(), strict=True)))
    return figures, gradients(step)


def worst(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    norm = torch.cat([g.flatten() for g in first.values()]).norm()
    return max(float((first[name] - second[name]).norm() / norm) for name in first)


def both_ways(step, batches) -> tuple[dict, dict]:
    """The gradients of one batch in four parts: of the whole, and as a cache computes them."""
    dealt = batches.plan_epoch(24, 1, 0, chunk_size=7)[:8]
    parts = [batches[one] for one in dealt[:4]]
    assert batches.num_chunks(24, 0, 7) == 4
    assert [one[1] for one in dealt[:4]] == [one[1] for one in dealt[4:]]
    torch.manual_seed(3)
    full_batch_figures, full_batch = in_one(step, parts)
    torch.manual_seed(3)
    stream = iter([*parts, *parts])
    cached_figures = step.backward_cached(stream, 4, lambda batch: PrecomputedFeatures())
    cached = gradients(step)
    assert cached_figures.loss == pytest.approx(full_batch_figures.loss, rel=1e-5)
    assert "aligner.log_scale" in cached
    # Without the replayed random states the second pass would drop out other things.
    torch.manual_seed(4)
    assert worst(full_batch, in_one(step, parts)[1]) > unit_roundoff(torch.float32) ** 0.5
    return full_batch, cached


@pytest.mark.slow
@pytest.mark.parametrize("design", ["self", "late", "cross"])
def test_in_chunks_with_dropout_the_gradients_are_those_of_the_whole(build, design):
    """In float64 to its last bits; in float32 as near to that as the whole batch's own, the same being dropped out."""
    (full_batch, chunks), (exact, exact_chunks) = (both_ways(*build(design, double=double)) for double in (False, True))
    error = worst(full_batch, exact)
    assert 0 < error < unit_roundoff(torch.float32) ** 0.5
    assert worst(chunks, exact) < TIMES * error
    bits = unit_roundoff(torch.float64) / unit_roundoff(torch.float32)
    assert worst(exact_chunks, exact) < TIMES * TIMES * error * bits


@pytest.mark.parametrize("indices", [[3], [3, 4]])
def test_a_fusion_without_negatives_of_its_own_has_nothing_to_learn(build, indices):
    """As on a process that has one image of a step, or two of one identity."""
    step, batches = build("cross")
    batches.identity = torch.zeros_like(batches.identity)
    figures = step.backward(batches[(0, indices)], PrecomputedFeatures())
    assert figures.images == len(indices)
    assert torch.isfinite(torch.tensor([figures.loss, figures.pair_loss])).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(step).values())


def test_what_was_drawn_goes_on_as_if_no_chunk_had_been_replayed(build):
    step, batches = build()
    dealt = batches.plan_epoch(12, 1, 0, chunk_size=6)[:4]
    assert batches.num_chunks(12, 0, 6) == 2
    parts = [batches[one] for one in dealt]
    torch.manual_seed(5)
    for part in parts[:2]:
        step.towers(part, PrecomputedFeatures())
    expected = torch.rand(3)
    torch.manual_seed(5)
    step.backward_cached(iter(parts), 2, lambda batch: PrecomputedFeatures())
    assert torch.equal(torch.rand(3), expected)


def test_the_chunks_of_a_step_come_twice_and_hold_each_image_once(build):
    _, batches = build()
    plain = batches.plan_epoch(16, 2, 0)
    chunked = batches.plan_epoch(16, 2, 0, chunk_size=6)
    offset = 0
    for number, (_, indices) in enumerate(plain):
        count = batches.num_chunks(16, number, 6)
        own = chunked[offset : offset + 2 * count]
        offset += 2 * count
        assert own[:count] == own[count:]
        assert [offset for _, some in own[:count] for offset in some] == indices
        assert all(0 < len(some) <= 6 for _, some in own)
    assert offset == len(chunked)
    first, again = batches[chunked[0]], batches[chunked[batches.num_chunks(16, 0, 6)]]
    assert torch.equal(first.pixels, again.pixels)


@pytest.mark.parametrize("name", LOSSES)
def test_in_pieces_a_loss_and_its_gradients_are_those_of_the_whole_table(name, monkeypatch):
    torch.manual_seed(0)
    loss_of = DualEncoderLoss(LossConfig(name, smoothing=0.1, bias=-1.0))
    images, captions = (torch.nn.functional.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1) for n in (9, 31))
    identity, owner = torch.arange(9) // 2, torch.arange(31) % 5
    scale = torch.tensor(5.0, dtype=torch.float64)
    gradients_by_block = {}
    for block in (1 << 20, 40):
        monkeypatch.setattr(losses, "MAX_CHUNK_SCORES", block)
        leaves = [tensor.clone().requires_grad_() for tensor in (images, captions, scale)]
        gallery = GatheredBatch(leaves[0], leaves[1], identity, owner)
        chunks = list(loss_of.chunks(gallery, leaves[2]))
        gradients_by_block[block] = [sum(chunks), *torch.autograd.grad(sum(chunks), leaves, allow_unused=True)]
        assert (len(chunks) > 8) == (block == 40)
    for first, second in zip(*gradients_by_block.values(), strict=True):
        if name == "hardest" and first is None:
            continue
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def test_true_pairs_are_counted_with_identities_that_no_caption_has():
    gallery = GatheredBatch(
        torch.zeros(4, 1), torch.zeros(5, 1), torch.tensor([7, 3, 3, 99]), torch.tensor([3, 7, 7, 3, 8])
    )
    assert gallery.count_positives() == int(gallery.positive_mask().sum()) == 6


def test_a_step_that_is_none_drops_its_chunks_as_they_come(build):
    class Unreadable:
        skipped: ClassVar[list[str]] = []

        def __len__(self) -> int:
            return 0

    known, at_once = [], []

    def stream():
        for _ in range(10):
            holder = [Unreadable()]
            known.append(weakref.ref(holder[0]))
            at_once.append(sum(chunk() is not None for chunk in known))
            yield holder.pop()

    step, _ = build()
    assert step.backward_cached(stream(), 5, lambda batch: PrecomputedFeatures()).images == 0
    assert len(at_once) == 10
    assert max(at_once) <= 2
