"""Retrieval metrics beside CLIP_benchmark's, in one run: equal figures, seconds, peak memory.

    python benchmarks/retrieval.py [--json]

The small gallery is measured by both; the large one, 20,000 x 100,000 at width 256, by this project alone, since the
rival's one-hot table of queries x k x gallery would take terabytes there. Each measurement is a fresh process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np

SMALL, LARGE = (1_000, 5_000), (20_000, 100_000)
WIDTH, REPEATS = 256, 5


def vectors(images: int, captions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random unit vectors (N, D), (M, D), a caption's near its image's, and each caption's image (M,)."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((images, WIDTH), dtype=np.float32)
    owners = np.arange(captions) * images // captions
    b = a[owners]
    for start in range(0, captions, 10_000):
        b[start : start + 10_000] += 4 * rng.standard_normal(b[start : start + 10_000].shape, dtype=np.float32)
    for x in (a, b):
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    return a, b, owners


def ours(a: np.ndarray, b: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    from clipvisionalign.retrieval import retrieval_metrics

    metrics = retrieval_metrics(a, b, owners, resamples=0)
    ways = {"image_to_text": metrics.image_to_text, "text_to_image": metrics.text_to_image}
    return {f"{way}@{k}": figures[f"recall_at_{k}"].value for way, figures in ways.items() for k in (1, 5, 10)}


def rival(a: np.ndarray, b: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = torch.from_numpy(b) @ torch.from_numpy(a).T
    positive = torch.from_numpy(owners[:, None] == np.arange(len(a))[None, :])
    recalls = {}
    for way, table, true in (("image_to_text", scores.T, positive.T), ("text_to_image", scores, positive)):
        for k in (1, 5, 10):
            # In blocks of 64 queries, as the rival's own evaluation does it.
            hits = batchify(recall_at_k, table.contiguous(), true.contiguous(), 64, "cpu", k=k) > 0
            recalls[f"{way}@{k}"] = float(hits.double().mean())
    return recalls


def peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def one(who: str, images: int, captions: int, repeats: int) -> dict[str, object]:
    """Measure one of the two in this process: seconds of each repeat, peak memory above the inputs, the figures."""
    measured = {"ours": ours, "rival": rival}[who]
    a, b, owners = vectors(images, captions)
    before = peak()
    seconds = []
    for _ in range(repeats + (repeats > 1)):
        start = time.perf_counter()
        figures = measured(a, b, owners)
        seconds.append(time.perf_counter() - start)
    return {"figures": figures, "seconds": seconds[repeats > 1 :], "mib_above_inputs": (peak() - before) / 2**20}


def fresh(*arguments: object) -> dict:
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        who, images, captions, repeats = given.one
        print(json.dumps(one(who, int(images), int(captions), int(repeats))))
        return
    us, them = fresh("ours", *SMALL, REPEATS), fresh("rival", *SMALL, REPEATS)
    large = fresh("ours", *LARGE, 1)
    ratio = float(np.median(them["seconds"]) / np.median(us["seconds"]))
    result = {
        "equal": us["figures"] == them["figures"],
        "small": {"ours": us, "rival": them, "rival_over_ours": ratio},
        "large": large,
    }
    if given.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{SMALL[0]:,} x {SMALL[1]:,}, width {WIDTH}, all six recalls (ours: also ranks and mAP@R), no intervals")
    for name, measurement in (("ours", us), ("CLIP_benchmark", them)):
        low, middle, high = np.percentile(measurement["seconds"], [0, 50, 100])
        memory = f"{measurement['mib_above_inputs']:7.0f} MiB above inputs"
        print(f"  {name:<15} {middle:6.2f} s [{low:.2f}, {high:.2f}], {memory}")
    print(f"  figures {'equal' if result['equal'] else 'DIFFER'}; CLIP_benchmark takes {ratio:.1f} times as long")
    print(f"{LARGE[0]:,} x {LARGE[1]:,}, width {WIDTH}")
    print(f"  ours            {large['seconds'][0]:6.1f} s, {large['mib_above_inputs']:7.0f} MiB above inputs")


if __name__ == "__main__":
    from clipvisionalign.progress import progress_step

    with progress_step("benchmarks/retrieval.py", in_terminal=False):
        main()
