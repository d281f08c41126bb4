"""The learning curves of all runs."""

from __future__ import annotations

from typing import Any

from clipvisionalign.study.report.plots.style import variant_styles
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.schema.parts import Curve
from clipvisionalign.study.report.states import variant_label


def plot_curves(report: StudyReport) -> tuple[Any, ...] | None:
    """Loss and dev rsum of every run by step; None where no run has an epoch.

    Args:
        report: The report that is drawn.

    Returns:
        The figure, what it shows in words, and notes; None where nothing was measured.
    """
    from matplotlib import pyplot

    curves = [curve for curve in report.curves if curve.step]
    if not curves:
        return None
    styles, descriptions, labelled_variants = variant_styles(report), [], set()
    figure, (loss_axes, rsum_axes) = pyplot.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    losses: list[float] = []
    refused = {(row.variant, row.seed) for row in report.results.refused}
    without: list[str] = []
    for curve in curves:
        name, (colour, mark) = curve.variant, styles[curve.variant]
        before = base_steps(report, curve)
        steps = [before + step for step in curve.step]
        for axes, values in ((loss_axes, curve.loss), (rsum_axes, curve.rsum)):
            axes.plot(steps, values, color=colour, marker=mark, markersize=3.5, linewidth=1.1,
                      label=None if name in labelled_variants else variant_label(report, name))  # fmt: skip
        labelled_variants.add(name)
        losses += curve.loss
        dev_loss = [value for value in curve.dev_loss or () if value is not None]
        if dev_loss and len(dev_loss) == len(curve.dev_loss or ()):
            loss_axes.plot(steps, dev_loss, color=colour, linewidth=1.0, linestyle="dotted")
            losses += dev_loss
        note = f", the first {before} of them those of {report.plan.variants[name].base}" if before else ""
        descriptions.append(f"{name}, seed {curve.seed}: {curve.rsum[-1]:.1f} at step {steps[-1]}{note}")
        if (name, curve.seed) in refused:
            without.append(f"{name}, seed {curve.seed}")
    loss_axes.set_ylabel("training loss, dev loss dotted")
    rsum_axes.set_ylabel("dev rsum of the dual encoder")
    for axes in (loss_axes, rsum_axes):
        axes.set_xlabel("step, those of the run that it starts from too" if any(_bases(report)) else "step")
        axes.set_xlim(left=0)
    rsum_axes.set_ylim(bottom=0)
    if min(losses) >= 0:
        loss_axes.set_ylim(bottom=0)
    rsum_axes.legend(frameon=False, fontsize=9)
    about = f"Of runs that were refused, as their audit failed: {'; '.join(without)}." if without else ""
    return figure, f"Loss, dev loss and dev rsum after each epoch: {'; '.join(descriptions)}. {about}", about


def _bases(report: StudyReport) -> list[str]:
    return [variant.base for variant in report.plan.variants.values()]


def base_steps(report: StudyReport, curve: Curve) -> int:
    """Steps that a run's weights were trained before its own first, in the run that it starts from (`base`).

    Args:
        report: The report.
        curve: The run's curve.

    Returns:
        The number; 0 for a run from no other.
    """
    if curve.before is not None:
        return curve.before
    # Reports from before they were counted: what the other run's own curve ends with.
    base = report.plan.variants[curve.variant].base
    curve_by_trial = {(each.variant, each.seed): each for each in report.curves}
    base_curve = curve_by_trial.get((base, curve.seed))
    return base_steps(report, base_curve) + base_curve.step[-1] if base_curve and base_curve.step else 0
