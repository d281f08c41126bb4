"""The figures that docs/ publishes: behind the fence, and every number of their summary traced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipvisionalign.study.report import read_report
from clipvisionalign.study.words import at, claims_of, numbers_in

PUBLISHED = sorted((Path(__file__).parents[1] / "docs" / "results").glob("*/report.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_each_claim_of_a_published_report_is_traced_to_its_figures(path):
    report = read_report(path)
    told = (path.parent / "README.md").read_text()
    assert claims_of(report) == report["claims"]
    for claim in report["claims"]:
        shown = [figure["shown"] for figure in claim["figures"]]
        assert sorted(numbers_in(claim["text"])) == sorted(shown)
        for figure in claim["figures"]:
            value = at(report, figure["path"])
            if figure["form"] != "count":
                value = value * float(figure["factor"])
                assert figure["shown"] == format(
                    round(value) if figure["form"].endswith("d") else value, figure["form"]
                )
        assert claim["text"] in told


def test_there_is_one():
    assert PUBLISHED
    assert all(json.loads(path.read_text())["examples"]["groups"] == {} for path in PUBLISHED), (
        "pictures have a licence"
    )
