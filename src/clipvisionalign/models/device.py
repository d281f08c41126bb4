"""Which device this is, and which number format is quick on it: found out by a short timing, not assumed.

Some CPUs do bfloat16 ten times faster than float32, some nine times slower. `quick_format` times the work that a text
tower does in both and takes bfloat16 only where it clearly pays.
"""

from __future__ import annotations

import platform
import time
from functools import cache
from typing import Any

import torch
from torch import nn

#: bfloat16 has to be this much quicker before it is worth its coarser numbers.
WORTH = 1.2


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
        raise ValueError(f"the device '{name}' is not to be had on this machine: {first}") from None
    return device


@cache
def format_seconds(device: torch.device) -> dict[torch.dtype, float]:
    """Seconds of one feed-forward step, there and back, in float32 and under bfloat16 autocast: the best of five."""
    block = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384), nn.LayerNorm(384)).to(device)
    x = torch.randn(1024, 384, device=device)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        taken = []
        for _ in range(6):
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = block(x).float().square().mean()
            loss.backward()
            loss.item()
            taken.append(time.perf_counter() - start)
        seconds[dtype] = min(taken[1:])
    return seconds


def quick_format(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The number format to train in. precision: "auto" to find out, "float32" or "bfloat16"."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    seconds = format_seconds(device)
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
