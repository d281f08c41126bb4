"""A pretrained dual encoder beside the library that it comes from: equal outputs, time, memory; in one run.

    python benchmarks/pretrained.py [--size base] [--family clip,siglip,...] [--images FOLDER] [--json]

Random weights of the real size in the real layout. Both sides get the same inputs on the same device in float32 (or
--dtype); they take turns, and each figure is the median of nine turns after a warm-up, a ratio the median of the turns'
own ratios (library / this project, so that more than 1 is quicker). Captions of mixed lengths are those of real data:
5 to 40 tokens. Memory is the peak resident size of a fresh process that loads one side and encodes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from pretrained_models import CAPTIONS, FAMILIES, make_pretrained  # noqa: E402
from test_pretrained import Library, captions_of_every_length, drawn_images  # noqa: E402

TURNS = 9


def ratio_of_turns(ours: Callable[[], Any], theirs: Callable[[], Any], turns: int = TURNS) -> dict[str, float]:
    """Seconds of both, taking turns, and the median of the turns' ratios."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(turns + 1):
        order = [("ours", ours), ("theirs", theirs)]
        for name, call in order if turn % 2 else reversed(order):
            start = time.perf_counter()
            with torch.inference_mode():
                call()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    ratios = np.array(seconds["theirs"]) / np.array(seconds["ours"])
    return {
        "ours_ms": 1e3 * float(np.median(seconds["ours"])), "library_ms": 1e3 * float(np.median(seconds["theirs"])),
        "ratio": float(np.median(ratios)), "lowest": float(ratios.min()), "highest": float(ratios.max()),
    }  # fmt: skip


def mixed_captions(count: int) -> list[str]:
    """Captions of 5 to 40 tokens, as real data has them: most of them short."""
    words = " ".join(CAPTIONS).split()
    generator = np.random.default_rng(0)
    lengths = np.clip(np.round(generator.gamma(6, 1.9, count)), 3, 38).astype(int)
    return [" ".join(generator.choice(words, length)) for length in lengths]


def library_text(library: Library, captions: list[str]) -> Callable[[], torch.Tensor]:
    """The library's own way from tokens to vectors; tokenising is left out of both sides' time."""
    if library.is_open_clip:
        ids = library.tokenizer(captions)
        return lambda: library.model.encode_text(ids, normalize=True)
    is_fixed = "sig" in library.family or library.family == "naflex"
    padding = {"padding": "max_length", "max_length": 64} if is_fixed else {"padding": True}
    inputs = library.tokenizer(captions, truncation=True, return_tensors="pt", **padding)
    return lambda: F.normalize(library.model.get_text_features(**inputs).pooler_output, dim=-1)


def library_images(library: Library, transform: Any, packed: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The library's own way from pixels to vectors."""
    if library.is_open_clip:
        pixels = transform.normalize(packed)
        return lambda: library.model.encode_image(pixels, normalize=True)
    if library.family == "naflex":
        patches, mask, grids = transform.unpack(packed)
        inputs = {"pixel_values": patches, "pixel_attention_mask": mask.int(), "spatial_shapes": grids}
    else:
        inputs = {"pixel_values": transform.normalize(packed)}
    return lambda: F.normalize(library.model.get_image_features(**inputs).pooler_output, dim=-1)


def measure(family: str, folder: Path, images: list[Any]) -> dict[str, Any]:
    """All rows of one family."""
    from clipvisionalign.models.io import load_aligner

    aligner, library = load_aligner(folder), Library(folder, family)
    result: dict[str, Any] = {"family": family, "parameters": aligner.parameter_count()}
    captions = [*captions_of_every_length(), *mixed_captions(22)]
    result["captions_difference"] = float((aligner.encode_captions(captions) - library.text(captions)).abs().max())
    cosines = (aligner.encode_images(images) * library.images(images)).sum(dim=1)
    result["files_cosine"] = float(cosines.min())
    transform = aligner.image_tower.image_transform
    packed = torch.stack([transform.image_loader()(image) for image in images])
    with torch.inference_mode():
        ours = aligner.embed_image_features(aligner.image_tower(packed)).vectors
        theirs = library_images(library, transform, packed)()
        result["pixels_difference"] = float((ours - theirs).abs().max())
        bias = 0.0 if aligner.logit_bias is None else aligner.logit_bias
        logits = ours @ aligner.encode_captions(captions).T * aligner.scale() + bias
        scale = library.model.logit_scale.exp()
        library_bias = getattr(library.model, "logit_bias", None)
        expected = theirs @ library.text(captions).T * scale + (0.0 if library_bias is None else library_bias)
        result["logits_difference_by_scale"] = float((logits - expected).abs().max() / scale)
    for batch in (1, 32):
        pixels = transform.random_pixels(batch)
        result[f"images_{batch}"] = ratio_of_turns(
            lambda pixels=pixels: aligner.embed_image_features(aligner.image_tower(pixels)),
            library_images(library, transform, pixels),
        )
        same = ["a brown dog runs over the green grass after a red ball"] * batch
        tokens = aligner.text_tower.tokenize(same)
        result[f"captions_{batch}"] = ratio_of_turns(
            lambda tokens=tokens: aligner.encode_tokens(tokens), library_text(library, same)
        )
    mixed = mixed_captions(64)
    tokens = aligner.text_tower.tokenize(mixed)
    result["captions_mixed_64"] = ratio_of_turns(lambda: aligner.encode_tokens(tokens), library_text(library, mixed))
    result["peak_mib"] = {side: peak_memory(family, folder, side) for side in ("ours", "library")}
    return result


def peak_memory(family: str, folder: Path, side: str) -> float:
    """MiB of a fresh process that loads one side and encodes 32 images and 64 captions."""
    command = [sys.executable, __file__, "--peak", side, "--family", family, "--folder", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.splitlines()[-1])


def print_peak(family: str, folder: Path, side: str) -> None:
    """The peak of this process."""
    from clipvisionalign.models.io import load_aligner
    from clipvisionalign.study.profile import peak_memory

    captions, images = mixed_captions(64), drawn_images(32)
    with torch.inference_mode():
        if side == "ours":
            aligner = load_aligner(folder)
            aligner.encode_images(images), aligner.encode_captions(captions)
        else:
            library = Library(folder, family)
            library.images(images), library.text(captions)
    # Not by `getrusage`, which counts the memory of the process that started this one.
    print(peak_memory() / 2**20)


def table(results: list[dict[str, Any]]) -> str:
    """A line a family."""
    lines = [
        "library / ours:                                   image           caption          captions  MiB",
        "family          vectors    logits     files      1    32       1    32    of mixed lengths  ours, library",
    ]
    for row in results:
        difference = max(row["captions_difference"], row["pixels_difference"])
        image_1, image_32, caption_1, caption_32, mixed = (
            row[key]["ratio"] for key in ("images_1", "images_32", "captions_1", "captions_32", "captions_mixed_64")
        )
        lines.append(
            f"{row['family']:14s} {difference:8.1e} {row['logits_difference_by_scale']:9.1e} "
            f"{row['files_cosine']:9.6f} "
            f"{image_1:6.2f} {image_32:5.2f} {caption_1:7.2f} {caption_32:5.2f} {mixed:19.2f}  "
            f"{row['peak_mib']['ours']:,.0f}, {row['peak_mib']['library']:,.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the families asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("tiny", "base"), default="base", help="of the towers (default: %(default)s)")
    parser.add_argument("--family", default=",".join(FAMILIES), help="families, with commas (default: all)")
    parser.add_argument("--images", default="", help="a folder of images; 20 of them are encoded from their files")
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=("ours", "library"), help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.peak:
        print_peak(args.family, Path(args.folder), args.peak)
        return
    from PIL import Image

    images: list[Any] = drawn_images(20)
    if args.images:
        images = [Image.open(path).convert("RGB") for path in sorted(Path(args.images).iterdir())[:20]]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for family in args.family.split(","):
            model = make_pretrained(family, Path(folder) / family, args.size)
            results.append(measure(family, model, images))
            if not args.json:
                print(table(results) if len(results) == 1 else table(results[-1:]).splitlines()[-1], flush=True)
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
