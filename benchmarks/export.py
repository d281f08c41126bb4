"""ONNX against PyTorch: equal over every length and batch, milliseconds a query, and what 8 bits lose.

    python benchmarks/export.py RUN ... [--data DATA] [--json]

Towers are exported into a temporary folder and compared over captions of 2 to 77 tokens and batches of 1 to 33. Times
are medians of one query at a time, the three ways in turns, in one run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from over_runs import over_runs

QUERIES, TURN = 60, 10


def in_turns(ways: dict[str, Any], queries: list[Any]) -> dict[str, dict[str, float]]:
    """Milliseconds of one query at a time, ten by one way, ten by the next, and round again on other queries."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for start in range(0, len(queries), TURN):
        for name, encode in ways.items():
            # The threads of what ran before spin for a while.
            time.sleep(0.3)
            encode([queries[start]])
            encode([queries[start]])
            for query in queries[start : start + TURN]:
                begun = time.perf_counter()
                encode([query])
                taken[name].append(1000 * (time.perf_counter() - begun))
    return {name: {"median": round(float(np.median(times)), 2), "p95": round(float(np.percentile(times, 95)), 2)}
            for name, times in taken.items()}  # fmt: skip


def exported(run: str, source: str, folder: Path) -> dict[str, Any]:
    from clipvisionalign.data.run_data import read_data_of_run
    from clipvisionalign.export.onnx import export_onnx
    from clipvisionalign.export.onnx_aligner import OnnxAligner
    from clipvisionalign.export.verification import verify_export
    from clipvisionalign.images import open_image
    from clipvisionalign.models.io import load_aligner

    about = export_onnx(run, folder, int8=True, data=source)
    plain = load_aligner(run, "cpu", packed=False)
    worst = max(
        verify_export(plain, folder, batches=(3,), lengths=range(2, 78)),
        verify_export(plain, folder, range(1, 34), lengths=(9,)),
    )
    dev = read_data_of_run(run, source, split="dev").split("dev")
    rng = np.random.default_rng(0)
    captions = [dev.captions[i] for i in rng.integers(len(dev.captions), size=QUERIES)]
    images = [open_image(dev.images[i], 224) for i in rng.integers(len(dev.images), size=QUERIES)]
    aligner, exact, small = load_aligner(run), OnnxAligner(folder), OnnxAligner(folder, int8=True)
    models = {"PyTorch": aligner, "ONNX": exact, "ONNX, 8 bits": small}
    sizes = {path.name: round(path.stat().st_size / 2**20, 1) for path in sorted(folder.glob("*.onnx"))}
    return {
        "run": run, "design": about["design"], "greatest difference": worst,
        "ms a caption": in_turns({name: model.encode_captions for name, model in models.items()}, captions),
        "ms a picture": in_turns({name: model.encode_images for name, model in models.items()}, images),
        "8 bits on dev": about["int8"], "MiB": sizes,
    }  # fmt: skip


def main() -> None:
    def measured(run: str, source: str, given: argparse.Namespace) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            return exported(run, source, Path(name) / "onnx")

    over_runs(argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]), measured)


if __name__ == "__main__":
    from clipvisionalign.log import configure_command_line
    from clipvisionalign.progress import progress_step

    configure_command_line()
    with progress_step("benchmarks/export.py", in_terminal=False):
        main()
