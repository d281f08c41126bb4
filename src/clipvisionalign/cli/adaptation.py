"""Commands about a fine-tuned run and what it started from: blend, worth."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign.cli.parser import PROGRAM, add_offline_flag, command_parser
from clipvisionalign.cli.tables import print_by_width
from clipvisionalign.counts import count_noun
from clipvisionalign.models.run_names import resolve_run

if TYPE_CHECKING:
    from clipvisionalign.adaptation.comparison import ComparisonRequest


def blend_parser() -> argparse.ArgumentParser:
    """The parser of `blend`."""
    parser = command_parser(
        "blend",
        description="Write the best model between a fine-tuned run and what it started from as a run of its own:\n"
        "weights (1 - alpha) base + alpha run, alpha chosen on dev. Such a model often keeps what the base could\n"
        "do on other data at little cost on the run's own (WiSE-FT, arXiv:2109.01903).",
        epilog=f"example: {PROGRAM} blend runs/tuned --foreign flickr8k --out runs/blended",
    )
    _add_comparison_flags(parser)
    parser.add_argument("--out", required=True, help="folder for the blended run, with blend.json and blend.png")
    parser.add_argument("--alpha", type=float, help="take this alpha, from 0 (the base) to 1 (the run); none is chosen")
    parser.add_argument("--overwrite", action="store_true", help="replace a blended run that is there")
    return parser


def blend(arguments: list[str]) -> int:
    """Write the best model between a run and its base.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.
    """
    args = blend_parser().parse_args(arguments)
    from clipvisionalign.adaptation.blend import blend as write_blend

    document = write_blend(_request(args, args.alpha), args.out, args.overwrite)
    if args.json:
        print(json.dumps(document, indent=2))
        return 0
    _print_curve(document)
    _print_comparison(document)
    print(document["alpha"]["figures"])
    print(f"the blended run is in {args.out}; next: {PROGRAM} audit {args.out}")
    return 0


def worth_parser() -> argparse.ArgumentParser:
    """The parser of `worth`."""
    parser = command_parser(
        "worth",
        description="Was fine-tuning worth it? What a run gained over what it started from on its own data,\n"
        "what it lost on other data, and whether a model between the two does better; paired, with 95% intervals,\n"
        "and in sentences whose numbers are cited from worth.json.",
        epilog=f"example: {PROGRAM} worth runs/tuned --split test --foreign flickr8k",
    )
    _add_comparison_flags(parser)
    parser.add_argument(
        "--classes", nargs="+", default=[], metavar="FOLDER",
        help="class folders (see 'classify'): zero-shot accuracy of run and base",
    )  # fmt: skip
    parser.add_argument("--no-blend", action="store_true", help="do not look for the best model between the two")
    parser.add_argument(
        "--curve", action="store_true",
        help="train again on 1/8, 1/4 and 1/2 of the captions, for what twice as many would bring (see 'curve')",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="", metavar="FILE", help="where the figures go (default: worth.json in the run)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    return parser


def worth(arguments: list[str]) -> int:
    """Tell what a fine-tuning gained and lost.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.
    """
    args = worth_parser().parse_args(arguments)
    from clipvisionalign.adaptation.worth import worth as measure_worth

    with_blend = not args.no_blend
    document = measure_worth(_request(args), args.out, args.overwrite, with_blend, args.classes, args.curve)
    if args.json:
        print(json.dumps(document, indent=2))
        return 0
    print(document["verdict"]["text"])
    _print_comparison(document)
    _print_classes(document.get("classes", []))
    for claim in document["claims"]:
        print(f"- {claim['text']}")
    if "pretraining" in document:
        print(f"pretraining: {document['pretraining']['note']}")
    if document["earlier"]:
        first = document["earlier"][-1]
        print(
            f"{document['base']} was itself tuned from {' from '.join(document['earlier'])}: for what all of it gained "
            f"and lost, '{PROGRAM} worth {args.run} --with {first} --out FILE'"
        )
    return 0


def _add_comparison_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder of a finished fine-tuning")
    parser.add_argument(
        "--with", dest="base", default="", metavar="BASE",
        help="the other model: a run, or a pretrained dual encoder by folder or hub name (default: what the run\n"
        "started from)",
    )  # fmt: skip
    parser.add_argument(
        "--foreign", nargs="+", default=[], metavar="DATA", help="data sets that the run was not tuned on"
    )
    parser.add_argument(
        "--keep", type=float, default=0.9, metavar="SHARE",
        help="with --foreign: share of the base's rsum that a chosen model keeps on each of them (default 0.9)",
    )  # fmt: skip
    parser.add_argument(
        "--alphas", type=float, nargs="+", metavar="ALPHA", help="models to measure (default: 0 to 1 in steps of 0.1)"
    )
    parser.add_argument(
        "--split", default="dev",
        help="what is measured (default dev: alpha is chosen by each half for the other; on another split, such as\n"
        "test, nothing was chosen)",
    )  # fmt: skip
    parser.add_argument("--data", default="", help="the run's data set, where it is no longer where it was")
    parser.add_argument("--layout", default="auto", help="its layout (default: the run's, else recognised)")
    parser.add_argument("--identity", help="auto, caption or none, as in 'train' (default: as the run was trained)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_offline_flag(parser)


def _request(args: argparse.Namespace, alpha: float | None = None) -> ComparisonRequest:
    from clipvisionalign.adaptation.alpha_curve import DEFAULT_ALPHAS
    from clipvisionalign.adaptation.comparison import ComparisonRequest

    if alpha is not None and args.alphas:
        raise ValueError("--alpha takes one model, --alphas chooses among several: give one of them")
    return ComparisonRequest(
        resolve_run(args.run), resolve_run(args.base), args.foreign, args.alphas or DEFAULT_ALPHAS, alpha, args.keep,
        args.split, args.data, args.layout, args.identity, args.device,
    )  # fmt: skip


def _print_curve(document: dict[str, Any]) -> None:
    """Rsum of every model between base and run, on each data set."""
    alphas = [
        f"{point['alpha']:g}{' *' * (point['alpha'] == document['alpha']['model'])}" for point in document["curve"]
    ]
    columns = [
        (
            f"{Path(each['data']).name}{', foreign' if position else ', own'}",
            [*(f"{point['rsum'][position]:.1f}" for point in document["curve"]), f"{each['chance']:.1f}"],
        )
        for position, each in enumerate(document["curve_data"])
    ]
    title = f"models from {document['base']} (0) to {document['run']} (1): rsum on dev"
    print_by_width(title, ("alpha", [*alphas, "chance"]), columns)


def _print_comparison(document: dict[str, Any]) -> None:
    """Base, run and blend on each data set, with paired differences, and notes beneath."""
    names = ["base", "run", *(["blend"] if "alpha" in document else [])]
    labels = [f"blend, alpha {document['alpha']['model']:g}" if name == "blend" else name for name in names]
    labels += [f"{row['a']} - {row['b']}" for row in document["galleries"][0]["differences"]]
    labels += [*(f"{name} / base" for name in names[1:]), "chance"]
    columns = []
    for gallery in document["galleries"]:
        kind = "foreign" if gallery["foreign"] else "own" if gallery["own"] else "not its own"
        cells = [_cell(gallery[name]["rsum"]) for name in names]
        cells += [_cell(row) for row in gallery["differences"]]
        cells += [_cell(gallery["kept"][name], 100.0, " %") for name in names[1:]]
        header = f"{Path(gallery['data']).name}, {kind}, {count_noun(gallery['images'], 'image')}"
        columns.append((header, [*cells, f"{gallery['chance']:.1f}"]))
    title = f"{document['run']}, tuned from {document['base']}: rsum on {document['split']}, 95% intervals"
    print_by_width(title, ("", labels), columns)
    for gallery in document["galleries"]:
        for note in gallery["notes"]:
            print(f"note: {note}")


def _print_classes(comparisons: list[dict[str, Any]]) -> None:
    """Zero-shot accuracies of base and run on class folders, in percent, with paired differences."""
    for block in comparisons:
        names = list(block["difference"])
        columns = [
            ("base", [_cell(block["baseline"][name], 100.0) for name in names]),
            ("run", [_cell(block["run"][name], 100.0) for name in names]),
            ("run - base", [_cell(block["difference"][name], 100.0) for name in names]),
            ("chance", [f"{100 * block['run']['chance'][name]:.1f}" for name in names]),
        ]
        title = f"zero-shot classification of {block['run']['data']}, {block['run']['split']}: %, 95% intervals"
        print_by_width(title, ("", [name.replace("_", " ") for name in names]), columns)


def _cell(estimate: dict[str, float | None], factor: float = 1.0, unit: str = "") -> str:
    """A figure with its interval, or alone where none was computed."""
    value, low, high = estimate["value"], estimate["low"], estimate["high"]
    if value is None:
        return "-"
    interval = "" if low is None or high is None else f" [{factor * low:.1f}, {factor * high:.1f}]"
    return f"{factor * value:.1f}{unit}{interval}"
