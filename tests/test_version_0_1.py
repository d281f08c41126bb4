"""What version 0.1 wrote still opens, and gives the figures that it gave: a run, an unfinished run, an index, a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from clipvisionalign.cli import main

FILES = Path(__file__).parent / "data" / "v0.1"
EXPECTED = json.loads((FILES / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, at whose place the run was begun."""
    copy = shutil.copytree(FILES, tmp_path / "v0.1")
    for file in (*copy.glob("trained/*/environment.json"), copy / "index" / "index.json"):
        file.write_text(file.read_text().replace("/home/reader/v0.1", str(copy)))
    monkeypatch.chdir(copy)
    return copy


def test_a_run_gives_the_vectors_and_scores_that_it_gave(folder: Path):
    from clipvisionalign import load_aligner

    aligner = load_aligner("trained/cross")
    images, captions = EXPECTED["images"], EXPECTED["captions"]
    assert np.allclose(aligner.encode_images(images), EXPECTED["image_vectors"], atol=1e-3)
    assert np.allclose(aligner.encode_captions(captions), EXPECTED["caption_vectors"], atol=1e-3)
    assert np.allclose(aligner.score(images, captions), EXPECTED["scores"], atol=1e-2)


def test_a_run_is_evaluated_to_the_figures_that_it_had(folder: Path, capsys):
    assert main(["evaluate", "trained/cross", "--data", "images", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["captions"]) == (EXPECTED["dev"]["images"], EXPECTED["dev"]["captions"])
    # Another processor may order two candidates of nearly equal score otherwise: a caption of 60, an image of 12.
    for way, one in (("image_to_text", 1 / 12), ("text_to_image", 1 / 60)):
        for name in ("recall_at_1", "recall_at_5", "recall_at_10"):
            assert abs(report[way][name]["value"] - EXPECTED["dev"][way][name]["value"]) <= one + 1e-6, (way, name)


def test_an_unfinished_run_is_resumed_from_its_checkpoint(folder: Path, capsys):
    run = folder / "trained" / "unfinished"
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert main(["train", "--resume", "trained/unfinished"]) == 0
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert after[: len(before)] == before, "what was recorded before the stop stays"
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == 20
    assert [line["epoch"] for line in after if "epoch" in line][-1] == 2


def test_an_index_is_searched_and_brought_up_to_date(folder: Path, capsys):
    assert main(["search", "index", EXPECTED["search"]["query"], "--count", "5", "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["found"]
    assert [hit["path"] for hit in hits] == [hit["path"] for hit in EXPECTED["search"]["hits"]]
    assert np.allclose([hit["score"] for hit in hits], [hit["score"] for hit in EXPECTED["search"]["hits"]], atol=1e-3)
    (folder / "images" / "images" / "000015.png").unlink()
    assert main(["index", "trained/cross", "images/images", "--out", "index", "--verify", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["encoded"], report["unchanged"], report["dropped"]) == (0, 99, 1)


def test_a_report_gives_the_tables_that_it_had(folder: Path):
    from clipvisionalign.study.report.build import read_report
    from clipvisionalign.study.report.tables import build_tables, to_markdown

    tables = {table.name: to_markdown(table) for table in build_tables(read_report("study"))}
    assert tables["accuracy"] == (folder / "study" / "tables" / "accuracy.md").read_text()

    # Below its rows stand the sentences of now.
    def rows(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("|")]

    assert rows(tables["differences"]) == rows((folder / "study" / "tables" / "differences.md").read_text())


@pytest.mark.slow
def test_a_report_alone_is_printed_and_becomes_a_page(folder: Path, capsys):
    assert main(["report", "study/report.json"]) == 0
    printed = capsys.readouterr().out
    assert "`self`" in printed
    assert "`late`" in printed
