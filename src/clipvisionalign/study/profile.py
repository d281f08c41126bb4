"""What a run costs: time and peak memory, measured in a fresh process that does only that.

`python -m clipvisionalign.study.profile RUN DATA SPLIT` prints the figures as JSON; `profile_run` calls it so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

#: Measurements after the warm-up; the median is the figure, the fastest and the slowest are its spread.
REPEATS = 5
CAPTIONS = 250
IMAGES = 64
PAIRS = 1000


def profile_run(run: str | Path, data: str, split: str = "dev", layout: str = "auto") -> dict[str, Any]:
    """Milliseconds per caption, per picture and per 1,000 pairs, bytes stored, and peak memory of a fresh process.

    Raises RuntimeError with the process's last words if it fails.
    """
    command = [sys.executable, "-m", "clipvisionalign.study.profile", str(run), data, split, layout]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"measuring {run} failed: {last}")
    return json.loads(done.stdout)


def measure(run: str, data: str, split: str, layout: str) -> dict[str, Any]:
    """The measurement itself: the data's own captions at their own length, its own pictures."""
    import torch

    from clipvisionalign.batch import group_by_length
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.models.aligner import load_aligner
    from clipvisionalign.models.device import machine
    from clipvisionalign.pictures import PictureError, open_picture

    aligner = load_aligner(run)
    before = peak_memory()
    part = read_captioned_images(data, layout).split(split)
    pictures: list[Any] = []
    for image in part.images:
        if len(pictures) == IMAGES:
            break
        try:
            pictures.append(open_picture(image))
        except PictureError:
            continue
    captions = part.captions[:CAPTIONS]
    tokens = aligner.text_tower.tokenize(captions)
    groups = group_by_length(tokens, aligner.text_tower.pad, 64)
    found: dict[str, Any] = {
        "captions": len(captions),
        "tokens_per_caption": round(float(np.mean([len(caption) for caption in tokens])), 1),
        "ms_per_caption": _milliseconds(lambda: aligner.encode_captions(captions, batch=64), len(captions)),
        "ms_per_caption_alone": _milliseconds(lambda: aligner.encode_captions(captions[:1]), 1),
        "ms_per_picture": _milliseconds(lambda: aligner.encode_images(pictures), len(pictures)),
        "padded_tokens": int(sum(group.ids.numel() for group in groups)),
    }
    if aligner.late is None:
        left, right = aligner.encode_images(pictures), aligner.encode_captions(captions)
        found["ms_per_1000_pairs"] = _milliseconds(lambda: left @ right.T, left.shape[0] * right.shape[0] / 1000)
        found |= {"bytes_per_picture": bytes_of(left) / len(left), "bytes_per_caption": bytes_of(right) / len(right)}
    else:
        score = aligner.pair_scorer(pictures, captions)
        if aligner.fusion is None:
            found["ms_per_1000_pairs"] = _milliseconds(score.table, len(pictures) * len(captions) / 1000)
        else:
            rng = np.random.default_rng(0)
            index = rng.integers(len(pictures), size=PAIRS), rng.integers(len(captions), size=PAIRS)
            found["ms_per_1000_pairs"] = _milliseconds(lambda: score(*index), PAIRS / 1000)
        found["bytes_per_picture"] = bytes_of(score.images) / len(pictures)
        found["bytes_per_caption"] = bytes_of(score.captions) / len(captions)
    found["peak_memory_mib"] = round(peak_memory() / 2**20, 1)
    found["loaded_memory_mib"] = round(before / 2**20, 1)
    if torch.cuda.is_available():
        found["peak_device_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return {**found, "parameters": aligner.parameter_count(), "machine": machine()}


def bytes_of(kept: Any) -> int:
    """Bytes of all tensors in a tensor, or in tuples and lists of them: what is stored to score pairs later."""
    if isinstance(kept, (list, tuple)):
        return sum(bytes_of(part) for part in kept)
    return 0 if kept is None else kept.numel() * kept.element_size()


def _milliseconds(work: Callable[[], Any], units: float) -> dict[str, float]:
    """Milliseconds per unit: the median of `REPEATS` after a warm-up, and the fastest and slowest."""
    work()
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - start) / units)
    return {"median": round(float(np.median(taken)), 4), "low": round(min(taken), 4), "high": round(max(taken), 4)}


def peak_memory() -> int:
    """Peak resident bytes of this process.

    From /proc where there is one: `getrusage` also counts the parent's memory, which a process holds for the moment
    between fork and exec.
    """
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:5])))
