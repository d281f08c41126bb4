"""An index of a picture collection: vectors, thumbnails and what is known of each file, in LanceDB.

- Made again it encodes only what is new or changed, finds what was moved by its content, and drops what has vanished.
- Rows are written some at a time, each writing whole or not at all: an index that was killed goes on where it was.
- A picture that cannot be decoded is listed in broken.jsonl, and tried again when its file changes.
- Up to `EXACT` pictures every search is exact; beyond, an approximate index is built, of graphs (HNSW), and beyond
  `GRAPHS` of short codes (PQ); what it misses is measured.
- Captions, where they are wanted, stand in a table of their own, to be found by a picture.

Sources: Malkov and Yashunin, "HNSW", arXiv:1603.09320; Jegou, Douze and Schmid, "Product quantization for nearest
neighbor search", TPAMI 2011.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.models.aligner import Aligner, load_aligner
from clipvisionalign.pictures import PictureError
from clipvisionalign.progress import progress
from clipvisionalign.search.collection import Collection, Metadata, read_collection
from clipvisionalign.search.encode import Row, Todo, encoded, encoded_by_ray, why_not
from clipvisionalign.search.files import PictureFile, Place, content_hash

Say = Callable[[str], None]

FORMAT = 1
ABOUT, BROKEN, TABLE, CAPTIONS = "index.json", "broken.jsonl", "pictures", "captions"
#: Columns that every table of pictures has; what others it has came as metadata.
OWN = ("id", "path", "raw", "size", "mtime_ns", "hash", "width", "height", "thumbnail", "vector")

#: Pictures up to which a search looks at every vector, and up to which it walks graphs.
EXACT, GRAPHS = 100_000, 10_000_000
#: How soon an index that is open sees what another process has written.
SEEN_AFTER = timedelta(seconds=5)
#: Pictures, and captions, that are written at a time.
ROWS, CAPTION_ROWS = 512, 2048
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
    """What an indexing did, in numbers of pictures; `captions` are those that are there."""

    there: int = 0
    encoded: int = 0
    unchanged: int = 0
    moved: int = 0
    dropped: int = 0
    broken: int = 0
    captions: int = 0

    def to_dict(self) -> dict[str, int]:
        """For `--json`."""
        return asdict(self)


class BadIndex(ValueError):
    """An index that cannot be used: the message says why, and what to do."""


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
    sizes: tuple[int, int] = (EXACT, GRAPHS),
) -> Report:  # fmt: skip
    """Index the pictures below a folder, or of a data set; or bring an index that is there up to date.

    source, out: paths, or URLs that fsspec and LanceDB reach. captions: index the data set's as well. metadata: a table
    with more columns (`collection.read_metadata`); without one, an index keeps those that it has. ray: encode through
    a Ray cluster at this address, "local" for one on this machine, by so many `workers`. sizes: pictures up to which
    every search is exact, and up to which graphs are built.

    Raises BadIndex where `out` is an index of another run or folder, or holds something else; FileNotFoundError for a
    folder or run that is not there; DataError.
    """
    aligner = load_aligner(run)
    collection = read_collection(source, captions, layout, metadata, OWN)
    index = Place(out)
    about = _open(run, collection.place, index, aligner)
    try:
        with index.held():
            return _bring_up_to_date(run, aligner, collection, index, about, say, ray, workers, sizes)
    except TimeoutError:
        raise BadIndex(f"{index}: another process is writing it; wait for that one") from None


def _bring_up_to_date(
    run: str | Path, aligner: Aligner, collection: Collection, index: Place, about: About, say: Say, ray: str,
    workers: int, sizes: tuple[int, int],
) -> Report:  # fmt: skip
    place = collection.place
    table = _table(index, about.width)
    _set_columns(table, collection.metadata)
    known = {row["raw"]: row for row in _columns(table, ("id", "raw", "size", "mtime_ns", "hash"))}
    broken = {entry["path"]: entry for entry in read_broken(index)}
    files, report = collection.files, Report()
    say(f"{place}: {len(files):,} files that may be pictures; {len(known):,} in the index")
    todo = _sort_out(place, table, files, known, broken, report)
    rows = encoded_by_ray(run, aligner.image_tower.input, place, todo, ray, workers) if ray and todo else (
        encoded(aligner, place, todo))  # fmt: skip
    batches = progress(rows, "encoding pictures", len(todo), count=len)
    last = max((row["id"] for row in known.values()), default=-1)
    for count in _write_rows(table, index, batches, collection.metadata, broken, report, last):
        say(f"{count:,} of {len(todo):,} encoded")
    _drop(table, index, files, broken, report)
    _set_metadata(table, collection)
    report.there = table.count_rows()
    if collection.captions is not None:
        _index_captions(aligner, index, table, collection.captions, say)
    report.captions = count_captions(index)
    _approximate(table, index, about, report.there, say, sizes)
    return report


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
    """The files that could not be decoded: path, reason, size, mtime_ns."""
    return [json.loads(line) for line in (_placed(index).read(BROKEN) or "").split("\n") if line]


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
    import pyarrow as arrow

    return {each.name: arrow.types.is_floating(each.type) for each in table.schema if each.name not in OWN}


def _set_columns(table: Any, metadata: Metadata | None) -> None:
    """Give the table the columns that the metadata has, and no others of their kind."""
    import pyarrow as arrow

    if metadata is None:
        return
    before = metadata_columns(table)
    gone = [name for name, number in before.items() if metadata.numbers.get(name) is not number]
    if gone:
        table.drop_columns(gone)
    new = [arrow.field(name, arrow.float64() if number else arrow.string())
           for name, number in metadata.numbers.items() if before.get(name) is not number]  # fmt: skip
    if new:
        table.add_columns(new)


def _set_metadata(table: Any, collection: Collection) -> None:
    """Write down anew what the metadata says otherwise than the table."""
    import pyarrow as arrow

    metadata = collection.metadata
    if metadata is None or not metadata.numbers:
        return
    names = ["raw", *metadata.numbers]
    wanted = {file.raw: {"raw": file.raw} | metadata.of(file.name) for file in collection.files}
    changed = [wanted[row["raw"]] for row in _columns(table, names) if wanted.get(row["raw"], row) != row]
    schema = arrow.schema([table.schema.field(name) for name in names])
    for start in range(0, len(changed), 10_000):
        data = arrow.Table.from_pylist(changed[start : start + 10_000], schema=schema)
        table.merge_insert("raw").when_matched_update_all().execute(data)


def _columns(table: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of all rows."""
    return table.search().select(list(names)).limit(max(1, table.count_rows())).to_arrow().to_pylist()


def _sort_out(
    place: Place, table: Any, files: Sequence[PictureFile], known: dict[bytes, dict[str, Any]],
    broken: dict[str, dict[str, Any]], report: Report,
) -> list[Todo]:  # fmt: skip
    """What has to be encoded, with its hash. What was touched or moved is written down anew, not encoded."""
    import pyarrow as arrow

    there = {file.raw for file in files}
    vanished = {row["hash"]: row["id"] for raw, row in known.items() if raw not in there}
    todo, elsewhere = [], []
    for file in files:
        row, bad = known.get(file.raw), broken.get(file.name)
        if row and (row["size"], row["mtime_ns"]) == (file.size, file.mtime_ns):
            report.unchanged += 1
            continue
        if bad and (bad["size"], bad["mtime_ns"]) == (file.size, file.mtime_ns):
            report.broken += 1
            continue
        if not row and not vanished:
            # It can be no file that was moved: its hash is taken when it is read to be decoded.
            todo.append((file, ""))
            continue
        try:
            found = content_hash(place.picture(file.raw))
        except (OSError, PictureError) as error:
            _list_broken(broken, file, why_not(error, place, file.raw), report)
            continue
        now = {"path": file.name, "raw": file.raw, "size": file.size, "mtime_ns": file.mtime_ns}
        if row and row["hash"] == found:
            elsewhere.append({"id": row["id"]} | now)
            report.unchanged += 1
        elif not row and found in vanished:
            elsewhere.append({"id": vanished.pop(found)} | now)
            report.moved += 1
        else:
            todo.append((file, found))
    if elsewhere:
        schema = arrow.schema([table.schema.field(name) for name in ("id", "path", "raw", "size", "mtime_ns")])
        data = arrow.Table.from_pylist(elsewhere, schema=schema)
        table.merge_insert("id").when_matched_update_all().execute(data)
    return todo


def _literal(raw: bytes) -> str:
    """Bytes as the table's SQL writes them: never as text, whatever stands in them."""
    return f"X'{raw.hex()}'"


def _list_broken(broken: dict[str, dict[str, Any]], file: PictureFile, reason: str, report: Report) -> None:
    broken[file.name] = {"path": file.name, "reason": reason, "size": file.size, "mtime_ns": file.mtime_ns}
    report.broken += 1


def _write_rows(
    table: Any, index: Place, batches: Iterator[list[Row]], metadata: Metadata | None,
    broken: dict[str, dict[str, Any]], report: Report, last: int,
) -> Iterator[int]:  # fmt: skip
    """Write what was encoded, `ROWS` at a time, and tell how many are; a row that is there already under its path is
    replaced. last: the greatest number that a row has."""
    import pyarrow as arrow

    # Without metadata, a row that is replaced keeps what it has of it.
    schema = arrow.schema([table.schema.field(name) for name in (*OWN, *(metadata.numbers if metadata else ()))])
    rows: list[dict[str, Any]] = []

    def write() -> int:
        if rows:
            data = arrow.Table.from_pylist(rows, schema=schema)
            table.merge_insert("raw").when_matched_update_all().when_not_matched_insert_all().execute(data)
            report.encoded += len(rows)
            rows.clear()
        _write_broken(index, broken)
        return report.encoded

    for batch in batches:
        for row in batch:
            file = PictureFile(row["raw"], row["size"], row["mtime_ns"])
            if reason := row.pop("reason"):
                _list_broken(broken, file, reason, report)
                continue
            broken.pop(file.name, None)
            last += 1
            rows.append(row | {"id": last, "path": file.name} | (metadata.of(file.name) if metadata else {}))
        if len(rows) >= ROWS:
            yield write()
    write()


def _write_broken(index: Place, broken: dict[str, dict[str, Any]]) -> None:
    index.write(BROKEN, "".join(json.dumps(entry) + "\n" for entry in broken.values()))


def _drop(
    table: Any, index: Place, files: Sequence[PictureFile], broken: dict[str, dict[str, Any]], report: Report
) -> None:
    """Forget what has vanished: rows, and entries of broken files. A row whose file is broken now is none any more."""
    there, names = {file.raw for file in files}, {file.name for file in files}
    bad = {file.raw for file in files if file.name in broken}
    gone = [row["raw"] for row in _columns(table, ("raw",)) if row["raw"] not in there or row["raw"] in bad]
    for start in range(0, len(gone), 200):
        table.delete(f"raw IN ({', '.join(map(_literal, gone[start : start + 200]))})")
    report.dropped = len(gone)
    for name in [name for name in broken if name not in names]:
        del broken[name]
    _write_broken(index, broken)


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
    gone = [str(number) for key, number in known.items() if key not in wanted]
    for start in range(0, len(gone), 1000):
        table.delete(f"id IN ({', '.join(gone[start : start + 1000])})")
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
