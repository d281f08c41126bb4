"""The figures of a report, as SVG and PNG: for a page in light and dark, and for a paper."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.files import atomic_write
from clipvisionalign.number_format import significant_format, word_range
from clipvisionalign.study.aggregate import NO_INTERVALS, no_intervals
from clipvisionalign.study.cost import (
    DEVICE_MEMORY,
    MEMORY,
    MS_PER_CAPTION,
    MS_PER_QUERY,
    NO_SPREAD,
    NOT_SAME,
    WITHIN_SPREAD,
    CostMetric,
    CostRange,
    conditions_by_variant,
    cost_ranges,
    in_rounds,
    lengths_apart,
    no_comparison_reason,
    ranges_differ,
    same_conditions,
)
from clipvisionalign.study.gaps import error_reason, variant_label, variant_state
from clipvisionalign.study.report.summary import Claim, drawn_units, shared_lengths_told

#: Told apart by people who see colours differently too, and on light and dark ground.
PALETTE = ("#4c78c8", "#2f9e6e", "#d97b29", "#c04a86", "#8a6fd1", "#8b8f3a", "#3aa0b5", "#a56b4a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Lines and letters: on a page they take the page's own colour.
INK = "#1b1f24"


@dataclass(frozen=True)
class Plot:
    """A figure. svg: to stand in a page; about: how to read it; told: what it shows, in words, for those who do not see
    it; failed: why it could not be drawn."""

    name: str
    svg: str
    title: str
    description: str
    alt_text: str
    error: str = ""


def draw_plots(report: dict[str, Any], folder: Path, say: Callable[[str], None] = print) -> dict[str, Plot]:
    """Draw what the report has figures for, into `folder`; returns them by name. Files of those that an earlier report
    had, and this one has not, are removed. One that cannot be drawn is said, and has the reason."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
                result = draw(report)
                if result is not None:
                    figure, alt_text, *notes = result
                    if no_intervals(report) and "95% interval" in description:
                        notes.append(f"There are {NO_INTERVALS}.")
                    said = " ".join(filter(None, [description, *notes]))
                    plots[name] = Plot(name, _save_plot(name, figure, folder), title, said, alt_text.strip())
                    continue
            except Exception as error:
                reason = error_reason(error)
                say(f"{files[1]}: NOT DRAWN: {reason}; the rest goes on")
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


def _styles(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """A colour and a mark for each variant, the same in every figure."""
    names = list(report["plan"]["variants"])
    return {name: (PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def _interval_ends(estimate: dict[str, Any]) -> tuple[float, float, float]:
    """Value and both ends of the interval; the value itself where there is no interval to draw."""
    value = estimate["value"]
    return value, *(value if estimate[end] is None else estimate[end] for end in ("low", "high"))


def _whiskers(axes: Any, x: float, estimate: dict[str, Any], colour: str, mark: str, label: str = "") -> None:
    value, low, high = _interval_ends(estimate)
    # An interval may be wider than what is shown of it; the middle never leaves the axes.
    reach = None if estimate["low"] is None else [[max(value - low, 0)], [max(high - value, 0)]]
    axes.errorbar(
        x, value, reach, color=colour, marker=mark, markersize=6,
        capsize=3, linewidth=1.4, linestyle="none", label=label or None,
    )  # fmt: skip


def _plot_accuracy(report: dict[str, Any]) -> tuple[Any, ...] | None:
    from matplotlib import pyplot

    variants = report["results"]["variants"]
    if not variants:
        return None
    styles = _styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4), layout="constrained")
    positions = {name: position for position, name in enumerate(report["plan"]["variants"])}
    for name, variant in variants.items():
        colour, mark = styles[name]
        position = positions[name]
        _whiskers(axes, position, variant["figures"]["rsum"], colour, mark)
        seeds = [run["rsum"]["value"] for run in variant["runs"]]
        axes.plot([position + 0.16] * len(seeds), seeds, linestyle="none", marker="_", markersize=9, color=colour)
    ticks = [f"{name}\n({text})" if (text := variant_state(report, name)) else name for name in positions]
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlim(-0.6, len(ticks) - 0.4)
    axes.set_ylabel("rsum (0 to 600)")
    _zero_based_axis(axes, [variant["figures"]["rsum"] for variant in variants.values()], 600)
    text = "; ".join(f"{name} {variant['figures']['rsum']['value']:.1f}" for name, variant in variants.items())
    chance = report["results"].get("chance", {})
    text += "".join(f"; {variant_label(report, name)}" for name in positions if name not in variants)
    text += f"; a random ranking {chance['rsum']:.1f}" if chance else ""
    single_seed = max(len(variant["seeds"]) for variant in variants.values()) < 2
    of = f"of the {drawn_units(report)} only, one seed"
    interval_text = f"its 95% interval {of}" if single_seed else "its 95% interval, and each seed's as a dash"
    if no_intervals(report):
        interval_text = "no interval" if single_seed else "no interval, and each seed's as a dash"
    text = f"Rsum of each variant with {interval_text}: {text}."
    if "identities" not in report["results"] or no_intervals(report):
        return figure, text
    return figure, text, "Images of one identity count as one in the intervals."


def _zero_based_axis(axes: Any, estimates: list[dict[str, Any]], highest: float) -> None:
    """An axis from 0 that shows all intervals, and no more than there is: a difference looks as large as it is."""
    top = max((high for _, _, high in map(_interval_ends, estimates)), default=highest)
    axes.set_ylim(0, 1.04 * highest if top > 0.9 * highest else max(1.1 * top, 0.02 * highest))


def shown_better(report: dict[str, Any]) -> set[tuple[str, str]]:
    """Pairs of variants of which the first was shown to find more."""
    rows = [row for row in report["results"]["differences"] if row["figure"] == "rsum" and row["shown"]]
    return {(row["a"], row["b"]) if row["value"] > 0 else (row["b"], row["a"]) for row in rows}


def dearer_and_better(
    names: Sequence[str], ranges: dict[str, CostRange], report: dict[str, Any]
) -> list[tuple[str, str]]:
    """Pairs of variants of which the first costs more beyond the spread of both, and was shown to find more."""
    shown = shown_better(report)
    return [
        (a, b)
        for a in names
        for b in names
        if (a, b) in shown and sum(ranges[a]) > sum(ranges[b]) and ranges_differ(ranges[a], ranges[b])
    ]


def pareto_front(names: Sequence[str], ranges: dict[str, CostRange], report: dict[str, Any]) -> list[str]:
    """The variants, cheapest first, of which each costs more than the one before and was shown to find more.

    ranges: what each costs, see `costs.ranges_of`. Empty where there are no two such.
    """
    significant_pairs = shown_better(report)
    rsum = {name: report["results"]["variants"][name]["figures"]["rsum"]["value"] for name in names}
    front: list[str] = []
    for name in sorted(names, key=lambda name: sum(ranges[name])):
        if front and not ranges_differ(ranges[front[-1]], ranges[name]):
            # As cheap as the one before: the better of the two stays.
            front[-1] = max(front[-1], name, key=rsum.__getitem__)
        elif not front or (name, front[-1]) in significant_pairs:
            front.append(name)
    steps = list(pairwise(front))
    separated = all((b, a) in significant_pairs and ranges_differ(ranges[a], ranges[b]) for a, b in steps)
    return front if steps and separated else []


def _plot_pareto(report: dict[str, Any], cost: CostMetric, label: str, log: bool) -> tuple[Any, ...] | None:
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    names = [name for name in report["results"]["variants"] if cost.value(report["cost"].get(name)) is not None]
    if not names:
        return None
    styles = _styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    rsum = {name: report["results"]["variants"][name]["figures"]["rsum"] for name in names}
    costs = {name: cost.value(report["cost"][name]) for name in names}
    ranges = cost_ranges(report["cost"], names, cost)
    reason = no_comparison_reason(report["cost"], names, cost)
    for name in names:
        _whiskers(axes, costs[name], rsum[name], *styles[name], label=variant_label(report, name))
        if ranges:
            axes.plot(ranges[name], [rsum[name]["value"]] * 2, color=styles[name][0], linewidth=1.4)
    front = pareto_front(names, ranges, report) if ranges and not reason else []
    if front:
        axes.plot([costs[name] for name in front], [rsum[name]["value"] for name in front], color=INK, linewidth=1,
                  linestyle=":", drawstyle="steps-post", zorder=0, label="front")  # fmt: skip
    if log and max(costs.values()) > 5 * min(costs.values()) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(x=0.12)
    else:
        axes.set_xlim(0, 1.15 * max([*costs.values(), *(high for _, high in (ranges or {}).values())]))
    _zero_based_axis(axes, list(rsum.values()), 600)
    axes.set_xlabel(label)
    axes.set_ylabel("rsum")
    axes.legend(frameon=False, fontsize=9, ncols=min(5, len(names) + 1), loc="lower left", bbox_to_anchor=(0, 1.0))
    alt_text = "; ".join(
        f"{name} {rsum[name]['value']:.1f} at {format(costs[name], significant_format(costs[name], 4))}"
        for name in names
    )
    note = _front_note(front, names, reason, dearer_and_better(names, ranges, report) if ranges and not reason else [])
    if ranges:
        note = f"Level lines: from the lowest to the highest round. {note}".strip()
    absent = [name for name in report["results"]["variants"] if name not in names]
    if absent:
        note = f"{note} Not shown, as it was not measured of them: {', '.join(absent)}.".strip()
    return figure, f"Rsum against {label}: {alt_text}. {note}", note


def _front_note(front: Sequence[str], names: Sequence[str], reason: str, better: Sequence[tuple[str, str]]) -> str:
    """What may be said of the front, and of differences where there is none. why: see `costs.not_compared`; better: see
    `dearer_and_better`."""
    if front:
        return f"Dotted: the front, along which each was shown to find more and costs more: {', '.join(front)}."
    if better:
        return f"Shown to find more, and costs more: {', '.join(f'{a} than {b}' for a, b in better)}."
    return _spread_note(reason) or ("None that costs more was shown to find more." if len(names) > 1 else "")


def _spread_note(reason: str) -> str:
    """What is to be said of differences of cost that are not shown. why: see `costs.not_compared`."""
    if reason in ("", WITHIN_SPREAD):
        return reason and f"{reason.capitalize()}."
    return f"{reason.capitalize()}: none is shown to cost less."


def _plot_time(report: dict[str, Any]) -> tuple[Any, ...] | None:
    images = report["data"]["gallery"]["images"]
    return _plot_pareto(report, MS_PER_QUERY, f"ms for a text query over {count_noun(images, 'image')}", log=True)


def _plot_memory(report: dict[str, Any]) -> tuple[Any, ...] | None:
    """The memory that has to be there: the GPU's where one was used, else the process's. Those whose figure is of
    another memory are named and not shown."""
    on_device = any(DEVICE_MEMORY.value(cost) is not None for cost in report["cost"].values())
    cost, memory_kind = (DEVICE_MEMORY, "GPU") if on_device else (MEMORY, "whole process")
    return _plot_pareto(report, cost, f"peak memory, {memory_kind}, MiB", log=False)


def _plot_groups(
    report: dict[str, Any], groups: list[str], value: Callable[[str, str], dict[str, float] | None], ylabel: str,
    reference: float | None = None, baseline: Callable[[str], dict[str, float] | None] | None = None,
) -> tuple[Any, str]:  # fmt: skip
    from matplotlib import pyplot

    names, styles = list(report["results"]["variants"]), _styles(report)
    figure, axes = pyplot.subplots(figsize=(7.2, 3.4), layout="constrained")
    descriptions = []
    width = 0.7 / max(1, len(names) + (baseline is not None))
    for number, name in enumerate(names):
        label = variant_label(report, name)
        for position, group in enumerate(groups):
            estimate = value(name, group)
            if estimate is None:
                continue
            x = position + (number - (len(names) - 1) / 2) * width
            _whiskers(axes, x, estimate, *styles[name], label=label)
            label = ""
            descriptions.append(f"{group}, {name} {estimate['value']:.1f}")
    if baseline is not None:
        label = "words alone"
        for position, group in enumerate(groups):
            estimate = baseline(group)
            if estimate is not None:
                x = position + (len(names) - (len(names) - 1) / 2) * width
                axes.plot(x, estimate["value"], marker="x", color=INK, linestyle="none",
                          label=label or None)  # fmt: skip
                label = ""
                descriptions.append(f"{group}, words alone {estimate['value']:.1f}")
    if reference is not None:
        axes.axhline(reference, color=INK, linewidth=1, linestyle=":", label="chance")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 104)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, fontsize=9, ncols=len(names) + 2, loc="lower left", bbox_to_anchor=(0, 1.0))
    return figure, "; ".join(descriptions) + "."


def _plot_length(report: dict[str, Any]) -> tuple[Any, ...] | None:
    results = report["results"]
    if not results["variants"]:
        return None
    word_spans = results["lengths"]["words"]
    labels = {f"{tercile}\n{word_range(span)}": tercile for tercile, span in word_spans.items()}

    def value(name: str, group: str) -> dict[str, float]:
        return results["variants"][name]["by_length"][labels[group]]["recall_at_5"]

    figure, alt_text = _plot_groups(report, list(labels), value, "R@5 text to image, %")
    chance = results["lengths"].get("chance", {})
    alt_text += "".join(
        f" By chance, {tercile} {chance_recall['recall_at_5']:.1f}." for tercile, chance_recall in chance.items()
    )
    about = shared_lengths_told(Claim(report, "length"))
    of = "Recall at 5 of images by captions of each part of length: " + alt_text.replace("\n", ", ")
    return (figure, f"{of} {about}", about) if about else (figure, of)


def _plot_composition(report: dict[str, Any]) -> tuple[Any, str] | None:
    sets = report["results"]["composition"]
    rows = [(name, row) for name, set_rows in sets.items() for row in set_rows]
    if not rows:
        return None
    multiple_sets = len(sets) > 1
    groups = list(dict.fromkeys(f"{row['kind']}\n{name}" if multiple_sets else row["kind"] for name, row in rows))

    def key(name: str, row: dict[str, Any]) -> str:
        return f"{row['kind']}\n{name}" if multiple_sets else row["kind"]

    def value(variant: str, group: str) -> dict[str, float] | None:
        return next((row for name, row in rows if row["variant"] == variant and key(name, row) == group), None)

    def baseline(group: str) -> dict[str, float] | None:
        all_rows = [(name, row) for name, set_rows in report["text_only"].items() for row in set_rows]
        return next((row for name, row in all_rows if key(name, row) == group), None)

    figure, alt_text = _plot_groups(report, groups, value, "true caption above its twin, %", 50.0, baseline)
    return figure, "Share of pairs whose true caption outscores its twin, chance 50: " + alt_text.replace("\n", ", ")


def _plot_curves(report: dict[str, Any]) -> tuple[Any, ...] | None:
    from matplotlib import pyplot

    curves = [curve for curve in report["curves"] if curve["step"]]
    if not curves:
        return None
    styles, descriptions, labelled_variants = _styles(report), [], set()
    figure, (loss_axes, rsum_axes) = pyplot.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    losses = []
    refused = {(row["variant"], row["seed"]) for row in report["results"]["refused"]}
    without: list[str] = []
    for curve in curves:
        name, (colour, mark) = curve["variant"], styles[curve["variant"]]
        before = base_steps(report, curve)
        steps = [before + step for step in curve["step"]]
        for axes, kind in ((loss_axes, "loss"), (rsum_axes, "rsum")):
            axes.plot(steps, curve[kind], color=colour, marker=mark, markersize=3.5, linewidth=1.1,
                      label=None if name in labelled_variants else variant_label(report, name))  # fmt: skip
        labelled_variants.add(name)
        losses += curve["loss"]
        if curve.get("dev_loss") and None not in curve["dev_loss"]:
            loss_axes.plot(steps, curve["dev_loss"], color=colour, linewidth=1.0, linestyle="dotted")
            losses += curve["dev_loss"]
        note = f", the first {before} of them those of {report['plan']['variants'][name]['base']}" if before else ""
        descriptions.append(f"{name}, seed {curve['seed']}: {curve['rsum'][-1]:.1f} at step {steps[-1]}{note}")
        if (name, curve["seed"]) in refused:
            without.append(f"{name}, seed {curve['seed']}")
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


def _bases(report: dict[str, Any]) -> list[str]:
    return [variant.get("base", "") for variant in report["plan"]["variants"].values()]


def base_steps(report: dict[str, Any], curve: dict[str, Any]) -> int:
    """Steps that a run's weights were trained before its own first, in the run that it starts from (`base`)."""
    if "before" in curve:
        return int(curve["before"])
    # Reports from before they were counted: what the other run's own curve ends with.
    base = report["plan"]["variants"][curve["variant"]].get("base")
    curve_by_trial = {(each["variant"], each["seed"]): each for each in report["curves"]}
    base_curve = curve_by_trial.get((base, curve["seed"]))
    return base_steps(report, base_curve) + base_curve["step"][-1] if base_curve and base_curve["step"] else 0


def _plot_length_time(report: dict[str, Any]) -> tuple[Any, ...] | None:
    from matplotlib import pyplot

    costs = {name: cost["by_length"] for name, cost in report["cost"].items() if cost.get("by_length")}
    if not costs:
        return None
    styles = _styles(report)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for name, rows in costs.items():
        colour, mark = styles[name]
        axes.plot([row["tokens"] for row in rows], [row["ms_alone"] for row in rows], color=colour, marker=mark,
                  markersize=5, linewidth=1.2, label=variant_label(report, name))  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.08 * max(row["ms_alone"] for rows in costs.values() for row in rows))
    axes.set_xlabel("tokens of the caption")
    axes.set_ylabel("ms, one caption")
    axes.legend(frameon=False, fontsize=9)
    alt_text = "; ".join(
        f"{name} {rows[0]['ms_alone']:.1f} ms at {rows[0]['tokens']} tokens, "
        f"{rows[-1]['ms_alone']:.1f} ms at {rows[-1]['tokens']}"
        for name, rows in costs.items()
    )
    note = _of_lengths(report["cost"], list(costs))
    return figure, f"Milliseconds to encode one caption by its length: {alt_text}. {note}", note


def _of_lengths(costs: dict[str, Any], names: Sequence[str]) -> str:
    """What may be said of the lines of time by length: at which lengths some differ beyond their own spread."""
    if len(names) < 2:
        return ""
    if not same_conditions(conditions_by_variant(costs, names)):
        return _spread_note(NOT_SAME)
    apart, together = lengths_apart(costs, names)
    measured = in_rounds(costs, names, MS_PER_CAPTION)
    if not apart:
        return _spread_note(WITHIN_SPREAD if measured else NO_SPREAD)
    if not together:
        return ""
    at = f"{', '.join(map(str, apart[:-1]))}{' and ' if apart[:-1] else ''}{count_noun(apart[-1], 'token')}"
    spread = "one variant does from process to process" if measured else "one process may by chance"
    return f"Some differ by more than {spread} at {at}, at other lengths none."


def _plot_protocols(report: dict[str, Any]) -> tuple[Any, str] | None:
    from matplotlib import pyplot

    flawed_protocols = report["what_it_would_have_looked_like"]
    if not flawed_protocols:
        return None
    bars = flawed_protocols["bars"]
    figure, axes = pyplot.subplots(figsize=(7.2, 0.55 * len(bars) + 1.0), layout="constrained")
    for position, bar in enumerate(bars[::-1]):
        value = 100 * bar["recall_at_1"]
        honest_style: Any = {"color": PALETTE[0]}
        flawed_style: Any = {"color": "#b9bec6", "edgecolor": "#7d838c", "hatch": "//"}
        axes.barh(position, value, 0.62, **(honest_style if bar["honest"] else flawed_style))
        axes.text(value + 1, position, f"{value:.1f}", va="center")
        if "chance" in bar:
            axes.plot(
                [100 * bar["chance"]["recall_at_1"]] * 2, [position - 0.31, position + 0.31], color=INK, linewidth=1.4
            )
    axes.set_yticks(range(len(bars)), [bar["protocol"] for bar in bars[::-1]])
    axes.set_xlim(0, 112)
    axes.set_xlabel("R@1, %, mean of both ways, same trained towers")
    alt_text = "; ".join(
        f"{bar['protocol']} {100 * bar['recall_at_1']:.1f}"
        + (f" (chance {100 * bar['chance']['recall_at_1']:.1f})" if "chance" in bar else "")
        for bar in bars
    )
    return (
        figure,
        f"Recall at 1 by the vectors of the same towers, only the first by the rules that results keep: {alt_text}.",
    )


PLOTS: dict[str, tuple[str, str, Callable[[dict[str, Any]], tuple[Any, ...] | None]]] = {
    "accuracy": (
        "What each design finds",
        "Rsum with its 95% interval over seeds and images (of one seed: images only); each seed's own as a dash.",
        _plot_accuracy,
    ),
    "time": (
        "Accuracy against time", "Upright lines: 95% intervals.", _plot_time
    ),
    "memory": (
        "Accuracy against memory", "Upright lines: 95% intervals.", _plot_memory
    ),
    "length": (
        "By the length of the caption", "Recall of the true image within the first 5, with 95% intervals.", _plot_length
    ),
    "composition": (
        "True captions against their twins", "Share of pairs whose true caption outscores its twin. A cross: what a "
        "language model that sees no image gets.", _plot_composition
    ),
    "caption-time": ("Time by the length of the caption", "Medians, one caption at a time.", _plot_length_time),
    "curves": ("How the training went", "A line for each seed, a mark for each epoch.", _plot_curves),
    "protocol": (
        "The same towers under other protocols", "All by the towers' vectors alone, without what late interaction "
        "or fusion adds to results. Only the first bar keeps their rules: the whole gallery, and captions that see no "
        "image. A dark line: chance.", _plot_protocols
    ),
}  # fmt: skip
