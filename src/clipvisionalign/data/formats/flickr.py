"""Flickr8k and Flickr30k, as published and as Kaggle ships them.

Sources: Hodosh, Young and Hockenmaier, JAIR 47 (2013); Young, Lai, Hodosh and Hockenmaier, TACL 2 (2014).
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from clipvisionalign.data.captioned import CaptionedImages, CaptionTable, DataError, decode_text

#: Where the pictures lie, beside the captions: the archives' own names and the ones that people give.
IMAGE_FOLDERS = (
    "Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images/flickr30k_images",
    "flickr30k_images", "flickr30k-images", "Flickr30k_Dataset", ".",
)  # fmt: skip

_SPLIT_FILE = {"train": "trainImages.txt", "dev": "devImages.txt", "test": "testImages.txt"}
_SPLIT_WORDS = {"train": "train", "dev": "dev", "val": "dev", "test": "test"}


def _captions_file(source: Path, *names: str) -> Path | None:
    """The captions file: `source` itself, or the first of `names` in it or in a usual sub-folder."""
    if source.is_file():
        return source if source.name in names else None
    folders = [source, source / "flickr30k_images", source / "Flickr8k_text", source / "text"]
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _finish(table: CaptionTable, captions_file: Path) -> CaptionedImages:
    """Read the official split files, if any, and look for the pictures beside and above the captions."""
    roots = list(dict.fromkeys([captions_file.parent, table.source if table.source.is_dir() else captions_file.parent]))
    if captions_file.parent.name in ("Flickr8k_text", "text"):
        roots.append(captions_file.parent.parent)
    for root in roots:
        for split, ending in _SPLIT_FILE.items():
            for listed in sorted(root.glob(f"Flickr*[_.]{ending}")):
                table.splits |= dict.fromkeys(decode_text(listed, table).split(), split)
        for listed in sorted(root.glob("*.txt")):
            if listed.stem in _SPLIT_WORDS:
                names = [name if "." in name else f"{name}.jpg" for name in decode_text(listed, table).split()]
                table.splits |= dict.fromkeys(names, _SPLIT_WORDS[listed.stem])
    return table.finish([root / folder for root in roots for folder in IMAGE_FOLDERS])


def _first_line(path: Path | None) -> str:
    if path is None:
        return ""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.readline().strip()


def is_kaggle30k(source: Path) -> bool:
    """A results.csv with '|' between its columns."""
    return "|" in _first_line(_captions_file(source, "results.csv"))


def read_kaggle30k(source: Path) -> CaptionedImages:
    """Flickr30k from Kaggle: `image_name| comment_number| comment`.

    One row is known to be broken, 2199200615.jpg number 4: its caption slid into the number's column. A row of that
    form is mended, and listed.
    """
    path = _captions_file(source, "results.csv")
    if path is None:
        raise DataError(f"{source}: no results.csv there")
    table = CaptionTable(source, "flickr30k-kaggle")
    for number, line in enumerate(decode_text(path, table).splitlines(), 1):
        if (number == 1 and line.lower().startswith("image_name")) or not line.strip():
            continue
        place = f"{path.name}, line {number}"
        name, *rest = (part.strip() for part in line.split("|", 2))
        slid = re.fullmatch(r"(\d+)\s+(\S.*)", rest[0]) if rest and not any(rest[1:]) else None
        if slid:
            table.report("slid column", place, f"{name} number {slid[1]}: its caption stood in column 2", "mended")
            table.add(name, slid[2], place)
        elif len(rest) < 2:
            table.report("wrong columns", place, f"expected image_name| comment_number| comment, found '{line[:60]}'")
        else:
            table.add(name, rest[1], place)
    return _finish(table, path)


def is_flickr30k(source: Path) -> bool:
    """The published results_20130124.token."""
    return _captions_file(source, "results_20130124.token") is not None


def read_flickr30k(source: Path) -> CaptionedImages:
    """Flickr30k as published: `1000092795.jpg#0<TAB>caption`; train.txt, val.txt, test.txt name the splits."""
    return _read_tokens(source, "flickr30k", "results_20130124.token")


def is_flickr8k(source: Path) -> bool:
    """Flickr8k.token.txt, or a captions.txt with the header `image,caption`."""
    if _captions_file(source, "Flickr8k.token.txt") is not None:
        return True
    return _first_line(_captions_file(source, "captions.txt")).replace(" ", "").lower() == "image,caption"


def read_flickr8k(source: Path) -> CaptionedImages:
    """Flickr8k with its official `Flickr_8k.{train,dev,test}Images.txt`, from either of its caption files."""
    if _captions_file(source, "Flickr8k.token.txt") is not None:
        return _read_tokens(source, "flickr8k", "Flickr8k.token.txt")
    path = _captions_file(source, "captions.txt")
    if path is None:
        raise DataError(f"{source}: neither captions.txt nor Flickr8k.token.txt there")
    table = CaptionTable(source, "flickr8k")
    rows = csv.reader(decode_text(path, table).splitlines(keepends=True))
    header = [cell.strip().lower() for cell in next(rows, [])]
    if header != ["image", "caption"]:
        raise DataError(f"{path}, line 1: the header should be 'image,caption', found '{','.join(header)}'")
    for row in rows:
        place = f"{path.name}, line {rows.line_num}"
        if len(row) < 2:
            if row:
                table.report("wrong columns", place, f"no comma between image and caption in '{row[0][:60]}'")
            continue
        # A caption with a comma that nobody quoted: the comma is the caption's.
        table.add(row[0], ",".join(row[1:]), place)
    return _finish(table, path)


def _read_tokens(source: Path, layout: str, file_name: str) -> CaptionedImages:
    """The publishers' own form, `image.jpg#number<TAB>caption`."""
    path = _captions_file(source, file_name)
    if path is None:
        raise DataError(f"{source}: no {file_name} there")
    table = CaptionTable(source, layout)
    for number, line in enumerate(decode_text(path, table).splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        key, tab, caption = line.partition("\t")
        if not tab:
            table.report("wrong columns", place, f"no tab between image and caption in '{line[:60]}'")
            continue
        table.add(key.partition("#")[0], caption, place)
    return _finish(table, path)
