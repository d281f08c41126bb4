"""An index of a picture collection: vectors, thumbnails and what is known of each file, in LanceDB.

- Made again it encodes only what is new or changed, finds what was moved by its content, and drops what is gone; what
  has become of the files stands in `changes.py`.
- Rows are written some at a time, each writing whole or not at all: an index that was killed goes on where it was.
- A picture that cannot be read or decoded is listed in broken.jsonl, and tried again when it may be otherwise.
- Up to `EXACT` pictures every search is exact; beyond, an approximate index is built, of graphs (HNSW), and beyond
  `GRAPHS` of short codes (PQ); what it misses is measured.
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
from clipvisionalign.data.of_run import Reading, differs_from_run, is_data_of_run, reading_of_run, unfinished_note
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.images import NotTaken
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.progress import progress
from clipvisionalign.search.broken import BROKEN, BrokenFiles
from clipvisionalign.search.changes import Changes, check_drop, compare, too_many
from clipvisionalign.search.collection import Collection, is_data_set, read_collection
from clipvisionalign.search.encode import Row, encoded, encoded_by_ray
from clipvisionalign.search.files import BadIndex, Listing, Place, name_of, printable
from clipvisionalign.search.metadata import Kind, Metadata

Say = Callable[[str], None]

FORMAT = 1
ABOUT, TABLE, CAPTIONS = "index.json", "pictures", "captions"
#: Columns that every table of pictures has; what others it has came as metadata.
OWN = ("id", "path", "raw", "size", "mtime_ns", "hash", "width", "height", "thumbnail", "vector")

#: Pictures up to which a search looks at every vector, and up to which it walks graphs.
EXACT, GRAPHS = 100_000, 10_000_000
#: How soon an index that is open sees what another process has written.
SEEN_AFTER = timedelta(seconds=5)
#: Pictures, and captions, that are written at a time.
ROWS, CAPTION_ROWS = 512, 2048
#: Why the system writes nothing: a full disk, a quota, a limit, a fault of the disk, one that is for reading only.
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
#: Queries by which an approximate index is measured.
SAMPLE, FIRST = 200, 10


@dataclass
class About:
    """What index.json holds. aligner: fingerprint of the run that encoded it; kind: "exact", "IVF_HNSW_SQ" or "IVF_PQ";
    recall: what an approximate search finds of the first ten, measured on a sample."""

    run: str
    aligner: str
    folder: str
    width: int
    kind: str = "exact"
    recall: float = 1.0
    settings: dict[str, int] = field(default_factory=dict)
    format: int = FORMAT


@dataclass
class Report:
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
    not_taken: NotTaken = field(default_factory=NotTaken)
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

    def sum(self) -> str:
        """How the files that were found add up."""
        parts = [(self.encoded, "encoded"), (self.unchanged, "unchanged"), (self.moved, "moved")]
        others = [
            (self.broken, "could not be read or decoded"), (self.other_names, "are other names of these"),
            (self.dead_links, "are links that lead nowhere"),
            (self.not_taken.total, "are not taken for images"),
        ]  # fmt: skip
        told = [f"{count:,} {what}" for count, what in [*parts, *(each for each in others if each[0])]]
        return f"{self.files:,} files = {' + '.join(told)}"


def aligner_fingerprint(run: str | Path) -> str:
    """A hash of a run's weights."""
    digest = hashlib.blake2b(digest_size=16)
    with (Path(run) / "model.safetensors").open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def build_index(
    run: str | Path, source: str | Path, out: str | Path, say: Say = print, *, captions: bool = False,
    layout: str = "auto", metadata: str | Path = "", ray: str = "", workers: int = 0,
    sizes: tuple[int, int] = (EXACT, GRAPHS), verify: bool = False, allow_drop: bool = False,
    group: str = "",
) -> Report:  # fmt: skip
    """Index the pictures below a folder, or of a data set; or bring an index that is there up to date.

    source, out: paths, or URLs that fsspec and LanceDB reach. captions: index the data set's as well. metadata: a table
    with more columns (`collection.read_metadata`); without one, an index keeps those that it has. ray: encode through
    a Ray cluster at this address, "local" for one on this machine, by so many `workers`. sizes: pictures up to which
    every search is exact, and up to which graphs are built. verify: read every file, to know by its content whether it
    changed. allow_drop: drop rows however many lose their files, and those below folders that cannot be listed. group:
    a column of the data set whose images of one value stand in one split.

    Raises BadIndex where `out` is an index of another run or folder, or holds something else, where it would drop rows
    that it should not (`changes.check_drop`), and where it cannot be written; FileNotFoundError for a folder or run
    that is not there; DataError.
    """
    aligner = load_aligner(run)
    if unfinished := unfinished_note(run):
        say(f"note: {unfinished}")
    how = Reading(layout, group, SPLIT_RULE)
    if is_data_set(source, captions) and is_data_of_run(run, source):
        # Splits are metadata: they are those of the run.
        how = reading_of_run(run, source, layout, group)
    collection = read_collection(source, captions, how.layout, metadata, OWN, how.group, how.split_rule)
    if collection.data is not None:
        _tell_some("note", differs_from_run(run, collection.data), say)
    index = _checked(Place(out))
    try:
        with _told_in_words(index):
            about = _open(run, collection.place, index, aligner)
            with index.held():
                return _bring_up_to_date(
                    run, aligner, collection, index, about, say, ray, workers, sizes, verify, allow_drop
                )
    except TimeoutError:
        raise BadIndex(f"{index}: another process is writing it; wait for that one") from None


@contextmanager
def _told_in_words(index: Place) -> Iterator[None]:
    """What cannot be written, as to a full disk, is an error that names the index, and no fault of the program."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        of_database = isinstance(error, RuntimeError) and str(error).startswith("lance error")
        if not of_database and getattr(error, "errno", None) not in _NOT_WRITTEN:
            raise
        # The first words say what happened; then come the places in the database's own source.
        told = str(error).partition(", /")[0].partition("\n")[0]
        raise BadIndex(f"{index}: cannot be written: {told}. What was written before stays; run it again") from error


def _bring_up_to_date(
    run: str | Path, aligner: Aligner, collection: Collection, index: Place, about: About, say: Say, ray: str,
    workers: int, sizes: tuple[int, int], verify: bool, allow_drop: bool,
) -> Report:  # fmt: skip
    place, listing = collection.place, collection.listing
    table = _table(index, about.width)
    rows = _columns(table, ("id", "path", "raw", "size", "mtime_ns", "hash"))
    broken = BrokenFiles(index.read(BROKEN) or "")
    say(f"{printable(str(place))}: {len(listing.files):,} files that may be pictures; {len(rows):,} in the index")
    _tell(collection, say)
    if not listing.files and not rows:
        told = "; ".join(listing.not_taken.lines()) or "it is empty"
        raise DataError(f"{printable(str(place))}: no image to index: {told}")
    changes = compare(place, listing, rows, broken, verify)
    check_drop(changes, listing, place, index, len(rows), allow_drop)
    if changes.surplus:
        say(f"{len(changes.surplus):,} rows are of files that have another row: they are taken out")
    _set_columns(table, collection.metadata)
    # Captions first: killed in between, the row is found to have moved once more.
    _move_captions(index, changes.renamed)
    _rewrite(table, changes)
    report = _report(listing, changes)
    todo = changes.todo
    encoding = encoded_by_ray(run, aligner.image_tower.input, place, todo, ray, workers) if ray and todo else (
        encoded(aligner, place, todo))  # fmt: skip
    batches = progress(encoding, "encoding pictures", len(todo), count=len)
    last = max((row["id"] for row in rows), default=-1)
    for count in _write_rows(table, index, batches, collection.metadata, broken, report, last):
        say(f"{count:,} of {len(todo):,} encoded")
    _drop(table, index, listing, changes, broken, report, allow_drop)
    _set_metadata(table, collection)
    report.there = table.count_rows()
    _drop_captions(index, table)
    if collection.captions is not None:
        _index_captions(aligner, index, table, collection.captions, say)
    report.captions = count_captions(index)
    if collection.data is not None and collection.data.rows_in_files:
        report.data_set = _data_report(collection, collection.data, broken)
    if collection.metadata is not None and collection.metadata.rows:
        report.metadata = _metadata_report(collection.metadata)
    _approximate(table, index, about, report.there, say, sizes)
    return report


def _report(listing: Listing, changes: Changes) -> Report:
    return Report(
        files=listing.total, unchanged=changes.unchanged, moved=changes.moved, other_names=len(listing.other_names),
        dead_links=len(listing.dead_links), not_taken=listing.not_taken,
        unlisted={name_of(folder): why for folder, why in listing.unlisted.items()},
    )  # fmt: skip


def _data_report(collection: Collection, data: CaptionedImages, broken: BrokenFiles) -> dict[str, int]:
    """Rows of a data set's files; as `check` counts, those of images that cannot be read or decoded are left out."""
    unread = sum(rows for raw, rows in collection.rows.items() if raw in broken)
    left_out = sum(problem.rows for problem in data.problems) + unread
    return {"rows": data.rows_in_files, "read": sum(row.rows for row in data) - unread, "left_out": left_out}


def _metadata_report(metadata: Metadata) -> dict[str, Any]:
    left_out = [str(problem) for problem in metadata.left_out]
    return {"rows": metadata.rows, "matched": metadata.matched, "listed": len(left_out), "left_out": left_out}


def _tell(collection: Collection, say: Say) -> None:
    """What of a folder could not be listed, what of a data set is left out, and what of the metadata was taken
    otherwise than it is written."""
    unlisted = collection.listing.unlisted
    _tell_some("cannot be listed", [f"{name_of(folder)}: {why}" for folder, why in unlisted.items()], say)
    if collection.data is not None:
        left_out = [problem for problem in collection.data.problems if problem.effect == "left out"]
        _tell_some("data set", left_out, say)
    metadata = collection.metadata
    if metadata is None or not metadata.rows:
        return
    say(f"metadata: {metadata.rows:,} rows = {metadata.matched:,} of an image + {len(metadata.left_out):,} left out")
    for effect in ("left out", "mended", "warning"):
        _tell_some("metadata", [problem for problem in metadata.problems if problem.effect == effect], say)


def _tell_some(what: str, things: Sequence[Any], say: Say, most: int = 5) -> None:
    """The first of some things, a line for each, and how many more there are."""
    for thing in things[:most]:
        say(f"{what}: {printable(str(thing))}")
    if len(things) > most:
        say(f"{what}: and {len(things) - most:,} more")


def _open(run: str | Path, place: Place, index: Place, aligner: Aligner) -> About:
    """What is known of the index; made where there is none yet."""
    found = About(str(Path(run).resolve()), aligner_fingerprint(run), place.location, aligner.config.width)
    if index.read(ABOUT) is not None:
        before = read_about(index)
        if before.aligner != found.aligner:
            told = f"it was made by {before.run}; search it with that run, or give another --out"
            raise BadIndex(f"{index}: an index of another aligner: {told}")
        if before.folder != found.folder:
            raise BadIndex(f"{index}: an index of {before.folder}; give another --out")
        return before
    if not index.is_empty():
        raise BadIndex(f"{index}: is there already and no index; give another --out")
    _write(index, found)
    return found


def _checked(index: Place) -> Place:
    """The same place. Raises BadIndex where the database has no name for it."""
    try:
        index.location.encode()
    except UnicodeEncodeError:
        raise BadIndex(f"{printable(str(index))}: the path of an index has to be UTF-8: give another --out") from None
    return index


def _placed(index: str | Path | Place) -> Place:
    return index if isinstance(index, Place) else Place(index)


def read_about(index: str | Path | Place) -> About:
    """What index.json says. Raises BadIndex where there is none that can be read."""
    place = _placed(index)
    text = place.read(ABOUT)
    if text is None:
        raise BadIndex(f"{index}: no index there; 'clipvisionalign index RUN FOLDER --out {index}' makes one")
    try:
        found = About(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise BadIndex(f"{index}/{ABOUT}: cannot be read: {error}") from None
    if found.format != FORMAT:
        raise BadIndex(f"{index}/{ABOUT}: of another version (format {found.format}, not {FORMAT})")
    return found


def _write(index: Place, about: About) -> None:
    index.write(ABOUT, json.dumps(asdict(about), indent=2) + "\n")


def read_broken(index: str | Path | Place) -> list[dict[str, Any]]:
    """The files that could not be read or decoded: path, reason, size, mtime_ns, fault, decoders."""
    return list(BrokenFiles(_placed(index).read(BROKEN) or "").entries.values())


def open_table(index: str | Path | Place) -> Any:
    """The pictures of an index. Raises ModuleNotFoundError without LanceDB, BadIndex where there is none."""
    read_about(index)
    table = _opened(_placed(index), TABLE)
    if table is None:
        raise BadIndex(f"{index}: its table cannot be opened: give the command that made it again")
    return table


def open_captions(index: str | Path | Place) -> Any:
    """The captions of an index; None where it has none."""
    return _opened(_placed(index), CAPTIONS)


def _opened(index: Place, name: str) -> Any:
    """A table; None where there is none of that name that can be opened."""
    try:
        return _database(index).open_table(name)
    except (ValueError, OSError):
        return None


def count_captions(index: str | Path | Place) -> int:
    """How many captions an index has."""
    table = open_captions(index)
    return 0 if table is None else int(table.count_rows())


def _database(index: Place) -> Any:
    with warnings.catch_warnings():
        # It warns of forked processes at import; none is forked here.
        warnings.simplefilter("ignore")
        import lancedb

    # A service that is up sees what is indexed meanwhile.
    return lancedb.connect(index.location, read_consistency_interval=SEEN_AFTER)


def _opened_or_new(index: Place, name: str, columns: Sequence[tuple[str, Any]]) -> Any:
    import pyarrow as arrow

    table = _opened(index, name)
    return _database(index).create_table(name, schema=arrow.schema(columns)) if table is None else table


def _vectors(width: int) -> Any:
    import pyarrow as arrow

    return arrow.list_(arrow.float32(), width)


def _table(index: Place, width: int) -> Any:
    import pyarrow as arrow

    columns = [
        ("id", arrow.int64()), ("path", arrow.string()), ("raw", arrow.binary()), ("size", arrow.int64()),
        ("mtime_ns", arrow.int64()), ("hash", arrow.string()), ("width", arrow.int32()), ("height", arrow.int32()),
        ("thumbnail", arrow.binary()), ("vector", _vectors(width)),
    ]  # fmt: skip
    return _opened_or_new(index, TABLE, columns)


def metadata_columns(table: Any) -> dict[str, bool]:
    """The columns that came as metadata, and whether they hold numbers."""
    return {name: kind != "text" for name, kind in _metadata_kinds(table).items()}


def _metadata_kinds(table: Any) -> dict[str, Kind]:
    import pyarrow as arrow

    def kind(type_: Any) -> Kind:
        return "number" if arrow.types.is_floating(type_) else "integer" if arrow.types.is_integer(type_) else "text"

    return {each.name: kind(each.type) for each in table.schema if each.name not in OWN}


def _set_columns(table: Any, metadata: Metadata | None) -> None:
    """Give the table the columns that the metadata has, and no others of their kind."""
    import pyarrow as arrow

    if metadata is None:
        return
    before = _metadata_kinds(table)
    gone = [name for name, kind in before.items() if metadata.kinds.get(name) != kind]
    if gone:
        table.drop_columns(gone)
    types = {"integer": arrow.int64(), "number": arrow.float64(), "text": arrow.string()}
    new = [arrow.field(name, types[kind]) for name, kind in metadata.kinds.items() if before.get(name) != kind]
    if new:
        table.add_columns(new)


def _set_metadata(table: Any, collection: Collection) -> None:
    """Write down anew what the metadata says otherwise than the table."""
    metadata = collection.metadata
    if metadata is None or not metadata.kinds:
        return
    names = ["raw", *metadata.kinds]
    rows = _columns(table, ["path", *names])
    wanted = [{"raw": row["raw"]} | metadata.of(row.pop("path")) for row in rows]
    changed = [new for new, row in zip(wanted, rows, strict=True) if new != row]
    for start in range(0, len(changed), 10_000):
        _update(table, "raw", changed[start : start + 10_000], names)


def _update(table: Any, key: str, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Write some columns of rows that are there anew."""
    import pyarrow as arrow

    if rows:
        schema = arrow.schema([table.schema.field(name) for name in names])
        table.merge_insert(key).when_matched_update_all().execute(arrow.Table.from_pylist(list(rows), schema=schema))


def _columns(table: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of all rows."""
    return table.search().select(list(names)).limit(max(1, table.count_rows())).to_arrow().to_pylist()


def _rewrite(table: Any, changes: Changes) -> None:
    """Write down what was touched or moved; and take out rows of a file that has another one, which are then as good
    as any that have to be encoded."""
    _delete(table, changes.surplus)
    _update(table, "id", changes.rewritten, ("id", "path", "raw", "size", "mtime_ns"))


def _delete(table: Any, ids: Sequence[int]) -> None:
    for start in range(0, len(ids), 1000):
        table.delete(f"id IN ({', '.join(map(str, ids[start : start + 1000]))})")


def _write_rows(
    table: Any, index: Place, batches: Iterator[list[Row]], metadata: Metadata | None,
    broken: BrokenFiles, report: Report, last: int,
) -> Iterator[int]:  # fmt: skip
    """Write what was encoded, `ROWS` at a time, and tell how many are; a row that is there already under its path is
    replaced. last: the greatest number that a row has."""
    import pyarrow as arrow

    # Without metadata, a row that is replaced keeps what it has of it.
    schema = arrow.schema([table.schema.field(name) for name in (*OWN, *(metadata.kinds if metadata else ()))])
    rows: list[dict[str, Any]] = []

    def write() -> int:
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
            last += 1
            name = name_of(raw)
            rows.append(row | {"id": last, "path": name} | (metadata.of(name) if metadata else {}))
        if len(rows) >= ROWS:
            yield write()
    write()


def _drop(
    table: Any,
    index: Place,
    listing: Listing,
    changes: Changes,
    broken: BrokenFiles,
    report: Report,
    allowed: bool,
) -> None:
    """Forget what is gone: rows, and entries of broken files. A row whose file can no longer be decoded is none any
    more; one whose file cannot be read just now stays. Raises BadIndex where the former are too many."""
    there = {*(file.raw for file in listing.files), *listing.unreadable, *listing.missing}
    for raw in broken:
        if raw not in there and not listing.hidden_below(raw):
            broken.remove(raw)
    broken.write(index)
    report.broken = sum(raw in there for raw in broken)
    rows = [row for row in _columns(table, ("id", "raw")) if row["raw"] in broken]
    bad = [row["id"] for row in rows if broken.has_no_content(row["raw"])]
    count = table.count_rows()
    if not allowed and too_many(len(bad), count):
        raise BadIndex(
            f"{index}: the files of {len(bad):,} of its {count:,} rows can no longer be decoded ({index}/{BROKEN} has "
            "each): were they damaged? No row was dropped. If they are to be, give --allow-drop"
        )
    gone = {*changes.gone, *bad}
    _delete(table, sorted(gone))
    report.dropped, report.kept = len(gone), sum(row["id"] not in gone for row in rows)


def _move_captions(index: Place, renamed: Mapping[str, str]) -> None:
    """Captions go with their picture to another path."""
    table = open_captions(index) if renamed else None
    if table is not None:
        rows = [
            row | {"path": renamed[row["path"]]} for row in _columns(table, ("id", "path")) if row["path"] in renamed
        ]
        _update(table, "id", rows, ("id", "path"))


def _drop_captions(index: Place, pictures: Any) -> None:
    """Captions go with their picture out of the index."""
    table = open_captions(index)
    if table is not None:
        there = {row["path"] for row in _columns(pictures, ("path",))}
        _delete(table, [row["id"] for row in _columns(table, ("id", "path")) if row["path"] not in there])


def _index_captions(
    aligner: Aligner, index: Place, pictures: Any, captions: Mapping[str, Sequence[str]], say: Say
) -> None:
    """Bring the table of captions up to date: those of the pictures that are there, each once."""
    import pyarrow as arrow

    columns = [("id", arrow.int64()), ("text", arrow.string()), ("path", arrow.string()),
               ("vector", _vectors(aligner.config.width))]  # fmt: skip
    table = _opened_or_new(index, CAPTIONS, columns)
    there = {row["path"] for row in _columns(pictures, ("path",))}
    wanted = dict.fromkeys((path, text) for path, texts in captions.items() if path in there for text in texts)
    known = {(row["path"], row["text"]): row["id"] for row in _columns(table, ("id", "path", "text"))}
    _delete(table, [number for key, number in known.items() if key not in wanted])
    new = [key for key in wanted if key not in known]
    if not new:
        return
    say(f"encoding {len(new):,} captions ...")
    last = max(known.values(), default=-1)
    parts = [new[start : start + CAPTION_ROWS] for start in range(0, len(new), CAPTION_ROWS)]
    for part in progress(parts, "encoding captions", len(new), count=len):
        vectors = aligner.encode_captions([text for _, text in part]).numpy()
        rows = [{"id": last + 1 + number, "path": path, "text": text, "vector": vector}
                for number, ((path, text), vector) in enumerate(zip(part, vectors, strict=True))]  # fmt: skip
        last += len(rows)
        table.add(arrow.Table.from_pylist(rows, schema=table.schema))
    table.optimize()


def approximate_by_size(count: int, width: int, exact: int = EXACT, graphs: int = GRAPHS) -> tuple[str, dict[str, int]]:
    """The kind of index for so many vectors, and its settings."""
    if count <= exact:
        return "exact", {}
    # Partitions of about 8,000: few enough that each is worth walking, small enough to be built in memory.
    partitions = max(1, round(count / 8192))
    if count <= graphs:
        return "IVF_HNSW_SQ", {"partitions": partitions, "m": 24, "ef_construction": 200}
    return "IVF_PQ", {"partitions": partitions, "sub_vectors": width // 4}


def _approximate(table: Any, index: Place, about: About, count: int, say: Say, sizes: tuple[int, int]) -> None:
    """Build, bring up to date, or do without an approximate index, by the number of pictures."""
    table.optimize()
    kind, settings = approximate_by_size(count, about.width, *sizes)
    before = about.settings.get("partitions", 0)
    if kind == "exact":
        about.kind, about.recall, about.settings = kind, 1.0, {}
    elif kind != about.kind or abs(settings["partitions"] - before) > before / 4:
        say(f"building an approximate index of {count:,} vectors ...")
        options = {"num_sub_vectors": settings["sub_vectors"]} if kind == "IVF_PQ" else {
            name: settings[name] for name in ("m", "ef_construction")}  # fmt: skip
        table.create_index(
            metric="dot", index_type=kind, num_partitions=settings["partitions"], vector_column_name="vector", **options
        )
        about.kind, about.settings = kind, settings
    if kind != "exact":
        about.recall = measured_recall(table, kind)
        found = f"{100 * about.recall:.1f} % of the first {FIRST}, on {SAMPLE} of its own vectors"
        say(f"the approximate search finds {found}")
    _write(index, about)


def measured_recall(table: Any, kind: str, seed: int = 0) -> float:
    """What an approximate search finds of the exact first ten, for vectors between the table's own."""
    from clipvisionalign.search.query import nearest, vectors_of

    rng = np.random.default_rng(seed)
    numbers = table.search().select(["id"]).limit(table.count_rows()).to_arrow()["id"].to_numpy()
    ids = ", ".join(str(number) for number in rng.choice(numbers, min(SAMPLE, len(numbers)), replace=False))
    vectors = vectors_of(table.search().where(f"id IN ({ids})").select(["vector"]).limit(SAMPLE).to_arrow())
    vectors = vectors + rng.normal(0, 0.3 / np.sqrt(vectors.shape[1]), vectors.shape).astype(np.float32)
    found = []
    for vector in vectors:
        right = {row["id"] for row in nearest(table, vector, FIRST, columns=("id",))}
        near = {row["id"] for row in nearest(table, vector, FIRST, kind, columns=("id",))}
        found.append(len(right & near) / max(1, len(right)))
    return float(np.mean(found))
