"""Train attention designs alike, measure them alike, and put them into one table.

Everything but the design is held fixed: data, seed, steps, towers and their weights; `cross` stands on `late` where
both are in the study. A study that was stopped goes on where it was: a run that is finished, with the same settings, is
not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.check import check
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.models.aligner import AlignerConfig, config_from_dict, load_aligner
from clipvisionalign.models.device import machine, versions
from clipvisionalign.retrieval.audit import audit
from clipvisionalign.study.profile import profile_run
from clipvisionalign.training.train import RunConfig, resume, train

Say = Callable[[str], None]
DESIGNS: tuple[str, ...] = get_args(get_type_hints(AlignerConfig)["design"])


def compare(config: RunConfig, variants: Sequence[str], say: Say = print) -> dict[str, Any]:
    """Train `variants` into folders of `config.out` and compare them; returns what its comparison.json holds.

    Also leaves comparison.md and comparison.png. Raises ValueError for an unknown variant, and what `train` raises.
    """
    unknown = [name for name in variants if name not in DESIGNS]
    if unknown or not variants:
        raise ValueError(f"unknown variant '{', '.join(unknown)}'; known are {', '.join(DESIGNS)}")
    study = Path(config.out)
    results: dict[str, Any] = {}
    for name in sorted(dict.fromkeys(variants), key=DESIGNS.index):
        say(f"--- {name} ---")
        results[name] = _train_once(_variant(config, study, name, "late" in variants), say)
        if name == "cross" and "late" in results:
            results[name]["training_seconds"] += results["late"]["training_seconds"]
    say("--- measuring time and memory in fresh processes, and auditing ---")
    kept, report = check(read_captioned_images(config.data, config.layout), full=True, shown=True)
    overlap = [problem.message for problem in report.problems if "two splits" in problem.kind]
    rows = []
    for name, found in results.items():
        cost = profile_run(study / name, config.data, "dev", config.layout)
        audited = _audit(study / name, kept.split("dev"), overlap)
        rows.append({"variant": name, **found, "cost": cost, "audit": audited})
        say(f"{name}: audit {'passed' if audited['passed'] else 'FAILED'}")
    comparison = {
        "data": config.data, "split": "dev", "settings": asdict(replace(config, out="")), "machine": machine(),
        "versions": versions(), "variants": rows,
    }  # fmt: skip
    (study / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n")
    (study / "comparison.md").write_text(markdown_table(comparison))
    plot(comparison, study / "comparison.png")
    say(f"{study}: comparison.json, comparison.md, comparison.png, and a run folder for each design")
    return comparison


def _variant(config: RunConfig, study: Path, name: str, late: bool) -> RunConfig:
    """The settings of one design. Where `late` is in the study `cross` stands on it: same towers and heads, kept as
    they are, and a fusion trained on top for a third of the epochs; so that the fusion is all that differs."""
    design: Literal["self", "sparse", "late", "cross"] = name  # type: ignore[assignment]
    settings = replace(config, out=str(study / name), model=replace(config.model, design=design))
    if name == "cross" and late:
        return replace(settings, init=str(study / "late"), freeze="all", epochs=max(1, config.epochs // 3))
    return settings


def _train_once(config: RunConfig, say: Say) -> dict[str, Any]:
    """The results of a run: those of a finished one with the same settings, else trained now."""
    import yaml

    out = Path(config.out)
    finished, settings = out / "results.json", out / "config.yaml"
    if finished.is_file():
        if config_from_dict(RunConfig, yaml.safe_load(settings.read_text())) != config:
            raise FileExistsError(f"{out}: a run with other settings is there; give another --out, or remove it")
        say(f"{out}: finished already")
        return json.loads(finished.read_text())
    if settings.is_file():
        if config_from_dict(RunConfig, yaml.safe_load(settings.read_text())) != config:
            raise FileExistsError(f"{out}: a run with other settings was begun there; give another --out, or remove it")
        say(f"{out}: a run that was stopped is there")
        return resume(out, say)
    return train(config, say)


def _audit(run: Path, part: CaptionedImages, overlap: list[str]) -> dict[str, Any]:
    aligner = load_aligner(run)
    found = audit(aligner, part.images, part.captions, part.caption_image, part.image_identity, overlap, sample=24)
    return found.to_dict()


# --- the table, three times: for people, for a page, as a picture ----------------------------------------------------

COLUMNS = (
    "design", "R@1 image to text", "R@1 text to image", "rsum", "training s", "ms/caption", "ms/picture",
    "ms/1,000 pairs", "KiB/picture", "KiB/caption", "peak MiB", "parameters", "audit",
)  # fmt: skip


def table_rows(comparison: dict[str, Any]) -> list[list[str]]:
    """The cells of the table: one row per variant, two for one that re-ranks."""
    rows = []
    for found in comparison["variants"]:
        blocks = {found["variant"]: found}
        if "dual" in found:
            name = found["variant"]
            blocks = {f"{name}, dual": found["dual"], f"{name}, re-ranked": found["reranked"]}
        for name, block in blocks.items():
            # What pairs cost and store is the scorer's, which the dual encoder alone does without.
            cost, own = found["cost"], block is not found.get("dual")
            rows.append(
                [
                    name,
                    _percent(block["image_to_text"]["recall_at_1"]),
                    _percent(block["text_to_image"]["recall_at_1"]),
                    _interval(block["rsum"]),
                    f"{found['training_seconds']:.0f}",
                    f"{cost['ms_per_caption']['median']:.2f}",
                    f"{cost['ms_per_picture']['median']:.1f}",
                    _short(cost["ms_per_1000_pairs"]["median"]) if own else "",
                    _short(cost["bytes_per_picture"] / 1024) if own else "",
                    _short(cost["bytes_per_caption"] / 1024) if own else "",
                    f"{cost['peak_memory_mib']:.0f}",
                    f"{cost['parameters'] / 1e6:.1f} M",
                    "passed" if found["audit"]["passed"] else "FAILED",
                ]
            )
    return rows


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _percent(figure: dict[str, float]) -> str:
    return _interval({key: 100 * value for key, value in figure.items()})


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]"


def _title(comparison: dict[str, Any]) -> str:
    first = comparison["variants"][0]
    return (
        f"{comparison['data']}, {comparison['split']}: {first['images']:,} images, {first['captions']:,} captions, "
        "whole gallery"
    )


def print_table(comparison: dict[str, Any]) -> None:
    """The table in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_title(comparison), title_justify="left", caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "design" else "right", no_wrap=column == "design")
    for row in table_rows(comparison):
        table.add_row(*row)
    table.caption = (
        "recalls and rsum in percent, 95% intervals by bootstrap over images; KiB are what is stored to score pairs "
        "later; memory is the peak of a fresh process"
    )
    console = Console()
    # A table broken over many lines is no table: wide enough where nobody's window is known.
    Console(width=None if console.is_terminal else 200).print(table)


def markdown_table(comparison: dict[str, Any]) -> str:
    """The table as Markdown, with what it was measured on."""
    lines = [f"# {_title(comparison)}", "", f"| {' | '.join(COLUMNS)} |", f"|---{'|---:' * (len(COLUMNS) - 1)}|"]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(comparison)]
    where = comparison["machine"]
    lines += [
        "",
        "Recalls and rsum in percent, over the whole gallery, with 95% intervals by bootstrap over images. Times are "
        "of this machine and compare within this table only; KiB are what is stored to score pairs later; memory is "
        "the peak of a fresh process that encodes and scores.",
        "",
        f"Machine: {where['processor']}, {where['threads']} threads, {where['instructions']}, {where['device']}.",
        "",
    ]
    return "\n".join(lines)


def plot(comparison: dict[str, Any], path: Path) -> None:
    """The table as a picture: what is found, and what it costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = ("#4269d0", "#3ca951", "#efb118", "#ff725c", "#a463f2")
    names: list[str] = []
    blocks: list[dict[str, Any]] = []
    for found in comparison["variants"]:
        for label, block in (("dual", found.get("dual")), ("re-ranked", found.get("reranked"))):
            if block is not None:
                names.append(f"{found['variant']}\n{label}")
                blocks.append(block)
        if "dual" not in found:
            names.append(found["variant"])
            blocks.append(found)
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(12, 4.2), width_ratios=(1.5, 1, 1), layout="constrained"
    )
    figures = [(way, k) for k in (1, 10) for way in ("image_to_text", "text_to_image")]
    for number, (name, block) in enumerate(zip(names, blocks, strict=True)):
        for place, (way, k) in enumerate(figures):
            found = block[way][f"recall_at_{k}"]
            value, low, high = (100 * found[part] for part in ("value", "low", "high"))
            label = name.replace("\n", ", ") if place == 0 else ""
            x = place + (number - (len(names) - 1) / 2) * 0.8 / len(names)
            left.bar(x, value, 0.75 / len(names), color=colours[number % 5], label=label)
            left.errorbar(x, value, [[value - low], [high - value]], color="#333", linewidth=1, capsize=2)
    left.set_xticks(range(len(figures)), [f"R@{k}\n{way.replace('_', ' ')}" for way, k in figures])
    left.set_ylabel("percent, 95% interval")
    left.set_title("what is found")
    left.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=len(names))
    variants = comparison["variants"]
    labels = [found["variant"] for found in variants]
    bars = [found["cost"]["ms_per_caption"]["median"] for found in variants]
    middle.bar(labels, bars, color="#7a8aa0", width=0.6)
    middle.set_title("milliseconds per caption")
    middle.bar_label(middle.containers[0], fmt="%.2f", fontsize=8)
    minutes = [found["training_seconds"] / 60 for found in variants]
    right.bar(labels, minutes, color="#7a8aa0", width=0.6)
    right.set_title("minutes of training")
    right.bar_label(right.containers[0], fmt="%.1f", fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(comparison), fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
