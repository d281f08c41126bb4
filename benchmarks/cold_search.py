"""How long a search takes that begins with nothing loaded: a whole process, beside one that only imports PyTorch.

    python benchmarks/cold_search.py INDEX ["a dog on the grass"] [--runs 7] [--json]

Both run in turns, so that what else this machine does falls on both. Also printed: which heavy modules the search
imported, and how far the vector of the words is from PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

HEAVY = ("torch", "torchvision", "timm", "transformers", "lancedb", "open_clip", "pandas")
SEARCH = f"""
import sys

HEAVY = {HEAVY}
from clipvisionalign.cli import main
status = main(["search", *sys.argv[2:]])
if sys.argv[1] == "modules":
    print([name for name in HEAVY if name in sys.modules], len(sys.modules), file=sys.stderr)
sys.exit(status)
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds of a process by the clock, and of the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(index: str, words: str, runs: int) -> dict[str, Any]:
    commands = {
        "search": [sys.executable, "-c", SEARCH, "time", index, words],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    for command in commands.values():
        timed(command)  # files are read from the disk once
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            times[name].append(timed(command))
    results: dict[str, Any] = {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in each),
            "processor_seconds": statistics.median(processor for _, processor in each),
            "all_seconds": [round(seconds, 3) for seconds, _ in each],
        }
        for name, each in times.items()
    }
    for unit in ("seconds", "processor_seconds"):
        results[f"ratio_of_{unit}"] = results["search"][unit] / results["import torch"][unit]
    modules = [sys.executable, "-c", SEARCH, "modules", index, words]
    done = subprocess.run(modules, check=True, capture_output=True, text=True)
    results["modules"] = done.stderr.strip().splitlines()[-1]
    results["difference"] = vector_difference(index, words)
    return results


def vector_difference(index: str, words: str) -> float:
    """The largest difference of a number of the vector from PyTorch's."""
    from clipvisionalign.search.searcher import Searcher

    encoder = Searcher(index).encoder
    exact = encoder.aligner.encode_captions([words]).numpy()
    return float(abs(encoder.encode_words([words]) - exact).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index")
    parser.add_argument("words", nargs="?", default="a dog on the grass")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = measure(args.index, args.words, args.runs)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(f"medians of {args.runs} runs in turns; seconds by the clock, and of the processor")
    for name in ("search", "import torch"):
        print(f"  {name:15} {results[name]['seconds']:6.2f} {results[name]['processor_seconds']:6.2f}")
    print(f"  search / import torch: {results['ratio_of_seconds']:.2f}, {results['ratio_of_processor_seconds']:.2f}")
    print(f"heavy modules of the search, and how many in all: {results['modules']}")
    print(f"largest difference of the vector from PyTorch's: {results['difference']:.1e}")


if __name__ == "__main__":
    main()
