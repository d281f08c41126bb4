"""Flickr8k and Flickr30k, as published and as distributed by Kaggle.

Sources: Hodosh, Young and Hockenmaier, JAIR 47 (2013); Young, Lai, Hodosh and Hockenmaier, TACL 2 (2014).
"""

from __future__ import annotations

import re
from pathlib import Path

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import SPLITS, CaptionedImages, DataError
from clipvisionalign.data.formats.table_rows import read_text
from clipvisionalign.data.formats.tables import caption_files
from clipvisionalign.data.image_names import ImageNameMatcher
from clipvisionalign.data.splits import SPLIT_RULE, canonical_split
from clipvisionalign.data.text_files import decode, read_delimited, split_lines

#: Where the images lie, beside the captions: the archives' own names and the ones that people give.
IMAGE_FOLDERS = (
    "Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images/flickr30k_images",
    "flickr30k_images", "flickr30k-images", "Flickr30k_Dataset", ".",
)  # fmt: skip


def _captions_file(source: Path, *names: str) -> Path | None:
    """The captions file: `source` itself, or the first of `names` in it or in a usual sub-folder."""
    if source.is_file():
        return source if source.name in names else None
    folders = [source, source / "flickr30k_images", source / "Flickr8k_text", source / "text"]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _open_table(source: Path, layout: str, captions_file: Path, split_rule: int) -> CaptionTable:
    """A table with the official split files, if any, that looks for images beside and above the captions."""
    roots = list(dict.fromkeys([captions_file.parent, source if source.is_dir() else captions_file.parent]))
    if captions_file.parent.name in ("Flickr8k_text", "text"):
        roots.append(captions_file.parent.parent)
    table = CaptionTable(source, layout, [root / folder for root in roots for folder in IMAGE_FOLDERS], split_rule)
    for root in roots:
        for list_file in sorted(root.glob("*.txt")):
            # Flickr_8k.trainImages.txt, or train.txt.
            match = re.fullmatch(r"(?:flickr.*[_.])?([a-z]+?)(?:images)?", list_file.stem.lower())
            split = canonical_split(match[1]) if match else ""
            if split in SPLITS:
                names = [name if "." in name else f"{name}.jpg" for name in _read_names(list_file, table)]
                table.add_split_list(names, split, list_file.name)
    return table


def _finish(table: CaptionTable, path: Path) -> CaptionedImages:
    """The data set that was read from `path`."""
    table.files_read.add(path)
    if table.source.is_dir():
        table.report_unread(caption_files(table.source))
    return table.finish()


def _read_names(path: Path, table: CaptionTable) -> list[str]:
    """The names of a list, one a line."""
    return [line.strip() for line in split_lines(read_text(path, table)) if line.strip()]


def _first_line(path: Path | None) -> str:
    if path is None:
        return ""
    with path.open("rb") as file:
        return next(iter(split_lines(decode(file.read(4096)).text)), "").strip()


def is_kaggle30k(source: Path) -> bool:
    """Whether there is a results.csv with '|' between its columns.

    Args:
        source: A folder or a file.

    Returns:
        Whether there is.
    """
    return "|" in _first_line(_captions_file(source, "results.csv"))


def read_kaggle30k(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """Read Flickr30k from Kaggle: `image_name| comment_number| comment`.

    One published row is broken, 2199200615.jpg number 4: its caption slid into the number's column. A row of that form
    is mended, and listed.

    Args:
        source: Its folder, or results.csv.
        group: Not used: the layout has no columns.
        split_rule: How images without a split are assigned, see `data/splits.py`.

    Returns:
        The images with their captions.

    Raises:
        DataError: The file is missing, or no row of it can be used.
    """
    path = _captions_file(source, "results.csv")
    if path is None:
        raise DataError(f"{source}: no results.csv there")
    table = _open_table(source, "flickr30k-kaggle", path, split_rule)
    for line_number, line in enumerate(split_lines(read_text(path, table)), 1):
        if (line_number == 1 and line.lower().startswith("image_name")) or not line.strip():
            continue
        location = f"{path.name}, line {line_number}"
        name, *rest = (part.strip() for part in line.split("|", 2))
        shifted = re.fullmatch(r"(\d+)\s+(\S.*)", rest[0]) if rest and not any(rest[1:]) else None
        if shifted:
            table.report(
                "slid column", location, f"{name} number {shifted[1]}: its caption stood in column 2", "mended"
            )
            table.add_row(name, shifted[2], location)
        elif len(rest) < 2:
            message = f"expected image_name| comment_number| comment, found '{line[:60]}'"
            table.skip_row("wrong columns", location, message)
        else:
            table.add_row(name, rest[1], location)
    return _finish(table, path)


def is_flickr30k(source: Path) -> bool:
    """Whether there is the published results_20130124.token.

    Args:
        source: A folder or a file.

    Returns:
        Whether there is.
    """
    return _captions_file(source, "results_20130124.token") is not None


def read_flickr30k(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """Read Flickr30k as published: `1000092795.jpg#0<TAB>caption`; train.txt, val.txt, test.txt name the splits.

    Args:
        source: Its folder, or results_20130124.token.
        group: Not used: the layout has no columns.
        split_rule: How images without a split are assigned, see `data/splits.py`.

    Returns:
        The images with their captions.

    Raises:
        DataError: The file is missing, or no row of it can be used.

    Source: Young, Lai, Hodosh and Hockenmaier, TACL 2 (2014).
    """
    return _read_tokens(source, "flickr30k", "results_20130124.token", split_rule)


def is_flickr8k(source: Path) -> bool:
    """Whether there is Flickr8k.token.txt, or a captions.txt with the header `image,caption`.

    Args:
        source: A folder or a file.

    Returns:
        Whether there is.
    """
    if _captions_file(source, "Flickr8k.token.txt") is not None:
        return True
    return _first_line(_captions_file(source, "captions.txt")).replace(" ", "").lower() == "image,caption"


def read_flickr8k(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """Read Flickr8k with its official `Flickr_8k.{train,dev,test}Images.txt`, from either of its caption files.

    A comma within a caption that nobody quoted stays in the caption.

    Args:
        source: Its folder, or one of the two files.
        group: Not used: the layout has no columns.
        split_rule: How images without a split are assigned, see `data/splits.py`.

    Returns:
        The images with their captions.

    Raises:
        DataError: Both files are missing, the header is another one, or no row can be used.

    Source: Hodosh, Young and Hockenmaier, JAIR 47 (2013).
    """
    if _captions_file(source, "Flickr8k.token.txt") is not None:
        return _read_tokens(source, "flickr8k", "Flickr8k.token.txt", split_rule)
    path = _captions_file(source, "captions.txt")
    if path is None:
        raise DataError(f"{source}: neither captions.txt nor Flickr8k.token.txt there")
    table = _open_table(source, "flickr8k", path, split_rule)
    names = ImageNameMatcher(table.folders)

    def is_row(cells: list[str]) -> bool:
        return len(cells) > 1 and names.matches(cells[0])

    rows = read_delimited(split_lines(read_text(path, table)), ",", is_row)
    header = next(rows, None)
    cells = [cell.strip().lower() for cell in header.cells] if header else []
    if cells != ["image", "caption"]:
        raise DataError(f"{path}, line 1: the header should be 'image,caption', found '{','.join(cells)}'")
    for row in rows:
        location = f"{path.name}, line {row.line}"
        if row.unclosed:
            table.report("open quote", location, "a quote that is never closed, kept as part of the caption", "mended")
        if len(row.cells) < 2:
            table.skip_row("wrong columns", location, f"no comma between image and caption in '{row.cells[0][:60]}'")
        else:
            names.add(row.cells[0])
            # A caption with a comma that nobody quoted: the comma is the caption's.
            table.add_row(row.cells[0], ",".join(row.cells[1:]), location)
    return _finish(table, path)


def _read_tokens(source: Path, layout: str, file_name: str, split_rule: int) -> CaptionedImages:
    """The publishers' own form, `image.jpg#number<TAB>caption`."""
    path = _captions_file(source, file_name)
    if path is None:
        raise DataError(f"{source}: no {file_name} there")
    table = _open_table(source, layout, path, split_rule)
    for line_number, line in enumerate(split_lines(read_text(path, table)), 1):
        if not line.strip():
            continue
        location = f"{path.name}, line {line_number}"
        key, tab, caption = line.partition("\t")
        if not tab:
            table.skip_row("wrong columns", location, f"no tab between image and caption in '{line[:60]}'")
        else:
            table.add_row(key.partition("#")[0], caption, location)
    return _finish(table, path)
