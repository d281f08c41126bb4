"""Folders of images: with one metadata.csv or metadata.jsonl, or with one .txt beside each image."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import SPLITS, CaptionedImages, DataError
from clipvisionalign.data.formats.table_rows import read_text
from clipvisionalign.data.formats.tables import caption_files, fill_from_table, is_hidden
from clipvisionalign.data.splits import SPLIT_RULE, canonical_split
from clipvisionalign.data.text_files import split_lines
from clipvisionalign.images import image_files

_METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")


def _metadata_files(source: Path) -> list[Path]:
    """The metadata files of the folder itself, and of the folders below it."""
    folders = [source, *sorted(path for path in source.iterdir() if path.is_dir() and not is_hidden(path))]
    return [folder / name for folder in folders for name in _METADATA if (folder / name).is_file()]


def is_folder(source: Path) -> bool:
    """Whether there is a metadata.csv or metadata.jsonl, also in a folder that is named as a split is.

    Args:
        source: A folder.

    Returns:
        Whether there is.
    """
    if not source.is_dir():
        return False
    folders = (path.parent for path in _metadata_files(source))
    return any(folder == source or canonical_split(folder.name) in SPLITS for folder in folders)


def read_folder(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """Read the `imagefolder` form: metadata.csv or metadata.jsonl beside the images.

    A `file_name` column is relative to the metadata file; the folder below, if it is named as a split is, is the split.

    Args:
        source: The folder.
        group: A column: without splits of its own, all images with one value of it are in one split. "" for none.
        split_rule: How images without a split are assigned, see `data/splits.py`.

    Returns:
        The images with their captions.

    Raises:
        DataError: There is no such file, it lacks a column, or no row of it can be used.
    """
    files = _metadata_files(source)
    if not files:
        raise DataError(f"{source}: no {' or '.join(_METADATA)} there")
    table = CaptionTable(source, "folder", [source], split_rule)
    for path in files:
        if path.parent == source:
            fill_from_table(table, path, group=group)
        else:
            # A sub-folder's name is its split, and its images' names must not clash with another's.
            folder = path.parent.name
            fill_from_table(table, path, subfolder=folder, split=canonical_split(folder), group=group)
    table.report_unread(caption_files(source))
    return table.finish()


def is_texts(source: Path) -> bool:
    """Whether at least one image of a folder has a .txt of its name.

    Args:
        source: A folder.

    Returns:
        Whether one has.
    """
    return source.is_dir() and any(True for _ in _matched_texts(image_files(source)))


def read_texts(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """Read one .txt per image, a caption a line; a first folder named train, dev (val) or test is the split.

    Args:
        source: The folder.
        group: Not used: the layout has no columns.
        split_rule: How images without a split are assigned, see `data/splits.py`.

    Returns:
        The images with their captions.

    Raises:
        DataError: No image has a caption.
    """
    table = CaptionTable(source, "texts", [source], split_rule)
    images = image_files(source)
    texts = dict(_matched_texts(images))
    for path in images:
        name = path.relative_to(source).as_posix()
        if path not in texts:
            table.report("no captions", name, f"no {path.with_suffix('.txt').name} beside it")
            continue
        text = texts[path]
        if text.name not in _text_names(path):
            table.report("name spelled otherwise", name, f"its captions are those of '{text.name}'", "mended")
        split = canonical_split(name.split("/")[0]) if "/" in name else ""
        lines = [line for line in split_lines(read_text(text, table)) if line.strip()]
        for line_number, line in enumerate(lines or [""], 1):
            location = f"{text.relative_to(source).as_posix()}, line {line_number}"
            table.add_row(name, line, location, split=split if split in SPLITS else "")
    used = set(texts.values())
    unmatched = sorted(
        path for path in source.rglob("*") if path.suffix.lower() == ".txt" and path not in used and not is_hidden(path)
    )
    if unmatched:
        first = unmatched[0].relative_to(source).as_posix()
        table.note(f"{len(unmatched):,} .txt files that no image stands beside, such as {first}")
    table.report_unread(caption_files(source))
    return table.finish()


def _text_names(image: Path) -> tuple[str, str]:
    """How the text of an image is called."""
    return image.with_suffix(".txt").name, f"{image.name}.txt"


def _matched_texts(images: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Each image that has a text file, and that: of its name, whatever the ending's case and the name's Unicode form.

    A folder is listed when its first image comes.
    """
    by_folder: dict[Path, dict[str, Path]] = {}
    for image in images:
        if image.parent not in by_folder:
            by_folder[image.parent] = _text_files_by_name(image.parent)
        texts, names = by_folder[image.parent], _text_names(image)
        text = next((texts[key] for key in (*names, *map(_normalized_name, names)) if key in texts), None)
        if text is not None:
            yield image, text


def _text_files_by_name(folder: Path) -> dict[str, Path]:
    """The text files of a folder by their names, and by the form that all spellings of a name share where one file
    alone has it."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() == ".txt" and path.is_file()]
    alike: dict[str, list[Path]] = {}
    for path in paths:
        alike.setdefault(_normalized_name(path.name), []).append(path)
    return {form: group[0] for form, group in alike.items() if len(group) == 1} | {path.name: path for path in paths}


def _normalized_name(name: str) -> str:
    """What all spellings of a name share: its Unicode form, and the ending in small letters."""
    stem, dot, ending = name.rpartition(".")
    return unicodedata.normalize("NFC", stem) + dot + ending.lower()
