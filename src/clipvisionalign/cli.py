"""The commands; no logic of its own.

Heavy libraries load when a command needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign.progress import long_step

if TYPE_CHECKING:
    from clipvisionalign.data.captioned import CaptionedImages
    from clipvisionalign.retrieval.evaluate import Evaluation
    from clipvisionalign.study.plan import Plan

PROGRAM = "clipvisionalign"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 1 something is wrong, 2 wrong words on the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A file's name may be bytes that no encoding has; a message about it is printed all the same.
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Train image-caption aligners, compare their attention designs honestly, use the best one.",
        epilog=f"'{PROGRAM} COMMAND --help' explains a command. First steps: {PROGRAM} scenes data/scenes; "
        f"{PROGRAM} study scenes --out study",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (words, _) in COMMANDS.items():
        commands.add_parser(name, help=words, add_help=False)
    if given and given[0] in COMMANDS:
        return _run(COMMANDS[given[0]][1], given[1:])
    parser.parse_args(given)
    parser.print_help()
    return 2


def _run(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; what a user can mend is told in one line, without a traceback."""
    try:
        with ExitStack() as around:
            if OFFLINE in arguments and command in _FETCHING:
                from clipvisionalign.models.hub import offline

                around.enter_context(offline())
            # What a command does beside its counted steps is told of as well; a service ends when it is stopped.
            shown = command is not serve and _speaks()
            around.enter_context(long_step(command.__name__, shown=shown, in_terminal=False))
            return command(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f'{PROGRAM}: error: this needs {error.name}: pip install "clipvisionalign[{extra}]"', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        return 130


#: Packages that a command may lack, and the extra that brings them.
EXTRAS = {
    "matplotlib": "study", "jinja2": "study", "nltk": "study", "scipy": "study", "pyarrow": "parquet",
    "playwright": "pdf", "lancedb": "search", "textual_image": "search", "fastapi": "search", "uvicorn": "search",
    "fastapi_offline": "search", "starlette": "search", "filelock": "search", "fsspec": "search", "ray": "ray",
    "markupsafe": "study", "pydantic": "study", "tokenizers": "onnx", "prometheus_client": "search",
    "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx",
    "webdataset": "scale", "datasets": "scale", "peft": "scale",
}  # fmt: skip


#: Takes towers' weights from the cache alone; set before anything is imported that might ask the hub.
OFFLINE = "--offline"
OFFLINE_HELP = "never ask the hub for a tower's weights: what is not on this machine is an error (as HF_HUB_OFFLINE=1)"


def _version() -> str:
    from clipvisionalign import __version__

    return __version__


def say(line: str) -> None:
    """Progress goes to standard error, so that standard output is the result alone."""
    print(line, file=sys.stderr, flush=True)


def _parser(name: str, **options: Any) -> argparse.ArgumentParser:
    kind = argparse.RawDescriptionHelpFormatter
    # A shortened flag would pass by what looks for the whole word, such as --offline before anything is imported.
    return argparse.ArgumentParser(f"{PROGRAM} {name}", formatter_class=kind, allow_abbrev=False, **options)


# --- scenes, check ---------------------------------------------------------------------------------------------------


def scenes(arguments: list[str]) -> int:
    parser = _parser("scenes", description="Draw the built-in data set: scenes of shapes with five captions each.")
    parser.add_argument("out", help="folder to write: images/, metadata.csv, scenes.jsonl")
    parser.add_argument("--images", type=int, default=1000, help="scenes to draw (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (default 0)")
    parser.add_argument("--size", type=int, default=224, help="pixels on a side (default 224)")
    given = parser.parse_args(arguments)
    from clipvisionalign.data.scenes import write_scenes

    folder = write_scenes(given.out, given.images, given.seed, given.size)
    print(f"{folder}: {given.images} scenes with {5 * given.images} captions")
    return 0


def check(arguments: list[str]) -> int:
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
    given = parser.parse_args(arguments)
    from clipvisionalign.data.captioned import SPLITS
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.check import empty_splits, near_duplicates, passed_over
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.data.of_run import Reading, is_data_of_run, reading_of_run
    from clipvisionalign.data.splits import SPLIT_RULE, split_file_of, write_splits

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
        near = [] if given.quick else near_duplicates(report.marks, shown=True)
        # What was wrong with the former splits is not wrong with these.
        kept = replace(kept, problems=[problem for problem in kept.problems if "two splits" not in problem.kind])
        shared = write_splits(kept, near, Path(given.write_splits))
        parts = ", ".join(f"{split} {shared.split_sizes().get(split, 0):,}" for split in SPLITS)
        say(f"{given.write_splits}: written: {parts} images; {len(near):,} pairs of nearly equal ones kept together")
        kept, report = check_data(shared, full=False)
        if Path(given.write_splits).absolute() != split_file_of(data.source).absolute():
            report.notes = [*report.notes, f"these splits are read where they are {split_file_of(data.source)}"]
    report.problems += empty_splits(kept)
    report.notes = [*report.notes, *passed_over(data)]
    cut: dict[str, Any] = _cut_captions(kept, given.tokens, given.max_tokens) if given.tokens else {}
    if given.json:
        told = {split: found.to_dict() for split, found in cut.items() if split != "max_tokens"}
        more = {"cut_captions": {"model": given.tokens, "max_tokens": cut["max_tokens"], **told}} if cut else {}
        print(json.dumps({**report.to_dict(), **more}, indent=2))
        return 0 if report.usable else 1
    for problem in report.problems:
        print(f"{problem.kind}: {problem}")
    sizes = ", ".join(f"{split} {count:,}" for split, count in sorted(report.splits.items()))
    print(f"{given.data}: layout {report.layout}, {report.images:,} images ({sizes}), {report.captions:,} captions")
    if report.rows:
        rows = f"{report.rows['in_files']:,} rows = {report.rows['read']:,} read + {report.rows['left_out']:,} left out"
        print(f"  {rows}")
    for note in report.notes:
        print(f"  {note}")
    for kind, count in sorted(report.to_dict()["summary"].items()):
        print(f"  {count:>6,}  {kind}")
    for split, equal in report.equal_captions.items():
        # Within a split: what is equal across splits ties in no gallery.
        if equal["captions"] and split != "all":
            print(
                f"  {equal['captions']:>6,}  captions of {split} that are equal, word by word, to one of another image "
                f"({equal['texts']:,} texts of {equal['images']:,} images); '--identity caption' makes such images "
                "each other's partners"
            )
    for split, found in cut.items():
        if split != "max_tokens":
            print(f"  {found.told(split, cut['max_tokens'])}")
    if not report.problems:
        print("  nothing wrong found")
    return 0 if report.usable else 1


def _cut_captions(data: CaptionedImages, model: str, max_tokens: int) -> dict[str, Any]:
    """By split, how many captions a model's limit cuts; and the limit, under "max_tokens"."""
    from clipvisionalign.batch import CutCaptions
    from clipvisionalign.models.tokens import open_tokenizer

    tokenizer = open_tokenizer(model, max_tokens)
    splits = {split: data.split(split).captions for split in data.split_sizes()}
    found = {split: CutCaptions.of(tokenizer.tokenize(captions)) for split, captions in splits.items()}
    return {"max_tokens": tokenizer.max_tokens, **found}


def shards(arguments: list[str]) -> int:
    parser = _parser(
        "shards",
        description="Write a data set as WebDataset shards, SPLIT-000000.tar and so on: to train on as a stream, from "
        "many processes,\nor from a disk that would choke on single pictures. 'train OUT --out RUN' trains on them.",
    )
    parser.add_argument("data", help="folder or file of the data set")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--layout", default="auto", help="how the data set lies there (default: recognise it)")
    parser.add_argument("--per-shard", type=int, default=1000, help="pictures in a shard (default 1000)")
    given = parser.parse_args(arguments)
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.data.streams import write_shards

    data, report = check_data(read_captioned_images(given.data, given.layout), full=False, shown=True)
    left_out = [problem for problem in report.problems if problem.effect == "left out"]
    for problem in left_out[:5]:
        say(f"left out: {problem}")
    if len(left_out) > 5:
        say(f"left out: and {len(left_out) - 5} more; '{PROGRAM} check {given.data}' lists all")
    written = write_shards(data, given.out, given.per_shard, shown=True)
    for split, files in written.items():
        print(f"{given.out}: {split}, {data.split_sizes()[split]:,} images in {len(files)} shards")
    return 0


# --- train, evaluate, audit ------------------------------------------------------------------------------------------


def train_parser() -> Any:
    """What reads the settings of a run: from files (--config) and flags."""
    import yaml
    from jsonargparse import ArgumentParser, set_loader

    from clipvisionalign.plain_yaml import load_settings
    from clipvisionalign.training.recipes import recipes
    from clipvisionalign.training.train import RunConfig

    known = "; ".join(f"{name}: {words}" for name, words in recipes().items())
    set_loader("plain_yaml", partial(load_settings, numbers=_numbers(RunConfig())), (yaml.YAMLError,))
    parser = ArgumentParser(
        parser_mode="plain_yaml",
        prog=f"{PROGRAM} train",
        usage=f"{PROGRAM} train DATA --out RUN [settings]\n       {PROGRAM} train DATA --recipe NAME [settings]\n"
        f"       {PROGRAM} train --resume RUN",
        description="Train an aligner and leave a complete run folder. Settings come from a recipe (--recipe), from a "
        "YAML file (--config) and from flags, the latter of these counting more; the run folder's own config.yaml "
        "repeats a run. A run that was stopped, by Ctrl-C, a kill or a full disk, goes on with --resume and ends as "
        "if nothing had been.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help=f"settings by name. {known}")
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)
    parser.add_class_arguments(RunConfig, as_group=False)
    parser.add_argument("--resume", help="a run that was stopped: goes on from its last checkpoint, as it was set")
    return parser


def _numbers(settings: Any, prefix: str = "") -> list[str]:
    """The settings that are numbers, by their names with dots."""
    found = []
    for name, value in vars(settings).items():
        if is_dataclass(value):
            found += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"{prefix}{name}")
    return found


def _refuse_clocks(arguments: list[str], numbers: list[str]) -> None:
    """Raises ValueError for flags such as --batch 1:30, which jsonargparse would read as YAML 1.1 does: as 90."""
    from clipvisionalign.plain_yaml import is_clock

    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        value = value if equals else following
        if flag.removeprefix("--") in numbers and is_clock(value):
            raise ValueError(f"{flag}: {value} is no number")


def train(arguments: list[str]) -> int:
    from clipvisionalign.training.recipes import recipe_file
    from clipvisionalign.training.train import RunConfig, resume
    from clipvisionalign.training.train import train as train_run

    parser = train_parser()
    _refuse_clocks(arguments, _numbers(RunConfig()))
    # `train DATA` and `train --data DATA` are the same.
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--data", *arguments]
    arguments = _in_order(arguments, recipe_file)
    given = parser.parse_args(arguments)
    settings = parser.instantiate_classes(given).as_dict()
    if settings.pop("recipe") is not None:
        raise ValueError("a file of settings names no 'recipe': give --recipe on the command line")
    if settings.pop("offline") and OFFLINE not in arguments:
        raise ValueError(f"'offline' in a file of settings comes too late: give {OFFLINE}, or set HF_HUB_OFFLINE=1")
    settings.pop("config", None)
    stopped = settings.pop("resume")
    if stopped is not None and len([each for each in arguments if each != OFFLINE]) > 2:
        raise ValueError(f"--resume {stopped} goes on with the settings of that run; it takes no others")
    if settings["profile"]:
        with tempfile.TemporaryDirectory() as folder:
            settings |= {"out": str(Path(folder) / "profile"), "overwrite": False}
            found = train_run(RunConfig(**settings), say)
        if _speaks():
            _print_profile(found)
        return 0
    results = resume(stopped, say) if stopped is not None else train_run(RunConfig(**settings), say)
    if not _speaks():
        return 0
    _print_figures(results)
    if "chosen" in results:
        print(f"{results['chosen']['figures']} (results.json, 'chosen')")
    print(f"the run is in {results['run']}; next: {PROGRAM} audit {results['run']}")
    return 0


def _in_order(arguments: list[str], recipe_file: Callable[[str], Path]) -> list[str]:
    """A recipe as the first file of settings, then the files given, then the flags: what stands later counts more."""
    recipes: list[str] = []
    files: list[str] = []
    flags: list[str] = []
    left = list(arguments)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if flag not in ("--recipe", "--config"):
            flags.append(f"{flag}{equals}{value}")
            continue
        if not equals:
            if not left:
                raise ValueError(f"{flag}: {'the name of a recipe' if flag == '--recipe' else 'a file'} should follow")
            value = left.pop(0)
        (recipes if flag == "--recipe" else files).append(value)
    found = [str(recipe_file(name)) for name in recipes]
    return [part for path in [*found, *files] for part in ("--config", path)] + flags


def _speaks() -> bool:
    """Whether this is the first process: under a launcher all others are silent."""
    return os.environ.get("RANK", "0") == "0"


def _print_profile(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    steps, images, seconds = results["steps"], results["images"], results["profile"]
    total = sum(seconds.values())
    title = f"{steps} steps, {images:,} images, {images / total:.1f} images a second"
    table = Table(title=title, title_justify="left")
    for column in ("where the time goes", "ms a step", "share"):
        table.add_column(column, justify="left" if column.startswith("where") else "right")
    for kind, took in sorted(seconds.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{1000 * took / steps:.1f}", f"{100 * took / total:.1f} %")
    Console().print(table)
    if results["loading"]:
        told = ", ".join(f"{kind} {1000 * took / steps:.1f} ms" for kind, took in results["loading"].items())
        print(f"in the loader, beside it where there are workers: {told} a step")
    print(f"before the first step: tokenise {results['tokenise']:.2f} s, once")


def _evaluation_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = _parser(name, description=description)
    parser.add_argument("run", nargs="?" if name == "evaluate" else None, help="run folder that 'train' wrote")
    parser.add_argument("--data", help="data set (default: the one that the run was trained on)")
    parser.add_argument(
        "--layout",
        default="auto",
        help="how the data set lies there (default: as the run has it, else recognised)",
    )
    parser.add_argument("--split", default="dev", help="train, dev or test (default dev)")
    parser.add_argument("--identity", help="auto, caption or none, as in 'train' (default: as the run was trained)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)
    return parser


def _open_run(given: argparse.Namespace) -> tuple[Any, CaptionedImages, str, dict[str, str]]:
    """The aligner, the data set whole, of a stream the split alone, where it was read from, and what of it is otherwise
    than the run has recorded it, as a note among the results."""
    from clipvisionalign.data.of_run import differs_from_run, read_data_of_run
    from clipvisionalign.models.aligner import load_aligner

    aligner = load_aligner(given.run, given.device)
    aligner.show_progress = True
    data = read_data_of_run(given.run, given.data or "", given.layout, given.identity, given.split)
    differs = differs_from_run(given.run, data, given.split)
    for line in differs:
        say(f"note: {line}")
    return aligner, data, str(data.source), {"differs_from_run": "; ".join(differs)} if differs else {}


def _checked_split(data: CaptionedImages, split: str) -> CaptionedImages:
    from clipvisionalign.data.check import check as check_data

    kept, report = check_data(data.split(split), full=True, shown=True)
    dropped = [problem for problem in report.problems if problem.effect == "left out" and problem not in data.problems]
    for problem in dropped[:10]:
        say(f"check: {problem}")
    if len(dropped) > 10:
        say(f"check: and {len(dropped) - 10} more left out")
    before = sum(problem.rows for problem in data.problems)
    if before:
        say(f"{before:,} rows were left out when the data set was read: '{PROGRAM} check {data.source}' lists them")
    return kept


def evaluate(arguments: list[str]) -> int:
    parser = _evaluation_parser(
        "evaluate", "Measure a run on the whole gallery of a split, both ways, with 95% intervals (bootstrap)."
    )
    parser.add_argument(
        "--candidates", type=int, help="re-rank so many first candidates (default: the run's own; 0: none)"
    )
    parser.add_argument(
        "--vectors", nargs="+", metavar="FILE",
        help="instead of a run: vectors of any program, IMAGES CAPTIONS as .npy or .parquet, or one .parquet of both",
    )  # fmt: skip
    parser.add_argument(
        "--partners", default="", metavar="FILE",
        help="with --vectors: the number of each caption's image, from 0 (.json, .csv or .npy)",
    )  # fmt: skip
    parser.add_argument(
        "--distractors", default="", metavar="FILE", help="with --vectors: more images in the gallery, without captions"
    )
    given = parser.parse_args(arguments)
    if given.vectors:
        return _evaluate_vectors(given)
    if given.run is None or given.partners or given.distractors:
        raise ValueError("give a run, or --vectors IMAGES CAPTIONS --partners FILE (--distractors FILE)")
    from clipvisionalign.data.of_run import unfinished_note
    from clipvisionalign.retrieval.evaluate import evaluate as measure
    from clipvisionalign.training.cross_fit import in_sample_note
    from clipvisionalign.training.trained_on import trained_note

    aligner, data, source, differs = _open_run(given)
    part = _checked_split(data, given.split)
    candidates = 0
    if aligner.fusion is not None:
        candidates = aligner.config.fusion.candidates if given.candidates is None else given.candidates
    elif given.candidates:
        if aligner.late is None:
            raise ValueError(f"{given.run}: its design '{aligner.config.design}' has nothing to re-rank with")
        candidates = given.candidates
    say(f"{source}, {given.split}: {len(part):,} images, {len(part.captions):,} captions")
    found: Evaluation = measure(
        aligner, part.images, part.captions, part.caption_image, part.image_identity, candidates,
        caption_group=part.caption_group,
    )  # fmt: skip
    results = {"run": given.run, "data": source, "split": given.split, **found.to_dict(), **differs}
    trained = trained_note(Path(given.run), data, part)
    notes = {
        "in_sample": in_sample_note(Path(given.run), part),
        "trained_on": trained.note if trained else None,
        "unfinished": unfinished_note(given.run),
    }
    results |= {name: note for name, note in notes.items() if note}
    if trained and trained.matches:
        results["trained_on_images"] = trained.to_dict()
    if given.json:
        print(json.dumps(results, indent=2))
        return 0
    _print_figures(results)
    for note in filter(None, notes.values()):
        print(note)
    _print_trained_on(results)
    return 0


def _print_trained_on(results: dict[str, Any], most: int = 5) -> None:
    """The first of the images that were trained on, where not all were."""
    found = results.get("trained_on_images")
    if not found or found["same"] == found["images"]:
        return
    for match in found["first"][:most]:
        print(f"  {match['image']} is {'' if match['same'] else 'nearly '}{match['trained_on']} of the training images")
    if (more := found["same"] + found["nearly"] - most) > 0:
        print(f"  and {more:,} more")


def _evaluate_vectors(given: argparse.Namespace) -> int:
    """Figures and audit of vectors that lie in files."""
    if given.run or given.data or given.candidates:
        raise ValueError("--vectors takes the place of a run and its data: leave run, --data and --candidates out")
    from clipvisionalign.retrieval.vectors import audit_vectors, evaluate_vectors, read_gallery

    gallery = read_gallery(given.vectors, given.partners, given.distractors)
    found = evaluate_vectors(gallery, given.identity or "auto")
    checks = audit_vectors(gallery)
    about = {"run": " ".join(given.vectors), "data": given.partners or "their own partners", "split": "vectors"}
    results = {**about, "vectors": given.vectors, **found.to_dict(), "audit": checks.to_dict()}
    if given.json:
        print(json.dumps(results, indent=2))
    else:
        _print_figures(results)
        _print_audit({**about, **checks.to_dict()})
        print("whether a model saw what it must not shows only when it is asked: this is what vectors tell of it")
    return 0 if checks.passed else 1


def encode(arguments: list[str]) -> int:
    parser = _evaluation_parser(
        "encode",
        "Write the vectors of a data set's images and captions, for any program: as .parquet, or as .npy files with\n"
        "their partners. 'evaluate --vectors' measures such files.",
    )
    parser.add_argument("data_set", nargs="?", metavar="DATA", help="the same as --data")
    parser.add_argument("--out", required=True, help="NAME.parquet, or NAME.npy for NAME-images.npy and so on")
    parser.add_argument(
        "--distractors", default="", metavar="FOLDER", help="images without captions, behind the others"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    given = parser.parse_args(arguments)
    from clipvisionalign.retrieval.vectors import refuse_present, write_vectors

    if given.data_set and given.data:
        raise ValueError(f"two data sets: {given.data_set} and --data {given.data}")
    given.data = given.data_set or given.data
    refuse_present(given.out, given.overwrite)
    aligner, data, source, differs = _open_run(given)
    part = _checked_split(data, given.split)
    if not len(part):
        raise ValueError(f"{source}: no image of the split '{given.split}' is left to be encoded")
    more = _distractors(given.distractors)
    images = aligner.encode_images([*part.images, *more]).numpy()
    captions = aligner.encode_captions(part.captions).numpy()
    files = write_vectors(given.out, part, images, captions, [str(path) for path in more], given.overwrite)
    counts = {"images": len(part), "distractors": len(more), "captions": len(part.captions)}
    if given.json:
        told = {"run": given.run, "data": source, "split": given.split, "files": list(map(str, files)), **counts}
        told |= differs
        print(json.dumps(told, indent=2))
        return 0
    print(f"{', '.join(map(str, files))}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    given_as = files[0] if len(files) == 1 else f"{files[0]} {files[1]} --partners {files[2]}"
    print(f"next: {PROGRAM} evaluate --vectors {given_as}")
    return 0


def _distractors(folder: str) -> list[Path]:
    """The images below a folder that can be decoded, in order of their paths; the others are told."""
    if not folder:
        return []
    from clipvisionalign.images import NotTaken, PictureError, image_files, open_picture
    from clipvisionalign.progress import progress

    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--distractors {folder}: no such folder")
    others = NotTaken()
    found = image_files(root, others)
    for line in others.lines():
        say(f"{folder}: not taken: {line}")
    good = []
    for path in progress(found, "checking distractors", len(found), True):
        try:
            open_picture(path)
        except PictureError as error:
            say(f"left out: {error}")
        else:
            good.append(path)
    if not good:
        raise ValueError(f"--distractors {folder}: no image in it")
    return good


def audit(arguments: list[str]) -> int:
    parser = _evaluation_parser(
        "audit",
        "Is a run's figure real? Checks that the model sees nothing that it must not, and that splits are apart.",
    )
    parser.add_argument("--sample", type=int, default=48, help="images in the checks (default 48)")
    given = parser.parse_args(arguments)
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.of_run import unfinished_note
    from clipvisionalign.retrieval.audit import AuditReport, Check
    from clipvisionalign.retrieval.audit import audit as audit_model
    from clipvisionalign.training.trained_on import trained_note

    aligner, data, source, differs = _open_run(given)
    kept, report = check_data(data, full=True, shown=True)
    overlap = [problem.message for problem in report.problems if "two splits" in problem.kind]
    part = kept.split(given.split)
    apart = overlap if len(kept.split_sizes()) > 1 else None
    found = audit_model(
        aligner, part.images, part.captions, part.caption_image, part.image_identity, apart, given.sample,
        caption_group=part.caption_group,
    )  # fmt: skip
    trained = trained_note(Path(given.run), data, part)
    if given.split != "train":
        count = len(trained.matches) or trained.images if trained else 0
        told = trained.note if trained else "no image of it is known to be one that the run was trained on"
        found = AuditReport([*found.checks, Check("gallery not trained on", not trained, float(count), told)])
    results = {"run": given.run, "data": source, "split": given.split, **found.to_dict(), **differs}
    results |= {"trained_on": trained.note, "trained_on_images": trained.to_dict()} if trained else {}
    unfinished = unfinished_note(given.run)
    results |= {"unfinished": unfinished} if unfinished else {}
    # For the card of a model that is exported.
    (Path(given.run) / "audit.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if given.json:
        print(json.dumps(results, indent=2))
    else:
        _print_audit(results)
        _print_trained_on(results)
        if unfinished:
            print(unfinished)
    return 0 if found.passed else 1


def _print_audit(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # As text: brackets in the name of a run or a file are no markup.
    title = Text(f"audit of {results['run']} on {results['data']}, {results['split']}")
    table = Table(title=title, title_justify="left")
    for column in ("check", "", "what was seen"):
        table.add_column(column)
    for found in results["checks"]:
        verdict = Text("passed", "green") if found["passed"] else Text("FAILED", "red")
        table.add_row(found["name"], verdict, Text(found["meaning"]))
    Console().print(table)
    print("the audit passed" if results["passed"] else "the audit FAILED: do not believe this model's figures")


def _print_figures(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from clipvisionalign.retrieval.metrics import figure_name, gain_told

    title = f"{results['run']} on {results['data']}, {results['split']}: {results['images']:,} images, "
    if results.get("distractors"):
        title += f"{results['distractors']:,} more without captions, "
    table = Table(title=Text(f"{title}{results['captions']:,} captions, 95% intervals"), title_justify="left")
    blocks = {"": results} if "dual" not in results else {"dual": results["dual"], "re-ranked": results["reranked"]}
    table.add_column("figure")
    for name in blocks:
        table.add_column(f"{name} image to text".strip(), justify="right")
        table.add_column(f"{name} text to image".strip(), justify="right")
    # Results from before chance was told have none.
    chance = results.get("chance")
    if chance:
        table.add_column("chance, both ways", justify="right")
    for figure in next(iter(blocks.values()))["image_to_text"]:
        cells = [_cell(figure, block[way][figure]) for block in blocks.values() for way in WAYS]
        by_chance = [f"{100 * chance[way][figure]:.1f}" for way in WAYS if figure in chance[way]] if chance else []
        cells += [" / ".join(by_chance)] if chance else []
        table.add_row(figure_name(figure), *cells)
    sums = [cell for block in blocks.values() for cell in (_cell("rsum", block["rsum"]), "")]
    table.add_row("rsum", *sums, *([f"{chance['rsum']:.1f}"] if chance else []))
    Console().print(table)
    _print_equal_captions(results.get("equal_captions"))
    if not results.get("depths"):
        return
    gain = results["gain"]
    ends = {1.0: gain, -1.0: {to: -gain[of] if gain[of] is not None else None for to, of in OTHER_WAY.items()}}
    print(f"re-ranking {gain_told(gain, lambda sign: _cell('rsum', ends[sign]))}")
    table = Table(title="by depth: how many first candidates are re-ranked", title_justify="left")
    for column in ("depth", "R@1 image to text", "R@1 text to image", "rsum", "pairs", "ms per query"):
        table.add_column(column, justify="right")
    for depth in results["depths"]:
        forth, back = (f"{100 * value:.1f}" for value in depth["recall_at_1"])
        cost = f"{depth['pairs']:,}", f"{depth['ms_per_query']:.1f}"
        table.add_row(str(depth["candidates"]), forth, back, f"{depth['rsum']:.1f}", *cost)
    if chance:
        by_chance = [f"{100 * chance[way]['recall_at_1']:.1f}" for way in WAYS]
        table.add_row("chance", *by_chance, f"{chance['rsum']:.1f}", "", "")
    Console().print(table)


def _print_equal_captions(found: dict[str, Any] | None) -> None:
    """What captions that are equal can cost, where they can."""
    if found and found["cost"]:
        from clipvisionalign.retrieval.equal_captions import equal_captions_told
        from clipvisionalign.study.significant import with_noun

        captions, texts, images = (with_noun(found[f"{noun}s"], noun) for noun in ("caption", "text", "image"))
        best, cost = f"{found['best_rsum']:.1f}", f"{found['cost']:.1f}"
        print(equal_captions_told(captions, texts, images, best, cost, "'--identity caption'"))


#: The ends of an interval whose sign is changed.
OTHER_WAY = {"value": "value", "low": "high", "high": "low"}
WAYS = ("image_to_text", "text_to_image")


def _cell(name: str, figure: dict[str, float | None]) -> str:
    """A figure with its interval, or alone where none was computed."""
    percent = 100.0 if name.startswith("recall") or name.startswith("map") else 1.0
    found = (figure.get(key) for key in ("value", "low", "high"))
    value, low, high = (None if each is None else f"{percent * each:.1f}" for each in found)
    return f"{value}" if low is None or high is None else f"{value} [{low}, {high}]"


# --- study, report ---------------------------------------------------------------------------------------------------


def study(arguments: list[str]) -> int:
    from clipvisionalign.study.plan import read_plan, ready_plans, told_with_lines

    ready = "\n".join(f"  {name:<16} {title}" for name, title in ready_plans().items())
    parser = _parser(
        "study",
        description="Train attention designs alike, over several seeds, measure them alike, and write one report:\n"
        "accuracy with intervals and corrected differences, time, memory, recall by caption length, minimal pairs,\n"
        "audits, examples. A study that was stopped goes on where it was when its command is given again.",
        epilog=f"ready plans:\n{ready}\n\nA plan of your own is a YAML file; a study's folder holds its own.",
    )
    parser.add_argument("plan", help="a YAML file, or the name of a ready plan")
    parser.add_argument("--data", help="the data set (default: the plan's)")
    parser.add_argument("--out", help="the folder to write (default: studies/NAME)")
    parser.add_argument("--seeds", help="seeds instead of the plan's, separated by commas")
    parser.add_argument("--variants", help="only these of the plan's variants, separated by commas")
    parser.add_argument("--split", help="the split to measure (default: the plan's)")
    parser.add_argument("--same", choices=("pictures", "seconds"), help="what every variant gets alike")
    parser.add_argument("--seconds", type=float, help="seconds of each training, with --same seconds")
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)
    parser.add_argument("--dry-run", action="store_true", help="say how long it will take, and train nothing")
    parser.add_argument("--pdf", action="store_true", help="also write report.pdf (needs clipvisionalign[pdf])")
    parser.add_argument("--json", action="store_true", help="print report.json instead of tables")
    given = parser.parse_args(arguments)
    from clipvisionalign.study.run import plan_ahead, run_study
    from clipvisionalign.study.tables import print_tables

    plan = _with_flags(read_plan(given.plan), given)
    out = given.out or f"studies/{Path(given.plan).stem}"
    if given.dry_run:
        with told_with_lines(given.plan):
            seconds = plan_ahead(plan, out, say)
        for what, taken in seconds.items():
            print(f"{taken / 60:6.1f} min  {what}")
        print(f"{sum(seconds.values()) / 60:6.1f} min  in all, for {len(plan.variants) * len(plan.seeds)} cells")
        return 0
    with told_with_lines(given.plan):
        report = run_study(plan, out, say)
    if given.pdf:
        _write_pdf(out)
    print(json.dumps(report, indent=2)) if given.json else print_tables(report)
    return 0


def _with_flags(plan: Plan, given: argparse.Namespace) -> Plan:
    """A plan with what the command line asks for instead. Raises ValueError for what contradicts itself."""
    from clipvisionalign.study.plan import Drawing

    if given.seconds is not None:
        if given.same == "pictures":
            raise ValueError("--seconds counts with --same seconds alone, not with --same pictures")
        plan = replace(plan, budget=replace(plan.budget, same="seconds", seconds=given.seconds))
    elif given.same:
        plan = replace(plan, budget=replace(plan.budget, same=given.same))
    if given.data is not None:
        plan = replace(plan, data=given.data, scenes=0, drawing=Drawing())
    if given.split is not None:
        plan = replace(plan, split=given.split)
    if given.seeds is not None:
        plan = replace(plan, seeds=[_whole(seed, "--seeds") for seed in _listed(given.seeds)])
    if given.variants is not None:
        unknown = [name for name in _listed(given.variants) if name not in plan.variants]
        if unknown:
            raise ValueError(
                f"--variants: '{', '.join(unknown)}' is not in the plan; it has {', '.join(plan.variants)}"
            )
        plan = replace(plan, variants={name: plan.variants[name] for name in _listed(given.variants)})
    return plan


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{flag}: '{text}' is no whole number") from None


def report(arguments: list[str]) -> int:
    parser = _parser(
        "report",
        description="Write a study's report anew: page, figures, tables, PDF; of a study that was stopped, from what\n"
        "is measured so far. Or put two studies side by side: before and after, two machines.",
    )
    parser.add_argument("study", help="folder of a study, or the report.json in it")
    parser.add_argument("--compare", metavar="OTHER", help="another study's folder: writes comparison.html")
    parser.add_argument("--out", help="file to write a comparison to (default: STUDY/comparison.html)")
    parser.add_argument("--pdf", action="store_true", help="also write report.pdf (needs clipvisionalign[pdf])")
    parser.add_argument("--json", action="store_true", help="print report.json, or both tables, as JSON")
    given = parser.parse_args(arguments)
    from dataclasses import asdict

    from clipvisionalign.study.comparison import compare_reports
    from clipvisionalign.study.page import render_comparison
    from clipvisionalign.study.report import folder_of, read_report, write_report
    from clipvisionalign.study.run import report_held, report_of_study
    from clipvisionalign.study.tables import print_tables, show
    from clipvisionalign.study.words import claims_of

    folder = folder_of(given.study)
    if given.compare:
        found = report_of_study(folder, say)
        tables, settings = compare_reports(found, read_report(given.compare))
        page = Path(given.out or folder / "comparison.html")
        page.write_text(
            render_comparison(f"{found['title']}: two studies", (given.study, given.compare), tables, settings),
            encoding="utf-8",
        )
        if given.json:
            print(json.dumps({"tables": [asdict(table) for table in tables], "settings": settings}, indent=2))
        else:
            show(tables)
            print("\n".join(settings))
        say(f"{page}: written")
        return 0
    with report_held(folder):
        found = report_of_study(folder, say)
        # Its sentences are those of now, whichever version has made the report.
        found["claims"] = claims_of(found)
        write_report(folder, found, say)
        if given.pdf:
            _write_pdf(folder)
    print(json.dumps(found, indent=2)) if given.json else print_tables(found)
    return 0


def _write_pdf(folder: str | Path) -> None:
    from clipvisionalign.study.page import write_pdf

    write_pdf(Path(folder) / "report.html", Path(folder) / "report.pdf")
    say(f"{folder}/report.pdf: written")


# --- index, search, duplicates, explain ------------------------------------------------------------------------------


def index(arguments: list[str]) -> int:
    parser = _parser(
        "index",
        description="Encode pictures into an index to search. Made again, it encodes only what is new or changed,\n"
        "finds what was moved, and drops what is gone. What cannot be read or decoded is listed.",
        epilog="examples:\n"
        f"  {PROGRAM} index RUN pictures/ --out INDEX\n"
        f"  {PROGRAM} index RUN pictures/ --out INDEX --metadata years.csv    # then: search --where 'year > 2020'\n"
        f"  {PROGRAM} index RUN flickr8k --captions --out INDEX               # then: search --like a.jpg --captions\n"
        f"  {PROGRAM} index RUN s3://bucket/pictures --out s3://bucket/index  # docs/search.md has the settings\n"
        f"  {PROGRAM} index RUN pictures/ --out INDEX --ray auto",
    )
    parser.add_argument("run", help="run folder that 'train' wrote")
    parser.add_argument(
        "source",
        metavar="FOLDER|DATA",
        help="folder of pictures, with all below it, or a data set's file; a path or a URL",
    )
    parser.add_argument("--out", required=True, help="the index to write, or to bring up to date; a path or a URL")
    parser.add_argument("--captions", action="store_true", help="read a data set, and index its captions as well")
    parser.add_argument("--layout", default="auto", help="how the data set lies there (default: recognise it)")
    parser.add_argument(
        "--group", default="", metavar="COLUMN", help="a data set's column: images of one value of it are of one split"
    )
    parser.add_argument(
        "--metadata",
        default="",
        metavar="FILE",
        help="CSV, TSV, JSONL or Parquet: a column of paths, others to filter by",
    )
    parser.add_argument(
        "--ray", nargs="?", const="local", default="", metavar="ADDRESS",
        help="encode on the Ray cluster at an address, or the one around (auto); without one on this machine",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, help="with --ray: models at work (default: by the cluster)")
    parser.add_argument(
        "--verify", action="store_true", help="read every file: one of the same size and time may hold another picture"
    )
    parser.add_argument(
        "--allow-drop", action="store_true",
        help="drop rows though more than 20 %% of them (of fewer than five: more than one) lose their files at once, "
        "the folder is empty or one below cannot be listed; without it such a run is refused: the drive may not be "
        "mounted",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    given = parser.parse_args(arguments)
    from clipvisionalign.search.files import printable
    from clipvisionalign.search.index import build_index, read_broken

    done = build_index(
        given.run, given.source, given.out, say, captions=given.captions, layout=given.layout,
        metadata=given.metadata, ray=given.ray, workers=given.workers, verify=given.verify,
        allow_drop=given.allow_drop, group=given.group,
    )  # fmt: skip
    if given.json:
        print(json.dumps(done.to_dict() | {"broken_files": read_broken(given.out)}, indent=2))
        return 0
    captions = f"; {done.captions:,} captions" if done.captions else ""
    kept = f", {done.kept:,} kept whose files cannot be read" if done.kept else ""
    print(
        f"{given.out}: {done.there:,} pictures: {done.encoded:,} encoded, {done.unchanged:,} unchanged, {done.moved:,} "
        f"moved, {done.dropped:,} dropped{kept}; {done.broken:,} files could not be decoded{captions}"
    )
    print(done.sum())
    for line in done.not_taken.lines():
        print(f"  {printable(line)}")
    if done.unlisted:
        print(f"{len(done.unlisted):,} folders could not be listed")
    if done.data_set:
        print("data set: {rows:,} rows = {read:,} read + {left_out:,} left out".format(**done.data_set))
    if done.metadata:
        print("metadata: {matched:,} of {rows:,} rows matched, {listed:,} listed".format(**done.metadata))
    for entry in read_broken(given.out)[:5]:
        say(f"not decoded: {printable(entry['path'])}: {printable(entry['reason'].removeprefix(entry['path'] + ': '))}")
    if done.broken > 5:
        say(f"and {done.broken - 5:,} more, in {given.out}/broken.jsonl")
    print(f'next: {PROGRAM} search {given.out} "a dog on the grass"')
    return 0


def search(arguments: list[str]) -> int:
    parser = _parser(
        "search",
        description='Find pictures of an index by words, by a picture, or by several of both. "^2 red" counts twice.',
        epilog="examples:\n"
        f'  {PROGRAM} search INDEX "a dog on the grass"\n'
        f'  {PROGRAM} search INDEX "beach" --minus "people"\n'
        f'  {PROGRAM} search INDEX "^2 red" "car" --where "width >= 1000"\n'
        f"  {PROGRAM} search INDEX --like a.jpg --sheet found.png\n"
        f"  {PROGRAM} search INDEX --like a.jpg --captions\n"
        f"  {PROGRAM} search INDEX --queries words.txt --json\n"
        f'  {PROGRAM} search INDEX "a dog" --paths --null | xargs -0 ls -l',
    )
    parser.add_argument("index", help="folder that 'index' wrote")
    parser.add_argument("words", nargs="*", help="what to look for; several terms are added up")
    parser.add_argument("--minus", action="append", default=[], metavar="WORDS", help="what is not wanted")
    parser.add_argument(
        "--like", action="append", default=[], metavar="PICTURE", help="a picture to look for the like of"
    )
    parser.add_argument(
        "--queries", metavar="FILE", help="a file with one query a line, each on its own ('-': standard input)"
    )
    parser.add_argument("--where", default="", metavar="FILTER", help='such as: width > 1000 and path like "2024/*"')
    parser.add_argument("--count", type=int, default=10, help="pictures to find (default 10)")
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="K", help="put the first K into a new order by pair scores"
    )
    parser.add_argument("--captions", action="store_true", help="find captions instead of pictures")
    parser.add_argument("--sheet", metavar="FILE", help="also write a sheet of the pictures found, as PNG")
    parser.add_argument("--previews", action="store_true", help="show the pictures in the table, as the terminal can")
    parser.add_argument("--run", default="", help="where the aligner is, if it was moved")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--paths", action="store_true", help="print paths only, for pipes")
    how.add_argument("--json", action="store_true", help="print what was found as JSON")
    parser.add_argument(
        "--null", action="store_true", help="with --paths: end each by a zero byte instead of a new line"
    )
    given = parser.parse_args(arguments)
    if given.captions and (given.where or given.rerank or given.sheet or given.paths or given.previews):
        raise ValueError("--captions finds texts: leave --where, --rerank, --sheet, --paths and --previews out")
    from clipvisionalign.data.text_files import decode, split_lines
    from clipvisionalign.search.files import printable
    from clipvisionalign.search.query import Searcher, Term, parse_term

    searcher = Searcher(given.index, given.run)
    minus = [parse_term(text, -1.0) for text in given.minus]
    like = [Term(path, is_picture=True) for path in given.like]
    queries = [(" + ".join([*given.words, *given.like]), [parse_term(text) for text in given.words] + like)]
    if given.queries:
        if given.words or given.like:
            raise ValueError("--queries takes the queries from its file: leave words and --like out")
        text = sys.stdin.read() if given.queries == "-" else decode(Path(given.queries).read_bytes()).text
        lines = [line.strip() for line in split_lines(text)]
        queries = [(line, [parse_term(line)]) for line in lines if line]
    for note in dict.fromkeys(term.note for _, terms in queries for term in [*terms, *minus] if term.note):
        say(f"note: {note}")
    answers: list[dict[str, Any]] = []
    for words, terms in queries:
        if given.captions:
            texts = searcher.captions(searcher.encode([*terms, *minus]), given.count)
            answers.append({"query": words, "found": [each.to_dict() for each in texts]})
            if not given.json:
                for each in texts:
                    print(f"{each.score:.3f}  {printable(each.text)}  ({printable(each.path)})")
            continue
        found = searcher.search([*terms, *minus], given.count, given.where, given.rerank)
        answers.append({"query": words, "found": [each.to_dict() for each in found]})
        if given.paths:
            _write_paths(searcher, [each.id for each in found], b"\0" if given.null else b"\n")
        elif not given.json:
            thumbnails = searcher.values([each.id for each in found], "thumbnail") if given.previews else {}
            _print_found(words, given.minus, found, thumbnails)
    if given.json:
        print(json.dumps(answers if given.queries else answers[0], indent=2))
    if given.sheet:
        from clipvisionalign.search.sheet import sheet_of_thumbnails

        everything = [each for answer in answers for each in answer["found"]]
        kept = searcher.values([each["id"] for each in everything], "thumbnail")
        shown = [(kept[each["id"]], f"{each['score']:.3f} {each['path']}") for each in everything]
        sheet_of_thumbnails(shown, "; ".join(words for words, _ in queries)).save(given.sheet, "PNG")
        say(f"{given.sheet}: written")
    return 0 if any(answer["found"] for answer in answers) else 1


def _write_paths(searcher: Any, numbers: list[int], end: bytes) -> None:
    """Where the pictures are, in the bytes that the system has for it."""
    raws = searcher.values(numbers, "raw")
    # A URL's names are UTF-8; those of this machine are whatever bytes the system has.
    sys.stdout.flush()
    for number in numbers:
        sys.stdout.buffer.write(os.fsencode(f"{searcher.place}/") + raws[number] + end)
    sys.stdout.buffer.flush()


def _print_found(words: str, minus: list[str], found: list[Any], thumbnails: dict[int, bytes]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from clipvisionalign.search.files import printable

    without = f", without {', '.join(minus)}" if minus else ""
    # Text, not markup: a path may have brackets.
    table = Table(title=Text(printable(f"{words}{without}")), title_justify="left")
    pairs = any(each.pair_score is not None for each in found)
    metadata = list(found[0].metadata) if found else []
    previews = ["picture"] if thumbnails else []
    for column in ("", *previews, "path", "cosine", *(["pair score"] if pairs else []), "pixels", *metadata):
        table.add_column(column, justify="left" if column == "path" else "right", overflow="fold")
    for place, each in enumerate(found, 1):
        picture = [_preview(thumbnails[each.id])] if previews else []
        pair = [] if not pairs else ["" if each.pair_score is None else f"{each.pair_score:.3f}"]
        more = [Text(printable(_as_written(value))) for value in each.metadata.values()]
        size = f"{each.width} x {each.height}"
        table.add_row(str(place), *picture, Text(printable(each.path)), f"{each.score:.3f}", *pair, size, *more)
    Console().print(table)


def _as_written(value: int | float | str | None) -> str:
    """A value of the metadata with all of its digits."""
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return "" if value is None else str(value)


def _preview(thumbnail: bytes) -> Any:
    """A picture as the terminal can show it: by its own protocol (Kitty, Sixel), or by coloured halves of letters."""
    from io import BytesIO

    from PIL import Image as PillowImage
    from textual_image.renderable import Image

    return Image(PillowImage.open(BytesIO(thumbnail)), width=24, height="auto")


def duplicates(arguments: list[str]) -> int:
    parser = _parser("duplicates", description="List pictures of an index that are the same, or nearly.")
    parser.add_argument("index", help="folder that 'index' wrote")
    parser.add_argument(
        "--near", type=float, default=0.985, help="cosine from which on two are nearly the same (default 0.985)"
    )
    parser.add_argument("--run", default="", help="where the aligner is, if it was moved")
    parser.add_argument("--json", action="store_true", help="print the groups as JSON")
    given = parser.parse_args(arguments)
    from clipvisionalign.search.files import printable
    from clipvisionalign.search.query import Searcher
    from clipvisionalign.search.query import duplicates as groups_of

    groups = groups_of(Searcher(given.index, given.run), given.near)
    if given.json:
        print(
            json.dumps(
                [[{"id": row["id"], "path": row["path"], "hash": row["hash"]} for row in g] for g in groups], indent=2
            )
        )
        return 0
    for number, group in enumerate(groups, 1):
        same = len({row["hash"] for row in group}) == 1
        print(f"{number}. {'the same bytes' if same else 'nearly the same'}:")
        for row in group:
            print(f"   {printable(row['path'])} ({row['size']:,} bytes)")
    print(f"{len(groups)} groups of pictures that are the same or nearly")
    return 0


def explain(arguments: list[str]) -> int:
    parser = _parser(
        "explain",
        description="Which parts of a picture carry which word of a caption: the late interaction's matches, the\n"
        "fusion's attention; a gradient map of the whole caption for one vector a side and for a fusion. A map says\n"
        "what the model used, not what is there.",
    )
    parser.add_argument("run", help="run folder that 'train' wrote")
    parser.add_argument("image", help="the picture")
    parser.add_argument("caption", help="the caption")
    parser.add_argument("--out", default="explanation.png", help="PNG to write (default explanation.png)")
    parser.add_argument("--json", action="store_true", help="print the maps as JSON")
    given = parser.parse_args(arguments)
    from clipvisionalign.models.aligner import load_aligner
    from clipvisionalign.search.explain import explain as explain_pair
    from clipvisionalign.search.sheet import sheet_of_explanation

    found = explain_pair(load_aligner(given.run), given.image, given.caption)
    sheet_of_explanation(given.image, found).save(given.out, "PNG")
    if given.json:
        words = [{"word": word, "map": grid.round(4).tolist()} for word, grid in found.words]
        told = {"caption": found.caption, "score": found.score, "method": found.method, "words": words}
        told |= {"not_counted": found.not_counted}
        print(json.dumps(told | {"map": found.whole.round(4).tolist(), "sheet": given.out}, indent=2))
    else:
        print(f"{given.out}: score {found.score:.3f}, by {found.method}")
        if found.not_counted:
            print(f"no part in the score, as cut off or beyond keep_tokens: {', '.join(found.not_counted)}")
    return 0


def serve(arguments: list[str]) -> int:
    parser = _parser(
        "serve",
        description="A search page and service over an index, or over two to compare. Bound to this machine unless\n"
        "told otherwise; /docs describes the interface, /metrics is for Prometheus.",
    )
    parser.add_argument("indexes", nargs="+", metavar="INDEX", help="folders that 'index' wrote")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--token-file", default="", metavar="FILE",
        help="file whose one line is asked of every request; the environment variable CLIPVISIONALIGN_TOKEN gives the "
        "token as well. One of them is needed where --host opens the network",
    )  # fmt: skip
    how.add_argument("--token", default="", help="the token itself, which every process list shows: to be removed")
    parser.add_argument("--run", default="", help="where the aligner is, if it was moved")
    given = parser.parse_args(arguments)
    from clipvisionalign.search.service import read_token
    from clipvisionalign.search.service import serve as run_service

    if given.token:
        say("--token shows the token in the list of processes and is to be removed: use --token-file FILE, or the "
            "environment variable CLIPVISIONALIGN_TOKEN")  # fmt: skip
    token = read_token(given.token, given.token_file)
    run_service(given.indexes, given.host, given.port, token, given.run, say)
    return 0


def export(arguments: list[str]) -> int:
    parser = _parser(
        "export",
        description="Write a run for use elsewhere: as ONNX, checked against PyTorch, with tokenizer and\n"
        "preprocessing; or as a folder for a hub, with its model card.",
    )
    parser.add_argument("run", help="run folder that 'train' wrote")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--onnx", metavar="DIR", help="folder to write ONNX files to (needs clipvisionalign[onnx])")
    how.add_argument("--huggingface", metavar="DIR", help="folder to write model, settings, tokenizer and card to")
    parser.add_argument(
        "--int8", action="store_true", help="with --onnx: also towers with 8-bit products, and what they lose on dev"
    )
    parser.add_argument("--data", default="", help="with --int8: the data set to measure on (default: the run's own)")
    given = parser.parse_args(arguments)
    if given.int8 and not given.onnx:
        raise ValueError("--int8 goes with --onnx")
    if given.data and not given.int8:
        raise ValueError("--data goes with --int8: it is what the 8-bit towers are measured on")
    from clipvisionalign.search.export import export_huggingface, export_onnx

    if given.onnx:
        about = export_onnx(given.run, given.onnx, given.int8, given.data, say)
        print(f"{given.onnx}: at most {about['difference']:.1e} from PyTorch's; README.md tells how to use it")
        if loss := about.get("int8", {}).get("rsum_change"):
            print("8-bit towers: dev rsum {value:+.1f} [{low:+.1f}, {high:+.1f}]".format(**loss))
    else:
        print(f"{export_huggingface(given.run, given.huggingface)}: model, settings, tokenizer, README.md")
    return 0


#: The commands that may need a tower's weights.
_FETCHING = (check, train, evaluate, encode, audit, study)

COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "scenes": ("draw the built-in data set: scenes of shapes with five captions each", scenes),
    "check": ("list what is wrong with a data set, row by row", check),
    "shards": ("write a data set as WebDataset shards, to train on as a stream", shards),
    "train": ("train an aligner: --model.design self, sparse, late or cross", train),
    "evaluate": ("measure a run on a whole gallery, with intervals", evaluate),
    "encode": ("write a data set's vectors, for any program", encode),
    "audit": ("is a run's figure real? the checks that prove it", audit),
    "study": ("train the attention designs alike, over seeds, into one report", study),
    "report": ("write a study's report anew, or put two studies side by side", report),
    "index": ("encode the pictures of a folder into an index to search", index),
    "search": ("find pictures by words, by a picture, by several of both", search),
    "serve": ("a search page and service over an index", serve),
    "export": ("write a run for use elsewhere: ONNX, or a folder for a hub", export),
    "duplicates": ("list pictures of an index that are the same, or nearly", duplicates),
    "explain": ("which parts of a picture carry which word of a caption", explain),
}
