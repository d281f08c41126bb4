"""report.html: one file that opens from disk, without a network; and the same as a PDF."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.files import atomic_write
from clipvisionalign.study.report.claims.captions import foils_note
from clipvisionalign.study.report.costs import measured_by_note
from clipvisionalign.study.report.example_groups import shown_examples
from clipvisionalign.study.report.plots import Plot
from clipvisionalign.study.report.schema import ReportLike, StudyReport
from clipvisionalign.study.report.states import variant_label
from clipvisionalign.study.report.tables import ReportTable, build_tables


def render_page(report: ReportLike, plots: dict[str, Plot]) -> str:
    """The page of a report as HTML, its plots inside.

    Args:
        report: The report.
        plots: Its plots, by name.

    Returns:
        The page.
    """
    import yaml

    report = StudyReport.of(report)
    tables = {table.name: table for table in build_tables(report)}
    missing_names = {gap.part for gap in report.missing_parts}
    examples = shown_examples(report.examples)
    with_examples = bool(examples or report.examples.maps or "examples" in missing_names)
    has_flawed_protocols = report.flawed_protocols or "other protocols" in missing_names
    sections = [("summary", "Summary"), ("accuracy", "Accuracy")]
    sections += [("cost", "Cost")] if {"cost", "frontier"} & tables.keys() or "time and memory" in missing_names else []
    sections += [("differ", "Length and composition")] if "length" in tables else []
    sections += [("training", "Training")] if "curves" in plots else []
    sections += [("examples", "Examples")] if with_examples else []
    sections += [("fence", "What it would have looked like")] if has_flawed_protocols else []
    sections += [("audit", "Audit")] if "audit" in tables else []
    sections += [("again", "To do it again")]
    return _environment().get_template("report.html").render(
        title=report.title, report=report, drawn=plots, tables=tables, parts=sections, gaps=report.missing_parts,
        plan=yaml.safe_dump(report.document["plan"], sort_keys=False), foils_note=foils_note(report),
        measured_by=measured_by_note(report), examples=examples,
        with_examples=with_examples, example_seeds=example_seeds(report),
    )  # fmt: skip


def example_seeds(report: StudyReport) -> str:
    """Which seeds the examples are of, and which variants have none.

    Args:
        report: The report.

    Returns:
        A sentence.
    """
    # Reports from before this was kept have those of the first seed.
    seeds = report.examples.seeds or dict.fromkeys(report.results.variants, report.plan.seeds[0])
    if len(set(seeds.values())) == 1:
        text = f"seed {next(iter(seeds.values()))}"
    else:
        text = ", ".join(f"{name}: seed {seed}" for name, seed in seeds.items())
    without_examples = [variant_label(report, name) for name in report.plan.variants if name not in seeds]
    return f"{text}; none of {', '.join(without_examples)}" if without_examples else text


def render_comparison(title: str, names: tuple[str, str], tables: list[ReportTable], settings: list[str]) -> str:
    """The page of two studies side by side.

    Args:
        title: Of the page.
        names: Of the two studies.
        tables: Accuracy and cost of both, see `compare_reports`.
        settings: In what they differ, a line each.

    Returns:
        The page as HTML.
    """
    return (
        _environment()
        .get_template("comparison.html")
        .render(title=title, names=names, tables=tables, settings=settings)
    )


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=PackageLoader("clipvisionalign.study.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["with_noun"] = count_noun
    environment.filters["code"] = lambda text: Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
    return environment


#: Browsers that Playwright may use, where it has none of its own.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def browser_path() -> str | None:
    """A browser of the system, None to use Playwright's own."""
    import shutil

    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def write_pdf(page: Path, out: Path) -> None:
    """Print a page to PDF as a browser does. Needs clipvisionalign[pdf] and a Chromium.

    Args:
        page: The HTML file.
        out: The PDF file.

    Raises:
        RuntimeError: One of the two is missing, or the page cannot be printed.
    """
    import os

    from playwright.sync_api import Error, sync_playwright

    # Chromium's sandbox does not run as root, as in a container; the page is our own and loads nothing.
    arguments = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path(), args=arguments)
            context = browser.new_context(offline=True, color_scheme="light")
            browser_page = context.new_page()
            browser_page.goto(page.resolve().as_uri())
            # What is folded away on a screen belongs on paper.
            browser_page.evaluate(
                "document.querySelectorAll('main > section > details').forEach(each => each.open = true)"
            )
            margins = dict.fromkeys(("top", "bottom", "left", "right"), "14mm")
            with atomic_write(out) as aside:
                browser_page.pdf(path=str(aside), format="A4", margin=margins, print_background=True)  # type: ignore[arg-type]
            browser.close()
    except Error as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"{out}: no browser printed it: {reason}; 'playwright install chromium' gets one") from None
