"""Search: what an index finds and how fast, beside LanceDB's flat search and USearch's HNSW, in one run.

    python benchmarks/search.py [--vectors 200000] [--run RUN] [--json]

Vectors are made up: unit length, width 256, in clusters as those of images are, with near neighbours planted for 200
queries. With --run also whole searches by words, encoding included, and the rate of indexing against the image
tower's own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, QUERIES, FIRST = 256, 200, 10


def made_up(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (count, D) and queries (200, D), each with a near neighbour among them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(2000, WIDTH)).astype(np.float32)
    vectors = np.empty((count, WIDTH), dtype=np.float32)
    for start in range(0, count, 50_000):
        rows = slice(start, min(start + 50_000, count))
        number = rows.stop - rows.start
        vectors[rows] = centres[rng.integers(len(centres), size=number)] + rng.normal(size=(number, WIDTH)) * 0.8
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[rng.choice(count, QUERIES, replace=False)]
    queries = queries + rng.normal(size=queries.shape).astype(np.float32) * 0.5 / np.sqrt(WIDTH)
    return vectors, (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def exact(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The true first ten (200, 10)."""
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :FIRST]


def timed(search: Any, queries: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Recall of the first ten, and milliseconds of one query at a time."""
    for query in queries[:5]:
        search(query)
    taken, hits = [], []
    for query, true in zip(queries, right, strict=True):
        start = time.perf_counter()
        ids = search(query)
        taken.append(1000 * (time.perf_counter() - start))
        hits.append(len(set(ids) & set(true.tolist())) / FIRST)
    p50, p99 = np.percentile(taken, [50, 99])
    return {
        "recall_at_10": round(float(np.mean(hits)), 4),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
    }


def indexed(vectors: np.ndarray, folder: Path, sizes: tuple[int, int]) -> tuple[Any, float, dict[str, Any]]:
    """A table as `index` makes it, the seconds that its approximate index took, and what it says of itself."""
    import pyarrow as arrow

    from clipvisionalign.search.ann import build_ann_index
    from clipvisionalign.search.manifest import IndexManifest, write_manifest
    from clipvisionalign.search.storage import Storage
    from clipvisionalign.search.tables import create_image_table

    manifest, storage = IndexManifest("", "", "", WIDTH), Storage(folder)
    write_manifest(storage, manifest)
    table = create_image_table(storage, WIDTH)
    for start in range(0, len(vectors), 50_000):
        part = vectors[start : start + 50_000]
        ids = np.arange(start, start + len(part))
        names = [f"{number}.jpg" for number in ids]
        columns = {
            "id": ids, "path": names, "raw": [name.encode() for name in names], "size": ids, "mtime_ns": ids,
            "hash": names, "width": np.full(len(part), 224, np.int32), "height": np.full(len(part), 224, np.int32),
            "thumbnail": [b""] * len(part),
            "vector": arrow.FixedSizeListArray.from_arrays(arrow.array(part.reshape(-1)), WIDTH),
        }  # fmt: skip
        table.add(arrow.table(columns, schema=table.schema))
    start_time = time.perf_counter()
    build_ann_index(table, storage, manifest, len(vectors), sizes=sizes)
    return (
        table,
        time.perf_counter() - start_time,
        {"kind": manifest.kind, "recall": manifest.recall, **manifest.settings},
    )


def searches(table: Any, folder: Path, kind: str, columns: tuple[str, ...] = ("id",)) -> Any:
    """How an index is searched, (query, count) -> rows: by its mapped files where it has some, else by its table."""
    from clipvisionalign.search.ann import search_table
    from clipvisionalign.search.mapped import MappedReader
    from clipvisionalign.search.storage import Storage
    from clipvisionalign.search.tables import read_image_table

    reader = MappedReader(Storage(folder), read_image_table(folder))

    def search(query: np.ndarray, count: int) -> list[dict[str, Any]]:
        rows = reader.nearest(query, count, columns)
        return search_table(table, query, count, kind, columns) if rows is None else rows

    return search


def usearch_of(vectors: np.ndarray) -> tuple[Any, float]:
    from usearch.index import Index

    start = time.perf_counter()
    index = Index(ndim=WIDTH, metric="ip", dtype="f32", connectivity=24, expansion_add=200, expansion_search=200)
    index.add(np.arange(len(vectors)), vectors)
    return index, time.perf_counter() - start


def end_to_end_searches(run: str, table_folder: Path, queries: int = 200) -> dict[str, float]:
    """Searches by words, encoding included, in milliseconds."""
    from clipvisionalign.models.io import load_aligner
    from clipvisionalign.search.hits import HIT_COLUMNS
    from clipvisionalign.search.manifest import read_manifest
    from clipvisionalign.search.tables import open_image_table

    aligner, table = load_aligner(run), open_image_table(table_folder)
    search = searches(table, table_folder, read_manifest(table_folder).kind, HIT_COLUMNS)
    vocabulary = "a dog runs on the grass while two people watch a red ball in the water near trees".split()  # noqa: SIM905
    rng = np.random.default_rng(0)
    taken = []
    for turn in range(queries + 10):
        text = " ".join(rng.choice(vocabulary, size=8))
        start = time.perf_counter()
        search(aligner.encode_captions([text])[0].numpy(), 20)
        if turn >= 10:
            taken.append(1000 * (time.perf_counter() - start))
    return {f"p{p}_ms": round(float(np.percentile(taken, p)), 1) for p in (50, 95, 99)}


def indexing_rate(run: str, image_folder: str, folder: Path) -> dict[str, float]:
    """Images a second of `index`, and of the image tower alone on the same images, decoded beforehand."""
    import torch

    from clipvisionalign.models.io import load_aligner
    from clipvisionalign.search.embed import EMBED_BATCH_SIZE
    from clipvisionalign.search.indexer import build_index
    from clipvisionalign.search.storage import Storage

    start = time.perf_counter()
    report = build_index(run, image_folder, folder)
    seconds = time.perf_counter() - start
    aligner = load_aligner(run)
    start_load = time.perf_counter()
    load_aligner(run)
    seconds -= time.perf_counter() - start_load
    storage = Storage(image_folder)
    paths = [storage.image_source(file.raw) for file in storage.list_images()[: 8 * EMBED_BATCH_SIZE]]
    transform = aligner.image_tower.image_transform.image_loader()
    pixels = torch.stack([transform(path) for path in paths])
    with torch.no_grad():
        aligner.embed_image_features(aligner.image_tower(pixels[:EMBED_BATCH_SIZE]))
        start = time.perf_counter()
        for storage in range(0, len(pixels), EMBED_BATCH_SIZE):
            aligner.embed_image_features(aligner.image_tower(pixels[storage : storage + EMBED_BATCH_SIZE]))
        tower = len(pixels) / (time.perf_counter() - start)
    rate = report.encoded / seconds
    return {"index, pictures/s": round(rate, 1), "tower alone": round(tower, 1), "ratio": round(rate / tower, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vectors", type=int, default=200_000, help="how many (default 200,000)")
    parser.add_argument("--run", help="a run, for whole searches")
    parser.add_argument("--pictures", help="a folder of images, for the rate of indexing (needs --run)")
    parser.add_argument("--no-usearch", action="store_true", help="leave the rival's index out (a million take long)")
    parser.add_argument("--codes", action="store_true", help="short codes (IVF_PQ) as for more than 10 million vectors")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    from clipvisionalign.search.ann import MAX_EXACT_VECTORS, MAX_HNSW_VECTORS, search_table
    from clipvisionalign.study.profile import peak_memory

    vectors, queries = made_up(given.vectors)
    right = exact(vectors, queries)
    results: dict[str, Any] = {"vectors": given.vectors}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "index"
        table, seconds, manifest = indexed(
            vectors, folder, (MAX_EXACT_VECTORS, MAX_EXACT_VECTORS if given.codes else MAX_HNSW_VECTORS)
        )
        results["ours"] = {**manifest, "build_s": round(seconds, 1)}
        search = searches(table, folder, manifest["kind"])
        results["ours"] |= timed(lambda q: [r["id"] for r in search(q, FIRST)], queries, right)
        results["LanceDB flat"] = timed(lambda q: [r["id"] for r in search_table(table, q, FIRST)], queries, right)
        if not given.no_usearch:
            rival, seconds = usearch_of(vectors)
            results["USearch HNSW"] = {"build_s": round(seconds, 1)}
            results["USearch HNSW"] |= timed(lambda q: rival.search(q, FIRST).keys.tolist(), queries, right)
        if given.run:
            results["search by words, encoding included"] = end_to_end_searches(given.run, folder)
        if given.run and given.pictures:
            results["indexing"] = indexing_rate(given.run, given.pictures, Path(name) / "pictures")
    results["peak_memory_mib"] = round(peak_memory() / 2**20)
    print(
        json.dumps(results, indent=2) if given.json else "\n".join(f"{key}: {value}" for key, value in results.items())
    )


if __name__ == "__main__":
    from clipvisionalign.log import configure_command_line
    from clipvisionalign.progress import progress_step

    configure_command_line()
    with progress_step("benchmarks/search.py", in_terminal=False):
        main()
