"""Late interaction over a whole index: recall and time beside the exhaustive ranking, in one run.

    python benchmarks/whole_index.py RUN --data DATA [--split train] [--images 100000] [--queries 200] [--json]

RUN has the design late. The images of the split are encoded; the others are made around them, so that they lie where
images lie: each patch of a new image is 0.7 x that of a real image + 0.3 x the patch at the same place of another, plus
noise of length 0.2, all brought to unit length; vectors alike. Queries are captions of the split, encoded by RUN. Told
of each setting, by the lists of how many centroids a token reads (0: the vectors alone) and the patches of how many
images are read: the share of the exhaustive ranking's first ten that is found, by the model's pair scores and by the
late interaction alone, milliseconds of a query (p50, p99; both ways take turns at each query, words encoded
beforehand), and the ratio to the exhaustive ranking's, which reads all patches by the same code.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.models.io import load_aligner
from clipvisionalign.search.late import LateFiles, LateQuery, LateRecord, LateTerm, rank_images, score_images
from clipvisionalign.search.late.build import write_lists
from clipvisionalign.search.late.files import ARRAYS
from clipvisionalign.search.patch_vectors import patch_settings, stored_patches
from clipvisionalign.search.patches import pack_patches
from clipvisionalign.search.storage import Storage

SETTINGS = ((0, 512), (32, 512), (32, 2048), (64, 2048), (64, 4096), (128, 4096))
COUNT = 10


def unit(array: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return array / np.maximum(np.linalg.norm(array, axis=-1, keepdims=True), 1e-12)


def real_images(aligner: Any, images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (N, D) and patches (N, P, E) of real images, unit length."""
    settings = patch_settings(aligner)
    vectors, patches = [], []
    for chunk in aligner.image_chunks(images):
        vectors.append(chunk.vectors.cpu().numpy())
        patches += stored_patches(aligner, chunk, settings)
    return np.concatenate(vectors), unit(np.stack(patches)).astype(np.float32)


def write_files(folder: Path, vectors: np.ndarray, patches: np.ndarray, count: int, seed: int) -> tuple[LateFiles, Any]:
    """The files of an index of `count` images, and how long the centroids and their lists took."""
    rng = np.random.default_rng(seed)
    target = folder / "late-benchmark"
    target.mkdir()
    real, per_image, width = patches.shape
    codes = np.lib.format.open_memmap(target / "codes.npy", mode="w+", dtype=np.int8, shape=(count * per_image, width))
    all_vectors = np.empty((count, vectors.shape[1]), dtype=np.float32)
    for start in range(0, count, 1024):
        size = min(1024, count - start)
        first = (start + np.arange(size)) % real
        own, own_vectors = patches[first], vectors[first]
        if start + size > real:
            # Made ones; the real ones stand first, as they are.
            second = rng.integers(real, size=size)
            made = start + np.arange(size) >= real

            def around(one: np.ndarray, other: np.ndarray, made: np.ndarray = made) -> np.ndarray:
                noise = 0.2 * unit(rng.standard_normal(one.shape, dtype=np.float32))
                shape = (-1,) + (1,) * (one.ndim - 1)
                return np.where(made.reshape(shape), unit(0.7 * one + 0.3 * other + noise), one).astype(np.float32)

            own, own_vectors = around(own, patches[second]), around(own_vectors, vectors[second])
        all_vectors[start : start + size] = own_vectors
        for number, each in enumerate(own, start):
            packed = np.frombuffer(pack_patches(each), np.int8, offset=2 * per_image)
            codes[number * per_image : (number + 1) * per_image] = packed.reshape(per_image, width)
    norms = np.concatenate([
        1.0 / np.maximum(np.linalg.norm(codes[start : start + 2**18].astype(np.float32), axis=1), 1e-12)
        for start in range(0, len(codes), 2**18)
    ]).astype(np.float32)  # fmt: skip
    arrays = {
        "ids": np.arange(count), "contents": np.zeros(count, dtype=np.int64), "vectors": all_vectors, "norms": norms,
        "offsets": np.arange(count + 1) * per_image, "assigned": np.full(len(codes), -1, dtype=np.int32),
    }  # fmt: skip
    for name, array in arrays.items():
        np.save(target / f"{name}.npy", array)
    codes.flush()
    start_time = time.perf_counter()
    clustered = write_lists(target, None)
    seconds = time.perf_counter() - start_time
    sizes = {name: (target / f"{name}.npy").stat().st_size for name in ARRAYS}
    centroids = len(np.load(target / "centroids.npy", mmap_mode="r"))
    record = LateRecord(target.name, count, len(codes), width, centroids, clustered, 1, 1, sizes)
    return LateFiles(Storage(folder), record), seconds


def read_queries(aligner: Any, captions: list[str]) -> list[LateQuery]:
    """Captions as a search takes them."""
    scale = aligner.scale().item()
    late_scale = aligner.late.scale().item() * aligner.late.weight.item()
    return [
        LateQuery(
            [LateTerm(each.vector.numpy(), each.token_vectors.numpy(), each.token_weights.numpy())], scale, late_scale
        )
        for each in aligner.encode_captions_for_pairs(captions)
    ]


def main() -> None:
    """Measure recall and time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--real", type=int, default=5000, help="real images that are encoded at most")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    aligner = load_aligner(args.run, "cpu")
    data = read_captioned_images(args.data).split(args.split)
    rng = np.random.default_rng(args.seed)
    captions = [data.captions[each] for each in rng.permutation(len(data.captions))[: args.queries]]
    vectors, patches = real_images(aligner, data.images[: min(args.real, args.images)])
    queries = read_queries(aligner, captions)
    with tempfile.TemporaryDirectory() as folder:
        files, seconds = write_files(Path(folder), vectors, patches, args.images, args.seed)
        by_score = {
            "pair scores": measure(files, queries),
            "late interaction alone": measure(files, [replace(query, scale=0.0) for query in queries]),
        }
    about = {
        "run": args.run, "images": args.images, "real": len(vectors), "patches": files.record.patches,
        "width": files.record.width, "centroids": files.record.centroids, "lists_seconds": seconds,
        "bytes_per_image": sum(files.record.sizes.values()) / args.images, "tokens": float(
            np.mean([len(query.terms[0].tokens) for query in queries])),
    }  # fmt: skip
    if args.json:
        print(json.dumps(about | by_score, indent=2))
        return
    print(json.dumps(about))
    for name, result in by_score.items():
        ms = result["exhaustive_ms"]
        print(f"{name}: exhaustive p50 {ms['p50']:.0f} ms, p99 {ms['p99']:.0f} ms")
        print(f"{'lists':>6}{'images':>8}{'recall@10':>11}{'p50':>8}{'p99':>8}{'of exhaustive':>15}")
        for row in result["settings"]:
            print(f"{row['probes']:6}{row['candidates']:8}{row['recall']:11.3f}{row['ms']['p50']:8.1f}"
                  f"{row['ms']['p99']:8.1f}{row['of_exhaustive']:15.3f}")  # fmt: skip


def measure(files: LateFiles, queries: list[LateQuery]) -> dict[str, Any]:
    """Recall and milliseconds of each setting, and of the exhaustive ranking."""
    everything = np.arange(len(files.ids))
    times: dict[Any, list[float]] = {setting: [] for setting in ("all", *SETTINGS)}
    recalls: dict[Any, list[float]] = {setting: [] for setting in SETTINGS}
    for number, query in enumerate(queries):
        start = time.perf_counter()
        scores = score_images(files, query, everything)
        best = np.argpartition(-scores, COUNT)[:COUNT]
        times["all"].append(time.perf_counter() - start)
        for setting in SETTINGS if number % 2 else SETTINGS[::-1]:
            start = time.perf_counter()
            positions, _ = rank_images(files, query, COUNT, probes=setting[0], candidates=setting[1])
            times[setting].append(time.perf_counter() - start)
            recalls[setting].append(len(np.intersect1d(positions, best)) / COUNT)
    ratio = {
        setting: float(np.median(np.array(times[setting]) / np.array(times["all"]))) for setting in SETTINGS
    }  # fmt: skip
    return {
        "exhaustive_ms": percentiles(times["all"]),
        "settings": [
            {"probes": setting[0], "candidates": setting[1], "recall": float(np.mean(recalls[setting])),
             "ms": percentiles(times[setting]), "of_exhaustive": ratio[setting]}
            for setting in SETTINGS
        ],
    }  # fmt: skip


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {"p50": 1e3 * float(np.median(seconds)), "p99": 1e3 * float(np.quantile(seconds, 0.99))}


if __name__ == "__main__":
    main()
