"""Re-ranking within a time: the unsure first hits of a query are scored, some at a time, until the time is spent.

What a pair costs depends on the machine, on what else it does, and on whether the index keeps the patches of images: it
is not estimated beforehand, but measured on the pairs that were just scored. However far it comes, the first hits that
were scored stand in the order of their pair scores, the others behind them in the order of their cosines.
"""

from __future__ import annotations

import math
import re
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from clipvisionalign.search.hits import Hit

#: Hits that are scored at first, and at a time at most.
_FIRST_HITS, _MOST_HITS = 2, 16
#: Queries by whose median is judged whether there is time to begin.
_REMEMBERED = 9
#: Factor of what is expected for each query that was left as it is.
_DECAY = 0.9
_UNITS = {"ms": 0.001, "s": 1.0}
_FORM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(ms|s)")
#: The longest time that can be asked for, in seconds.
MAX_SECONDS = 30.0


def parse_seconds(text: str) -> float:
    """A time such as "50ms" or "0.2s".

    Args:
        text: The time with its unit, ms or s.

    Returns:
        Seconds.

    Raises:
        ValueError: It has another form, is zero, or longer than `MAX_SECONDS`.

    >>> parse_seconds("50ms"), parse_seconds("0.2 s")
    (0.05, 0.2)
    """
    match = _FORM.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"a time of {text!r}: give a number with its unit, such as 50ms or 0.2s")
    return check_seconds(round(float(match[1]) * _UNITS[match[2]], 9))


def check_seconds(seconds: float) -> float:
    """Check a time that a query may take.

    Args:
        seconds: The time.

    Returns:
        The same.

    Raises:
        ValueError: It is not above 0, or longer than `MAX_SECONDS`.
    """
    if not 0.0 < seconds <= MAX_SECONDS:
        raise ValueError(f"a time of {seconds:g} s for a query: give more than 0, and {MAX_SECONDS:g} s at most")
    return seconds


class TimeSpent(NamedTuple):
    """What was done within the time of a query.

    Attributes:
        seconds: From the beginning of the query until its hits were ready, without the loading of the model.
        limit: The time that was given.
        unsure: Number of first hits whose order the cosines left unsure.
        reranked: Number of them that there was time for.
    """

    seconds: float
    limit: float
    unsure: int
    reranked: int

    def to_dict(self) -> dict[str, Any]:
        """The time as JSON.

        Returns:
            "milliseconds", "limit_milliseconds", "unsure" and "reranked".
        """
        return {
            "milliseconds": round(1000 * self.seconds, 1), "limit_milliseconds": round(1000 * self.limit, 1),
            "unsure": self.unsure, "reranked": self.reranked,
        }  # fmt: skip

    def describe(self) -> str:
        """The time in words, such as "re-ranked 12 of 20 hits of unsure order, 48 of 50 ms"."""
        times = f"{1000 * self.seconds:.0f} of {1000 * self.limit:g} ms"
        if not self.unsure:
            return f"re-ranked none: the order of the hits is sure enough, {times}"
        done = f"re-ranked {self.reranked} of {self.unsure} hits of unsure order, {times}"
        return done if self.reranked else f"{done}: the time was over before, and the order is by cosine alone"


#: Scores hits: the same ones, those that could be scored with a pair score.
ScoreHits = Callable[[Sequence[Hit]], Sequence[Hit]]


class TimedReranker:
    """Re-ranks first hits as far as a time lasts; remembers how long the beginning takes, to know when not to begin."""

    def __init__(self) -> None:
        self._beginnings: deque[float] = deque(maxlen=_REMEMBERED)
        self._rates: deque[float] = deque(maxlen=_REMEMBERED)
        self._skipped, self._is_cold = 0, True
        self._lock = threading.Lock()

    def expected_seconds(self) -> float:
        """How long it takes until the first hits are scored, by the median of the last queries; 0 if unknown.

        It is taken for less with each query that had not so much, so that it is measured again: a machine that was busy
        may not be so any more.
        """
        with self._lock:
            if not self._beginnings:
                return 0.0
            known = statistics.median(self._beginnings) + _FIRST_HITS * statistics.median(self._rates)
            return known * _DECAY**self._skipped

    def rerank(
        self, hits: Sequence[Hit], unsure: int, deadline: float, begin: Callable[[], ScoreHits],
        uncounted: Callable[[], float] = lambda: 0.0,
    ) -> tuple[list[Hit], int]:  # fmt: skip
        """Order the first hits by pair scores, as far as the time lasts.

        Args:
            hits: N hits, best first.
            unsure: Number of first hits that are worth it.
            deadline: Of `time.perf_counter`.
            begin: Encodes the query and reads what is stored of the first `unsure` hits; gives what scores some.
            uncounted: Seconds since the start that `begin` took for what is done once, such as loading a model.

        Returns:
            The N hits, and how many of them were re-ranked.

        Raises:
            ValueError: An image cannot be opened.
        """
        start = time.perf_counter()
        if unsure < _FIRST_HITS:
            return list(hits), 0
        if start + self.expected_seconds() > deadline:
            with self._lock:
                # Where no time is left at all, nothing is learnt by trying.
                self._skipped += start < deadline
            return list(hits), 0
        score = begin()
        now = time.perf_counter()
        once = uncounted()
        deadline += once
        beginning, first_rate = now - start - once, 0.0
        scored: list[Hit] = []
        size = min(_FIRST_HITS, unsure)
        while size > 0:
            before, first = now, len(scored)
            scored += score(hits[first : first + size])
            now = time.perf_counter()
            # Of many at a time one costs less than of few: this errs to the safe side until they are many.
            rate = (now - before) / size
            first_rate = first_rate or rate
            left = (deadline - now) / rate if rate else math.inf
            size = int(min(unsure - len(scored), _MOST_HITS, max(0.0, left)))
        with self._lock:
            # The first time in a process, files are opened and kernels chosen.
            if not self._is_cold:
                self._beginnings.append(beginning)
                self._rates.append(first_rate)
            self._skipped, self._is_cold = 0, False
        # Images that are gone have no pair score, and come last.
        ordered = sorted(scored, key=lambda hit: -math.inf if hit.pair_score is None else hit.pair_score, reverse=True)
        return [*ordered, *hits[len(scored) :]], len(scored)
