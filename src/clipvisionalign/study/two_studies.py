"""A test of what changed between two studies: each variant of both, on the same images, with seeds of its own.

The images are the same, so that they are paired; the trainings are not, even where their seeds have the same numbers,
as the code or the machine between the two studies may be another. With both as random effects, the squared half-width
is the sum of three, each with its own quantile (`statistics.half_width`): of the images, from each image's difference
of means, and of the seeds of each study.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from clipvisionalign.log import leave_out
from clipvisionalign.retrieval.metrics import MIN_IMAGES, SIGNIFICANCE_LEVEL
from clipvisionalign.study.aggregate import contributions_table
from clipvisionalign.study.gaps import Gaps
from clipvisionalign.study.interval_inversion import level_at_zero
from clipvisionalign.study.report.compare import same_data
from clipvisionalign.study.report.schema import ReportLike, StudyReport
from clipvisionalign.study.report.tables.table import ReportTable
from clipvisionalign.study.runner import open_kept_study
from clipvisionalign.study.statistics import (
    Estimate,
    holm_correction_of_tested,
    mean_squares,
    metric_bounds,
    t_quantile,
)
from clipvisionalign.study.trials import measure_trials
from clipvisionalign.study.units import image_units


@dataclass(frozen=True)
class Change:
    """What changed in a variant's rsum between two studies, B - A.

    Attributes:
        variant: The variant.
        estimate: The difference with its interval and p.
        p_holm: p corrected by Holm for all variants; None where it is not tested.
    """

    variant: str
    estimate: Estimate
    p_holm: float | None

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p is below `SIGNIFICANCE_LEVEL`."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANCE_LEVEL


def change_half_width(a: np.ndarray, b: np.ndarray, level: float = SIGNIFICANCE_LEVEL) -> float:
    """Half of the interval of the difference of two means, over the same images and other seeds.

    Args:
        a: (S, N) contributions of N images in S runs.
        b: (T, N) likewise of the other study.
        level: The level.

    Returns:
        Never below that of the images alone; with one run in a study its seeds are not counted.
    """
    images = a.shape[1]
    image_factor = t_quantile(images - 1, level) ** 2
    by_image = (b.mean(axis=0) - a.mean(axis=0)).var(ddof=1) / images
    rest, seeds = 0.0, 0.0
    for table in (a, b):
        count = len(table)
        if count > 1:
            rest += float(mean_squares(table)[2]) / (count * images)
            seeds += t_quantile(count - 1, level) ** 2 * table.mean(axis=1).var(ddof=1) / count
    return float(np.sqrt(max(image_factor * by_image, image_factor * max(by_image - rest, 0.0) + seeds)))


def compare_tables(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], metric: str = "rsum") -> list[Change]:
    """The change of each variant that two studies have.

    Args:
        a: (S, N) contributions of the images to the metric, by variant.
        b: (T, N) likewise of the other study, on the same images.
        metric: The metric.

    Returns:
        The changes, corrected for each other; without interval and p for fewer than `MIN_IMAGES` images, or where no
        two images differ; without p where a study has one seed.
    """
    bound = metric_bounds(metric)[1]
    estimates: dict[str, Estimate] = {}
    for name in (name for name in a if name in b):
        one, other = a[name], b[name]
        value = float(other.mean() - one.mean())
        if one.shape[1] < MIN_IMAGES or not np.ptp(other.mean(axis=0) - one.mean(axis=0)):
            estimates[name] = Estimate(value, None, None, None, None)
            continue
        margin = change_half_width(one, other)
        p = None
        # One seed: the interval is of images alone, and what another seed would have given is not known.
        if 1 not in (len(one), len(other)):
            p = level_at_zero(value, partial(change_half_width, one, other), one.shape[1])
        estimates[name] = Estimate(value, max(value - margin, -bound), min(value + margin, bound), None, p)
    corrected = holm_correction_of_tested([each.p for each in estimates.values()])
    return [Change(name, each, p) for (name, each), p in zip(estimates.items(), corrected, strict=True)]


def contributions_of_study(study: Path, metric: str = "rsum") -> dict[str, np.ndarray]:
    """What each image contributes to a metric in each run of a study that passed its audit.

    Args:
        study: The study's folder, with the ranks of its runs and its data.
        metric: The metric.

    Returns:
        (S, N) by variant.

    Raises:
        ValueError: Its data are not there, or no run has ranks.
    """
    gaps = Gaps(study)
    context, trials = open_kept_study(study, gaps)
    with leave_out(lambda record: True):
        measured = [each for each in measure_trials(context, trials, gaps) if each.measurements["audit"]["passed"]]
    if not measured:
        raise ValueError(f"{study}: no run has ranks beside the report")
    data = context.eval_data
    unit = image_units(data)
    by_variant = {name: [each.ranks["ranks"] for each in measured if each.variant == name] for name in
                  dict.fromkeys(each.variant for each in measured)}  # fmt: skip
    return {name: contributions_table(ranks, data.caption_image, metric, unit) for name, ranks in by_variant.items()}


def changes_table(a: str | Path, b: str | Path, reports: tuple[ReportLike, ReportLike]) -> ReportTable | str:
    """The table of changes between two studies, B - A.

    Args:
        a: The folder of a study.
        b: That of the other.
        reports: Their reports.

    Returns:
        The table; where nothing can be tested, the reason.
    """
    typed = StudyReport.of(reports[0]), StudyReport.of(reports[1])
    if not same_data(*typed):
        return "not tested: of other images or captions, the two do not answer the same question"
    try:
        tables = contributions_of_study(Path(a)), contributions_of_study(Path(b))
    except (ValueError, OSError) as error:
        return f"not tested: {error}"
    changes = compare_tables(*tables)
    if not changes:
        return "not tested: they have no variant in common"
    rows, keys = [], []
    for change in changes:
        each = change.estimate
        seeds = f"{len(tables[0][change.variant])} and {len(tables[1][change.variant])}"
        interval = "" if each.low is None else f" [{each.low:+.1f}, {each.high:+.1f}]"
        verdict = "not tested" if change.p_holm is None else "shown" if change.is_significant else "not shown"
        p = "" if change.p_holm is None else f"{change.p_holm:.3f}"
        rows.append([change.variant, f"{each.value:+.1f}{interval}", seeds, p, verdict])
        keys.append([None, each.value, None, change.p_holm, None])
    note = "The same images, paired; seeds of each study are its own. p is corrected by Holm over the variants."
    if any(len(table[change.variant]) == 1 for table in tables for change in changes):
        note += " With one seed in a study nothing is tested: what another seed would have given is not known."
    return ReportTable("changes", "Rsum, B - A", ["variant", "B - A", "seeds", "p", "change"], rows, keys, note)
