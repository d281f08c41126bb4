"""report.json: every figure of a study, and what is required to check and to repeat it; and the files made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.hashes import dataset_hashes
from clipvisionalign.data.scene_dataset import is_scene_dataset
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
    TruncationDocument,
)
from clipvisionalign.study.gaps import FAILED, Gaps, measurements_hash, trial_states
from clipvisionalign.study.report.bibliography import entries_for
from clipvisionalign.study.report.cost_block import base_total, cost_block, frontier_block, training_totals
from clipvisionalign.study.report.schema import ReportError, StudyReport
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.results_check import check_results
from clipvisionalign.study.seal import seal_block
from clipvisionalign.training.halves import positives_of

REPORT_FORMAT = 1


def build_report(
    plan: Plan, study: Path, data: CaptionedImages, eval_data: CaptionedImages, trial_results: Sequence[TrialResult],
    gaps: Gaps, costs: Mapping[str, CostDocument], controls: BlindOutcomes, flawed_protocols: dict[str, Any] | None,
    examples: ExamplesDocument, truncation: Mapping[str, TruncationDocument] | None = None,
    together: DrawnTogether | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Build a study's whole report, as report.json holds it, and validate it.

    What has no results is listed in "cells" with the reason, what could not be made in "not_made".

    Args:
        plan: The plan of the study.
        study: Its folder.
        data: The data set.
        eval_data: The split that was measured.
        trial_results: The finished trials.
        gaps: Trials without results, and parts that could not be made, each with its reason.
        costs: Time and memory of each variant.
        controls: Outcomes of the baseline that is given no image, by set of minimal pairs and kind.
        flawed_protocols: What flawed protocols would have shown; None where they were not carried out.
        examples: Example images.
        truncation: By variant, how many captions its text tower cuts; None where none was counted.
        together: Which minimal pairs were drawn together, by set and kind.

    Returns:
        The report, as JSON has it.

    Raises:
        ResultsError: Something in its results was not measured over the whole gallery, or did not pass its audit.
        ReportError: It is no valid `StudyReport`.
    """
    results = aggregate_results(
        trial_results, eval_data, plan.split, plan.compare, together, plan.until, len(plan.seeds)
    )
    steps = training_totals(plan, study, trial_results, "steps")
    passed = [(name, seed) for name, variant in results["variants"].items() for seed in variant["seeds"]]
    depths: dict[str, Any] = {}
    for result in trial_results:
        if result.measurements.get("depths"):
            depths.setdefault(result.variant, result.measurements["depths"])
    report: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "title": plan.title,
        "plan": plan.to_dict(),
        "data": _data_block(data, eval_data),
        "results": results,
        "cut_captions": truncation or {},
        "text_only": blind_baseline(controls, together or {}),
        "cost": cost_block(plan, study, trial_results, eval_data, costs, steps),
        "training_steps": steps,
        "curves": _curves(plan, study, trial_results),
        "depths": depths,
        "frontier": frontier_block(trial_results, costs),
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
    if seal := seal_block(study):
        report["seal"] = seal
    if pretraining := _pretraining(study, trial_results):
        report["pretraining"] = pretraining
    add_gaps(report, gaps)
    StudyReport.of(report)
    check_results(report)
    return report


def _data_block(data: CaptionedImages, eval_data: CaptionedImages) -> dict[str, Any]:
    """The block "data": the data set, and the split that was measured."""
    return {
        **eval_data.texts_entry,
        "source": str(data.source),
        "layout": data.layout,
        "official_splits": data.official_splits,
        "splits": data.split_sizes(),
        "fingerprint": data.fingerprint(),
        "contents": contents_of(data),
        "gallery": {"images": len(eval_data), "captions": len(eval_data.captions)},
        "identity": eval_data.identity,
        "equal_captions": count_equal_captions(eval_data.caption_text_ids, positives_of(eval_data)).to_dict(),
        "drawn": is_scene_dataset(data.source),
        "left_out": [str(problem) for problem in data.problems if problem.effect == "left out"],
    }


def _curves(plan: Plan, study: Path, trial_results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """The block "curves": each trial's learning curve, with the steps of its bases before it."""
    return [
        {
            "variant": trial_result.variant,
            "seed": trial_result.seed,
            "before": int(base_total(plan, study, trial_result, trial_results, "steps")),
            **trial_result.measurements["curves"],
        }
        for trial_result in trial_results
    ]


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
    """Hash what a data set holds, its images by their bytes; every image is read.

    Args:
        data: The data set.

    Returns:
        What `dataset_hashes` returns.
    """
    with progress_step("reading the images, to recognise them"):
        return dataset_hashes(data)


def add_gaps(report: dict[str, Any], gaps: Gaps) -> None:
    """Put into a report what could not be made, and its summary, which lists that.

    Args:
        report: The report, which is changed: its "not_made", "failed" and "claims".
        gaps: The gaps of the study.
    """
    report["not_made"] = gaps.parts
    report["failed"] = [trial for trial in report["cells"] if trial["state"] == FAILED]
    report["claims"] = report_claims(report)


def blind_baseline(controls: BlindOutcomes, together: DrawnTogether) -> dict[str, list[dict[str, Any]]]:
    """The block "text_only": the share of minimal pairs that a baseline without images gets right.

    Args:
        controls: Outcomes by set of minimal pairs and kind: 1 for a pair that it gets right, 0.5 for a tie, else 0.
        together: Which pairs were drawn together, by set and kind.

    Returns:
        By set, one entry a kind: the share in percent, with its interval.
    """
    return {
        name: [
            {"kind": kind, **pairs_share([outcomes], together.get(name, {}).get(kind))}
            for kind, outcomes in kinds.items()
        ]
        for name, kinds in controls.items()
    }


def _measured_by(measured: Sequence[TrialResult]) -> dict[str, list[dict[str, str]]]:
    """The versions that each variant's figures were measured by, each once; {} where they were not kept."""
    by_versions: dict[str, list[dict[str, str]]] = {}
    for cell in measured:
        of = by_versions.setdefault(cell.variant, [])
        of += [each for each in cell.measurements.get("measured_by", [{}]) if each not in of]
    return by_versions


def reproduction_commands(study: Path, measured: tuple[str, int] | None) -> list[str]:
    """The commands that repeat a study, and one of its trainings.

    Args:
        study: Its folder.
        measured: Variant and seed of a trial that has been trained; None where there is none.

    Returns:
        The command of the study, and with `measured` those that train and audit that trial.
    """
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
    """Check that packages are installed, without importing them.

    Args:
        names: Import names of the packages; by default those that a report's page, plots and tables are made with.

    Raises:
        ModuleNotFoundError: One of them is missing.
    """
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def write_report(study: Path, report: dict[str, Any]) -> None:
    """Write a report and everything made from it into a study's folder.

    The files are report.json, report.html, figures/ (SVG, PNG), tables/ (Markdown, LaTeX) and references.bib. Each is
    written whole or not at all; the page is the last, and no plot or table of an earlier report is left. A plot that
    cannot be drawn is logged, and the page has the reason in its place.

    Args:
        study: The folder.
        report: The report, as `build_report` returns it.

    Raises:
        ReportError: The report is not valid; nothing is written.
        ResultsError: Its results are not valid; nothing is written.
        ModuleNotFoundError: A package is missing (`check_installed`); nothing is written.
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
    """The folder of a study.

    Args:
        study: The folder, or the report.json in it.

    Returns:
        The folder.

    Raises:
        ValueError: It is another file.
    """
    path = Path(study)
    if path.is_file() and path.name != "report.json":
        raise ValueError(f"{path}: give a study's folder, or the report.json in it")
    return path.parent if path.is_file() else path


def read_report(study: str | Path) -> dict[str, Any]:
    """Read the report of a study.

    Args:
        study: The study's folder, or a report.json.

    Returns:
        The report, as JSON has it.

    Raises:
        ValueError: There is none, it is no JSON, or it has another format.
        ReportError: It is no valid report.
        ResultsError: Its results are not valid.
    """
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
