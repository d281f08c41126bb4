"""The plot of a blend: rsum on the run's own data against rsum on data that it was not tuned on, along alpha."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipvisionalign.files import atomic_write
from clipvisionalign.study.report.plots.style import INK, MARKERS, PALETTE


def plot_curve(document: dict[str, Any], path: Path) -> None:
    """Draw the curve.

    Args:
        document: of blend.json.
        path: PNG file to write.
    """
    # Not by pyplot: its state is that of a program that may draw in windows of its own.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    foreign = document["curve_data"][1:]
    panels = max(1, len(foreign))
    figure = Figure(figsize=(1.2 + 4.6 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    alphas = [point["alpha"] for point in document["curve"]]
    own = [point["rsum"][0] for point in document["curve"]]
    own_label = _axis_label(document["curve_data"][0], "")
    for panel in range(panels):
        axes = figure.add_subplot(1, panels, panel + 1)
        colour = PALETTE[panel % len(PALETTE)]
        if not foreign:
            axes.plot(alphas, own, color=colour, marker=MARKERS[0], linewidth=1.4)
            _mark_choice(axes, document, alphas, own)
            axes.set_xlabel("alpha (0: the base, 1: the run)")
            axes.set_ylabel(own_label)
            continue
        other = [point["rsum"][panel + 1] for point in document["curve"]]
        axes.plot(other, own, color=colour, marker=MARKERS[panel % len(MARKERS)], linewidth=1.4)
        _mark_choice(axes, document, other, own)
        for alpha, x, y in zip(alphas, other, own, strict=True):
            axes.annotate(f"{alpha:g}", (x, y), textcoords="offset points", xytext=(6, 4), fontsize=8, color=INK)
        if keep := document["alpha"]["keep"]:
            axes.axvline(
                keep * other[0], color=INK, linewidth=0.8, linestyle=":", label=f"{100 * keep:g} % of the base"
            )
        axes.set_xlabel(_axis_label(foreign[panel], ", not tuned on"))
        axes.set_ylabel(own_label)
        axes.margins(x=0.12, y=0.1)
    for axes in figure.axes:
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png", dpi=160)


def _axis_label(data: dict[str, Any], more: str) -> str:
    return f"rsum on {Path(data['data']).name}, {data['split']}{more} (chance {data['chance']:.1f})"


def _mark_choice(axes: Any, document: dict[str, Any], xs: list[float], ys: list[float]) -> None:
    """A ring around the model that was taken."""
    alpha = document["alpha"]["model"]
    position = [point["alpha"] for point in document["curve"]].index(alpha)
    word = "given" if document["alpha"]["given"] else "chosen"
    axes.plot(
        xs[position], ys[position], marker="o", markersize=14, markerfacecolor="none", markeredgecolor=INK,
        linestyle="none", label=f"{word}: alpha {alpha:g}",
    )  # fmt: skip
