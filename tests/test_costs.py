"""Figures of time and memory: kept with all that they depend on, compared under the same conditions alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_reports import check_numbers, cost_round, gallery, made_report
from test_figures import plotted

from clipvisionalign.log import log_to
from clipvisionalign.study import cost_rounds
from clipvisionalign.study.config import Measurements, Trial
from clipvisionalign.study.cost import current_conditions, select_same_conditions
from clipvisionalign.study.data import StudyContext
from clipvisionalign.study.gaps import Gaps
from clipvisionalign.study.report.compare import compare_reports
from clipvisionalign.study.report.costs import MS_PER_CAPTION, no_comparison_reason
from clipvisionalign.study.report.plots.cost import plot_length_time, plot_memory, plot_time
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.report.tables import build_tables

NAMES = ("self", "late")


def _study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`_costs` of two trained cells, measured at once; what it measures, and what it says."""
    measured: list[str] = []

    def profile(cell: Path, *about: Any) -> dict[str, Any]:
        measured.append(cell.name)
        return {
            **cost_round(),
            "machine": {name: current_conditions()[name] for name in ("processor", "threads", "device")},
        }

    monkeypatch.setattr(cost_rounds, "profile_run", profile)
    monkeypatch.setattr(cost_rounds, "run_hash", lambda cell: f"the model in {cell.name}")
    configs: Any = {n: SimpleNamespace(data="made", layout="auto", out=folder / "cells" / f"{n}-0") for n in NAMES}
    cells = [Trial(name, 0, config) for name, config in configs.items()]
    plan: Any = SimpleNamespace(measure=Measurements(rounds=2), split="dev")

    def costs(only_kept: bool = False) -> tuple[dict[str, Any], list[str], list[dict[str, str]]]:
        measured.clear()
        gaps = Gaps(folder)
        subject = StudyContext(plan, folder, gallery(3), gallery(3), {}, None, only_kept)
        costs.said = []
        with log_to(costs.said.append):
            return cost_rounds.measure_cost_rounds(subject, cells, gaps), sorted(measured), gaps.parts

    return costs


def _elsewhere(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    here = current_conditions()
    monkeypatch.setattr(cost_rounds, "current_conditions", lambda: {**here, key: "another"})


@pytest.mark.parametrize("key", ["processor", "threads", "device", "torch", "clipvisionalign"])
def test_a_cost_is_used_again_under_the_conditions_that_it_was_measured_under(key, tmp_path, monkeypatch):
    """And not under others; a report, which measures nothing, takes it and tells where it was measured."""
    costs = _study(tmp_path, monkeypatch)
    assert costs()[1] == ["late-0", "late-0", "self-0", "self-0"]
    assert costs()[1] == []
    _elsewhere(monkeypatch, key)
    kept, measured, gaps = costs(only_kept=True)
    assert (measured, gaps) == ([], [])
    assert all(cost["measured_under"] == current_conditions() for cost in kept.values())
    kept, measured, _ = costs()
    assert len(measured) == 4
    assert all(cost["measured_under"][key] == "another" for cost in kept.values())


def test_rounds_of_several_machines_are_never_one_figure(tmp_path, monkeypatch):
    """A study that went on elsewhere and was stopped there: rounds of one machine only, the others are a gap."""
    costs = _study(tmp_path, monkeypatch)
    costs()
    for name, turns in (("self", (0,)), ("late", (0, 1))):
        for turn in turns:
            path = tmp_path / "costs" / f"{name}-{turn}.json"
            kept = json.loads(path.read_text())
            path.write_text(json.dumps({**kept, "asked": {**kept["asked"], "threads": 64}}))
    kept_costs, measured, gaps = costs(only_kept=True)
    assert measured == []
    assert {name: (cost["measured_under"]["threads"], len(cost["rounds"])) for name, cost in kept_costs.items()} == {
        "self": (64, 1),
        "late": (64, 2),
    }
    assert [gap["of"] for gap in gaps] == ["self, 1 of 2 rounds"]


def test_a_report_says_of_costs_of_another_model_what_they_are_of_and_measures_nothing(tmp_path, monkeypatch):
    costs = _study(tmp_path, monkeypatch)
    costs()
    monkeypatch.setattr(cost_rounds, "run_hash", lambda cell: "another model")
    kept, measured, gaps = costs(only_kept=True)
    assert (kept, measured) == ({}, [])
    assert [gap["reason"] for gap in gaps] == ["not the same as before: model"] * 2
    assert not any("measured again" in line for line in costs.said)


def test_costs_from_before_their_conditions_were_kept_are_told_with_their_machine(tmp_path, monkeypatch):
    costs = _study(tmp_path, monkeypatch)
    costs()
    for path in (tmp_path / "costs").glob("*.json"):
        kept = json.loads(path.read_text())
        kept["asked"] = {name: value for name, value in kept["asked"].items() if name not in current_conditions()}
        path.write_text(json.dumps(kept))
    kept_costs, measured, _ = costs(only_kept=True)
    assert measured == []
    assert kept_costs["self"]["measured_under"]["threads"] == current_conditions()["threads"]
    assert "torch" not in kept_costs["self"]["measured_under"]
    assert len(costs()[1]) == 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=4))
def test_rounds_of_a_variant_are_of_one_machine_and_none_is_lost_unsaid(machines):
    rounds = {
        f"v{n}": [{"asked": {"model": "m", "threads": threads}, "turn": turn} for turn, threads in enumerate(several)]
        for n, several in enumerate(machines)
    }
    kept, left = select_same_conditions(rounds, ["model"])
    for name, several in rounds.items():
        assert len({each["measured_under"]["threads"] for each in kept[name]}) == bool(several)
        assert len(kept[name]) + left.get(name, 0) == len(several)
        assert all("asked" not in each for each in kept[name])


def _of_two_machines(**other: Any) -> dict[str, Any]:
    """A report whose second variant was found to be far dearer, and better, on another machine."""
    costs = {"self": [cost_round(2.0, 900)] * 2, "late": [cost_round(20.0, 9000, pairs=9.0)] * 2}
    report = made_report({"self": 0.2, "late": 0.9}, [0], costs=costs)
    for name, cost in report["cost"].items():
        cost["measured_under"] = {"processor": "P", "threads": 2, "torch": "2.0"} | (other if name == "late" else {})
    report["claims"] = report_claims(report)
    return report


@pytest.mark.parametrize("other", [{"threads": 8}, {"processor": "Q"}, {"torch": "3.0"}, {}])
def test_what_was_measured_under_other_conditions_is_not_compared(other):
    report = _of_two_machines(**other)
    claims = {claim["text"].split(" ")[0]: claim for claim in report["claims"] if claim["about"] == "cost"}
    for claim in claims.values():
        check_numbers(report, claim)
    for first in ("Encoding", "Scoring", "The"):
        assert ("so that none is shown to take less" in claims[first]["text"]) == bool(other)
    # Bytes are the same everywhere.
    assert "1,024 bytes with every variant" in claims["To"]["text"]
    for draw in (plot_time, plot_memory, plot_length_time):
        (axes,), text = plotted(report, draw)
        assert ("not measured on one machine under the same conditions" in text) == bool(other)
        assert not (other and "front" in axes.get_legend_handles_labels()[1])
    for name in ("cost", "latency"):
        (table,) = [each for each in build_tables(report) if each.name == name]
        if other:
            ((key, value),) = other.items()
            assert "not to be compared" in table.note
            assert f"self: {key} {report['cost']['self']['measured_under'][key]}; late: {key} {value}." in table.note
        else:
            assert "Measured on: P, 2 threads, PyTorch 2.0." in table.note


def test_seconds_of_training_of_several_machines_are_told(tmp_path):
    report = _of_two_machines()
    for name, cost in report["cost"].items():
        cost["trained_under"] = [{"processor": "P"}, {"processor": "Q"}][: 1 + (name == "late")]
    (table,) = [each for each in build_tables(report) if each.name == "cost"]
    assert (
        "seconds of training are not to be compared: self: processor P; late: processor P and processor Q" in table.note
    )


def test_studies_that_were_measured_elsewhere_are_told_so_whatever_machine_made_their_reports():
    report, other = _of_two_machines(), _of_two_machines()
    assert compare_reports(report, other)[1] == []
    for cost in other["cost"].values():
        cost["measured_under"] = {**cost["measured_under"], "threads": 8}
    tables, differing = compare_reports(report, other)
    assert differing == ["time and memory: threads: A 2, B 8"]
    notes = {table.name: table.note for table in tables}
    assert "Not all are known to be measured on one machine" in notes["ms_per_caption"]
    assert notes["training_seconds"] == ""


@pytest.mark.parametrize("lacking", [("self",), ("late",), ("self", "late"), ()])
def test_variants_without_a_figure_of_the_gpus_memory_are_named(lacking):
    """They are not dropped from the plot of memory unsaid; without any such figure it is of whole processes."""
    costs = {name: [cost_round(device=None if name in lacking else 700.0)] * 2 for name in ("self", "late", "cross")}
    names = dict.fromkeys(costs, 0.5)
    report = made_report(names, [0], costs=costs)
    (axes,), alt_text = plotted(report, plot_memory)
    shown = axes.get_legend_handles_labels()[1]
    assert "GPU" in axes.get_xlabel()
    assert [name for name in costs if name in shown] == [name for name in costs if name not in lacking]
    assert (f"not measured of them: {', '.join(lacking)}." in alt_text) == bool(lacking)
    (text,) = [claim["text"] for claim in report["claims"] if claim["text"].startswith("Its memory on the GPU")]
    assert ("with every variant" in text) == (not lacking)
    for name in lacking:
        assert f"`{name}`" in text.partition("Of ")[2]


def test_of_three_of_which_two_differ_those_are_told():
    """One that was measured badly hides no difference of the two others, and no sentence says that there is none."""
    costs = {"self": [cost_round(2.0)] * 2, "late": [cost_round(8.0)] * 2, "cross": [cost_round(1.0), cost_round(30.0)]}
    report = made_report(dict.fromkeys(costs, 0.5), [0], costs=costs)
    (text,) = [claim["text"] for claim in report["claims"] if claim["text"].startswith("Encoding")]
    assert text == "Encoding a caption takes 2 ms with `self` and 8 ms with `late`."
    assert no_comparison_reason(StudyReport.of(report).cost, list(costs), MS_PER_CAPTION) == ""
    assert copy.deepcopy(report)["claims"] == report_claims(report)
