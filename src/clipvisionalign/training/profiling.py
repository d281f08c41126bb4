"""Time of the parts of a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clipvisionalign.batch import Batch


class Timings:
    """Sums of seconds by kind of work.

    Args:
        exact: Whether the accelerator is waited for at both ends, which takes some time itself.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact and torch.accelerator.is_available()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Time a block.

        Args:
            kind: What is done in it.

        Yields:
            Nothing.
        """
        start = self._now()
        try:
            yield
        finally:
            self.add(kind, self._now() - start)

    def add(self, kind: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere, such as in a worker process.

        Args:
            kind: What was done.
            seconds: How long it took.
        """
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def pop(self) -> dict[str, float]:
        """The sums since the last call, which start again at zero.

        Returns:
            Seconds by kind of work.
        """
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _now(self) -> float:
        if self.exact:
            torch.accelerator.synchronize()
        return time.perf_counter()


class TimedBatches(Iterator[Batch]):
    """Batches, with the time that the training waits for them, and that was spent on making them.

    Args:
        batches: The batches.
        timings: Receives the waiting time, as "waiting for data".
    """

    def __init__(self, batches: Iterator[Batch], timings: Timings) -> None:
        self.batches, self.timings = batches, timings
        #: Seconds of work in the loader, by kind; with workers it runs beside the training.
        self.loading_seconds: dict[str, float] = {}

    def __next__(self) -> Batch:
        with self.timings("waiting for data"):
            batch = next(self.batches)
        for kind, seconds in batch.seconds.items():
            self.loading_seconds[kind] = self.loading_seconds.get(kind, 0.0) + seconds
        return batch
