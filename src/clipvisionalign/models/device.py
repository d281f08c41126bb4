"""The device and its fastest dtype, which is measured.

Some CPUs do bfloat16 ten times faster than float32, some nine times slower. `fastest_dtype` times the work itself in
both and takes bfloat16 only where it clearly pays: for each tower apart, since convolutions and matrix products differ.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch

#: bfloat16 has to be this much quicker before it is worth its coarser numbers.
MIN_SPEEDUP = 1.2
#: Times float32's time that bfloat16 may take for a small piece of the work before it is given up: on processors that
#: compute in it, even the copying of the weights into it does not cost that much.
MAX_SLOWDOWN = 4.0
#: How far from `MIN_SPEEDUP` a ratio of times is beyond doubt after one turn.
CLEAR_RATIO = 1.5
#: Seconds after which the turns end: what they have shown until then decides.
MAX_TIMING_SECONDS = 10.0


def best_device(name: str = "auto") -> torch.device:
    """The device of a name.

    Args:
        name: "auto" for the accelerator of this machine if there is one, else the CPU; or "cpu", "cuda:1", ...

    Returns:
        The device.

    Raises:
        ValueError: This machine does not have it.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not to be had on this machine: {reason}") from None
    return device


def time_dtypes(
    device: torch.device, work: Callable[[], Any], repeats: int = 3, small_work: Callable[[], Any] | None = None
) -> dict[torch.dtype, float]:
    """Seconds that a piece of work takes in float32 and under bfloat16 autocast, in turns: the best after a warm-up.

    The turns end once the two are `CLEAR_RATIO` apart, or after `MAX_TIMING_SECONDS`.

    Args:
        device: Where the work is done.
        work: The work; it is repeated.
        repeats: Turns after the warm-up at most.
        small_work: The same work in small, timed first: where bfloat16 takes `MAX_SLOWDOWN` times float32 there, its
            seconds are returned and `work` is not done at all. None for none.

    Returns:
        Seconds by dtype.
    """

    def time_once(work: Callable[[], Any], dtype: torch.dtype) -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    seconds: dict[torch.dtype, float] = {}
    if small_work is not None and _is_hopeless(small_work, time_once, seconds):
        return seconds
    start = time.perf_counter()
    for turn in range(repeats + 1):
        for dtype in (torch.float32, torch.bfloat16):
            elapsed = time_once(work, dtype)
            # The warm-up counts where there is no time for more.
            seconds[dtype] = elapsed if turn < 2 else min(elapsed, seconds[dtype])
        ratio = seconds[torch.bfloat16] / max(seconds[torch.float32], 1e-9)
        if (
            turn and not 1 / CLEAR_RATIO < ratio * MIN_SPEEDUP < CLEAR_RATIO
        ) or time.perf_counter() - start > MAX_TIMING_SECONDS:
            break
    return seconds


def _is_hopeless(
    small_work: Callable[[], Any],
    time_once: Callable[[Callable[[], Any], torch.dtype], float],
    seconds: dict[torch.dtype, float],
) -> bool:
    """Whether bfloat16 takes `MAX_SLOWDOWN` times float32's `seconds` for the small piece of work; the cheap side
    first.

    A first call also makes the kernels ready: two first calls are compared, then two later ones if those did not
    decide.
    """
    first = time_once(small_work, torch.float32)
    seconds[torch.float32] = min(time_once(small_work, torch.float32) for _ in range(2))
    seconds[torch.bfloat16] = time_once(small_work, torch.bfloat16)
    if seconds[torch.bfloat16] >= MAX_SLOWDOWN * first:
        return True
    if seconds[torch.bfloat16] < MAX_SLOWDOWN * seconds[torch.float32]:
        return False
    seconds[torch.bfloat16] = time_once(small_work, torch.bfloat16)
    return seconds[torch.bfloat16] >= MAX_SLOWDOWN * seconds[torch.float32]


def fastest_dtype(
    device: torch.device, work: Callable[[], Any], precision: str = "auto", small_work: Callable[[], Any] | None = None
) -> torch.dtype:
    """The dtype for a piece of work.

    Args:
        device: Where the work is done.
        work: The work; it is repeated.
        precision: "auto" to measure, "float32" or "bfloat16".
        small_work: As in `time_dtypes`.

    Returns:
        bfloat16 if it is asked for, or at least `MIN_SPEEDUP` times as fast; else float32.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    seconds = time_dtypes(device, work, small_work=small_work)
    return torch.bfloat16 if seconds[torch.bfloat16] * MIN_SPEEDUP < seconds[torch.float32] else torch.float32


def machine_info() -> dict[str, Any]:
    """The machine that a measured time is of.

    Returns:
        "processor", "threads", "memory_gib" (None where unknown), "system", "device" and "instructions".
    """
    model = platform.processor() or platform.machine()
    memory = None
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
        with open("/proc/meminfo") as file:
            memory = round(int(file.readline().split()[1]) / 2**20, 1)
    except (OSError, ValueError, IndexError):
        pass  # not Linux: the processor's name and memory stay as Python reports them
    device = best_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "memory_gib": memory,
        "system": platform.platform(terse=True),
        "device": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on.

    Returns:
        Versions by name.
    """
    from importlib.metadata import version

    names = ("clipvisionalign", "torch", "torchvision", "timm", "transformers", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
