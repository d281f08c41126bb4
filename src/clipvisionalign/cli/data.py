"""Commands on data sets: scenes, check, shards."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign.cli.output import print_check, say
from clipvisionalign.cli.parser import OFFLINE, OFFLINE_HELP, PROGRAM, _parser
from clipvisionalign.counts import with_noun

if TYPE_CHECKING:
    from clipvisionalign.data.captioned import CaptionedImages
    from clipvisionalign.data.check import CheckReport


def scenes_parser() -> argparse.ArgumentParser:
    parser = _parser("scenes", description="Draw the built-in data set: scenes of shapes with five captions each.")
    parser.add_argument("out", help="folder to write: images/, metadata.csv, scenes.jsonl")
    parser.add_argument("--images", type=int, default=1000, help="scenes to draw (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (default 0)")
    parser.add_argument("--size", type=int, default=224, help="pixels on a side (default 224)")
    return parser


def scenes(arguments: list[str]) -> int:
    """Draw the built-in data set."""
    given = scenes_parser().parse_args(arguments)
    from clipvisionalign.data.scenes import write_scenes

    folder = write_scenes(given.out, given.images, given.seed, given.size)
    print(f"{folder}: {with_noun(given.images, 'scene')} with {with_noun(5 * given.images, 'caption')}")
    return 0


def check_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "check",
        description="List what is wrong with a data set, row by row: missing, truncated, unreadable or enormous "
        "pictures,\nempty captions, broken encoding, duplicate rows, (nearly) the same picture in two splits.",
        epilog="exit status: 0 nothing left out, 1 something left out or the data set cannot be read",
    )
    parser.add_argument("data", help="folder or file of the data set")
    parser.add_argument("--layout", default="auto", help="how it lies there (default: recognise it)")
    parser.add_argument(
        "--tokens", nargs="?", const="all-MiniLM-L6-v2", metavar="MODEL",
        help="count captions that are longer than a text tower's max_tokens: of a run folder, or of a tower by name or "
        "folder (default: the embedded all-MiniLM-L6-v2)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=0, help="another limit for --tokens (default: the model's)")
    parser.add_argument("--quick", action="store_true", help="read pictures' headers only, as training does first")
    parser.add_argument(
        "--group", default="", metavar="COLUMN",
        help="a column of a table: without splits of its own, all images with one value of it stand in one split",
    )  # fmt: skip
    parser.add_argument(
        "--write-splits", metavar="FILE",
        help="for a data set without splits: share its images out, those of one identity or group, equal and nearly "
        "equal ones together, and write FILE; as DATA/splits.csv every later reading goes by it",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)
    return parser


def check(arguments: list[str]) -> int:
    """List what is wrong with a data set; the exit status is 1 where something is left out."""
    given = check_parser().parse_args(arguments)
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.check import empty_splits, passed_over
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.data.of_run import Reading, is_data_of_run, reading_of_run
    from clipvisionalign.data.splits import SPLIT_RULE

    if given.max_tokens and not given.tokens:
        raise ValueError("--max-tokens is a limit for --tokens MODEL, which is not given")
    if given.write_splits and Path(given.write_splits).exists():
        raise ValueError(f"{given.write_splits}: is there already: remove it, or give another file")
    how = Reading(given.layout, given.group, SPLIT_RULE)
    if given.tokens and is_data_of_run(given.tokens, given.data):
        how = reading_of_run(given.tokens, given.data, given.layout, given.group)
    data = read_captioned_images(given.data, how.layout, how.group, how.split_rule)
    kept, report = check_data(data, full=not given.quick, shown=True)
    if given.write_splits:
        kept, report = _with_new_splits(data, kept, report, given.write_splits, full=not given.quick)
    report.problems += empty_splits(kept)
    report.notes = [*report.notes, *passed_over(data)]
    cut: dict[str, Any] = _cut_captions(kept, given.tokens, given.max_tokens) if given.tokens else {}
    if given.json:
        told = {split: found.to_dict() for split, found in cut.items() if split != "max_tokens"}
        more = {"cut_captions": {"model": given.tokens, "max_tokens": cut["max_tokens"], **told}} if cut else {}
        print(json.dumps({**report.to_dict(), **more}, indent=2))
        return 0 if report.usable else 1
    print_check(given.data, report, cut)
    return 0 if report.usable else 1


def _with_new_splits(
    data: CaptionedImages, clean_data: CaptionedImages, report: CheckReport, file: str, full: bool
) -> tuple[CaptionedImages, CheckReport]:
    """Write a file of splits for a checked data set; the data set and its report with these splits."""
    from clipvisionalign.data.captioned import SPLITS
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.check import near_duplicates
    from clipvisionalign.data.split_file import split_file_of
    from clipvisionalign.data.splits import write_splits

    duplicate_pairs = near_duplicates(report.marks, shown=True) if full else []
    # What was wrong with the former splits is not wrong with these.
    problems = [problem for problem in clean_data.problems if "two splits" not in problem.kind]
    split_data = write_splits(replace(clean_data, problems=problems), duplicate_pairs, Path(file))
    sizes = ", ".join(f"{split} {split_data.split_sizes().get(split, 0):,}" for split in SPLITS)
    say(
        f"{file}: written: {sizes} images; {with_noun(len(duplicate_pairs), 'pair')} of nearly equal ones kept together"
    )
    clean_data, report = check_data(split_data, full=False)
    if Path(file).absolute() != split_file_of(data.source).absolute():
        report.notes = [*report.notes, f"these splits are read where they are {split_file_of(data.source)}"]
    return clean_data, report


def _cut_captions(data: CaptionedImages, model: str, max_tokens: int) -> dict[str, Any]:
    """By split, how many captions a model's limit cuts; and the limit, under "max_tokens"."""
    from clipvisionalign.batch import CutCaptions
    from clipvisionalign.models.tokens import open_tokenizer

    tokenizer = open_tokenizer(model, max_tokens)
    splits = {split: data.split(split).captions for split in data.split_sizes()}
    found = {split: CutCaptions.of(tokenizer.tokenize(captions)) for split, captions in splits.items()}
    return {"max_tokens": tokenizer.max_tokens, **found}


def shards_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "shards",
        description="Write a data set as WebDataset shards, SPLIT-000000.tar and so on: to train on as a stream, from "
        "many processes,\nor from a disk that would choke on single pictures. 'train OUT --out RUN' trains on them.",
    )
    parser.add_argument("data", help="folder or file of the data set")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--layout", default="auto", help="how the data set lies there (default: recognise it)")
    parser.add_argument("--per-shard", type=int, default=1000, help="pictures in a shard (default 1000)")
    return parser


def shards(arguments: list[str]) -> int:
    """Write a data set as WebDataset shards."""
    given = shards_parser().parse_args(arguments)
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.data.streams.writing import write_shards

    data, report = check_data(read_captioned_images(given.data, given.layout), full=False, shown=True)
    left_out = [problem for problem in report.problems if problem.effect == "left out"]
    for problem in left_out[:5]:
        say(f"left out: {problem}")
    if len(left_out) > 5:
        say(f"left out: and {len(left_out) - 5} more; '{PROGRAM} check {given.data}' lists all")
    written = write_shards(data, given.out, given.per_shard, shown=True)
    for split, files in written.items():
        print(
            f"{given.out}: {split}, {with_noun(data.split_sizes()[split], 'image')} in {with_noun(len(files), 'shard')}"
        )
    return 0
