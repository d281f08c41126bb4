"""Nearest neighbours in an index: exact or approximate by its size, and the measured recall of the latter.

Up to `MAX_EXACT_VECTORS` images every search is exact. Beyond, an index on a disk of this machine has lists of vectors
in files beside the tables, which are mapped into memory (`mapped/`); behind a URL, or without NumKong, LanceDB builds
graphs (HNSW). Beyond `MAX_HNSW_VECTORS` LanceDB builds short codes (PQ).

Sources: Malkov and Yashunin, "HNSW", arXiv:1603.09320; Jegou, Douze and Schmid, "Product quantization for nearest
neighbor search", TPAMI 2011.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from clipvisionalign.search.hits import HIT_COLUMNS
from clipvisionalign.search.manifest import IndexManifest, write_manifest
from clipvisionalign.search.mapped import (
    MAPPED_KIND,
    VectorSettings,
    build_mapped,
    can_map,
    read_record,
    read_settings,
    remove_mapped,
)
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.table_reader import LanceDBReader, rows_condition
from clipvisionalign.search.tables import vector_column

logger = logging.getLogger(__name__)

#: Images up to which every search is exact, and up to which lists or graphs are built.
MAX_EXACT_VECTORS, MAX_HNSW_VECTORS = 100_000, 10_000_000
#: Queries by which an approximate index is measured, and the depth of the comparison.
RECALL_QUERIES, RECALL_DEPTH = 200, 10


def choose_index_type(
    count: int, width: int, exact: int = MAX_EXACT_VECTORS, graphs: int = MAX_HNSW_VECTORS
) -> tuple[str, dict[str, int]]:
    """The kind of index for a number of vectors.

    Args:
        count: Number of vectors.
        width: D, their width.
        exact: Number up to which every search is exact.
        graphs: Number up to which graphs are built.

    Returns:
        "exact", "IVF_HNSW_SQ" or "IVF_PQ", and its settings.
    """
    if count <= exact:
        return "exact", {}
    # Partitions of about 8,000: few enough that each is worth a visit, small enough to be built in memory.
    partitions = max(1, round(count / 8192))
    if count <= graphs:
        return "IVF_HNSW_SQ", {"partitions": partitions, "m": 24, "ef_construction": 200}
    return "IVF_PQ", {"partitions": partitions, "sub_vectors": width // 4}


def build_ann_index(
    table: Any, index: Storage, manifest: IndexManifest, count: int, *, sizes: tuple[int, int],
    settings: VectorSettings | None = None, text_vectors: Callable[[], np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Build or update the approximate index of a table, where it is large enough, and write the manifest.

    Args:
        table: The table of images.
        index: The storage of the index.
        manifest: Its manifest; `kind`, `recall` and `settings` are set.
        count: Number of rows.
        sizes: Numbers of images up to which every search is exact, and up to which lists or graphs are built.
        settings: How lists beside the tables keep vectors; None for the settings that it has, or the usual ones.
        text_vectors: Gives vectors of words (M, D), by which such lists are searched widely enough.
    """
    table.optimize()
    kind, kind_settings = choose_index_type(count, manifest.width, *sizes)
    if kind == "IVF_HNSW_SQ" and can_map(index):
        _build_mapped(table, index, manifest, settings, text_vectors)
        return
    _build_in_table(table, manifest, kind, kind_settings, count)
    write_manifest(index, manifest)
    # Only now: what the manifest named before was there until then.
    remove_mapped(index)


def _build_mapped(
    table: Any, index: Storage, manifest: IndexManifest, settings: VectorSettings | None,
    text_vectors: Callable[[], np.ndarray] | None,
) -> None:  # fmt: skip
    for each in table.list_indices():
        if list(each.columns) == ["vector"]:
            # LanceDB's own, of before, which every update would have to extend.
            table.drop_index(each.name)
    former = read_record(index)
    settings = settings or read_settings(index) or VectorSettings()
    record = build_mapped(index, manifest.width, settings, text_vectors)
    manifest.kind, manifest.recall, manifest.settings = MAPPED_KIND, record.recall, {"partitions": record.centroids}
    write_manifest(index, manifest)
    if former is None or former.folder != record.folder:
        logger.info(f"the approximate search finds {100 * record.recall:.1f} % of the first {RECALL_DEPTH}")


def _build_in_table(table: Any, manifest: IndexManifest, kind: str, settings: dict[str, int], count: int) -> None:
    """LanceDB's own index, or none."""
    old_partitions = manifest.settings.get("partitions", 0)
    if kind == "exact":
        manifest.kind, manifest.recall, manifest.settings = kind, 1.0, {}
    elif kind != manifest.kind or abs(settings["partitions"] - old_partitions) > old_partitions / 4:
        logger.info(f"building an approximate index of {count:,} vectors ...")
        options = {"num_sub_vectors": settings["sub_vectors"]} if kind == "IVF_PQ" else {
            name: settings[name] for name in ("m", "ef_construction")}  # fmt: skip
        table.create_index(
            metric="dot", index_type=kind, num_partitions=settings["partitions"], vector_column_name="vector", **options
        )
        manifest.kind, manifest.settings = kind, settings
    if kind != "exact":
        manifest.recall = measure_recall(table, kind)
        recall_text = (
            f"{100 * manifest.recall:.1f} % of the first {RECALL_DEPTH}, on {RECALL_QUERIES} of its own vectors"
        )
        logger.info(f"the approximate search finds {recall_text}")


def measure_recall(table: Any, kind: str, seed: int = 0) -> float:
    """The recall of an approximate search, for vectors between those of the table.

    Args:
        table: A table with an approximate index.
        kind: Its kind.
        seed: Of the sample of `RECALL_QUERIES` vectors.

    Returns:
        The mean share of the exact first `RECALL_DEPTH` that are found, 0 to 1.
    """
    rng = np.random.default_rng(seed)
    all_ids = table.search().select(["id"]).limit(table.count_rows()).to_arrow()["id"].to_numpy()
    sample = rows_condition(rng.choice(all_ids, min(RECALL_QUERIES, len(all_ids)), replace=False))
    vectors = vector_column(table.search().where(sample).select(["vector"]).limit(RECALL_QUERIES).to_arrow())
    vectors = vectors + rng.normal(0, 0.3 / np.sqrt(vectors.shape[1]), vectors.shape).astype(np.float32)
    recalls = []
    for vector in vectors:
        exact_ids = {row["id"] for row in search_table(table, vector, RECALL_DEPTH, columns=("id",))}
        approximate_ids = {row["id"] for row in search_table(table, vector, RECALL_DEPTH, kind, columns=("id",))}
        recalls.append(len(exact_ids & approximate_ids) / max(1, len(exact_ids)))
    return float(np.mean(recalls))


def search_table(
    table: Any,
    vector: np.ndarray,
    count: int,
    kind: str = "exact",
    columns: Sequence[str] = HIT_COLUMNS,
    where: str = "",
) -> list[dict[str, Any]]:
    """The rows whose vectors are nearest to a query's.

    Args:
        table: A LanceDB table of images or captions.
        vector: The query, (D,).
        count: Number of rows at most.
        kind: Kind of the index, as in the manifest.
        columns: The columns that are read.
        where: A condition in SQL (`filters.filter_sql`), "" for none.

    Returns:
        Rows, nearest first; "_distance" is 1 - cosine.
    """
    return LanceDBReader(table).nearest(vector, count, kind, columns, where)
