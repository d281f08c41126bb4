"""Packed weights give the same product, and never an old one."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerance import off, rounding
from torch import nn

from clipvisionalign.models import packed_linear
from clipvisionalign.models.packed_linear import PackedLinear, align_weights, pack_linears

pytestmark = pytest.mark.skipif(
    not packed_linear.AVAILABLE, reason="no oneDNN: a PyTorch that is built with it (its own wheels for x86-64 are)"
)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False)).eval()
    pack_linears(network)
    return network


def plain(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    first, activation, last = model
    return nn.functional.linear(activation(nn.functional.linear(x, first.weight, first.bias)), last.weight).detach()


def agrees(model: nn.Module) -> bool:
    x = torch.randn(5, 24)
    with torch.no_grad():
        return is_plain(model, x)


def is_plain(model: nn.Module, x: torch.Tensor) -> bool:
    """The product is that of the weights as they are now, but for rounding."""
    actual, exact = model(x), plain(copy.deepcopy(model).double(), x.double())
    assert actual.shape == exact.shape
    # Two products; at most what the absolute values of weights and inputs come to.
    first, _, last = model
    inner = nn.functional.linear(x.abs(), first.weight.abs(), first.bias.abs())
    size = float(nn.functional.linear(inner, last.weight.abs()).max()) if actual.numel() else 0.0
    return off(actual, exact) <= rounding(40, size, steps=2)


def packed(model: nn.Module) -> list[bool]:
    return [module in packed_linear._packed for module in model if isinstance(module, PackedLinear)]


def test_any_shape_and_layout_gives_the_plain_product(model):
    with torch.inference_mode():
        for x in (
            torch.randn(5, 24), torch.randn(24), torch.randn(2, 3, 24), torch.randn(24, 5).T,
            torch.randn(3, 8, 24)[:, ::2], torch.randn(2, 0, 24), torch.randn(1, 24).expand(4, 24),
        ):  # fmt: skip
            assert is_plain(model, x)
    assert packed(model) == [True, True]


def test_whatever_changes_a_weight_the_product_is_the_new_one(model):
    assert agrees(model)
    assert packed(model) == [True, True]
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})
    assert agrees(model)
    with torch.no_grad():
        torch._foreach_lerp_(list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()], 0.3)
    assert agrees(model)
    model.to(torch.float64).to(torch.float32)
    assert agrees(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0].weight.zero_()
    assert agrees(copied)
    assert agrees(model)


@pytest.mark.parametrize("training", [True, False])
def test_fused_optimisers_which_leave_no_trace_in_a_weights_version_are_noticed(model, training):
    """With gradients, in either mode, nothing stays packed; without, the product is that of the stepped weights."""
    assert agrees(model)
    model.train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    model(torch.randn(5, 24)).square().mean().backward()
    optimizer.step()
    assert packed(model) == [False, False]
    model.eval()
    assert agrees(model)
    assert packed(model) == [training, training]


def test_training_half_precision_and_gradients_take_the_plain_way(model):
    x = torch.randn(5, 24)
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert packed(model) == [False, False]
    gradients = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(gradient is not None for gradient in gradients)


def test_rows_that_plain_kernels_are_quicker_for_are_not_packed(monkeypatch, model):
    """One row never; hundreds only by the kernels that gain by it; either way the product is the plain one."""
    monkeypatch.setattr(packed_linear, "MAX_PACKED_ROWS", 32)
    with torch.inference_mode():
        for rows in (1, 33, 500):
            assert is_plain(model, torch.randn(rows, 24))
        assert packed(model) == [False, False]
        assert is_plain(model, torch.randn(4, 8, 24))
        assert packed(model) == [True, True]
    monkeypatch.setattr(packed_linear, "MAX_PACKED_ROWS", None)
    pack_linears(another := nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False)).eval())
    with torch.inference_mode():
        assert is_plain(another, torch.randn(500, 24))
    assert packed(another) == [True, True]


def test_weights_of_any_address_give_the_same_bits(model):
    x = torch.randn(500, 24)
    moved = copy.deepcopy(model)
    for parameter in moved.parameters():
        room = torch.empty(parameter.numel() + 1)
        parameter.data = room[1:].view(parameter.shape).copy_(parameter.data)
    assert all(parameter.data_ptr() % packed_linear.ALIGNMENT for parameter in moved.parameters())
    align_weights(moved)
    assert not any(parameter.data_ptr() % packed_linear.ALIGNMENT for parameter in moved.parameters())
    with torch.inference_mode():
        assert torch.equal(moved(x), model(x))
