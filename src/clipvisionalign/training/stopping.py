"""Stopping a training by a signal: at the end of a step, on all processes together."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clipvisionalign.training.distributed import Distributed

#: Seconds within which a second signal to stop is the first one, which a launcher has passed on.
REPEATED_SIGNAL_SECONDS = 5.0

#: What is printed at once when a run is asked to stop.
STOPPING = "stopping: after this step a checkpoint is written; Ctrl-C again stops at once\n"


@contextmanager
def stop_signal(launched: bool = False) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM within a block into a question; the second one stops at once.

    A launcher passes on what its whole process group has had already: a second SIGTERM within `REPEATED_SIGNAL_SECONDS`
    seconds counts as the first one, also after the block, and so does a second Ctrl-C under a launcher.

    Args:
        launched: Whether a launcher is at work.

    Yields:
        A function that returns whether a signal has come; always false outside of the main thread.
    """
    signal_time: float | None = None
    if threading.current_thread() is not threading.main_thread():
        # Signals come to the main thread alone.
        yield lambda: False
        return
    previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle_signal(number: int, frame: Any) -> None:
        nonlocal signal_time
        now = time.monotonic()
        if signal_time is None:
            signal_time = now
            if os.environ.get("RANK", "0") == "0":
                # Not by print: a signal may come while one is at work. The step may take long, its checkpoint as well.
                os.write(2, STOPPING.encode())
        elif now - signal_time > REPEATED_SIGNAL_SECONDS or (number == signal.SIGINT and not launched):
            restore_handlers()
            os.kill(os.getpid(), number)

    def restore_handlers() -> None:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    for number in previous_handlers:
        signal.signal(number, handle_signal)
    try:
        yield lambda: signal_time is not None
    finally:
        if signal_time is None:
            restore_handlers()
        else:
            # That of SIGTERM stays, without a moment in which the repeated signal would end the process.
            signal.signal(signal.SIGINT, previous_handlers[signal.SIGINT])


def any_stop_requested(distributed: Distributed, stop: Callable[[], bool], elapsed: float = 0.0) -> tuple[bool, float]:
    """Whether any process was asked to stop, as all have to at the same step; every process calls this.

    Args:
        distributed: This process.
        stop: Returns whether this process was asked, see `stop_signal`.
        elapsed: Seconds since this process's last checkpoint.

    Returns:
        Whether any process was asked, and the `elapsed` of the main process, the same on all.
    """
    requests = distributed.run_and_gather(lambda: (stop(), elapsed), long_timeout=True)
    return any(requested for requested, _ in requests), requests[0][1]
