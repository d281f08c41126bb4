"""Folders of pictures: with one metadata.csv or metadata.jsonl, or with one .txt beside each picture."""

from __future__ import annotations

from pathlib import Path

from clipvisionalign.data.captioned import SPLITS, CaptionedImages, CaptionTable, DataError, decode_text
from clipvisionalign.data.formats.tables import fill_from_rows, table_rows
from clipvisionalign.pictures import PICTURE_SUFFIXES

_METADATA = ("metadata.csv", "metadata.jsonl")


def _metadata_files(source: Path) -> list[Path]:
    """The metadata file of the folder itself, or those of its train, dev (validation) and test folders."""
    folders = [source, *(source / split for split in (*SPLITS, "val", "validation"))]
    return [folder / name for folder in folders for name in _METADATA if (folder / name).is_file()]


def is_folder(source: Path) -> bool:
    """A folder with metadata.csv or metadata.jsonl, or with such in train/, dev/, test/."""
    return source.is_dir() and bool(_metadata_files(source))


def read_folder(source: Path) -> CaptionedImages:
    """The `imagefolder` form: a `file_name` column relative to the metadata file, a caption column, perhaps a split."""
    files = _metadata_files(source)
    if not files:
        raise DataError(f"{source}: no metadata.csv or metadata.jsonl there")
    table = CaptionTable(source, "folder")
    for path in files:
        if path.parent == source:
            fill_from_rows(table, path, table_rows(path, table))
            continue
        # A sub-folder's name is its split, and its pictures' names must not clash with another's.
        part = CaptionTable(path.parent, "folder")
        fill_from_rows(part, path, table_rows(path, part))
        split = {"val": "dev", "validation": "dev"}.get(path.parent.name, path.parent.name)
        table.problems += part.problems
        for name, captions in part.captions.items():
            inner = f"{path.parent.name}/{name}"
            table.captions[inner] = captions
            table.splits[inner] = split
            if name in part.images:
                table.images[inner] = part.images[name]
            if name in part.identities:
                table.identities[inner] = part.identities[name]
    return table.finish([source])


def _pictures(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)


def is_texts(source: Path) -> bool:
    """A folder in which at least one picture has a .txt of its name."""
    return source.is_dir() and any(path.with_suffix(".txt").is_file() for path in _pictures(source))


def read_texts(source: Path) -> CaptionedImages:
    """One .txt per picture, a caption a line. A first folder named train, dev (val) or test is the split."""
    table = CaptionTable(source, "texts")
    for path in _pictures(source):
        name = path.relative_to(source).as_posix()
        text = path.with_suffix(".txt")
        if not text.is_file():
            table.report("no captions", name, f"no {text.name} beside it")
            continue
        table.images[name] = path
        first = name.split("/")[0]
        split = {"val": "dev", "validation": "dev"}.get(first, first)
        if "/" in name and split in SPLITS:
            table.splits[name] = split
        lines = [line for line in decode_text(text, table).splitlines() if line.strip()]
        for number, line in enumerate(lines or [""], 1):
            table.add(name, line, f"{text.relative_to(source).as_posix()}, line {number}")
    return table.finish()
