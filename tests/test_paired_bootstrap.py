"""A difference and a share of one paired bootstrap: they never contradict each other, and cover what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from clipvisionalign.adaptation.paired_bootstrap import PairedSamples


def drawn(images: int, seed: int) -> dict[str, np.ndarray]:
    """What each image brings to the rsum of a run and of its base: multiples of 100."""
    rng = np.random.default_rng(seed)
    base = rng.binomial(6, 0.5, images) * 100.0
    moved = 100.0 * rng.integers(-2, 4, images) * rng.binomial(1, 0.6, images)
    return {"base": base, "run": np.clip(base + moved, 0.0, 600.0)}


@pytest.mark.parametrize("images", [6, 10, 40])
def test_difference_share_and_p_answer_alike(images):
    sides = set()
    for seed in range(40):
        paired = PairedSamples.of(drawn(images, seed))
        difference, share = paired.difference("run", "base"), paired.share("run", "base")
        above, below = difference["low"] > 0, difference["high"] < 0
        assert (above, below) == (share["low"] > 1, share["high"] < 1), seed
        assert (difference["p"] < 0.05) == (above or below), seed
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert share["low"] <= share["value"] <= share["high"]
        reverse = paired.difference("base", "run")
        assert reverse["value"] == -difference["value"]
        assert reverse["p"] == pytest.approx(difference["p"])
        sides.add((above, below))
    assert len(sides) > 1


def test_ten_images_with_one_gain_show_nothing_and_ten_gains_show_one():
    base = np.full(10, 300.0)
    one = PairedSamples.of({"run": base + 100 * (np.arange(10) == 0), "base": base})
    assert one.difference("run", "base")["low"] == 0
    assert one.share("run", "base")["low"] == 1
    all_gain = PairedSamples.of({"run": base + 50 + np.arange(10), "base": base})
    assert all_gain.difference("run", "base")["low"] > 0
    assert all_gain.share("run", "base")["low"] > 1


def test_equal_images_leave_open_what_was_not_seen():
    """No variance among ten images is no certainty."""
    base = np.full(10, 300.0)
    for gain in (0.0, 10.0, 290.0):
        paired = PairedSamples.of({"run": base + gain, "base": base})
        difference, share = paired.difference("run", "base"), paired.share("run", "base")
        assert difference["low"] < gain < difference["high"]
        assert (difference["low"] > 0) == (share["low"] > 1)
        assert (difference["p"] < 0.05) == (difference["low"] > 0)


def test_too_few_images_have_no_interval_and_a_base_of_nothing_no_share():
    few = PairedSamples.of(drawn(5, 0))
    assert few.difference("run", "base")["low"] is None
    assert few.difference("run", "base")["p"] is None
    assert few.share("run", "base")["low"] is None
    nothing = PairedSamples.of({"run": np.full(10, 100.0), "base": np.zeros(10)})
    assert nothing.share("run", "base") == {"value": None, "low": None, "high": None}


def test_the_interval_covers_the_difference_of_ten_images():
    """Of 300 draws in which run and base are alike; a binomial's 0.1 % quantile at 95 % is 273."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        tables = {name: rng.binomial(6, 0.5, 10) * 100.0 for name in ("run", "base")}
        difference = PairedSamples.of(tables, seed).difference("run", "base")
        covered += difference["low"] <= 0 <= difference["high"]
    assert covered >= 273
