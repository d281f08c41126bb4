"""Reports of studies that were never trained: ranks are drawn, and everything else is computed from them as in a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages
from clipvisionalign.retrieval.ranks import PositiveRanks
from clipvisionalign.study.aggregate import TrialResult
from clipvisionalign.study.config import Plan, Variant
from clipvisionalign.study.gaps import FAILED, Gaps
from clipvisionalign.study.profile import combine_rounds
from clipvisionalign.study.report.build import build_report
from clipvisionalign.study.report.claims.claim import lookup, numbers_in

CHECK = {"name": "alone (vectors)", "passed": True, "figure": 0.0, "meaning": "a pair's score stays the same"}
WORDS = "a dog runs over green grass to catch the red ball that a boy has thrown far into the park".split()  # noqa: SIM905


def gallery(images: int, lengths: Sequence[int] = (4, 9)) -> CaptionedImages:
    """Images that are no files, each with one caption of each length in words."""
    rows = [
        CaptionedImage(
            f"{i}.jpg", Path(f"{i}.jpg"), tuple(" ".join([f"n{i}", *WORDS[: n - 1]]) for n in lengths), "dev"
        )
        for i in range(images)
    ]
    return CaptionedImages(rows, Path("made"), "folder")


def drawn_ranks(part: CaptionedImages, skill: float, seed: int) -> PositiveRanks:
    """Ranks of a model that finds what it looks for with the probability `skill`, and else nothing in particular."""
    rng = np.random.default_rng(seed)
    images, captions = len(part), len(part.captions)

    def ranks(queries: int, among: int) -> np.ndarray:
        return np.where(rng.random(queries) < skill, 1, rng.integers(1, among + 1, queries))

    i2t = np.zeros((images, captions // images), dtype=np.int64)
    i2t[:] = np.arange(i2t.shape[1]) + ranks(images, captions - i2t.shape[1] + 1)[:, None]
    return PositiveRanks(i2t, ranks(captions, images)[:, None])


def cost_round(
    ms: float = 2.0, host: float = 900.0, device: float | None = None, pairs: float = 0.01
) -> dict[str, Any]:
    """One measurement of time and memory."""
    spread = {"median": ms, "low": 0.9 * ms, "high": 1.2 * ms}
    latency = {"p50": 1.5 * ms, "p95": 2 * ms, "p99": 3 * ms}
    return {
        "captions": 64, "ms_per_caption": spread, "ms_per_picture": spread, "caption_latency_ms": latency,
        "picture_latency_ms": latency, "ms_per_1000_pairs": {"median": pairs, "low": pairs, "high": pairs},
        "by_length": [{"tokens": 8, "ms_alone": ms}, {"tokens": 64, "ms_alone": 2 * ms}],
        "by_batch": [{"batch": 1, "ms_per_caption": spread}, {"batch": 8, "ms_per_caption": spread}],
        "bytes_per_picture": 1024.0, "bytes_per_caption": 1024.0, "peak_memory_mib": host, "loaded_memory_mib": 0.9 * host,
        "parameters": 27_000_000, "flops_per_caption": 10**9, "flops_per_picture": 10**9, "energy": {}, "machine": {},
    } | ({} if device is None else {"peak_device_memory_mib": device})  # fmt: skip


def made_report(
    variants: Mapping[str, float] | None = None, seeds: Sequence[int] = (0, 1), images: int = 40,
    lengths: Sequence[int] = (4, 9), missing: Sequence[tuple[str, int]] = (), refused: Sequence[tuple[str, int]] = (),
    alike: bool = False, costs: Mapping[str, Sequence[dict[str, Any]]] | None = None, pairs: Mapping[str, int] | None = None,
    dual: Mapping[str, float] | None = None, frontiers: Mapping[str, dict[str, Any]] | None = None, bases: Mapping[str, str] | None = None, study: Path = Path("study"),
    **plan: Any,
) -> dict[str, Any]:  # fmt: skip
    """A report as a study writes it.

    variants: each one's skill (see `drawn_ranks`); alike: all draw the same ranks; missing: cells that failed; refused:
    cells whose audit failed; costs: the rounds of each variant's measurement; pairs: minimal pairs by kind; dual: the
    skill of a variant's own dual encoder, where it re-ranks; frontiers: what `measure_frontier` gives of a variant; bases: what a variant starts from; plan: what the plan has beside variants and seeds.
    """
    skills = {"self": 0.4, "late": 0.5} if variants is None else dict(variants)
    of = {name: (bases or {}).get(name, "") for name in skills}
    part = gallery(images, lengths)
    made = Plan(variants={name: Variant({"model": {"design": "self"}}, of[name]) for name in skills}, seeds=list(seeds),
                data="made", **plan)  # fmt: skip
    measured = []
    for number, (name, skill) in enumerate(skills.items()):
        for seed in seeds:
            if (name, seed) in missing:
                continue
            drawn = 1000 * seed + (0 if alike else number)
            ranks = {"ranks": drawn_ranks(part, skill, drawn)}
            if dual and name in dual:
                ranks["dual"] = drawn_ranks(part, dual[name], drawn)
            passed = (name, seed) not in refused
            rng = np.random.default_rng(drawn)
            result = {
                "audit": {"passed": passed, "checks": [{**CHECK, "passed": passed}]}, "training_seconds": 10.0, "steps": 20,
                "chosen": {}, "candidates": 0,
                "composition": {"this data": {kind: (rng.random(count) < skill).astype(float).tolist()
                                              for kind, count in pairs.items()}} if pairs else {},
                "curves": {"step": [10, 20], "loss": [3.0, 2.0], "rsum": [100.0, 200.0], "dev_loss": [3.0, 2.5]},
            }  # fmt: skip
            if frontiers and name in frontiers and seed == seeds[0]:
                result["frontier"] = frontiers[name]
            measured.append(TrialResult(name, seed, result, ranks))
    gaps = Gaps(study)
    gaps.states = dict.fromkeys(missing, (FAILED, "ValueError: it failed"))
    spent = {name: combine_rounds(list(rounds)) for name, rounds in (costs or {}).items()}
    controls = {"this data": {kind: [1.0] * count for kind, count in pairs.items()}} if pairs else {}
    # Intervals of single runs by resampling are in no sentence, what is cited in none, and both take most of the time.
    report = "clipvisionalign.study.report.build"
    with patch("clipvisionalign.study.aggregate.RESAMPLES", 10), patch(f"{report}.entries_for", lambda *about: []):
        return build_report(made, study, part, part, measured, gaps, spent, controls, None, {"groups": {}, "maps": []}, None,
                            {"this data": {kind: list(range(count)) for kind, count in (pairs or {}).items()}})  # fmt: skip


def check_numbers(report: dict[str, Any], claim: dict[str, Any]) -> None:
    """Every number of a sentence of the summary is a figure of the report, shown as it says."""
    shown = []
    for figure in claim["figures"]:
        value = lookup(report, figure["path"])
        if figure["form"] == "count":
            assert figure["shown"] == str(len(value))
        else:
            value = value * float(figure["factor"])
            assert figure["shown"] == format(round(value) if figure["form"].endswith("d") else value, figure["form"])
        shown.append(figure["shown"])
    assert sorted(numbers_in(claim["text"])) == sorted(shown), claim["text"]
