"""Dropout of this project beside PyTorch's: elements a second, and a training step of the text tower.

    python benchmarks/dropout.py [--captions 640] [--words 12] [--rounds 5] [--json]

Both in turn in one process, on the CPU, with the same weights and captions, in float32 and bfloat16; medians.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from timing import TURNS, ratio, spread, summary, take_turns
from torch import Tensor
from torch.nn import functional as F

from clipvisionalign.allocator import reused_memory
from clipvisionalign.models import attention, dropout
from clipvisionalign.models.text_tower import TextTower, TextTowerConfig

SHAPE, SHARE = (80, 14, 384), 0.1
RIVALS: dict[str, Callable[[Tensor, float], Tensor]] = {"PyTorch": F.dropout, "ours": dropout.drop}


def elements(dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """One dropout, forward and backward, by each."""
    x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)

    def of(function: Callable[[Tensor, float], Tensor]) -> Callable[[], None]:
        return lambda: function(x, SHARE).backward(torch.ones_like(x))

    return {name: of(function) for name, function in RIVALS.items()}


def steps(captions: int, words: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """A forward and backward pass of the default text tower with each."""
    tower = TextTower(TextTowerConfig()).train()
    ids = torch.randint(1000, 30000, (captions, words + 2))
    mask = torch.ones_like(ids)

    def of(function: Callable[[Tensor, float], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with (
                patch.object(dropout, "drop", function),
                patch.object(attention, "drop", function),
                torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            ):
                pooled = tower(ids, mask, want_tokens=False).pooled
            pooled.float().sum().backward()
            tower.zero_grad(set_to_none=True)

        return run

    return {name: of(function) for name, function in RIVALS.items()}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--captions", type=int, default=640, help="in a step")
    parser.add_argument("--words", type=int, default=12, help="of a caption, a token each")
    parser.add_argument("--rounds", type=int, default=TURNS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with reused_memory():
        for dtype in (torch.float32, torch.bfloat16):
            for what, contestants in (
                (f"dropout of {SHAPE}", elements(dtype)),
                ("step of the text tower", steps(args.captions, args.words, dtype)),
            ):
                seconds = take_turns(contestants, args.rounds, gradients=True)
                rows.append({
                    "what": what, "dtype": str(dtype).partition(".")[2],
                    "ms": {name: summary(of_one) for name, of_one in seconds.items()},
                    "ratio": ratio(seconds["PyTorch"], seconds["ours"]),
                })  # fmt: skip
    if args.json:
        print(json.dumps({"threads": torch.get_num_threads(), "captions": args.captions, "rows": rows}, indent=2))
        return
    for row in rows:
        times = "".join(f"{name} {each['median']:.2f} ms  " for name, each in row["ms"].items())
        print(f"{row['what']:28}{row['dtype']:10}{times}{spread(row['ratio'], 2)} times as fast")


if __name__ == "__main__":
    main()
