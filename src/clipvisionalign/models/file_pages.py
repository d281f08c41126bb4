"""Pages of weights files that are mapped into memory, released once their values have been copied or checked.

Weights are read by mapping their file. A page that was read counts as this process's memory until the mapping ends, so
that a model whose weights are copied, or only checked, takes their size twice. Linux alone; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from bisect import bisect_right
from pathlib import Path

from torch import Tensor

#: Linux's: the pages are read again from the file if they are needed again.
_DONTNEED = 4


class FilePages:
    """Mappings of files in this process that nothing was written to, as they are now."""

    def __init__(self) -> None:
        self._mappings = _unwritten_mappings() if sys.platform == "linux" else []
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise if self._mappings else None

    def release(self, tensor: Tensor) -> None:
        """Release the pages that a tensor lies on, if they are of a file; what it holds stays the same.

        Args:
            tensor: On any device; nothing was written to it since this object was made.
        """
        if tensor.device.type != "cpu" or not self._mappings or not tensor.is_contiguous():
            return
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        number = bisect_right(self._mappings, (start, sys.maxsize)) - 1
        if number < 0 or not size:
            return
        low, high = self._mappings[number]
        if not low <= start < start + size <= high:
            return
        start_page = start // mmap.PAGESIZE * mmap.PAGESIZE
        assert self._madvise is not None
        self._madvise(ctypes.c_void_p(start_page), ctypes.c_size_t(start + size - start_page), _DONTNEED)


def _unwritten_mappings() -> list[tuple[int, int]]:
    """(start, end) of each mapping of a file that has no page of its own, in ascending order.

    What was written to a private mapping is on pages of its own, and would be lost.
    """
    mappings: list[tuple[int, int]] = []
    start = end = 0
    try:
        lines = Path("/proc/self/smaps").read_text(errors="renumber").splitlines()
    except OSError:
        return []
    for line in lines:
        fields = line.split(None, 5)
        if not fields[0].endswith(":"):
            # Its address, rights, offset, device, inode, and the file; an inode of 0 is no file.
            start, end = (int(address, 16) for address in fields[0].split("-")) if fields[4] != "0" else (0, 0)
        elif fields[0] == "Anonymous:" and fields[1] == "0" and end:
            mappings.append((start, end))
    return mappings
