"""The audits of a run, each stored with its model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.hashes import changed_keys, dataset_hashes, run_hash
from clipvisionalign.data.run_data import data_record
from clipvisionalign.json_io import read_json, write_json

#: In a run's folder: the audit that was made last, and under "earlier" those of the same model on other data. A study
#: keeps its own with what it measured.
AUDITS, MEASURED = "audit.json", "measured.json"


def keep_audit(run: Path, results: dict[str, Any], part: CaptionedImages) -> None:
    """Keep an audit in the run folder, beside those of the same model on other data.

    Those of another model are dropped.

    Args:
        run: The run folder.
        results: What `audit --json` prints.
        part: The gallery that was audited.
    """
    asked = {"model": run_hash(run), **dataset_hashes(part)}
    earlier = [each for each in _kept_in(run) if each["asked"]["model"] == asked["model"] and each["asked"] != asked]
    write_json(run / AUDITS, {**results, "asked": asked, "earlier": earlier})


def audits_of(run: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The audits of the model of a run, as it is now.

    Args:
        run: The run folder.

    Returns:
        The audit on the run's own dev split (of several the one that failed; None where there is none), and those on
        other data. One that does not record which model it is of is ignored.
    """
    model, dev = run_hash(run), data_record(run).get("dev", {}).get("contents")
    kept = [each for each in [*_kept_in(run), *_measured_in(run)] if each["asked"]["model"] == model]
    own = [each for each in kept if each.get("split") == "dev" and dev and not changed_keys(each["asked"], dev)]
    # Of two on the same data the one that failed.
    return min(own, key=lambda each: each["passed"], default=None), [each for each in kept if each not in own]


def is_of_unknown_model(run: Path) -> bool:
    """Whether the last audit of a run was kept by an earlier version, which did not record which model it is of.

    Args:
        run: The run folder.

    Returns:
        Whether it was; false where there is no audit.
    """
    return "checks" in (contents := _read(run / AUDITS)) and "asked" not in contents


def _kept_in(run: Path) -> list[dict[str, Any]]:
    last = _read(run / AUDITS)
    several = [last, *last.pop("earlier", [])] if last else []
    # One of an earlier version does not record what it is of.
    return [each for each in several if "model" in each.get("asked", {})]


def _measured_in(run: Path) -> list[dict[str, Any]]:
    results = _read(run / MEASURED)
    asked = results.get("asked", {})
    return (
        [{**results["audit"], "split": asked["split"], "asked": asked}]
        if "model" in asked and "audit" in results
        else []
    )


def _read(path: Path) -> dict[str, Any]:
    contents = read_json(path) if path.is_file() else {}
    return contents if isinstance(contents, dict) else {}
