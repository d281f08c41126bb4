"""An index of a picture collection: vectors, thumbnails and what is known of each file, in LanceDB.

- Made again it encodes only what is new or changed, finds what was moved by its content, and drops what is gone; what
  has become of the files stands in `changes.py`.
- Rows are written some at a time, each writing whole or not at all: an index that was killed goes on where it was.
- A picture that cannot be read or decoded is listed in broken.jsonl, and tried again when it may be otherwise.
- Up to `MAX_EXACT_VECTORS` pictures every search is exact; beyond, an approximate index is built, of graphs (HNSW),
  and beyond `MAX_HNSW_VECTORS` of short codes (PQ); what it misses is measured.
- Captions, where they are wanted, stand in a table of their own, to be found by a picture.

Sources: Malkov and Yashunin, "HNSW", arXiv:1603.09320; Jegou, Douze and Schmid, "Product quantization for nearest
neighbor search", TPAMI 2011.
"""

from __future__ import annotations

import errno
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.run_data import (
    ReadOptions,
    differences_from_run,
    is_data_of_run,
    read_options_of_run,
    unfinished_note,
)
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.images import ExcludedFiles
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.progress import progress
from clipvisionalign.search.broken_files import BROKEN_FILES_NAME, BrokenFiles
from clipvisionalign.search.collection import Collection, is_data_set, read_collection
from clipvisionalign.search.diff import Changes, check_drop, diff_files, exceeds_drop_limit
from clipvisionalign.search.embed import IndexRow, embed_files, embed_files_with_ray
from clipvisionalign.search.metadata import ColumnType, Metadata
from clipvisionalign.search.storage import FileListing, InvalidIndexError, Storage, decode_path, printable

Log = Callable[[str], None]

INDEX_FORMAT = 1
ONNX_MANIFEST_FILE, IMAGE_TABLE, TEXT_TOWER_FILE = "index.json", "pictures", "captions"
#: Columns that every table of pictures has; what others it has came as metadata.
BASE_COLUMNS = ("id", "path", "raw", "size", "mtime_ns", "hash", "width", "height", "thumbnail", "vector")

#: Pictures up to which a search looks at every vector, and up to which it walks graphs.
MAX_EXACT_VECTORS, MAX_HNSW_VECTORS = 100_000, 10_000_000
#: How soon an index that is open sees what another process has written.
READ_CONSISTENCY_INTERVAL = timedelta(seconds=5)
#: Pictures, and captions, that are written at a time.
IMAGES_PER_WRITE, CAPTIONS_PER_WRITE = 512, 2048
#: Why the system writes nothing: a full disk, a quota, a limit, a fault of the disk, one that is for reading only.
_WRITE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
#: Queries by which an approximate index is measured.
RECALL_QUERIES, RECALL_DEPTH = 200, 10


@dataclass
class IndexManifest:
    """What index.json holds. aligner: fingerprint of the run that encoded it; kind: "exact", "IVF_HNSW_SQ" or "IVF_PQ";
    recall: what an approximate search finds of the first ten, measured on a sample."""

    run: str
    aligner: str
    folder: str
    width: int
    kind: str = "exact"
    recall: float = 1.0
    settings: dict[str, int] = field(default_factory=dict)
    format: int = INDEX_FORMAT


@dataclass
class IndexReport:
    """What an indexing did, in numbers of files. `files` that were found are all that follows down to `broken`.

    other_names: of files that count already; dead_links: lead nowhere; not_taken: for images; broken: could not be read
    or decoded, and are listed. there, captions: rows now in the index; dropped: rows that are gone; kept: rows whose
    files are there and could not be read; unlisted: folders that could not be listed. data_set: rows of its files, read
    and left out; metadata: rows of the table, how many of them an image has, and each that none has.
    """

    there: int = 0
    files: int = 0
    encoded: int = 0
    unchanged: int = 0
    moved: int = 0
    other_names: int = 0
    dead_links: int = 0
    not_taken: ExcludedFiles = field(default_factory=ExcludedFiles)
    broken: int = 0
    dropped: int = 0
    kept: int = 0
    captions: int = 0
    unlisted: dict[str, str] = field(default_factory=dict)
    data_set: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"not_taken": self.not_taken.to_dict()}

    def summary(self) -> str:
        """How the files that were found add up."""
        parts = [(self.encoded, "encoded"), (self.unchanged, "unchanged"), (self.moved, "moved")]
        optional_counts = [
            (self.broken, "could not be read or decoded"), (self.other_names, "are other names of these"),
            (self.dead_links, "are links that lead nowhere"),
            (self.not_taken.total, "are not taken for images"),
        ]  # fmt: skip
        terms = [f"{count:,} {label}" for count, label in [*parts, *(each for each in optional_counts if each[0])]]
        return f"{self.files:,} files = {' + '.join(terms)}"


def aligner_fingerprint(run: str | Path) -> str:
    """A hash of a run's weights."""
    digest = hashlib.blake2b(digest_size=16)
    with (Path(run) / "model.safetensors").open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def build_index(
    run: str | Path, source: str | Path, out: str | Path, say: Log = print, *, captions: bool = False,
    layout: str = "auto", metadata: str | Path = "", ray: str = "", workers: int = 0,
    sizes: tuple[int, int] = (MAX_EXACT_VECTORS, MAX_HNSW_VECTORS), verify: bool = False, allow_drop: bool = False,
    group: str = "",
) -> IndexReport:  # fmt: skip
    """Index the pictures below a folder, or of a data set; or bring an index that is there up to date.

    source, out: paths, or URLs that fsspec and LanceDB reach. captions: index the data set's as well. metadata: a table
    with more columns (`collection.read_metadata`); without one, an index keeps those that it has. ray: encode through
    a Ray cluster at this address, "local" for one on this machine, by so many `workers`. sizes: pictures up to which
    every search is exact, and up to which graphs are built. verify: read every file, to know by its content whether it
    changed. allow_drop: drop rows however many lose their files, and those below folders that cannot be listed. group:
    a column of the data set whose images of one value stand in one split.

    Raises InvalidIndexError where `out` is an index of another run or folder, or holds something else, where it would
    drop rows that it should not (`changes.check_drop`), and where it cannot be written; FileNotFoundError for a folder
    or run that is not there; DataError.
    """
    aligner = load_aligner(run)
    if unfinished := unfinished_note(run):
        say(f"note: {unfinished}")
    reading = ReadOptions(layout, group, SPLIT_RULE)
    if is_data_set(source, captions) and is_data_of_run(run, source):
        # Splits are metadata: they are those of the run.
        reading = read_options_of_run(run, source, layout, group)
    collection = read_collection(
        source, captions, reading.layout, metadata, BASE_COLUMNS, reading.group, reading.split_rule
    )
    if collection.data is not None:
        _log_first("note", differences_from_run(run, collection.data), say)
    index = _require_utf8_path(Storage(out))
    try:
        with _translate_write_errors(index):
            manifest = _open_manifest(run, collection.storage, index, aligner)
            with index.lock():
                return _update_index(
                    run, aligner, collection, index, manifest, say, ray, workers, sizes, verify, allow_drop
                )
    except TimeoutError:
        raise InvalidIndexError(f"{index}: another process is writing it; wait for that one") from None


@contextmanager
def _translate_write_errors(index: Storage) -> Iterator[None]:
    """What cannot be written, as to a full disk, is an error that names the index, and no fault of the program."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        is_database_error = isinstance(error, RuntimeError) and str(error).startswith("lance error")
        if not is_database_error and getattr(error, "errno", None) not in _WRITE_ERRNOS:
            raise
        # The first words say what happened; then come the places in the database's own source.
        message = str(error).partition(", /")[0].partition("\n")[0]
        raise InvalidIndexError(
            f"{index}: cannot be written: {message}. What was written before stays; run it again"
        ) from error


def _update_index(
    run: str | Path,
    aligner: Aligner,
    collection: Collection,
    index: Storage,
    manifest: IndexManifest,
    say: Log,
    ray: str,
    workers: int,
    sizes: tuple[int, int],
    verify: bool,
    allow_drop: bool,
) -> IndexReport:
    storage, listing = collection.storage, collection.listing
    table = _open_or_create_image_table(index, manifest.width)
    rows = _read_columns(table, ("id", "path", "raw", "size", "mtime_ns", "hash"))
    broken = BrokenFiles(index.read(BROKEN_FILES_NAME) or "")
    say(f"{printable(str(storage))}: {len(listing.files):,} files that may be pictures; {len(rows):,} in the index")
    _log_problems(collection, say)
    if not listing.files and not rows:
        reason = "; ".join(listing.not_taken.lines()) or "it is empty"
        raise DataError(f"{printable(str(storage))}: no image to index: {reason}")
    changes = diff_files(storage, listing, rows, broken, verify)
    check_drop(changes, listing, storage, index, len(rows), allow_drop)
    if changes.surplus:
        say(f"{len(changes.surplus):,} rows are of files that have another row: they are taken out")
    _sync_metadata_columns(table, collection.metadata)
    # Captions first: killed in between, the row is found to have moved once more.
    _move_captions(index, changes.renamed)
    _apply_changes(table, changes)
    report = _new_report(listing, changes)
    pending = changes.pending
    encoding = (
        embed_files_with_ray(run, aligner.image_tower.image_transform, storage, pending, ray, workers)
        if ray and pending
        else (embed_files(aligner, storage, pending))
    )
    batches = progress(encoding, "encoding pictures", len(pending), units_per_item=len)
    last_id = max((row["id"] for row in rows), default=-1)
    for count in _write_rows(table, index, batches, collection.metadata, broken, report, last_id):
        say(f"{count:,} of {len(pending):,} encoded")
    _drop_missing(table, index, listing, changes, broken, report, allow_drop)
    _sync_metadata_values(table, collection)
    report.there = table.count_rows()
    _drop_captions(index, table)
    if collection.captions is not None:
        _index_captions(aligner, index, table, collection.captions, say)
    report.captions = count_captions(index)
    if collection.data is not None and collection.data.rows_in_files:
        report.data_set = _data_report(collection, collection.data, broken)
    if collection.metadata is not None and collection.metadata.rows:
        report.metadata = _metadata_report(collection.metadata)
    _build_ann_index(table, index, manifest, report.there, say, sizes)
    return report


def _new_report(listing: FileListing, changes: Changes) -> IndexReport:
    return IndexReport(
        files=listing.total, unchanged=changes.unchanged, moved=changes.moved, other_names=len(listing.other_names),
        dead_links=len(listing.dead_links), not_taken=listing.not_taken,
        unlisted={decode_path(folder): reason for folder, reason in listing.unlisted.items()},
    )  # fmt: skip


def _data_report(collection: Collection, data: CaptionedImages, broken: BrokenFiles) -> dict[str, int]:
    """Rows of a data set's files; as `check` counts, those of images that cannot be read or decoded are left out."""
    unread = sum(rows for raw, rows in collection.row_counts.items() if raw in broken)
    left_out = sum(problem.rows for problem in data.problems) + unread
    return {"rows": data.rows_in_files, "read": sum(row.row_count for row in data) - unread, "left_out": left_out}


def _metadata_report(metadata: Metadata) -> dict[str, Any]:
    left_out = [str(problem) for problem in metadata.left_out]
    return {"rows": metadata.rows, "matched": metadata.matched, "listed": len(left_out), "left_out": left_out}


def _log_problems(collection: Collection, say: Log) -> None:
    """What of a folder could not be listed, what of a data set is left out, and what of the metadata was taken
    otherwise than it is written."""
    unlisted = collection.listing.unlisted
    _log_first("cannot be listed", [f"{decode_path(folder)}: {reason}" for folder, reason in unlisted.items()], say)
    if collection.data is not None:
        left_out = [problem for problem in collection.data.problems if problem.effect == "left out"]
        _log_first("data set", left_out, say)
    metadata = collection.metadata
    if metadata is None or not metadata.rows:
        return
    say(f"metadata: {metadata.rows:,} rows = {metadata.matched:,} of an image + {len(metadata.left_out):,} left out")
    for effect in ("left out", "mended", "warning"):
        _log_first("metadata", [problem for problem in metadata.problems if problem.effect == effect], say)


def _log_first(prefix: str, items: Sequence[Any], say: Log, limit: int = 5) -> None:
    """The first of some things, a line for each, and how many more there are."""
    for item in items[:limit]:
        say(f"{prefix}: {printable(str(item))}")
    if len(items) > limit:
        say(f"{prefix}: and {len(items) - limit:,} more")


def _open_manifest(run: str | Path, storage: Storage, index: Storage, aligner: Aligner) -> IndexManifest:
    """What is known of the index; made where there is none yet."""
    manifest = IndexManifest(str(Path(run).resolve()), aligner_fingerprint(run), storage.location, aligner.config.width)
    if index.read(ONNX_MANIFEST_FILE) is not None:
        existing = read_manifest(index)
        if existing.aligner != manifest.aligner:
            hint = f"it was made by {existing.run}; search it with that run, or give another --out"
            raise InvalidIndexError(f"{index}: an index of another aligner: {hint}")
        if existing.folder != manifest.folder:
            raise InvalidIndexError(f"{index}: an index of {existing.folder}; give another --out")
        return existing
    if not index.is_empty():
        raise InvalidIndexError(f"{index}: is there already and no index; give another --out")
    _write_manifest(index, manifest)
    return manifest


def _require_utf8_path(index: Storage) -> Storage:
    """The same place. Raises InvalidIndexError where the database has no name for it."""
    try:
        index.location.encode()
    except UnicodeEncodeError:
        raise InvalidIndexError(
            f"{printable(str(index))}: the path of an index has to be UTF-8: give another --out"
        ) from None
    return index


def _as_storage(index: str | Path | Storage) -> Storage:
    return index if isinstance(index, Storage) else Storage(index)


def read_manifest(index: str | Path | Storage) -> IndexManifest:
    """What index.json says. Raises InvalidIndexError where there is none that can be read."""
    storage = _as_storage(index)
    text = storage.read(ONNX_MANIFEST_FILE)
    if text is None:
        raise InvalidIndexError(f"{index}: no index there; 'clipvisionalign index RUN FOLDER --out {index}' makes one")
    try:
        manifest = IndexManifest(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise InvalidIndexError(f"{index}/{ONNX_MANIFEST_FILE}: cannot be read: {error}") from None
    if manifest.format != INDEX_FORMAT:
        raise InvalidIndexError(
            f"{index}/{ONNX_MANIFEST_FILE}: of another version (format {manifest.format}, not {INDEX_FORMAT})"
        )
    return manifest


def _write_manifest(index: Storage, manifest: IndexManifest) -> None:
    index.write(ONNX_MANIFEST_FILE, json.dumps(asdict(manifest), indent=2) + "\n")


def read_broken_files(index: str | Path | Storage) -> list[dict[str, Any]]:
    """The files that could not be read or decoded: path, reason, size, mtime_ns, fault, decoders."""
    return list(BrokenFiles(_as_storage(index).read(BROKEN_FILES_NAME) or "").entries.values())


def open_image_table(index: str | Path | Storage) -> Any:
    """The pictures of an index. Raises ModuleNotFoundError without LanceDB, InvalidIndexError where there is none."""
    read_manifest(index)
    table = _try_open_table(_as_storage(index), IMAGE_TABLE)
    if table is None:
        raise InvalidIndexError(f"{index}: its table cannot be opened: give the command that made it again")
    return table


def open_caption_table(index: str | Path | Storage) -> Any:
    """The captions of an index; None where it has none."""
    return _try_open_table(_as_storage(index), TEXT_TOWER_FILE)


def _try_open_table(index: Storage, name: str) -> Any:
    """A table; None where there is none of that name that can be opened."""
    try:
        return _connect(index).open_table(name)
    except (ValueError, OSError):
        return None


def count_captions(index: str | Path | Storage) -> int:
    """How many captions an index has."""
    table = open_caption_table(index)
    return 0 if table is None else int(table.count_rows())


def _connect(index: Storage) -> Any:
    with warnings.catch_warnings():
        # It warns of forked processes at import; none is forked here.
        warnings.simplefilter("ignore")
        import lancedb

    # A service that is up sees what is indexed meanwhile.
    return lancedb.connect(index.location, read_consistency_interval=READ_CONSISTENCY_INTERVAL)


def _open_or_create_table(index: Storage, name: str, columns: Sequence[tuple[str, Any]]) -> Any:
    import pyarrow as arrow

    table = _try_open_table(index, name)
    return _connect(index).create_table(name, schema=arrow.schema(columns)) if table is None else table


def _vector_type(width: int) -> Any:
    import pyarrow as arrow

    return arrow.list_(arrow.float32(), width)


def _open_or_create_image_table(index: Storage, width: int) -> Any:
    import pyarrow as arrow

    columns = [
        ("id", arrow.int64()), ("path", arrow.string()), ("raw", arrow.binary()), ("size", arrow.int64()),
        ("mtime_ns", arrow.int64()), ("hash", arrow.string()), ("width", arrow.int32()), ("height", arrow.int32()),
        ("thumbnail", arrow.binary()), ("vector", _vector_type(width)),
    ]  # fmt: skip
    return _open_or_create_table(index, IMAGE_TABLE, columns)


def metadata_columns(table: Any) -> dict[str, bool]:
    """The columns that came as metadata, and whether they hold numbers."""
    return {name: kind != "text" for name, kind in _metadata_types(table).items()}


def _metadata_types(table: Any) -> dict[str, ColumnType]:
    import pyarrow as arrow

    def column_type(type_: Any) -> ColumnType:
        return "number" if arrow.types.is_floating(type_) else "integer" if arrow.types.is_integer(type_) else "text"

    return {each.name: column_type(each.type) for each in table.schema if each.name not in BASE_COLUMNS}


def _sync_metadata_columns(table: Any, metadata: Metadata | None) -> None:
    """Give the table the columns that the metadata has, and no others of their kind."""
    import pyarrow as arrow

    if metadata is None:
        return
    existing = _metadata_types(table)
    obsolete = [name for name, kind in existing.items() if metadata.column_types.get(name) != kind]
    if obsolete:
        table.drop_columns(obsolete)
    types = {"integer": arrow.int64(), "number": arrow.float64(), "text": arrow.string()}
    added = [
        arrow.field(name, types[kind]) for name, kind in metadata.column_types.items() if existing.get(name) != kind
    ]
    if added:
        table.add_columns(added)


def _sync_metadata_values(table: Any, collection: Collection) -> None:
    """Write down anew what the metadata says otherwise than the table."""
    metadata = collection.metadata
    if metadata is None or not metadata.column_types:
        return
    names = ["raw", *metadata.column_types]
    rows = _read_columns(table, ["path", *names])
    new_rows = [{"raw": row["raw"]} | metadata.row_for(row.pop("path")) for row in rows]
    changed = [new for new, row in zip(new_rows, rows, strict=True) if new != row]
    for start in range(0, len(changed), 10_000):
        _update_rows(table, "raw", changed[start : start + 10_000], names)


def _update_rows(table: Any, key: str, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Write some columns of rows that are there anew."""
    import pyarrow as arrow

    if rows:
        schema = arrow.schema([table.schema.field(name) for name in names])
        table.merge_insert(key).when_matched_update_all().execute(arrow.Table.from_pylist(list(rows), schema=schema))


def _read_columns(table: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of all rows."""
    return table.search().select(list(names)).limit(max(1, table.count_rows())).to_arrow().to_pylist()


def _apply_changes(table: Any, changes: Changes) -> None:
    """Write down what was touched or moved; and take out rows of a file that has another one, which are then as good
    as any that have to be encoded."""
    _delete_rows(table, changes.surplus)
    _update_rows(table, "id", changes.updated, ("id", "path", "raw", "size", "mtime_ns"))


def _delete_rows(table: Any, ids: Sequence[int]) -> None:
    for start in range(0, len(ids), 1000):
        table.delete(f"id IN ({', '.join(map(str, ids[start : start + 1000]))})")


def _write_rows(
    table: Any, index: Storage, batches: Iterator[list[IndexRow]], metadata: Metadata | None,
    broken: BrokenFiles, report: IndexReport, last_id: int,
) -> Iterator[int]:  # fmt: skip
    """Write what was encoded, `ROWS` at a time, and tell how many are; a row that is there already under its path is
    replaced. last: the greatest number that a row has."""
    import pyarrow as arrow

    # Without metadata, a row that is replaced keeps what it has of it.
    schema = arrow.schema(
        [table.schema.field(name) for name in (*BASE_COLUMNS, *(metadata.column_types if metadata else ()))]
    )
    rows: list[dict[str, Any]] = []

    def flush() -> int:
        if rows:
            data = arrow.Table.from_pylist(rows, schema=schema)
            table.merge_insert("raw").when_matched_update_all().when_not_matched_insert_all().execute(data)
            report.encoded += len(rows)
            rows.clear()
        broken.write(index)
        return report.encoded

    for batch in batches:
        for row in batch:
            raw, reason, fault = row["raw"], row.pop("reason"), row.pop("fault")
            if reason:
                broken.add(raw, reason, fault, row["size"], row["mtime_ns"])
                continue
            broken.remove(raw)
            last_id += 1
            name = decode_path(raw)
            rows.append(row | {"id": last_id, "path": name} | (metadata.row_for(name) if metadata else {}))
        if len(rows) >= IMAGES_PER_WRITE:
            yield flush()
    flush()


def _drop_missing(
    table: Any,
    index: Storage,
    listing: FileListing,
    changes: Changes,
    broken: BrokenFiles,
    report: IndexReport,
    allowed: bool,
) -> None:
    """Forget what is gone: rows, and entries of broken files. A row whose file can no longer be decoded is none any
    more; one whose file cannot be read just now stays. Raises InvalidIndexError where the former are too many."""
    present_paths = {*(file.raw for file in listing.files), *listing.unreadable, *listing.missing}
    for raw in broken:
        if raw not in present_paths and not listing.inaccessible_parent(raw):
            broken.remove(raw)
    broken.write(index)
    report.broken = sum(raw in present_paths for raw in broken)
    rows = [row for row in _read_columns(table, ("id", "raw")) if row["raw"] in broken]
    undecodable_ids = [row["id"] for row in rows if broken.is_undecodable(row["raw"])]
    count = table.count_rows()
    if not allowed and exceeds_drop_limit(len(undecodable_ids), count):
        raise InvalidIndexError(
            f"{index}: the files of {len(undecodable_ids):,} of its {count:,} rows can no longer be decoded "
            f"({index}/{BROKEN_FILES_NAME} has "
            "each): were they damaged? No row was dropped. If they are to be, give --allow-drop"
        )
    dropped_ids = {*changes.deleted, *undecodable_ids}
    _delete_rows(table, sorted(dropped_ids))
    report.dropped, report.kept = len(dropped_ids), sum(row["id"] not in dropped_ids for row in rows)


def _move_captions(index: Storage, renamed: Mapping[str, str]) -> None:
    """Captions go with their picture to another path."""
    table = open_caption_table(index) if renamed else None
    if table is not None:
        rows = [
            row | {"path": renamed[row["path"]]}
            for row in _read_columns(table, ("id", "path"))
            if row["path"] in renamed
        ]
        _update_rows(table, "id", rows, ("id", "path"))


def _drop_captions(index: Storage, image_table: Any) -> None:
    """Captions go with their picture out of the index."""
    table = open_caption_table(index)
    if table is not None:
        image_paths = {row["path"] for row in _read_columns(image_table, ("path",))}
        _delete_rows(
            table, [row["id"] for row in _read_columns(table, ("id", "path")) if row["path"] not in image_paths]
        )


def _index_captions(
    aligner: Aligner, index: Storage, image_table: Any, captions: Mapping[str, Sequence[str]], say: Log
) -> None:
    """Bring the table of captions up to date: those of the pictures that are there, each once."""
    import pyarrow as arrow

    columns = [("id", arrow.int64()), ("text", arrow.string()), ("path", arrow.string()),
               ("vector", _vector_type(aligner.config.width))]  # fmt: skip
    table = _open_or_create_table(index, TEXT_TOWER_FILE, columns)
    image_paths = {row["path"] for row in _read_columns(image_table, ("path",))}
    wanted_captions = dict.fromkeys(
        (path, text) for path, texts in captions.items() if path in image_paths for text in texts
    )
    existing_ids = {(row["path"], row["text"]): row["id"] for row in _read_columns(table, ("id", "path", "text"))}
    _delete_rows(table, [number for key, number in existing_ids.items() if key not in wanted_captions])
    new_captions = [key for key in wanted_captions if key not in existing_ids]
    if not new_captions:
        return
    say(f"encoding {len(new_captions):,} captions ...")
    last_id = max(existing_ids.values(), default=-1)
    chunks = [
        new_captions[start : start + CAPTIONS_PER_WRITE] for start in range(0, len(new_captions), CAPTIONS_PER_WRITE)
    ]
    for chunk in progress(chunks, "encoding captions", len(new_captions), units_per_item=len):
        vectors = aligner.encode_captions([text for _, text in chunk]).numpy()
        rows = [{"id": last_id + 1 + number, "path": path, "text": text, "vector": vector}
                for number, ((path, text), vector) in enumerate(zip(chunk, vectors, strict=True))]  # fmt: skip
        last_id += len(rows)
        table.add(arrow.Table.from_pylist(rows, schema=table.schema))
    table.optimize()


def choose_index_type(
    count: int, width: int, exact: int = MAX_EXACT_VECTORS, graphs: int = MAX_HNSW_VECTORS
) -> tuple[str, dict[str, int]]:
    """The kind of index for so many vectors, and its settings."""
    if count <= exact:
        return "exact", {}
    # Partitions of about 8,000: few enough that each is worth walking, small enough to be built in memory.
    partitions = max(1, round(count / 8192))
    if count <= graphs:
        return "IVF_HNSW_SQ", {"partitions": partitions, "m": 24, "ef_construction": 200}
    return "IVF_PQ", {"partitions": partitions, "sub_vectors": width // 4}


def _build_ann_index(
    table: Any, index: Storage, manifest: IndexManifest, count: int, say: Log, sizes: tuple[int, int]
) -> None:
    """Build, bring up to date, or do without an approximate index, by the number of pictures."""
    table.optimize()
    kind, settings = choose_index_type(count, manifest.width, *sizes)
    old_partitions = manifest.settings.get("partitions", 0)
    if kind == "exact":
        manifest.kind, manifest.recall, manifest.settings = kind, 1.0, {}
    elif kind != manifest.kind or abs(settings["partitions"] - old_partitions) > old_partitions / 4:
        say(f"building an approximate index of {count:,} vectors ...")
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
        say(f"the approximate search finds {recall_text}")
    _write_manifest(index, manifest)


def measure_recall(table: Any, kind: str, seed: int = 0) -> float:
    """What an approximate search finds of the exact first ten, for vectors between the table's own."""
    from clipvisionalign.search.searcher import search_table, vector_column

    rng = np.random.default_rng(seed)
    all_ids = table.search().select(["id"]).limit(table.count_rows()).to_arrow()["id"].to_numpy()
    ids = ", ".join(str(number) for number in rng.choice(all_ids, min(RECALL_QUERIES, len(all_ids)), replace=False))
    vectors = vector_column(table.search().where(f"id IN ({ids})").select(["vector"]).limit(RECALL_QUERIES).to_arrow())
    vectors = vectors + rng.normal(0, 0.3 / np.sqrt(vectors.shape[1]), vectors.shape).astype(np.float32)
    recalls = []
    for vector in vectors:
        exact_ids = {row["id"] for row in search_table(table, vector, RECALL_DEPTH, columns=("id",))}
        approximate_ids = {row["id"] for row in search_table(table, vector, RECALL_DEPTH, kind, columns=("id",))}
        recalls.append(len(exact_ids & approximate_ids) / max(1, len(exact_ids)))
    return float(np.mean(recalls))
