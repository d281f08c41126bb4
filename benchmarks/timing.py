"""Contestants that take turns, and what their times show; peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

TURNS = 5
#: Seconds of a turn from which on `FEW` turns are enough.
LONG, FEW = 20.0, 2


def take_turns(
    contestants: dict[str, Callable[[], Any]], turns: int = TURNS, gradients: bool = False
) -> dict[str, list[float]]:
    """Seconds of every turn of each contestant; they take turns, so that a slow minute meets all alike.

    A contestant whose first turn, the warm-up, takes longer than `LONG` has `FEW` turns more: it is told apart by them.
    """
    from clipvisionalign.progress import progress

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    mine = dict.fromkeys(contestants, turns)
    order = [(turn, name) for turn in range(turns + 1) for name in contestants]
    for turn, name in progress(order, f"turns of {', '.join(contestants)}:", len(order)):
        if turn > mine[name]:
            continue
        start = time.perf_counter()
        with torch.inference_mode(not gradients):
            contestants[name]()
        taken = time.perf_counter() - start
        if turn:
            seconds[name].append(taken)
        elif taken > LONG:
            mine[name] = min(turns, FEW)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: median, fastest, slowest."""
    return dict(zip(("median", "low", "high"), (1000 * np.percentile(seconds, [50, 0, 100])).tolist(), strict=True))


def ratio(rival: list[float], ours: list[float]) -> dict[str, float]:
    """How often as long the rival takes: median over the turns, least, greatest."""
    both = min(len(rival), len(ours))
    turns = np.array(rival[:both]) / np.array(ours[:both])
    return dict(zip(("median", "low", "high"), np.percentile(turns, [50, 0, 100]).tolist(), strict=True))


def spread(interval: dict[str, float], digits: int = 1) -> str:
    return f"{interval['median']:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"


def peak() -> int:
    """Peak resident bytes of this process since the last reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
