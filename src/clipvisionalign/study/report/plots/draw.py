"""Draws every plot of a report, as SVG and PNG: for a page in light and dark, and for a paper."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from clipvisionalign.files import atomic_write
from clipvisionalign.study.aggregate import NO_INTERVALS
from clipvisionalign.study.gaps import error_reason
from clipvisionalign.study.report.plots.accuracy import plot_accuracy
from clipvisionalign.study.report.plots.captions import plot_composition, plot_length
from clipvisionalign.study.report.plots.cost import plot_length_time, plot_memory, plot_time
from clipvisionalign.study.report.plots.frontier import plot_frontier
from clipvisionalign.study.report.plots.protocols import plot_protocols
from clipvisionalign.study.report.plots.style import INK
from clipvisionalign.study.report.plots.training import plot_curves
from clipvisionalign.study.report.schema import ReportLike, StudyReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plot:
    """A plot.

    Args:
        name: of its files.
        svg: the image, to be embedded in a page.
        title: its heading.
        description: how to read it.
        alt_text: what it shows, in words.
        error: why it could not be drawn; empty otherwise.
    """

    name: str
    svg: str
    title: str
    description: str
    alt_text: str
    error: str = ""


PLOTS: dict[str, tuple[str, str, Callable[[StudyReport], tuple[Any, ...] | None]]] = {
    "accuracy": (
        "What each design finds",
        "Rsum with its 95% interval over seeds and images (of one seed: images only); each seed's own as a dash.",
        plot_accuracy,
    ),
    "time": (
        "Accuracy against time", "Upright lines: 95% intervals.", plot_time
    ),
    "frontier": (
        "Re-ranking against time", "Of one seed each. Dashed: the first hits of every search re-ranked, the leftmost "
        "mark none of them. Solid: the hits within a margin of the first one, a margin at a time. Star: the margin "
        "that the other half of the gallery chose. A mark without a line: a variant that does not re-rank, all seeds.",
        plot_frontier
    ),
    "memory": (
        "Accuracy against memory", "Upright lines: 95% intervals.", plot_memory
    ),
    "length": (
        "By the length of the caption", "Recall of the true image within the first 5, with 95% intervals.", plot_length
    ),
    "composition": (
        "True captions against their foils", "Share of pairs whose true caption outscores its foil. A cross: what a "
        "language model that sees no image gets.", plot_composition
    ),
    "caption-time": ("Time by the length of the caption", "Medians, one caption at a time.", plot_length_time),
    "curves": ("How the training went", "A line for each seed, a mark for each epoch.", plot_curves),
    "protocol": (
        "The same towers under other protocols", "All by the towers' vectors alone, without what late interaction "
        "or fusion adds to results. Only the first bar keeps their rules: the whole gallery, and captions that see no "
        "image. A dark line: chance.", plot_protocols
    ),
}  # fmt: skip


def draw_plots(report: ReportLike, folder: Path) -> dict[str, Plot]:
    """Draw every plot that the report has figures for, as SVG and PNG.

    Args:
        report: A report, or the document that report.json holds.
        folder: Where the files are written; those of plots that only an earlier report had are removed.

    Returns:
        The plots by name; one that cannot be drawn has the reason in `error`, and the others are drawn all the same.

    Raises:
        ReportError: The document is not a report.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    typed = StudyReport.of(report)
    folder.mkdir(exist_ok=True)
    plots = {}
    settings: Any = {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
        "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.titleweight": "bold", "axes.titlesize": 11,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        for name, (title, description, draw) in PLOTS.items():
            matplotlib.rcParams["svg.hashsalt"] = name
            files = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
            try:
                result = draw(typed)
                if result is not None:
                    figure, alt_text, *notes = result
                    if typed.results.has_no_intervals and "95% interval" in description:
                        notes.append(f"There are {NO_INTERVALS}.")
                    said = " ".join(filter(None, [description, *notes]))
                    plots[name] = Plot(name, _save_plot(name, figure, folder), title, said, alt_text.strip())
                    continue
            except Exception as error:
                reason = error_reason(error)
                logger.info(f"{files[1]}: NOT DRAWN: {reason}; the rest continues")
                plots[name] = Plot(name, "", title, description, "", reason)
            pyplot.close("all")
            for file in files:
                file.unlink(missing_ok=True)
    return plots


def _save_plot(name: str, figure: Any, folder: Path) -> str:
    """Write a figure as PNG and SVG; returns the SVG for a page."""
    from matplotlib import pyplot

    for number, background in enumerate([figure.patch, *(axes.patch for axes in figure.axes)]):
        background.set_gid(f"ground_{number}")
    with atomic_write(folder / f"{name}.png") as aside:
        figure.savefig(aside, format="png", dpi=200)
    # Laid out once: that takes as long as the drawing.
    figure.set_layout_engine("none")
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    with atomic_write(folder / f"{name}.svg") as aside:
        aside.write_text(svg, encoding="utf-8")
    # On a page it stands on the page's own ground.
    svg = re.sub(r'(<g id="ground_\d+">\s*<path [^>]*?style=")[^"]*"', r'\1fill: none"', svg)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Its size is the page's business; its id would stand in the page several times.
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)
    svg = re.sub(r'width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib names groups "axes_1", "figure_1": the same in every figure of a page.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-told" ', 1)
