"""The figures of a report, as SVG and PNG: for a page in light and dark, and for a paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.files import written_aside
from clipvisionalign.study.gaps import labelled, reason_of, state_of
from clipvisionalign.study.significant import significant

#: Told apart by people who see colours differently too, and on light and dark ground.
COLOURS = ("#4c78c8", "#2f9e6e", "#d97b29", "#c04a86", "#8a6fd1", "#8b8f3a", "#3aa0b5", "#a56b4a")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Lines and letters: on a page they take the page's own colour.
INK = "#1b1f24"


@dataclass(frozen=True)
class Drawn:
    """A figure. svg: to stand in a page; about: how to read it; told: what it shows, in words, for those who do not see
    it; failed: why it could not be drawn."""

    name: str
    svg: str
    title: str
    about: str
    told: str
    failed: str = ""


def draw_figures(report: dict[str, Any], folder: Path, say: Callable[[str], None] = print) -> dict[str, Drawn]:
    """Draw what the report has figures for, into `folder`; returns them by name. Files of those that an earlier report
    had, and this one has not, are removed. One that cannot be drawn is said, and has the reason."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(exist_ok=True)
    found = {}
    settings: Any = {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
        "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.titleweight": "bold", "axes.titlesize": 11,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        for name, (title, about, draw) in FIGURES.items():
            matplotlib.rcParams["svg.hashsalt"] = name
            files = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
            try:
                drawn = draw(report)
                if drawn is not None:
                    figure, told = drawn
                    found[name] = Drawn(name, _save(name, figure, folder), title, about, told)
                    continue
            except Exception as error:
                reason = reason_of(error)
                say(f"{files[1]}: NOT DRAWN: {reason}; the rest goes on")
                found[name] = Drawn(name, "", title, about, "", reason)
            pyplot.close("all")
            for file in files:
                file.unlink(missing_ok=True)
    return found


def _save(name: str, figure: Any, folder: Path) -> str:
    """Write a figure as PNG and SVG; returns the SVG for a page."""
    from matplotlib import pyplot

    with written_aside(folder / f"{name}.png") as aside:
        figure.savefig(aside, format="png", dpi=200)
    with written_aside(folder / f"{name}.svg") as aside:
        figure.savefig(aside, format="svg", metadata={"Date": None})
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Its size is the page's business; its id would stand in the page several times.
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)
    svg = re.sub(r'width="[^"]*pt" height="[^"]*pt"', "", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib names groups "axes_1", "figure_1": the same in every figure of a page.
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-told" ', 1)


def _styles(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """A colour and a mark for each variant, the same in every figure."""
    names = list(report["plan"]["variants"])
    return {name: (COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]) for i, name in enumerate(names)}


def _ends(estimate: dict[str, Any]) -> tuple[float, float, float]:
    """Value and both ends of the interval; the value itself where there is no interval to draw."""
    value = estimate["value"]
    return value, *(value if estimate[end] is None else estimate[end] for end in ("low", "high"))


def _whiskers(axes: Any, x: float, estimate: dict[str, Any], colour: str, mark: str, label: str = "") -> None:
    value, low, high = _ends(estimate)
    # An interval may be wider than what is shown of it; the middle never leaves the axes.
    reach = None if estimate["low"] is None else [[max(value - low, 0)], [max(high - value, 0)]]
    axes.errorbar(
        x, value, reach, color=colour, marker=mark, markersize=6,
        capsize=3, linewidth=1.4, linestyle="none", label=label or None,
    )  # fmt: skip


def _accuracy(report: dict[str, Any]) -> tuple[Any, str] | None:
    from matplotlib import pyplot

    variants = report["results"]["variants"]
    if not variants:
        return None
    styles = _styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    places = {name: place for place, name in enumerate(report["plan"]["variants"])}
    for name, found in variants.items():
        colour, mark = styles[name]
        place = places[name]
        _whiskers(axes, place, found["figures"]["rsum"], colour, mark)
        seeds = [run["rsum"]["value"] for run in found["runs"]]
        axes.plot([place + 0.16] * len(seeds), seeds, linestyle="none", marker="_", markersize=9, color=colour)
    ticks = [f"{name}\n({told})" if (told := state_of(report, name)) else name for name in places]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.6, len(ticks) - 0.4)
    axes.set_ylabel("rsum (0 to 600)")
    _keep_in(axes, [found["figures"]["rsum"] for found in variants.values()])
    told = "; ".join(f"{name} {found['figures']['rsum']['value']:.1f}" for name, found in variants.items())
    chance = report["results"].get("chance", {})
    told += "".join(f"; {labelled(report, name)}" for name in places if name not in variants)
    told += f"; a random ranking {chance['rsum']:.1f}" if chance else ""
    one = max(len(found["seeds"]) for found in variants.values()) < 2
    what = "its 95% interval of the pictures only, one seed" if one else "its 95% interval, and each seed's as a dash"
    return figure, f"Rsum of each variant with {what}: {told}."


def _keep_in(axes: Any, estimates: list[dict[str, Any]]) -> None:
    """Axes that show the intervals, unless one is so wide that nothing else could be seen."""
    values, lows, highs = (list(several) for several in zip(*map(_ends, estimates), strict=True))
    spread = max(max(values) - min(values), 0.15 * abs(float(np.mean(values))), 1e-6)
    bottom = max(min(lows), min(values) - 2.5 * spread)
    top = min(max(highs), max(values) + 2.5 * spread)
    axes.set_ylim(bottom - 0.06 * (top - bottom), top + 0.08 * (top - bottom))


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both: cheaper (first) and better (second)."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def _pareto(
    report: dict[str, Any], cost_of: Callable[[dict[str, Any]], float], label: str, log: bool
) -> tuple[Any, str] | None:
    from matplotlib import pyplot

    names = [name for name in report["results"]["variants"] if name in report["cost"]]
    if not names:
        return None
    styles = _styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    rsum = {name: report["results"]["variants"][name]["figures"]["rsum"] for name in names}
    costs = {name: cost_of(report["cost"][name]) for name in names}
    for name in names:
        _whiskers(axes, costs[name], rsum[name], *styles[name], label=labelled(report, name))
    front = _front([(costs[name], rsum[name]["value"]) for name in names])
    axes.plot(
        *zip(*front, strict=True),
        color=INK,
        linewidth=1,
        linestyle=":",
        drawstyle="steps-post",
        zorder=0,
        label="front",
    )
    if log and max(costs.values()) > 5 * min(costs.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    _keep_in(axes, [rsum[name] for name in names])
    axes.set_xlabel(label)
    axes.set_ylabel("rsum")
    axes.legend(frameon=False, fontsize=9, ncols=min(5, len(names) + 1), loc="lower left", bbox_to_anchor=(0, 1.0))
    told = "; ".join(
        f"{name} {rsum[name]['value']:.1f} at {format(costs[name], significant(costs[name], 4))}" for name in names
    )
    best = [name for name in names if (costs[name], rsum[name]["value"]) in front]
    return figure, f"Rsum against {label}: {told}. On the front: {', '.join(best)}."


def _pareto_time(report: dict[str, Any]) -> tuple[Any, str] | None:
    label = f"ms for a text query over {report['data']['gallery']['images']:,} pictures"
    return _pareto(report, lambda cost: cost["ms_per_query"], label, log=True)


def _pareto_memory(report: dict[str, Any]) -> tuple[Any, str] | None:
    return _pareto(report, lambda cost: cost["peak_memory_mib"], "peak memory, MiB", log=False)


def _grouped(
    report: dict[str, Any], groups: list[str], value: Callable[[str, str], dict[str, float] | None], ylabel: str,
    line: float | None = None, control: Callable[[str], dict[str, float] | None] | None = None,
) -> tuple[Any, str]:  # fmt: skip
    from matplotlib import pyplot

    names, styles = list(report["results"]["variants"]), _styles(report)
    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    told = []
    width = 0.7 / max(1, len(names) + (control is not None))
    for number, name in enumerate(names):
        label = labelled(report, name)
        for place, group in enumerate(groups):
            found = value(name, group)
            if found is None:
                continue
            x = place + (number - (len(names) - 1) / 2) * width
            _whiskers(axes, x, found, *styles[name], label=label)
            label = ""
            told.append(f"{group}, {name} {found['value']:.1f}")
    if control is not None:
        for place, group in enumerate(groups):
            found = control(group)
            if found is not None:
                x = place + (len(names) - (len(names) - 1) / 2) * width
                axes.plot(x, found["value"], marker="x", color=INK, linestyle="none",
                          label="words alone" if place == 0 else None)  # fmt: skip
                told.append(f"{group}, words alone {found['value']:.1f}")
    if line is not None:
        axes.axhline(line, color=INK, linewidth=1, linestyle=":", label="chance")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=9, ncols=len(names) + 2, loc="lower left", bbox_to_anchor=(0, 1.0))
    return figure, "; ".join(told) + "."


def _by_length(report: dict[str, Any]) -> tuple[Any, str] | None:
    results = report["results"]
    if not results["variants"]:
        return None
    words = results["lengths"]["words"]
    labels = {f"{third}\n{low} to {high} words": third for third, (low, high) in words.items()}

    def value(name: str, group: str) -> dict[str, float]:
        return results["variants"][name]["by_length"][labels[group]]["recall_at_5"]

    figure, told = _grouped(report, list(labels), value, "R@5 text to image, %")
    chance = results["lengths"].get("chance", {})
    told += "".join(f" By chance, {third} {found['recall_at_5']:.1f}." for third, found in chance.items())
    return figure, "Recall at 5 of pictures by captions of each third of length: " + told.replace("\n", ", ")


def _composition(report: dict[str, Any]) -> tuple[Any, str] | None:
    sets = report["results"]["composition"]
    rows = [(name, row) for name, several in sets.items() for row in several]
    if not rows:
        return None
    many = len(sets) > 1
    groups = list(dict.fromkeys(f"{row['kind']}\n{name}" if many else row["kind"] for name, row in rows))

    def key(name: str, row: dict[str, Any]) -> str:
        return f"{row['kind']}\n{name}" if many else row["kind"]

    def value(variant: str, group: str) -> dict[str, float] | None:
        return next((row for name, row in rows if row["variant"] == variant and key(name, row) == group), None)

    def control(group: str) -> dict[str, float] | None:
        every = [(name, row) for name, several in report["text_only"].items() for row in several]
        return next((row for name, row in every if key(name, row) == group), None)

    figure, told = _grouped(report, groups, value, "true caption above its twin, %", 50.0, control)
    return figure, "Share of pictures whose true caption outscores its twin, chance 50: " + told.replace("\n", ", ")


def _curves(report: dict[str, Any]) -> tuple[Any, str] | None:
    from matplotlib import pyplot

    curves = [curve for curve in report["curves"] if curve["step"]]
    if not curves:
        return None
    styles = _styles(report)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    firsts = {curve["variant"]: curve["seed"] for curve in reversed(curves)}
    for curve in curves:
        colour, mark = styles[curve["variant"]]
        first = curve["seed"] == firsts[curve["variant"]]
        for axes, kind in ((left, "loss"), (right, "rsum")):
            axes.plot(curve["step"], curve[kind], color=colour, marker=mark, markersize=3.5, linewidth=1.1,
                      label=labelled(report, curve["variant"]) if first else None)  # fmt: skip
        if curve.get("dev_loss") and None not in curve["dev_loss"]:
            left.plot(curve["step"], curve["dev_loss"], color=colour, linewidth=1.0, linestyle="dotted")
    left.set_ylabel("training loss, dev loss dotted")
    right.set_ylabel("dev rsum of the dual encoder")
    for axes in (left, right):
        axes.set_xlabel("step")
    right.legend(frameon=False, fontsize=9)
    told = "; ".join(f"{c['variant']}, seed {c['seed']}: {c['rsum'][-1]:.1f} at step {c['step'][-1]}" for c in curves)
    return figure, f"Loss, dev loss and dev rsum after each epoch: {told}."


def _length_time(report: dict[str, Any]) -> tuple[Any, str] | None:
    from matplotlib import pyplot

    costs = {name: cost["by_length"] for name, cost in report["cost"].items() if cost.get("by_length")}
    if not costs:
        return None
    styles = _styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for name, rows in costs.items():
        colour, mark = styles[name]
        axes.plot([row["tokens"] for row in rows], [row["ms_alone"] for row in rows], color=colour, marker=mark,
                  markersize=5, linewidth=1.2, label=labelled(report, name))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.08 * max(row["ms_alone"] for rows in costs.values() for row in rows))
    axes.set_xlabel("tokens of the caption")
    axes.set_ylabel("ms, one caption")
    axes.legend(frameon=False, fontsize=9)
    told = "; ".join(
        f"{name} {rows[0]['ms_alone']:.1f} ms at {rows[0]['tokens']} tokens, "
        f"{rows[-1]['ms_alone']:.1f} ms at {rows[-1]['tokens']}"
        for name, rows in costs.items()
    )
    return figure, f"Milliseconds to encode one caption by its length: {told}."


def _protocol(report: dict[str, Any]) -> tuple[Any, str] | None:
    from matplotlib import pyplot

    other = report["what_it_would_have_looked_like"]
    if not other:
        return None
    bars = other["bars"]
    figure, axes = pyplot.subplots(figsize=(7.2, 0.55 * len(bars) + 1.0), layout="constrained")
    for place, bar in enumerate(bars[::-1]):
        value = 100 * bar["recall_at_1"]
        honest: Any = {"color": COLOURS[0]}
        fenced: Any = {"color": "#b9bec6", "edgecolor": "#7d838c", "hatch": "//"}
        axes.barh(place, value, 0.62, **(honest if bar["honest"] else fenced))
        axes.text(value + 1, place, f"{value:.1f}", va="center")
        if "chance" in bar:
            axes.plot([100 * bar["chance"]["recall_at_1"]] * 2, [place - 0.31, place + 0.31], color=INK, linewidth=1.4)
    axes.set_yticks(range(len(bars)), [bar["protocol"] for bar in bars[::-1]])
    axes.set_xlim(0, 112)
    axes.set_xlabel("R@1, %, mean of both ways, same trained towers")
    told = "; ".join(
        f"{bar['protocol']} {100 * bar['recall_at_1']:.1f}"
        + (f" (chance {100 * bar['chance']['recall_at_1']:.1f})" if "chance" in bar else "")
        for bar in bars
    )
    return figure, f"Recall at 1 of the same towers by protocol, only the first of them a result: {told}."


FIGURES: dict[str, tuple[str, str, Callable[[dict[str, Any]], tuple[Any, str] | None]]] = {
    "accuracy": (
        "What each design finds",
        "Rsum with its 95% interval over seeds and pictures (of one seed: pictures only); each seed's own as a dash.",
        _accuracy,
    ),
    "time": ("Accuracy against time", "Dotted: the front, beyond which none is both quicker and better.", _pareto_time),
    "memory": (
        "Accuracy against memory", "Dotted: the front, beyond which none is both smaller and better.", _pareto_memory
    ),
    "length": (
        "By the length of the caption", "Recall of the true picture within the first 5, with 95% intervals.", _by_length
    ),
    "composition": (
        "True captions against their twins", "Share of pictures whose true caption outscores its twin. A cross: what a "
        "language model that sees no picture gets.", _composition
    ),
    "caption-time": ("Time by the length of the caption", "Medians, one caption at a time.", _length_time),
    "curves": ("How the training went", "A line for each seed, a mark for each epoch.", _curves),
    "protocol": (
        "The same towers under other protocols", "Only the first bar is a result. A dark line: chance.", _protocol
    ),
}  # fmt: skip
