"""The plot of a learning curve: figures with their intervals, the fit with its band, and twice the captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from clipvisionalign.adaptation.extrapolation import LEVEL
from clipvisionalign.adaptation.learning_curve import LearningCurve
from clipvisionalign.files import atomic_write
from clipvisionalign.study.report.plots.style import INK, PALETTE

#: Endings of files that a plot is written to.
PLOT_FORMATS = (".svg", ".png", ".pdf")


def save_plot(curve: LearningCurve, path: str | Path) -> Path:
    """Draw a learning curve.

    Args:
        curve: what `learning_curve` returned.
        path: file to write, of a name that ends in .svg, .png or .pdf.

    Returns:
        The file.

    Raises:
        ValueError: another ending.
    """
    path = check_plot_name(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    measured, twice = curve.points, curve.twice
    captions = np.array([point.captions for point in measured])
    grid = np.geomspace(captions[0], twice.captions, 100)
    value, low, high = np.array([curve.fitted.predict(each) for each in grid]).T
    colour, further = PALETTE[0], PALETTE[2]
    percent = f"{100 * LEVEL:.0f}%"
    axes.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0, label=f"{percent} interval of a training")
    axes.plot(grid, value, color=colour, linewidth=1.2, label="fit")
    for point in measured:
        figures = point.rsum
        reach = None
        if figures.low is not None and figures.high is not None:
            reach = [[max(figures.value - figures.low, 0)], [max(figures.high - figures.value, 0)]]
        axes.errorbar(
            point.captions, figures.value, reach, color=INK, marker="o", markersize=5, capsize=3, linewidth=1.2,
            linestyle="none", label="measured, 95% interval over images" if point is measured[-1] else None,
        )  # fmt: skip
    axes.errorbar(
        twice.captions, twice.value, [[twice.value - twice.low], [twice.high - twice.value]], color=further, marker="D",
        markersize=5, capsize=3, linewidth=1.2, linestyle="none", label=f"twice the captions, {percent} interval",
    )  # fmt: skip
    axes.axhline(curve.chance, color=INK, linewidth=0.8, linestyle="dotted", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks([*captions, twice.captions], [f"{each:,}" for each in (*captions, twice.captions)])
    axes.minorticks_off()
    axes.set_xlabel("training captions")
    axes.set_ylabel(f"rsum on dev ({curve.images:,} images, {curve.captions:,} captions)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with atomic_write(path) as aside:
        figure.savefig(aside, format=path.suffix[1:], dpi=150)
    return path


def check_plot_name(path: str | Path) -> Path:
    """Return the path of a plot.

    Args:
        path: a file name.

    Returns:
        The path.

    Raises:
        ValueError: its ending is none of `PLOT_FORMATS`.
    """
    path = Path(path)
    if path.suffix not in PLOT_FORMATS:
        raise ValueError(f"{path}: a plot is written as {', '.join(PLOT_FORMATS)}, by the end of its name")
    return path
