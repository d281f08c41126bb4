"""Queries that arrive together are answered together, by one call of the text encoder."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from clipvisionalign.search.query import Term

#: Texts that are encoded together at most, and how long the first of them waits for others.
TOGETHER, WAIT_SECONDS = 64, 0.004

#: A query's terms, and how many pictures it wants; 0 for its vector alone.
Asked = tuple[list[Term], int]


class Batcher:
    """Answers queries for many threads at once, those together that are waiting together."""

    def __init__(self, answer: Callable[[Sequence[Asked]], Sequence[Any]]) -> None:
        self.answer = answer
        self.waiting: queue.SimpleQueue[tuple[Asked, Future[Any]] | None] = queue.SimpleQueue()
        #: How many terms went through, in how many calls.
        self.texts, self.calls = 0, 0
        self.thread = threading.Thread(target=self._run, daemon=True, name="batcher")
        self.thread.start()

    def __call__(self, terms: list[Term], count: int) -> Future[Any]:
        """What `Searcher.answers` has for the query, later; what is wrong with it is raised."""
        found: Future[Any] = Future()
        self.waiting.put(((terms, count), found))
        return found

    def close(self) -> None:
        """End the thread, after what is waiting."""
        self.waiting.put(None)
        self.thread.join(timeout=30)

    def _run(self) -> None:
        open_ = True
        while open_:
            first = self.waiting.get()
            if first is None:
                return
            together = [first]
            until = time.perf_counter() + WAIT_SECONDS
            while sum(len(terms) for (terms, _), _ in together) < TOGETHER:
                try:
                    more = self.waiting.get(timeout=max(0.0, until - time.perf_counter()))
                except queue.Empty:
                    break
                if more is None:
                    open_ = False
                    break
                together.append(more)
            self._answer(together)

    def _answer(self, together: list[tuple[Asked, Future[Any]]]) -> None:
        self.texts, self.calls = self.texts + sum(len(terms) for (terms, _), _ in together), self.calls + 1
        try:
            answers = list(self.answer([query for query, _ in together]))
        except Exception as error:
            answers = [error] * len(together)
        for (_, found), answer in zip(together, answers, strict=True):
            if isinstance(answer, Exception):
                found.set_exception(answer)
            else:
                found.set_result(answer)
