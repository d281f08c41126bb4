"""The command curve: the learning curve of a run."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from clipvisionalign.cli.parser import PROGRAM, add_offline_flag, command_parser
from clipvisionalign.cli.tables import print_by_width
from clipvisionalign.counts import count_noun

if TYPE_CHECKING:
    from clipvisionalign.adaptation.extrapolation import Extrapolation
    from clipvisionalign.adaptation.learning_curve import LearningCurve


def curve_parser() -> argparse.ArgumentParser:
    """The parser of `curve`."""
    parser = command_parser(
        "curve",
        description="Would more captions help? A run's settings are trained again on 1/8, 1/4 and 1/2 of its images\n"
        "with their captions, each with as many steps, and measured on the same dev images. The curve is extrapolated\n"
        "to twice the captions, with a 90% interval that counts the images, the chance of a training and the misfit\n"
        "of the curve, and is tested first: the run itself is predicted from the three. Takes three times as long as\n"
        "the run.",
        epilog=f"example: {PROGRAM} curve runs/tuned\n\n"
        "The trainings are kept in RUN/curve with curve.json and curve.png; a repeated call uses those that are\n"
        "finished and resumes one that was stopped. docs/training.md describes the method.",
    )
    parser.add_argument("run", help="run folder of a finished training")
    parser.add_argument("--out", default="", metavar="FOLDER", help="folder for the trainings (default: RUN/curve)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_offline_flag(parser)
    return parser


def curve(arguments: list[str]) -> int:
    """Train and print the learning curve of a run.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.
    """
    args = curve_parser().parse_args(arguments)
    from clipvisionalign.adaptation.learning_curve import learning_curve
    from clipvisionalign.adaptation.learning_curve_plot import save_plot

    measured = learning_curve(args.run, args.out)
    plot = save_plot(measured, f"{measured.folder}/curve.png")
    if args.json:
        print(json.dumps(measured.to_dict(), indent=2))
        return 0
    _print_points(measured)
    print(measured.summary())
    print(f"curve.json and {plot.name} are in {measured.folder}")
    return 0


def _print_points(learning_curve: LearningCurve) -> None:
    """Measured figures by captions, and predicted ones."""
    images, captions = count_noun(learning_curve.images, "image"), count_noun(learning_curve.captions, "caption")
    title = f"{learning_curve.run}: rsum on dev ({images}, {captions}; chance {learning_curve.chance:.1f})"
    rows = []
    for point in learning_curve.points:
        rsum, predicted = point.rsum, learning_curve.test if point is learning_curve.points[-1] else None
        cell = f"{rsum.value:.1f}" + ("" if rsum.low is None else f" [{rsum.low:.1f}, {rsum.high:.1f}]")
        rows.append((f"{point.captions:,}", f"{point.images:,}", f"{point.steps:,}", cell, _predicted(predicted)))
    rows.append((f"{learning_curve.twice.captions:,}", "", "", "", _predicted(learning_curve.twice)))
    labels, *columns = (list(column) for column in zip(*rows, strict=True))
    headers = "images", "steps", "measured [95%]", "predicted [90%]"
    print_by_width(title, ("captions", labels), list(zip(headers, columns, strict=True)))


def _predicted(figure: Extrapolation | None) -> str:
    return "" if figure is None else f"{figure.value:.1f} [{figure.low:.1f}, {figure.high:.1f}]"
