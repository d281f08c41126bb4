"""The service under load: many clients at once, against one query after the other.

    python benchmarks/service.py INDEX [--clients 64] [--seconds 120] [--json]

Starts `clipvisionalign serve INDEX` in a process of its own and asks it for words. Beside it the rate of the same
searches one by one in this process, and of their encoding alone. Memory of the service is read before and after.
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [
    "a",
    "dog",
    "man",
    "woman",
    "child",
    "red",
    "blue",
    "ball",
    "water",
    "grass",
    "runs",
    "jumps",
    "sits",
    "holds",
    "bike",
    "snow",
    "beach",
    "two",
    "people",
    "street",
]


def query(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, size=8))


def resident_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def client(port: int, until: float, seed: int, taken: list[float], failed: list[str]) -> None:
    rng = np.random.default_rng(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while time.perf_counter() < until:
        start = time.perf_counter()
        try:
            connection.request("GET", f"/search?count=20&q={urllib.parse.quote(query(rng))}")
            response = connection.getresponse()
            body = response.read()
            if response.status != 200 or not json.loads(body)["found"]:
                failed.append(f"{response.status} {body[:80]!r}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            failed.append(repr(error))
            connection.close()
        taken.append(time.perf_counter() - start)


@contextmanager
def served(index: str | Path, *flags: str) -> Iterator[tuple[int, int]]:
    """The service of an index in a process of its own: its port, and the number of the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "clipvisionalign", "serve", str(index), "--port", str(port), *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 300
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                connection.getresponse().read()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > limit:
                    raise RuntimeError(f"{' '.join(command)}: it does not answer") from None
                time.sleep(0.2)
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def one_by_one(index: str, seconds: float) -> tuple[float, float]:
    """Searches a second of one after the other, and queries encoded so, without a search."""
    from clipvisionalign.search.searcher import Searcher
    from clipvisionalign.search.terms import parse_term

    searcher, rng = Searcher(index), np.random.default_rng(0)
    rates = []
    for work in (lambda terms: searcher.search(terms, 20), searcher.encode):
        for _ in range(20):
            work([parse_term(query(rng))])
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            work([parse_term(query(rng))])
            done += 1
        rates.append(done / (time.perf_counter() - start))
    return rates[0], rates[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("index", help="an index")
    parser.add_argument("--clients", type=int, default=64, help="clients at once (default 64)")
    parser.add_argument("--seconds", type=float, default=120, help="of load (default 120)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    rate, encoding = one_by_one(given.index, min(10, given.seconds))
    with served(given.index) as (port, pid):
        taken: list[float] = []
        failed: list[str] = []
        client(port, time.perf_counter() + 5, 0, [], failed)
        before = resident_mib(pid)
        start = time.perf_counter()
        until = start + given.seconds
        arguments = [(port, until, seed, taken, failed) for seed in range(given.clients)]
        threads = [threading.Thread(target=client, args=each) for each in arguments]
        for thread in threads:
            thread.start()
        memory = []
        while time.perf_counter() < until:
            time.sleep(min(5.0, max(0.1, given.seconds / 10)))
            memory.append(round(resident_mib(pid), 1))
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
    p50, p95, p99 = np.percentile(1000 * np.array(taken), [50, 95, 99])
    results: dict[str, Any] = {
        "clients": given.clients, "seconds": round(seconds), "requests": len(taken), "errors": len(failed),
        "first errors": failed[:3], "p50_ms": round(p50, 1), "p95_ms": round(p95, 1), "p99_ms": round(p99, 1),
        "searches_per_second": round(len(taken) / seconds, 1), "one_by_one_per_second": round(rate, 1),
        "ratio": round(len(taken) / seconds / rate, 2), "encoded_one_by_one_per_second": round(encoding, 1),
        "ratio_to_encoding": round(len(taken) / seconds / encoding, 2), "memory_before_mib": round(before, 1),
        "memory_mib": memory,
    }  # fmt: skip
    print(
        json.dumps(results, indent=2) if given.json else "\n".join(f"{key}: {value}" for key, value in results.items())
    )


if __name__ == "__main__":
    from clipvisionalign.progress import progress_step

    with progress_step("benchmarks/service.py", in_terminal=False):
        main()
