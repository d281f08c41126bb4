"""Pages of weights files that are mapped into memory, released once their values have been copied or checked.

Weights are read by mapping their file. A page that was read counts as this process's memory until the mapping ends, so
that a model whose weights are copied, or only checked, takes their size twice. Linux alone; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
from torch import Tensor

#: Bytes that are in memory twice while a tensor is copied.
_COPIED_BYTES = 2**24
#: Linux's: the pages are read again from the file if they are needed again.
_DONTNEED = 4
#: Of an entry of /proc/self/pagemap: in memory; of a file. What was written to a private mapping is not of the file.
_PRESENT, _OF_FILE = np.uint64(1 << 63), np.uint64(1 << 61)


def copy_and_release(target: Tensor, source: Tensor) -> None:
    """Copy a tensor, and release the pages of a file that it lies on, a part at a time.

    Args:
        target: What is written to, on any device.
        source: Of the same shape, on the CPU.
    """
    rows = max(1, _COPIED_BYTES * len(source) // max(1, source.nbytes)) if source.ndim else 0
    parts = zip(target.split(rows), source.split(rows), strict=True) if rows else [(target, source)]
    for to, part in parts:
        to.copy_(part)
        release_pages(part)


def release_pages(tensor: Tensor) -> None:
    """Release the pages of a file that a tensor lies on; what it holds stays the same.

    Args:
        tensor: On any device. Nothing writes to it meanwhile.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    if not size:
        return
    first, last = start // mmap.PAGESIZE, -(-(start + size) // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * (last - first)), dtype=np.uint64)
    except OSError:
        # A system that does not tell which pages are of files.
        return
    released = (entries & (_PRESENT | _OF_FILE)) == (_PRESENT | _OF_FILE)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], released, [False]]).astype(np.int8)))
    madvise = ctypes.CDLL(None).madvise
    for begin, end in edges.reshape(-1, 2).tolist():
        address = ctypes.c_void_p((first + begin) * mmap.PAGESIZE)
        madvise(address, ctypes.c_size_t((end - begin) * mmap.PAGESIZE), _DONTNEED)
