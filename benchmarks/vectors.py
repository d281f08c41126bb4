"""The memory-mapped index at 200,000 or a million vectors, beside LanceDB, USearch in memory and faiss, in one run.

    clipvisionalign encode RUN DATA --split dev --out dev.parquet
    python benchmarks/vectors.py --data dev.parquet [train.parquet] [--run RUN] [--vectors 200000] [--width 256]
        [--forms] [--json]

The vectors are drawn around real ones (`around`): of two neighbouring images a point between them, moved by differences
of other images, so that they vary in the directions in which images do. The queries are real captions' vectors of the
same file, 200 of them; others make the rivals' searches wide enough. Without --data, images and captions are drawn too
(`drawn_pairs`): captions lie at a distance of their own from all images, as those of trained dual encoders do.

Each approximate search is as wide as it has to be for a recall@10 of 0.99 on captions that are not measured; ours as
`index` chooses it, with --run by words that mean nothing, as `index` does. `index part` is the search for numbers of
rows, `whole` the rows with their columns. Filters leave rows at random; `correlated` leaves the rows around 5 % of the
real images. Rivals that are missing are named: pip install faiss-cpu.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

QUERIES, FIRST, TARGET, TUNING = 200, 10, 0.99, 200
WIDTHS_OF_SEARCH = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
FILTERS = {"50 %": "draw < 500000", "5 %": "draw < 50000", "0.1 %": "draw < 1000", "5 %, correlated": "source < 0.05"}
ROWS = 50_000
#: Of the rivals' graphs, as their makers have them (USearch 16 and 128).
CONNECTIVITY, EXPANSION_ADD = 16, 128


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def drawn_pairs(width: int, count: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images and captions (count, D): of 100 subjects; a caption is its image, blurred and displaced."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, width + 1) ** -0.5
    subjects = rng.normal(size=(100, width)) * spectrum
    images = subjects[rng.integers(100, size=count)] + 0.7 * rng.normal(size=(count, width)) * spectrum
    images = unit(images) + 0.5 * unit(rng.normal(size=(1, width)))
    captions = 0.6 * unit(images) + 0.25 * unit(rng.normal(size=(count, width)) * spectrum)
    return unit(images), unit(captions + 0.7 * unit(rng.normal(size=(1, width))))


def read_pairs(file: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and captions of a file that `encode` wrote."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(file, columns=["kind", "vector"])
    vectors = np.stack(table["vector"].to_numpy()).astype(np.float32)
    kinds = np.array(table["kind"].to_pylist())
    return unit(vectors[kinds == "image"]), unit(vectors[kinds == "caption"])


def around(images: np.ndarray, count: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Vectors drawn around real ones, `ROWS` at a time, with the number of the real one of each.

    v = x_i + a (x_j - x_i) + sum over three of b (x_k - x_l): x_j one of the ten nearest of x_i, a uniform in [0, 1], b
    uniform in [0, 0.3], x_k and x_l any.
    """
    rng, real = np.random.default_rng(seed), len(images)
    near = np.argsort(-(images @ images.T), axis=1)[:, 1:11]
    for start in range(0, count, ROWS):
        size = min(ROWS, count - start)
        first = rng.integers(real, size=size)
        other = near[first, rng.integers(near.shape[1], size=size)]
        vectors = images[first] + rng.random((size, 1)) * (images[other] - images[first])
        for _ in range(3):
            one, two = rng.integers(real, size=(2, size))
            vectors = vectors + 0.3 * rng.random((size, 1)) * (images[one] - images[two])
        yield unit(vectors), first


def exact(vectors: np.ndarray, queries: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """The true first ten (Q, 10) of the allowed rows."""
    best = np.empty((len(queries), 0), dtype=np.int64)
    scores = np.empty((len(queries), 0), dtype=np.float32)
    for start in range(0, len(vectors), ROWS):
        rows = np.arange(start, min(start + ROWS, len(vectors)))
        rows = rows if allowed is None else rows[allowed[rows]]
        scores = np.concatenate([scores, queries @ vectors[rows].T], axis=1)
        best = np.concatenate([best, np.broadcast_to(rows, (len(queries), len(rows)))], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :FIRST]
        scores, best = np.take_along_axis(scores, order, 1), np.take_along_axis(best, order, 1)
    return best


def timed(search: Callable[[np.ndarray], Any], queries: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Recall of the first ten, milliseconds of one query at a time, and those of all threads' own work, which other
    programs of the machine do not lengthen."""
    for query in queries[:10]:
        search(query)
    taken, worked, hits = [], [], []
    for query, true in zip(queries, right, strict=True):
        start, cpu = time.perf_counter(), time.process_time()
        ids = search(query)
        taken.append(1000 * (time.perf_counter() - start))
        worked.append(1000 * (time.process_time() - cpu))
        hits.append(len(set(np.asarray(ids).tolist()) & set(true.tolist())) / max(1, len(true)))
    p50, p99 = np.percentile(taken, [50, 99])
    return {
        "recall_at_10": round(float(np.mean(hits)), 4), "p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3),
        "cpu_p50_ms": round(float(np.median(worked)), 3),
    }  # fmt: skip


def frontier(
    search: Callable[[Any], Callable[[np.ndarray], Any]], collection: Any, widths: Sequence[float] = WIDTHS_OF_SEARCH
) -> dict[str, dict[str, float]]:
    """Recall and time of the measured queries by the width of a search, up to a recall of 0.998."""
    results: dict[str, dict[str, float]] = {}
    for width in widths:
        results[str(width)] = timed(search(width), collection.queries, collection.right)
        if results[str(width)]["recall_at_10"] >= 0.998:
            break
    return results


def at_target(results: dict[str, Any], key: str) -> float:
    """The least time on a frontier at which the recall reaches `TARGET`; not a number where none does."""
    times = [each[key] for each in results["frontier"].values() if each["recall_at_10"] >= TARGET]
    return min(times, default=float("nan"))


def wide_enough(search: Callable[[int], Callable[[np.ndarray], Any]], queries: np.ndarray, right: np.ndarray) -> int:
    """The least width of a search whose recall reaches `TARGET`."""
    for width in WIDTHS_OF_SEARCH:
        if timed(search(width), queries, right)["recall_at_10"] >= TARGET:
            return width
    return WIDTHS_OF_SEARCH[-1]


class Collection:
    """Vectors with a table of them, and queries with their true first ten."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        images, captions = read_pairs(given.data[0]) if given.data else drawn_pairs(given.width)
        # Of further files the images alone: more kinds of scenes, and so fewer vectors around each.
        images = np.concatenate([images, *(read_pairs(file)[0] for file in given.data[1:])])
        if captions.shape[1] != given.width:
            raise ValueError(f"{given.data[0]}: vectors of width {captions.shape[1]}: give --width {captions.shape[1]}")
        order = np.random.default_rng(1).permutation(len(captions))
        self.queries, self.tuning = captions[order[:QUERIES]], captions[order[QUERIES : QUERIES + TUNING]]
        self.folder, self.width, self.real = folder, given.width, len(images)
        self.vectors = np.empty((given.vectors, given.width), dtype=np.float32)
        source = np.empty(given.vectors, dtype=np.int64)
        for number, (vectors, first) in enumerate(around(images, given.vectors)):
            rows = slice(number * ROWS, number * ROWS + len(vectors))
            self.vectors[rows], source[rows] = vectors, first
        self.columns = {
            "draw": np.random.default_rng(2).integers(1_000_000, size=given.vectors),
            "source": source / len(images),
        }
        self.right, self.tuning_right = exact(self.vectors, self.queries), exact(self.vectors, self.tuning)

    def allowed(self, where: str) -> np.ndarray:
        name, _, value = where.partition(" < ")
        return np.asarray(self.columns[name] < float(value))

    def write(self, storage: Any) -> Any:
        """The table of images, as `index` writes it."""
        import pyarrow as arrow

        from clipvisionalign.search.tables import create_image_table

        table = create_image_table(storage, self.width)
        table.add_columns([arrow.field("draw", arrow.int64()), arrow.field("source", arrow.float64())])
        for start in range(0, len(self.vectors), ROWS):
            part = self.vectors[start : start + ROWS]
            ids = np.arange(start, start + len(part))
            names = [f"2024/07/holiday-{number:07}.jpg" for number in ids]
            columns = {
                "id": ids, "path": names, "raw": [name.encode() for name in names], "size": ids, "mtime_ns": ids,
                "hash": [f"{number:032x}" for number in ids], "width": np.full(len(part), 640, np.int32),
                "height": np.full(len(part), 480, np.int32), "thumbnail": [b""] * len(part),
                "vector": arrow.FixedSizeListArray.from_arrays(arrow.array(part.reshape(-1)), self.width),
            } | {name: values[ids] for name, values in self.columns.items()}  # fmt: skip
            table.add(arrow.table(columns, schema=table.schema))
        return table


def write_index(collection: Collection, run: str, text_vectors: Callable[[], np.ndarray]) -> tuple[Any, dict[str, Any]]:
    """An index as `index` writes it, and what its lists took."""
    from clipvisionalign.search.ann import MAX_HNSW_VECTORS, build_ann_index
    from clipvisionalign.search.manifest import IndexManifest, write_manifest
    from clipvisionalign.search.mapped import read_record
    from clipvisionalign.search.storage import Storage

    storage = Storage(collection.folder / "index")
    manifest = IndexManifest("", "", "", collection.width)
    aligner = None
    if run:
        from clipvisionalign.models.io import load_aligner, resolve_model
        from clipvisionalign.search.fingerprint import aligner_fingerprint
        from clipvisionalign.search.null_queries import null_texts
        from clipvisionalign.search.text_tower import keep_text_tower
        from clipvisionalign.starter import resolve_run

        path = resolve_run(run)
        aligner = load_aligner(path)
        manifest = IndexManifest(resolve_model(path), aligner_fingerprint(path), "", collection.width)
        null_vectors = np.asarray(aligner.encode_captions(null_texts()))
    write_manifest(storage, manifest)
    table = collection.write(storage)
    start = time.perf_counter()
    build_ann_index(
        table, storage, manifest, len(collection.vectors), sizes=(0, MAX_HNSW_VECTORS),
        text_vectors=(lambda: null_vectors) if run else text_vectors,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if aligner is not None:
        keep_text_tower(path, storage, manifest.aligner, aligner)
    record = read_record(storage)
    assert record is not None
    return storage, {
        "code": record.code, "lists": record.centroids, "reach": record.reach,
        "recall_of_index": round(record.recall, 4),
        "build_s": round(seconds, 1), "mib": {name: round(size / 2**20, 1) for name, size in record.sizes.items()},
    }  # fmt: skip


def ours(collection: Collection, storage: Any) -> dict[str, Any]:
    """The mapped files: the search for rows, and with their columns; without and with filters."""
    from clipvisionalign.search.hits import HIT_COLUMNS, to_hits
    from clipvisionalign.search.mapped import MappedReader
    from clipvisionalign.search.mapped.files import Selection
    from clipvisionalign.search.mapped.recall import REACHES
    from clipvisionalign.search.mapped.search import by_lists, search_files
    from clipvisionalign.search.tables import read_image_table

    reader = MappedReader(storage, read_image_table(storage))
    columns = (*HIT_COLUMNS, *collection.columns)
    assert reader.nearest(collection.queries[0], FIRST, columns)
    files = reader._snapshot.files  # type: ignore[union-attr]

    def part(query: np.ndarray, selection: Any = None) -> Any:
        return search_files(files, query, FIRST, selection, is_filtered=selection is not None)[0]

    def whole(query: np.ndarray, where: str = "") -> list[int]:
        rows = reader.nearest(query, FIRST, columns, where)
        assert rows is not None
        return [hit.id for hit in to_hits(rows, collection.columns)]

    results: dict[str, Any] = {
        "frontier": frontier(lambda reach: lambda query: by_lists(files, query, FIRST, reach)[0], collection, REACHES),
        "index part": timed(part, collection.queries, collection.right),
        "whole": timed(whole, collection.queries, collection.right),
    }
    for name, where in FILTERS.items():
        allowed = collection.allowed(where)
        selection, right = Selection(files, allowed), exact(collection.vectors, collection.queries, allowed)
        start = time.perf_counter()
        whole(collection.queries[0], where)
        first = 1000 * (time.perf_counter() - start)
        results[f"filter {name}"] = {
            "rows": selection.count, "first use of the filter, ms": round(first, 1),
            "index part": timed(lambda query, s=selection: part(query, s), collection.queries, right),
            "whole": timed(lambda query, w=where: whole(query, w), collection.queries, right),
        }  # fmt: skip
    return results


def lancedb(collection: Collection) -> dict[str, Any]:
    """LanceDB's own approximate index, as indexes behind a URL have it, and its filters."""
    from clipvisionalign.search.ann import choose_index_type
    from clipvisionalign.search.hits import HIT_COLUMNS
    from clipvisionalign.search.storage import Storage
    from clipvisionalign.search.table_reader import open_reader

    storage = Storage(collection.folder / "lancedb")
    table = collection.write(storage)
    kind, settings = choose_index_type(len(collection.vectors), collection.width, exact=0)
    start = time.perf_counter()
    table.create_index(
        metric="dot", index_type=kind, num_partitions=settings["partitions"], vector_column_name="vector",
        m=settings["m"], ef_construction=settings["ef_construction"],
    )  # fmt: skip
    seconds = time.perf_counter() - start
    reader = open_reader(storage, "pictures")
    assert reader is not None
    columns = (*HIT_COLUMNS, *collection.columns)

    def whole(query: np.ndarray, where: str = "") -> list[int]:
        return [row["id"] for row in reader.nearest(query, FIRST, kind, columns, where)]

    results: dict[str, Any] = {
        "build_s": round(seconds, 1),
        "whole": timed(whole, collection.queries, collection.right),
    }
    for name, where in FILTERS.items():
        right = exact(collection.vectors, collection.queries, collection.allowed(where))
        results[f"filter {name}"] = {
            "whole": timed(lambda query, w=where: whole(query, w), collection.queries[:50], right[:50])
        }
    return results


def usearch_in_memory(collection: Collection) -> dict[str, Any]:
    """USearch's graph of float32 in memory."""
    from usearch.index import Index

    start = time.perf_counter()
    index = Index(
        ndim=collection.width, metric="ip", dtype="f32", connectivity=CONNECTIVITY, expansion_add=EXPANSION_ADD
    )
    index.add(np.arange(len(collection.vectors)), collection.vectors)
    seconds = time.perf_counter() - start

    def search(width: int) -> Callable[[np.ndarray], Any]:
        def of_width(query: np.ndarray) -> Any:
            index.expansion_search = width
            return index.search(query, FIRST, threads=1).keys

        return of_width

    width = wide_enough(search, collection.tuning, collection.tuning_right)
    index.save(str(collection.folder / "usearch"))
    return {
        "build_s": round(seconds, 1), "expansion": width, "frontier": frontier(search, collection),
        "index part": timed(search(width), collection.queries, collection.right),
    }  # fmt: skip


def faiss_in_memory(collection: Collection) -> dict[str, Any]:
    """faiss's graph of float32 in memory, with filters by its own selectors."""
    try:
        import faiss
    except ModuleNotFoundError:
        return {"missing": "pip install faiss-cpu"}

    start = time.perf_counter()
    index = faiss.IndexHNSWFlat(collection.width, CONNECTIVITY, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = EXPANSION_ADD
    index.add(collection.vectors)
    seconds = time.perf_counter() - start
    faiss.omp_set_num_threads(1)

    def search(width: int, selector: Any = None) -> Callable[[np.ndarray], Any]:
        parameters = faiss.SearchParametersHNSW(efSearch=width, sel=selector)
        return lambda query: index.search(query[None], FIRST, params=parameters)[1][0]

    width = wide_enough(search, collection.tuning, collection.tuning_right)
    faiss.write_index(index, str(collection.folder / "faiss"))
    results: dict[str, Any] = {
        "build_s": round(seconds, 1), "expansion": width, "frontier": frontier(search, collection),
        "index part": timed(search(width), collection.queries, collection.right),
    }  # fmt: skip
    for name, where in FILTERS.items():
        allowed = collection.allowed(where)
        right = exact(collection.vectors, collection.queries, allowed)
        bits = np.packbits(allowed, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))
        results[f"filter {name}"] = {"index part": timed(search(width, selector), collection.queries, right)}
    return results


def forms(collection: Collection) -> dict[str, Any]:
    """The ways to keep vectors: bytes a row of the lists, recall and time of each."""
    from clipvisionalign.search.mapped import CODES, MappedReader, VectorSettings, build_mapped
    from clipvisionalign.search.mapped.search import search_files
    from clipvisionalign.search.storage import Storage
    from clipvisionalign.search.tables import read_image_table

    storage, results = Storage(collection.folder / "index"), {}
    settings = [VectorSettings(code) for code in CODES] + [
        VectorSettings("int8", collection.width // part) for part in (2, 4)
    ]
    for each in settings:
        start = time.perf_counter()
        record = build_mapped(storage, collection.width, each, lambda: collection.tuning)
        seconds = time.perf_counter() - start
        reader = MappedReader(storage, read_image_table(storage))
        reader.nearest(collection.queries[0], FIRST, ("id",))
        files = reader._snapshot.files  # type: ignore[union-attr]
        results[f"{each.code}, width {each.width or collection.width}"] = {
            "build_s": round(seconds, 1), "reach": record.reach,
            "lists, bytes a row": round(record.sizes["codes.npy"] / record.positions),
            **timed(lambda query, f=files: search_files(f, query, FIRST)[0], collection.queries, collection.right),
        }  # fmt: skip
    return results


def words(collection: Collection, storage: Any) -> dict[str, Any]:
    """Whole searches by words, and the text tower's own part of them, in turns."""
    from clipvisionalign.search.searcher import Searcher
    from clipvisionalign.search.terms import parse_term

    searcher, rng = Searcher(storage.location), np.random.default_rng(0)
    vocabulary = ["a dog runs", "on the grass", "two people", "a red ball", "in the water", "near trees", "at night"]
    taken: dict[str, list[float]] = {"search": [], "text tower": []}
    for turn in range(QUERIES + 10):
        terms = [parse_term(" ".join(rng.permutation(vocabulary)[:3]))]
        for name, call in (("text tower", searcher.encode), ("search", searcher.search)):
            start = time.perf_counter()
            call(terms)
            if turn >= 10:
                taken[name].append(1000 * (time.perf_counter() - start))
    results = {
        name: {f"p{p}_ms": round(float(np.percentile(times, p)), 2) for p in (50, 99)} for name, times in taken.items()
    }
    ratios = np.array(taken["search"]) / np.array(taken["text tower"])
    return {**results, "ratio": round(float(np.median(ratios)), 3)}


def memory(kind: str, folder: Path, width: int) -> dict[str, float]:
    """MiB of a new process that opens an index and searches it for the queries."""
    arguments = [sys.executable, __file__, "--memory-of", kind, "--folder", str(folder), "--width", str(width)]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stdout.strip().splitlines()
    return dict(json.loads(lines[-1])) if not done.returncode and lines else {"failed": -1.0}


def measure_memory(kind: str, folder: Path, width: int) -> dict[str, float]:
    """In the new process: what it has more than before it opened the index."""

    def resident() -> dict[str, float]:
        fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if "Rss" in line)
        return {name.rstrip(":"): int(size) / 1024 for name, size, _ in fields}

    queries = np.load(folder / "queries.npy")
    search: Callable[[np.ndarray], Any]
    if kind == "ours":
        import lance  # noqa: F401

        from clipvisionalign.search.mapped import MappedReader
        from clipvisionalign.search.storage import Storage
        from clipvisionalign.search.tables import read_image_table

        before, storage = resident(), Storage(folder / "index")
        reader = MappedReader(storage, read_image_table(storage))
        search = lambda query: reader.nearest(query, FIRST, ("id", "path"))  # noqa: E731
    elif kind == "USearch in memory":
        from usearch.index import Index

        before, index = resident(), Index(ndim=width, metric="ip", dtype="f32")
        index.load(str(folder / "usearch"))
        search = lambda query: index.search(query, FIRST, threads=1)  # noqa: E731
    elif kind == "faiss in memory":
        import faiss

        before, graph = resident(), faiss.read_index(str(folder / "faiss"))
        search = lambda query: graph.search(query[None], FIRST)  # noqa: E731
    else:
        from clipvisionalign.search.storage import Storage
        from clipvisionalign.search.table_reader import open_reader

        before, table = resident(), open_reader(Storage(folder / "lancedb"), "pictures")
        assert table is not None
        search = lambda query: table.nearest(query, FIRST, "IVF_HNSW_SQ", ("id", "path"))  # noqa: E731
    for query in queries:
        search(query)
    after = resident()
    return {
        "own": round(after["RssAnon"] - before["RssAnon"], 1),
        "shared pages of files": round(after["RssFile"] - before["RssFile"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vectors", type=int, default=200_000, help="how many (default 200,000)")
    parser.add_argument("--width", type=int, default=256, help="of a vector (default 256)")
    parser.add_argument(
        "--data", nargs="*", default=(), metavar="FILE",
        help="vectors of a data set: 'encode --out FILE.parquet'; of further files the images alone",
    )  # fmt: skip
    parser.add_argument("--run", default="", help="the run that encoded them, for whole searches by words")
    parser.add_argument("--forms", action="store_true", help="also write each form of vectors")
    parser.add_argument(
        "--rivals", nargs="*", choices=("usearch", "faiss", "lancedb"), default=("usearch", "faiss", "lancedb"),
        help="those that are measured (default all)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        print(json.dumps(measure_memory(given.memory_of, Path(given.folder), given.width)))
        return
    from clipvisionalign.progress import progress

    with tempfile.TemporaryDirectory() as name:
        collection = Collection(given, Path(name))
        np.save(Path(name) / "queries.npy", collection.queries)
        storage, built = write_index(collection, given.run, lambda: collection.tuning)
        results: dict[str, Any] = {
            "vectors": given.vectors, "width": given.width, "real images": collection.real,
            "queries": "captions" if given.data else "drawn captions",
            "ours": built | ours(collection, storage),
        }  # fmt: skip
        if given.run:
            results["search by words"] = words(collection, storage)
        rivals = {"USearch in memory": usearch_in_memory, "faiss in memory": faiss_in_memory, "LanceDB": lancedb}
        chosen = [rival for rival in rivals if rival.split()[0].lower() in given.rivals]
        for rival in progress(chosen, "rivals", len(chosen)):
            results[rival] = rivals[rival](collection)
        for each in ("ours", *rivals):
            if each in results and "missing" not in results[each]:
                results[each]["mib_of_a_process"] = memory(each, Path(name), given.width)
        for key in ("p50_ms", "cpu_p50_ms") if "USearch in memory" in results else ():
            one, other = (at_target(results[rival], key) for rival in ("ours", "USearch in memory"))
            results[f"index part at a recall of {TARGET}, {key}, over USearch in memory"] = round(one / other, 2)
        if given.forms:
            results["forms"] = forms(collection)
    print(json.dumps(results, indent=2) if given.json else "\n".join(lines(results)))


def lines(results: dict[str, Any], indent: str = "") -> Iterator[str]:
    """The figures as text, a line for each group."""
    for name, value in results.items():
        if isinstance(value, dict) and any(isinstance(each, dict) for each in value.values()):
            yield f"{indent}{name}"
            yield from lines(value, indent + "  ")
        else:
            text = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else value
            yield f"{indent}{name}: {text}"


if __name__ == "__main__":
    from clipvisionalign.log import configure_command_line
    from clipvisionalign.progress import progress_step

    configure_command_line()
    with progress_step("benchmarks/vectors.py", in_terminal=False):
        main()
