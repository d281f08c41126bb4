"""The command calibrate: up to where a search's result holds what is meant."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign.cli.output import estimate_cell
from clipvisionalign.cli.parser import MODEL_HELP, PROGRAM, add_offline_flag, command_parser

if TYPE_CHECKING:
    from clipvisionalign.search.calibration import Calibration
    from clipvisionalign.search.storage import Storage


def calibrate_parser() -> argparse.ArgumentParser:
    """The parser of `calibrate`."""
    parser = command_parser(
        "calibrate",
        description="Calibrate the promises of a model or of an index: from which score on the hits of a query hold\n"
        "what is meant with a given probability ('search --promise 0.9'), whatever the size of the collection. Images\n"
        "that the model was trained or selected on are left out. A promise holds for collections like the one that it\n"
        "was calibrated on, and for no others.",
        epilog="examples:\n"
        f"  {PROGRAM} calibrate RUN flickr8k                      # then: {PROGRAM} index RUN photos/ --out INDEX\n"
        f"  {PROGRAM} calibrate INDEX my-captions.csv --split test\n"
        f"  {PROGRAM} calibrate INDEX --judged queries.jsonl\n\n"
        "a line of --judged has a query with the numbers or paths of ALL images of the index that are relevant to it,\n"
        "which have to be looked for beyond the first hits; an empty list where there is none:\n"
        '  {"query": "a dog on the beach", "relevant": [17, "2024/a.jpg"]}\n'
        "50 judged queries are needed for 0.9, 100 for 0.95.",
    )
    parser.add_argument("model", metavar="RUN|INDEX", help=f"{MODEL_HELP}; or an index, which keeps the calibration")
    parser.add_argument("data", nargs="?", default="", help="data set of captioned images")
    parser.add_argument("--split", default="dev", help="train, dev or test (default dev)")
    parser.add_argument("--layout", default="auto", help="dataset layout (default: the run's, else recognised)")
    parser.add_argument(
        "--judged", default="", metavar="FILE", help="instead of a data set: judged queries of the index"
    )
    parser.add_argument(
        "--out",
        default="",
        metavar="FILE",
        help="where it is written (default: calibration.json in the run or the index)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing calibration")
    parser.add_argument("--run", default="", help="where the aligner of an index is, if it was moved")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    add_offline_flag(parser)
    return parser


def calibrate(arguments: list[str]) -> int:
    """Calibrate the promises of a model or of an index.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.

    Raises:
        InvalidIndexError: The index was made by another aligner.
        ValueError: Arguments do not fit each other.
    """
    args = calibrate_parser().parse_args(arguments)
    if bool(args.data) == bool(args.judged):
        raise ValueError("give a data set of captioned images, or judged queries of an index with --judged FILE")
    from clipvisionalign.model_calibration import calibrate_model, calibration_file
    from clipvisionalign.search.calibration_files import check_calibration_target, write_calibration
    from clipvisionalign.search.manifest import aligner_fingerprint, read_whole_manifest
    from clipvisionalign.search.storage import InvalidIndexError

    index = _index_storage(args.model)
    if index is None and (args.judged or args.run):
        raise ValueError(f"{args.model}: no index: --judged and --run are for an index")
    target: Path | Storage = Path(args.out) if args.out else index or calibration_file(args.model)
    check_calibration_target(target, args.overwrite)
    if args.judged:
        calibration = _calibrate_judged(args)
    else:
        run = args.model
        if index is not None:
            manifest = read_whole_manifest(index)
            run = args.run or manifest.run
            if aligner_fingerprint(run) != manifest.aligner:
                raise InvalidIndexError(f"{args.model}: it was made by another aligner than {run}")
        calibration = calibrate_model(run, args.data, args.split, args.layout, args.device)
    location = write_calibration(target, calibration)
    summary = _summary(args.model, location, calibration)
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        print_calibration(summary, is_index=index is not None)
    return 0


def _index_storage(model: str) -> Storage | None:
    """The storage of an index; None for a model."""
    from clipvisionalign.search.manifest import has_index
    from clipvisionalign.search.storage import Storage

    if "://" not in model and not has_index(model):
        return None
    return Storage(model)


def _calibrate_judged(args: argparse.Namespace) -> Calibration:
    from clipvisionalign.search.judgements import calibrate_index, read_judgements
    from clipvisionalign.search.searcher import Searcher

    searcher = Searcher(args.model, args.run, args.device)
    calibration = calibrate_index(searcher, read_judgements(args.judged), Path(args.judged).name)
    # Judged queries do not measure it.
    return replace(calibration, rerank=searcher.assessor.rerank_margin)


def _summary(model: str, location: str, calibration: Calibration) -> dict[str, Any]:
    """What `calibrate --json` prints."""
    from clipvisionalign.search.calibration import LEVELS, units_needed

    cuts = {level: calibration.threshold(level) for level in LEVELS if calibration.count >= units_needed(level)}
    return {
        "model": model, "file": location, "calibrated_on": calibration.calibrated_on, "on": calibration.describe(),
        "levels": list(calibration.measured) or [{"level": level, "threshold": cut} for level, cut in cuts.items()],
        **({"rerank": calibration.rerank.to_dict()} if calibration.rerank else {}),
        "too_few_for": {level: units_needed(level) for level in LEVELS if level not in cuts},
    }  # fmt: skip


def margin_line(margin: dict[str, Any]) -> str:
    """Which first hits are worth re-ranking, and what that costs and finds.

    Args:
        margin: `RerankMargin.to_dict`.

    Returns:
        A line.
    """
    chosen = next((row for row in margin["curve"] if row["margin"] == margin["margin"]), None)
    if chosen is None:
        return f"search --within: hits within {margin['margin']:.3f} of the first one are worth re-ranking"
    none, whole = margin["curve"][0], margin["curve"][-1]
    if not chosen["images"]:
        return f"search --within: re-ranking the first {margin['depth']} brings next to nothing; none are"
    return (
        f"search --within: hits within {chosen['margin']:.3f} of the first one are worth re-ranking, "
        f"{chosen['images']:.1f} of {margin['depth']} a query; recall at 1, 5, 10 adds up to "
        f"{chosen['recall_sum']:.1f} (none: {none['recall_sum']:.1f}, all: {whole['recall_sum']:.1f})"
    )


def print_calibration(summary: dict[str, Any], is_index: bool) -> None:
    """Print what cut-offs keep, and what to do next.

    Args:
        summary: As `calibrate --json` has it.
        is_index: Whether an index was calibrated; else a model.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    about, images = summary["calibrated_on"], summary["calibrated_on"]["images"]
    table = Table(title=Text(f"{summary['model']} on {summary['on']}"), title_justify="left")
    measured = any("kept" in row for row in summary["levels"])
    for column in ("promise", "cut-off", *(("kept of the other half", f"images of {images:,}") if measured else ())):
        table.add_column(column, justify="right")
    for row in summary["levels"]:
        cells = [estimate_cell("recall", row["kept"]), f"{row['answer_length']:.1f}"] if measured else []
        table.add_row(f"{100 * row['level']:g} %", f"{row['threshold']:.2f}", *cells)
    Console().print(table)
    if margin := summary.get("rerank"):
        print(margin_line(margin))
    for level, needed in summary["too_few_for"].items():
        print(f"too few for {100 * level:g} %: it needs {needed:,}")
    if about.get("without_relevant"):
        print(f"{about['without_relevant']:,} judged queries without a relevant image: no part of it")
    print(f"{summary['file']}: written. A promise holds for collections like this one.")
    if is_index:
        print(f'next: {PROGRAM} search {summary["model"]} "a dog on the grass" --promise 0.9')
    else:
        print(f"next: {PROGRAM} index {summary['model']} FOLDER --out INDEX copies it to an index")
