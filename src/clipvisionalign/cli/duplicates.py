"""`duplicates`: groups of images that are alike, which to keep, and decisions that some are none."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipvisionalign.cli.output import write_paths
from clipvisionalign.cli.parser import PROGRAM, command_parser
from clipvisionalign.counts import count_noun

if TYPE_CHECKING:
    from clipvisionalign.search.duplicate_decisions import Decision, Keeper
    from clipvisionalign.search.duplicates import DuplicateGroup, DuplicateReport

logger = logging.getLogger(__name__)

#: What stands above the groups of a kind.
HEADINGS = {
    "bytes": "the same bytes",
    "nearly": "nearly the same: recompressed, resized or cropped a little",
    "scene": "the same scene or subject by vectors alone: different images",
}
#: Images that could not be verified and are named; --json has all.
MAX_NAMED = 5


def duplicates_parser() -> argparse.ArgumentParser:
    """The parser of `duplicates`.

    Returns:
        The parser.
    """
    parser = command_parser(
        "duplicates",
        description="Group the images of an index that have the same bytes, or are nearly the same: recompressed,\n"
        "resized or cropped a little. Candidates are found by vectors and verified by their pixels: mirror images,\n"
        "drawings that differ and other photographs of one scene are told apart. One image of each group is marked to\n"
        "be kept. Nothing is deleted, and nothing is written into the folder of images.",
        epilog="examples:\n"
        f"  {PROGRAM} duplicates INDEX\n"
        f"  {PROGRAM} duplicates INDEX --scenes                          # also images of one scene, last\n"
        f"  {PROGRAM} duplicates INDEX --paths --null | xargs -0 ls -l   # those that need not be kept\n"
        f"  {PROGRAM} duplicates INDEX --not a.jpg b.jpg                 # remembered: these are no duplicates\n"
        f"  {PROGRAM} duplicates INDEX --keep b.jpg                      # remembered: this one is kept of its groups\n"
        f"  {PROGRAM} duplicates INDEX --decisions\n"
        f"  {PROGRAM} duplicates INDEX --forget a.jpg b.jpg",
    )
    parser.add_argument("index", help="folder that 'index' wrote")
    parser.add_argument(
        "--near", type=float, default=None, metavar="COSINE",
        help="cosine from which two images are compared by their pixels, and of one scene (default: all pairs from\n"
        "0.9 are compared, and down to 0.7 the most alike, as many as there are images; of one scene from 0.9)",
    )  # fmt: skip
    parser.add_argument(
        "--scenes", action="store_true", help="also group images of one scene or subject, by their vectors alone"
    )
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)  # of before: no model is needed
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the groups, or the decisions, as JSON")
    how.add_argument("--paths", action="store_true", help="print the paths of images that are not kept, for pipes")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--not", nargs="+", default=[], metavar="IMAGE", dest="unlike",
        help="remember that these images are no duplicates of each other: paths, or numbers in the index",
    )  # fmt: skip
    what.add_argument(
        "--keep", nargs="+", default=[], metavar="IMAGE",
        help="remember that these images are kept of every group that they are in: paths, or numbers in the index",
    )  # fmt: skip
    what.add_argument("--decisions", action="store_true", help="list what --not and --keep have remembered")
    what.add_argument(
        "--forget", nargs="+", default=[], metavar="IMAGE",
        help="take back what --not has remembered of these images; of one image, all of it, and what --keep has",
    )  # fmt: skip
    parser.add_argument(
        "--null", action="store_true", help="with --paths: end each by a zero byte instead of a new line"
    )
    return parser


def duplicates(arguments: list[str]) -> int:
    """Group the duplicates of an index, or remember that some images are none.

    Args:
        arguments: The command's arguments.

    Returns:
        The exit status: 0.

    Raises:
        ValueError: Flags contradict each other, or an image is not in the index.
    """
    args = duplicates_parser().parse_args(arguments)
    if args.null and not args.paths:
        raise ValueError("--null ends the paths of --paths: give both")
    if args.paths and (args.scenes or args.unlike or args.keep or args.decisions or args.forget):
        raise ValueError(
            "--paths prints duplicates that are not kept: leave out --scenes (those are different images), --not, "
            "--keep, --decisions and --forget"
        )
    if args.unlike or args.keep or args.decisions or args.forget:
        return _decide(args)
    from clipvisionalign.search.duplicates import duplicate_report
    from clipvisionalign.search.manifest import read_manifest

    report = duplicate_report(args.index, args.near, args.scenes)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    elif args.paths:
        raw_paths = [image.raw for image in report.not_kept()]
        write_paths(read_manifest(args.index).folder, raw_paths, b"\0" if args.null else b"\n")
    else:
        _print_report(report)
    _note_unverified(report)
    return 0


def _decide(args: argparse.Namespace) -> int:
    """Remember, list or take back decisions."""
    from clipvisionalign.search import duplicate_decisions
    from clipvisionalign.search.duplicates import decisions, keepers
    from clipvisionalign.search.manifest import read_manifest

    read_manifest(args.index)
    pairs: list[Decision] = []
    kept: list[Keeper] = []
    try:
        if args.unlike:
            pairs = decisions.add_decisions(args.index, decisions.find_images(args.index, args.unlike))
            summary = f"{count_noun(len(pairs), 'pair')} remembered as no duplicates"
        elif args.keep:
            kept = keepers.add_keepers(args.index, decisions.find_images(args.index, args.keep))
            summary = f"{count_noun(len(kept), 'image')} remembered to be kept"
        elif args.forget:
            hashes = decisions.find_hashes(args.index, args.forget)
            kept = keepers.remove_keepers(args.index, hashes) if len(hashes) == 1 else []
            pairs = decisions.remove_decisions(args.index, hashes, missing_ok=bool(kept))
            summary = _count_decisions(pairs, kept, "taken back", "taken back")
        else:
            pairs, kept = duplicate_decisions.read_all(args.index)
            summary = _count_decisions(pairs, kept, "of images that are no duplicates", "to be kept")
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    if args.json:
        keeping = [{"keep": each.path, "hash": each.hash, "decided": each.decided} for each in kept]
        print(json.dumps([*map(_decision_to_dict, pairs), *keeping], indent=2))
        return 0
    from clipvisionalign.search.storage import printable

    for each in pairs:
        print(f"{printable(each.paths[0])} and {printable(each.paths[1])} ({each.decided})")
    for keeper in kept:
        print(f"keep {printable(keeper.path)} ({keeper.decided})")
    print(summary)
    return 0


def _count_decisions(pairs: Sequence[Decision], kept: Sequence[Keeper], pairs_are: str, kept_are: str) -> str:
    counts = [f"{count_noun(len(pairs), 'pair')} {pairs_are}"] if pairs or not kept else []
    return ", ".join(counts + ([f"{count_noun(len(kept), 'image')} {kept_are}"] if kept else []))


def _decision_to_dict(decision: Decision) -> dict[str, object]:
    return {"paths": list(decision.paths), "hashes": list(decision.hashes), "decided": decision.decided}


def _print_report(report: DuplicateReport) -> None:
    for kind, heading in HEADINGS.items():
        groups = report.of_kind(kind)
        if groups:
            print(f"{heading}:")
            _print_groups(groups)
    counts = [f"{count_noun(len(report.of_kind(kind)), 'group')} of {name}" for kind, name in (
        ("bytes", "the same bytes"), ("nearly", "nearly the same"), ("scene", "one scene"),
    ) if kind != "scene" or report.of_kind(kind)]  # fmt: skip
    others = report.not_kept()
    print(f"{', '.join(counts)}, of {count_noun(report.images, 'image')}")
    if others:
        size = sum(image.size for image in others)
        print(f"{count_noun(len(others), 'image')} of {size:,} bytes need not be kept; --paths prints them")
    pairs = report.pairs
    print(
        "compared by pixels: {candidates:,} pairs with a cosine from {threshold:.4g} = {nearly:,} nearly the same + "
        "{mirrored:,} mirrored + {different:,} different + {not_verified:,} not verified".format(
            threshold=report.threshold, **pairs
        )
    )
    if pairs["decided"]:
        print(f"{count_noun(pairs['decided'], 'pair')} decided to be no duplicates; --decisions lists them")
    if pairs["between_groups"]:
        print(
            f"{count_noun(pairs['between_groups'], 'pair')} nearly the same in different groups, whose others are not"
        )


def _print_groups(groups: Sequence[DuplicateGroup]) -> None:
    from clipvisionalign.search.storage import printable

    for number, group in enumerate(groups, 1):
        for position, (image, cosine) in enumerate(zip(group.images, group.cosines, strict=True)):
            start = f"{number:>4}. keep " if not position else "      keep " if image.chosen else " " * 11
            facts = [f"{image.width} x {image.height}", f"{image.size:,} bytes"]
            facts += [f"taken {image.taken}"] if image.taken else []
            facts += [f"cosine {cosine:.3f}"] if position and group.kind != "bytes" else []
            reason = f": {group.reason}" if not position else ""
            print(f"{start}{printable(image.path)} ({', '.join(facts)}){reason}")


def _note_unverified(report: DuplicateReport) -> None:
    """Name images whose pairs could not be verified, on standard error."""
    from clipvisionalign.search.storage import printable

    if report.full:
        logger.info(f"note: {count_noun(report.full, 'image')} with so many alike that only the nearest were compared")
    if not report.not_verified:
        return
    for path, reason in report.not_verified[:MAX_NAMED]:
        logger.info(f"not verified: {printable(path)}: {printable(reason)}")
    more = len(report.not_verified) - MAX_NAMED
    if more > 0:
        logger.info(f"and {more:,} more, in --json")
