"""What it costs to give freed memory back to the system: time and memory with `reused_memory` and without.

    python benchmarks/allocator.py [--tower tf_efficientnet_lite0] [--size 224] [--rounds 3] [--json]

Each measurement is of a process of its own, in turn with and without: a batch of images through an image tower without
gradients, and a step in which the tower is trained (forward, backward), in float32 and bfloat16, on the CPU: medians of
images a second, their ratio, and the greatest resident memory of the processes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

BATCH, REPEATS = 64, 3
WAYS = ("usual", "reused")


def measure(tower: str, size: int) -> dict[str, float]:
    """Images a second of each kind of work, and the greatest resident memory after each, in MiB."""
    import timm
    import torch

    model = timm.create_model(tower, num_classes=0).to(memory_format=torch.channels_last)
    pixels = torch.randn(BATCH, 3, size, size).to(memory_format=torch.channels_last)
    found: dict[str, float] = {}

    def forward() -> None:
        model(pixels)

    def step() -> None:
        model(pixels).float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    for work, is_trained in ((forward, False), (step, True)):
        for dtype in (torch.float32, torch.bfloat16):
            # Batch norms keep their statistics, as in training from ImageNet's weights.
            model.eval()
            name = f"{'step' if is_trained else 'forward'}, {str(dtype).partition('.')[2]}"
            with torch.set_grad_enabled(is_trained), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                work()
                start = time.perf_counter()
                for _ in range(REPEATS):
                    work()
            found[name] = BATCH * REPEATS / (time.perf_counter() - start)
    found["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tower", default="tf_efficientnet_lite0", help="name that timm builds")
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        from clipvisionalign.allocator import reused_memory

        with reused_memory() if args.way == "reused" else nullcontext():
            print(json.dumps(measure(args.tower, args.size)))
        return
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--tower", args.tower, "--size", str(args.size), "--way", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            taken[way].append(json.loads(done.stdout.splitlines()[-1]))
    rows: list[dict[str, Any]] = []
    for name in taken["usual"][0]:
        usual, reused = (statistics.median(each[name] for each in taken[way]) for way in WAYS)
        rows.append(
            {"what": name, "usual": round(usual, 1), "reused": round(reused, 1), "ratio": round(reused / usual, 2)}
        )
    if args.json:
        print(json.dumps({"tower": args.tower, "size": args.size, "rows": rows}, indent=2))
        return
    print(f"{args.tower}, {args.size} pixels, batches of {BATCH}: images a second")
    for row in rows:
        print(f"{row['what']:20}{row['usual']:10.1f} usual{row['reused']:10.1f} reused{row['ratio']:8.2f}")


if __name__ == "__main__":
    main()
