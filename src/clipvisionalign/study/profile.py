"""Time, memory, energy and arithmetic of a run, measured in a fresh process.

`python -m clipvisionalign.study.profile RUN DATA SPLIT LAYOUT [brief]` prints the figures as JSON; `profile_run` calls
it so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from clipvisionalign.study.documents import CostDocument, RoundDocument

#: Measurements after the warm-up; the median is the figure, the fastest and the slowest are its spread.
REPEATS = 5
#: Single encodings that the percentiles of latency are of.
LATENCY_CAPTIONS, LATENCY_IMAGES = 100, 30
PROFILED_CAPTIONS = 250
PROFILED_IMAGES = 64
PROFILED_PAIRS = 1000
TOKEN_LENGTHS = (8, 16, 32, 64, 128, 256, 512)
BATCH_SIZES = (1, 8, 64, 250)
#: A brief measurement: longest caption in tokens, most captions in a batch and in all, captions one at a time,
#: images, repeats.
BRIEF_LENGTH, BRIEF_BATCH, BRIEF_MIN_CAPTIONS, BRIEF_IMAGES, BRIEF_REPEATS = 64, 64, 16, 16, 3


def profile_run(
    run: str | Path, data: str, split: str = "dev", layout: str = "auto", brief: bool = False
) -> dict[str, Any]:
    """Measure time and memory of a run in a fresh process.

    Args:
        run: The run folder.
        data: The data set whose captions and images are encoded.
        split: Of it.
        layout: Of it; "auto" recognises it.
        brief: Fewer captions, images and repeats, and nothing long, in a quarter of the time.

    Returns:
        Milliseconds per caption, image and 1,000 pairs, latency, by length and by batch; bytes stored, parameters,
        FLOPs, energy where the machine reports it, and peak memory.

    Raises:
        RuntimeError: The process failed; the message has its last words.
    """
    command = [sys.executable, "-m", "clipvisionalign.study.profile", str(run), data, split, layout]
    command += ["brief"] if brief else []
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no word"])[-1]
        raise RuntimeError(f"measuring {run} failed: {last}")
    return json.loads(process.stdout)


def measure_costs(
    run: str, data: str, split: str, layout: str, load: Callable[[str], Any] | None = None, brief: bool = False
) -> dict[str, Any]:
    """Measure time and memory of a run in this process, see `profile_run`.

    Args:
        run: The run folder.
        data: The data set whose captions and images are encoded.
        split: Of it.
        layout: Of it; "auto" recognises it.
        load: Loads the aligner of a run folder; None for `load_aligner`.
        brief: Whether fewer captions, images and repeats are measured.

    Returns:
        As `profile_run`: times in milliseconds, energy in joules, "peak_memory_mib" in MiB.
    """
    import torch

    from clipvisionalign.batch import group_by_length
    from clipvisionalign.data.run_data import read_data_of_run
    from clipvisionalign.images import ImageError, open_image
    from clipvisionalign.models.device import machine_info
    from clipvisionalign.models.io import load_aligner

    aligner = (load or load_aligner)(run)
    before = peak_memory()
    eval_data = read_data_of_run(run, data, layout).split(split)
    images: list[Any] = []
    for image in eval_data.images:
        if len(images) == (BRIEF_IMAGES if brief else PROFILED_IMAGES):
            break
        try:
            images.append(open_image(image))
        except ImageError:
            continue
    captions = eval_data.captions[: BRIEF_BATCH if brief else PROFILED_CAPTIONS]
    repeats, divisor = (BRIEF_REPEATS, 2) if brief else (REPEATS, 1)
    tokens = aligner.text_tower.tokenize(captions)
    groups = group_by_length(tokens, aligner.text_tower.pad, 64)
    energy = EnergyCounter()
    costs: dict[str, Any] = {
        "captions": len(captions),
        "tokens_per_caption": round(float(np.mean([len(caption) for caption in tokens])), 1),
        "ms_per_caption": _milliseconds(lambda: aligner.encode_captions(captions, batch=64), len(captions), repeats),
    }
    energy.record("joules_per_1000_captions", (repeats + 1) * len(captions) / 1000)
    costs["ms_per_picture"] = _milliseconds(lambda: aligner.encode_images(images), len(images), repeats)
    energy.record("joules_per_1000_pictures", (repeats + 1) * len(images) / 1000)
    costs |= {
        "padded_tokens": int(sum(group.ids.numel() for group in groups)),
        "caption_latency_ms": _latency(aligner.encode_captions, captions, LATENCY_CAPTIONS // divisor),
        "picture_latency_ms": _latency(aligner.encode_images, images, LATENCY_IMAGES // divisor),
        "by_length": _by_length(aligner, captions, BRIEF_LENGTH if brief else TOKEN_LENGTHS[-1]),
        "by_batch": [
            _by_batch(aligner, captions, size, BRIEF_MIN_CAPTIONS if brief else BRIEF_BATCH)
            for size in BATCH_SIZES
            if size <= BRIEF_BATCH or not brief
        ],
    }
    costs |= _pair_costs(aligner, images, captions)
    costs["peak_memory_mib"] = round(peak_memory() / 2**20, 1)
    costs["loaded_memory_mib"] = round(before / 2**20, 1)
    if torch.cuda.is_available():
        # What the allocator has taken from the device, and not only what tensors filled: so much has to be free there.
        costs["peak_device_memory_mib"] = round(torch.cuda.max_memory_reserved() / 2**20, 1)
    costs |= {"parameters": aligner.parameter_count(), **flops(aligner.config, captions[0], images[0])}
    return {**costs, "energy": energy.readings, "machine": machine_info()}


def _pair_costs(aligner: Any, images: Sequence[Any], captions: Sequence[str]) -> dict[str, Any]:
    """Milliseconds for 1,000 pairs, and the bytes that an index stores of an image and of a caption."""
    if getattr(aligner, "late", None) is None:
        image_vectors, caption_vectors = aligner.encode_images(images), aligner.encode_captions(captions)
        pairs = image_vectors.shape[0] * caption_vectors.shape[0]
        return {
            "ms_per_1000_pairs": _milliseconds(lambda: image_vectors @ caption_vectors.T, pairs / 1000),
            "bytes_per_picture": bytes_of(image_vectors) / len(image_vectors),
            "bytes_per_caption": bytes_of(caption_vectors) / len(caption_vectors),
        }
    scorer = aligner.pair_scorer(images, captions)
    if aligner.fusion is None:
        milliseconds = _milliseconds(scorer.score_matrix, len(images) * len(captions) / 1000)
    else:
        rng = np.random.default_rng(0)
        index = rng.integers(len(images), size=PROFILED_PAIRS), rng.integers(len(captions), size=PROFILED_PAIRS)
        milliseconds = _milliseconds(lambda: scorer(*index), PROFILED_PAIRS / 1000)
    return {
        "ms_per_1000_pairs": milliseconds,
        "bytes_per_picture": bytes_of(scorer.images) / len(images),
        "bytes_per_caption": bytes_of(scorer.captions) / len(captions),
    }


def _by_batch(aligner: Any, captions: Sequence[str], size: int, min_captions: int) -> dict[str, Any]:
    # One at a time a few measure as much as all, in a quarter of the time.
    subset = captions[: max(min_captions, size)]
    timing = _milliseconds(lambda: aligner.encode_captions(subset, batch=size), len(subset), 3)
    return {"batch": size, "ms_per_caption": timing}


def _by_length(aligner: Any, captions: Sequence[str], longest: int) -> list[dict[str, Any]]:
    """Captions of a set number of tokens, made of the data's own words, one at a time and eight at a time."""
    tower = aligner.text_tower
    words = " ".join(captions).split()
    return [
        _at_length(aligner, _caption_of_length(tower, words, length))
        for length in TOKEN_LENGTHS
        if length <= min(tower.max_tokens, longest)
    ]


def _at_length(aligner: Any, text: str) -> dict[str, Any]:
    eight = _milliseconds(lambda: aligner.encode_captions([text] * 8), 8, 3)["median"]
    once = _latency(aligner.encode_captions, [text], 10)["p50"]
    return {"tokens": len(aligner.text_tower.tokenize([text])[0]), "ms_alone": once, "ms_of_eight": eight}


def _caption_of_length(tower: Any, words: Sequence[str], length: int) -> str:
    """The first of `words` that make up to `length` tokens."""
    low, high = 1, min(len(words), length)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tower.tokenizer(" ".join(words[:middle]))["input_ids"]) <= length:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def flops(config: Any, caption: str, image: Any) -> dict[str, int]:
    """Floating-point operations of one caption and one image, by PyTorch's counter, of an aligner as it trains.

    The counter does not count packed layers of a loaded one.

    Args:
        config: The aligner's settings.
        caption: The caption.
        image: The image.

    Returns:
        Numbers of both, by name.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from clipvisionalign.models.aligner import Aligner

    aligner = Aligner(config, load_weights=False).eval()
    counts = {}
    works: dict[str, Callable[[], Any]] = {
        "flops_per_caption": lambda: aligner.encode_captions([caption]),
        "flops_per_picture": lambda: aligner.encode_images([image]),
    }
    for name, work in works.items():
        with FlopCounterMode(display=False) as counter:
            work()
        counts[name] = int(counter.get_total_flops())
    return counts


class EnergyCounter:
    """Energy of the processor's package since the last count, from Linux's powercap; nothing where it reports none."""

    ROOT = Path("/sys/class/powercap")

    def __init__(self) -> None:
        self.readings: dict[str, float] = {}
        self.last = self._read()

    def _read(self) -> dict[Path, tuple[int, int]]:
        zones = {}
        for zone in self.ROOT.glob("intel-rapl:?"):
            try:
                max_energy = int((zone / "max_energy_range_uj").read_text())
                zones[zone] = int((zone / "energy_uj").read_text()), max_energy
            except (OSError, ValueError):
                continue  # there, but not for this user
        return zones

    def record(self, name: str, units: float) -> None:
        """Record the energy since the last record.

        Args:
            name: Of what was done.
            units: Number of units that were done since then, the warm-up too; the energy is kept in joules per unit.
        """
        now = self._read()
        if now:
            used = sum(
                (energy - self.last[zone][0]) % max_energy
                for zone, (energy, max_energy) in now.items()
                if zone in self.last
            )
            self.readings[name] = round(used / 1e6 / units, 3)
        self.last = self._read()


def bytes_of(tensors: Any) -> int:
    """Bytes of all tensors: what is stored to score pairs later.

    Args:
        tensors: A tensor, or tuples and lists of them.

    Returns:
        Bytes.
    """
    if isinstance(tensors, (list, tuple)):
        return sum(bytes_of(item) for item in tensors)
    return 0 if tensors is None else tensors.numel() * tensors.element_size()


def _milliseconds(work: Callable[[], Any], units: float, repeats: int = REPEATS) -> dict[str, float]:
    """Milliseconds per unit: the median of `repeats` after a warm-up, and the fastest and slowest."""
    work()
    durations = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        durations.append(1000 * (time.perf_counter() - start) / units)
    return {
        "median": round(float(np.median(durations)), 4),
        "low": round(min(durations), 4),
        "high": round(max(durations), 4),
    }


def _latency(encode: Callable[[list[Any]], Any], items: Sequence[Any], times: int) -> dict[str, float]:
    """Percentiles of encoding one item at a time, in milliseconds, after three that warm up."""
    durations = []
    for repeat in range(times + 3):
        start = time.perf_counter()
        encode([items[repeat % len(items)]])
        durations.append(1000 * (time.perf_counter() - start))
    p50, p95, p99 = np.percentile(durations[3:], [50, 95, 99])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "p99": round(float(p99), 3)}


def combine_rounds(rounds: Sequence[dict[str, Any]]) -> CostDocument:
    """Several rounds of the same measurement: each number their median, text as in the first; and beside it what is
    compared between variants, of each round: how far one variant's rounds lie apart is its spread.

    Args:
        rounds: What `profile_run` returned for each round, at least one.

    Returns:
        One document.
    """
    costs: dict[str, Any] = _median(list(rounds))
    costs["rounds"] = [_round_costs(each) for each in rounds]
    return cast(CostDocument, costs)


def _round_costs(costs: dict[str, Any]) -> RoundDocument:
    times = ("ms_per_caption", "ms_per_picture", "ms_per_1000_pairs")
    memory = ("peak_memory_mib", "peak_device_memory_mib")
    comparable: dict[str, Any] = {name: costs[name]["median"] for name in times}
    comparable["caption_latency_ms"] = costs["caption_latency_ms"]["p50"]
    comparable["by_length"] = [
        {name: row[name] for name in ("tokens", "ms_alone")} for row in costs.get("by_length", [])
    ]
    return cast(RoundDocument, comparable | {name: costs[name] for name in memory if name in costs})


def _median(values: list[Any]) -> Any:
    sample = values[0]
    if isinstance(sample, dict):
        return {key: _median([value[key] for value in values if key in value]) for key in sample}
    if isinstance(sample, list):
        return [_median(list(items)) for items in zip(*values, strict=False)]
    if isinstance(sample, bool) or not isinstance(sample, (int, float)):
        return sample
    middle = float(np.median(values))
    return int(middle) if isinstance(sample, int) else round(middle, 4)


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
    run, data, split, layout = sys.argv[1:5]
    print(json.dumps(measure_costs(run, data, split, layout, brief="brief" in sys.argv[5:])))
