"""Commands on studies: study, report, verify."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipvisionalign.cli.parser import OFFLINE, OFFLINE_HELP, command_parser

if TYPE_CHECKING:
    from clipvisionalign.study.config import Plan

logger = logging.getLogger(__name__)


def study_parser() -> argparse.ArgumentParser:
    """The parser of `study`."""
    from clipvisionalign.study.plan_file import ready_plans

    ready = "\n".join(f"  {name:<16} {title}" for name, title in ready_plans().items())
    parser = command_parser(
        "study",
        description="Train attention designs over several seeds, measure them alike, and write one report:\n"
        "accuracy with intervals and corrected differences, time, memory, recall by caption length, minimal pairs,\n"
        "audits, examples. An interrupted study resumes when its command is repeated.",
        epilog=f"ready plans:\n{ready}\n\nA plan of your own is a YAML file; a study's folder holds its own.",
    )
    parser.add_argument("plan", help="a YAML file, or the name of a ready plan")
    parser.add_argument("--data", help="the data set (default: the plan's)")
    parser.add_argument("--out", help="the folder to write (default: studies/NAME)")
    parser.add_argument("--seeds", help="seeds instead of the plan's, separated by commas")
    parser.add_argument("--variants", help="only these of the plan's variants, separated by commas")
    parser.add_argument("--split", help="the split to measure (default: the plan's)")
    parser.add_argument(
        "--same",
        choices=("pictures", "seconds"),
        help="what is equal for all variants: images seen, or seconds of training",
    )
    parser.add_argument("--seconds", type=float, help="seconds of each training, with --same seconds")
    parser.add_argument(
        "--until", type=float, metavar="WIDTH",
        help="add seeds until the 95%% interval of the comparison that the plan names is narrower than this, in points "
        "of its figure",
    )  # fmt: skip
    parser.add_argument(
        "--like", default="", metavar="STUDY",
        help="a study by whose spread over images and seeds this one's power is estimated (default: its own, or a "
        "published one)",
    )  # fmt: skip
    parser.add_argument("--max-seeds", type=int, help="seeds at most, with --until (default 12)")
    parser.add_argument(
        "--sealed",
        action="store_true",
        help="seal the plan before the first training, and open the test split once, when all is trained; further "
        "looks at it are counted in the report",
    )
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)
    parser.add_argument("--dry-run", action="store_true", help="estimate the duration, and train nothing")
    parser.add_argument("--pdf", action="store_true", help="also write report.pdf (needs clipvisionalign[pdf])")
    parser.add_argument("--json", action="store_true", help="print report.json instead of tables")
    return parser


def study(arguments: list[str]) -> int:
    """Carry out a study, or estimate its duration.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.
    """
    args = study_parser().parse_args(arguments)
    from clipvisionalign.study.plan_file import read_plan, told_with_lines
    from clipvisionalign.study.report.tables import print_tables
    from clipvisionalign.study.runner import estimate_study_time, run_study
    from clipvisionalign.study.zero_shot import add_zero_shot

    plan = _apply_flags(read_plan(args.plan), args)
    out = args.out or f"studies/{Path(args.plan).stem}"
    if args.dry_run:
        with told_with_lines(args.plan):
            seconds = estimate_study_time(plan, out, like=args.like)
        for phase, duration in seconds.items():
            print(f"{duration / 60:6.1f} min  {phase}")
        # Of a pretrained model the study measures one variant more than its plan has.
        cells = len(add_zero_shot(plan).variants) * len(plan.seeds)
        print(f"{sum(seconds.values()) / 60:6.1f} min  in all, for {cells} cells")
        return 0
    with told_with_lines(args.plan):
        report = run_study(plan, out, sealed=args.sealed, like=args.like)
    if args.pdf:
        _write_pdf(out)
    print(json.dumps(report, indent=2)) if args.json else print_tables(report)
    return 0


def _apply_flags(plan: Plan, args: argparse.Namespace) -> Plan:
    """A plan with what the command line asks for instead. Raises ValueError for what contradicts itself."""
    from clipvisionalign.study.config import Drawing

    if args.seconds is not None:
        if args.same == "pictures":
            raise ValueError("--seconds counts with --same seconds alone, not with --same images")
        plan = replace(plan, budget=replace(plan.budget, same="seconds", seconds=args.seconds))
    elif args.same:
        plan = replace(plan, budget=replace(plan.budget, same=args.same))
    if args.data is not None:
        plan = replace(plan, data=args.data, scenes=0, drawing=Drawing())
    if args.split is not None or args.sealed:
        plan = replace(plan, split=args.split or "test")
    if args.seeds is not None:
        plan = replace(plan, seeds=[_whole(seed, "--seeds") for seed in _listed(args.seeds)])
    if args.until is not None:
        plan = replace(plan, until=replace(plan.until, width=args.until))
    if args.max_seeds is not None:
        if not plan.until.width:
            raise ValueError("--max-seeds counts with --until WIDTH, or 'until' in the plan, alone")
        plan = replace(plan, until=replace(plan.until, max_seeds=args.max_seeds))
    if args.variants is not None:
        unknown = [name for name in _listed(args.variants) if name not in plan.variants]
        if unknown:
            raise ValueError(
                f"--variants: '{', '.join(unknown)}' is not in the plan; it has {', '.join(plan.variants)}"
            )
        plan = replace(plan, variants={name: plan.variants[name] for name in _listed(args.variants)})
    return plan


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _whole(text: str, flag: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{flag}: '{text}' is no whole number") from None


def report_parser() -> argparse.ArgumentParser:
    """The parser of `report`."""
    parser = command_parser(
        "report",
        description="Re-create the report of a study: page, plots, tables, PDF; of an unfinished study, from what\n"
        "is measured so far. Or compare two studies: before and after a change, or of two machines.",
    )
    parser.add_argument("study", help="folder of a study, or the report.json in it")
    parser.add_argument("--compare", metavar="OTHER", help="another study's folder: writes comparison.html")
    parser.add_argument("--out", help="file to write a comparison to (default: STUDY/comparison.html)")
    parser.add_argument("--pdf", action="store_true", help="also write report.pdf (needs clipvisionalign[pdf])")
    parser.add_argument("--json", action="store_true", help="print report.json, or both tables, as JSON")
    return parser


def report(arguments: list[str]) -> int:
    """Write a study's report again, or compare two studies.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.
    """
    args = report_parser().parse_args(arguments)
    from dataclasses import asdict

    from clipvisionalign.files import atomic_write
    from clipvisionalign.study.folder import report_held
    from clipvisionalign.study.report.build import check_installed, read_report, study_folder, write_report
    from clipvisionalign.study.report.compare import compare_reports
    from clipvisionalign.study.report.html import render_comparison
    from clipvisionalign.study.report.summary import report_claims
    from clipvisionalign.study.report.tables import print_tables, render_tables
    from clipvisionalign.study.runner import read_study_report
    from clipvisionalign.study.two_studies import changes_table

    check_installed()
    folder = study_folder(args.study)
    if args.compare:
        study_report = read_study_report(folder)
        other = read_report(args.compare)
        tables, settings = compare_reports(study_report, other)
        changes = changes_table(folder, study_folder(args.compare), (study_report, other))
        if isinstance(changes, str):
            tables[0] = replace(tables[0], note=f"{tables[0].note} Changes are {changes}.")
        else:
            tables.insert(1, changes)
        page = Path(args.out or folder / "comparison.html")
        comparison_text = render_comparison(
            f"{study_report['title']}: two studies", (args.study, args.compare), tables, settings
        )
        with atomic_write(page) as aside:
            aside.write_text(comparison_text, encoding="utf-8")
        if args.json:
            print(json.dumps({"tables": [asdict(table) for table in tables], "settings": settings}, indent=2))
        else:
            render_tables(tables)
            print("\n".join(settings))
        logger.info(f"{page}: written")
        return 0
    with report_held(folder):
        study_report = read_study_report(folder)
        # Its sentences are those of now, whichever version has made the report.
        study_report["claims"] = report_claims(study_report)
        write_report(folder, study_report)
        if args.pdf:
            _write_pdf(folder)
    print(json.dumps(study_report, indent=2)) if args.json else print_tables(study_report)
    return 0


def _write_pdf(folder: str | Path) -> None:
    from clipvisionalign.study.report.html import write_pdf

    write_pdf(Path(folder) / "report.html", Path(folder) / "report.pdf")
    logger.info(f"{folder}/report.pdf: written")


def verify_parser() -> argparse.ArgumentParser:
    """The parser of `verify`."""
    parser = command_parser(
        "verify",
        description="Derive every figure of a study's report again from the ranks and measurements beside it, and\n"
        "name the first of each part that does not hold. Ranks and figures that were changed together are found by\n"
        "--models alone, which encodes the gallery with each model again.",
        epilog="exit status: 0 where nothing fails, 1 where something does",
    )
    parser.add_argument("study", help="folder of a study, or the report.json in it")
    parser.add_argument("--models", action="store_true", help="also audit each model, and rank by it, again")
    parser.add_argument("--json", action="store_true", help="print the parts as JSON")
    return parser


def verify(arguments: list[str]) -> int:
    """Verify a study's report.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.
    """
    args = verify_parser().parse_args(arguments)
    from clipvisionalign.counts import count_noun
    from clipvisionalign.study.verify import parts_as_json, verify_report

    parts = verify_report(args.study, args.models)
    failed = [part for part in parts if part.state == "fails"]
    if args.json:
        print(json.dumps(parts_as_json(parts), indent=2))
        return 1 if failed else 0
    for part in parts:
        print(f"{part.state:<13} {part.part}{f': {part.detail}' if part.detail else ''}")
    counts = [
        f"{count_noun(sum(part.state == state for part in parts), 'part')} {words}"
        for state, words in (("holds", "hold"), ("fails", "fail"), ("not verified", "not verified"))
    ]
    print(f"{args.study}: {', '.join(counts)}")
    return 1 if failed else 0
