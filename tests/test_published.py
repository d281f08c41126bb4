"""The figures that docs/ publishes: behind the fence, and every number of their summary traced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipvisionalign.study.report.build import read_report
from clipvisionalign.study.report.claims.claim import lookup, numbers_in
from clipvisionalign.study.report.summary import report_claims

PUBLISHED = sorted((Path(__file__).parents[1] / "docs" / "results").glob("*/report.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_each_claim_of_a_published_report_is_traced_to_its_figures(path):
    report = read_report(path)
    readme = (path.parent / "README.md").read_text()
    assert report_claims(report) == report["claims"]
    for claim in report["claims"]:
        shown = [figure["shown"] for figure in claim["figures"]]
        assert sorted(numbers_in(claim["text"])) == sorted(shown)
        for figure in claim["figures"]:
            value = lookup(report, figure["path"])
            if figure["form"] != "count":
                value = value * float(figure["factor"])
                assert figure["shown"] == format(
                    round(value) if figure["form"].endswith("d") else value, figure["form"]
                )
        assert claim["text"] in readme


def test_there_is_one():
    assert PUBLISHED
    assert all(json.loads(path.read_text())["examples"]["groups"] == {} for path in PUBLISHED), (
        "pictures have a licence"
    )
