"""report.html: one file that opens from disk, without a network; and the same as a PDF."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from clipvisionalign.study.figures import Drawn
from clipvisionalign.study.tables import Table, tables_of
from clipvisionalign.study.words import examples_shown, twins_told


def render_page(report: dict[str, Any], drawn: dict[str, Drawn]) -> str:
    """The page of a report, its figures inside."""
    import yaml

    tables = {table.name: table for table in tables_of(report)}
    parts = [("summary", "Summary"), ("accuracy", "Accuracy")]
    parts += [("cost", "Cost")] if "cost" in tables else []
    parts += [("differ", "Length and composition")]
    parts += [("training", "Training")] if "curves" in drawn else []
    parts += [("examples", "Examples")] if examples_shown(report) or report["examples"].get("maps") else []
    parts += [("fence", "What it would have looked like")] if report["what_it_would_have_looked_like"] else []
    parts += [("audit", "Audit"), ("again", "To do it again")]
    return _environment().get_template("report.html").render(
        title=report["title"], report=report, drawn=drawn, tables=tables, parts=parts,
        plan=yaml.safe_dump(report["plan"], sort_keys=False), twins=twins_told(report),
        examples=examples_shown(report),
    )  # fmt: skip


def render_comparison(title: str, names: tuple[str, str], tables: list[Table], settings: list[str]) -> str:
    """The page of two studies side by side."""
    return (
        _environment()
        .get_template("comparison.html")
        .render(title=title, names=names, tables=tables, settings=settings)
    )


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    found = Environment(
        loader=PackageLoader("clipvisionalign.study"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found.filters["code"] = lambda text: Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
    return found


#: Browsers that Playwright may use, where it has none of its own.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def browser_path() -> str | None:
    """A browser of the system, None to use Playwright's own."""
    import shutil

    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def write_pdf(page: Path, out: Path) -> None:
    """Print a page to PDF as a browser does. Needs clipvisionalign[pdf] and a Chromium; raises RuntimeError without."""
    import os

    from playwright.sync_api import Error, sync_playwright

    # Chromium's sandbox does not run as root, in a container say; the page is our own and loads nothing.
    arguments = ["--no-sandbox"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=browser_path(), args=arguments)
            context = browser.new_context(offline=True, color_scheme="light")
            sheet = context.new_page()
            sheet.goto(page.resolve().as_uri())
            # What is folded away on a screen belongs on paper.
            sheet.evaluate("document.querySelectorAll('main > section > details').forEach(each => each.open = true)")
            margins = dict.fromkeys(("top", "bottom", "left", "right"), "14mm")
            sheet.pdf(path=str(out), format="A4", margin=margins, print_background=True)  # type: ignore[arg-type]
            browser.close()
    except Error as error:
        told = str(error).splitlines()[0]
        raise RuntimeError(f"{out}: no browser printed it: {told}; 'playwright install chromium' gets one") from None
