"""Writing the table of captions, which are found by an image."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.progress import progress
from clipvisionalign.search.index_parts import IndexPart
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.tables import (
    create_caption_table,
    delete_rows,
    open_caption_table,
    read_columns,
    update_rows,
)

logger = logging.getLogger(__name__)

#: Captions that are written at a time.
CAPTIONS_PER_WRITE = 2048


def count_captions(index: str | Path | Storage) -> int:
    """The number of captions in an index.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The number of rows; 0 for an index without captions.
    """
    table = open_caption_table(index)
    return 0 if table is None else int(table.count_rows())


def move_captions(index: Storage, renamed: Mapping[str, str]) -> None:
    """Update the paths of captions whose images were moved.

    Args:
        index: The storage of the index.
        renamed: For each old path the new one.
    """
    table = open_caption_table(index) if renamed else None
    if table is not None:
        rows = [
            row | {"path": renamed[row["path"]]}
            for row in read_columns(table, ("id", "path"))
            if row["path"] in renamed
        ]
        update_rows(table, "id", rows, ("id", "path"))


def drop_captions(index: Storage, image_table: Any) -> None:
    """Delete the captions of images that are no longer in the index.

    Args:
        index: The storage of the index.
        image_table: Its table of images.
    """
    table = open_caption_table(index)
    if table is not None:
        image_paths = {row["path"] for row in read_columns(image_table, ("path",))}
        delete_rows(table, [row["id"] for row in read_columns(table, ("id", "path")) if row["path"] not in image_paths])


def index_captions(aligner: Aligner, parts: Sequence[IndexPart], captions: Mapping[str, Sequence[str]]) -> None:
    """Update the tables of captions to those of the images in the index, each once, beside their images.

    Args:
        aligner: Encodes new captions.
        parts: The parts of the index.
        captions: Captions by the path of their image.
    """
    import pyarrow as arrow

    tables = {part.name: create_caption_table(part.storage, aligner.width) for part in parts}
    part_of = {row["path"]: part.name for part in parts for row in read_columns(part.table, ("path",))}
    wanted = dict.fromkeys((path, text) for path, texts in captions.items() if path in part_of for text in texts)
    existing: set[tuple[str, str]] = set()
    last_id = -1
    for name, table in tables.items():
        rows = read_columns(table, ("id", "path", "text"))
        last_id = max([last_id, *(row["id"] for row in rows)])
        kept = {(row["path"], row["text"]): row["id"] for row in rows}
        unwanted = [key for key in kept if key not in wanted or part_of[key[0]] != name]
        delete_rows(table, [kept.pop(key) for key in unwanted])
        existing |= kept.keys()
    new_captions = [key for key in wanted if key not in existing]
    if not new_captions:
        return
    logger.info(f"encoding {len(new_captions):,} captions ...")
    chunks = [
        new_captions[start : start + CAPTIONS_PER_WRITE] for start in range(0, len(new_captions), CAPTIONS_PER_WRITE)
    ]
    for chunk in progress(chunks, "encoding captions", len(new_captions), units_per_item=len):
        vectors = aligner.encode_captions([text for _, text in chunk]).numpy()
        rows_of: dict[str, list[dict[str, Any]]] = {}
        for number, ((path, text), vector) in enumerate(zip(chunk, vectors, strict=True), last_id + 1):
            row = {"id": number, "path": path, "text": text, "vector": vector}
            rows_of.setdefault(part_of[path], []).append(row)
        last_id += len(chunk)
        for name, rows in rows_of.items():
            tables[name].add(arrow.Table.from_pylist(rows, schema=tables[name].schema))
    for table in tables.values():
        table.optimize()
