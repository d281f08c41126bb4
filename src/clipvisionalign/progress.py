"""Progress of long operations: a live line on a terminal, else a plain line a minute on standard error.

Every loop that may take more than a few seconds goes through `progress`, and what cannot be counted through
`progress_step`. Steps lie within each other ("measuring runs" within a study, "encoding images" within that): a
terminal shows a line for each, a log gets one line for all of them, so that every minute has one:

    measuring runs 3 of 12, about 8 min left > encoding images 1,280 of 6,000, 38 a second, about 2 min left
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds between two lines in a log; the environment variable of this name sets others.
INTERVAL_VARIABLE = "CLIPVISIONALIGN_PROGRESS_SECONDS"
DEFAULT_INTERVAL = 60.0
#: After this share of the time between two lines a step that will outlast it is reported for the first time.
FIRST_LINE_SHARE = 0.1


class ProgressStep:
    """A step with progress.

    Args:
        description: What is done.
        total: How many there are to do; None if unknown.
        visible: Whether it is shown.
        in_terminal: Whether it has a live line in a terminal.
    """

    def __init__(self, description: str, total: int | None, visible: bool, in_terminal: bool) -> None:
        self.description, self.total, self.visible, self.in_terminal = description, total, visible, in_terminal
        self.done, self.postfix = 0, ""
        self.initial = 0
        self.start = time.monotonic()
        self.updated = self.start
        self.announced = False
        self.task: Any = None
        self.listener = _listener.get()

    def update(self, done: int, postfix: str = "") -> None:
        """Show how much is done.

        Args:
            done: How many are.
            postfix: Further text for the line, such as a loss.
        """
        self.done, self.postfix, self.updated = done, postfix, time.monotonic()
        _reporter.refresh(self)
        if self.listener is not None:
            self.listener(self)

    def set_initial(self, done: int) -> None:
        """Count what was done before this step began: it is done, and not in the rate.

        Args:
            done: How many were.
        """
        self.done = self.initial = done

    def remaining_seconds(self) -> float | None:
        """Seconds until the end at the rate so far, None if unknown, and where what follows is not counted."""
        newly_done = self.done - self.initial
        if self.total is None or newly_done < 1 or self.done >= self.total:
            return None
        return (time.monotonic() - self.start) / newly_done * (self.total - self.done)

    def message(self) -> str:
        """Such as "encoding images 1,280 of 6,000, 38 a second, about 2 min left"."""
        elapsed = time.monotonic() - self.start
        if self.total is None:
            parts = [f"{self.description}, {_format_seconds(elapsed)} so far"]
        else:
            parts = [f"{self.description} {self.done:,} of {self.total:,}"]
            if self.done > self.initial:
                # Once all are done, what still follows takes no part of the rate.
                elapsed = self.updated - self.start if self.done >= self.total else elapsed
                parts.append(_format_rate((self.done - self.initial) / max(elapsed, 1e-9)))
        if self.postfix:
            parts.append(self.postfix)
        if (remaining := self.remaining_seconds()) is not None:
            parts.append(f"about {_format_seconds(remaining)} left")
        return ", ".join(parts)


def _format_rate(rate: float) -> str:
    if rate >= 0.95:
        return f"{rate:,.0f} a second" if rate >= 9.5 else f"{rate:.1f} a second"
    return f"{_format_seconds(1 / rate)} each"


def _format_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def log_interval_seconds() -> float:
    """The time between two lines of progress in a log: 60 s, or the environment's value.

    Returns:
        Seconds.

    Raises:
        ValueError: That is no number of seconds above 0.
    """
    value = os.environ.get(INTERVAL_VARIABLE, "")
    try:
        seconds = float(value or DEFAULT_INTERVAL)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"{INTERVAL_VARIABLE}={value}: should be a number of seconds above 0")
    return seconds


#: What is called with each step of this thread; None for nothing.
_listener: ContextVar[Callable[[ProgressStep], None] | None] = ContextVar("progress_listener", default=None)


@contextmanager
def progress_listener(listener: Callable[[ProgressStep], None]) -> Iterator[None]:
    """Pass each step of this thread to a function when it begins and whenever it is updated, shown or not.

    Args:
        listener: The function; what it raises ends the work.

    Yields:
        Nothing: until the end of the block.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class _Reporter:
    """All steps that run in this process, and their display: rich on a terminal, a thread in a log."""

    def __init__(self) -> None:
        self.is_silent = False
        self.reset()

    def reset(self) -> None:
        """As in a fresh process: nothing runs. A forked process has neither its parent's threads nor its terminal."""
        self.lock = threading.RLock()
        self.steps: list[ProgressStep] = []
        self.live_display: Any = None
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()

    def begin(self, step: ProgressStep) -> None:
        with self.lock:
            self.steps.append(step)
            if not step.visible or self.is_silent:
                return
            if _on_terminal():
                self._begin_live_display(step)
            elif self.thread is None or not self.thread.is_alive():
                self.ended = threading.Event()
                arguments = (self.ended, log_interval_seconds())
                self.thread = threading.Thread(
                    target=self._log_periodically, args=arguments, name="progress", daemon=True
                )
                self.thread.start()

    def end(self, step: ProgressStep) -> None:
        with self.lock:
            if step not in self.steps:
                return
            self.steps.remove(step)
            if self.live_display is not None and step.task is not None:
                self.live_display.remove_task(step.task)
                if not self.live_display.tasks:
                    self.live_display.stop()
                    self.live_display = None
            if not any(other.visible for other in self.steps) and self.thread is not None:
                self.ended.set()
                self.thread = None

    def refresh(self, step: ProgressStep) -> None:
        if step.task is not None and self.live_display is not None:
            postfix = f" {step.postfix}" if step.postfix else ""
            self.live_display.update(step.task, completed=step.done, description=f"{step.description}{postfix}")

    def _begin_live_display(self, step: ProgressStep) -> None:
        if not step.in_terminal:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self.live_display is None:
            columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
            self.live_display = Progress(*columns, console=Console(stderr=True), transient=True)
            self.live_display.start()
        step.task = self.live_display.add_task(step.description, total=step.total, completed=step.done)

    def _log_periodically(self, ended: threading.Event, interval: float) -> None:
        """A line when `interval` seconds have gone since the last; a first one soon for a step that will outlast
        them."""
        last = time.monotonic()
        while not ended.wait(interval * FIRST_LINE_SHARE):
            now = time.monotonic()
            with self.lock:
                visible = [step for step in self.steps if step.visible]
                for step in visible:
                    due = now - step.start >= interval * FIRST_LINE_SHARE and not step.announced
                    if due and (step.remaining_seconds() or 0.0) > interval:
                        step.announced = True
                        last = min(last, now - interval)
                if not visible or now - last < interval:
                    continue
                counted = [step for step in visible if step.in_terminal]
                line = " > ".join(step.message() for step in counted or visible[-1:])
            last = now
            # For example a reader that closed the pipe: the work itself continues.
            with suppress(OSError, ValueError):
                print(line, file=sys.stderr, flush=True)


_reporter = _Reporter()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reporter.reset)


def silence_progress(is_silent: bool) -> None:
    """Show no step that begins from now on in this process, or show them again.

    Args:
        is_silent: Whether none is shown.
    """
    _reporter.is_silent = is_silent


def _on_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):
        return False


@contextmanager
def progress_step(
    description: str, total: int | None = None, visible: bool = True, in_terminal: bool = True
) -> Iterator[ProgressStep]:
    """Show the progress of a step on standard error.

    Args:
        description: What is done.
        total: How many there are to do, set by `update`; None where nothing can be counted.
        visible: Whether it is shown: not where another process shows the same.
        in_terminal: Whether it has a live line; a step without one is reported of in a log only where no other is.

    Yields:
        The step.
    """
    step = ProgressStep(description, total, visible, in_terminal)
    _reporter.begin(step)
    try:
        if step.listener is not None:
            step.listener(step)
        yield step
    finally:
        _reporter.end(step)


def progress(
    items: Iterable[T], description: str, total: int, visible: bool = True, units_per_item: int | Callable[[T], int] = 1
) -> Iterator[T]:
    """Iterate with progress.

    Args:
        items: What is iterated over.
        description: What is done.
        total: How many units there are in all.
        visible: Whether it is shown.
        units_per_item: What one item stands for, a number or a function of it, such as the images of a batch.

    Yields:
        The items.
    """
    if not visible and _listener.get() is None:
        yield from items
        return
    with progress_step(description, total, visible) as step:
        done = 0
        for item in items:
            yield item
            done = min(total, done + (units_per_item if isinstance(units_per_item, int) else units_per_item(item)))
            step.update(done)
