"""Pages of studies with nothing, or little, to tell: what they say is true of that too."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import pytest
from made_reports import cost_round, made_report
from test_figures import plotted, table

from clipvisionalign.study.report.html import render_page
from clipvisionalign.study.report.plots import draw_plots
from clipvisionalign.study.report.plots.accuracy import plot_accuracy
from clipvisionalign.study.report.plots.training import plot_curves
from clipvisionalign.study.report.tables import build_tables

ALL = [(name, seed) for name in ("self", "late") for seed in (0, 1)]


def text_of(report: dict[str, Any]) -> str:
    """What a page says, without its plots and what is folded away."""
    page = re.sub(r"<(details|script)>.*?</\1>", " ", render_page(report, {}), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page[page.index("<body") :])).split())


@pytest.mark.parametrize("how", ["missing", "refused"])
def test_a_report_without_any_result_is_whole_and_claims_none(how):
    given: dict[str, Any] = {how: ALL}
    report = made_report(**given, costs={"self": [cost_round()]} if how == "refused" else None)
    # What --json prints can be read by anything that reads JSON.
    json.dumps(report, allow_nan=False)
    text = text_of(report)
    assert "none of them with results" in text
    assert "to be measured on 40 images and 80 captions" in text
    assert "No run has a result." in text
    (gaps,) = [each for each in build_tables(report) if each.name == "gaps"]
    assert len(gaps.rows) == 4
    assert ("tries what failed" in gaps.note) == (how == "missing")
    assert ("stays refused" in gaps.note) == (how == "refused")
    # No command names a run that was never trained.
    assert ("cells/self-0" in text) == (how == "refused")
    if how == "refused":
        _, about = plotted(report, plot_curves)
        assert "refused, as their audit failed: self, seed 0; self, seed 1; late, seed 0; late, seed 1." in about


def test_commands_name_a_run_that_is_there():
    text = text_of(made_report(missing=ALL[:3]))
    assert "cells/late-1" in text
    assert "cells/self-0" not in text


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize(("images", "lengths", "counted"), [(1, (5,), "1 image and 1 caption"), (2, (4, 9), "2 images and 4 captions")])  # fmt: skip
def test_no_interval_is_spoken_of_where_there_is_none(seeds, images, lengths, counted):
    report = made_report(seeds=seeds, images=images, lengths=lengths)
    text = text_of(report)
    assert f"measured on {counted}" in text
    assert not re.search(r"\b1 (images|captions|variants|seeds)\b", text)
    assert "95% interval" not in text
    assert "no intervals, as there are too few images" in text
    _, about = plotted(report, plot_accuracy)
    assert "with no interval" in about
    assert "no interval" in table(report, "accuracy")["self"]["rsum"]


def test_figures_say_that_there_are_no_intervals(tmp_path):
    plots = draw_plots(made_report(seeds=[0], images=2), tmp_path)
    for name in ("accuracy", "length"):
        assert plots[name].description.endswith("There are no intervals, as there are too few images.")
    assert all(
        "  " not in each.description + each.alt_text and each.alt_text == each.alt_text.strip()
        for each in plots.values()
    )
