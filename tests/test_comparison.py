"""Two studies side by side, and a report that is named by its file."""

from __future__ import annotations

import copy
import json

import pytest
from made_reports import cost_round, made_report

from clipvisionalign.cli import main
from clipvisionalign.study.report.compare import compare_reports
from clipvisionalign.study.report.html import render_comparison

NOTHING = "Nothing: the same data, plan, machine and versions."


def page(a, b) -> str:
    return render_comparison("two", ("A", "B"), *compare_reports(a, b))


@pytest.fixture(scope="module")
def report() -> dict:
    costs = {name: [cost_round(2.0 + turn / 100) for turn in range(3)] for name in ("self", "late")}
    return made_report(costs=costs)


def test_a_study_beside_itself_differs_in_nothing(report):
    tables, differing = compare_reports(report, report)
    assert differing == []
    assert NOTHING in page(report, report)
    assert [row[3] for row in tables[0].rows] == ["overlap", "overlap", ""]
    assert all(row[3:] == ["1.00", "no"] for table in tables[1:-1] for row in table.rows)


@pytest.mark.parametrize("which", [0, 1])
def test_a_variant_that_one_of_them_lacks_is_told(report, which):
    """One that is not in its plan, and one that has no result there."""
    both = [report, report]
    both[which] = made_report({"self": 0.4}, [0])
    tables, _ = compare_reports(*both)
    row = next(row for row in tables[0].rows if row[0] == "late")
    assert row[1 + which] == "not in the plan"
    assert row[3] == ""
    both[which] = made_report(seeds=[0], missing=[("late", 0)])
    row = next(row for row in compare_reports(*both)[0][0].rows if row[0] == "late")
    assert row[1 + which] == "no result"
    assert row[3] == ""


@pytest.mark.parametrize(("a", "b"), [([0, 1], [0]), ([0], [0, 1, 2]), ([0], [0]), ([0, 1], [0, 1])])
def test_how_many_seeds_stand_behind_an_interval_is_told_beside_it(a, b):
    both = made_report(seeds=a), made_report(seeds=b)
    (table, *_), _ = compare_reports(*both)
    for seeds, column in ((a, 1), (b, 2)):
        note = f"({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        assert all(row[column].endswith(note) for row in table.rows[:-1])
    assert ("images only" in table.note) == (1 in (len(a), len(b)))
    assert ("; B: " in table.note) == (len(a) != len(b))
    fewer = made_report(seeds=[0, 1, 2], missing=[("late", 0)])
    late = next(row for row in compare_reports(fewer, both[1])[0][0].rows if row[0] == "late")
    assert late[1].endswith("(2 of 3 seeds)")


def test_a_variant_of_one_plan_alone_is_one_line(report):
    one = made_report({"self": 0.4})
    for both, side in (((report, one), "A"), ((one, report), "B")):
        lines = [line for line in compare_reports(*both)[1] if "late" in line and line.startswith(("plan", "variant"))]
        assert lines == [f"variant late: in {side}'s plan alone"]


def _fingerprint(report):
    report["data"]["fingerprint"] = "another"


def _other_bytes(report):
    report["data"]["contents"] = {**report["data"]["contents"], "pictures": "another"}


def _split(report):
    report["results"]["split"] = "test"


def _identity(report):
    report["data"]["identity"] = "caption"


def _gallery(report):
    report["data"]["gallery"] = {"images": 7, "captions": 14}


@pytest.mark.parametrize("change", [_fingerprint, _other_bytes, _split, _identity, _gallery])
def test_other_data_is_told_and_not_compared(report, change):
    other = copy.deepcopy(report)
    change(other)
    tables, differing = compare_reports(report, other)
    assert "the data is not the same" in differing[0]
    assert {row[3] for row in tables[0].rows} == {"other data", ""}
    assert NOTHING not in page(report, other)


@pytest.mark.parametrize("block", ["plan", "machine", "versions", "data"])
def test_whatever_else_differs_is_told(report, block):
    other = copy.deepcopy(report)
    other[block]["source" if block == "data" else "more"] = "elsewhere"
    tables, differing = compare_reports(report, other)
    assert len(differing) == 1
    assert "elsewhere" in differing[0]
    assert tables[0].rows[0][3] == "overlap"


def test_a_cost_that_differs_by_less_than_its_spread_does_not(report):
    other = copy.deepcopy(report)
    for each in other["cost"]["late"]["rounds"]:
        each["ms_per_caption"] *= 3
    other["cost"]["late"]["ms_per_caption"]["median"] *= 3
    table = next(table for table in compare_reports(report, other)[0] if table.name == "ms_per_caption")
    assert [row[3:] for row in table.rows] == [["1.00", "no"], ["3.00", "yes"]]


def test_a_report_is_known_by_its_file_too(report, tmp_path, capsys):
    study = tmp_path / "study"
    study.mkdir()
    report = copy.deepcopy(report)
    report["claims"].append({"about": "accuracy", "text": "Another version wrote this.", "figures": []})
    (study / "report.json").write_text(json.dumps(report))
    assert main(["report", str(study / "report.json")]) == 0
    assert "Another version" not in (study / "report.html").read_text() + (study / "report.json").read_text()
    assert {path.name for path in study.iterdir()} >= {"report.html", "report.json", "figures", "tables"}
    assert main(["report", str(study / "report.json"), "--compare", str(study / "report.json")]) == 0
    assert NOTHING in (study / "comparison.html").read_text()
    capsys.readouterr()
    (tmp_path / "kept.json").write_text(json.dumps(report))
    before = sorted(tmp_path.iterdir())
    assert main(["report", str(tmp_path / "kept.json")]) == 1
    assert "give a study's folder, or the report.json in it" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
