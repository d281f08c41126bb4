"""An index of a picture collection: vectors, thumbnails and what is known of each file, in LanceDB.

- Made again it encodes only what is new or changed, finds what was moved by its content, and drops what has vanished.
- Pictures are decoded ahead by threads while the tower looks at those before them.
- Rows are written some at a time, each writing whole or not at all: an index that was killed goes on where it was.
- A picture that cannot be decoded is listed in broken.jsonl, and tried again when its file changes.
- Up to `EXACT` pictures every search is exact; beyond, an approximate index is built, and what it misses is measured.

Source: Malkov and Yashunin, "HNSW", arXiv:1603.09320, for the approximate index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipvisionalign.models.aligner import Aligner, evaluating, load_aligner
from clipvisionalign.pictures import PictureError, open_picture
from clipvisionalign.progress import progress
from clipvisionalign.search.files import PictureFile, content_hash, picture_files

Say = Callable[[str], None]

FORMAT = 1
ABOUT, BROKEN, TABLE = "index.json", "broken.jsonl", "pictures"

#: Pictures up to which a search looks at every vector.
EXACT = 100_000
#: Pictures that go through the tower at a time, and rows that are written at a time.
BATCH, ROWS = 64, 512
#: Pixels of a thumbnail's longer side.
THUMBNAIL = 256
#: Queries by which an approximate index is measured.
SAMPLE, FIRST = 200, 10


@dataclass
class About:
    """What index.json holds. aligner: fingerprint of the run that encoded it; kind: "exact" or "IVF_HNSW_SQ"; recall:
    what an approximate search finds of the first ten, measured on a sample."""

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
    """What an indexing did, in numbers of pictures."""

    there: int = 0
    encoded: int = 0
    unchanged: int = 0
    moved: int = 0
    dropped: int = 0
    broken: int = 0

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


def build_index(run: str | Path, folder: str | Path, out: str | Path, say: Say = print, exact: int = EXACT) -> Report:
    """Index the pictures below `folder`, or bring an index that is there up to date.

    exact: pictures up to which no approximate index is built. Raises BadIndex where `out` is an index of another run
    or folder, or holds something else; FileNotFoundError for a folder or run that is not there.
    """
    source, index = Path(folder).resolve(), Path(out)
    if not source.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    aligner = load_aligner(run)
    about = _open(run, source, index, aligner)
    table = _table(index, about.width)
    report = Report()
    known = {row["raw"]: row for row in _columns(table, ("raw", "size", "mtime_ns", "hash"))}
    broken = {entry["path"]: entry for entry in read_broken(index)}
    files = list(picture_files(source))
    say(f"{source}: {len(files):,} files that may be pictures; {len(known):,} in the index")
    todo = _sort_out(source, table, files, known, broken, report)
    _encode(aligner, source, table, index, todo, broken, report, say)
    _drop(table, index, files, broken, report)
    report.there = table.count_rows()
    _approximate(table, index, about, report.there, exact, say)
    return report


def _open(run: str | Path, source: Path, index: Path, aligner: Aligner) -> About:
    """What is known of the index; made where there is none yet."""
    found = About(str(Path(run).resolve()), aligner_fingerprint(run), str(source), aligner.config.width)
    if (index / ABOUT).is_file():
        before = read_about(index)
        if before.aligner != found.aligner:
            told = f"it was made by {before.run}; search it with that run, or give another --out"
            raise BadIndex(f"{index}: an index of another aligner: {told}")
        if before.folder != found.folder:
            raise BadIndex(f"{index}: an index of {before.folder}; give another --out")
        return before
    if index.exists() and (not index.is_dir() or any(index.iterdir())):
        raise BadIndex(f"{index}: is there already and no index; give another --out")
    index.mkdir(parents=True, exist_ok=True)
    _write(index, found)
    return found


def read_about(index: str | Path) -> About:
    """What index.json says. Raises BadIndex where there is none that can be read."""
    path = Path(index) / ABOUT
    if not path.is_file():
        raise BadIndex(f"{index}: no index there; 'clipvisionalign index RUN FOLDER --out {index}' makes one")
    try:
        found = About(**json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise BadIndex(f"{path}: cannot be read: {error}") from None
    if found.format != FORMAT:
        raise BadIndex(f"{path}: of another version (format {found.format}, not {FORMAT})")
    return found


def _write(index: Path, about: About) -> None:
    _replace(index / ABOUT, json.dumps(asdict(about), indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Aside and renamed: half a file is never read."""
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def read_broken(index: str | Path) -> list[dict[str, Any]]:
    """The files that could not be decoded: path, reason, size, mtime_ns."""
    path = Path(index) / BROKEN
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def open_table(index: str | Path) -> Any:
    """The table of an index. Raises ModuleNotFoundError without LanceDB, BadIndex where there is none."""
    import lancedb

    read_about(index)
    database = lancedb.connect(str(index))
    try:
        return database.open_table(TABLE)
    except (ValueError, OSError) as error:
        raise BadIndex(f"{index}: its table cannot be opened: {error}") from None


def _table(index: Path, width: int) -> Any:
    import lancedb
    import pyarrow as arrow

    columns = [
        ("id", arrow.int64()), ("path", arrow.string()), ("raw", arrow.binary()), ("size", arrow.int64()),
        ("mtime_ns", arrow.int64()), ("hash", arrow.string()), ("width", arrow.int32()), ("height", arrow.int32()),
        ("thumbnail", arrow.binary()), ("vector", arrow.list_(arrow.float32(), width)),
    ]  # fmt: skip
    return lancedb.connect(str(index)).create_table(TABLE, schema=arrow.schema(columns), exist_ok=True)


def _columns(table: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some columns of all rows."""
    return table.search().select(list(names)).limit(max(1, table.count_rows())).to_arrow().to_pylist()


def _sort_out(
    source: Path, table: Any, files: Sequence[PictureFile], known: dict[bytes, dict[str, Any]],
    broken: dict[str, dict[str, Any]], report: Report,
) -> list[tuple[PictureFile, str]]:  # fmt: skip
    """What has to be encoded, with its hash. What was touched or moved is written down anew, not encoded."""
    there = {file.raw for file in files}
    vanished = {row["hash"]: raw for raw, row in known.items() if raw not in there}
    todo = []
    for file in files:
        row, bad = known.get(file.raw), broken.get(file.name)
        if row and (row["size"], row["mtime_ns"]) == (file.size, file.mtime_ns):
            report.unchanged += 1
            continue
        if bad and (bad["size"], bad["mtime_ns"]) == (file.size, file.mtime_ns):
            report.broken += 1
            continue
        try:
            found = content_hash(file.below(source))
        except OSError as error:
            _list_broken(broken, file, str(error.strerror), report)
            continue
        values = {"size": file.size, "mtime_ns": file.mtime_ns}
        if row and row["hash"] == found:
            table.update(where=f"raw = {_literal(file.raw)}", values=values)
            report.unchanged += 1
        elif not row and found in vanished:
            old = vanished.pop(found)
            moved = {"path": file.name, "raw": file.raw, **values}
            table.update(where=f"raw = {_literal(old)}", values=moved)
            report.moved += 1
        else:
            todo.append((file, found))
    return todo


def _literal(raw: bytes) -> str:
    """Bytes as the table's SQL writes them: never as text, whatever stands in them."""
    return f"X'{raw.hex()}'"


def _list_broken(broken: dict[str, dict[str, Any]], file: PictureFile, reason: str, report: Report) -> None:
    broken[file.name] = {"path": file.name, "reason": reason, "size": file.size, "mtime_ns": file.mtime_ns}
    report.broken += 1


@dataclass(frozen=True)
class _Decoded:
    pixels: Tensor
    width: int
    height: int
    thumbnail: bytes


def _decode(path: Path, look: Callable[[Image.Image], Tensor], size: int) -> _Decoded | PictureError:
    try:
        with Image.open(path) as opened:
            width, height = opened.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        width = height = 0  # told properly by what follows
    try:
        picture = open_picture(path, max(size, THUMBNAIL))
        pixels = look(picture)
    except PictureError as error:
        return error
    if not width:
        width, height = picture.size
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = BytesIO()
    small.save(out, "JPEG", quality=80)
    return _Decoded(pixels, width, height, out.getvalue())


def _decoded_ahead(
    aligner: Aligner, source: Path, files: Sequence[tuple[PictureFile, str]]
) -> Iterator[tuple[PictureFile, str, _Decoded | PictureError]]:
    """Decode in order, two batches ahead of whoever asks."""
    wanted = aligner.image_tower.input
    look, workers = wanted.transform(), max(1, (os.cpu_count() or 2) - 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[_Decoded | PictureError]] = []
        started = 0
        for number, (file, found) in enumerate(files):
            while started < min(len(files), number + 2 * BATCH):
                waiting.append(pool.submit(_decode, files[started][0].below(source), look, wanted.size))
                started += 1
            yield file, found, waiting.pop(0).result()


def _encode(
    aligner: Aligner, source: Path, table: Any, index: Path, todo: Sequence[tuple[PictureFile, str]],
    broken: dict[str, dict[str, Any]], report: Report, say: Say,
) -> None:  # fmt: skip
    """Encode and write, `ROWS` at a time; a row that is there already under its path is replaced."""
    import pyarrow as arrow

    last = max((row["id"] for row in _columns(table, ("id",))), default=-1)
    rows: list[dict[str, Any]] = []
    batch: list[tuple[PictureFile, str, _Decoded]] = []

    def look() -> None:
        nonlocal last
        if not batch:
            return
        with torch.no_grad(), evaluating(aligner):
            pixels = torch.stack([decoded.pixels for _, _, decoded in batch]).to(aligner.device)
            vectors = aligner.image_states(aligner.image_tower(pixels)).vectors.cpu().numpy()
        for (file, found, decoded), vector in zip(batch, vectors, strict=True):
            last += 1
            rows.append({
                "id": last, "path": file.name, "raw": file.raw, "size": file.size, "mtime_ns": file.mtime_ns,
                "hash": found, "width": decoded.width, "height": decoded.height, "thumbnail": decoded.thumbnail,
                "vector": vector,
            })  # fmt: skip
        batch.clear()

    def write() -> None:
        if rows:
            data = arrow.Table.from_pylist(rows, schema=table.schema)
            table.merge_insert("raw").when_matched_update_all().when_not_matched_insert_all().execute(data)
            report.encoded += len(rows)
            rows.clear()
        _write_broken(index, broken)

    decoded = _decoded_ahead(aligner, source, todo)
    for file, found, result in progress(decoded, "encoding pictures", len(todo)):
        if isinstance(result, PictureError):
            _list_broken(broken, file, str(result).replace(str(file.below(source)), file.name), report)
            continue
        broken.pop(file.name, None)
        batch.append((file, found, result))
        if len(batch) == BATCH:
            look()
        if len(rows) >= ROWS:
            write()
            say(f"{report.encoded:,} of {len(todo):,} encoded")
    look()
    write()


def _write_broken(index: Path, broken: dict[str, dict[str, Any]]) -> None:
    _replace(index / BROKEN, "".join(json.dumps(entry) + "\n" for entry in broken.values()))


def _drop(
    table: Any, index: Path, files: Sequence[PictureFile], broken: dict[str, dict[str, Any]], report: Report
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


def _approximate(table: Any, index: Path, about: About, count: int, exact: int, say: Say) -> None:
    """Build, bring up to date, or do without an approximate index, by the number of pictures."""
    table.optimize()
    if count <= exact:
        if about.kind != "exact":
            about.kind, about.recall, about.settings = "exact", 1.0, {}
            _write(index, about)
        return
    # A partition of about 8,000: few enough graphs that each is worth walking, small enough to be built in memory.
    settings = {"partitions": max(1, round(count / 8192)), "m": 24, "ef_construction": 200}
    if about.settings != settings:
        say(f"building an approximate index of {count:,} vectors ...")
        table.create_index(
            metric="dot", index_type="IVF_HNSW_SQ", num_partitions=settings["partitions"], m=settings["m"],
            ef_construction=settings["ef_construction"], vector_column_name="vector",
        )  # fmt: skip
    about.kind, about.settings = "IVF_HNSW_SQ", settings
    about.recall = measured_recall(table, count)
    _write(index, about)
    say(f"the approximate search finds {100 * about.recall:.1f} % of the first {FIRST}, on {SAMPLE} of its own vectors")


def measured_recall(table: Any, count: int, seed: int = 0) -> float:
    """What an approximate search finds of the exact first ten, for vectors between the table's own."""
    from clipvisionalign.search.query import nearest

    rng = np.random.default_rng(seed)
    width = table.schema.field("vector").type.list_size
    ids = ", ".join(str(number) for number in rng.integers(count, size=SAMPLE))
    rows = table.search().where(f"id IN ({ids})").select(["vector"]).limit(SAMPLE).to_arrow()["vector"]
    vectors = rows.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    vectors = vectors + rng.normal(0, 0.3 / np.sqrt(width), vectors.shape).astype(np.float32)
    found = []
    for vector in vectors:
        right = {row["id"] for row in nearest(table, vector, FIRST, exact=True, columns=("id",))}
        near = {row["id"] for row in nearest(table, vector, FIRST, exact=False, columns=("id",))}
        found.append(len(right & near) / max(1, len(right)))
    return float(np.mean(found))
