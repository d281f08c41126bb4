"""Real processes without their start-up: each is forked from one that has imported PyTorch and the project already.

A fresh interpreter needs 5 to 10 seconds of imports on a slow core. Where a test is about what a process does, or about
its death, and not about how it starts, `Forked` is that process: its own memory, files, signals and exit status.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def use_fork_server() -> None:
    """Processes that the tests start, workers of loaders too, are forked from a server that has imported `preloaded`.

    Forked from the process of the tests, with its threads of Lance, onnxruntime and services, one in some thousands is
    held for ever by a lock of a thread that it does not have.
    """
    multiprocessing.set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["preloaded"])
    # The server looks for the module as an interpreter that starts does.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def _child(work: Callable[..., Any], arguments: tuple[Any, ...], out: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # As an interpreter that starts: what it starts itself (a loader's workers) is forked from it.
    multiprocessing.set_start_method("fork", force=True)
    output_descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        os.dup2(output_descriptor, descriptor)
        stream.reconfigure(line_buffering=True)
    sys.exit(work(*arguments))


class Forked:
    """`work(*arguments)` in a process of its own; what it returns is the exit status, as of `sys.exit`.

    work: a function that can be imported. out: the file that takes what is written to stdout and stderr.
    environment: variables beside those of this process.
    """

    def __init__(self, work: Callable[..., Any], *arguments: Any, out: Path, environment: Mapping[str, str] = {}):
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
        self.out = out
        self.process = multiprocessing.Process(target=_child, args=(work, arguments, str(out), variables))
        self.process.start()

    def poll(self) -> int | None:
        """The exit status, None while it runs; minus the signal's number after one."""
        return self.process.exitcode

    def wait(self, timeout: float = 300) -> int | None:
        """The exit status once it has ended, None if that takes more than `timeout` seconds."""
        self.process.join(timeout)
        return self.process.exitcode

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill it and wait until it is gone."""
        self.process.kill()
        self.process.join(60)

    @property
    def said(self) -> str:
        """What it has written so far."""
        return self.out.read_text() if self.out.is_file() else ""

    def ended(self, timeout: float = 600) -> str:
        """What it has written, once it has ended with status 0."""
        assert self.wait(timeout) == 0, self.said[-3000:]
        return self.said


def wait_until(condition: Callable[[], Any], process: Any = None, timeout: float = 120, pause: float = 0.01) -> None:
    """Wait until `condition()` is true; an AssertionError after `timeout` seconds, or once `process` has ended without.

    process: one that makes it true, a `Forked` or a `subprocess.Popen`.
    """
    limit = time.monotonic() + timeout
    while not condition():
        # What ends may have made it true at last.
        ended = process is not None and process.poll() is not None and not condition()
        assert not ended, f"the process ended with {process.poll()}: {getattr(process, 'said', '')[-3000:]}"
        assert time.monotonic() < limit, f"not true after {timeout} s: {getattr(process, 'said', '')[-3000:]}"
        time.sleep(pause)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def several(count: int, work: Callable[..., Any], *arguments: Any, out: Path) -> str:
    """`work(*arguments)` in `count` processes with the variables that torchrun sets; what they wrote, once all ended."""
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}  # fmt: skip
    started = [
        Forked(work, *arguments, out=out.with_suffix(f".{rank}"),
               environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]  # fmt: skip
    try:
        # Not one after the other: if one fails, the others wait for it for ever.
        limit = time.monotonic() + 240
        while any(each.poll() is None for each in started) and time.monotonic() < limit:
            if any(each.poll() for each in started):
                break
            time.sleep(0.02)
        failed = [each for each in started if each.poll() != 0]
        if failed:
            # The others are about to end as well.
            time.sleep(1)
        assert not failed, "\n".join(each.said[-3000:] for each in started)
    finally:
        for each in started:
            if each.poll() is None:
                each.kill()
    return "".join(each.said for each in started)


def command(*arguments: str) -> int:
    """The command line `clipvisionalign ...`, as work of a process."""
    from clipvisionalign.cli import main

    return main(list(arguments))
