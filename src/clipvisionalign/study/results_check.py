"""Validation of the block "results" of report.json: figures over the whole gallery, of audited models.

`check_results` runs before a report is written and after one is read. It refuses anything else, such as recall inside
a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clipvisionalign.study.statistics import (
    COMPARED_METRICS,
)  # fmt: skip

PROTOCOL = "whole gallery, all captions, ties against the model"
TERCILES = ("short", "middle", "long")


class ResultsError(ValueError):
    """Something that is no result was about to be written as one."""


_ESTIMATE = dict.fromkeys(("value", "low", "high", "spread", "p"))
_METRICS = dict.fromkeys((*COMPARED_METRICS, "image_to_text map", "text_to_image map"), _ESTIMATE)
_DIRECTION_METRICS = dict.fromkeys(
    ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank", "map", "map_at_r"), _ESTIMATE
)
_BY_LENGTH = {"captions": None, "recall_at_1": _ESTIMATE, "recall_at_5": _ESTIMATE}
_GALLERY = {"images": None, "captions": None}
_DIFFERENCE = {
    **_ESTIMATE,
    **dict.fromkeys(("a", "b", "figure", "p_holm", "seeds", "shown", "primary", "sequential", "image_std", "rest_std")),
}
_RUN = {
    **_GALLERY, **dict.fromkeys(("seed", "protocol", "chance", "audit")), "rsum": _ESTIMATE,
    "image_to_text": _DIRECTION_METRICS, "text_to_image": _DIRECTION_METRICS,
}  # fmt: skip


#: All that the block "results" is made of: keys and what is below them. A list's one entry is of all that a list, or a
#: dict under names that are a study's own, holds; None is of what is looked into no further.
RESULTS_STRUCTURE: dict[str, Any] = {
    **dict.fromkeys(("split", "protocol", "identities", "units", "choice", "unpaired", "refused", "lengths", "until")),
    "gallery": _GALLERY,
    "near_duplicates": {"images": None, "groups": None},
    "variants": [{
        "seeds": None, "runs": [_RUN], "figures": _METRICS, "dual": _METRICS, "gain": _ESTIMATE,
        "by_length": dict.fromkeys((*TERCILES, "all"), _BY_LENGTH),
    }],
    "chance": dict.fromkeys(_METRICS),
    "differences": [_DIFFERENCE],
    "by_length_differences": [{**_DIFFERENCE, "third": None}],
    "composition": [[{**_ESTIMATE, **dict.fromkeys(("kind", "variant", "pairs", "units", "p_holm"))}]],
}  # fmt: skip


def check_results(report: dict[str, Any]) -> None:
    """Check that every figure of the block "results" is one of a whole gallery.

    Args:
        report: The document.

    Raises:
        ResultsError: It holds another figure, or one of a model that failed its audit.
    """
    results = report["results"]
    _check_structure(results, RESULTS_STRUCTURE, "results")
    gallery = report["data"]["gallery"]
    if results["gallery"] != gallery or results["protocol"] != PROTOCOL:
        raise ResultsError(
            f"results: measured on {results['gallery']} by '{results['protocol']}', the data has {gallery}"
        )
    for name, variant in results["variants"].items():
        if [run["seed"] for run in variant["runs"]] != variant["seeds"]:
            raise ResultsError(f"results of {name}: runs and seeds differ")
        for run in variant["runs"]:
            location = f"results of {name}, seed {run['seed']}"
            if run.get("protocol") != PROTOCOL:
                raise ResultsError(f"{location}: not measured on the whole gallery")
            if {kind: run.get(kind) for kind in ("images", "captions")} != gallery:
                raise ResultsError(
                    f"{location}: a gallery of {run.get('images')} and {run.get('captions')}, not {gallery}"
                )
            if not run.get("audit", {}).get("passed"):
                raise ResultsError(f"{location}: its audit did not pass: its figures mean nothing")
        _check_means(name, variant)
    for block in ("differences", "by_length_differences"):
        for row in results[block]:
            if unknown := {row["a"], row["b"]} - set(results["variants"]):
                raise ResultsError(f"results.{block}: {', '.join(sorted(unknown))} has no results")


def _check_means(name: str, variant: dict[str, Any]) -> None:
    """A variant's figures are the means of its audited runs, and of nothing else."""
    for metric, mean in variant["figures"].items():
        direction, _, kind = metric.partition(" ")
        run_estimates = [run["rsum"] if metric == "rsum" else run[direction][kind] for run in variant["runs"]]
        factor = 1.0 if metric == "rsum" else 100.0
        if abs(mean["value"] - factor * float(np.mean([each["value"] for each in run_estimates]))) > 1e-3:
            raise ResultsError(f"results of {name}: {metric} is not the mean of its runs")


def _check_structure(node: Any, structure: Any, path: str) -> None:
    """Raises ResultsError for a key that the structure does not have: whatever stands there, it is no result."""
    if isinstance(structure, list):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in pairs:
            _check_structure(value, structure[0], f"{path}.{key}")
    elif isinstance(node, dict) and structure is not None:
        for key, value in node.items():
            if key not in structure:
                raise ResultsError(f"{path}.{key}: no part of a study's results")
            _check_structure(value, structure[key], f"{path}.{key}")
