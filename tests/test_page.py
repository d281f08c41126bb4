"""The report's page in a real browser, opened from disk with the network off."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from forked import Forked, command

pytest.importorskip("playwright", reason="no playwright: pip install 'clipvisionalign[pdf]'")

from clipvisionalign.study.report.build import write_report
from clipvisionalign.study.report.summary import report_claims


def example(value: float, spread: float = 4.0) -> dict:
    return {"value": value, "low": value - 9, "high": value + 9, "spread": spread, "p": 0.001}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    """The page of a made-up report of two variants, so that no training stands before a test of a page."""
    from clipvisionalign.study.results_check import PROTOCOL
    from clipvisionalign.study.statistics import COMPARED_METRICS

    values = {"self": 310.0, "late": 322.0}
    checks = [{"name": "alone (vectors)", "passed": True, "figure": 0.0, "meaning": "a pair's score stays the same"}]
    gallery = {"images": 40, "captions": 200}
    variants = {}
    for name, value in values.items():
        figures = {figure: example(value if figure == "rsum" else value / 8) for figure in COMPARED_METRICS}
        way = {f"recall_at_{k}": {"value": value / 800, "low": 0.2, "high": 0.6} for k in (1, 5, 10)}
        run = {"seed": 0, "protocol": PROTOCOL, **gallery, "audit": {"passed": True, "checks": checks},
               "rsum": {"value": value, "low": value - 12, "high": value + 12},
               "image_to_text": way, "text_to_image": copy.deepcopy(way)}  # fmt: skip
        terciles = {third: {"captions": 66, "recall_at_1": example(20), "recall_at_5": example(50)}
                  for third in ("short", "middle", "long")}  # fmt: skip
        variants[name] = {"seeds": [0], "runs": [run], "figures": figures, "by_length": terciles}
    latency = {"p50": 3.0, "p95": 4.0, "p99": 5.0}
    cost = {
        name: {
            "ms_per_caption": {"median": 2.0 * n, "low": 1.9, "high": 2.2}, "caption_latency_ms": latency,
            "ms_per_picture": {"median": 20.0, "low": 19, "high": 22}, "picture_latency_ms": latency,
            "ms_per_1000_pairs": {"median": 0.01 * n, "low": 0.01, "high": 0.01}, "ms_per_query": 3.0 * n**4,
            "peak_memory_mib": 900.0 + n, "bytes_per_picture": 1024.0 * n, "bytes_per_caption": 1024.0,
            "parameters": 27_000_000, "flops_per_caption": 10**9, "flops_per_picture": 10**9, "energy": {},
            "by_batch": [{"batch": 1, "ms_per_caption": {"median": 3.0}}, {"batch": 8, "ms_per_caption": {"median": 2.0}}],
            "by_length": [{"tokens": 8, "ms_alone": 3.0}, {"tokens": 64, "ms_alone": 5.0}],
            "training_seconds": {"mean": 100.0 * n, "each": [100.0 * n]},
        }
        for n, name in enumerate(values, 1)
    }  # fmt: skip
    difference = {"a": "self", "b": "late", **example(-12.0), "p_holm": 0.03, "shown": True}
    pair = {"kind": "relation", "variant": "late", "pairs": 40, **example(55), "p_holm": 0.4}
    dot = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    bars = [{"protocol": "whole gallery", "honest": True, "of": 40, "recall_at_1": 0.3, "recall_at_5": 0.6},
            {"protocol": "inside batches of 8", "honest": False, "of": 8, "recall_at_1": 0.8, "recall_at_5": 1.0}]  # fmt: skip
    report = {
        "format": 1, "title": "A <made-up> study", "failed": [{"variant": "self", "seed": 1, "reason": "out of <memory>"}],
        "plan": {"title": "A study", "variants": {"self": {}, "late": {}}, "seeds": [0], "scenes": 40},
        "data": {"source": "scenes", "layout": "folder", "official_splits": True, "splits": {"dev": 40},
                 "fingerprint": "abc", "gallery": gallery, "left_out": []},
        "results": {"split": "dev", "protocol": PROTOCOL, "gallery": gallery, "variants": variants, "refused": [],
                    "differences": [{**difference, "figure": "rsum"}], "lengths": {"words": {
                        "short": [3, 7], "middle": [8, 12], "long": [13, 40]}},
                    "by_length_differences": [{**difference, "figure": "text_to_image recall_at_5", "third": "long"}],
                    "composition": {"this data": [pair]}},
        "text_only": {"this data": [{"kind": "relation", "pairs": 40, **example(50)}]}, "cost": cost,
        "curves": [{"variant": name, "seed": 0, "step": [5, 10], "loss": [3, 2], "rsum": [200, value]}
                   for name, value in values.items()],
        "depths": {}, "what_it_would_have_looked_like": {"variant": "self", "seed": 0, "bars": bars,
            "audit_of_the_leak": {"passed": False, "checks": [{"name": "alone", "passed": False, "meaning": "changes"}]}},
        "examples": {"groups": {"found by all": [{"image": "1.png", "caption": "a dog", "ranks": {"self": 1, "late": 2},
                                                  "picture": dot}]},
                     "maps": [{"caption": "a dog", "image": "1.png", "variants": {"late": {"method": "late interaction",
                               "maps": [{"of": "dog", "picture": dot}]}}}]},
        "machine": {"processor": "a processor"}, "versions": {"clipvisionalign": "0"}, "commands": ["clipvisionalign study"],
        "references": [{"key": "x", "author": "A and B", "title": "T", "howpublished": "W", "year": "2020",
                        "bibtex": "@misc{x}"}],
    }  # fmt: skip
    report["claims"] = report_claims(report)
    folder = tmp_path_factory.mktemp("page")
    write_report(folder, report)
    return folder / "report.html"


@pytest.fixture
def opened(browser, page_file, request):
    """The page, and what it said to the console and asked of the network."""
    width, scheme = getattr(request, "param", (1280, "light"))
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith(("data:", "file:")) else None)
    page.goto(page_file.as_uri())
    yield page, said
    context.close()


EVERY = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


@pytest.mark.parametrize("opened", EVERY, indirect=True)
def test_it_opens_without_a_word_to_console_or_network_and_fits(opened):
    page, said = opened
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.locator("h1").inner_text() == "A <made-up> study"
    assert "out of <memory>" in page.locator("main").inner_text()
    assert page.locator("svg[role=img]").count() == 8


@pytest.mark.parametrize("opened", EVERY, indirect=True)
def test_axe_finds_no_fault(opened):
    from axe_playwright_python.sync_playwright import Axe

    page, _ = opened
    violations = Axe().run(page).response["violations"]
    assert violations == [], [(one["id"], one["nodes"][0]["html"][:200]) for one in violations]


def test_tables_sort_by_keyboard(opened):
    page, _ = opened
    table = page.get_by_role("region", name="Table: What it costs").or_(
        page.get_by_role("region", name="Table: What each design costs")
    )
    names = table.locator("tbody th")
    button = table.get_by_role("button", name="training s")
    button.focus()
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["late", "self"]
    assert table.locator("th[aria-sort=descending]").inner_text().startswith("training s")
    page.keyboard.press("Space")
    assert names.all_inner_texts() == ["self", "late"]
    # Text sorts as text.
    table.get_by_role("button", name="variant").focus()
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["self", "late"]


@pytest.mark.slow
def test_everything_that_can_be_used_is_reached_by_the_tab_key(opened):
    page, _ = opened
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    count = page.locator("a, button, summary, [tabindex='0']").count()
    reached = set()
    for _ in range(count + 5):
        reached.add(page.evaluate("document.activeElement.outerHTML.slice(0, 300) + document.activeElement.offsetTop"))
        page.keyboard.press("Tab")
    assert len(reached) >= 0.95 * len({
        page.evaluate("([i]) => { const e = document.querySelectorAll(\"a, button, summary, [tabindex='0']\")[i];"
                      "return e.outerHTML.slice(0, 300) + e.offsetTop; }", [i]) for i in range(count)
    })  # fmt: skip


def test_the_file_stands_alone(page_file):
    text = page_file.read_text()
    assert 'src="http' not in text
    assert 'href="http' not in text
    assert "@import" not in text


@pytest.mark.slow
def test_it_prints(browser, page_file):
    # In a process of its own: this one's browser holds Playwright already.
    Forked(command, "report", str(page_file.parent), "--pdf", out=page_file.with_suffix(".txt")).ended()
    out = page_file.parent / "report.pdf"
    assert out.read_bytes().startswith(b"%PDF")
    assert out.stat().st_size > 20_000


def test_the_report_reads_back(page_file):
    assert json.loads((page_file.parent / "report.json").read_text())["title"] == "A <made-up> study"
