"""What commands print: tables and lines on standard output, notes on standard error."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from clipvisionalign.cli.parser import PROGRAM
from clipvisionalign.counts import count_noun
from clipvisionalign.log import configure_command_line
from clipvisionalign.progress import silence_progress

if TYPE_CHECKING:
    from clipvisionalign.data.check import CheckReport
    from clipvisionalign.search.index_report import IndexReport

logger = logging.getLogger(__name__)

#: The ends of an interval whose sign is changed.
NEGATED_ENDS = {"value": "value", "low": "high", "high": "low"}
DIRECTIONS = ("image_to_text", "text_to_image")


def set_verbosity(is_quiet: bool, is_verbose: bool) -> None:
    """Set how much this process prints beside results and errors.

    Args:
        is_quiet: Results and errors alone.
        is_verbose: Log messages as well.
    """
    silence_progress(is_quiet)
    configure_command_line(is_quiet, is_verbose)


def print_check(data: str, report: CheckReport, truncation: dict[str, Any]) -> None:
    """Print every problem, how the rows add up, and counts by kind.

    Args:
        data: The data set.
        report: What was found in it.
        truncation: Counts of cut captions, by split, with "max_tokens"; or empty.
    """
    for problem in report.problems:
        print(f"{problem.kind}: {problem}")
    sizes = ", ".join(f"{split} {count:,}" for split, count in sorted(report.splits.items()))
    print(
        f"{data}: layout {report.layout}, {count_noun(report.images, 'image')} ({sizes}), "
        f"{count_noun(report.captions, 'caption')}"
    )
    if report.rows:
        rows = count_noun(report.rows["in_files"], "row")
        print(f"  {rows} = {report.rows['read']:,} read + {report.rows['left_out']:,} left out")
    for note in report.notes:
        print(f"  {note}")
    for kind, count in sorted(report.to_dict()["summary"].items()):
        print(f"  {count:>6,}  {kind}")
    for split, equal in report.equal_captions.items():
        # Within a split: what is equal across splits ties in no gallery.
        if equal["captions"] and split != "all":
            texts, images = count_noun(equal["texts"], "text"), count_noun(equal["images"], "image")
            print(
                f"  {equal['captions']:>6,}  captions of {split} that are equal, word by word, to one of another image "
                f"({texts} of {images}); '--identity caption' makes such images "
                "each other's partners"
            )
    for split, counts in truncation.items():
        if split != "max_tokens":
            print(f"  {counts.summary(split, truncation['max_tokens'])}")
    if not report.problems:
        print("  nothing wrong found")


def print_metrics(results: dict[str, Any]) -> None:
    """Print retrieval metrics as a table, with chance beneath.

    Args:
        results: As `evaluate --json` has them.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from clipvisionalign.retrieval.metrics import describe_rerank_gain, metric_label

    title = f"{results['run']} on {results['data']}, {results['split']}: {count_noun(results['images'], 'image')}, "
    if results.get("distractors"):
        title += f"{results['distractors']:,} more without captions, "
    noun = "joined text" if results.get("texts") == "joined" else "caption"
    title += f"{count_noun(results['captions'], noun)}, 95% intervals"
    table = Table(title=Text(title), title_justify="left")
    blocks = {"": results} if "dual" not in results else {"dual": results["dual"], "re-ranked": results["reranked"]}
    table.add_column("figure")
    for name in blocks:
        table.add_column(f"{name} image to text".strip(), justify="right")
        table.add_column(f"{name} text to image".strip(), justify="right")
    # Results from before chance was recorded have none.
    chance = results.get("chance")
    if chance:
        table.add_column("chance, both ways", justify="right")
    for metric in next(iter(blocks.values()))["image_to_text"]:
        cells = [
            estimate_cell(metric, block[direction][metric]) for block in blocks.values() for direction in DIRECTIONS
        ]
        by_chance = (
            [f"{100 * chance[direction][metric]:.1f}" for direction in DIRECTIONS if metric in chance[direction]]
            if chance
            else []
        )
        cells += [" / ".join(by_chance)] if chance else []
        table.add_row(metric_label(metric), *cells)
    sums = [cell for block in blocks.values() for cell in (estimate_cell("rsum", block["rsum"]), "")]
    table.add_row("rsum", *sums, *([f"{chance['rsum']:.1f}"] if chance else []))
    Console().print(table)
    _print_equal_captions(results.get("equal_captions"), results.get("texts") == "joined")
    if not results.get("depths"):
        return
    gain = results["gain"]
    signed_gains = {
        1.0: gain,
        -1.0: {target: -gain[source] if gain[source] is not None else None for target, source in NEGATED_ENDS.items()},
    }
    print(f"re-ranking {describe_rerank_gain(gain, lambda sign: estimate_cell('rsum', signed_gains[sign]))}")
    table = Table(title="by depth: how many first candidates are re-ranked", title_justify="left")
    for column in ("depth", "R@1 image to text", "R@1 text to image", "rsum", "pairs", "ms per query"):
        table.add_column(column, justify="right")
    for depth in results["depths"]:
        i2t, t2i = (f"{100 * value:.1f}" for value in depth["recall_at_1"])
        cost = f"{depth['pairs']:,}", f"{depth['ms_per_query']:.1f}"
        table.add_row(str(depth["candidates"]), i2t, t2i, f"{depth['rsum']:.1f}", *cost)
    if chance:
        by_chance = [f"{100 * chance[direction]['recall_at_1']:.1f}" for direction in DIRECTIONS]
        table.add_row("chance", *by_chance, f"{chance['rsum']:.1f}", "", "")
    Console().print(table)


#: Classes that are printed; of more, those with the lowest accuracies.
MAX_PRINTED_CLASSES = 50


def print_classification(results: dict[str, Any]) -> None:
    """Print accuracies with chance beside them, and a table of classes.

    Args:
        results: As `classify --json` has them.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    images, classes = count_noun(results["images"], "image"), f"{results['classes']:,} classes"
    title = f"{results['run']} on {results['data']}, {results['split']}: {images}, {classes}, 95% intervals"
    table = Table(title=Text(title), title_justify="left")
    for column in ("accuracy", "zero-shot", "chance"):
        table.add_column(column, justify="left" if column == "accuracy" else "right")
    for name, label in (("top_1", "top-1"), ("top_5", "top-5"), ("mean_per_class", "mean per class")):
        if name in results:
            table.add_row(label, estimate_cell("recall", results[name]), f"{100 * results['chance'][name]:.1f}")
    Console().print(table)
    rows = [row for row in results["per_class"] if row["images"]]
    shown, which = rows, "by class"
    if len(rows) > MAX_PRINTED_CLASSES:
        shown = sorted(rows, key=lambda row: row["correct"] / row["images"])[:MAX_PRINTED_CLASSES]
        which = f"the {MAX_PRINTED_CLASSES} of {len(rows):,} classes with the lowest accuracy (--json has all)"
    table = Table(title=which, title_justify="left")
    for column in ("class", "images", "top-1", "most confused with"):
        table.add_column(column, justify="right" if column in ("images", "top-1") else "left", overflow="fold")
    for row in shown:
        accuracy = f"{100 * row['correct'] / row['images']:.1f}"
        confused = f"{row['confused_with']} ({row['confused']:,})" if row["confused"] else ""
        table.add_row(Text(row["name"]), f"{row['images']:,}", accuracy, Text(confused))
    Console().print(table)
    templates = results["templates"]
    first = f"'{templates['captions'][0]}'"
    count = len(templates["captions"])
    print(f"templates: {templates['source']}: {first if count == 1 else f'{count} such as {first}'}")
    if results["largest_class"] > 1.5 * results["chance"]["top_1"]:
        share = f"{100 * results['largest_class']:.1f} %"
        print(f"the largest class has {share} of the images: the top-1 accuracy of a model that always answers it")


def estimate_cell(name: str, estimate: dict[str, float | None]) -> str:
    """A figure with its interval, or alone where none was computed.

    Args:
        name: Of the metric; recall and mAP are shown in percent.
        estimate: Its "value", and the "low" and "high" ends of its interval.

    Returns:
        The text of a cell, such as "35.1 [33.0, 37.2]".
    """
    percent = 100.0 if name.startswith("recall") or name.startswith("map") else 1.0
    ends = (estimate.get(key) for key in ("value", "low", "high"))
    value, low, high = (None if each is None else f"{percent * each:.1f}" for each in ends)
    return f"{value}" if low is None or high is None else f"{value} [{low}, {high}]"


def _print_equal_captions(equal_captions: dict[str, Any] | None, joined: bool) -> None:
    """What captions that are equal can cost, where they can."""
    if equal_captions and equal_captions["cost"]:
        from clipvisionalign.retrieval.equal_captions import describe_equal_captions

        captions, texts, images = (
            count_noun(equal_captions[f"{noun}s"], noun) for noun in ("caption", "text", "image")
        )
        best, cost = f"{equal_captions['best_rsum']:.1f}", f"{equal_captions['cost']:.1f}"
        way_out = "'--captions each --identity caption'" if joined else "'--identity caption'"
        print(describe_equal_captions(captions, texts, images, best, cost, way_out))


def print_trained_on(results: dict[str, Any], limit: int = 5) -> None:
    """Print the first of the images that were trained on, where not all were.

    Args:
        results: As `evaluate --json` has them.
        limit: How many are printed.
    """
    summary = results.get("trained_on_images")
    if not summary or summary["same"] == summary["images"]:
        return
    for match in summary["first"][:limit]:
        print(f"  {match['image']} is {'' if match['same'] else 'nearly '}{match['trained_on']} of the training images")
    if (remaining := summary["same"] + summary["nearly"] - limit) > 0:
        print(f"  and {remaining:,} more")


def print_pretraining(results: dict[str, Any]) -> None:
    """Print what the model was pretrained on, as far as that is known: no verdict on its figures.

    Args:
        results: As `evaluate --json` has them.
    """
    if "pretraining" in results:
        print(f"pretraining: {results['pretraining']['note']}")


def print_audit(results: dict[str, Any]) -> None:
    """Print an audit's checks as a table.

    Args:
        results: As `audit --json` has them.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As text: brackets in the name of a run or a file are no markup.
    title = Text(f"audit of {results['run']} on {results['data']}, {results['split']}")
    table = Table(title=title, title_justify="left")
    for column in ("check", "", "what was seen"):
        table.add_column(column)
    for result in results["checks"]:
        verdict = Text("passed", "green") if result["passed"] else Text("FAILED", "red")
        table.add_row(result["name"], verdict, Text(result["meaning"]))
    Console().print(table)
    print("the audit passed" if results["passed"] else "the audit FAILED: do not believe this model's figures")


def print_index_report(index: str, report: IndexReport) -> None:
    """Print how the files that were listed add up, and what to do next; files that were not decoded on standard error.

    Args:
        index: The index.
        report: Its counts.
    """
    from clipvisionalign.images import INSTALL_DECODERS
    from clipvisionalign.search.broken_files import read_broken_files
    from clipvisionalign.search.storage import printable

    captions = f"; {count_noun(report.captions, 'caption')}" if report.captions else ""
    kept = f", {report.kept:,} kept whose files cannot be read" if report.kept else ""
    print(
        f"{index}: {count_noun(report.there, 'image')}: {report.encoded:,} encoded, {report.unchanged:,} unchanged, "
        f"{report.moved:,} moved, {report.dropped:,} dropped{kept}; "
        f"{count_noun(report.broken, 'file')} could not be decoded{captions}"
    )
    print(report.summary())
    for line in report.not_taken.lines():
        print(f"  {printable(line)}")
    for name, count in report.missing_decoders.items():
        print(f"{count_noun(count, f'{name} file')} not decoded for want of a package: {INSTALL_DECODERS}")
    if report.unlisted:
        print(f"{count_noun(len(report.unlisted), 'folder')} could not be listed")
    if report.data_set:
        rows = count_noun(report.data_set["rows"], "row")
        print("data set: {0} = {read:,} read + {left_out:,} left out".format(rows, **report.data_set))
    if report.metadata:
        rows = count_noun(report.metadata["rows"], "row")
        print("metadata: {matched:,} of {0} matched, {listed:,} listed".format(rows, **report.metadata))
    if report.camera.get("values") or report.camera.get("damaged") or report.camera.get("unreadable"):
        print(_camera_line(report.camera))
    if report.patches:
        stored, unreadable = (f"{report.patches[name]:,}" for name in ("stored", "unreadable"))
        without = f", {unreadable} without, whose files cannot be read" if report.patches["unreadable"] else ""
        print(f"patches: {stored} images with theirs{without}; --rerank opens no image that has them")
    for entry in read_broken_files(index)[:5]:
        reason = entry["reason"].removeprefix(entry["path"] + ": ")
        logger.info(f"not decoded: {printable(entry['path'])}: {printable(reason)}")
    if report.broken > 5:
        logger.info(f"and {report.broken - 5:,} more, in {index}/broken.jsonl")
    if report.there:
        print(f'next: {PROGRAM} search {index} "a dog on the grass"')


def _camera_line(counts: dict[str, int]) -> str:
    """How the images whose headers were read add up."""
    values, none, damaged = (counts.get(name, 0) for name in ("values", "none", "damaged"))
    parts = f"{values:,} with values + {none:,} without" + (
        f" + {damaged:,} damaged in part or whole" if damaged else ""
    )
    filled = f"; {counts['filled']:,} of them were in the index already" if counts.get("filled") else ""
    unreadable = f"; {counts['unreadable']:,} others could not be read" if counts.get("unreadable") else ""
    return f"what cameras wrote: {count_noun(values + none + damaged, 'image')} = {parts}{filled}{unreadable}"


def print_hits(query: str, minus: list[str], hits: list[Any], thumbnails: dict[int, bytes]) -> None:
    """Print the hits of a query as a table, with previews.

    Args:
        query: The words.
        minus: What is subtracted from them.
        hits: The hits, the best first.
        thumbnails: JPEG bytes, by the id of an image; images without have no preview.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from clipvisionalign.search.storage import printable

    without = f", without {', '.join(minus)}" if minus else ""
    # Text, not markup: a path may have brackets.
    table = Table(title=Text(printable(f"{query}{without}")), title_justify="left")
    pairs = any(each.pair_score is not None for each in hits)
    # Columns that none of the hits has a value in take the width that paths need.
    metadata = [
        name for name in (hits[0].metadata if hits else ()) if any(_has_value(each.metadata[name]) for each in hits)
    ]
    previews = ["image"] if thumbnails else []
    console = Console()
    # An image is drawn as wide as its column is for certain: a wider one would be cropped.
    preview_width = min(24, console.width // 3)
    for column in ("", *previews, "path", "cosine", *(["pair score"] if pairs else []), "pixels", *metadata):
        width = preview_width if previews and column == "image" else None
        justify: Literal["left", "right"] = "left" if column == "path" else "right"
        least = min(max((len(each.path) for each in hits), default=0), console.width // 3) if column == "path" else None
        table.add_column(column, justify=justify, overflow="fold", width=width, min_width=least)
    for rank, each in enumerate(hits, 1):
        preview_cell = [_preview(thumbnails[each.id], preview_width)] if previews else []
        pair = [] if not pairs else ["" if each.pair_score is None else f"{each.pair_score:.3f}"]
        metadata_cells = [Text(printable(_format_value(each.metadata[name]))) for name in metadata]
        size = f"{each.width} x {each.height}"
        table.add_row(
            str(rank), *preview_cell, Text(printable(each.path)), f"{each.score:.3f}", *pair, size, *metadata_cells
        )
    console.print(table)


def _has_value(value: int | float | str | None) -> bool:
    return value is not None and value != ""


def _format_value(value: int | float | str | None) -> str:
    """A value of the metadata with all of its digits."""
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return "" if value is None else str(value)


def _preview(thumbnail: bytes, width: int) -> Any:
    """An image as the terminal can show it: by its own protocol (Kitty, Sixel), or by coloured halves of letters."""
    from io import BytesIO

    from PIL import Image as PillowImage
    from textual_image.renderable import Image

    return Image(PillowImage.open(BytesIO(thumbnail)), width=width, height="auto")


def write_paths(folder: str, raw_paths: Iterable[bytes], terminator: bytes) -> None:
    """Write where images are, in the bytes that the system has for it.

    Args:
        folder: Path or URL of the images.
        raw_paths: The path of each below it, in bytes.
        terminator: What stands behind each.
    """
    # A URL's names are UTF-8; those of this machine are whatever bytes the system has.
    sys.stdout.flush()
    for raw in raw_paths:
        sys.stdout.buffer.write(os.fsencode(f"{folder}/") + raw + terminator)
    sys.stdout.buffer.flush()
