"""What is no result does not get into the results, by their structure; and no name of a variant is taken for one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_reports import made_report

from clipvisionalign.study.protocol import BATCHES
from clipvisionalign.study.results import FenceError, check_fence
from clipvisionalign.study.tables import tables_of
from clipvisionalign.study.words import claims_of

#: The figure of another protocol, as `other_protocols` gives it.
IN_BATCH = {"protocol": f"inside batches of {BATCHES[0]}", "honest": False, "of": BATCHES[0], "recall_at_1": 0.9}


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    skills = {"self": 0.3, "late": 0.4, "cross": 0.5}
    return made_report(skills, pairs={"relation": 40}, dual={"cross": 0.3}, refused=[("self", 1)])


def test_a_variant_may_be_named_by_any_word():
    names = ["batch-256", "leaky", "in-batch", "shown", "image_to_text", "refused", "results", "audit", "1", "rsum"]
    report = made_report(dict.fromkeys(names, 0.4), images=12, pairs={"a batch of leaks": 20})
    check_fence(report)
    assert set(report["results"]["variants"]) == set(names)
    assert claims_of(report)
    assert tables_of(report)


def test_a_published_report_still_passes():
    kept = Path(__file__).parent.parent / "docs" / "results" / "flickr8k-small" / "report.json"
    check_fence(json.loads(kept.read_text()))


def parts(found: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every dict below whose keys are of the structure, and not names or free text of a study's own."""
    if isinstance(found, dict):
        if path and path not in {("variants",), ("composition",)}:
            yield path
        for key, value in found.items():
            if key not in ("audit", "unpaired", "refused", "lengths", "chance"):
                yield from parts(value, (*path, key))
    elif isinstance(found, list):
        for place, value in enumerate(found[:1]):
            yield from parts(value, (*path, place))


def test_a_figure_of_another_protocol_is_refused_wherever_it_is_put(made):
    check_fence(made)
    places = [(), *parts(made["results"])]
    assert len(places) > 60
    for path in places:
        tampered = copy.deepcopy(made)
        inside = tampered["results"]
        for part in path:
            inside = inside[part]
        inside["recall inside a mini-set"] = IN_BATCH
        with pytest.raises(FenceError):
            check_fence(tampered)


@pytest.mark.parametrize("key", ["by_length_differences", "differences"])
def test_a_difference_is_of_variants_that_have_results(made, key):
    tampered = copy.deepcopy(made)
    tampered["results"][key][0]["a"] = "gone"
    with pytest.raises(FenceError, match="gone"):
        check_fence(tampered)


def test_a_variant_of_another_protocol_is_refused(made):
    tampered = copy.deepcopy(made)
    tampered["results"]["variants"]["in batches"] = {"seeds": [0], "runs": [{"seed": 0, **IN_BATCH}], "figures": {}}
    with pytest.raises(FenceError):
        check_fence(tampered)
