"""report.json: every figure of a study, and what is required to check and to repeat it; and the files made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.hashes import dataset_hashes
from clipvisionalign.data.scenes import is_scene_dataset
from clipvisionalign.files import atomic_write
from clipvisionalign.json_io import write_json
from clipvisionalign.models.device import library_versions, machine_info
from clipvisionalign.models.pretrained.known_checkpoints import pretraining_of
from clipvisionalign.models.run_files import CONFIG_FILE
from clipvisionalign.progress import progress_step
from clipvisionalign.retrieval.equal_captions import count_equal_captions
from clipvisionalign.study.aggregate import DrawnTogether, TrialResult, aggregate_results, pairs_share
from clipvisionalign.study.config import Plan, trial_folder
from clipvisionalign.study.documents import (
    BlindOutcomes,
    CostDocument,
    ExamplesDocument,
    TrainingQuantity,
    TruncationDocument,
)
from clipvisionalign.study.gaps import FAILED, Gaps, measurements_hash, trial_states
from clipvisionalign.study.report.bibliography import entries_for
from clipvisionalign.study.report.schema import ReportError, StudyReport
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.results_check import check_results
from clipvisionalign.training.halves import positives_of

REPORT_FORMAT = 1


def build_report(
    plan: Plan, study: Path, data: CaptionedImages, eval_data: CaptionedImages, trial_results: Sequence[TrialResult],
    gaps: Gaps, costs: Mapping[str, CostDocument], controls: BlindOutcomes, flawed_protocols: dict[str, Any] | None,
    examples: ExamplesDocument, truncation: Mapping[str, TruncationDocument] | None = None,
    together: DrawnTogether | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The whole report as report.json holds it; what has no results, or was not made, is in "cells" and "not_made".

    together: which minimal pairs were drawn together. Raises ResultsError where something in its results is none, and
    ReportError where the document is not a `StudyReport`.
    """
    results = aggregate_results(trial_results, eval_data, plan.split, plan.compare, together)
    positives = positives_of(eval_data)
    steps = _training_totals(plan, study, trial_results, "steps")
    passed = [(name, seed) for name, variant in results["variants"].items() for seed in variant["seeds"]]
    depths: dict[str, Any] = {}
    for result in trial_results:
        if result.measurements.get("depths"):
            depths.setdefault(result.variant, result.measurements["depths"])
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "title": plan.title,
        "plan": plan.to_dict(),
        "data": {
            "source": str(data.source),
            "layout": data.layout,
            "official_splits": data.official_splits,
            "splits": data.split_sizes(),
            "fingerprint": data.fingerprint(),
            "contents": contents_of(data),
            "gallery": {"images": len(eval_data), "captions": len(eval_data.captions)},
            "identity": eval_data.identity,
            "equal_captions": count_equal_captions(eval_data.caption_text_ids, positives).to_dict(),
            "drawn": is_scene_dataset(data.source),
            "left_out": [str(problem) for problem in data.problems if problem.effect == "left out"],
        },
        "results": results,
        "cut_captions": truncation or {},
        "text_only": blind_baseline(controls, together or {}),
        "cost": _cost_block(plan, study, trial_results, eval_data, costs, steps),
        "training_steps": steps,
        "curves": [
            {
                "variant": trial_result.variant,
                "seed": trial_result.seed,
                "before": int(_base_total(plan, study, trial_result, trial_results, "steps")),
                **trial_result.measurements["curves"],
            }
            for trial_result in trial_results
        ],
        "depths": depths,
        "what_it_would_have_looked_like": flawed_protocols,
        "examples": examples,
        "cells": trial_states(plan, gaps, passed, results["refused"]),
        "made_from": measurements_hash(study),
        "machine": machine_info(),
        "versions": library_versions(),
        "measured_by": _measured_by(trial_results),
        "commands": reproduction_commands(
            study, next(((result.variant, result.seed) for result in trial_results), None)
        ),
        "references": entries_for(plan, data),
    }
    if pretraining := _pretraining(study, trial_results):
        report["pretraining"] = pretraining
    add_gaps(report, gaps)
    StudyReport.of(report)
    check_results(report)
    return report


def _pretraining(study: Path, trial_results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """What the pretrained dual encoders that variants start from were trained on, as far as it is known: one entry a
    model."""
    entries: dict[str, dict[str, Any]] = {}
    for result in trial_results:
        folder = trial_folder(study, result.variant, result.seed)
        pretraining = pretraining_of(folder) if (folder / CONFIG_FILE).is_file() else None
        if pretraining is not None:
            entry = entries.setdefault(pretraining.model, {**pretraining.to_dict(), "variants": []})
            entry["variants"] += [result.variant] if result.variant not in entry["variants"] else []
    return list(entries.values())


def contents_of(data: CaptionedImages) -> dict[str, str]:
    """Hashes of what the whole data set holds, its images by their bytes."""
    with progress_step("reading the images, to recognise them"):
        return dataset_hashes(data)


def add_gaps(report: dict[str, Any], gaps: Gaps) -> None:
    """Put into a report what could not be made, and its summary, which lists that."""
    report["not_made"] = gaps.parts
    report["failed"] = [trial for trial in report["cells"] if trial["state"] == FAILED]
    report["claims"] = report_claims(report)


def blind_baseline(controls: BlindOutcomes, together: DrawnTogether) -> dict[str, list[dict[str, Any]]]:
    """The control beside the composition figures: in percent, by set and kind."""
    return {
        name: [
            {"kind": kind, **pairs_share([outcomes], together.get(name, {}).get(kind))}
            for kind, outcomes in kinds.items()
        ]
        for name, kinds in controls.items()
    }


def pairs_per_query(name: str, trial_results: Sequence[TrialResult], eval_data: CaptionedImages) -> int:
    """How many pairs a query scores: the whole gallery, or the candidates that a re-ranking looks at."""
    return next(
        (result.measurements.get("candidates", 0) for result in trial_results if result.variant == name), 0
    ) or len(eval_data)


def _cost_block(
    plan: Plan, study: Path, trial_results: Sequence[TrialResult], eval_data: CaptionedImages,
    costs: Mapping[str, CostDocument], steps: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The block "cost": each variant's measurement, with its training and the time of a query."""
    trained_under = _training_conditions(plan, study, trial_results)
    seconds = _training_totals(plan, study, trial_results, "training_seconds")
    return {
        name: {
            **cost,
            "training_seconds": seconds.get(name),
            "training_steps": steps.get(name),
            "trained_under": trained_under.get(name, []),
            **_query_cost(cost, pairs_per_query(name, trial_results, eval_data)),
        }
        for name, cost in costs.items()
    }


def _query_cost(cost: CostDocument, pairs: int) -> dict[str, Any]:
    """ "ms_per_query", one caption encoded and scored with so many images, and the same in each of the rounds."""

    def query_ms(caption: float, thousand: float) -> float:
        return round(caption + thousand * pairs / 1000, 4)

    rounds: list[Any] = [
        {**each, "ms_per_query": query_ms(each["caption_latency_ms"], each["ms_per_1000_pairs"])}
        if {"caption_latency_ms", "ms_per_1000_pairs"} <= set(each) else each
        for each in cost.get("rounds", [])
    ]  # fmt: skip
    caption_and_pairs = cost["caption_latency_ms"]["p50"], cost["ms_per_1000_pairs"]["median"]
    return {"ms_per_query": query_ms(*caption_and_pairs), "rounds": rounds}


def _base_total(
    plan: Plan, study: Path, result: TrialResult, trial_results: Sequence[TrialResult], quantity: TrainingQuantity
) -> float:
    """The seconds ("training_seconds") or "steps" that went into the runs that a cell stands on, one on another: of
    those that were not measured too, from their folders."""
    own_totals = {(each.variant, each.seed): float(each.measurements[quantity]) for each in trial_results}
    total, base = 0.0, plan.variants[result.variant].base
    while base:
        results = trial_folder(study, base, result.seed) / "results.json"
        if (base, result.seed) in own_totals:
            total += own_totals[base, result.seed]
        elif results.is_file():
            total += float(json.loads(results.read_text())[quantity])
        base = plan.variants[base].base
    return total


def _training_totals(
    plan: Plan, study: Path, trial_results: Sequence[TrialResult], quantity: TrainingQuantity
) -> dict[str, dict[str, Any]]:
    """The "training_seconds" or "steps" of each variant: mean over seeds, and each; with what it stands on."""
    totals: dict[str, list[float]] = {}
    for result in trial_results:
        total = float(result.measurements[quantity]) + _base_total(plan, study, result, trial_results, quantity)
        totals.setdefault(result.variant, []).append(round(total, 1))
    return {name: {"mean": round(float(np.mean(each)), 1), "each": each} for name, each in totals.items()}


def _training_conditions(
    plan: Plan, study: Path, trial_results: Sequence[TrialResult]
) -> dict[str, list[dict[str, Any]]]:
    """The conditions that each variant's runs, and those that they stand on, were begun under, each once."""
    conditions: dict[str, list[dict[str, Any]]] = {}
    for result in trial_results:
        variant_conditions = conditions.setdefault(result.variant, [])
        name = result.variant
        while name:
            under = _start_conditions(trial_folder(study, name, result.seed) / "environment.json")
            if under and under not in variant_conditions:
                variant_conditions.append(under)
            name = plan.variants[name].base
    return conditions


def _start_conditions(environment: Path) -> dict[str, Any]:
    """A run's machine and versions; none where its file has none, or cannot be read."""
    try:
        content = json.loads(environment.read_text(encoding="utf-8"))
        return {**content["machine"], **content["versions"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _measured_by(measured: Sequence[TrialResult]) -> dict[str, list[dict[str, str]]]:
    """The versions that each variant's figures were measured by, each once; {} where they were not kept."""
    by_versions: dict[str, list[dict[str, str]]] = {}
    for cell in measured:
        of = by_versions.setdefault(cell.variant, [])
        of += [each for each in cell.measurements.get("measured_by", [{}]) if each not in of]
    return by_versions


def reproduction_commands(study: Path, measured: tuple[str, int] | None) -> list[str]:
    """What repeats the study, and any one of its runs. measured: a cell that has been trained, where there is one."""
    again = f"clipvisionalign study {study}/plan.yaml --out {study}-again"
    if measured is None:
        return [again]
    first_trial = trial_folder(study, *measured)
    return [
        again,
        f"clipvisionalign train --config {first_trial}/config.yaml --out runs/again",
        f"clipvisionalign audit {first_trial}",
    ]


#: Packages that a report's page, plots and tables need.
TO_WRITE = ("jinja2", "markupsafe", "matplotlib")


def check_installed(names: Sequence[str] = TO_WRITE) -> None:
    """Raises ModuleNotFoundError, before anything is done, where a package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def write_report(study: Path, report: dict[str, Any]) -> None:
    """report.json, report.html, figures/ (SVG, PNG), tables/ (Markdown, LaTeX), references.bib in `study`: each file is
    whole, whenever this is cut off, and none is left of a plot or a table that only an earlier report had. The page is
    the last: until it is whole the earlier one stays.

    A plot that cannot be drawn is reported, and shown as such, with the reason. Raises ReportError, ResultsError and
    ModuleNotFoundError before anything is written.
    """
    check_installed()
    from clipvisionalign.study.report.html import render_page
    from clipvisionalign.study.report.plots import draw_plots
    from clipvisionalign.study.report.tables import write_tables

    typed = StudyReport.of(report)
    check_results(report)
    # The report's own figures first: they are there whatever happens to a plot or the page.
    write_json(study / "report.json", report)
    plots = draw_plots(typed, study / "figures")
    write_tables(typed, study / "tables")
    with atomic_write(study / "references.bib") as aside:
        aside.write_text("\n\n".join(entry.bibtex for entry in typed.references) + "\n", encoding="utf-8")
    with atomic_write(study / "report.html") as aside:
        aside.write_text(render_page(typed, plots), encoding="utf-8")


def study_folder(study: str | Path) -> Path:
    """The folder of a study that is named by it, or by the report.json in it. Raises ValueError for another file."""
    path = Path(study)
    if path.is_file() and path.name != "report.json":
        raise ValueError(f"{path}: give a study's folder, or the report.json in it")
    return path.parent if path.is_file() else path


def read_report(study: str | Path) -> dict[str, Any]:
    """The report of a study's folder, or of a report.json itself. Raises ValueError where there is none."""
    path = Path(study)
    path = path / "report.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{study}: no report.json there; 'clipvisionalign study PLAN --out {study}' makes one")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(report, dict) or report.get("format") != REPORT_FORMAT:
        raise ValueError(f"{path}: no report of this version (format {REPORT_FORMAT})")
    try:
        StudyReport.of(report)
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from None
    check_results(report)
    return report
