"""What a training step costs: beside the plain loop of small CLIP scripts and open_clip's, in one run.

    python benchmarks/training.py [--data flickr8k] [--only step,loader,cache] [--json]

- `step`: ResNet50 and DistilBERT with random weights, 224 pixels, the same images with their captions. The rivals
  see a row for each caption, so that an image is encoded once per caption, padded to a fixed length (64 in small
  scripts, 77 in open_clip), in float32, NCHW, with AdamW unfused. Captions a second, and which share of the machine's
  own rate of matrix products a step reaches.
- `loader`: images a second that two workers decode, resize and batch, beside Pillow with torchvision's v1 transforms.
- `cache`: what gradient caching costs in time, and what a batch of 4,096 takes in memory beside one of 256.

Without --data the captions are those of drawn scenes. Contestants take turns; medians with fastest and slowest.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import FEW, LONG, TURNS, peak, ratio, spread, summary
from timing import take_turns as turns_of
from training_steps import PlainModel, open_clip_model, open_train, our_step, plain_loss, rival_step, rows

SECTIONS = ("step", "loader", "cache")

take_turns = partial(turns_of, gradients=True)


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP a second of the largest matrix product, the best of several."""
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(taken[2:])


# --- sections --------------------------------------------------------------------------------------------------------


def step(folder: Path, data: str, images: int) -> dict[str, Any]:
    """Steps in turns; then what each tower reaches of the machine's rate."""
    import open_clip
    from torch.utils.flop_counter import FlopCounterMode

    train = open_train(data, folder)
    formats = [torch.float32, torch.bfloat16]
    works: dict[str, Callable[[], Any]] = {}
    steps, captions = {}, 0
    for dtype in formats:
        name = f"here, {short(dtype)}"
        works[name], steps[dtype], captions = our_step(folder, train, images, (dtype, dtype))
    pixels, ids = rows(train, images, folder, 64)
    works["plain loop, float32"] = rival_step(PlainModel(folder), plain_loss, pixels, ids, torch.float32)
    pixels, ids = rows(train, images, folder, 77)
    loss = open_clip.ClipLoss()
    for dtype in formats:
        model = open_clip_model(folder)
        works[f"open_clip, {short(dtype)}"] = rival_step(model, loss, pixels, ids, dtype)
    seconds = take_turns(works)
    result: dict[str, Any] = {
        "images": images, "captions": captions, "ms": {name: summary(taken) for name, taken in seconds.items()},
        "captions per second": {name: captions / float(np.median(taken)) for name, taken in seconds.items()},
    }  # fmt: skip
    pairs = [
        ("plain loop, float32", "here, float32"), ("plain loop, float32", "here, bfloat16"),
        ("open_clip, float32", "here, float32"), ("open_clip, float32", "here, bfloat16"),
        ("open_clip, bfloat16", "here, bfloat16"),
    ]  # fmt: skip
    result["ratios"] = {f"{rival} over {ours}": ratio(seconds[rival], seconds[ours]) for rival, ours in pairs}
    result["rate"] = {}
    for dtype in formats:
        one, work = steps[dtype], works[f"here, {short(dtype)}"]
        with FlopCounterMode(display=False) as counter:
            work()
        counts = counter.get_flop_counts()
        towers = dict.fromkeys(("image_tower", "text_tower"), 0.0)
        for kind in towers:
            towers[kind] = float(sum(counts.get(f"Towers.aligner.{kind}", {}).values()))
        one.timings.pop()
        turns = len(seconds[f"here, {short(dtype)}"])
        for _ in range(turns):
            work()
        taken = {kind: value / turns for kind, value in one.timings.pop().items()}
        rate = matrix_rate(dtype)
        flops = float(counter.get_total_flops())
        result["rate"][short(dtype)] = {
            "matrix product, GFLOP/s": rate / 1e9,
            "step, GFLOP": flops / 1e9,
            "share": flops / taken["all"] / rate,
            "image tower, share": towers["image_tower"] / taken["image tower"] / rate,
            "text tower, share": towers["text_tower"] / taken["text tower"] / rate,
            "seconds": taken,
        }
    return result


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class PlainImages(torch.utils.data.Dataset[Any]):
    """The data set of small scripts: Pillow and torchvision's v1 transforms, one image a row."""

    def __init__(self, paths: list[Any]) -> None:
        from torchvision import transforms

        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(224, (0.5, 1.0)), transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.2, 0.2, 0.2), transforms.ToTensor(), transforms.Normalize(0.5, 0.5),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        image = self.paths[index]
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return self.transform(opened.convert("RGB"))


def loader(folder: Path, data: str) -> dict[str, Any]:
    """Images a second of two workers, with nothing beside them."""
    from torch.utils.data import DataLoader

    from clipvisionalign.data.batches import CaptionedBatches
    from clipvisionalign.images import ImageTransform

    train = open_train(data, folder)
    count = len(train) // 32 * 32
    transform = ImageTransform(224).image_loader(augment=True, flip=0.5)
    batches = CaptionedBatches(train, lambda captions: [[1] * 12 for _ in captions], 0, transform)
    dealt = batches.plan_epoch(32, 1, 0)[:30]
    indices = [index for _, some in dealt for index in some]
    plain = PlainImages([train.rows[index].image for index in indices])

    def ours() -> None:
        for _ in batches.load(dealt, workers=2):
            pass

    def theirs() -> None:
        for _ in DataLoader(plain, batch_size=32, num_workers=2):
            pass

    seconds = take_turns({"here": ours, "plain": theirs})
    speeds = {name: len(indices) / float(np.median(taken)) for name, taken in seconds.items()}
    return {"pictures": min(count, len(indices)), "pictures per second": speeds,
            "plain over here": ratio(seconds["plain"], seconds["here"])}  # fmt: skip


def cached_step(images: int, chunk: int, data: str, folder: Path) -> tuple[Callable[[], Any], int]:
    """A step of `images` with one caption each, in chunks, or whole; EfficientNet-Lite0 and MiniLM."""
    from dataclasses import replace

    from clipvisionalign.data.batches import CaptionedBatches
    from clipvisionalign.models.aligner import Aligner, AlignerConfig
    from clipvisionalign.models.image_tower import ImageTowerConfig
    from clipvisionalign.training.contrastive import DualEncoderLoss, LossConfig
    from clipvisionalign.training.distributed import Distributed
    from clipvisionalign.training.fine_tuning import set_train_mode
    from clipvisionalign.training.forward import PrecomputedFeatures, Towers
    from clipvisionalign.training.step import Step

    torch.manual_seed(0)
    aligner = Aligner(AlignerConfig(image_tower=ImageTowerConfig(size=128)))
    set_train_mode(aligner, "none")
    formats = (torch.float32, torch.float32)
    one = Step(Towers(aligner, DualEncoderLoss(LossConfig()), formats), Distributed(torch.device("cpu")))
    train = open_train(data, folder)
    # Images come again where there are not enough of them: they are not what is measured.
    some = [replace(train.rows[n % len(train)], name=str(n), captions=train.rows[n % len(train)].captions[:1])
            for n in range(images)]  # fmt: skip
    tower = aligner.text_tower
    batches = CaptionedBatches(
        replace(train, rows=some), tower.tokenize, tower.pad, aligner.image_tower.image_transform.image_loader()
    )
    dealt = batches.plan_epoch(images, 1, 0, chunk_size=chunk)
    chunks = -(-images // chunk) if chunk else 0

    def stream() -> Iterator[Any]:
        yield from batches.load(dealt)

    def work() -> None:
        one.backward_cached(stream(), chunks, lambda batch: PrecomputedFeatures()) if chunk else one.backward(
            next(stream()), PrecomputedFeatures()
        )
        one.towers.zero_grad(set_to_none=True)

    return work, images


def cache(folder: Path, data: str) -> dict[str, Any]:
    """Time beside plain steps, and memory by batch."""
    cached, _ = cached_step(512, 64, data, folder)
    plain, _ = cached_step(64, 0, data, folder)
    seconds = take_turns({"512 in chunks of 64": cached, "8 steps of 64": lambda: [plain() for _ in range(8)]})
    result: dict[str, Any] = {
        "ms": {name: summary(taken) for name, taken in seconds.items()},
        "chunks over plain steps": ratio(seconds["512 in chunks of 64"], seconds["8 steps of 64"]),
    }
    memory = {}
    for images in (256, 4096):
        command = [sys.executable, __file__, "--one", str(images), data, str(folder)]
        memory[images] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    result["peak MiB"] = memory
    result["4,096 over 256"] = memory[4096] / memory[256]
    return result


# --- for people ------------------------------------------------------------------------------------------------------


def tell(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; medians [fastest, slowest] of {TURNS} turns, {FEW} of above {LONG:.0f} s")
    if "step" in result:
        section = result["step"]
        print(f"\na step of {section['images']} images with {section['captions']} captions, ResNet50 and DistilBERT")
        for name, taken in section["ms"].items():
            print(
                f"  {name:<24} {taken['median']:>9.0f} ms, {section['captions per second'][name]:>6.1f} "
                "captions a second"
            )
        for name, value in section["ratios"].items():
            print(f"  {name:<45} {spread(value)}")
        for dtype, rate in section["rate"].items():
            shares = (f"{part} {100 * rate[f'{part}, share']:.0f} %" for part in ("image tower", "text tower"))
            print(
                f"  {dtype}: {rate['step, GFLOP']:.0f} GFLOP a step; {100 * rate['share']:.0f} % of the machine's "
                f"{rate['matrix product, GFLOP/s']:.0f} GFLOP/s; {', '.join(shares)}"
            )
    if "loader" in result:
        section = result["loader"]
        text = ", ".join(f"{name} {speed:.0f}" for name, speed in section["pictures per second"].items())
        print(f"\npictures a second, two workers: {text}; plain over here {spread(section['plain over here'], 2)}")
    if "cache" in result:
        section = result["cache"]
        print(
            "\ngradient caching: 512 in chunks of 64 over 8 steps of 64 "
            f"{spread(section['chunks over plain steps'], 2)}"
        )
        text = ", ".join(f"{images} images {mib:.0f} MiB" for images, mib in section["peak MiB"].items())
        print(f"  peak memory in chunks of 64: {text}; {section['4,096 over 256']:.2f} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="", help="a captioned data set (default: drawn scenes)")
    parser.add_argument(
        "--images", type=int, default=8, help="pictures of a step (default 8; 16 take the rivals 15 GiB)"
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        images, data, folder = given.one
        cached_step(int(images), 64, data, Path(folder))[0]()
        print(peak() / 2**20)
        return
    from clipvisionalign.models.device import machine_info

    sections = {"step": partial(step, images=given.images), "loader": loader, "cache": cache}
    chosen = given.only.split(",")
    if unknown := set(chosen) - set(sections):
        parser.error(f"no section '{', '.join(sorted(unknown))}'; there are {', '.join(SECTIONS)}")
    where = machine_info()
    result: dict[str, Any] = {"machine": f"{where['processor']}, {where['threads']} threads, {where['instructions']}"}
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            print(f"{name} ...", file=sys.stderr, flush=True)
            result[name] = sections[name](Path(folder), given.data)
    print(json.dumps(result, indent=2)) if given.json else tell(result)


if __name__ == "__main__":
    from clipvisionalign.progress import progress_step

    with progress_step("benchmarks/training.py", in_terminal=False):
        main()
