"""report.json: every figure of a study, and what is needed to check it and to repeat it; and the files made from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.files import written_aside
from clipvisionalign.models.device import machine, versions
from clipvisionalign.retrieval.equal_captions import equal_captions
from clipvisionalign.retrieval.ranks import Partners
from clipvisionalign.study.bibliography import entries_for
from clipvisionalign.study.cells import write_json
from clipvisionalign.study.gaps import FAILED, Gaps, cell_states, made_from
from clipvisionalign.study.plan import Plan
from clipvisionalign.study.results import Measured, check_fence, results_of
from clipvisionalign.study.significant import significant
from clipvisionalign.study.statistics import estimate
from clipvisionalign.study.words import claims_of

FORMAT = 1


def build_report(
    plan: Plan, study: Path, data: CaptionedImages, part: CaptionedImages, measured: Sequence[Measured],
    gaps: Gaps, costs: dict[str, dict[str, Any]], controls: dict[str, dict[str, list[float]]],
    other: dict[str, Any] | None, examples: dict[str, Any], cut: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The whole report as report.json holds it; what has no results, or was not made, is in "cells" and "not_made".

    Raises FenceError where something in its results is none.
    """
    results = results_of(measured, part, plan.split, plan.compare)
    partners = Partners.of(part.caption_image, len(part), part.image_identity, part.caption_group)
    seconds = _training_seconds(plan, measured)
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
            "gallery": {"images": len(part), "captions": len(part.captions)},
            "identity": part.identity,
            "equal_captions": equal_captions(part.caption_texts, partners).to_dict(),
            "left_out": [str(problem) for problem in data.problems if problem.effect == "left out"],
        },
        "results": results,
        "cut_captions": cut or {},
        "text_only": text_only(controls),
        "cost": {
            name: {
                **cost,
                "training_seconds": seconds.get(name),
                "ms_per_query": ms_per_query(cost, name, measured, part),
            }
            for name, cost in costs.items()
        },
        "curves": [{"variant": m.variant, "seed": m.seed, **m.found["curves"]} for m in measured],
        "depths": depths,
        "what_it_would_have_looked_like": other,
        "examples": examples,
        "cells": cell_states(plan, gaps, passed, results["refused"]),
        "made_from": made_from(study),
        "machine": machine(),
        "versions": versions(),
        "commands": commands(plan, study),
        "references": entries_for(plan, data),
    }
    with_gaps(report, gaps)
    check_fence(report)
    return report


def with_gaps(report: dict[str, Any], gaps: Gaps) -> None:
    """Put into a report what could not be made, and its summary, which tells of that."""
    report["not_made"] = gaps.parts
    report["failed"] = [cell for cell in report["cells"] if cell["state"] == FAILED]
    report["claims"] = claims_of(report)


def text_only(controls: dict[str, dict[str, list[float]]]) -> dict[str, list[dict[str, Any]]]:
    """The control beside the composition figures: in percent, by set and kind."""
    return {
        name: [
            {"kind": kind, "pairs": len(outcomes), **estimate(100.0 * np.array([outcomes]), (0, 100)).to_dict()}
            for kind, outcomes in kinds.items()
        ]
        for name, kinds in controls.items()
    }


def ms_per_query(cost: dict[str, Any], name: str, measured: Sequence[Measured], part: CaptionedImages) -> float:
    """One caption, encoded and scored with the whole gallery, or with the candidates that a re-ranking looks at."""
    candidates = next((cell.found.get("candidates", 0) for cell in measured if cell.variant == name), 0)
    pairs = candidates or len(part)
    return round(cost["caption_latency_ms"]["p50"] + cost["ms_per_1000_pairs"]["median"] * pairs / 1000, 4)


def _training_seconds(plan: Plan, measured: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """Mean over seeds, and each; a variant that stands on another counts its time too."""
    own = {(cell.variant, cell.seed): float(cell.found["training_seconds"]) for cell in measured}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(cell.variant for cell in measured):
        each = []
        for seed in [cell.seed for cell in measured if cell.variant == name]:
            total, stands = 0.0, name
            while stands:
                total += own.get((stands, seed), 0.0)
                stands = plan.variants[stands].base
            each.append(round(total, 1))
        found[name] = {"mean": round(float(np.mean(each)), 1), "each": each}
    return found


def commands(plan: Plan, study: Path) -> list[str]:
    """What repeats the study, and any one of its runs."""
    cell = f"{study}/cells/{next(iter(plan.variants))}-{plan.seeds[0]}"
    return [
        f"clipvisionalign study {study}/plan.yaml --out {study}-again",
        f"clipvisionalign train --config {cell}/config.yaml --out runs/again",
        f"clipvisionalign audit {cell}",
    ]


def write_report(study: Path, report: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """report.json, report.html, figures/ (SVG, PNG), tables/ (Markdown, LaTeX), references.bib in `study`: each file is
    whole, whenever this is cut off, and none is left of a plot or a table that only an earlier report had.

    A plot that cannot be drawn is said, and shown as such, with the reason. Raises FenceError before anything is
    written.
    """
    from clipvisionalign.study.figures import draw_figures
    from clipvisionalign.study.page import render_page
    from clipvisionalign.study.tables import write_tables

    check_fence(report)
    # The report's own figures first: they are there whatever happens to a plot or the page.
    write_json(study / "report.json", report)
    page = study / "report.html"
    page.unlink(missing_ok=True)
    drawn = draw_figures(report, study / "figures", say)
    write_tables(report, study / "tables")
    with written_aside(study / "references.bib") as aside:
        aside.write_text("\n\n".join(entry["bibtex"] for entry in report["references"]) + "\n", encoding="utf-8")
    with written_aside(page) as aside:
        aside.write_text(render_page(report, drawn), encoding="utf-8")


def compare_reports(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """Two studies side by side: their tables of accuracy and cost, variant by variant, and the settings that differ.

    Their galleries may differ, and so may their machines: intervals stand beside each other, and nothing is tested.
    """
    from clipvisionalign.study.tables import CHANCE, Table, interval

    names = [name for name in a["plan"]["variants"] if name in b["plan"]["variants"]]
    found: list[Table] = []
    rows: list[list[str]] = []
    keys: list[list[float | None]] = []
    for name in names:
        both = [report["results"]["variants"].get(name, {}).get("figures", {}).get("rsum") for report in (a, b)]
        rows.append([name, *(interval(each) if each else "" for each in both), _overlap(both)])
        keys.append([None, *(each["value"] if each else None for each in both), None])
    both_chance = [report["results"].get("chance", {}).get("rsum") for report in (a, b)]
    rows.append([CHANCE, *("" if each is None else f"{each:.1f}" for each in both_chance), ""])
    keys.append([None, *both_chance, None])
    found.append(Table("accuracy", "Rsum", ["variant", "A", "B", "intervals"], rows, keys))
    costs = {"ms a caption": ("ms_per_caption", "median"), "ms a picture": ("ms_per_picture", "median"),
             "ms 1,000 pairs": ("ms_per_1000_pairs", "median"), "peak MiB": ("peak_memory_mib",),
             "training s": ("training_seconds", "mean")}  # fmt: skip
    for what, path in costs.items():
        rows, keys = [], []
        for name in names:
            pair = [_deep(report["cost"].get(name), path) for report in (a, b)]
            factor = pair[1] / pair[0] if all(pair) else None
            rows.append(
                [
                    name,
                    *("" if value is None else format(value, significant(value, 4)) for value in pair),
                    "" if factor is None else f"{factor:.2f}",
                ]
            )
            keys.append([None, *pair, factor])
        found.append(Table(path[0], what[0].upper() + what[1:], ["variant", "A", "B", "B / A"], rows, keys))
    settings = []
    for part in ("plan", "machine", "versions"):
        left, right = _flat(a[part]), _flat(b[part])
        settings += [f"{part} {key}: A {left.get(key, '-')}, B {right.get(key, '-')}"
                     for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]  # fmt: skip
    return found, settings


def _overlap(both: Sequence[dict[str, Any] | None]) -> str:
    """Of two estimates whether their intervals overlap; nothing where one has none."""
    if not all(each and each["low"] is not None for each in both):
        return ""
    a, b = (each for each in both if each)
    return "apart" if a["low"] > b["high"] or b["low"] > a["high"] else "overlap"


def _deep(found: Any, path: Sequence[str]) -> Any:
    for key in path:
        found = None if found is None else found.get(key)
    return found


def _flat(found: Any, path: str = "") -> dict[str, Any]:
    if isinstance(found, dict):
        return {key: value for name, below in found.items() for key, value in _flat(below, f"{path}{name}.").items()}
    return {path.rstrip("."): found}


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
