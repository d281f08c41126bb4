"""Building and updating an index of an image collection: vectors, thumbnails and metadata, in LanceDB.

- An update encodes only what is new or changed, recognises moved files by their content, and drops rows of files that
  are gone; `diff.py` has the comparison.
- Rows are written in chunks, each completely or not at all: an interrupted update is resumed by the next one.
- An image that cannot be read or decoded is listed in broken.jsonl, and retried when the result may differ.
- Captions are in a table of their own, and are found by an image.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.allocator import reused_memory
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.run_data import (
    ReadOptions,
    differences_from_run,
    is_data_of_run,
    read_options_of_run,
    unfinished_note,
)
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import is_pretrained, load_aligner, resolve_model
from clipvisionalign.models.run_names import resolve_run
from clipvisionalign.progress import progress
from clipvisionalign.search.ann import MAX_EXACT_VECTORS, MAX_HNSW_VECTORS, build_ann_index
from clipvisionalign.search.broken_files import BROKEN_FILES_NAME, BrokenFiles
from clipvisionalign.search.calibration_files import copy_calibration, forget_null_cosines, write_null_cosines
from clipvisionalign.search.camera_columns import fill_old_rows, fill_places, open_camera_columns
from clipvisionalign.search.caption_rows import count_captions, drop_captions, index_captions, move_captions
from clipvisionalign.search.collection import Collection, is_data_set, read_collection
from clipvisionalign.search.diff import MAX_DROP_SHARE, Changes, check_drop, diff_files
from clipvisionalign.search.duplicate_decisions import move_decisions
from clipvisionalign.search.embed import embed_files, embed_files_with_ray
from clipvisionalign.search.image_rows import (
    apply_changes,
    drop_missing,
    sync_metadata_columns,
    sync_metadata_values,
    write_rows,
)
from clipvisionalign.search.index_parts import (
    IndexPart,
    align_columns,
    data_set_folder,
    deal_changes,
    forget_numbers,
    open_part,
    plan_numbers,
    refuse_lost_columns,
)
from clipvisionalign.search.index_report import IndexReport, log_first, log_problems, new_report, report_sources
from clipvisionalign.search.late import remove_late
from clipvisionalign.search.late_rows import checked_patches, update_late
from clipvisionalign.search.manifest import (
    IndexManifest,
    check_shards,
    has_index,
    open_manifests,
    read_shards,
    record_folder,
    recorded_folders,
    shard_storage,
)
from clipvisionalign.search.mapped import (
    VectorSettings,
    can_map,
    check_code,
    check_settings,
    read_settings,
    remove_mapped,
)
from clipvisionalign.search.null_queries import null_texts
from clipvisionalign.search.patch_rows import begin_patches, finish_patches
from clipvisionalign.search.patches import read_patch_settings
from clipvisionalign.search.storage import InvalidIndexError, Storage, printable
from clipvisionalign.search.tables import BASE_COLUMNS
from clipvisionalign.search.text_tower import keep_text_tower

logger = logging.getLogger(__name__)

#: Errors of writing that are no fault of the program: a full disk, a quota, a limit, a faulty or read-only disk.
_WRITE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@reused_memory()
def build_index(
    run: str | Path, source: str | Path, out: str | Path, *, captions: bool = False,
    layout: str = "auto", metadata: str | Path = "", ray: str = "", workers: int = 0,
    sizes: tuple[int, int] = (MAX_EXACT_VECTORS, MAX_HNSW_VECTORS), verify: bool = False, allow_drop: bool = False,
    group: str = "", patches: int | None = None, vectors: str = "", vector_width: int = 0, shards: int | None = None,
    late: bool = False,
) -> IndexReport:  # fmt: skip
    """Index the images below a folder, or of a data set; an existing index is updated.

    Args:
        run: Run folder of the aligner, `starter`, or a pretrained dual encoder.
        source: Folder or data set: a path, or a URL that fsspec reaches.
        out: The index: a path, or a URL that LanceDB reaches.
        captions: Read `source` as a data set and index its captions too.
        layout: Of the data set.
        metadata: A table with more columns (`metadata.read_metadata`); without one, the index keeps its columns.
        ray: Address of a Ray cluster that encodes, "local" for one on this machine, "" for none.
        workers: Models on the cluster; 0 to choose by its resources.
        sizes: Numbers of images up to which every search is exact, and up to which lists or graphs are built.
        verify: Compare the content of every file, not its size and time.
        allow_drop: Drop any number of rows, and those below folders that cannot be listed.
        group: A column of the data set; images of one value are in one split.
        patches: Keep the patches of images, by which re-ranking opens none: so many as one, 0 as the index has them
            already, else each; None keeps them where the index does.
        vectors: How the memory-mapped lists of a large index keep vectors: "float32", "float16", "int8" or "binary";
            "" for the way that it has, or int8.
        vector_width: Numbers of a vector, from its beginning, that the lists keep; 0 for those that it has, or all.
        shards: Number of complete indexes that the images of a new index are dealt to (`index_parts.py`); None for
            those that the index has, and none of a new one.
        late: Keep what a search of the whole index by late interaction needs, patches too; an index keeps what it has.

    Returns:
        Counts of files and rows.

    Raises:
        InvalidIndexError: `out` is an index of another run or folder, has another number of shards, or is something
            else; it cannot be written; too many rows would be dropped (`diff.check_drop`); or a lost shard would have
            no metadata or captions.
        ValueError: `patches` is given for a design without re-ranking; `vectors` or `vector_width` fits no lists, or
            none of this aligner's vectors; `shards` is out of range; or `late` cannot be had.
        FileNotFoundError: There is no such folder or run.
        DataError: The data set cannot be read, or there is nothing to index.
    """
    check_shards(shards)
    check_code(vectors)
    name, run = _name_and_model(run)
    aligner = load_aligner(run)
    patches = checked_patches(aligner, patches, late, Storage(out), shards)
    if unfinished := unfinished_note(run):
        logger.info(f"note: {unfinished}")
    reading = ReadOptions(layout, group, SPLIT_RULE)
    if is_data_set(source, captions) and is_data_of_run(run, source):
        # Splits are metadata: they are those of the run.
        reading = read_options_of_run(run, source, layout, group)
    index = _require_utf8_path(Storage(out))
    collection = read_collection(
        source, captions, reading.layout, metadata, BASE_COLUMNS, reading.group, reading.split_rule,
        data_set_folder(index),
    )  # fmt: skip
    if collection.data is not None:
        log_first("note", differences_from_run(run, collection.data))
    vector_settings = _vector_settings(index, vectors, vector_width, aligner.width)
    try:
        with _translate_write_errors(index):
            if not collection.listing.files and not has_index(index):
                # Before an index is made, which would be empty.
                _begin(collection, 0)
            refuse_lost_columns(index, collection)
            names, manifests = open_manifests(name, collection.storage.location, index, aligner.width, shards)
            with index.lock():
                parts = [open_part(index, *each) for each in zip(names, manifests, strict=True)]
                report = _update_index(
                    run, aligner, collection, index, parts, ray, workers, verify, allow_drop, patches,
                    partial(_build_ann, sizes=sizes, settings=vector_settings, late=late),
                )  # fmt: skip
                most = max(part.table.count_rows() for part in parts)
                _note_unused(parts[0].storage, bool(vectors or vector_width), most, sizes)
                return report
    except TimeoutError:
        raise InvalidIndexError(f"{index}: another process is writing it; wait for that one") from None


def _name_and_model(run: str | Path) -> tuple[str, str]:
    """What an index records of a model, and what it is opened by: of the hub one commit, with its prefix if any."""
    folder = resolve_run(run)
    if is_pretrained(folder):
        folder = resolve_model(folder)
    return (str(run) if str(run).startswith("hf-hub:") else folder), folder


def _vector_settings(index: Storage, vectors: str, vector_width: int, width: int) -> VectorSettings:
    shards = read_shards(index)
    current = read_settings(shard_storage(index, shards.shards[0]) if shards else index)
    return check_settings(vectors, vector_width, width, current)


def _note_unused(index: Storage, given: bool, count: int, sizes: tuple[int, int]) -> None:
    """Log that settings of the lists have no effect, where the index has none."""
    if given and not (can_map(index) and sizes[0] < count <= sizes[1]):
        logger.info(
            f"note: --vectors and --vector-width have no effect: they are for indexes of {sizes[0] + 1:,} to "
            f'{sizes[1]:,} images on a disk of this machine, with numkong (pip install "clipvisionalign[search]")'
        )


def _build_ann(
    aligner: Aligner, table: Any, index: Storage, manifest: IndexManifest, count: int,
    *, sizes: tuple[int, int], settings: VectorSettings, late: bool,
) -> None:  # fmt: skip
    """The approximate index, whose search is made wide enough for words as this aligner encodes them; and the files of
    late interaction."""

    def text_vectors() -> np.ndarray:
        return np.asarray(aligner.encode_captions(null_texts()), dtype=np.float32)

    build_ann_index(table, index, manifest, count, sizes=sizes, settings=settings, text_vectors=text_vectors)
    update_late(index, late)


@contextmanager
def _translate_write_errors(index: Storage) -> Iterator[None]:
    """Errors of the disk or the database while writing become an InvalidIndexError."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        is_database_error = isinstance(error, RuntimeError) and str(error).startswith("lance error")
        if not is_database_error and getattr(error, "errno", None) not in _WRITE_ERRNOS:
            raise
        # After the message come places in the database's own source.
        message = str(error).partition(", /")[0].partition("\n")[0]
        raise InvalidIndexError(
            f"{index}: cannot be written: {message}. What was written before stays; run it again"
        ) from error


def _require_utf8_path(index: Storage) -> Storage:
    """The same storage. Raises InvalidIndexError for a path that is not UTF-8, which the database cannot open."""
    try:
        index.location.encode()
    except UnicodeEncodeError:
        raise InvalidIndexError(
            f"{printable(str(index))}: the path of an index has to be UTF-8: give another --out"
        ) from None
    return index


def _begin(collection: Collection, indexed: int) -> None:
    """Log what there is to index, and its problems. Raises DataError where there is no image, and none indexed."""
    listing, source = collection.listing, printable(str(collection.storage))
    logger.info(f"{source}: {len(listing.files):,} files that may be images; {indexed:,} in the index")
    log_problems(collection)
    if not listing.files and not indexed:
        reason = "; ".join(listing.not_taken.lines()) or "it is empty"
        raise DataError(f"{source}: no image to index: {reason}")


def _update_index(
    run: str | Path, aligner: Aligner, collection: Collection, index: Storage, parts: Sequence[IndexPart],
    ray: str, workers: int, verify: bool, allow_drop: bool, patches: int | None, build_ann: Callable[..., None],
) -> IndexReport:  # fmt: skip
    storage, listing = collection.storage, collection.listing
    for part in parts:
        if not part.rows:
            # What was made of a former table would be taken for that of this one, which has the same versions.
            remove_mapped(part.storage)
            remove_late(part.storage)
            forget_null_cosines(part.storage)
            forget_null_cosines(index)
    rows = [row for part in parts for row in part.rows]
    broken = BrokenFiles(index.read(BROKEN_FILES_NAME) or "")
    _begin(collection, len(rows))
    changes = diff_files(storage, listing, rows, broken, verify)
    _note_unlisted(collection, changes, rows)
    check_drop(changes, listing, storage, index, len(rows), allow_drop)
    _record_folder(index, [part.name for part in parts], storage, changes, len(rows), allow_drop)
    if changes.surplus:
        logger.info(f"{len(changes.surplus):,} rows are of files that have another row: they are taken out")
    part_of = deal_changes(parts, changes)
    stored = [each for part in parts if part.name and (each := read_patch_settings(part.storage))]
    if stored and not patches:
        # A shard that is made again has the patches that the others have.
        patches = stored[0].pool
    for part in parts:
        _begin_part(aligner, collection, part, patches)
    if collection.metadata is not None and (own := parts[0].camera.user_camera_columns):
        logger.info(f"metadata: its own {', '.join(own)} counts, not what the images' headers have")
    report = new_report(listing, changes)
    pending, kept_as = changes.pending, parts[0].patches.settings if parts[0].patches else None
    number_of = plan_numbers(index, parts, pending)
    encoding = (
        embed_files_with_ray(run, aligner.image_tower.image_transform, storage, pending, ray, workers, kept_as)
        if ray and pending
        else embed_files(aligner, storage, pending, kept_as)
    )
    batches = progress(encoding, "encoding images", len(pending), units_per_item=len)
    for count in write_rows(index, parts, part_of, number_of, batches, collection.metadata, broken, report):
        logger.info(f"{count:,} of {len(pending):,} encoded")
    drop_missing(index, parts, listing, broken, report, allow_drop)
    for part in parts:
        _finish_part(aligner, collection, part, report)
    align_columns(parts)
    if collection.captions is not None:
        index_captions(aligner, parts, collection.captions)
    report.captions = sum(count_captions(part.storage) for part in parts)
    report_sources(report, collection, broken)
    _complete(run, aligner, index, parts, report, build_ann)
    forget_numbers(index)
    return report


def _note_unlisted(collection: Collection, changes: Changes, rows: Sequence[dict[str, Any]]) -> None:
    """Log that rows are dropped of images that are there, and of which the data set has no row."""
    deleted = set(changes.deleted) if collection.data is not None else ()
    there = [row["path"] for row in rows if row["id"] in deleted and collection.storage.has_file(row["raw"])]
    if there:
        images = "1 image is" if len(there) == 1 else f"{len(there):,} images are"
        logger.info(
            f"note: {images} there of which the data set has no row, such as {printable(there[0])}: no longer indexed, "
            f"nor what was stored of {'it' if len(there) == 1 else 'them'}"
        )


def _record_folder(
    index: Storage, names: Sequence[str], images: Storage, changes: Changes, count: int, allow_drop: bool
) -> None:
    """Record that the images were moved, if they were: most of those of the index have to be there."""
    before = recorded_folders(index, names) - {images.location}
    if not before:
        return
    where, missing = printable(min(before)), count - changes.unchanged - changes.moved
    if missing > max(1, MAX_DROP_SHARE * count) and not allow_drop:
        raise InvalidIndexError(
            f"{index}: an index of {where}, which is not there; of its {count:,} images {count - missing:,} are in "
            f"{images}, so that it is none of their places: give another --out, or --allow-drop to replace them"
        )
    record_folder(index, names, images.location)
    logger.info(f"note: the images were in {where}; they are in {images} now")


def _begin_part(aligner: Aligner, collection: Collection, part: IndexPart, patches: int | None) -> None:
    """What an update does to a part before images are encoded."""
    part.patches = begin_patches(aligner, part.storage, {row["id"]: row["hash"] for row in part.rows}, patches)
    part.camera = open_camera_columns(part.storage, part.table, collection.metadata)
    sync_metadata_columns(part.table, collection, part.camera)
    # Captions and decisions first: after an interruption in between, the row is recognised as moved once more.
    move_captions(part.storage, part.changes.renamed)
    _move_decisions(part)
    apply_changes(part.table, part.changes)
    fill_old_rows(part.table, part.storage, collection.storage, part.camera, part.changes)


def _move_decisions(part: IndexPart) -> None:
    """Decisions on duplicates follow their files; ones that cannot be read are no reason to refuse an update."""
    if not part.changes.renamed:
        return
    deleted = {*part.changes.deleted, *part.changes.surplus}
    renamed = {
        (row["hash"], row["path"]): part.changes.renamed[row["path"]]
        for row in part.rows
        if row["path"] in part.changes.renamed
    }
    try:
        gone = {(row["hash"], row["path"]) for row in part.rows if row["id"] in deleted}
        move_decisions(part.storage, renamed, gone)
    except InvalidIndexError as error:
        logger.info(f"note: paths of decisions on duplicates stay as they are: {error}")


def _finish_part(aligner: Aligner, collection: Collection, part: IndexPart, report: IndexReport) -> None:
    """What an update does to a part once its images are written; the counts of the report are counted up."""
    if part.patches:
        counts = finish_patches(aligner, collection.storage, part.table, part.patches)
        report.patches = {name: report.patches.get(name, 0) + number for name, number in counts.items()}
    sync_metadata_values(part.table, collection.metadata, part.camera)
    fill_places(part.table, part.camera)
    report.camera = dict(Counter(report.camera) + part.camera.counts)
    report.there += part.table.count_rows()
    drop_captions(part.storage, part.table)


def _complete(
    run: str | Path, aligner: Aligner, index: Storage, parts: Sequence[IndexPart], report: IndexReport,
    build_ann: Callable[..., None],
) -> None:  # fmt: skip
    """What lies beside the tables: approximate indexes, what chance gives, the calibration, the text tower."""
    encode = cache(lambda texts: aligner.encode_captions(list(texts)))
    for part in parts:
        build_ann(aligner, part.table, part.storage, part.manifest, part.table.count_rows())
        if part.table.count_rows():
            write_null_cosines(part.storage, [part.table], lambda texts: encode(tuple(texts)))
    if parts[0].name and report.there:
        write_null_cosines(index, [part.table for part in parts], lambda texts: encode(tuple(texts)))
    copy_calibration(run, index, parts[0].manifest)
    # Last: without it the index is complete too.
    report.text_tower = keep_text_tower(run, index, parts[0].manifest.aligner, aligner)
    for part in parts if parts[0].name else ():
        keep_text_tower(run, part.storage, part.manifest.aligner, aligner, quiet=True)
