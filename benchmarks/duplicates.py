"""Duplicates among a million images: precision and recall of each kind, minutes, memory.

    python benchmarks/duplicates.py --images FOLDER [--vectors 1000000] [--planted 5000] [--run starter] [--json]

A seventh as many images of FOLDER as are planted are the originals. Planted of each, all written and encoded by the
model: the same bytes, resized, recompressed, cropped a little; and look-alikes that are none: mirrored, with something
else in a corner, another frame (another part of the scene at the same size, a little brighter). All other vectors are
drawn around those of the originals:

    v = unit(c x original + sqrt(1 - c^2) x unit(8 originals, weighted by normal numbers)),  c uniform in [0.3, 0.9]

and every fiftieth at a cosine of about 0.95 from the one before, as frames of a scene are. The image of a drawn vector
is a corner of its original, of 55 to 65 % of its sides, of those fiftieths the opposite one; it is decoded and cut when
it is compared, as any file would be.

A planted copy is recalled if it is in a group of its kind with its original. Precision is the share of pairs of images
in groups of a kind that are copies of one original. The search itself runs in this process, without PyTorch, once cold
and once with what the first left beside the index.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

COPIES = ("bytes", "resized", "recompressed", "cropped")
LOOK_ALIKES = ("mirrored", "corner", "frame")
KINDS = (*COPIES, *LOOK_ALIKES)
ENCODE = """
import sys
from pathlib import Path
import numpy as np
from clipvisionalign.models.io import load_aligner
files = [Path(line) for line in Path(sys.argv[2]).read_text().split("\\n")]
np.save(sys.argv[3], np.asarray(load_aligner(sys.argv[1]).encode_images(files)))
"""


def plant(kind: str, source: Path, target: Path, rng: np.random.Generator) -> Path:
    """Write a copy or a look-alike of an image."""
    if kind == "bytes":
        target.write_bytes(source.read_bytes())
        return target
    image = Image.open(source).convert("RGB")
    width, height = image.size
    if kind == "resized":
        scale = rng.uniform(0.3, 0.9)
        image = image.resize((round(scale * width), round(scale * height)), Image.Resampling.LANCZOS)
    elif kind == "cropped":
        left, top, right, bottom = rng.uniform(0, 0.06, 4) * (width, height, width, height)
        image = image.crop((round(left), round(top), round(width - right), round(height - bottom)))
    elif kind == "mirrored":
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    elif kind == "corner":
        size = (width // 10, height // 10)
        corner = (width - size[0] - 8, height - size[1] - 8)
        mean = np.asarray(image.crop((*corner, width - 8, height - 8))).mean(axis=(0, 1))
        fill = tuple((255 - mean.astype(int)).tolist())
        ImageDraw.Draw(image).rectangle((*corner, width - 8, height - 8), fill=fill)
    elif kind == "frame":
        left, top = rng.uniform(0.05, 0.3, 2) * (width, height)
        part = image.crop((round(left), round(top), round(left + 0.7 * width), round(top + 0.7 * height)))
        image = ImageEnhance.Brightness(part.resize((width, height), Image.Resampling.LANCZOS)).enhance(1.06)
    image.save(target, "JPEG", quality=int(rng.integers(25, 75)) if kind == "recompressed" else 92)
    return target


def drawn_vectors(originals: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (count, D) around originals, and the number of the original of each."""

    def noise(number: int) -> np.ndarray:
        weights = rng.normal(size=(number, 8, 1)).astype(np.float32)
        return unit((weights * originals[rng.integers(len(originals), size=(number, 8))]).sum(axis=1))

    vectors = np.empty((count, originals.shape[1]), dtype=np.float32)
    sources = rng.integers(len(originals), size=count)
    sources[49::50] = sources[48::50][: len(sources[49::50])]
    for start in range(0, count, 50_000):
        rows = np.s_[start : min(start + 50_000, count)]
        number = rows.stop - rows.start
        nearness = rng.uniform(0.3, 0.9, size=(number, 1)).astype(np.float32)
        vectors[rows] = unit(nearness * originals[sources[rows]] + np.sqrt(1 - nearness**2) * noise(number))
        frames = vectors[rows][48::50][: len(vectors[rows][49::50])]
        vectors[rows][49::50] = unit(0.95 * frames + np.sqrt(1 - 0.95**2) * noise(len(frames)))
    return vectors, sources


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), dtype=np.float32)


def drawn_image(source: Path, row: int) -> Image.Image:
    """A corner of an image: of every fiftieth row the one opposite to that of the row before."""
    image = Image.open(source).convert("RGB")
    width, height = image.size
    pair = row - 1 if row % 50 == 49 else row
    rng = np.random.default_rng(pair)
    right, low = rng.integers(2, size=2)
    if row != pair:
        right, low = 1 - right, 1 - low
    share = rng.uniform(0.55, 0.65)
    part = (round(share * width), round(share * height))
    left, top = right * (width - part[0]), low * (height - part[1])
    return image.crop((left, top, left + part[0], top + part[1]))


class World:
    """Files and vectors of a collection, with what is a copy of what."""

    def __init__(self, images: Path, folder: Path, count: int, planted: int, run: str, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        originals = -(-planted // len(KINDS))
        files = sorted(path for path in images.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        if len(files) < originals:
            raise SystemExit(f"{images}: {len(files)} images; {originals} are needed for --planted {planted}")
        chosen = [files[each] for each in sorted(rng.choice(len(files), originals, replace=False).tolist())]
        self.files, self.kinds, self.original = [], ["original"] * originals, list(range(originals))
        for number, file in enumerate(chosen):
            self.files.append(plant("bytes", file, folder / f"{number:05}-original.jpg", rng))
        for number in range(planted):
            kind, original = KINDS[number // originals], number % originals
            self.files.append(plant(kind, self.files[original], folder / f"{original:05}-{kind}.jpg", rng))
            self.kinds.append(kind)
            self.original.append(original)
        listed, saved = folder / "files.txt", folder / "vectors.npy"
        listed.write_text("\n".join(map(str, self.files)))
        subprocess.run([sys.executable, "-c", ENCODE, run, str(listed), str(saved)], check=True)
        encoded = unit(np.load(saved))
        for file in (listed, saved):
            file.unlink()
        vectors, self.sources = drawn_vectors(encoded[:originals], max(0, count - len(encoded)), rng)
        self.vectors = np.concatenate([encoded, vectors])
        self.folder = folder

    def rows(self) -> Any:
        """The rows as an index has them."""
        import pyarrow as arrow

        from clipvisionalign.search.duplicates.rows import IndexRows
        from clipvisionalign.search.storage import content_hash

        names = [file.name for file in self.files] + [f"drawn/{number:07}.jpg" for number in range(len(self.sources))]
        hashes = [content_hash(file) for file in self.files] + [f"{number:032x}" for number in range(len(self.sources))]
        sizes = np.array([Image.open(file).size for file in self.files] + [(300, 200)] * len(self.sources))
        count = len(names)
        columns = {
            "id": np.arange(count), "path": names, "raw": [name.encode() for name in names], "hash": hashes,
            "size": [file.stat().st_size for file in self.files] + [1] * len(self.sources),
            "mtime_ns": np.zeros(count, dtype=np.int64), "width": sizes[:, 0], "height": sizes[:, 1],
        }  # fmt: skip
        self.by_hash = {hash_: row for row, hash_ in enumerate(hashes)}
        return IndexRows({name: arrow.array(values) for name, values in columns.items()}, self.vectors)

    def read(self, hashes: np.ndarray) -> Any:
        """A reader of the pixels by the position of a content among the sorted hashes."""
        from clipvisionalign.search.duplicates.appearance import thumbnail_of
        from clipvisionalign.search.duplicates.verification import read_thumbnails

        def reader(position: int) -> tuple[np.ndarray, tuple[int, int]]:
            row = self.by_hash[str(hashes[position])]
            if row < len(self.files):
                return read_thumbnails(self.files[row].read_bytes())
            drawn = row - len(self.files)
            image = drawn_image(self.files[self.sources[drawn]], drawn)
            return thumbnail_of(image), image.size

        return reader


def evaluate(world: World, report: Any) -> dict[str, Any]:
    """Precision and recall of each kind."""
    group_of: dict[str, dict[int, int]] = {"bytes": {}, "nearly": {}}
    right, pairs, look_alikes = ({"bytes": 0, "nearly": 0} for _ in range(3))
    original = world.original + [-1 - row for row in range(len(world.sources))]
    kinds = world.kinds + ["drawn"] * len(world.sources)
    copies = ("original", *COPIES)
    for number, group in enumerate(report.groups):
        group_of[group.kind].update({image.id: number for image in group.images})
        for first, second in combinations([image.id for image in group.images], 2):
            same = original[first] == original[second]
            is_right = same and kinds[first] in copies and kinds[second] in copies
            pairs[group.kind] += 1
            right[group.kind] += is_right
            look_alikes[group.kind] += same and not is_right
    # A kept image of equal bytes stands for all of them.
    stands_for = {image.id: group.images[0].id for group in report.of_kind("bytes") for image in group.images}
    counted = {kind: [0, 0] for kind in KINDS}
    for row in range(world.kinds.count("original"), len(world.kinds)):
        kind, group_kind = world.kinds[row], "bytes" if world.kinds[row] == "bytes" else "nearly"
        ids = [each if kind == "bytes" else stands_for.get(each, each) for each in (row, world.original[row])]
        groups = [group_of[group_kind].get(each, -1 - each) for each in ids]
        counted[kind][0] += groups[0] == groups[1]
        counted[kind][1] += 1
    return {
        "recall": {kind: round(counted[kind][0] / max(1, counted[kind][1]), 4) for kind in COPIES},
        "taken_for_copies": {kind: round(counted[kind][0] / max(1, counted[kind][1]), 4) for kind in LOOK_ALIKES},
        "planted": {kind: counted[kind][1] for kind in KINDS},
        "precision": {kind: round(right[kind] / max(1, pairs[kind]), 4) for kind in pairs},
        "pairs_in_groups": pairs,
        "wrong_pairs": {kind: pairs[kind] - right[kind] for kind in pairs},
    }


def neighbour_recall(vectors: np.ndarray, pairs: np.ndarray, threshold: float, seed: int = 1) -> float:
    """The share of the pairs of 300 vectors, compared with all, that are candidates."""
    rows = np.random.default_rng(seed).choice(len(vectors), min(300, len(vectors)), replace=False)
    candidates = set(map(tuple, pairs.tolist()))
    recalled = count = 0
    for row in rows.tolist():
        others = set(np.flatnonzero(vectors @ vectors[row] >= threshold).tolist()) - {row}
        recalled += sum((min(row, other), max(row, other)) in candidates for other in others)
        count += len(others)
    return recalled / max(1, count)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from clipvisionalign.search.duplicates.cache import ComparisonCache
    from clipvisionalign.search.duplicates.finder import DuplicateFinder
    from clipvisionalign.search.storage import Storage

    for name in ("images", "index"):
        (folder / name).mkdir()
    world = World(Path(args.images), folder / "images", args.vectors, args.planted, args.run)
    rows = world.rows()
    hashes = np.unique(np.array(rows.columns["hash"].to_pylist(), dtype=str))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results: dict[str, Any] = {"vectors": len(world.vectors), "width": world.vectors.shape[1], "near": args.near}
    near_original = np.einsum("nd,nd->n", world.vectors[: len(world.kinds)], world.vectors[world.original])
    cosines = {kind: near_original[np.array(world.kinds) == kind] for kind in KINDS if kind != "bytes"}
    results["cosine_with_original"] = {
        kind: {"p1": round(float(np.percentile(each, 1)), 3), "p50": round(float(np.percentile(each, 50)), 3)}
        for kind, each in cosines.items() if len(each)
    }  # fmt: skip
    for call in ("first", "second"):
        cache = ComparisonCache(Storage(folder / "index"))
        start = time.perf_counter()
        finder = DuplicateFinder(
            rows, Storage(folder / "images"), cache, "", args.near, world.read(hashes), show_progress=not args.json
        )
        report = finder.report(set())
        results[f"{call}_call"] = {
            "minutes": round((time.perf_counter() - start) / 60, 3),
            "seconds": {name: round(seconds, 1) for name, seconds in report.seconds.items()},
            "decoded": report.decoded,
        }
        if call == "first":
            results |= {"pairs": report.pairs, "full": report.full, **evaluate(world, report)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    results["memory_gb"] = {"vectors_and_rows": round(before, 2), "peak": round(peak, 2)}
    order = np.array([world.by_hash[hash_] for hash_ in hashes.tolist()])
    candidates = finder.candidate_pairs(hashes, world.vectors[order])
    results["neighbour_recall"] = round(neighbour_recall(world.vectors[order], candidates.pairs, args.near), 4)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, metavar="FOLDER")
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--planted", type=int, default=5000)
    parser.add_argument("--run", default="starter")
    parser.add_argument("--near", type=float, default=0.9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(
        f"{results['vectors']:,} vectors of width {results['width']}, compared by pixels from a cosine of {args.near}"
    )
    for kind in COPIES:
        print(f"  {kind:13} recall {results['recall'][kind]:.4f} of {results['planted'][kind]:,}")
    for kind in LOOK_ALIKES:
        share, count = results["taken_for_copies"][kind], results["planted"][kind]
        print(f"  {kind:13} taken for copies {share:.4f} of {count:,}")
    for kind, precision in results["precision"].items():
        wrong, pairs = results["wrong_pairs"][kind], results["pairs_in_groups"][kind]
        print(f"  {kind:13} precision {precision:.4f}: {wrong:,} of {pairs:,} pairs wrong")
    print(f"candidate pairs: {results['pairs']}; share of all true ones: {results['neighbour_recall']:.4f}")
    for kind, each in results["cosine_with_original"].items():
        print(f"  {kind:13} cosine with the original: median {each['p50']:.3f}, 1st percentile {each['p1']:.3f}")
    for call in ("first", "second"):
        each = results[f"{call}_call"]
        print(f"{call} call: {each['minutes']:.2f} min {each['seconds']}, {each['decoded']:,} images decoded")
    memory = results["memory_gb"]
    print(f"memory: {memory['peak']:.2f} GB at most, of it {memory['vectors_and_rows']:.2f} before the search")


if __name__ == "__main__":
    main()
