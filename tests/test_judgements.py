"""Queries that are judged on the page: nothing that is stored is lost, and nothing is written that is not allowed."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from fastapi.testclient import TestClient

from clipvisionalign.cli import main
from clipvisionalign.search.calibration import Calibration
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.judgement_store import JUDGEMENTS_FILE, JudgedMeanwhileError, JudgementStore
from clipvisionalign.search.judgements import calibrate_index, parse_judgement, parse_judgements, read_judgements
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.server.app import create_app
from clipvisionalign.search.terms import parse_term


@pytest.fixture(scope="module")
def indexed(tmp_path_factory, scenes_folder, tiny_runs) -> Path:
    index = tmp_path_factory.mktemp("judged") / "index"
    build_index(tiny_runs["self"], scenes_folder / "images", index)
    return index


@pytest.fixture
def index(indexed, tmp_path) -> Path:
    shutil.copytree(indexed, tmp_path / "index")
    return tmp_path / "index"


def paths_of(index: Path) -> list[str]:
    return sorted(Searcher(index).table.read(("path",))["path"].to_pylist())


def lines_of(index: Path) -> list[dict]:
    file = index / JUDGEMENTS_FILE
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def test_nothing_is_lost_of_what_two_services_store_at_once(index):
    """Each has its own threads, as two processes over one index have: every judgement is a whole line of the file."""
    paths = paths_of(index)
    with TestClient(create_app([Searcher(index)])) as first, TestClient(create_app([Searcher(index)])) as second:

        def judge(number: int) -> int:
            judgement = {"query": [f"query {number}"], "relevant": paths[number % 7 : number % 7 + 3]}
            return (first if number % 2 else second).post("/judgements", json=judgement).status_code

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(judge, range(40))) == {200}
        lines = lines_of(index)
        assert {line["query"][0]: line["relevant"] for line in lines} == {
            f"query {number}": paths[number % 7 : number % 7 + 3] for number in range(40)
        }
        assert len(lines) == 40
        assert first.get("/judgements").json() == second.get("/judgements").json()


def test_who_judges_a_query_that_was_judged_meanwhile_is_told_and_replaces_it_knowingly(index):
    one, other, *_ = paths_of(index)
    store = JudgementStore(Searcher(index))
    with TestClient(create_app([Searcher(index)])) as client:
        first = store.add(["a star"], [one])
        refused = client.post("/judgements", json={"query": [" a star "], "relevant": [other]})
        assert refused.status_code == 409
        assert refused.json()["current"] == {"query": ["a star"], "relevant": [one], "time": first.time}
        with pytest.raises(JudgedMeanwhileError):
            store.add(["a star"], [other], replaces="another")
        both = {"query": ["a star"], "relevant": [one, other, one], "replaces": first.time, "searched": ["a ring"]}
        state = client.post("/judgements", json=both).json()
        assert [each["relevant"] for each in state["queries"]] == [[one, other]]
        assert (state["judged"], state["with_images"]) == (1, 1)
        second = state["queries"][0]["time"]
        state = client.post("/judgements", json={"query": ["a star"], "relevant": None, "replaces": second}).json()
        assert (state["judged"], state["queries"]) == (0, [])
        # All that was ever stored is still there.
        assert [line["relevant"] for line in lines_of(index)] == [[one], [one, other], None]
        assert lines_of(index)[1]["searched"] == ["a ring"]
        assert client.post("/judgements", json={"query": ["a star"], "relevant": []}).json()["judged"] == 1


@pytest.mark.parametrize("headers", [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"},
                                     {"origin": "http://elsewhere"}, {"origin": "null"}])  # fmt: skip
def test_the_page_of_another_site_stores_nothing(index, headers):
    with TestClient(create_app([Searcher(index)]), base_url="http://here:8000") as client:
        judgement = {"query": ["a star"], "relevant": []}
        assert client.post("/judgements", json=judgement, headers=headers).status_code == 403
        assert not lines_of(index)
        for own in (
            {"sec-fetch-site": "same-origin", "origin": "http://here:8000"},
            {"origin": "http://here:8000"},
            {},
        ):
            state = client.get("/judgements").json()
            replaces = state["queries"][0]["time"] if state["judged"] else ""
            assert client.post("/judgements", json=judgement | {"replaces": replaces}, headers=own).status_code == 200


def test_a_service_that_is_read_only_stores_nothing_and_offers_nothing(index):
    before = sorted(path.name for path in index.iterdir())
    with TestClient(create_app([Searcher(index)], read_only=True)) as client:
        assert client.get("/health").json()["indexes"][0]["judging"] is False
        refused = client.post("/judgements", json={"query": ["a star"], "relevant": []})
        assert refused.status_code == 403
        assert "--read-only" in refused.json()["detail"]
        assert client.get("/judgements").json()["judged"] == 0
    with TestClient(create_app([Searcher(index)], token="secret")) as client:
        assert client.post("/judgements", json={"query": ["a star"], "relevant": []}).status_code == 401
    assert sorted(path.name for path in index.iterdir()) == before
    with TestClient(create_app([Searcher(index)])) as client:
        assert client.get("/health").json()["indexes"][0]["judging"] is True


@pytest.mark.parametrize("judgement", [
    {"query": [], "relevant": []}, {"query": [" "], "relevant": []}, {"query": ["^99999 star"], "relevant": []},
    {"query": ["a star"] * 17, "relevant": []}, {"query": ["x" * 1001], "relevant": []},
    {"query": ["a star"], "relevant": ["gone.png"]}, {"query": ["a star"], "relevant": [3]}, {"query": ["a star"]},
    {"query": ["a star"], "relevant": ["x.png"] * 2001}, {"query": ["a \ud800 star"], "relevant": []},
    {"query": ["a star"], "relevant": [], "replaces": math.nan},
])  # fmt: skip
def test_what_cannot_be_calibrated_on_is_not_stored(index, judgement):
    with TestClient(create_app([Searcher(index)])) as client:
        content = json.dumps(judgement)
        headers = {"content-type": "application/json"}
        assert client.post("/judgements", content=content, headers=headers).status_code == 422
    assert not (index / JUDGEMENTS_FILE).exists()


def test_a_file_that_cannot_be_read_is_left_as_it_is(index):
    file = index / JUDGEMENTS_FILE
    for content in (
        b'{"query": "x"}\n',
        "{'query': 'café'}".encode("cp1252"),
        b'{"query": ["a"], "relevant": [], "time": 3}',
    ):
        file.write_bytes(content)
        with TestClient(create_app([Searcher(index)])) as client:
            for response in (
                client.get("/judgements"),
                client.post("/judgements", json={"query": ["b"], "relevant": []}),
            ):
                assert response.status_code == 422
                assert f"{JUDGEMENTS_FILE}, line 1: " in response.json()["detail"]
        assert file.read_bytes() == content
    # One without the end of its last line is continued on a line of its own.
    file.write_text('{"query": "by hand", "relevant": []}', encoding="utf-8")
    JudgementStore(Searcher(index)).add(["b"], [])
    assert [each.query for each in read_judgements(file)] == [("by hand",), ("b",)]


def test_a_disk_that_takes_nothing_is_told_and_the_file_stays(index, monkeypatch):
    JudgementStore(Searcher(index)).add(["a star"], [])
    before = (index / JUDGEMENTS_FILE).read_bytes()
    monkeypatch.setattr("os.fsync", _full)
    with TestClient(create_app([Searcher(index)])) as client:
        response = client.post("/judgements", json={"query": ["a ring"], "relevant": []})
    assert (response.status_code, response.json()["detail"][-23:]) == (503, "No space left on device")
    assert (index / JUDGEMENTS_FILE).read_bytes() == before


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_in_any_usual_encoding_is_calibrated_on(tmp_path, caplog):
    line = '{"query": "un café", "relevant": [3]}\r\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "cp1252"):
        (tmp_path / "judged.jsonl").write_bytes(line.encode(encoding))
        with caplog.at_level(logging.INFO, "clipvisionalign"):
            assert [each.query for each in read_judgements(tmp_path / "judged.jsonl")] == [("un café",)]
        assert ("Windows-1252" in caplog.text) == (encoding == "cp1252")


def test_the_last_judgement_of_the_page_counts_and_replaces_one_by_hand_before_it():
    stored = [{"query": ["a"], "relevant": ["1"], "time": "1"}, {"query": ["b"], "relevant": ["2"], "time": "2"},
              {"query": ["a"], "relevant": ["3"], "time": "3"}, {"query": ["b"], "relevant": None, "time": "4"},
              {"query": ["c"], "relevant": []}, {"query": "c", "relevant": []}]  # fmt: skip
    judgements = parse_judgements("\n".join(map(json.dumps, stored)))
    assert [(each.query, each.relevant) for each in judgements] == [(("a",), ("3",)), (("c",), ()), (("c",), ())]
    by_hand = [{"query": "a dog", "relevant": ["1"]}, {"query": ["a dog"], "relevant": ["2"], "time": "1"}]
    for lines, expected in ((by_hand, [("2",)]), (by_hand[::-1], [("2",), ("1",)])):
        judgements = parse_judgements("\n".join(map(json.dumps, lines)))
        assert [each.relevant for each in judgements] == expected
    for fields in ({"query": "a", "relevant": None}, {"query": "a", "relevant": [], "time": 3}):
        with pytest.raises(ValueError, match=r"relevant|time"):
            parse_judgement(fields)


def test_fifty_judged_queries_calibrate_the_index_and_the_service_notices(index, capsys, caplog):
    paths, searcher = paths_of(index), Searcher(index)
    store = JudgementStore(searcher)
    with TestClient(create_app([searcher])) as client:
        for number in range(49):
            store.add([f"a star and {number} rings"], paths[number : number + 2])
        store.add(["nothing of it"], [])
        state = client.get("/judgements").json()
        assert (state["judged"], state["with_images"], state["calibrated_on"]) == (50, 49, "")
        assert state["levels"] == [{"level": 0.9, "needed": 50}, {"level": 0.95, "needed": 100}]
        command = ["calibrate", str(index), "--judged", str(index / JUDGEMENTS_FILE)]
        assert state["command"] == " ".join(["clipvisionalign", *command])
        assert main(command) == 1
        assert "49 judged queries" in capsys.readouterr().err
        former = store.add(["a circle"], paths[:1])
        store.add(["a circle"], paths[:3], replaces=former.time)
        assert client.get("/search", params={"q": "a star", "promise": 0.9}).status_code == 422
        assert main(command) == 0
        answer = client.get("/search", params={"q": "a star", "promise": 0.9}).json()
        assert answer["promise"]["calibrated_on"] == f"{JUDGEMENTS_FILE}: 50 judged queries"
        state = client.get("/judgements").json()
        assert state["command"].endswith(" --overwrite")
        assert state["calibrated_on"] == f"{JUDGEMENTS_FILE}: 50 judged queries"
    calibration = Calibration.from_json((index / "calibration.json").read_text())
    assert len(calibration.scores) == 49 * 2 + 3
    # What was in the index when it was judged, and is gone, is counted and left out.
    text = (index / JUDGEMENTS_FILE).read_text(encoding="utf-8")
    content = searcher.table.read(("path", "hash"), f"path = '{paths[0]}'")["hash"].to_pylist()[0]
    assert content in text
    lines = text.replace(f'"{paths[0]}"', '"gone.png"').replace(content, "0" * len(content))
    with caplog.at_level(logging.INFO, "clipvisionalign"):
        without = calibrate_index(searcher, parse_judgements(lines))
    assert "2 images of judged queries are no longer in the index and are left out: gone.png (as it was" in caplog.text
    assert len(without.scores) == len(calibration.scores) - 2
    # One that was moved is recognised by its content, and another image under its former path is not taken for it.
    for former in ("moved.png", paths[9]):
        caplog.clear()
        moved = calibrate_index(searcher, parse_judgements(text.replace(f'"{paths[0]}"', f'"{former}"')))
        assert sorted(moved.scores) == sorted(calibration.scores)
        assert "no longer" not in caplog.text
    query = SearchQuery([parse_term("a star")], promise=0.9)
    assert searcher.search_one(query).promise.threshold == calibration.threshold(0.9)
