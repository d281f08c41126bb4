"""The service with shards on Ray Serve beside the plain one, under load; and a replica that is killed meanwhile.

    python benchmarks/cluster.py --images FOLDER [--run starter] [--shards 1,2,4] [--clients 64] [--seconds 60] [--json]

The folder is indexed once whole and once in each number of shards. A cluster of two node processes with one core each
is started on this machine. Then `serve` of the whole index and `serve --ray` of the shards are asked by the clients in
two turns each, one service at a time: median and 99th percentile of an answer, searches a second, and their ratio to
the plain service. Every answer is compared with the whole index's own: the same images in the same order (images of
equal cosine in any), without those of the shards that it names as missing. At last, with the most shards, one replica
is killed with SIGKILL in the middle: how many answers were incomplete, for how long, and whether any was wrong.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from service import query, served

from clipvisionalign.models.device import machine_info
from clipvisionalign.progress import progress_step
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.terms import parse_term

QUERIES, COUNT, ALL, TURNS = 100, 20, 1_000_000, 2
#: Two cosines below this are equal: batches of other sizes round differently.
SAME_COSINE = 2e-6


class Answers:
    """What the whole index answers, of which an answer without some shards follows.

    Args:
        index: The whole index.
        sharded: The same images in shards.
    """

    def __init__(self, index: Path, sharded: Path) -> None:
        rng = np.random.default_rng(0)
        self.queries = sorted({query(rng) for _ in range(QUERIES)})
        everything = Searcher(index)
        term = parse_term("a dog")
        self.shard_of = {
            hit.path: folder.name
            for folder in sorted(sharded.glob("shard-*"))
            for hit in Searcher(folder).search([term], ALL)
        }
        self.ranked = [
            [(hit.path, hit.score) for hit in everything.search([parse_term(words)], ALL)] for words in self.queries
        ]

    def is_right(self, number: int, body: dict[str, Any]) -> bool:
        """Whether an answer is that of the whole index without the shards that it says are missing."""
        missing = {each["shard"] for each in body.get("incomplete", [])}
        expected = [row for row in self.ranked[number] if self.shard_of[row[0]] not in missing][:COUNT]
        scores = dict(self.ranked[number])
        found = [hit["path"] for hit in body.get("found", [])]
        return (
            len(found) == len(expected) == len(set(found))
            and all(each in scores and self.shard_of[each] not in missing for each in found)
            and all(abs(scores[one] - score) < SAME_COSINE for one, (_, score) in zip(found, expected, strict=True))
        )


@dataclass
class Load:
    """What clients had: seconds of each answer; moments of those that were incomplete; what was wrong."""

    seconds: list[float] = field(default_factory=list)
    incomplete: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def figures(self, elapsed: float) -> dict[str, Any]:
        """Percentiles in milliseconds, the rate, and counts."""
        p50, p99 = np.percentile(1000 * np.array(self.seconds or [np.nan]), [50, 99])
        return {
            "p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1),
            "searches_per_second": round(len(self.seconds) / elapsed, 1), "searches": len(self.seconds),
            "incomplete": len(self.incomplete), "wrong": len(self.wrong), "errors": len(self.errors),
            "first_errors": (self.wrong + self.errors)[:3],
        }  # fmt: skip


def client(port: int, until: float, seed: int, answers: Answers, load: Load) -> None:
    """Ask until a moment, one search after the other."""
    rng = np.random.default_rng(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while time.perf_counter() < until:
        number, start = int(rng.integers(len(answers.queries))), time.perf_counter()
        try:
            connection.request("GET", f"/search?count={COUNT}&q={urllib.parse.quote(answers.queries[number])}")
            response = connection.getresponse()
            body = json.loads(response.read())
            if response.status != 200:
                load.errors.append(f"{response.status} {str(body)[:80]}")
                continue
        except (OSError, http.client.HTTPException, ValueError) as error:
            load.errors.append(repr(error))
            connection.close()
            continue
        load.seconds.append(time.perf_counter() - start)
        (load.incomplete if "incomplete" in body else load.whole).append(time.perf_counter())
        if not answers.is_right(number, body):
            load.wrong.append(f"{answers.queries[number]}: {str(body)[:80]}")


def under_load(
    port: int, answers: Answers, clients: int, seconds: float, during: Callable[[], None] | None = None
) -> tuple[Load, float]:
    """What all clients had, and the seconds that it took; `during` is called after a third of them."""
    client(port, time.perf_counter() + 3, 10_000, answers, Load())
    load, start = Load(), time.perf_counter()
    arguments = [(port, start + seconds, seed, answers, load) for seed in range(clients)]
    threads = [threading.Thread(target=client, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    if during is not None:
        time.sleep(seconds / 3)
        during()
    for thread in threads:
        thread.join()
    return load, time.perf_counter() - start


def replicas(address: str) -> list[int]:
    """The processes that search shards on a cluster of this benchmark's own."""
    import ray
    from ray import serve

    ray.init(address, log_to_driver=False)
    try:
        names = [name.encode() for name in serve.status().applications]
    finally:
        ray.shutdown()
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines[int(path.parent.name)] = path.read_bytes()
    return sorted(
        number
        for number, line in lines.items()
        if line.startswith(b"ray::ServeReplica") and any(name in line for name in names)
    )


def killed(port: int, mine: list[int], answers: Answers, clients: int, seconds: float) -> dict[str, Any]:
    """Figures of a load in which one replica is killed. mine: those of this service."""
    moments: list[float] = []

    def kill() -> None:
        moments.append(time.perf_counter())
        os.kill(mine[0], signal.SIGKILL)

    load, elapsed = under_load(port, answers, clients, seconds, kill)
    last = max(load.incomplete, default=moments[0])
    return load.figures(elapsed) | {
        "incomplete_before": sum(at < moments[0] for at in load.incomplete),
        "seconds_to_the_last_incomplete": round(last - moments[0], 1),
        "whole_after": sum(at > last for at in load.whole),
    }


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    numbers = [int(number) for number in given.shards.split(",")]
    build_index(given.run, given.images, folder / "whole")
    for number in numbers:
        build_index(given.run, given.images, folder / f"shards-{number}", shards=number)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    services = {"plain": (folder / "whole", ())} | {
        f"{number} shards on Ray": (folder / f"shards-{number}", ("--ray", cluster.address)) for number in numbers
    }
    answers = Answers(folder / "whole", folder / f"shards-{max(numbers)}")
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in services}
    try:
        for _ in range(TURNS):
            for name, (index, flags) in services.items():
                with progress_step(f"{given.clients} clients, {name}"), served(index, *flags) as (port, _):
                    load, elapsed = under_load(port, answers, given.clients, given.seconds / TURNS)
                turns[name].append(load.figures(elapsed))
        name = f"{max(numbers)} shards on Ray"
        with progress_step(f"{name}, one killed"), served(services[name][0], *services[name][1]) as (port, _):
            fault = killed(port, replicas(cluster.address), answers, given.clients, max(60.0, given.seconds))
    finally:
        cluster.shutdown()
    images = len(answers.shard_of)
    return {
        "machine": machine_info(), "images": images, "clients": given.clients, "services": turns, "killed": fault,
        "ratios": {
            name: round(float(np.median([
                one["searches_per_second"] / plain["searches_per_second"]
                for one, plain in zip(each, turns["plain"], strict=True)
            ])), 2)
            for name, each in turns.items()
        },
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder of images")
    parser.add_argument("--run", default="starter", help="run or model (default: starter)")
    parser.add_argument("--shards", default="1,2,4", help="numbers of shards, with commas (default: 1,2,4)")
    parser.add_argument("--clients", type=int, default=64, help="clients at once (default: 64)")
    parser.add_argument("--seconds", type=float, default=60, help="of load for each service (default: 60)")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    given = parser.parse_args()
    # What Ray prints, too: standard output has the figures alone.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        results = measure(given, Path(folder))
    if given.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{results['images']} images, {given.clients} clients")
    print(f"{'':20}{'p50 ms':>16}{'p99 ms':>16}{'a second':>16}{'to plain':>10}{'wrong':>7}{'errors':>8}")
    for name, turns in results["services"].items():
        columns = [
            " / ".join(f"{turn[key]:.0f}" for turn in turns) for key in ("p50_ms", "p99_ms", "searches_per_second")
        ]
        counts = [sum(turn[key] for turn in turns) for key in ("wrong", "errors")]
        print(f"{name:20}" + "".join(f"{column:>16}" for column in columns)
              + f"{results['ratios'][name]:10.2f}{counts[0]:7}{counts[1]:8}")  # fmt: skip
    fault = results["killed"]
    print(
        f"one replica killed: {fault['incomplete']} of {fault['searches']} answers incomplete and marked, "
        f"{fault['incomplete_before']} of them before; the last one {fault['seconds_to_the_last_incomplete']} s after; "
        f"{fault['whole_after']} whole ones since; {fault['wrong']} wrong, {fault['errors']} errors"
    )


if __name__ == "__main__":
    main()
