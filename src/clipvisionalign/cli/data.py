"""Commands on data sets: scenes, check, shards."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign.cli.output import print_check
from clipvisionalign.cli.parser import OFFLINE, OFFLINE_HELP, PROGRAM, command_parser
from clipvisionalign.counts import count_noun

if TYPE_CHECKING:
    from clipvisionalign.data.captioned import CaptionedImages
    from clipvisionalign.data.check import CheckReport

logger = logging.getLogger(__name__)


def scenes_parser() -> argparse.ArgumentParser:
    """The parser of `scenes`."""
    parser = command_parser(
        "scenes",
        description="Draw the built-in data set: scenes of shapes with five captions each, or as hard as the settings "
        "ask for.",
    )
    parser.add_argument(
        "out",
        help="folder to write: images/, metadata.csv, scenes.jsonl; with a setting of difficulty also scenes.json; "
        "with --classes the folders of the classes alone",
    )
    parser.add_argument("--images", type=int, help="scenes to draw (default 1000), a hash decides on their splits")
    for split in ("train", "dev", "test"):
        parser.add_argument(f"--{split}", type=int, metavar="N", help=f"scenes of {split}, instead of --images")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (default 0)")
    parser.add_argument("--size", type=int, default=224, help="pixels on a side (default 224)")
    parser.add_argument(
        "--classes", choices=("shape", "colour", "both"),
        help="class folders instead, train/circle/*.png and so on, for 'classify': what the images of a class share",
    )  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="every group is one large shape; two captions a scene")
    hard = parser.add_argument_group("difficulty (recorded in scenes.json)")
    hard.add_argument("--groups", type=int, metavar="N", help="groups of shapes in each scene, 2 to 6 (default 2 to 4)")
    hard.add_argument(
        "--captions", type=int, metavar="N",
        help="compose so many captions for each scene, 1 to 5, which the following need",
    )  # fmt: skip
    for name, what in (
        ("relations", "state how two groups lie to each other"),
        ("negation", "name something that is absent"),
        ("counts", "state the numbers of shapes"),
    ):
        hard.add_argument(f"--{name}", type=float, metavar="SHARE", help=f"share of captions, 0 to 1, that {what}")
    hard.add_argument(
        "--tokens", type=int, metavar="N",
        help="long captions, 128 to 4096 tokens: the composed part stands among neutral sentences",
    )  # fmt: skip
    hard.add_argument(
        "--needle", choices=("front", "middle", "back"), help="where it stands there, with --tokens (default back)"
    )
    return parser


def scenes(arguments: list[str]) -> int:
    """Draw the built-in data set.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    args = scenes_parser().parse_args(arguments)
    from clipvisionalign.data.scene_dataset import write_scenes
    from clipvisionalign.data.scene_difficulty import SceneDifficulty, captions_per_scene, difficulty_faults

    splits = {split: count for split in ("train", "dev", "test") if (count := getattr(args, split)) is not None}
    names = [each.name for each in fields(SceneDifficulty)]
    hard = {name: value for name in names if (value := getattr(args, name)) is not None}
    difficulty = SceneDifficulty(**hard)
    faults = difficulty_faults(difficulty)
    if args.needle and not args.tokens:
        faults = [("needle", "is of long captions: give --tokens, their length, too")]
    if faults:
        raise ValueError("; ".join(f"--{name}: {message}" for name, message in faults))
    if splits and args.images is not None:
        raise ValueError(f"--images has a hash divide the scenes, and --{next(iter(splits))} sets a split: give one")
    if low := [split for split, count in splits.items() if count < 1]:
        raise ValueError(f"--{low[0]}: at least 1 scene, or leave it out")
    images = sum(splits.values()) or (1000 if args.images is None else args.images)
    if args.classes:
        from clipvisionalign.data.scene_classes import CLASSES_BY, write_scene_classes

        if other := [*splits, *(["plain"] if args.plain else []), *hard]:
            raise ValueError(f"--{other[0]} is of scenes with captions, and --classes draws class folders: give one")
        folder = write_scene_classes(args.out, args.classes, images, args.seed, args.size)
        print(f"{folder}: {count_noun(images, 'scene')} in {len(CLASSES_BY[args.classes])} classes")
        return 0
    folder = write_scenes(args.out, images, args.seed, args.size, args.plain, splits or None, difficulty)
    sizes = f" ({', '.join(f'{split} {count:,}' for split, count in splits.items())})" if splits else ""
    captions = images * captions_per_scene(args.plain, difficulty)
    print(f"{folder}: {count_noun(images, 'scene')}{sizes} with {count_noun(captions, 'caption')}")
    if splits and (missing := [split for split in ("train", "dev") if split not in splits]):
        logger.info(f"note: no {' and no '.join(missing)} split: 'train' needs both train and dev")
    return 0


def check_parser() -> argparse.ArgumentParser:
    """The parser of `check`."""
    parser = command_parser(
        "check",
        description="List the faults of a data set, row by row: missing, truncated, unreadable or enormous "
        "images,\nempty captions, broken encoding, duplicate rows, (nearly) the same image in two splits.",
        epilog="exit status: 0 nothing left out, 1 something left out or the data set cannot be read",
    )
    parser.add_argument("data", help="folder or file of the data set")
    parser.add_argument("--layout", default="auto", help="dataset layout (default: recognised)")
    parser.add_argument(
        "--tokens", nargs="?", const="all-MiniLM-L6-v2", metavar="MODEL",
        help="count captions that are longer than a text tower's max_tokens: of a run folder, or of a tower by name or "
        "folder (default: the embedded all-MiniLM-L6-v2)",
    )  # fmt: skip
    parser.add_argument(
        "--captions", metavar="FORM",
        help="what --tokens counts: each caption, or joined ones as --captions joined measures them (default: as the "
        "run was trained, else each)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=0, help="another limit for --tokens (default: the model's)")
    parser.add_argument("--quick", action="store_true", help="read images' headers only, as training does first")
    parser.add_argument(
        "--group", default="", metavar="COLUMN",
        help="a column of a table: without splits of its own, all images with one value of it stand in one split",
    )  # fmt: skip
    parser.add_argument(
        "--write-splits", metavar="FILE",
        help="for a data set without splits: assign images to splits, those of one identity or group, equal and nearly "
        "equal ones together, and write FILE; as DATA/splits.csv every later reading goes by it",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)
    return parser


def check(arguments: list[str]) -> int:
    """List what is wrong with a data set.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status: 1 where something is left out, else 0.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    args = check_parser().parse_args(arguments)
    from clipvisionalign.data.captioned import validate_caption_mode
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.check import empty_splits, unused_files
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.data.joined_captions import with_captions
    from clipvisionalign.data.run_data import ReadOptions, is_data_of_run, read_options_of_run, texts_of_run
    from clipvisionalign.data.scene_dataset import read_scene_record
    from clipvisionalign.data.splits import SPLIT_RULE

    if args.max_tokens and not args.tokens:
        raise ValueError("--max-tokens is a limit for --tokens MODEL, which is not given")
    if args.captions and not args.tokens:
        raise ValueError("--captions is what --tokens MODEL counts, which is not given")
    if args.write_splits and Path(args.write_splits).exists():
        raise ValueError(f"{args.write_splits}: is there already: remove it, or give another file")
    reading = ReadOptions(args.layout, args.group, SPLIT_RULE)
    if args.tokens and is_data_of_run(args.tokens, args.data):
        reading = read_options_of_run(args.tokens, args.data, args.layout, args.group)
    data = read_captioned_images(args.data, reading.layout, reading.group, reading.split_rule)
    kept, report = check_data(data, full=not args.quick, show_progress=True)
    if args.write_splits:
        kept, report = _with_new_splits(data, kept, report, args.write_splits, full=not args.quick)
    report.problems += empty_splits(kept)
    scene_record = read_scene_record(args.data)
    report.notes = [*report.notes, *unused_files(data), *([str(scene_record)] if scene_record else [])]
    truncation: dict[str, Any] = {}
    if args.tokens:
        mode = validate_caption_mode(args.captions or texts_of_run(args.tokens))
        truncation = _cut_captions(with_captions(kept, mode), args.tokens, args.max_tokens)
        if scene_record and (limit := truncation["max_tokens"]) < scene_record.longest:
            needed = scene_record.difficulty.tokens or scene_record.longest
            report.notes.append(
                f"captions that are cut at {limit:,} tokens, before their needle ({scene_record.difficulty.needle}), "
                f"are all alike: --model.text_tower.max_tokens {needed}"
            )
    if args.json:
        by_split = {split: stats.to_dict() for split, stats in truncation.items() if split != "max_tokens"}
        extra = (
            {"cut_captions": {"model": args.tokens, "max_tokens": truncation["max_tokens"], **by_split}}
            if truncation
            else {}
        )
        print(json.dumps({**report.to_dict(), **extra}, indent=2))
        return 0 if report.usable else 1
    print_check(args.data, report, truncation)
    return 0 if report.usable else 1


def _with_new_splits(
    data: CaptionedImages, clean_data: CaptionedImages, report: CheckReport, file: str, full: bool
) -> tuple[CaptionedImages, CheckReport]:
    """Write a file of splits for a checked data set; the data set and its report with these splits."""
    from clipvisionalign.data.captioned import SPLITS
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.image_fingerprints import near_duplicates
    from clipvisionalign.data.split_file import split_file_path
    from clipvisionalign.data.splits import write_splits

    duplicate_pairs = near_duplicates(report.fingerprints, show_progress=True) if full else []
    # What was wrong with the former splits is not wrong with these.
    problems = [problem for problem in clean_data.problems if "two splits" not in problem.kind]
    split_data = write_splits(replace(clean_data, problems=problems), duplicate_pairs, Path(file))
    sizes = ", ".join(f"{split} {split_data.split_sizes().get(split, 0):,}" for split in SPLITS)
    logger.info(
        f"{file}: written: {sizes} images; {count_noun(len(duplicate_pairs), 'pair')} of nearly equal ones "
        "kept together"
    )
    clean_data, report = check_data(split_data, full=False)
    if Path(file).absolute() != split_file_path(data.source).absolute():
        report.notes = [*report.notes, f"these splits are read where they are {split_file_path(data.source)}"]
    return clean_data, report


def _cut_captions(data: CaptionedImages, model: str, max_tokens: int) -> dict[str, Any]:
    """By split, how many captions a model's limit cuts; and the limit, under "max_tokens"."""
    from clipvisionalign.batch import TruncationStats
    from clipvisionalign.models.caption_tokenizer import open_tokenizer

    tokenizer = open_tokenizer(model, max_tokens)
    splits = {split: data.split(split).captions for split in data.split_sizes()}
    truncation = {
        split: TruncationStats.from_tokens(tokenizer.tokenize(captions)) for split, captions in splits.items()
    }
    return {"max_tokens": tokenizer.max_tokens, **truncation}


def shards_parser() -> argparse.ArgumentParser:
    """The parser of `shards`."""
    parser = command_parser(
        "shards",
        description="Write a data set as WebDataset shards, SPLIT-000000.tar and so on: to train on as a stream, from "
        "many processes,\nor from a disk that is slow with single files. 'train OUT --out RUN' trains on them.",
    )
    parser.add_argument("data", help="folder or file of the data set")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--layout", default="auto", help="dataset layout (default: recognised)")
    parser.add_argument("--per-shard", type=int, default=1000, help="images in a shard (default 1000)")
    return parser


def shards(arguments: list[str]) -> int:
    """Write a data set as WebDataset shards.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.
    """
    args = shards_parser().parse_args(arguments)
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.data.streams.writing import write_shards

    data, report = check_data(read_captioned_images(args.data, args.layout), full=False, show_progress=True)
    left_out = [problem for problem in report.problems if problem.effect == "left out"]
    for problem in left_out[:5]:
        logger.info(f"left out: {problem}")
    if len(left_out) > 5:
        logger.info(f"left out: and {len(left_out) - 5} more; '{PROGRAM} check {args.data}' lists all")
    shard_files = write_shards(data, args.out, args.per_shard, show_progress=True)
    for split, files in shard_files.items():
        print(
            f"{args.out}: {split}, {count_noun(data.split_sizes()[split], 'image')} in "
            f"{count_noun(len(files), 'shard')}"
        )
    return 0
