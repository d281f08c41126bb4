"""Concurrent queries, encoded in one batch."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from clipvisionalign.search.queries import SearchQuery

#: Texts that are encoded together at most, and how long the first of them waits for others.
MAX_BATCH_TEXTS, BATCH_WAIT_SECONDS = 64, 0.004


class Batcher:
    """Collects the queries of concurrent requests, and searches for them together.

    Args:
        search_batch: `Searcher.search_batch`.

    Attributes:
        texts: Number of terms that were encoded.
        calls: Number of calls of `search_batch`.
    """

    def __init__(self, search_batch: Callable[[Sequence[SearchQuery]], Sequence[Any]]) -> None:
        self.search_batch = search_batch
        self.pending: queue.SimpleQueue[tuple[SearchQuery, Future[Any]] | None] = queue.SimpleQueue()
        self.texts, self.calls = 0, 0
        self.thread = threading.Thread(target=self._run, daemon=True, name="batcher")
        self.thread.start()

    def __call__(self, query: SearchQuery) -> Future[Any]:
        """Queue a query.

        Args:
            query: The query.

        Returns:
            A future of its hits, which raises its error.
        """
        future: Future[Any] = Future()
        self.pending.put((query, future))
        return future

    def close(self) -> None:
        """End the thread, after what is waiting."""
        self.pending.put(None)
        self.thread.join(timeout=30)

    def _run(self) -> None:
        running = True
        while running:
            item = self.pending.get()
            if item is None:
                return
            batch = [item]
            deadline = time.perf_counter() + BATCH_WAIT_SECONDS
            while sum(len(query.terms) for query, _ in batch) < MAX_BATCH_TEXTS:
                try:
                    following = self.pending.get(timeout=max(0.0, deadline - time.perf_counter()))
                except queue.Empty:
                    break
                if following is None:
                    running = False
                    break
                batch.append(following)
            self._process(batch)

    def _process(self, batch: list[tuple[SearchQuery, Future[Any]]]) -> None:
        self.texts, self.calls = self.texts + sum(len(query.terms) for query, _ in batch), self.calls + 1
        try:
            results = list(self.search_batch([query for query, _ in batch]))
        except Exception as error:
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
