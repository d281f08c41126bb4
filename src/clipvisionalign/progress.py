"""What takes long tells how far it is: a live line on a terminal, else a plain line a minute on standard error.

Every loop that may take more than a few seconds goes through `progress`, and what cannot be counted through
`long_step`. Steps lie within each other ("measuring runs" within a study, "encoding images" within that): a terminal
shows a line for each, a log gets one line for all of them, so that in no minute nothing is said:

    measuring runs 3 of 12, about 8 min left > encoding images 1,280 of 6,000, 38 a second, about 2 min left
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds between two lines in a log; the environment variable of this name sets others.
VARIABLE = "CLIPVISIONALIGN_PROGRESS_SECONDS"
EVERY = 60.0
#: After this share of the time between two lines a step that will outlast it is told of for the first time.
FIRST = 0.1


class LongStep:
    """A step that is told of while it runs. total: how many there are to do, None where nobody knows."""

    def __init__(self, what: str, total: int | None, shown: bool, in_terminal: bool) -> None:
        self.what, self.total, self.shown, self.in_terminal = what, total, shown, in_terminal
        self.done, self.words = 0, ""
        self.first = 0
        self.start = time.monotonic()
        self.announced = False
        self.task: Any = None

    def update(self, done: int, words: str = "") -> None:
        """So many are done; words: what else is worth telling just now, such as a loss."""
        self.done, self.words = done, words
        _reporter.updated(self)

    def begin_at(self, done: int) -> None:
        """So many were done before this step began: they count as done, and not in the rate."""
        self.done = self.first = done

    def left(self) -> float | None:
        """Seconds until the end at the rate so far, None where it cannot be told."""
        fresh = self.done - self.first
        if self.total is None or fresh < 1:
            return None
        return (time.monotonic() - self.start) / fresh * max(0, self.total - self.done)

    def told(self) -> str:
        """Such as "encoding images 1,280 of 6,000, 38 a second, about 2 min left"."""
        taken = time.monotonic() - self.start
        if self.total is None:
            parts = [f"{self.what}, {_time(taken)} so far"]
        else:
            parts = [f"{self.what} {self.done:,} of {self.total:,}"]
            if self.done > self.first:
                parts.append(_rate((self.done - self.first) / max(taken, 1e-9)))
        if self.words:
            parts.append(self.words)
        if (left := self.left()) is not None:
            parts.append(f"about {_time(left)} left")
        return ", ".join(parts)


def _rate(rate: float) -> str:
    if rate >= 0.95:
        return f"{rate:,.0f} a second" if rate >= 9.5 else f"{rate:.1f} a second"
    return f"{_time(1 / rate)} each"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def seconds_between_lines() -> float:
    """60, or what the environment says. Raises ValueError where that is no number of seconds above 0."""
    told = os.environ.get(VARIABLE, "")
    try:
        seconds = float(told or EVERY)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{VARIABLE}={told}: should be a number of seconds above 0")
    return seconds


class _Reporter:
    """All steps that run in this process, and who tells of them: rich on a terminal, a thread in a log."""

    def __init__(self) -> None:
        self.is_silent = False
        self.reset()

    def reset(self) -> None:
        """As in a fresh process: nothing runs. A forked process has neither its parent's threads nor its terminal."""
        self.lock = threading.RLock()
        self.steps: list[LongStep] = []
        self.live: Any = None
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()

    def begin(self, step: LongStep) -> None:
        with self.lock:
            self.steps.append(step)
            if not step.shown or self.is_silent:
                return
            if _on_terminal():
                self._begin_live(step)
            elif self.thread is None or not self.thread.is_alive():
                self.ended = threading.Event()
                arguments = (self.ended, seconds_between_lines())
                self.thread = threading.Thread(target=self._tell, args=arguments, name="progress", daemon=True)
                self.thread.start()

    def end(self, step: LongStep) -> None:
        with self.lock:
            if step not in self.steps:
                return
            self.steps.remove(step)
            if self.live is not None and step.task is not None:
                self.live.remove_task(step.task)
                if not self.live.tasks:
                    self.live.stop()
                    self.live = None
            if not any(other.shown for other in self.steps) and self.thread is not None:
                self.ended.set()
                self.thread = None

    def updated(self, step: LongStep) -> None:
        if step.task is not None and self.live is not None:
            words = f" {step.words}" if step.words else ""
            self.live.update(step.task, completed=step.done, description=f"{step.what}{words}")

    def _begin_live(self, step: LongStep) -> None:
        if not step.in_terminal:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self.live is None:
            columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
            self.live = Progress(*columns, console=Console(stderr=True), transient=True)
            self.live.start()
        step.task = self.live.add_task(step.what, total=step.total, completed=step.done)

    def _tell(self, ended: threading.Event, every: float) -> None:
        """A line when `every` seconds have gone since the last; a first one soon for a step that will outlast them."""
        last = time.monotonic()
        while not ended.wait(every * FIRST):
            now = time.monotonic()
            with self.lock:
                shown = [step for step in self.steps if step.shown]
                for step in shown:
                    fresh = now - step.start >= every * FIRST and not step.announced
                    if fresh and (step.left() or 0.0) > every:
                        step.announced = True
                        last = min(last, now - every)
                if not shown or now - last < every:
                    continue
                counted = [step for step in shown if step.in_terminal]
                line = " > ".join(step.told() for step in counted or shown[-1:])
            last = now
            # A reader that closed the pipe, say: the work itself goes on.
            with suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)


_reporter = _Reporter()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reporter.reset)


def silence_progress(is_silent: bool) -> None:
    """Show no step that begins from now on in this process, or show them again."""
    _reporter.is_silent = is_silent


def _on_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


@contextmanager
def long_step(what: str, total: int | None = None, shown: bool = True, in_terminal: bool = True) -> Iterator[LongStep]:
    """Tell of a step while it runs, on standard error.

    total: how many there are to do, told to the step by `update`; None where nothing can be counted. shown: not where
    another process tells of the same. in_terminal: whether a live line is worth its place; a step without one is told
    of in a log only where no other is.
    """
    step = LongStep(what, total, shown, in_terminal)
    _reporter.begin(step)
    try:
        yield step
    finally:
        _reporter.end(step)


def progress(
    items: Iterable[T], what: str, total: int, shown: bool = True, count: int | Callable[[T], int] = 1
) -> Iterator[T]:
    """Go through `items` and tell how far it is, of `total` in all; not where not `shown`.

    count: what one item stands for, a number or a function of it, such as the images of a batch; `total` is the sum.
    """
    if not shown:
        yield from items
        return
    with long_step(what, total) as step:
        done = 0
        for item in items:
            yield item
            done = min(total, done + (count if isinstance(count, int) else count(item)))
            step.update(done)
