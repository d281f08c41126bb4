"""Shards on Ray Serve give the answers of a single index; a replica that is killed makes no answer wrong, and comes back."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_sharded_index
from forked import Forked, command, free_port, wait_until
from test_sharded_index import FILTERS, WORDS, assert_same_answers, run

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")
pytest.importorskip("ray.serve", reason="no ray: pip install 'clipvisionalign[ray]'")
from fastapi.testclient import TestClient

if not Path("/proc").is_dir():
    pytest.skip("no /proc", allow_module_level=True)

from clipvisionalign.cli import main
from clipvisionalign.search import shard_deployments, shard_replicas
from clipvisionalign.search.index_reader import VectorQuery
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.server.app import create_app
from clipvisionalign.search.shard_deployments import ShardDeployments, serve_shards
from clipvisionalign.search.shard_replicas import ShardSearch
from clipvisionalign.search.sharded_reader import ShardedReader
from clipvisionalign.search.storage import InvalidIndexError
from clipvisionalign.search.terms import Term
from clipvisionalign.search.unreachable import ShardUnavailable

pair = test_sharded_index.pair
assert run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray serve")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two nodes."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def deployed(pair, cluster) -> Iterator[tuple[Searcher, ShardedReader]]:
    """The index in shards, searched on the cluster, and the reader that asks it."""
    index = pair[1].index
    with serve_shards([index], cluster) as (reader,):
        yield Searcher(index, reader=reader), reader


def command_line(path: Path) -> bytes:
    """Of a process; nothing of one that has ended meanwhile."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def replicas(name: str = "clipvisionalign-") -> list[int]:
    """The processes that search shards whose deployments have a name."""
    processes = {path.parent.name: command_line(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
    return sorted(
        int(number)
        for number, line in processes.items()
        if line.startswith(b"ray::ServeReplica") and name.encode() in line
    )


def queries() -> list[SearchQuery]:
    terms = [[Term(words)] for words in WORDS[:2]] + [[Term(WORDS[0]), Term(WORDS[1], -0.5)]]
    plain = [SearchQuery(each, count, where) for each in terms for count in (1, 7, 40) for where in FILTERS]
    return [*plain, SearchQuery(terms[0], 5, captions=True), SearchQuery(terms[0], 5, rerank=4)]


def test_the_answers_are_those_of_a_single_index(pair, deployed):
    searcher, reader = deployed
    assert [state["up"] for state in reader.states()] == [True] * 3
    assert_same_answers(pair[0], searcher, queries())


def test_a_killed_replica_makes_no_answer_wrong_and_comes_back(pair, deployed):
    searcher, reader = deployed
    query = SearchQuery([Term(WORDS[0])], 40)
    whole = [hit.to_dict() for hit in pair[0].search_one(query)]
    names = list(reader.names)

    def without(missing: tuple[str, ...]) -> list[dict[str, Any]]:
        local = ShardedReader(pair[1].index)

        def ask(number: int, asked: Any, columns: Any) -> Any:
            class Gone:
                def result(self) -> Any:
                    raise ShardUnavailable

            return Gone() if names[number] in missing else local._ask_here(number, asked, columns)

        return [
            hit.to_dict() for hit in Searcher(pair[1].index, reader=ShardedReader(pair[1].index, ask)).search_one(query)
        ]

    assert without(()) == whole
    expected = {missing: without(missing) for size in range(3) for missing in itertools.combinations(names, size)}
    assert len(expected[(names[1],)]) < len(whole)
    results: list[tuple[float, tuple[str, ...], bool]] = []
    ended = threading.Event()

    def ask_on() -> None:
        while not ended.is_set():
            try:
                result: Any = searcher.search_one(query)
                missing = tuple(shard.shard for shard in result.missing)
                results.append((time.monotonic(), missing, [hit.to_dict() for hit in result] == expected.get(missing)))
            except ShardUnavailable:
                results.append((time.monotonic(), tuple(names), True))
            time.sleep(0.02)

    clients = [threading.Thread(target=ask_on) for _ in range(8)]
    for client in clients:
        client.start()
    try:
        time.sleep(2)
        deployment = reader.ask.__self__.names[1]  # type: ignore[attr-defined]
        (process,) = replicas(deployment)
        killed = time.monotonic()
        os.kill(process, signal.SIGKILL)
        # Another process, and answers that are whole again. Requests that wait until it is there miss nothing.
        wait_until(lambda: replicas(deployment) not in ([], [process]), timeout=240, pause=0.2)
        wait_until(lambda: reader.states()[1]["up"] and not results[-1][1], timeout=240, pause=0.2)
        time.sleep(2)
    finally:
        ended.set()
        for client in clients:
            client.join()
    assert all(right for _, _, right in results), "an answer is neither whole nor that of the shards that it names"
    assert all(at >= killed for at, missing, _ in results if missing)
    assert not results[-1][1]
    assert [state["up"] for state in reader.states()] == [True] * 3


def test_a_shard_that_its_replica_cannot_read_is_named_until_it_can(pair, deployed):
    searcher, reader = deployed
    assert_same_answers(pair[0], searcher, queries()[:2])
    query = SearchQuery([Term(WORDS[0])], 40)
    folder = Path(str(searcher.index)) / reader.names[1]
    away = folder.with_name("away")
    folder.rename(away)
    try:

        def missing() -> tuple[str, ...]:
            result: Any = searcher.search_one(query)
            return tuple(each.shard for each in result.missing)

        wait_until(lambda: missing() == (reader.names[1],), timeout=60, pause=0.2)
        assert [state["up"] for state in reader.states()] == [True, False, True]
        # All of them: the service is at fault, and not who asks it.
        for number in (0, 2):
            (folder.parent / reader.names[number]).rename(folder.with_name(f"away {number}"))
        with TestClient(create_app([searcher]), base_url="http://localhost") as client:
            for more in ({}, {"where": "width > 17"}):
                wait_until(
                    lambda more=more: client.get("/search", params={"q": "a dog", **more}).status_code != 200,
                    timeout=60,
                )
                response = client.get("/search", params={"q": "a dog", **more})
                assert (response.status_code, response.json()["detail"]) == (503, GONE)
    finally:
        away.rename(folder)
        for number in (0, 2):
            if folder.with_name(f"away {number}").exists():
                folder.with_name(f"away {number}").rename(folder.parent / reader.names[number])
    wait_until(lambda: not missing(), timeout=60, pause=0.2)
    assert [state["up"] for state in reader.states()] == [True] * 3
    assert_same_answers(pair[0], searcher, queries()[:2])


if os.environ.get("FAULTS") == "all":

    def test_a_shard_that_cannot_be_opened_is_an_error_of_the_start(deployed, pair, tmp_path):
        deployments = ShardDeployments(pair[1].index)
        deployments.index = str(tmp_path / "nowhere")
        try:
            with pytest.raises(RuntimeError, match=r"a shard does not start: .*nowhere/shard-0\d: no index there"):
                deployments.start(0.3)
        finally:
            deployments.end()


GONE = "the index cannot be read now; see the log of the service"


class Replies:
    """What replicas answer: rows, or the error of one that is gone or slow."""

    def __init__(self, *replies: Any) -> None:
        self.replies, self.cancelled = list(replies), 0

    def remote(self, *request: Any) -> Any:
        return self

    def result(self, timeout_s: float) -> Any:
        reply = self.replies.pop(0)
        if isinstance(reply, TimeoutError):
            time.sleep(timeout_s)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def cancel(self) -> None:
        self.cancelled += 1


class Replica:
    """One that answers after some seconds, or never."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.cancelled = list(seconds), 0

    def remote(self, *request: Any) -> Any:
        response, ready = Replica(), time.monotonic() + self.seconds.pop(0)

        def result(timeout_s: float) -> Any:
            time.sleep(min(timeout_s, max(0.0, ready - time.monotonic())))
            if time.monotonic() < ready:
                raise TimeoutError
            return [str(ready)]

        def cancel() -> None:
            self.cancelled += 1

        response.result, response.cancel = result, cancel  # type: ignore[attr-defined]
        return response


@pytest.mark.parametrize(
    ("replicas", "seconds", "expected", "asked"),
    [
        (1, [0.7], 0.7, 1),
        (1, [9.0], None, 1),
        # As slow as one alone: it is not given up for the other one.
        (2, [0.7, 9.0], 0.7, 2),
        (2, [9.0, 0.1], 0.6, 2),
        (2, [0.2], 0.2, 1),
        (2, [9.0, 9.0], None, 2),
    ],
)
def test_of_two_replicas_the_one_that_answers_first_is_taken(pair, monkeypatch, replicas, seconds, expected, asked):
    monkeypatch.setattr(shard_replicas, "RESPONSE_SECONDS", 1.0)
    monkeypatch.setattr(shard_replicas, "LAST_SECONDS", 0.01)
    made = ShardDeployments(pair[1].index, replicas)
    replica = Replica(*seconds)
    made._handles, made._running = [replica] * 3, [replicas] * 3
    start = time.monotonic()
    try:
        made.ask(0, [], []).result()
        took = time.monotonic() - start
        assert expected is not None
        assert took == pytest.approx(expected, abs=0.15)
    except ShardUnavailable:
        assert expected is None
        assert time.monotonic() - start == pytest.approx(1.0, abs=0.15)
    assert len(seconds) - len(replica.seconds) == asked
    assert replica.cancelled == asked - (expected is not None)


def test_another_replica_is_asked_and_a_slow_one_is_not_taken_for_dead(pair, monkeypatch):
    from ray.exceptions import ActorDiedError

    monkeypatch.setattr(shard_replicas, "RESPONSE_SECONDS", 0.3)
    monkeypatch.setattr(shard_replicas, "LAST_SECONDS", 0.01)

    def deployments(count: int, *replies: Any) -> Any:
        made = ShardDeployments(pair[1].index, count)
        made._handles, made._running = [Replies(*replies)] * 3, [count] * 3
        return made

    def results(made: Any) -> Any:
        asked = [made.ask(0, [], []) for _ in range(3)]
        for each in asked:
            try:
                yield each.result()
            except ShardUnavailable:
                yield None

    # Three requests of a replica that dies: each is answered by the other one.
    dead = ActorDiedError()
    made = deployments(2, dead, ["a"], dead, ["b"], dead, ["c"])
    assert list(results(made)) == [["a"], ["b"], ["c"]]
    assert made.is_up(0)
    # Of one alone none is, and no later request waits for it.
    made = deployments(1, dead, dead, dead)
    assert list(results(made)) == [None] * 3
    assert not made.is_up(0)
    assert not list(made._handles[0].replies)
    assert next(results(made)) is None
    # What comes too late is given up, and the next request has its own chance.
    made = deployments(1, TimeoutError(), ["a"], *[TimeoutError()] * 30)
    assert list(results(made)) == [None, ["a"], None]
    assert made._handles[0].cancelled == 2
    assert made.is_up(0)


def test_a_replica_of_another_model_is_refused_and_a_relative_path_is_none(pair, monkeypatch):
    index = Path(str(pair[1].index))
    monkeypatch.chdir(index.parent)
    made = ShardDeployments(index.name)
    assert made.index == str(index.resolve())
    assert ShardSearch(made.index, made.shards[0], made.aligner).search([], ["id"]) == []
    with pytest.raises(InvalidIndexError, match="another model"):
        ShardSearch(made.index, made.shards[0], "0" * 16)


def test_replicas_without_a_cluster_are_refused(capsys):
    assert main(["serve", "index", "--replicas", "2"]) == 1
    assert "give --ray too" in capsys.readouterr().err


@pytest.fixture
def silent(pair, monkeypatch) -> Iterator[ShardDeployments]:
    """Deployments of a cluster that gives no state any more, watched in a hundredth of the time."""
    monkeypatch.setattr(shard_deployments, "STATE_SECONDS", 0.01)
    monkeypatch.setattr(shard_deployments, "SILENT_SECONDS", 0.3)
    made = ShardDeployments(pair[1].index)
    made._handles, made._running = [Replies(*[["a"]] * 1000)] * 3, [1] * 3
    watch = threading.Thread(target=made._watch_cluster)
    watch.start()
    yield made
    made._ended.set()
    watch.join()


def test_of_a_cluster_that_is_silent_what_answers_is_up_and_all_else_is_down(silent, caplog):
    ended = time.monotonic() + 1.5
    while time.monotonic() < ended:
        assert silent.ask(0, [], []).result() == ["a"]
        time.sleep(0.05)
    assert [silent.is_heard(shard) for shard in range(3)] == [True, False, False]
    assert "the Ray cluster does not answer" in caplog.text
    # The cluster may be busy and no more: what is not heard of is asked all the same, and heard again.
    assert silent.ask(1, [], []).result() == ["a"]
    assert silent.is_heard(1)
    wait_until(lambda: not (silent.is_heard(0) or silent.is_heard(1)), timeout=30, pause=0.05)
    silent._running = [0] * 3
    reader = silent.reader()
    result, *_ = reader.search([VectorQuery(np.ones(reader.manifest.width, np.float32), 3)], ["id"])
    assert isinstance(result, ShardUnavailable)
    with TestClient(create_app([Searcher(silent.index, reader=reader)]), base_url="http://localhost") as client:
        response = client.get("/search", params={"q": "a dog", "where": "width > 17"})
        assert (response.status_code, response.json()["detail"]) == (503, GONE)
        (info,) = client.get("/health").json()["indexes"]
        assert [shard["up"] for shard in info["shards"]] == [False] * 3


def test_an_address_without_a_cluster_is_an_error_at_once(pair, tmp_path):
    start = time.monotonic()
    for address in (f"127.0.0.1:{free_port()}", "127.0.0.1:99999", f"ray://localhost:{free_port()}"):
        with pytest.raises(
            ConnectionError, match=rf"Ray cluster {address}: nothing accepts a connection .*ray start --head"
        ):
            serve_shards([pair[1].index], address).__enter__()
    assert time.monotonic() - start < 10


def test_the_command_serves_an_index_in_shards_and_takes_its_processes_away(pair, deployed, cluster, tmp_path):
    port = free_port()
    index = str(pair[1].index)
    before = replicas()
    assert len(before) == 3
    process = Forked(command, "serve", index, "--ray", cluster, "--port", str(port), out=tmp_path / "said")
    try:
        wait_until(lambda: "http://" in process.said, process, timeout=200)

        def get(path: str) -> Any:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as response:
                return json.load(response)

        responses: list[Any] = []

        def is_ready() -> bool:
            try:
                responses.append(get("/search?q=a+red+circle&count=7"))
            except OSError:
                return False
            return True

        wait_until(is_ready, process)
        expected = [hit.to_dict() for hit in pair[0].search([Term("a red circle")], 7)]
        assert [hit["id"] for hit in responses[0]["found"]] == [hit["id"] for hit in expected]
        assert "incomplete" not in responses[0]
        (info,) = get("/health")["indexes"]
        assert [shard["up"] for shard in info["shards"]] == [True] * 3
    finally:
        process.signal(signal.SIGINT)
        status = process.wait(60)
        process.kill()
    assert status in (0, 130), process.said
    assert "starting 3 replicas of 3 shards on Ray" in process.said
    assert "Traceback" not in process.said, process.said
    # Ray needs a moment to end its processes.
    wait_until(lambda: len(replicas()) == 3, timeout=30, pause=0.5)
    assert replicas() == before, "those of the fixture alone are left"
