"""Which device this is, and which number format is quick on it: found out by a short timing, not assumed.

Some CPUs do bfloat16 ten times faster than float32, some nine times slower. `quick_format` times the work itself in
both and takes bfloat16 only where it clearly pays: for each tower apart, since convolutions and matrix products differ.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch

#: bfloat16 has to be this much quicker before it is worth its coarser numbers.
WORTH = 1.2
#: Times float32's time that bfloat16 may take for a small piece of the work before it is given up: on processors that
#: compute in it, even the copying of the weights into it does not cost that much.
HOPELESS = 4.0
#: How far from `WORTH` a ratio of times is beyond doubt after one turn.
CLEAR = 1.5
#: Seconds after which the turns end: what they have shown until then decides.
PATIENCE = 10.0


def best_device(name: str = "auto") -> torch.device:
    """The accelerator of this machine if there is one, else the CPU; or the device of that name. Raises ValueError."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: not to be had on this machine: {first}") from None
    return device


def format_seconds(
    device: torch.device, work: Callable[[], Any], turns: int = 3, tiny: Callable[[], Any] | None = None
) -> dict[torch.dtype, float]:
    """Seconds that `work` takes in float32 and under bfloat16 autocast, in turns: the best of some after a warm-up.

    Ends as soon as the answer is known. tiny: the same work in small, timed first: where bfloat16 takes `HOPELESS`
    times float32 there, the seconds of that are returned, and `work` is not done at all. The turns end once the two
    are `CLEAR` apart, or `PATIENCE` seconds have gone.
    """

    def taken(work: Callable[[], Any], dtype: torch.dtype) -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    seconds: dict[torch.dtype, float] = {}
    if tiny is not None and _hopeless(tiny, taken, seconds):
        return seconds
    start = time.perf_counter()
    for turn in range(turns + 1):
        for dtype in (torch.float32, torch.bfloat16):
            found = taken(work, dtype)
            # The warm-up counts where there is no time for more.
            seconds[dtype] = found if turn < 2 else min(found, seconds[dtype])
        ratio = seconds[torch.bfloat16] / max(seconds[torch.float32], 1e-9)
        if (turn and not 1 / CLEAR < ratio * WORTH < CLEAR) or time.perf_counter() - start > PATIENCE:
            break
    return seconds


def _hopeless(
    tiny: Callable[[], Any], taken: Callable[[Callable[[], Any], torch.dtype], float], seconds: dict[torch.dtype, float]
) -> bool:
    """Whether bfloat16 takes `HOPELESS` times float32's `seconds` for the small piece of work; the cheap side first.

    A first call also makes the kernels ready: two first calls are compared, then two later ones if those did not tell.
    """
    first = taken(tiny, torch.float32)
    seconds[torch.float32] = min(taken(tiny, torch.float32) for _ in range(2))
    seconds[torch.bfloat16] = taken(tiny, torch.bfloat16)
    if seconds[torch.bfloat16] >= HOPELESS * first:
        return True
    if seconds[torch.bfloat16] < HOPELESS * seconds[torch.float32]:
        return False
    seconds[torch.bfloat16] = taken(tiny, torch.bfloat16)
    return seconds[torch.bfloat16] >= HOPELESS * seconds[torch.float32]


def quick_format(
    device: torch.device, work: Callable[[], Any], precision: str = "auto", tiny: Callable[[], Any] | None = None
) -> torch.dtype:
    """The number format to do `work` in. precision: "auto" to find out, "float32" or "bfloat16".

    tiny: the same work in small, by which a hopeless bfloat16 is told without doing the whole work in it.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    seconds = format_seconds(device, work, tiny=tiny)
    return torch.bfloat16 if seconds[torch.bfloat16] * WORTH < seconds[torch.float32] else torch.float32


def machine() -> dict[str, Any]:
    """What a figure of time is quoted with: processor, cores, memory, system, device."""
    model = platform.processor() or platform.machine()
    memory = None
    try:
        with open("/proc/cpuinfo") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
        with open("/proc/meminfo") as file:
            memory = round(int(file.readline().split()[1]) / 2**20, 1)
    except (OSError, ValueError, IndexError):
        pass  # not Linux: the processor's name and memory stay as Python knows them
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


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    from importlib.metadata import version

    names = ("clipvisionalign", "torch", "torchvision", "timm", "transformers", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
