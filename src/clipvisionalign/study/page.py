"""report.html: one file that opens from disk, without a network; and the same as a PDF."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from clipvisionalign.counts import with_noun
from clipvisionalign.files import written_aside
from clipvisionalign.study.costs import measured_by_told
from clipvisionalign.study.figures import Drawn
from clipvisionalign.study.gaps import labelled, not_made
from clipvisionalign.study.tables import Table, tables_of
from clipvisionalign.study.words import examples_shown, twins_told


def render_page(report: dict[str, Any], drawn: dict[str, Drawn]) -> str:
    """The page of a report, its figures inside."""
    import yaml

    tables = {table.name: table for table in tables_of(report)}
    gaps = not_made(report)
    lacks = {gap["part"] for gap in gaps}
    with_examples = bool(examples_shown(report) or report["examples"].get("maps") or "examples" in lacks)
    other = report["what_it_would_have_looked_like"] or "other protocols" in lacks
    parts = [("summary", "Summary"), ("accuracy", "Accuracy")]
    parts += [("cost", "Cost")] if "cost" in tables or "time and memory" in lacks else []
    parts += [("differ", "Length and composition")] if "length" in tables else []
    parts += [("training", "Training")] if "curves" in drawn else []
    parts += [("examples", "Examples")] if with_examples else []
    parts += [("fence", "What it would have looked like")] if other else []
    parts += [("audit", "Audit")] if "audit" in tables else []
    parts += [("again", "To do it again")]
    return _environment().get_template("report.html").render(
        title=report["title"], report=report, drawn=drawn, tables=tables, parts=parts, gaps=gaps,
        plan=yaml.safe_dump(report["plan"], sort_keys=False), twins=twins_told(report),
        measured_by=measured_by_told(report), examples=examples_shown(report),
        with_examples=with_examples, example_seeds=example_seeds(report),
    )  # fmt: skip


def example_seeds(report: dict[str, Any]) -> str:
    """Which seeds the examples are of, and which variants have none."""
    # Reports from before this was kept have those of the first seed.
    seeds = report["examples"].get("seeds") or dict.fromkeys(report["results"]["variants"], report["plan"]["seeds"][0])
    if len(set(seeds.values())) == 1:
        told = f"seed {next(iter(seeds.values()))}"
    else:
        told = ", ".join(f"{name}: seed {seed}" for name, seed in seeds.items())
    none = [labelled(report, name) for name in report["plan"]["variants"] if name not in seeds]
    return f"{told}; none of {', '.join(none)}" if none else told


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
    found.filters["with_noun"] = with_noun
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
            with written_aside(out) as aside:
                sheet.pdf(path=str(aside), format="A4", margin=margins, print_background=True)  # type: ignore[arg-type]
            browser.close()
    except Error as error:
        told = str(error).splitlines()[0]
        raise RuntimeError(f"{out}: no browser printed it: {told}; 'playwright install chromium' gets one") from None
