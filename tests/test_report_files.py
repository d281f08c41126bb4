"""The files of a report are, byte for byte, what was made of the same report.json before.

Hashes of them are in data/report_files.json. Where a sentence or a table is meant to change, `python
tests/test_report_files.py` writes them again, and the commit shows which files changed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from clipvisionalign.study.report.build import read_report
from clipvisionalign.study.report.compare import compare_reports
from clipvisionalign.study.report.html import render_comparison, render_page
from clipvisionalign.study.report.plots import draw_plots
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.report.tables import render_tables, write_tables

ROOT = Path(__file__).parents[1]
EXPECTED = Path(__file__).parent / "data" / "report_files.json"
REPORTS = {
    "v0.1": ROOT / "tests" / "data" / "v0.1" / "study" / "report.json",
    **{path.parent.name: path for path in sorted((ROOT / "docs" / "results").glob("*/report.json"))},
}


def report_files(path: Path, folder: Path) -> dict[str, str]:
    """Text of everything that is made of a report, by name. Of plots the words alone: matplotlib's SVG depends on its
    version."""
    report = read_report(path)
    report["claims"] = report_claims(report)
    files = {"claims": json.dumps(report["claims"], indent=2)}
    write_tables(report, folder / "tables")
    files |= {f"tables/{file.name}": file.read_text() for file in sorted((folder / "tables").iterdir())}
    plots = draw_plots(report, folder / "figures")
    files |= {
        f"figures/{name}": "\n".join([plot.title, plot.description, plot.alt_text, plot.error])
        for name, plot in plots.items()
    }
    files["report.html"] = render_page(report, {})
    return files


def comparison_files(a: Path, b: Path) -> dict[str, str]:
    """The comparison of two reports: its page and its lines."""
    tables, differences = compare_reports(read_report(a), read_report(b))
    return {
        "comparison.html": render_comparison("two studies", ("A", "B"), tables, differences),
        "comparison": "\n".join(differences),
    }


def hashes(files: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_files_of_a_report_are_the_same_as_before(name: str, tmp_path: Path):
    assert hashes(report_files(REPORTS[name], tmp_path)) == json.loads(EXPECTED.read_text())[name]


def test_the_comparison_of_two_reports_is_the_same_as_before():
    a, b = list(REPORTS.values())[:2]
    assert hashes(comparison_files(a, b)) == json.loads(EXPECTED.read_text())["comparison"]


def test_tables_in_the_terminal_are_the_same_as_before(capsys):
    """Their rows; how they are framed is rich's."""
    tables, _ = compare_reports(*(read_report(path) for path in list(REPORTS.values())[:2]))
    render_tables(tables)
    printed = capsys.readouterr().out
    assert all(cell in printed for table in tables for row in table.rows for cell in row)


def _write_expected() -> None:
    import tempfile

    expected = {}
    for name, path in REPORTS.items():
        with tempfile.TemporaryDirectory() as folder:
            expected[name] = hashes(report_files(path, Path(folder)))
    expected["comparison"] = hashes(comparison_files(*list(REPORTS.values())[:2]))
    EXPECTED.write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    _write_expected()
