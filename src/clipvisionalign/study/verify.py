"""Verifies a report: derives every figure again from the ranks and measurements that lie beside it.

Ranks alone show whether a report holds what they give. Whether the models give these ranks is shown by `with_models`,
which encodes the gallery again: where ranks and figures were changed together, nothing else can.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipvisionalign.data.sealed_split import SEAL_FILE
from clipvisionalign.json_io import read_json
from clipvisionalign.log import leave_out
from clipvisionalign.models.io import load_aligner
from clipvisionalign.progress import progress
from clipvisionalign.retrieval.evaluate import RANKS_FILE, load_ranks
from clipvisionalign.retrieval.metrics import metrics_of_ranks
from clipvisionalign.study.aggregate import TrialResult
from clipvisionalign.study.assemble import assemble_report
from clipvisionalign.study.config import Trial, trial_folder
from clipvisionalign.study.data import StudyContext
from clipvisionalign.study.foils import foil_accuracy
from clipvisionalign.study.folder import PLAN_FILE
from clipvisionalign.study.gaps import Gaps, measurements_hash
from clipvisionalign.study.report.build import read_report, study_folder
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.runner import ADDED_PART, open_kept_study
from clipvisionalign.study.seal import seal_fault
from clipvisionalign.study.trial import audit_aligner, evaluate_aligner
from clipvisionalign.study.trials import measure_trials

logger = logging.getLogger(__name__)

#: Blocks of a report that are of the machine, not derived from anything that is kept.
NOT_DERIVED = ("machine", "versions", "commands")
#: What a caller of `run_study` added to a report; it is kept nowhere else.
ADDED = ("search",)
#: Relative difference of two figures that are the same: additions in another order.
TOLERANCE = 1e-6
#: Share of a model's ranks that have to be the kept ones: on another processor, near ties fall otherwise.
EQUAL_RANKS = 0.98
#: How far a recall, in points, or rsum may be from that of the kept ranks for that reason.
RECALL_POINTS, RSUM_POINTS = 0.5, 1.0
#: A number in a sentence.
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
#: Longer texts are images in base64.
_LONGEST_TEXT = 5000


@dataclass(frozen=True)
class VerifiedPart:
    """One part of a report, and whether it holds.

    Attributes:
        part: What was looked at.
        state: "holds", "fails", or "not verified".
        detail: The first figure that does not hold, with what it is derived to; or why nothing was verified.
    """

    part: str
    state: Literal["holds", "fails", "not verified"]
    detail: str = ""


def verify_report(study: str | Path, with_models: bool = False) -> list[VerifiedPart]:
    """Derive the figures of a report again from what lies beside it.

    Args:
        study: A study's folder, or the report.json in it.
        with_models: Also encode the gallery with each model, and compare ranks, audits and minimal pairs.

    Returns:
        Each part with whether it holds, in the order of the report.

    Raises:
        ValueError: There is no report.json, or it is no JSON.
    """
    folder = study_folder(study)
    if not (folder / "report.json").is_file():
        raise ValueError(f"{study}: no report.json there; 'clipvisionalign study PLAN --out {study}' makes one")
    report = read_json(folder / "report.json", f"'clipvisionalign study PLAN --out {folder}' makes one")
    parts = list(_verify_itself(folder, report))
    if parts[0].state == "fails":
        return parts
    if not (folder / PLAN_FILE).is_file() or not measurements_hash(folder):
        reason = "no ranks and measurements lie beside the report: it is consistent in itself, and not derived again"
        return [*parts, VerifiedPart("figures by the ranks", "not verified", reason)]
    gaps = Gaps(folder)
    try:
        context, trials = open_kept_study(folder, gaps)
    except (ValueError, OSError) as error:
        return [*parts, VerifiedPart("figures by the ranks", "not verified", str(error))]
    counts_units = "units" in report["results"]
    if not counts_units:
        # Of before: images that are nearly the same counted as any others.
        context = replace(context, eval_data=replace(context.eval_data, near_duplicates=()))
    with leave_out(lambda record: True):
        measured = measure_trials(context, trials, gaps)
        if "seal" in report or (folder / SEAL_FILE).is_file():
            finished = [trial_folder(folder, result.variant, result.seed) for result in measured]
            parts.append(_part("seal", seal_fault(folder, context.plan, context.data, finished)))
            if parts[-1].state == "fails":
                return [*parts, VerifiedPart("figures by the ranks", "not verified", "its seal does not hold")]
        derived = assemble_report(context, trials, measured, gaps)
        if not counts_units:
            del derived["results"]["units"]
    parts.append(_verify_data(report, derived))
    parts += _verify_trainings(context, trials, measured)
    parts += _verify_blocks(report, derived)
    if not with_models:
        reason = "whether the models give the ranks that are kept: --models encodes the gallery again"
        return [*parts, VerifiedPart("ranks by the models", "not verified", reason)]
    by_key = {(trial.variant, trial.seed): trial for trial in trials}
    for result in progress(measured, "encoding by each model", len(measured)):
        parts.append(_verify_model(context, by_key[result.variant, result.seed], result))
    return parts


def _verify_itself(folder: Path, report: dict[str, Any]) -> Iterator[VerifiedPart]:
    """What a report shows without anything beside it: its structure, means over runs, and its sentences."""
    try:
        read_report(folder)
    except ValueError as error:
        yield VerifiedPart("structure, and means over runs", "fails", str(error))
        return
    yield VerifiedPart("structure, and means over runs", "holds")
    yield _verify_sentences(report, report_claims(report), "sentences by the figures")


def _parts_not_made(report: dict[str, Any]) -> list[list[str]]:
    return sorted([each["part"], each["of"]] for each in report["not_made"] if each["part"] != ADDED_PART)


def _verify_sentences(report: dict[str, Any], claims: Sequence[Any], part: str) -> VerifiedPart:
    """Whether each sentence has the numbers of one that the figures make; another version may have other words."""
    derived = _as_json(claims)
    if report["claims"] == derived:
        return VerifiedPart(part, "holds")
    own = {tuple(_NUMBER.findall(claim["text"])) for claim in derived}
    for number, claim in enumerate(report["claims"]):
        if claim not in derived and tuple(_NUMBER.findall(claim["text"])) not in own:
            return VerifiedPart(part, "fails", f"claims.{number}: no sentence of the figures has these numbers: "
                                f"{_short(claim['text'])}")  # fmt: skip
    return VerifiedPart(part, "holds", "in other words than this version's")


def _verify_data(report: dict[str, Any], derived: dict[str, Any]) -> VerifiedPart:
    """Whether the data set is the one that was measured, by the content of its files."""
    return _part("data set by its content", first_difference(report["data"], _as_json(derived["data"]), "data"))


def _verify_trainings(
    context: StudyContext, trials: Sequence[Trial], measured: Sequence[TrialResult]
) -> Iterator[VerifiedPart]:
    """The dev figures that each training recorded, by the ranks that it kept."""
    finished = {(result.variant, result.seed) for result in measured}
    for trial in trials:
        if (trial.variant, trial.seed) not in finished:
            continue
        name = f"results.json of {trial.folder.name}"
        try:
            stated = read_json(trial.folder / "results.json", "")
            ranks = load_ranks(trial.folder / RANKS_FILE)
        except (OSError, ValueError) as error:
            yield VerifiedPart(name, "not verified", str(error))
            continue
        dev = context.data.split("dev") if "dev" in context.data.split_sizes() else None
        if trial.config.dev_data or dev is None or len(dev) != len(ranks["ranks"].image_to_text):
            yield VerifiedPart(name, "not verified", "its dev split is another one than the study's data has")
            continue
        figures = metrics_of_ranks(ranks["ranks"], dev.caption_image, 0, unit=dev.image_identity).to_dict()
        derived = {way: _values(figures[way]) for way in ("rsum", "image_to_text", "text_to_image")}
        kept = {way: _values(stated.get(way)) for way in derived}
        yield _part(name, first_difference(kept, derived, trial.folder.name))


def _verify_blocks(report: dict[str, Any], derived: dict[str, Any]) -> Iterator[VerifiedPart]:
    """Every block of the report by the one that is derived."""
    added = [name for name in ADDED if name in report]
    # Why a part could not be made is known to the process that tried; a part that was added is in the report alone.
    stated = report | {"not_made": _parts_not_made(report)}
    derived = derived | {"not_made": _parts_not_made(derived)} | {name: report[name] for name in added}
    yield _verify_sentences(report, report_claims(derived | {"not_made": report["not_made"]}), "claims")
    report = stated
    for name in sorted(report.keys() | derived.keys() - {"data"}):
        if name in (*NOT_DERIVED, "data", "claims", *added):
            continue
        yield _part(name, first_difference(report.get(name), _as_json(derived.get(name)), name))
    for name in (*NOT_DERIVED, *added):
        if name in report:
            yield VerifiedPart(name, "not verified", "it is kept in the report alone")


def _verify_model(context: StudyContext, trial: Trial, result: TrialResult) -> VerifiedPart:
    """The kept ranks, audit and minimal pairs of a run by its model."""
    name, data = f"{trial.folder.name} by its model", context.eval_data
    if context.plan.split == "dev" and result.measurements["chosen"].get("by") == "halves":
        reason = "its ranks are cross-fitted, by checkpoints of the training that are not kept"
        return VerifiedPart(name, "not verified", reason)
    aligner = load_aligner(trial.folder, trial.config.device)
    passed = audit_aligner(aligner, context).passed
    if passed != result.measurements["audit"]["passed"]:
        return VerifiedPart(name, "fails", f"audit: passed is {result.measurements['audit']['passed']}, not {passed}")
    evaluation = evaluate_aligner(aligner, data, resamples=0)
    for block, kept in result.ranks.items():
        own = evaluation.ranks_by_name[block]
        same = np.concatenate([
            (getattr(own, way) == getattr(kept, way)).ravel() for way in ("image_to_text", "text_to_image")
        ])  # fmt: skip
        figures = [
            metrics_of_ranks(ranks, data.caption_image, 0, unit=data.image_identity).to_dict() for ranks in (kept, own)
        ]
        if far := _far_figure(*figures):
            return VerifiedPart(name, "fails", f"{block}: {far}")
        if same.mean() < EQUAL_RANKS:
            share = f"{100 * float(same.mean()):.1f} % of the kept {block} are the model's"
            return VerifiedPart(name, "fails", f"{share}; {100 * EQUAL_RANKS:.0f} % at least on another processor")
    for set_name, pairs in context.pairs.items():
        kinds = foil_accuracy(aligner, pairs)
        for kind, outcomes in kinds.items():
            kept_outcomes = result.measurements["composition"].get(set_name, {}).get(kind)
            if kept_outcomes is None or np.mean(np.equal(outcomes, kept_outcomes)) < EQUAL_RANKS:
                return VerifiedPart(name, "fails", f"minimal pairs of '{set_name}', {kind}: not those of the model")
    return VerifiedPart(name, "holds")


def _far_figure(kept: dict[str, Any], of_model: dict[str, Any]) -> str:
    """The first figure of kept ranks that is further from the model's than rounding explains; "" for none."""
    if abs(kept["rsum"]["value"] - of_model["rsum"]["value"]) > RSUM_POINTS:
        return f"rsum {kept['rsum']['value']:.2f}, by the model {of_model['rsum']['value']:.2f}"
    for way in ("image_to_text", "text_to_image"):
        for metric, estimate in kept[way].items():
            other = of_model[way][metric]["value"]
            if metric.startswith("recall") and 100 * abs(estimate["value"] - other) > RECALL_POINTS:
                return f"{way} {metric} {100 * estimate['value']:.2f}, by the model {100 * other:.2f}"
    return ""


def _values(block: Any) -> Any:
    """The values of estimates, without their intervals."""
    if isinstance(block, dict):
        return block["value"] if "value" in block else {name: _values(each) for name, each in block.items()}
    return block


def _as_json(value: Any) -> Any:
    """A value as it is after it was written to a file and read again."""
    return json.loads(json.dumps(value))


def _part(name: str, difference: str) -> VerifiedPart:
    return VerifiedPart(name, "fails", difference) if difference else VerifiedPart(name, "holds")


def first_difference(stated: Any, derived: Any, path: str) -> str:
    """Where two JSON values differ first.

    Args:
        stated: What a report holds.
        derived: What is derived.
        path: The name of the values.

    Returns:
        The path of the first difference with both values; "" where they are equal, numbers up to `TOLERANCE`.

    >>> first_difference({"a": [1, 2.0]}, {"a": [1, 2.5]}, "results")
    'results.a.1: 2.0, derived: 2.5'
    >>> first_difference({"a": 1.0}, {"a": 1.0 + 1e-9}, "results")
    ''
    """
    if isinstance(stated, dict) and isinstance(derived, dict):
        for name in dict.fromkeys((*derived, *stated)):
            if name not in stated or name not in derived:
                return f"{path}.{name}: {'left out' if name not in stated else 'not derived from anything'}"
            if difference := first_difference(stated[name], derived[name], f"{path}.{name}"):
                return difference
        return ""
    if isinstance(stated, list) and isinstance(derived, list):
        if len(stated) != len(derived):
            return f"{path}: {len(stated)} entries, derived: {len(derived)}"
        pairs = enumerate(zip(stated, derived, strict=True))
        return next((each for i, (a, b) in pairs if (each := first_difference(a, b, f"{path}.{i}"))), "")
    if _is_number(stated) and _is_number(derived):
        equal = math.isclose(stated, derived, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        return "" if equal else f"{path}: {stated}, derived: {derived}"
    if isinstance(stated, str) and isinstance(derived, str) and min(len(stated), len(derived)) > _LONGEST_TEXT:
        # An image that a model drew: its last digits are the processor's.
        return ""
    equal = stated == derived and isinstance(stated, bool) == isinstance(derived, bool)
    return "" if equal else f"{path}: {_short(stated)}, derived: {_short(derived)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def parts_as_json(parts: Sequence[VerifiedPart]) -> list[dict[str, str]]:
    """Parts as JSON has them.

    Args:
        parts: What `verify_report` returns.

    Returns:
        A dictionary for each.
    """
    return [asdict(part) for part in parts]
