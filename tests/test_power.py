"""What a study can show, and when it stops adding seeds: promises hold in simulated studies, and in a real one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipvisionalign.cli import main
from clipvisionalign.study.config import Comparison, Measurements, Plan, Until, Variant
from clipvisionalign.study.plan_file import plan_text
from clipvisionalign.study.power import (
    ASSURANCE,
    POWER,
    DifferenceSpread,
    promised_half_width,
    seeds_for_width,
    shown_difference,
    spread_of_difference,
)
from clipvisionalign.study.runner import run_study
from clipvisionalign.study.sequential import SEQUENTIAL_LEVEL, interval_at_look, looks_at, stopped_by
from clipvisionalign.study.statistics import estimate, half_width, mean_squares, pairwise_differences
from clipvisionalign.study.validation import PlanError
from clipvisionalign.study.verify import verify_report

#: Standard deviations over images, between seeds, and of the rest: kinds in which stopping costs the most.
KINDS = [(20.0, 7.0, 60.0), (20.0, 14.0, 60.0), (60.0, 7.0, 60.0)]


def studies(kind: tuple[float, float, float], number: int, seeds: int, images: int, seed: int) -> np.ndarray:
    """(number, S, N) differences of two variants that do not differ."""
    image, of_seed, rest = kind
    rng = np.random.default_rng(seed)
    return (
        rng.normal(0, image, (number, 1, images))
        + rng.normal(0, of_seed, (number, seeds, 1))
        + rng.normal(0, rest, (number, seeds, images))
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_stopping_by_the_width_keeps_the_error(kind):
    """Of 700 studies each, whose first narrow enough look, or last one, is taken: 2,100 in all."""
    images, max_seeds, number = 60, 10, 700
    # A width that takes some seeds more than three.
    width = 2.6 * np.sqrt((kind[1] ** 2 + kind[2] ** 2 / images) + kind[0] ** 2 / images)
    missed = {SEQUENTIAL_LEVEL: 0, 0.05: 0}
    counts = []
    for table in studies(kind, number, max_seeds, images, seed=1):
        of_seeds = dict(enumerate(table))
        looks = looks_at(of_seeds, {seed: np.zeros(images) for seed in of_seeds}, "rsum")
        at = next((each for each in looks if each["high"] - each["low"] <= width), looks[-1])
        missed[SEQUENTIAL_LEVEL] += not at["low"] <= 0 <= at["high"]
        counts.append(len(at["seeds"]))
        for seeds in range(3, max_seeds + 1):
            margin = half_width(mean_squares(table[:seeds]), seeds, images, 0.05)
            if 2 * margin <= width or seeds == max_seeds:
                missed[0.05] += abs(table[:seeds].mean()) > margin
                break
    assert missed[SEQUENTIAL_LEVEL] <= 0.06 * number + 2 * np.sqrt(number * 0.06 * 0.94) * (number < 2000)
    assert missed[SEQUENTIAL_LEVEL] < missed[0.05]
    assert 3 < np.mean(counts) < max_seeds


@pytest.mark.parametrize("kind", [(40.0, 0.0, 110.0), (40.0, 5.0, 110.0), (10.0, 14.0, 60.0)], ids=str)
@pytest.mark.parametrize(("probe", "seeds", "images"), [((3, 200), 5, 200), ((4, 150), 3, 300), ((3, 200), 8, 100)])
def test_an_interval_is_no_wider_than_promised_in_nine_of_ten_studies(kind, probe, seeds, images):
    number = 400
    kept = 0
    pairs = zip(studies(kind, number, *probe, seed=2), studies(kind, number, seeds, images, seed=3), strict=True)
    for one, other in pairs:
        [row] = pairwise_differences({"rsum": {"a": dict(enumerate(one)), "b": dict(enumerate(0 * one))}})
        spread = spread_of_difference(row.to_dict(), probe[1], "")
        assert spread is not None
        assert spread.seed_std == pytest.approx(one.mean(axis=1).std(ddof=1))
        kept += half_width(mean_squares(other), seeds, images) <= promised_half_width(spread, seeds, images)
    assert kept >= ASSURANCE * number - 2 * np.sqrt(number * 0.09)


@pytest.mark.parametrize("kind", [(40.0, 0.0, 110.0), (10.0, 14.0, 60.0)], ids=str)
@pytest.mark.parametrize("seeds", [3, 8])
def test_the_difference_that_can_be_shown_is_shown_in_four_of_five_studies(kind, seeds):
    images, number = 200, 500
    spread = DifferenceSpread(kind[0], kind[2], float(np.hypot(kind[1], kind[2] / np.sqrt(images))), 1000, images, "")
    difference = shown_difference(spread, seeds, images)
    shown = sum(
        abs(table.mean() + difference) > half_width(mean_squares(table), seeds, images)
        for table in studies(kind, number, seeds, images, seed=4)
    )
    assert shown / number == pytest.approx(POWER, abs=3 * np.sqrt(POWER * (1 - POWER) / number))


def test_more_seeds_and_images_narrow_what_is_promised_down_to_what_the_images_leave():
    spread = DifferenceSpread(40.0, 110.0, 4.0, 5, 1000, "")
    widths = [promised_half_width(spread, seeds, 1000) for seeds in range(2, 20)]
    assert widths == sorted(widths, reverse=True)
    assert promised_half_width(spread, 1000, 1000) > 1.96 * 40 / np.sqrt(1000)
    assert promised_half_width(spread, 3, 4000) < promised_half_width(spread, 3, 1000)
    assert seeds_for_width(spread, 1000, 4.0, 0.05, 12) is None, "the images alone are wider"
    count = seeds_for_width(spread, 1000, 20.0, 0.05, 12)
    assert count is not None
    assert 2 * promised_half_width(spread, count, 1000) <= 20 < 2 * promised_half_width(spread, count - 1, 1000)


def test_a_look_needs_three_seeds_and_no_sign_decides_it():
    table = studies((20.0, 5.0, 60.0), 1, 5, 60, seed=5)[0]
    assert interval_at_look(table[:2], "rsum") is None
    assert interval_at_look(table[:, :5], "rsum") is None
    for sign in (1, -1):
        value, low, high = interval_at_look(sign * table, "rsum")
        assert high - value == pytest.approx(value - low)
        assert high - low == pytest.approx(2 * half_width(mean_squares(table), 5, 60, SEQUENTIAL_LEVEL))
    assert stopped_by([], 5.0, 12, 12) == "seeds"
    # The last one decides: with seeds that were trained at once, those before were never looked at.
    looks = [{"low": 0.0, "high": 1.0}, {"low": 0.0, "high": 9.0}]
    assert stopped_by(looks, 5.0, 5, 12) == "not yet"
    assert stopped_by(looks[::-1], 5.0, 5, 12) == "width"


def test_where_no_two_images_differ_a_look_has_the_interval_of_what_was_not_seen():
    for table in (np.zeros((3, 200)), np.full((3, 200), 6.0)):
        _, low, high = interval_at_look(table, "rsum")
        wide = estimate(table, (-600, 600))
        assert high - low > wide.high - wide.low > 1


@pytest.fixture
def small_plan(plan: Plan) -> Plan:
    """Two variants, of which more seeds than one are added."""
    return replace(
        plan, seeds=[4], variants={"self": Variant(), "late": Variant()}, settings={**plan.settings, "epochs": 1},
        measure=Measurements(rounds=0, brief=True, composition=0, audit_images=12, examples=0, protocol=False),
        compare=Comparison(a="late", b="self", passes="any"),
    )  # fmt: skip


@pytest.mark.slow
def test_seeds_are_added_until_the_interval_is_narrow_or_none_is_left(small_plan: Plan, tmp_path: Path, capsys):
    plan = replace(small_plan, until=Until(width=1200.0, max_seeds=5))
    report = run_study(plan, tmp_path / "study")
    until = report["results"]["until"]
    assert until["stopped"] == "width"
    assert report["plan"]["seeds"] == [4, 5, 6]
    assert [each["seeds"] for each in until["looks"]] == [[4, 5, 6]]
    [row] = [row for row in report["results"]["differences"] if row["figure"] == "rsum"]
    assert row["sequential"]
    assert (row["low"], row["high"]) == (until["looks"][-1]["low"], until["looks"][-1]["high"])
    assert row["p_holm"] == row["p"]
    # Narrower: one seed more, and no training of before is repeated. The original plan, with its one seed, resumes it.
    ended = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob("cells/*/results.json")}
    narrower = replace(plan, until=Until(width=0.001, max_seeds=4))
    report = run_study(narrower, tmp_path / "study")
    assert report["results"]["until"]["stopped"] == "seeds"
    assert report["plan"]["seeds"] == [4, 5, 6, 7]
    assert {path: path.stat().st_mtime_ns for path in ended} == ended
    looks = report["results"]["until"]["looks"]
    assert [len(each["seeds"]) for each in looks] == [3, 4]
    assert looks[0] == until["looks"][0]
    assert any("is not, with all seeds that the plan allows" in claim["text"] for claim in report["claims"])
    assert [part for part in verify_report(tmp_path / "study") if part.state == "fails"] == []
    again = run_study(narrower, tmp_path / "study")
    assert again["results"] == report["results"]
    # What another study can show is computed by the spread of this one.
    (tmp_path / "plan.yaml").write_text(plan_text(small_plan))
    like = ["--like", str(tmp_path / "study"), "--until", "50", "--dry-run"]
    assert main(["study", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "new"), *like]) == 0
    lines = capsys.readouterr().err
    assert f"by the spread of {tmp_path / 'study'}" in lines
    assert "an interval 50 wide" in lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare": Comparison()}, "give 'compare: "),
        ({"seeds": [0, 1, 2, 3, 4, 5]}, "below the 6 seeds"),
        ({"until": Until(width=-1.0)}, "greater than or equal to 0"),
        ({"until": Until(width=2.0, max_seeds=2)}, "greater than or equal to 3"),
    ],
    ids=["no comparison", "more seeds", "a negative width", "two seeds"],
)
def test_what_cannot_be_is_refused(small_plan: Plan, tmp_path: Path, change: dict[str, Any], message: str):
    plan = replace(small_plan, **{"until": Until(width=2.0, max_seeds=5), **change})
    with pytest.raises(PlanError, match=message):
        run_study(plan, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_plan_without_a_width_is_written_as_before(small_plan: Plan):
    assert "until" not in small_plan.to_dict()
    assert json.loads(json.dumps(replace(small_plan, until=Until(3.0)).to_dict()))["until"] == {
        "width": 3.0, "max_seeds": 12
    }  # fmt: skip


def test_max_seeds_needs_a_width(tmp_path: Path, capsys):
    assert main(["study", "demo", "--out", str(tmp_path / "s"), "--max-seeds", "5"]) == 1
    assert "counts with --until" in capsys.readouterr().err
