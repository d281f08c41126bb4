"""A run that is killed, again and again and at any moment, ends as the undisturbed one: rows of the array of
`test_combinations.py`, in processes that get a real SIGKILL.

Every kill draws the phase that it waits for (starting, a step, a checkpoint that is written, an epoch or the saved model
that is measured, ...) and a moment within it. Of two processes both are killed, one a little after the other. What was
left is gone on with, or begun anew where it had no settings yet. KILLS says how many there are, five to a run at most.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from combined import Given, comparable_results, killable, some_rows
from forked import Forked, free_port
from safetensors.torch import load_file

KILLS, EACH = int(os.environ.get("KILLS", "2")), 5


def rows_to_kill() -> list[tuple[int, dict[str, Any], int]]:
    """Rows with their numbers and how often each is killed; a fifth of them runs in two processes."""
    count = -(-KILLS // EACH)
    return [(*row, min(EACH, KILLS - EACH * index)) for index, row in enumerate(some_rows(count, count // 5))]


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model) -> Given:
    return Given(tmp_path_factory.mktemp("killed"), tiny_model)


class Run:
    """The processes of a run, begun or gone on with, and the phases that it has come to."""

    def __init__(self, config: dict[str, Any], count: int) -> None:
        self.out = Path(config["out"])
        self.file = self.out.with_name(f"{self.out.name}-phases")
        self.before = len(self.phases())
        common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free_port())} if count > 1 else {}  # fmt: skip
        self.processes = [
            Forked(
                killable, config, str(self.file), out=self.out.with_name(f"{self.out.name}-said-{rank}"),
                environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {},
            )
            for rank in range(count)
        ]  # fmt: skip

    def phases(self) -> list[tuple[float, str]]:
        """When each phase began."""
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        return [(float(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in lines]

    def own(self) -> list[str]:
        """The phases since it was last started."""
        return [phase for _, phase in self.phases()[self.before :]]

    def running(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def kill(self, rng: random.Random) -> None:
        """All processes with all that they have started."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                try:
                    os.killpg(process.process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    # It had not come to have a group of its own.
                    process.signal(signal.SIGKILL)
            if len(self.processes) > 1:
                time.sleep(rng.uniform(0, 0.05))
        for process in self.processes:
            process.wait(60)

    def ended(self) -> None:
        limit = time.monotonic() + 240
        while self.running() and time.monotonic() < limit and not any(p.poll() for p in self.processes):
            time.sleep(0.02)
        for process in self.processes:
            if process.wait(5) != 0:
                self.kill(random.Random(0))
                raise AssertionError("\n".join(each.said[-3000:] for each in self.processes))


def lengths(phases: list[tuple[float, str]]) -> dict[str, float]:
    """How long each phase takes, on average."""
    took: dict[str, list[float]] = {}
    for (begun, phase), (ended, _) in pairwise(phases):
        took.setdefault(phase, []).append(ended - begun)
    return {phase: sum(each) / len(each) for phase, each in took.items()}


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines]


def assert_same_run(run: Path, undisturbed: Path) -> None:
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, undisturbed))
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    results, expected = (json.loads((folder / "results.json").read_text()) for folder in (run, undisturbed))
    assert comparable_results(results) == comparable_results(expected)
    assert records(run) == records(undisturbed)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in undisturbed.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "row", "kills"),
    rows_to_kill(),
    ids=lambda value: value["processes"] if isinstance(value, dict) else str(value),
)
def test_a_run_that_is_killed_again_and_again_ends_as_the_undisturbed_one(number, row, kills, given, tmp_path):
    count, rng, phases = 1 if row["processes"] == "one" else 2, random.Random(number), []
    (tmp_path / "whole").mkdir()
    run = Run(asdict(given.config(row, number, tmp_path / "whole" / "run")), count)
    run.ended()
    undisturbed, took = run.out, lengths(run.phases())
    for attempt in range(20):
        (tmp_path / f"killed-{attempt}").mkdir()
        config = asdict(given.config(row, number, tmp_path / f"killed-{attempt}" / "run"))
        while len(phases) < kills:
            run, phase = Run(config, count), rng.choice(sorted(took))
            which = rng.randint(1, 4 if phase in ("training", "saving a checkpoint") else 1)
            while run.own().count(phase) < which and run.running():
                time.sleep(0.002)
            time.sleep(rng.uniform(0, took[phase]))
            if not run.running():
                break
            there = any((run.out / "checkpoints").glob("step-*"))
            run.kill(rng)
            phases.append((run.own() or ["starting"])[-1] if there else "before the first checkpoint")
        Run(config, count).ended()
        assert_same_run(Path(config["out"]), undisturbed)
        if len(phases) == kills:
            break
    print(f"row {number}, {row['processes']}: killed {', '.join(phases)}")
    assert len(phases) == kills
