"""Files of vectors, read and written; no pickle is loaded.

Forms of a file of vectors:

- `.npy`: an array (number, width), of float16, float32 or float64.
- `.parquet`: a column `vector` (lists of numbers of one width), and perhaps `kind` ("image" or "caption", where both
  are in one file), `name`, `identity`, `caption` (its text) and `image` (the number of a caption's image, from 0, in
  the order of the images).

Which image a caption is of: `image` in the captions' Parquet file, or a file of partners: `.npy` of whole numbers,
`.csv` with a column `image` (and perhaps `caption`), or `.json`, a list of numbers or {"image": [...], "identity":
[...] of the images, "caption": [...]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.text_files import decode, read_delimited, split_cells, split_lines
from clipvisionalign.files import atomic_write, folders_above
from clipvisionalign.retrieval.ties import NumericArray, as_vectors
from clipvisionalign.retrieval.vectors import VectorGallery, VectorKind

#: Rows of a Parquet file that are written at a time.
ROWS_PER_WRITE = 4096


def vector_output_files(out: str | Path, overwrite: bool = False) -> list[Path]:
    """The files that `write_vectors` writes.

    Args:
        out: The file to write, .parquet or .npy.
        overwrite: Whether files may be there already.

    Returns:
        One .parquet; or for NAME.npy three: NAME-images.npy, NAME-captions.npy and NAME-partners.json.

    Raises:
        ValueError: It has another ending.
        FileExistsError: One of them is there already.
    """
    path = Path(out)
    if path.suffix not in (".parquet", ".npy"):
        raise ValueError(f"--out {path}: vectors are written as .parquet or .npy")
    parts = ("images.npy", "captions.npy", "partners.json")
    files = [path] if path.suffix == ".parquet" else [path.with_name(f"{path.stem}-{part}") for part in parts]
    existing = [file for file in files if file.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{existing[0]}: is there already; give another --out, or --overwrite to replace it")
    return files


def write_vectors(
    out: str | Path,
    data: CaptionedImages,
    images: np.ndarray,
    captions: np.ndarray,
    distractors: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write vectors of a data set, each file atomically.

    Args:
        out: One .parquet; or NAME.npy, for NAME-images.npy, NAME-captions.npy and NAME-partners.json.
        data: The data set, of N images and M captions.
        images: (N + K, D), those of `distractors` at the end, in the dtype in which they are written.
        captions: (M, D) of the same dtype.
        distractors: K names of images without captions.
        overwrite: Whether files that are there are replaced.

    Returns:
        The files.

    Raises:
        ValueError: `out` has another ending.
        FileExistsError: One of the files is there already.
        OSError: The disk is full, or the folder cannot be written.
    """
    path, files = Path(out), vector_output_files(out, overwrite)
    names = [*(row.name for row in data), *distractors]
    has_identity = data.identity != "none" and any(row.identity is not None for row in data)
    identities = [*(row.identity for row in data), *([None] * len(distractors))] if has_identity else None
    with folders_above(path):
        if path.suffix == ".parquet":
            with atomic_write(path) as aside:
                _write_parquet(aside, data, names, identities, images, captions)
            return files
        metadata = {"image": data.caption_image.tolist(), "caption": data.captions, "name": names}
        metadata |= {"identity": identities} if identities else {}
        for file, vectors in zip(files[:2], (images, captions), strict=True):
            with atomic_write(file) as aside, aside.open("wb") as file_handle:
                np.save(file_handle, vectors, allow_pickle=False)
        with atomic_write(files[2]) as aside:
            aside.write_text(json.dumps(metadata), encoding="utf-8")
    return files


def _write_parquet(
    path: Path, data: CaptionedImages, names: list[str], identities: list[str | None] | None,
    images: np.ndarray, captions: np.ndarray,
) -> None:  # fmt: skip
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = arrow.from_numpy_dtype(images.dtype)
    schema = arrow.schema([
        ("kind", arrow.string()), ("name", arrow.string()), ("identity", arrow.string()), ("caption", arrow.string()),
        ("image", arrow.int64()), ("vector", arrow.list_(number, images.shape[1])),
    ])  # fmt: skip
    owners = data.caption_image

    def rows(kind: str, vectors: np.ndarray) -> Iterator[Any]:
        texts = data.captions if kind == "caption" else []
        for start in range(0, len(vectors), ROWS_PER_WRITE):
            indices = range(start, min(start + ROWS_PER_WRITE, len(vectors)))
            flat = arrow.array(np.ascontiguousarray(vectors[indices.start : indices.stop]).ravel(), number)
            image_indices = [int(owners[index]) for index in indices] if texts else list(indices)
            columns: dict[str, Any] = {
                "kind": [kind] * len(indices),
                # A name that is no Unicode is written as it looks.
                "name": [names[image].encode("utf-8", "replace").decode() for image in image_indices],
                "identity": [None if identities is None else identities[image] for image in image_indices],
                "caption": [texts[index] for index in indices] if texts else [None] * len(indices),
                "image": image_indices if texts else [None] * len(indices),
                "vector": arrow.FixedSizeListArray.from_arrays(flat, images.shape[1]),
            }
            yield arrow.table([arrow.array(columns[f.name], f.type) if f.name != "vector" else columns["vector"]
                               for f in schema], schema=schema)  # fmt: skip

    with parquet.ParquetWriter(path, schema) as writer:
        for kind, vectors in (("image", images), ("caption", captions)):
            for table in rows(kind, vectors):
                writer.write_table(table)


def read_gallery(files: Sequence[str | Path], partners: str | Path = "", distractors: str | Path = "") -> VectorGallery:
    """Read the vectors of images and captions.

    Args:
        files: One .parquet with both kinds, or a file of images and one of captions, .npy or .parquet.
        partners: File with the image of each caption (.npy, .csv or .json), which takes precedence over what the
            captions' own file has; "" for none.
        distractors: File of vectors of images without captions; "" for none.

    Returns:
        The gallery.

    Raises:
        DataError: A file is missing or is not of such a form, or they do not fit; the message names the file.
    """
    paths = [Path(file) for file in files]
    if len(paths) == 1:
        images, captions = _read_vectors(paths[0], "image"), _read_vectors(paths[0], "caption")
    elif len(paths) == 2:
        images, captions = (_read_vectors(path, kind) for path, kind in zip(paths, get_args(VectorKind), strict=True))
    else:
        raise DataError(f"--vectors takes IMAGES CAPTIONS, or one .parquet with both, not {len(paths)} files")
    partner_columns = _read_partners(Path(partners)) if partners else {}
    owners = partner_columns.get("image", captions.columns.get("image"))
    if owners is None:
        raise DataError(f"{paths[-1]}: no image for each caption: give it with --partners FILE")
    identity, texts = (
        partner_columns.get("identity", images.columns.get("identity")),
        partner_columns.get("caption", captions.columns.get("caption")),
    )
    partners_source = partners or paths[-1]
    gallery = VectorGallery(
        images.vectors, captions.vectors, _image_indices(owners, partners_source),
        _identities(identity), _texts(texts, partners_source),
    )  # fmt: skip
    return gallery.with_distractors(_read_vectors(Path(distractors), "image").vectors) if distractors else gallery


def _identities(values: Sequence[Any] | None) -> np.ndarray | None:
    # What programs write for a missing value: null, NaN, an empty text.
    identities = [None if each is None or each != each else str(each).strip() or None for each in values or ()]
    if not any(identities):
        return None
    return np.array(
        [f"image {n}" if each is None else f"identity {each}" for n, each in enumerate(identities)], dtype=object
    )


def _texts(values: Sequence[Any] | None, source: str | Path) -> list[str] | None:
    """The captions' texts. Raises DataError naming the first that is none, whose equality is undefined."""
    missing = [index for index, each in enumerate(values or ()) if each is None or each != each]
    if values is None or len(missing) == len(values):
        return None
    if missing:
        message = f"{source}: {len(missing):,} of {len(values):,} captions have no text, such as caption {missing[0]}"
        raise DataError(f"{message}: give all texts, or leave the column out")
    return [str(text) for text in values]


def _image_indices(values: Any, source: str | Path) -> np.ndarray:
    """Numbers of images. Raises DataError naming the first that is none."""
    for index, each in enumerate(values):
        is_integer = isinstance(each, (int, np.integer)) and not isinstance(each, bool)
        if not is_integer and not (isinstance(each, float) and each.is_integer()):
            raise DataError(f"{source}: caption {index} is of image {each!r}, which is no whole number")
        if abs(each) >= 2**63:
            raise DataError(f"{source}: caption {index} is of image {int(each)}, which is no number of an image")
    return np.array([int(each) for each in values], dtype=np.int64)


@dataclass(frozen=True)
class _VectorColumns:
    """Vectors of a file, and its other columns."""

    vectors: NumericArray
    columns: dict[str, list[Any]]


def _read_vectors(path: Path, kind: VectorKind) -> _VectorColumns:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".npy":
        return _VectorColumns(_check_vectors(_load_npy(path), kind, path), {})
    if path.suffix == ".parquet":
        return _read_parquet(path, kind)
    raise DataError(f"{path}: vectors are read from .npy and .parquet")


def _load_npy(path: Path) -> np.ndarray:
    """The array of a .npy file. Raises DataError for any other file, whatever its name."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise DataError(f"{path}: not an array of numbers: {error}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise DataError(f"{path}: not an array of numbers, but an archive of them (.npz): save the one as .npy")
    return array


def _check_vectors(array: Any, kind: VectorKind, path: Path) -> NumericArray:
    try:
        numbers = as_vectors(array, kind)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if not numbers.values.size:
        raise DataError(f"{path}: no {kind} vectors in it")
    return numbers


def _read_parquet(path: Path, kind: VectorKind) -> _VectorColumns:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            column_names = set(file.schema_arrow.names)
            if "vector" not in column_names:
                raise DataError(f"{path}: no column 'vector'; its columns are: {', '.join(sorted(column_names))}")
            wanted = [name for name in ("kind", "identity", "caption", "image", "vector") if name in column_names]
            twice = [name for name in wanted if file.schema_arrow.names.count(name) > 1]
            if twice:
                raise DataError(f"{path}: several columns are called '{twice[0]}'")
            table = file.read(columns=wanted)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from None
    if "kind" in column_names:
        table = table.filter(arrow.array(_rows_of_kind(kind, table["kind"].to_pylist(), path)))
    columns = {name: table[name].to_pylist() for name in ("identity", "caption", "image") if name in column_names}
    return _VectorColumns(_check_vectors(_column_to_array(table["vector"], path), kind, path), columns)


def _rows_of_kind(kind: VectorKind, values: Sequence[Any], path: Path) -> list[bool]:
    """Which rows are of a kind. Raises DataError where some are of an unknown kind: they would be lost."""
    kinds = [str(each).strip().lower() for each in values]
    unknown = [row for row, each in enumerate(kinds) if each not in get_args(VectorKind)]
    if unknown:
        known_kinds = ", ".join(get_args(VectorKind))
        raise DataError(
            f"{path}: {len(unknown):,} of {len(kinds):,} rows are of an unknown kind (not one of {known_kinds}), "
            f"such as row {unknown[0]}, of {values[unknown[0]]!r}; images without captions go into --distractors"
        )
    return [each == kind for each in kinds]


def _column_to_array(column: Any, path: Path) -> np.ndarray:
    """A column of lists as an array. Raises DataError where they differ in width, or one is missing."""
    import pyarrow as arrow

    if not (arrow.types.is_list(column.type) or arrow.types.is_large_list(column.type)
            or arrow.types.is_fixed_size_list(column.type)):  # fmt: skip
        raise DataError(f"{path}: the column 'vector' holds {column.type}, not lists of numbers")
    if not (arrow.types.is_floating(column.type.value_type) or arrow.types.is_integer(column.type.value_type)):
        raise DataError(f"{path}: the column 'vector' holds lists of {column.type.value_type}, not of numbers")
    if column.null_count:
        raise DataError(f"{path}: {column.null_count:,} rows have no vector")
    parts, width = [], None
    for chunk in column.chunks:
        if not len(chunk):
            continue
        flat = chunk.flatten()
        if flat.null_count:
            raise DataError(f"{path}: {flat.null_count:,} numbers of its vectors are missing")
        widths = {len(chunk[0])} if arrow.types.is_fixed_size_list(chunk.type) else set(np.diff(chunk.offsets))
        width = width or int(max(widths))
        if not width:
            raise DataError(f"{path}: its vectors are empty lists")
        if widths != {width}:
            raise DataError(f"{path}: vectors of {width} numbers and of {int(min(widths - {width}))} in one column")
        parts.append(flat.to_numpy(zero_copy_only=False).reshape(-1, width))
    return np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.float32)


def _read_partners(path: Path) -> dict[str, list[Any]]:
    """Read a file of positives: "image" of each caption, and perhaps "identity" of each image, "caption" texts."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".npy":
        numbers = _load_npy(path)
        if numbers.ndim != 1:
            raise DataError(f"{path}: partners should be a row of whole numbers, one a caption, not {numbers.shape}")
        return {"image": numbers.tolist()}
    try:
        if path.suffix == ".json":
            columns = json.loads(path.read_text(encoding="utf-8-sig"))
            columns = {"image": columns} if isinstance(columns, list) else columns
        elif path.suffix == ".csv":
            columns = _csv_columns(path)
        else:
            raise DataError(f"{path}: partners are read from .json, .csv and .npy")
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, DataError) else DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(columns, dict) or not all(isinstance(each, list) for each in columns.values()):
        raise DataError(f'{path}: should be a list of numbers, or {{"image": [...]}}')
    return {name: columns[name] for name in ("image", "identity", "caption") if name in columns}


def _csv_columns(path: Path) -> dict[str, list[Any]]:
    lines = split_lines(decode(path.read_bytes()).text)
    header = next((split_cells(line, ",")[0] for line in lines if line.strip()), [])
    header = [name.strip() for name in header]
    # A row of numbers without a header.
    bare = len(header) == 1 and header[0].isdecimal()
    header = ["image"] if bare else header
    if "image" not in header:
        raise DataError(f"{path}: no column 'image'; its columns are: {', '.join(header) or 'none'}")
    at = header.index("image")

    def is_row(cells: list[str]) -> bool:
        return len(cells) == len(header) and cells[at].strip().isdecimal()

    rows = list(read_delimited(lines, ",", is_row))[0 if bare else 1 :]
    wrong = next((row for row in rows if not is_row(row.cells)), None)
    if wrong:
        raise DataError(f"{path}, line {wrong.line}: no number of an image in it: {wrong.cells}"[:2000])
    columns: dict[str, list[Any]] = {"image": [int(row.cells[at]) for row in rows]}
    if "caption" in header:
        columns["caption"] = [row.cells[header.index("caption")] for row in rows]
    return columns
