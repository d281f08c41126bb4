"""report.json: every figure of a study, and what is needed to check it and to repeat it; and the files made from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.fingerprint import data_contents
from clipvisionalign.data.scenes import is_drawn
from clipvisionalign.files import written_aside
from clipvisionalign.models.device import machine, versions
from clipvisionalign.progress import long_step
from clipvisionalign.retrieval.equal_captions import equal_captions
from clipvisionalign.retrieval.ranks import Partners
from clipvisionalign.study.bibliography import entries_for
from clipvisionalign.study.cells import write_json
from clipvisionalign.study.gaps import FAILED, Gaps, cell_states, made_from
from clipvisionalign.study.plan import Plan, cell_folder
from clipvisionalign.study.results import DrawnTogether, Measured, check_fence, pairs_share, results_of
from clipvisionalign.study.words import claims_of

FORMAT = 1


def build_report(
    plan: Plan, study: Path, data: CaptionedImages, part: CaptionedImages, measured: Sequence[Measured],
    gaps: Gaps, costs: dict[str, dict[str, Any]], controls: dict[str, dict[str, list[float]]],
    other: dict[str, Any] | None, examples: dict[str, Any], cut: dict[str, Any] | None = None,
    together: DrawnTogether | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The whole report as report.json holds it; what has no results, or was not made, is in "cells" and "not_made".

    together: which minimal pairs were drawn together. Raises FenceError where something in its results is none.
    """
    results = results_of(measured, part, plan.split, plan.compare, together)
    partners = Partners.of(part.caption_image, len(part), part.image_identity, part.caption_group)
    trained_under = _trained_under(plan, study, measured)
    seconds, steps = (_spent(plan, study, measured, what) for what in ("training_seconds", "steps"))
    passed = [(name, seed) for name, found in results["variants"].items() for seed in found["seeds"]]
    depths: dict[str, Any] = {}
    for one in measured:
        if one.found.get("depths"):
            depths.setdefault(one.variant, one.found["depths"])
    report: dict[str, Any] = {
        "format": FORMAT,
        "title": plan.title,
        "plan": plan.to_dict(),
        "data": {
            "source": str(data.source),
            "layout": data.layout,
            "official_splits": data.official_splits,
            "splits": data.split_sizes(),
            "fingerprint": data.fingerprint(),
            "contents": contents_of(data),
            "gallery": {"images": len(part), "captions": len(part.captions)},
            "identity": part.identity,
            "equal_captions": equal_captions(part.caption_texts, partners).to_dict(),
            "drawn": is_drawn(data.source),
            "left_out": [str(problem) for problem in data.problems if problem.effect == "left out"],
        },
        "results": results,
        "cut_captions": cut or {},
        "text_only": text_only(controls, together or {}),
        "cost": {
            name: {
                **cost,
                "training_seconds": seconds.get(name),
                "training_steps": steps.get(name),
                "trained_under": trained_under.get(name, []),
                **_with_query(cost, pairs_of_query(name, measured, part)),
            }
            for name, cost in costs.items()
        },
        "training_steps": steps,
        "curves": [
            {
                "variant": m.variant,
                "seed": m.seed,
                "before": int(_before(plan, study, m, measured, "steps")),
                **m.found["curves"],
            }
            for m in measured
        ],
        "depths": depths,
        "what_it_would_have_looked_like": other,
        "examples": examples,
        "cells": cell_states(plan, gaps, passed, results["refused"]),
        "made_from": made_from(study),
        "machine": machine(),
        "versions": versions(),
        "measured_by": _measured_by(measured),
        "commands": commands(study, next(((one.variant, one.seed) for one in measured), None)),
        "references": entries_for(plan, data),
    }
    with_gaps(report, gaps)
    check_fence(report)
    return report


def contents_of(data: CaptionedImages) -> dict[str, str]:
    """Hashes of what the whole data set holds, its images by their bytes."""
    with long_step("reading the images, to know them again"):
        return data_contents(data)


def with_gaps(report: dict[str, Any], gaps: Gaps) -> None:
    """Put into a report what could not be made, and its summary, which tells of that."""
    report["not_made"] = gaps.parts
    report["failed"] = [cell for cell in report["cells"] if cell["state"] == FAILED]
    report["claims"] = claims_of(report)


def text_only(controls: dict[str, dict[str, list[float]]], together: DrawnTogether) -> dict[str, list[dict[str, Any]]]:
    """The control beside the composition figures: in percent, by set and kind."""
    return {
        name: [
            {"kind": kind, **pairs_share([outcomes], together.get(name, {}).get(kind))}
            for kind, outcomes in kinds.items()
        ]
        for name, kinds in controls.items()
    }


def pairs_of_query(name: str, measured: Sequence[Measured], part: CaptionedImages) -> int:
    """How many pairs a query scores: the whole gallery, or the candidates that a re-ranking looks at."""
    return next((cell.found.get("candidates", 0) for cell in measured if cell.variant == name), 0) or len(part)


def _with_query(cost: dict[str, Any], pairs: int) -> dict[str, Any]:
    """ "ms_per_query", one caption encoded and scored with so many images, and the same in each of the rounds."""

    def of(caption: float, thousand: float) -> float:
        return round(caption + thousand * pairs / 1000, 4)

    rounds = [
        {**each, "ms_per_query": of(each["caption_latency_ms"], each["ms_per_1000_pairs"])}
        if {"caption_latency_ms", "ms_per_1000_pairs"} <= set(each) else each
        for each in cost.get("rounds", [])
    ]  # fmt: skip
    both = cost["caption_latency_ms"]["p50"], cost["ms_per_1000_pairs"]["median"]
    return {"ms_per_query": of(*both), "rounds": rounds}


def _before(plan: Plan, study: Path, cell: Measured, measured: Sequence[Measured], what: str) -> float:
    """The seconds ("training_seconds") or "steps" that went into the runs that a cell stands on, one on another: of
    those that were not measured too, as their folders say."""
    own = {(each.variant, each.seed): float(each.found[what]) for each in measured}
    total, stands = 0.0, plan.variants[cell.variant].base
    while stands:
        results = cell_folder(study, stands, cell.seed) / "results.json"
        if (stands, cell.seed) in own:
            total += own[stands, cell.seed]
        elif results.is_file():
            total += float(json.loads(results.read_text())[what])
        stands = plan.variants[stands].base
    return total


def _spent(plan: Plan, study: Path, measured: Sequence[Measured], what: str) -> dict[str, dict[str, Any]]:
    """The "training_seconds" or "steps" of each variant: mean over seeds, and each; with what it stands on."""
    found: dict[str, list[float]] = {}
    for cell in measured:
        total = float(cell.found[what]) + _before(plan, study, cell, measured, what)
        found.setdefault(cell.variant, []).append(round(total, 1))
    return {name: {"mean": round(float(np.mean(each)), 1), "each": each} for name, each in found.items()}


def _trained_under(plan: Plan, study: Path, measured: Sequence[Measured]) -> dict[str, list[dict[str, Any]]]:
    """The conditions that each variant's runs, and those that they stand on, were begun under, each once."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in measured:
        of = found.setdefault(cell.variant, [])
        name = cell.variant
        while name:
            under = _begun_under(cell_folder(study, name, cell.seed) / "environment.json")
            if under and under not in of:
                of.append(under)
            name = plan.variants[name].base
    return found


def _begun_under(environment: Path) -> dict[str, Any]:
    """A run's machine and versions; none where its file has none, or cannot be read."""
    try:
        kept = json.loads(environment.read_text(encoding="utf-8"))
        return {**kept["machine"], **kept["versions"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _measured_by(measured: Sequence[Measured]) -> dict[str, list[dict[str, str]]]:
    """The versions that each variant's figures were measured by, each once; {} where they were not kept."""
    found: dict[str, list[dict[str, str]]] = {}
    for cell in measured:
        of = found.setdefault(cell.variant, [])
        of += [each for each in cell.found.get("measured_by", [{}]) if each not in of]
    return found


def commands(study: Path, measured: tuple[str, int] | None) -> list[str]:
    """What repeats the study, and any one of its runs. measured: a cell that has been trained, where there is one."""
    again = f"clipvisionalign study {study}/plan.yaml --out {study}-again"
    if measured is None:
        return [again]
    cell = cell_folder(study, *measured)
    return [
        again,
        f"clipvisionalign train --config {cell}/config.yaml --out runs/again",
        f"clipvisionalign audit {cell}",
    ]


#: Packages that a report's page, plots and tables need.
TO_WRITE = ("jinja2", "markupsafe", "matplotlib")


def check_installed(names: Sequence[str] = TO_WRITE) -> None:
    """Raises ModuleNotFoundError, before anything is done, where a package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def write_report(study: Path, report: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """report.json, report.html, figures/ (SVG, PNG), tables/ (Markdown, LaTeX), references.bib in `study`: each file is
    whole, whenever this is cut off, and none is left of a plot or a table that only an earlier report had. The page is
    the last: until it is whole the earlier one stays.

    A plot that cannot be drawn is said, and shown as such, with the reason. Raises FenceError and ModuleNotFoundError
    before anything is written.
    """
    check_installed()
    from clipvisionalign.study.figures import draw_figures
    from clipvisionalign.study.page import render_page
    from clipvisionalign.study.tables import write_tables

    check_fence(report)
    # The report's own figures first: they are there whatever happens to a plot or the page.
    write_json(study / "report.json", report)
    drawn = draw_figures(report, study / "figures", say)
    write_tables(report, study / "tables")
    with written_aside(study / "references.bib") as aside:
        aside.write_text("\n\n".join(entry["bibtex"] for entry in report["references"]) + "\n", encoding="utf-8")
    with written_aside(study / "report.html") as aside:
        aside.write_text(render_page(report, drawn), encoding="utf-8")


def folder_of(study: str | Path) -> Path:
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
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path}: no report of this version (format {FORMAT})")
    check_fence(report)
    return report
