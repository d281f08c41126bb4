"""Memory that a program frees, kept for its next arrays.

glibc takes an array of more than 32 MiB from the kernel by `mmap`, and gives it back when it is freed. A network's
outputs are that large in every step, and the kernel then enters each of their pages again: on a virtual machine that
can take as long as the computation (benchmarks/allocator.py).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Of malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
#: All from the heap, which never shrinks and grows by 64 MiB at least.
_REUSING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 64 * 2**20}
#: As glibc adapts itself to a program that frees large arrays.
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20, _TOP_PAD: 128 * 2**10}
#: Settings of glibc by which a user chose otherwise.
_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")

_lock = threading.Lock()
_entered = 0


@cache
def _libc() -> Any:
    """The C library, where it has `mallopt`; else None."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return (
        library if all(hasattr(library, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version")) else None
    )


@contextmanager
def reused_memory() -> Iterator[None]:
    """Keep what is freed for the next arrays, until the end of the context; then it is given back.

    It costs memory: what is free between arrays in use, of each thread, is not given back meanwhile, and zeros in
    reused memory are written. Other threads than the first take arrays of more than 64 MiB as usual. Without effect
    where the C library is not glibc, or the environment has settings of its allocator. A context within another changes
    nothing. Afterwards arrays of up to 32 MiB are taken from the heap, as glibc itself comes to do.

    >>> with reused_memory():
    ...     total = sum(range(4))
    >>> total
    6
    """
    chosen = [os.environ.get(variable, "") for variable in _VARIABLES]
    libc = None if any(chosen) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") else _libc()
    if libc is None:
        yield
        return
    _enter(libc)
    try:
        yield
    finally:
        _leave(libc)


def _enter(libc: Any) -> None:
    global _entered
    with _lock:
        if not _entered:
            for setting, value in _REUSING.items():
                libc.mallopt(setting, value)
        _entered += 1


def _leave(libc: Any) -> None:
    global _entered
    with _lock:
        _entered -= 1
        if not _entered:
            for setting, value in _USUAL.items():
                libc.mallopt(setting, value)
            libc.malloc_trim(0)
