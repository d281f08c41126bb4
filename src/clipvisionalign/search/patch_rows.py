"""Bringing the patches of an index up to date with its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clipvisionalign.progress import progress
from clipvisionalign.search.embed import embed_files
from clipvisionalign.search.patch_vectors import patch_settings
from clipvisionalign.search.patches import PatchWriter, open_patch_writer, read_patch_settings
from clipvisionalign.search.storage import ImageFile, Storage
from clipvisionalign.search.tables import read_columns

if TYPE_CHECKING:
    from clipvisionalign.models.aligner import Aligner


def begin_patches(aligner: Aligner, index: Storage, images: Mapping[int, str], pool: int | None) -> PatchWriter | None:
    """Open the patches of an index before its images are written.

    Args:
        aligner: The model of the index.
        index: The storage of the index.
        images: By the number of each image of the index, the hash of its content.
        pool: Patches that are stored as one; 0 as the index has them, else each; None keeps patches where there are
            some already.

    Returns:
        The writer, without what an interrupted update left; None for an index without patches.

    Raises:
        ValueError: The design has nothing to re-rank with, or `pool` is below 0.
        InvalidIndexError: The index has patches with other settings.
    """
    wanted = None
    if pool is not None:
        existing = read_patch_settings(index)
        wanted = patch_settings(aligner, pool or (existing.pool if existing else 1))
    writer = open_patch_writer(index, wanted)
    if writer is not None:
        writer.drop_others(images)
    return writer


def finish_patches(aligner: Aligner, storage: Storage, table: Any, writer: PatchWriter) -> dict[str, int]:
    """Store the patches of images that have none yet, and delete those of images that are gone.

    Args:
        aligner: The model of the index.
        storage: The folder or URL of the images.
        table: The table of images.
        writer: The patches.

    Returns:
        "stored", images with patches; "added", those among them that were indexed before; and "unreadable", images
        whose file cannot be decoded now, or holds something else.
    """
    rows = read_columns(table, ("id", "raw", "hash", "size", "mtime_ns"))
    images = {row["id"]: row["hash"] for row in rows}
    missing = writer.drop_others(images)
    added = 0
    if missing:
        numbers = {row["raw"]: row["id"] for row in rows if row["id"] in missing}
        pending = [
            (ImageFile(row["raw"], row["size"], row["mtime_ns"]), "") for row in rows if row["raw"] in numbers
        ]  # fmt: skip
        batches = embed_files(aligner, storage, pending, writer.settings)
        for batch in progress(batches, "patches of images that were indexed before", len(pending), units_per_item=len):
            packed = [
                (numbers[row["raw"]], row["hash"], row["patches"])
                for row in batch
                if not row["reason"] and row["hash"] == images[numbers[row["raw"]]]
            ]
            writer.write(packed)
            added += len(packed)
    unreadable = len(missing) - added
    return {"stored": len(images) - unreadable, "added": added, "unreadable": unreadable}
