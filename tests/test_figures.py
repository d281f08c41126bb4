"""The figures of a report: axes from where a reader expects, fronts and differences where they were shown, all that was
spent."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_reports import cost_round, made_report

from clipvisionalign.study.report.example_groups import EXAMPLE_GROUPS, shown_examples
from clipvisionalign.study.report.examples import choose_examples
from clipvisionalign.study.report.plots.accuracy import plot_accuracy
from clipvisionalign.study.report.plots.captions import plot_composition, plot_length
from clipvisionalign.study.report.plots.cost import (
    dearer_and_better,
    front_note,
    pareto_front,
    plot_length_time,
    plot_memory,
    plot_time,
)
from clipvisionalign.study.report.plots.training import plot_curves
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.parts import Examples
from clipvisionalign.study.report.tables import build_tables
from clipvisionalign.study.report.tables.accuracy import interval_note


def plotted(report: dict[str, Any], draw: Any) -> tuple[Any, str]:
    """The axes of a figure and all that is said of it."""
    from matplotlib import pyplot

    figure, *texts = draw(StudyReport.of(report))
    pyplot.close(figure)
    return figure.axes, " ".join(texts)


def results_of(rows: list[dict[str, Any]], rsum: dict[str, float]) -> Any:
    """The block "results" with differences in rsum and each variant's own, and nothing else."""
    differences = [
        SimpleNamespace(metric=row["figure"], **{k: row[k] for k in ("a", "b", "value", "shown")}) for row in rows
    ]
    variants = {name: SimpleNamespace(metrics={"rsum": SimpleNamespace(value=value)}) for name, value in rsum.items()}
    return SimpleNamespace(differences=differences, variants=variants)


def table(report: dict[str, Any], name: str) -> dict[str, dict[str, str]]:
    """A table's cells by row and column."""
    (report_table,) = [each for each in build_tables(report) if each.name == name]
    return {row[0]: dict(zip(report_table.columns, row, strict=True)) for row in report_table.rows}


def rounds(host: float, device: float | None = None, count: int = 3, spread: float = 4.0) -> list[dict[str, Any]]:
    return [cost_round(host=host + spread * turn, device=None if device is None else device + spread * turn) for turn in range(count)]  # fmt: skip


@pytest.mark.parametrize("device", [None, 700.0])
def test_memory_begins_at_zero_and_has_a_front_where_one_was_shown(device):
    """Processes of nearly the same size, of which none is smaller beyond its own rounds."""
    costs = {name: rounds(2036 + n, None if device is None else device + n) for n, name in enumerate(("self", "late"))}
    report = made_report({"self": 0.2, "late": 0.9}, [0], costs=costs)
    (axes,), alt_text = plotted(report, plot_memory)
    assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0
    assert "front" not in alt_text
    assert "differ by no more than one variant does" in alt_text
    assert ("GPU" in axes.get_xlabel()) == (device is not None)
    assert 0.8 * axes.get_xlim()[1] < (device or 2036) * 1.15
    assert ("peak GPU MiB" in table(report, "cost")["self"]) == (device is not None)
    costs = {"self": rounds(900, device), "late": rounds(1800, device and 2 * device)}
    (axes,), alt_text = plotted(made_report({"self": 0.2, "late": 0.9}, [0], costs=costs), plot_memory)
    assert "Dotted: the front" in alt_text
    # Dearer, and not shown to find more.
    (axes,), alt_text = plotted(made_report({"self": 0.5, "late": 0.5}, [0], costs=costs), plot_memory)
    assert "None that costs more was shown to find more" in alt_text
    assert "front" not in axes.get_legend_handles_labels()[1]
    # Once is not often enough to tell.
    costs = {name: several[:1] for name, several in costs.items()}
    (axes,), alt_text = plotted(made_report({"self": 0.2, "late": 0.9}, [0], costs=costs), plot_memory)
    assert "was not measured" in alt_text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=5), st.data())
def test_each_of_a_front_costs_more_and_was_shown_to_find_more(points, data):
    names = [f"v{n}" for n in range(len(points))]
    ranges = {name: (float(cost), cost + 0.01) for name, (cost, _) in zip(names, points, strict=True)}
    value = {name: value for name, (_, value) in zip(names, points, strict=True)}
    rows = [
        {"a": a, "b": b, "figure": "rsum", "value": value[a] - value[b], "shown": value[a] != value[b] and data.draw(st.booleans())}
        for i, a in enumerate(names) for b in names[i + 1 :]
    ]  # fmt: skip
    front = pareto_front(names, ranges, results_of(rows, value))
    assert len(front) != 1
    for a, b in itertools.pairwise(front):
        assert ranges[b][0] > ranges[a][1]
        assert any({row["a"], row["b"]} == {a, b} and row["shown"] for row in rows)
        assert value[b] > value[a]


def test_recalls_and_sums_begin_at_zero():
    report = made_report({"self": 0.8, "late": 0.81, "cross": 0.8}, [0], images=60, pairs={"count": 8})
    for draw in (plot_accuracy, plot_length, plot_composition):
        (axes,), _ = plotted(report, draw)
        assert axes.get_ylim()[0] == 0
        for line in axes.lines:
            assert np.nanmax(np.append(line.get_ydata(), 0)) <= axes.get_ylim()[1]


@pytest.mark.parametrize("old", [False, True])
def test_what_a_variant_starts_from_counts_in_steps_and_time(old):
    """Of one on another, and of that one on a third; in figures and tables alike."""
    report = made_report(dict.fromkeys(("self", "late", "cross"), 0.5), costs={n: rounds(900) for n in ("self", "late", "cross")},
                         bases={"late": "self", "cross": "late"})  # fmt: skip
    for curve in report["curves"] if old else []:
        del curve["before"]
    axes, alt_text = plotted(report, plot_curves)
    for each in axes:
        assert each.get_xlim()[0] == 0
        assert sorted({tuple(line.get_xdata()) for line in each.lines}) == [(10, 20), (30, 40), (50, 60)]
    assert "cross, seed 1: 200.0 at step 60, the first 40 of them those of late" in alt_text
    costs = table(report, "cost")
    assert [costs[name]["training steps"] for name in ("self", "late", "cross")] == ["20", "40", "60"]
    assert [costs[name]["training s"] for name in ("self", "late", "cross")] == ["10", "20", "30"]


def test_what_went_before_counts_where_its_own_measurement_failed(tmp_path):
    base = tmp_path / "cells" / "self-0"
    base.mkdir(parents=True)
    (base / "results.json").write_text('{"training_seconds": 7.0, "steps": 15}')
    report = made_report({"self": 0.5, "late": 0.5}, [0], missing=[("self", 0)], bases={"late": "self"}, study=tmp_path,
                         costs={"late": rounds(900)})  # fmt: skip
    assert table(report, "cost")["late"]["training s"] == "17"
    assert plotted(report, plot_curves)[0][0].lines[0].get_xdata().tolist() == [25, 35]


def test_a_variant_without_its_first_seed_is_in_the_legend_and_in_no_mean_of_more():
    report = made_report({"self": 0.5, "late": 0.5}, [0, 1, 2], missing=[("late", 0)])
    axes, _ = plotted(report, plot_curves)
    assert axes[1].get_legend_handles_labels()[1] == ["self", "late (2 of 3 seeds)"]
    assert interval_note(StudyReport.of(report)).startswith("mean of 2 to 3 seeds")
    both = made_report({"self": 0.5, "late": 0.5}, [0, 1, 2], missing=[("late", 0), ("self", 2)])
    assert interval_note(StudyReport.of(both)).startswith("mean of 2 seeds")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 1000))
def test_examples_are_what_their_group_is_called(variants, captions, seed):
    rng = np.random.default_rng(seed)
    ranks = rng.choice([1, 2, 7, 9, 10, 11, 300], (variants, captions))
    owners = rng.integers(0, max(1, captions // 2), captions)
    chosen = choose_examples(ranks, owners, 3)
    for kind, indices in chosen.items():
        assert len({owners[p] for p in indices}) == len(indices) <= 3
        for p in indices:
            column = ranks[:, p]
            assert (column == 1).all() if kind == "found by all" else (column > 10).any()
            assert (column > 10).all() if kind == "found by none" else (column == 1).any()
    # One that fits is shown.
    fitting = {"found by all": (ranks == 1).all(0), "found by none": (ranks > 10).all(0)}
    assert all(bool(chosen[kind]) == bool(some.any()) for kind, some in fitting.items())
    # Nor does the order of the file decide, where it is not asked.
    order = rng.permutation(captions)
    shuffled = rng.permutation(captions)
    again = choose_examples(ranks[:, shuffled], owners[shuffled], 3, order[shuffled])
    assert {kind: [int(shuffled[p]) for p in indices] for kind, indices in again.items()} == choose_examples(
        ranks, owners, 3, order
    )


def test_examples_of_a_report_from_before_there_was_a_rule_are_shown_where_they_fit():
    groups = {
        kind: [
            {"image": "", "caption": "", "picture": "", "ranks": {"a": a, "b": b}}
            for a, b in ((1, 1), (7, 9), (1, 18), (40, 50))
        ]
        for kind in EXAMPLE_GROUPS
    }
    examples = Examples.model_validate({"groups": groups})
    shown = {kind: [tuple(one.ranks.values()) for one in some] for kind, _, some in shown_examples(examples)}
    assert shown == {"found by all": [(1, 1)], "found by none": [(40, 50)], "where they disagree": [(1, 18)]}
    assert not re.search("7|9", str([description for description, _ in EXAMPLE_GROUPS.values()]))


@pytest.mark.parametrize(("factor", "is_told"), [(1.0, True), (1.3, True), (40.0, False)])
def test_lines_of_time_that_are_no_further_apart_than_processes_are_told_so(factor, is_told):
    costs = {name: [cost_round(each), cost_round(1.4 * each)] for name, each in (("self", 2.0), ("late", 2.0 * factor))}
    _, about = plotted(made_report(seeds=[0], costs=costs), plot_length_time)
    assert ("differ by no more than one variant does" in about) == is_told


@pytest.mark.parametrize(
    ("long", "expected"), [(2.0, "differ by no more"), (90.0, "at 512 tokens, at other lengths none")]
)
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_said_of_times_by_length_is_of_the_times_that_are_drawn(long, expected, count):
    """Not of the time of the data's own captions, which may be alike while long ones are not."""

    def rounds_of(end: float) -> list[dict[str, Any]]:
        lengths = [{"tokens": 8, "ms_alone": 2.0}, {"tokens": 512, "ms_alone": end}]
        return [cost_round(2.0) | {"by_length": lengths} for _ in range(count)]

    report = made_report(seeds=[0], costs={"self": rounds_of(2.0), "late": rounds_of(long)})
    _, about = plotted(report, plot_length_time)
    # Of one process the spread is not known, and it is not told as one.
    expected = expected if count > 1 or long > 2 else "was not measured: none is shown to cost less"
    assert expected in about
    assert ("from process to process" in about) == (count > 1)
    # Reports from before each round kept them.
    for cost in report["cost"].values():
        for each in cost["rounds"]:
            del each["by_length"]
    assert expected in plotted(report, plot_length_time)[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=2, max_size=4), st.data())
def test_that_none_dearer_finds_more_is_said_only_where_no_pair_contradicts_it(points, data):
    names = [f"v{n}" for n in range(len(points))]
    ranges = {name: (float(cost), cost + 0.6) for name, (cost, _) in zip(names, points, strict=True)}
    rows = [
        {"a": a, "b": b, "figure": "rsum", "value": x - y, "shown": x != y and data.draw(st.booleans())}
        for (a, (_, x)), (b, (_, y)) in itertools.combinations(zip(names, points, strict=True), 2)
    ]
    results = results_of(rows, {name: value for name, (_, value) in zip(names, points, strict=True)})
    better = dearer_and_better(names, ranges, results)
    note = front_note(pareto_front(names, ranges, results), names, "", better)
    contradicting = [
        row
        for row in rows
        for more, less in [(row["a"], row["b"]) if row["value"] > 0 else (row["b"], row["a"])]
        if row["shown"] and ranges[more][0] > ranges[less][1] + 0.6
    ]
    assert note.startswith("None") == (not contradicting)


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_spread_between_rounds_is_told_of_where_there_are_several(rounds):
    costs = {name: [cost_round(2.0 + turn / 100) for turn in range(rounds)] for name in ("self", "late")}
    report = made_report(seeds=[0], costs=costs)
    from matplotlib import pyplot

    for draw in (plot_time, plot_memory, plot_length_time):
        about = draw(StudyReport.of(report))[2]
        assert ("from process to process" in about) == (rounds > 1)
        assert ("The spread of one variant was not measured" in about) == (rounds == 1)
        assert ("highest round" in about) == (rounds > 1 and draw is not plot_length_time)
    pyplot.close("all")
