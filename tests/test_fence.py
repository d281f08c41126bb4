"""What is no result does not get into the results, by their structure; and no name of a variant is taken for one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_reports import made_report

from clipvisionalign.study.flawed_protocols import IN_BATCH_SIZES
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.report.tables import build_tables
from clipvisionalign.study.results_check import ResultsError, check_results

#: The figure of another protocol, as `measure_flawed_protocols` gives it.
IN_BATCH = {
    "protocol": f"inside batches of {IN_BATCH_SIZES[0]}",
    "honest": False,
    "of": IN_BATCH_SIZES[0],
    "recall_at_1": 0.9,
}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    skills = {"self": 0.3, "late": 0.4, "cross": 0.5}
    return made_report(skills, pairs={"relation": 40}, dual={"cross": 0.3}, refused=[("self", 1)])


def test_a_variant_may_be_named_by_any_word():
    names = ["batch-256", "leaky", "in-batch", "shown", "image_to_text", "refused", "results", "audit", "1", "rsum"]
    report = made_report(dict.fromkeys(names, 0.4), images=12, pairs={"a batch of leaks": 20})
    check_results(report)
    assert set(report["results"]["variants"]) == set(names)
    assert report_claims(report)
    assert build_tables(report)


def test_a_published_report_still_passes():
    kept = Path(__file__).parent.parent / "docs" / "results" / "flickr8k-small" / "report.json"
    check_results(json.loads(kept.read_text()))


def parts(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every dict below whose keys are of the structure, and not names or free text of a study's own."""
    if isinstance(node, dict):
        if path and path not in {("variants",), ("composition",)}:
            yield path
        for key, value in node.items():
            if key not in ("audit", "unpaired", "refused", "lengths", "chance"):
                yield from parts(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node[:1]):
            yield from parts(value, (*path, index))


def test_a_figure_of_another_protocol_is_refused_wherever_it_is_put(made):
    check_results(made)
    paths = [(), *parts(made["results"])]
    assert len(paths) > 60
    for path in paths:
        tampered = copy.deepcopy(made)
        inside = tampered["results"]
        for part in path:
            inside = inside[part]
        inside["recall inside a mini-set"] = IN_BATCH
        with pytest.raises(ResultsError):
            check_results(tampered)


@pytest.mark.parametrize("key", ["by_length_differences", "differences"])
def test_a_difference_is_of_variants_that_have_results(made, key):
    tampered = copy.deepcopy(made)
    tampered["results"][key][0]["a"] = "gone"
    with pytest.raises(ResultsError, match="gone"):
        check_results(tampered)


def test_a_variant_of_another_protocol_is_refused(made):
    tampered = copy.deepcopy(made)
    tampered["results"]["variants"]["in batches"] = {"seeds": [0], "runs": [{"seed": 0, **IN_BATCH}], "figures": {}}
    with pytest.raises(ResultsError):
        check_results(tampered)
