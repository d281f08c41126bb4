"""Duplicates in the service: groups by kind and page by page, decisions, and who may store them."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from test_duplicates import photograph

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from fastapi.testclient import TestClient

from clipvisionalign.progress import progress, progress_listener
from clipvisionalign.search.duplicate_decisions import read_decisions, read_keepers
from clipvisionalign.search.duplicates import duplicate_report
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.server.app import create_app


@pytest.fixture(scope="module")
def built(tiny_runs, tmp_path_factory) -> Path:
    """Three photographs, each with two copies, and their index."""
    root = tmp_path_factory.mktemp("served")
    (root / "images").mkdir()
    for seed in range(3):
        image = photograph(seed)
        image.save(root / "images" / f"{seed}.png")
        image.save(root / "images" / f"{seed}.jpg", quality=70)
        shutil.copy(root / "images" / f"{seed}.png", root / "images" / f"{seed} again.png")
    build_index(tiny_runs["self"], root / "images", root / "index")
    return root


@pytest.fixture
def index(built, tmp_path) -> Path:
    shutil.copytree(built / "index", tmp_path / "index")
    return tmp_path / "index"


def asked(client: TestClient, **values) -> dict:
    """The groups, once they are made."""
    for _ in range(600):
        response = client.get("/duplicates", params=values)
        if response.status_code != 202:
            break
        assert response.json()["state"] == "computing"
        time.sleep(0.05)
    assert response.status_code == 200, response.text
    return response.json()


def test_groups_are_those_of_the_report_page_by_page(index):
    report = duplicate_report(index, show_progress=False)
    expected = [group.to_dict() for group in report.groups]
    assert {group["kind"] for group in expected} == {"bytes", "nearly"}
    with TestClient(create_app([Searcher(index)])) as client:
        answer = asked(client)
        groups = [{key: group[key] for key in expected[0]} for group in answer["groups"]]
        assert (groups, answer["total"]) == (json.loads(json.dumps(expected)), len(expected))
        assert [group["members"] for group in answer["groups"]] == [len(group["images"]) for group in expected]
        pages = [
            asked(client, count=2, offset=offset, report=answer["report"])["groups"]
            for offset in range(0, len(expected) + 2, 2)
        ]
        assert [group for page in pages for group in page] == answer["groups"]
        for kind in ("bytes", "nearly"):
            assert [group["kind"] for group in asked(client, kind=kind)["groups"]] == [kind] * answer["counts"][kind]
        assert {group["kind"] for group in asked(client, kind="scene")["groups"]} <= {"scene"}
        assert asked(client)["groups"] == answer["groups"]
        assert client.get("/duplicates", params={"kind": "other"}).status_code == 422
        assert client.get("/duplicates", params={"report": "of another service"}).status_code == 410
        # The paths are those of the command.
        listed = client.get("/duplicates/paths", params={"report": answer["report"]})
        folder = json.loads((index / "index.json").read_text())["folder"]
        assert listed.content == b"".join(os.fsencode(f"{folder}/") + each.raw + b"\n" for each in report.not_kept())
        assert len(report.not_kept()) == answer["not_kept"]


def test_decisions_are_stored_and_taken_back_and_no_page_moves_meanwhile(index):
    with TestClient(create_app([Searcher(index)])) as client:
        first = asked(client, kind="nearly")
        group, decision = first["groups"][0], {"report": first["report"], "group": first["groups"][0]["number"]}
        answer = client.post("/duplicates/decisions", json=decision)
        assert answer.status_code == 200, answer.text
        stored = read_decisions(index)
        assert len(answer.json()["added"]) == len(stored) == len(group["images"]) * (len(group["images"]) - 1) // 2
        # Those who look through the groups still find each where it was; others no longer have it.
        assert asked(client, kind="nearly", report=first["report"])["groups"] == first["groups"]
        assert asked(client, kind="nearly")["total"] == first["total"] - 1
        listed = client.get("/duplicates/decisions").json()
        assert listed["total"] == len(stored)
        assert {image["path"] for image in listed["decisions"][0]["images"]} <= {i["path"] for i in group["images"]}
        assert client.get(f"/image/{listed['decisions'][0]['images'][0]['id']}").status_code == 200
        # A second one adds nothing, so that taking it back takes nothing from the first.
        assert client.post("/duplicates/decisions", json=decision).json()["added"] == []
        taken = client.post("/duplicates/forgotten", json={"pairs": answer.json()["added"]})
        assert (len(taken.json()["removed"]), read_decisions(index)) == (len(stored), [])
        shown = [{**each, "number": 0} for each in asked(client, kind="nearly")["groups"]]
        assert shown == [{**each, "number": 0} for each in first["groups"]]
        for wrong in ({}, {**decision, "group": 99}, {**decision, "group": -1}, {**decision, "report": 3}):
            assert client.post("/duplicates/decisions", json=wrong).status_code == 422
        assert client.post("/duplicates/decisions", json={**decision, "report": "other"}).status_code == 410
        same = asked(client, kind="bytes")
        answer = client.post(
            "/duplicates/decisions", json={"report": same["report"], "group": same["groups"][0]["number"]}
        )
        assert answer.status_code == 422
        assert "the same bytes" in answer.json()["detail"]


@pytest.mark.parametrize("kind", ["bytes", "nearly"])
def test_the_chosen_image_is_kept_and_of_two_people_the_second_is_told(index, kind):
    with TestClient(create_app([Searcher(index)])) as client:
        first = asked(client, kind=kind)
        group = first["groups"][0]
        best, other = (image["id"] for image in group["images"][:2])
        choice = {"report": first["report"], "group": group["number"], "image": other}
        assert client.post("/duplicates/keepers", json=choice).status_code == 200
        second = asked(client, kind=kind)
        chosen = next(
            each for each in second["groups"] if {i["id"] for i in each["images"]} == {i["id"] for i in group["images"]}
        )
        assert (chosen["keep"], chosen["reason"]) == (other, "chosen by hand")
        assert [image["chosen"] for image in chosen["images"]] == [True] + [False] * (len(group["images"]) - 1)
        paths = client.get("/duplicates/paths").text.splitlines()
        kept = next(image["path"] for image in group["images"] if image["id"] == other)
        assert not any(path.endswith(f"/{kept}") for path in paths)
        # Someone who has not seen the choice overwrites it only after they have.
        late = client.post("/duplicates/keepers", json={**choice, "image": best})
        assert late.status_code == 409
        assert kept in late.json()["detail"]
        assert (
            client.post("/duplicates/keepers", json={**choice, "image": best, "replaces": [other]}).status_code == 200
        )
        assert len(read_keepers(index)) == 1
        assert client.post("/duplicates/keepers", json={**choice, "image": 10**9}).status_code == 404
        assert client.post("/duplicates/keepers", json={**choice, "image": None, "replaces": [best]}).status_code == 200
        assert read_keepers(index) == []
        again = next(
            each
            for each in asked(client, kind=kind)["groups"]
            if {i["id"] for i in each["images"]} == {i["id"] for i in group["images"]}
        )
        assert (again["keep"], again["reason"]) == (group["keep"], group["reason"])


def test_many_clients_at_once_lose_no_decision(index):
    with TestClient(create_app([Searcher(index)])) as client:
        answer = asked(client)
        nearly = [group for group in answer["groups"] if group["kind"] == "nearly"]
        calls = [("/duplicates/decisions", {"group": group["number"]}) for group in nearly]
        calls += [
            ("/duplicates/keepers", {"group": group["number"], "image": group["images"][1]["id"]})
            for group in answer["groups"] if group["kind"] == "bytes"
        ]  # fmt: skip
        statuses = []

        def send(path: str, body: dict) -> None:
            statuses.append(client.post(path, json={"report": answer["report"], **body}).status_code)

        threads = [threading.Thread(target=send, args=call) for call in calls * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # The second of each choice is told of the first.
    assert sorted(set(statuses)) == [200, 409]
    assert len(read_keepers(index)) == answer["counts"]["bytes"]
    assert {each.hashes for each in read_decisions(index)} == {
        tuple(sorted((first["hash"], second["hash"])))
        for group in nearly for first in group["images"] for second in group["images"] if first is not second
    }  # fmt: skip


def test_who_may_not_decide_changes_nothing(index):
    before = {path: path.read_bytes() for path in index.rglob("*") if path.is_file()}
    with TestClient(create_app([Searcher(index)], read_only=True)) as client:
        answer = asked(client)
        assert not answer["decides"]
        for path, body in bodies(answer):
            refused = client.post(path, json=body)
            assert (refused.status_code, "--read-only" in refused.json()["detail"]) == (403, True)
    # Read-only means that nothing at all is written, not even what was compared.
    assert {path: path.read_bytes() for path in index.rglob("*") if path.is_file()} == before
    with TestClient(create_app([Searcher(index)], token="secret")) as client:
        for path in ("/duplicates", "/duplicates/paths", "/duplicates/decisions"):
            assert client.get(path).status_code == 401
        for path, body in bodies(answer):
            assert client.post(path, json=body).status_code == 401
    with TestClient(create_app([Searcher(index)])) as client:
        for headers in ({"Origin": "http://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}):
            for path, body in bodies(asked(client)):
                assert client.post(path, json=body, headers=headers).status_code == 403
    assert not (index / "not_duplicates.json").exists()


def bodies(answer: dict) -> list[tuple[str, dict]]:
    """A request of each route that writes."""
    group = {"report": answer["report"], "group": answer["groups"][-1]["number"]}
    return [
        ("/duplicates/decisions", group),
        ("/duplicates/keepers", {**group, "image": answer["groups"][-1]["images"][0]["id"]}),
        ("/duplicates/forgotten", {"pairs": [["a", "b"]]}),
    ]


def test_a_changed_index_is_grouped_again(index, built, tiny_runs, tmp_path):
    shutil.copytree(built / "images", tmp_path / "images")
    manifest = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(manifest | {"folder": str((tmp_path / "images").resolve())}))
    with TestClient(create_app([Searcher(index)])) as client:
        before = asked(client, kind="bytes")
        Image.new("RGB", (90, 70), "red").save(tmp_path / "images" / "red.png")
        shutil.copy(tmp_path / "images" / "red.png", tmp_path / "images" / "red again.png")
        build_index(tiny_runs["self"], tmp_path / "images", index)
        deadline = time.monotonic() + 30
        while client.get("/duplicates", params={"report": before["report"]}).status_code != 410:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert asked(client, kind="bytes")["total"] == before["total"] + 1
        # What was seen before can still be decided, for decisions are on contents.
        group = {"report": before["report"], "group": before["groups"][0]["number"]}
        chosen = {**group, "image": before["groups"][0]["images"][1]["id"]}
        assert client.post("/duplicates/keepers", json=chosen).status_code == 200


def test_an_index_whose_images_are_gone_has_no_groups_and_names_them(index, tmp_path):
    manifest = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(manifest | {"folder": str(tmp_path / "gone")}))
    shutil.rmtree(index / "duplicates", ignore_errors=True)
    with TestClient(create_app([Searcher(index)])) as client:
        answer = asked(client)
    assert (answer["groups"], answer["total"], answer["not_kept"]) == ([], 0, 0)
    assert answer["not_verified_images"] == len(answer["not_verified"]) == 9


def test_what_fails_is_told_once_and_begun_again(index, monkeypatch):
    from clipvisionalign.search.server import duplicate_job

    def fail(*args, **options):
        raise ValueError("this index cannot be grouped")

    with TestClient(create_app([Searcher(index)])) as client:
        with monkeypatch.context() as patched:
            patched.setattr(duplicate_job, "duplicate_report", fail)
            for _ in range(200):
                response = client.get("/duplicates")
                if response.status_code != 202:
                    break
                time.sleep(0.02)
            assert (response.status_code, response.json()["detail"]) == (422, "this index cannot be grouped")
        assert asked(client)["total"] > 0


def test_progress_is_told_step_by_step_and_the_service_ends_what_runs(index, monkeypatch):
    from clipvisionalign.search.server import duplicate_job

    go_on = threading.Event()

    def slow(*args, **options):
        for number in progress(range(10**6), "comparing pairs of images", 10**6, visible=False):
            if number == 5:
                go_on.wait(20)
        raise AssertionError("not stopped")

    monkeypatch.setattr(duplicate_job, "duplicate_report", slow)
    with TestClient(create_app([Searcher(index)])) as client:
        for _ in range(500):
            answer = client.get("/duplicates").json()
            if answer["done"] == 5:
                break
            time.sleep(0.01)
        assert (answer["step"], answer["done"], answer["of"]) == ("comparing pairs of images", 5, 10**6)
        assert client.get("/duplicates/paths").status_code == 202
    go_on.set()
    deadline = time.monotonic() + 10
    while any(thread.name == "duplicates" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_steps_are_told_to_a_listener_of_the_same_thread_alone():
    steps = []
    with progress_listener(lambda step: steps.append((step.description, step.done))):
        assert list(progress(range(3), "here", 3, visible=False)) == [0, 1, 2]
        other = threading.Thread(target=lambda: list(progress(range(3), "there", 3, visible=False)))
        other.start()
        other.join()
    list(progress(range(3), "afterwards", 3, visible=False))
    assert steps == [("here", 0), ("here", 1), ("here", 2), ("here", 3)]
