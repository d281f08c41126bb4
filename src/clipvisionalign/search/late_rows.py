"""Bringing what ranks a whole index by late interaction up to date with its images."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from clipvisionalign.search.late import read_late_record
from clipvisionalign.search.late.build import build_late
from clipvisionalign.search.late.files import RECORD_FILE
from clipvisionalign.search.manifest import read_shards
from clipvisionalign.search.patch_vectors import patch_settings
from clipvisionalign.search.storage import Storage

if TYPE_CHECKING:
    from clipvisionalign.models.aligner import Aligner

logger = logging.getLogger(__name__)


def checked_patches(
    aligner: Aligner, patches: int | None, late: bool, index: Storage, shards: int | None
) -> int | None:
    """The patches that an index is to keep, once it is clear that it can, before anything is written.

    Args:
        aligner: The model of the index.
        patches: As they are asked for: so many as one, 0 as the index has them; None where they are not.
        late: Whether the files of late interaction are asked for.
        index: The storage of the index.
        shards: Number of shards that are asked for; None for those that the index has.

    Returns:
        As `patches`.

    Raises:
        ValueError: The design has nothing to re-rank with, or `patches` is below 0; for late interaction the design is
            another one, or the index is in shards or behind a URL.
    """
    if patches is not None:
        patch_settings(aligner, patches or 1)
    if not late:
        return patches
    design = aligner.config.design
    if design != "late":
        raise ValueError(f"--late needs a run of the design late, which scores patches; this model's is {design}")
    if not index.is_local:
        raise ValueError(f"--late: {index} is behind a URL, and its files are mapped from a disk: leave it out")
    if shards is not None or read_shards(index) is not None:
        raise ValueError(
            "--late: an index in shards is not ranked as a whole by late interaction: leave --late or --shards out"
        )
    return patches or 0


def update_late(index: Storage, wanted: bool) -> None:
    """Write the files of late interaction, where they are asked for or there already.

    Args:
        index: The storage of the index.
        wanted: Whether they are asked for.

    Raises:
        InvalidIndexError: The patches are damaged.
        OSError: The disk is full, or refuses to write.
    """
    if not wanted and (not index.is_local or index.read(RECORD_FILE) is None):
        return
    former = read_late_record(index)
    record = build_late(index)
    if record is None:
        logger.info("note: no image has patches: nothing is ranked by late interaction")
    elif former is None or former.folder != record.folder:
        logger.info(
            f"late interaction: {record.patches:,} patches of {record.images:,} images, {record.centroids:,} centroids"
        )
