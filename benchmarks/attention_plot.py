"""A plot of what `attention.py` has measured."""

from __future__ import annotations

from typing import Any

from encoders import WINDOW


def plot(result: dict[str, Any], path: str) -> None:
    """Time and memory by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    colours = {"transformers": "#ff725c", "here, all tokens": "#4269d0", "here, first token": "#3ca951"}
    if "encode" in result:
        for name, colour in colours.items():
            lengths = [row["length"] for row in result["encode"]]
            each = [row["ms"][name]["median"] / row["batch"] for row in result["encode"]]
            axes[0].plot(lengths, each, "o-", color=colour, label=name, markersize=4)
        axes[0].set_title("Longformer, milliseconds a caption")
    if "twins" in result:
        for kind, style in (("minilm", "o-"), ("distilbert", "s--")):
            rows = [row for row in result["twins"] if row["encoder"] == kind]
            for name, colour in (("dense", "#ff725c"), ("sliding", "#4269d0")):
                each = [row["ms"][name]["median"] for row in rows]
                axes[1].plot([row["length"] for row in rows], each, style, color=colour, label=f"{kind}, {name}")
        axes[1].set_title(f"dense and sliding (window {WINDOW}), milliseconds")
    if "memory" in result:
        palette = ("#ff725c", "#4269d0", "#efb118", "#3ca951", "#a463f2")
        for row, colour in zip(result["memory"], palette, strict=True):
            axes[2].plot(row["lengths"], row["mib"], "o-", color=colour, label=row["encoder"], markersize=4)
        axes[2].set_title("peak memory of one caption, MiB")
    for each_axes in axes:
        each_axes.set_xscale("log", base=2)
        each_axes.set_yscale("log")
        each_axes.set_xlabel("tokens")
        each_axes.spines[["top", "right"]].set_visible(False)
        if each_axes.lines:
            each_axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
