"""Batches made by worker processes: one way for tables and for streams.

- A launcher (torchrun, Slurm, `timeout`) signals every process of a run. Which step is the last one is decided by the
  process that trains: its workers leave SIGTERM and SIGINT to it, and end when it tells them to, or is gone.
- An error in a worker is raised where the batch is asked for, with its own words; where in the worker it arose is a
  note.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

#: What asks a run to stop.
STOPPING = (signal.SIGTERM, signal.SIGINT)
#: Whether a worker can know who has signalled it; macOS does not tell.
TOLD_BY_WHOM = hasattr(signal, "sigwaitinfo")


def loaded(dataset: Dataset[Any], workers: int, sampler: Sequence[Any] | None = None) -> Iterator[Any]:
    """What a data set gives, item by item, made by so many workers; of a `sampler`'s entries where there is one.

    Raises what the data set raises, in a worker too.
    """
    told: Dataset[Any] = _Streamed(dataset) if isinstance(dataset, IterableDataset) else _Listed(dataset)
    # The loader draws its workers' seeds from a generator of its own, so that beginning anew draws none.
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(
        told, batch_size=None, sampler=sampler, num_workers=workers, generator=own, worker_init_fn=leave_signals
    )
    with _signals_blocked():
        # The workers inherit that: there is no moment at which a signal ends one of them.
        items = iter(loader)
    for item in items:
        if isinstance(item, _Failed):
            raise item.error
        yield item


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """While processes are started that are to leave these signals to this one."""
    if not TOLD_BY_WHOM:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals(worker: int) -> None:
    """In a worker: be ended by the process that it works for, and by no one else's signal."""
    if not TOLD_BY_WHOM:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    parent = os.getppid()

    def wait() -> None:
        while True:
            told = signal.sigwaitinfo(STOPPING)
            if told.si_signo == signal.SIGTERM and told.si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


# --- errors ----------------------------------------------------------------------------------------------------------


@dataclass
class _Failed:
    """An error on its way from a worker."""

    error: Exception


def _failed(error: Exception) -> _Failed:
    """To be sent in an item's place. Raises the error itself where there is no worker, or it cannot be sent."""
    if get_worker_info() is None:
        raise error
    error.add_note("in a process that makes batches:\n" + "".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        raise error from None
    return _Failed(error)


class _Listed(Dataset[Any]):
    """A data set of items, in which an error is an item."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, place: Any) -> Any:
        try:
            return self.dataset[place]
        except Exception as error:
            return _failed(error)


class _Streamed(IterableDataset[Any]):
    """A stream of items, whose last one may be an error."""

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.dataset
        except Exception as error:
            yield _failed(error)
