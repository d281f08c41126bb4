"""Dropout on a CPU: the share, the mean, the gradients and the random numbers of PyTorch's, for an eighth of the draws."""

import math

import pytest
import torch
from torch import nn

from clipvisionalign.models.dropout import Dropout, drop, replace_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_the_share_is_dropped_and_the_mean_stays(share, dtype):
    torch.manual_seed(0)
    n = 1_000_003
    dropped = drop(torch.ones(n, dtype=dtype), share).double()
    # Five standard deviations of a share.
    spread = 5 * math.sqrt(share * (1 - share) / n)
    assert abs(float((dropped == 0).double().mean()) - share) <= spread + 1 / 65536
    kept = dropped[dropped != 0].unique()
    assert len(kept) == 1
    assert abs(float(kept) * (1 - share) - 1) < 1e-3 + torch.finfo(dtype).eps


def test_elements_are_dropped_apart_from_each_other():
    """Four share a draw of 64 bits: none of them, in whatever distance, says anything of another."""
    torch.manual_seed(1)
    n = 1_000_000
    zero = (drop(torch.ones(n), 0.3) == 0).double() - 0.3
    for distance in range(1, 9):
        correlation = float((zero[distance:] * zero[:-distance]).mean()) / 0.21
        assert abs(correlation) < 5 / math.sqrt(n - distance), distance


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 0), (4, 4, 4)])
def test_gradients_go_where_values_went(shape):
    torch.manual_seed(2)
    x = torch.randn(shape, requires_grad=True)
    out = drop(x, 0.4)
    out.backward(torch.ones(shape))
    assert out.shape == x.shape
    scale = 65536 / (65536 - round(0.4 * 65536))
    expected = torch.where(out == 0, 0.0, torch.tensor(scale))
    assert torch.equal(x.grad, expected)
    assert torch.allclose(out, x * expected)


def test_rows_that_are_no_neighbours_in_memory():
    torch.manual_seed(3)
    x = torch.randn(6, 8).T.requires_grad_()
    out = drop(x, 0.5)
    out.sum().backward()
    assert torch.allclose(out, x * x.grad)


def test_a_seed_or_a_restored_state_repeats_what_is_dropped():
    x = torch.ones(1000)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first, second = drop(x, 0.5), drop(x, 0.5)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(first, drop(x, 0.5))
    assert torch.equal(second, drop(x, 0.5))


def test_the_ends_of_the_share():
    x = torch.randn(10)
    assert torch.equal(drop(x, 0.0), x)
    assert torch.equal(drop(x, 1.0), torch.zeros(10))
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            drop(x, share)


def test_what_is_no_number_stays_none():
    torch.manual_seed(5)
    x = torch.full((100,), float("nan"), requires_grad=True)
    assert torch.isnan(drop(x, 0.5)).all()
    gradient = torch.full((100,), float("inf"))
    drop(x, 0.5).backward(gradient)
    assert not torch.isfinite(x.grad).any()


def test_one_module_under_two_names_stays_one():
    model = nn.Module()
    model.first = model.second = nn.Dropout(0.3)
    replace_dropout(model)
    assert type(model.first) is Dropout
    assert model.first is model.second


def test_evaluation_drops_nothing():
    x = torch.randn(10)
    assert Dropout(0.5).eval()(x) is x
    assert not torch.equal(Dropout(0.5)(x), x)


def test_every_dropout_of_a_model_is_replaced_as_it_is():
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.2).eval()))
    replace_dropout(model)
    replaced = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [type(module) for module in replaced] == [Dropout, Dropout]
    assert [(module.p, module.training) for module in replaced] == [(0.1, True), (0.2, False)]


@pytest.mark.parametrize("design", ["self", "sparse", "late", "cross"])
def test_no_aligner_is_left_with_the_slow_one(design, tiny_model):
    from clipvisionalign import Aligner

    kinds = {type(module) for module in Aligner(tiny_model(design)).modules() if isinstance(module, nn.Dropout)}
    assert kinds == {Dropout}
