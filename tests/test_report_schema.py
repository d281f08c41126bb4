"""The typed report: what report.json has to hold, what earlier reports lack, and the schema that is published."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from made_reports import cost_round, made_report
from test_report_files import REPORTS

from clipvisionalign.study.report.build import read_report, write_report
from clipvisionalign.study.report.schema import ReportError, StudyReport, json_schema
from clipvisionalign.study.report.summary import report_claims

PUBLISHED = Path(__file__).parents[1] / "docs" / "reference" / "report.schema.json"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return made_report(
        {"self": 0.4, "late": 0.5}, costs={"self": [cost_round()], "late": [cost_round()]}, dual={"late": 0.3}
    )


def test_the_published_schema_is_the_one_of_the_code():
    """`python -m clipvisionalign.study.report.schema > docs/reference/report.schema.json` writes it."""
    assert PUBLISHED.read_text() == json_schema()


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_earlier_reports_are_read_and_written_unchanged(name: str, tmp_path: Path):
    document = read_report(REPORTS[name])
    typed = StudyReport.of(document)
    assert typed.document is document
    assert list(typed.results.variants) == list(document["results"]["variants"])
    write_report(tmp_path, document)
    written = json.loads(REPORTS[name].read_text())
    assert (tmp_path / "report.json").read_text() == json.dumps(written, indent=2) + "\n"


def test_a_new_report_has_every_key_that_is_not_optional_and_keeps_its_numbers(report):
    typed = StudyReport.of(report)
    for name, variant in report["results"]["variants"].items():
        assert typed.results.variants[name].metrics["rsum"].value == variant["figures"]["rsum"]["value"]
    assert type(typed.cost["self"].parameters) is int
    assert type(typed.cost["self"].peak_memory_mib) is float
    assert StudyReport.of(typed) is typed


def test_the_summary_states_near_duplicates_where_there_are_some(report):
    assert not any("near-duplicates" in claim["text"] for claim in report_claims(report))
    several = copy.deepcopy(report)
    several["results"] |= {"near_duplicates": {"images": 4, "groups": 2}, "units": 38}
    (claim,) = [claim for claim in report_claims(several) if "near-duplicates" in claim["text"]]
    assert claim["text"] == (
        "4 images of the gallery are near-duplicates, in 2 groups: a group counts as one in intervals and p."
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("results", "variants", "self", "seeds"), "zero"),
        (("results", "differences", 0, "shown"), None),
        (("data", "gallery"), {"images": 40}),
        (("cost", "self", "ms_per_picture"), {"median": "2"}),
        (("claims", 0, "figures"), None),
    ],
)
def test_what_is_no_report_is_refused_with_its_key(report, path, value, tmp_path: Path):
    faulty = copy.deepcopy(report)
    inside = faulty
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    (tmp_path / "report.json").write_text(json.dumps(faulty))
    for attempt in (lambda: read_report(tmp_path), lambda: write_report(tmp_path / "out", faulty)):
        with pytest.raises(ReportError, match=".".join(map(str, path))):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_report_cannot_be_changed_through_its_type(report):
    with pytest.raises(ValueError, match="frozen"):
        StudyReport.of(report).title = "another"
