"""The plot of a blend: rsum on the run's own data against rsum on data that it was not tuned on, along alpha."""

from __future__ import annotations

from collections.abc import Sequence
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
        for number, (label, x, y) in enumerate(point_labels(alphas, other, own)):
            # In turns above and beneath, so that neighbours do not cover each other.
            offset = (0, 9 if number % 2 == 0 else -16)
            axes.annotate(label, (x, y), textcoords="offset points", xytext=offset, ha="center", fontsize=8, color=INK)
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


def point_labels(alphas: Sequence[float], xs: Sequence[float], ys: Sequence[float]) -> list[tuple[str, float, float]]:
    """One label for neighbours of a curve that are at one place.

    Args:
        alphas: (A,) in ascending order.
        xs: (A,) places along the first axis.
        ys: (A,) along the second.

    Returns:
        Label and place of each.

    >>> point_labels([0, 0.5, 1], [300.0, 300.0, 280.0], [100.0, 100.0, 120.0])
    [('0 to 0.5', 300.0, 100.0), ('1', 280.0, 120.0)]
    """
    # Nearer than a label is wide.
    near = [0.02 * max(max(axis) - min(axis), 1e-9) for axis in (xs, ys)]
    groups: list[list[int]] = []
    for position, point in enumerate(zip(xs, ys, strict=True)):
        last = groups[-1][-1] if groups else None
        if last is not None and all(
            abs(a - b) <= limit for a, b, limit in zip(point, (xs[last], ys[last]), near, strict=True)
        ):
            groups[-1].append(position)
        else:
            groups.append([position])
    labels = [" to ".join(f"{alphas[end]:g}" for end in dict.fromkeys((group[0], group[-1]))) for group in groups]
    return [(label, xs[group[0]], ys[group[0]]) for label, group in zip(labels, groups, strict=True)]


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
