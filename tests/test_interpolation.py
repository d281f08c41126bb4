"""Weights between a fine-tuned model and its base."""

from __future__ import annotations

import pytest
import torch

from clipvisionalign.adaptation.interpolation import interpolate_weights, unshared_names


def states() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A tuned model and its base: weights of both, a count, and a part that the tuned one alone has."""
    generator = torch.Generator().manual_seed(0)
    shared = {"text_tower.w": (3, 4), "image_tower.bn.running_var": (4,), "log_scale": (1,)}
    tuned, base = ({name: torch.rand(*shape, generator=generator) for name, shape in shared.items()} for _ in range(2))
    tuned |= {"count": torch.tensor(7), "late.token.weight": torch.ones(2, 2)}
    base |= {"count": torch.tensor(5)}
    return tuned, base


@pytest.mark.parametrize(("alpha", "which"), [(0.0, 1), (1.0, 0)])
def test_the_ends_are_the_two_models_to_the_last_bit(alpha, which):
    """Also where the other end is not finite, which a product with 0 would carry over."""
    both = states()
    both[1 - which]["text_tower.w"][0, 0] = float("nan")
    blended = interpolate_weights(*both, alpha)
    for name in ("text_tower.w", "image_tower.bn.running_var", "log_scale"):
        assert torch.equal(blended[name], both[which][name])


def test_weights_lie_between_and_other_tensors_are_the_tuned_ones():
    """Float tensors of both are interpolated, variances stay positive; counts and new parts are kept."""
    tuned, base = states()
    blended = interpolate_weights(tuned, base, 0.3)
    assert set(blended) == set(tuned)
    for name in ("text_tower.w", "image_tower.bn.running_var", "log_scale"):
        assert torch.allclose(blended[name], base[name] + 0.3 * (tuned[name] - base[name]), atol=1e-6)
        assert not torch.equal(blended[name], tuned[name])
    assert bool((blended["image_tower.bn.running_var"] > 0).all())
    assert blended["count"].item() == 7
    assert torch.equal(blended["late.token.weight"], tuned["late.token.weight"])


def test_the_scales_are_averaged_as_logarithms_and_the_higher_limit_clips_neither():
    """Half way between temperatures 1/10 and 1/1000 is 1/100, though one model's limit is below that."""
    tuned = {"log_scale": torch.tensor([1000.0]).log(), "max_log_scale": torch.tensor([1000.0]).log()}
    base = {"log_scale": torch.tensor([10.0]).log(), "max_log_scale": torch.tensor([50.0]).log()}
    blended = interpolate_weights(tuned, base, 0.5)
    assert blended["log_scale"].exp().item() == pytest.approx(100.0, rel=1e-4)
    assert blended["max_log_scale"].exp().item() == pytest.approx(1000.0, rel=1e-4)


def test_dtypes_are_the_tuned_ones_and_the_sum_is_taken_in_double_precision():
    """In half precision the weights themselves would lose digits before they are added."""
    step = 2.0**-10
    tuned = {"w": torch.tensor([1.0 + step], dtype=torch.float16)}
    # Rounded to half precision first, the base would be 1, and the sum half way between two numbers.
    half = interpolate_weights(tuned, {"w": torch.tensor([1.0 + 0.45 * step])}, 0.5)["w"]
    assert (half.dtype, half.item()) == (torch.float16, 1.0 + step)
    wide = interpolate_weights({"w": torch.tensor([1.0 + 2.0**-23])}, {"w": torch.tensor([1.0 - 2.0**-24])}, 1 / 3)
    assert wide["w"].item() == 1.0


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_alpha_is_between_the_two(alpha):
    """No weights beyond either end."""
    with pytest.raises(ValueError, match="has to be from 0"):
        interpolate_weights(*states(), alpha)


def test_another_shape_is_refused_and_named():
    """A table of positions that one of them has stretched."""
    tuned, base = states()
    base["text_tower.w"] = torch.zeros(2, 4)
    assert unshared_names(tuned, base) == ["text_tower.w"]
    with pytest.raises(ValueError, match=r"text_tower\.w"):
        interpolate_weights(tuned, base, 0.5)


def test_a_late_interaction_on_top_is_no_other_architecture():
    """What only one of them has besides is."""
    tuned, base = states()
    assert unshared_names(tuned, base) == []
    base["text_tower.more"] = torch.zeros(1)
    del base["log_scale"]
    assert unshared_names(tuned, base) == ["log_scale", "text_tower.more"]
