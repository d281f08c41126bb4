"""Batches from worker processes, for tables and for streams.

- A launcher (torchrun, Slurm, `timeout`) signals every process of a run. Which step is the last one is decided by the
  process that trains: its workers ignore SIGTERM and SIGINT, and end on its command, or when it exits or is gone.
- An error in a worker is raised where the batch is asked for, with its own words; where in the worker it arose is a
  note.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

#: What asks a run to stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Whether signals can be blocked; not on Windows.
HAS_SIGNAL_MASKS = hasattr(signal, "pthread_sigmask")


def iterate_dataset(dataset: Dataset[Any], workers: int, sampler: Sequence[Any] | None = None) -> Iterator[Any]:
    """The items of a data set, in order, made by worker processes.

    Args:
        dataset: A data set of items or a stream; an item is what it returns, not a batch of them.
        workers: Number of worker processes; 0 makes them in this one.
        sampler: What a data set of items is asked for, one after the other; None for a stream.

    Yields:
        The items.

    Raises:
        Exception: Whatever the data set raises, in a worker too: with its own message, and where it arose as a note.
    """
    wrapped: Dataset[Any] = (
        _ErrorCapturingStream(dataset) if isinstance(dataset, IterableDataset) else _ErrorCapturingDataset(dataset)
    )
    # The loader draws its workers' seeds from a generator of its own, so that a second start draws none.
    generator = torch.Generator().manual_seed(0)
    processes: list[BaseProcess] = []
    loader = DataLoader(
        wrapped,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        generator=generator,
        worker_init_fn=leave_signals_to_parent,
        multiprocessing_context=_recording_context(processes) if workers else None,
    )
    at_exit = Finalize(None, _kill_workers, (processes,), exitpriority=0)
    items: Iterator[Any] = iter(())
    try:
        with _signals_blocked():
            # Workers that are forked inherit that: there is no moment at which a signal ends one of them.
            items = iter(loader)
        for process in processes:
            # What the loader calls once a worker has not ended within seconds of its command.
            setattr(process, "terminate", process.kill)  # noqa: B010
        for item in items:
            if isinstance(item, _WorkerError):
                raise item.error
            yield item
    finally:
        # First the loader's own way to end them: until then they are killed if this process exits.
        del items
        at_exit.cancel()


def _recording_context(processes: list[BaseProcess]) -> BaseContext:
    """The default way to start processes; those that are made are added to a list."""
    context = multiprocessing.get_context()
    recording = copy.copy(context)

    def make(*args: Any, **kwargs: Any) -> BaseProcess:
        process = context.Process(*args, **kwargs)
        processes.append(process)
        return process

    setattr(recording, "Process", make)  # noqa: B010 - types know it as the class's
    return recording


def _kill_workers(processes: Sequence[BaseProcess]) -> None:
    """When this process exits: it would wait for workers for ever, which ignore the signal that it sends them."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        # PyTorch's handler would raise an error for what is killed here.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in processes:
        process.kill()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """While processes are started that are to leave these signals to this one."""
    if not HAS_SIGNAL_MASKS:
        yield
        return
    if multiprocessing.get_start_method(allow_none=True) == "forkserver":
        # One that were started below would hand the blocked signals on to all processes that it ever forks.
        forkserver.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """Let a worker be ended by the process that it works for, and by no one else's signal.

    Args:
        worker: Number of the worker, which PyTorch passes.
    """
    # Not the process of `os.getppid()`, which may be a server that forks for it.
    owner = multiprocessing.parent_process()
    assert owner is not None

    def end_with_owner() -> None:
        owner.join()
        os._exit(0)

    # Ignored rather than blocked: libraries have threads of their own, and a signal that any of them takes ends all.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_owner, daemon=True).start()


# --- errors ----------------------------------------------------------------------------------------------------------


@dataclass
class _WorkerError:
    """An error on its way from a worker."""

    error: Exception


def _as_worker_error(error: Exception) -> _WorkerError:
    """To be sent in an item's place. Raises the error itself where there is no worker, or it cannot be sent."""
    if get_worker_info() is None:
        raise error
    error.add_note("in a process that makes batches:\n" + "".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        raise error from None
    return _WorkerError(error)


class _ErrorCapturingDataset(Dataset[Any]):
    """A data set of items, in which an error is an item."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            return _as_worker_error(error)


class _ErrorCapturingStream(IterableDataset[Any]):
    """A stream of items, whose last one may be an error."""

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except Exception as error:
            yield _as_worker_error(error)
