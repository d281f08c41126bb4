"""Dropout of this project beside PyTorch's: elements a second, and a training step of the text tower.

    python benchmarks/dropout.py [--captions 640] [--words 12] [--rounds 5] [--json]

Both in turn in one process, on the CPU, with the same weights and captions, in float32 and bfloat16; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from clipvisionalign.allocator import reused_memory
from clipvisionalign.models import attention
from clipvisionalign.models.dropout import Dropout, drop
from clipvisionalign.models.text_tower import TextTower, TextTowerConfig

SHAPE, SHARE = (80, 14, 384), 0.1


def paired(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn, after one call of each."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for count in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if count:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def elements(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Seconds of one dropout, forward and backward."""
    x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)

    def of(function: Callable[..., torch.Tensor]) -> Callable[[], None]:
        return lambda: function(x, SHARE).backward(torch.ones_like(x))

    return paired({"PyTorch": of(F.dropout), "ours": of(drop)}, rounds * 4)


def step(captions: int, words: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Seconds of a forward and backward pass of the default text tower."""
    tower = TextTower(TextTowerConfig()).train()
    ids = torch.randint(1000, 30000, (captions, words + 2))
    mask = torch.ones_like(ids)
    ours = [(module, name) for module in tower.modules() for name, child in module.named_children()
            if isinstance(child, Dropout)]  # fmt: skip
    modules = {
        "PyTorch": [nn.Dropout(getattr(module, name).p) for module, name in ours],
        "ours": [getattr(module, name) for module, name in ours],
    }
    functions = {"PyTorch": lambda x, share: F.dropout(x, share), "ours": drop}

    def way(kind: str) -> Callable[[], None]:
        def run() -> None:
            for (module, name), child in zip(ours, modules[kind], strict=True):
                setattr(module, name, child)
            attention.drop = functions[kind]  # type: ignore[attr-defined]
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                pooled = tower(ids, mask, want_tokens=False).pooled
            pooled.float().sum().backward()
            tower.zero_grad(set_to_none=True)

        return run

    try:
        return paired({kind: way(kind) for kind in modules}, rounds)
    finally:
        attention.drop = drop  # type: ignore[attr-defined]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=640, help="in a step")
    parser.add_argument("--words", type=int, default=12, help="of a caption, a token each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with reused_memory():
        for dtype in (torch.float32, torch.bfloat16):
            for what, seconds in (
                (f"dropout of {SHAPE}", elements(dtype, args.rounds)),
                ("step of the text tower", step(args.captions, args.words, dtype, args.rounds)),
            ):
                rows.append({
                    "what": what, "dtype": str(dtype).partition(".")[2],
                    **{f"{name} ms": round(1e3 * value, 2) for name, value in seconds.items()},
                    "ratio": round(seconds["PyTorch"] / seconds["ours"], 2),
                })  # fmt: skip
    if args.json:
        print(json.dumps({"threads": torch.get_num_threads(), "captions": args.captions, "rows": rows}, indent=2))
        return
    for row in rows:
        print(
            f"{row['what']:28}{row['dtype']:10}{row['PyTorch ms']:10.2f} ms PyTorch{row['ours ms']:10.2f} ms ours"
            f"{row['ratio']:8.2f} times as fast"
        )


if __name__ == "__main__":
    main()
