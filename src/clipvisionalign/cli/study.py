"""Commands on studies: study, report."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipvisionalign.cli.output import say
from clipvisionalign.cli.parser import OFFLINE, OFFLINE_HELP, _parser

if TYPE_CHECKING:
    from clipvisionalign.study.plan import Plan


def study_parser() -> argparse.ArgumentParser:
    from clipvisionalign.study.plan import ready_plans

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
    return parser


def study(arguments: list[str]) -> int:
    """Carry out a study, or tell how long it will take."""
    given = study_parser().parse_args(arguments)
    from clipvisionalign.study.plan import read_plan, told_with_lines
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


def report_parser() -> argparse.ArgumentParser:
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
    return parser


def report(arguments: list[str]) -> int:
    """Write a study's report again, or compare two studies."""
    given = report_parser().parse_args(arguments)
    from dataclasses import asdict

    from clipvisionalign.files import written_aside
    from clipvisionalign.study.comparison import compare_reports
    from clipvisionalign.study.page import render_comparison
    from clipvisionalign.study.report import check_installed, folder_of, read_report, write_report
    from clipvisionalign.study.run import report_held, report_of_study
    from clipvisionalign.study.tables import print_tables, show
    from clipvisionalign.study.words import claims_of

    check_installed()
    folder = folder_of(given.study)
    if given.compare:
        found = report_of_study(folder, say)
        tables, settings = compare_reports(found, read_report(given.compare))
        page = Path(given.out or folder / "comparison.html")
        told = render_comparison(f"{found['title']}: two studies", (given.study, given.compare), tables, settings)
        with written_aside(page) as aside:
            aside.write_text(told, encoding="utf-8")
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
