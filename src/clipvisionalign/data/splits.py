"""Which split an image stands in, where a data set comes without splits: a hash decides, 80 : 10 : 10.

The hash is of what stays when images are added, renamed or moved: of the group that an image belongs to (a column that
is named, else the identity shown on it), else of its content. Images of one group, and equal images, stand in one
split. Near-duplicates too where they were grouped once, into a file that later readings go by (`write_splits`).

Runs from before this rule (rule 1) go by a hash of each image's name, as their table wrote it; they are measured so.
"""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from clipvisionalign.data.captioned import SPLITS, CaptionedImages, DataError
from clipvisionalign.data.text_files import decode, delimited, split_lines

#: The rule that decides now; 1 is that of earlier versions.
SPLIT_RULE = 2

#: What each rule goes by, in words.
SPLIT_RULES = {1: "splits by a hash of each name", 2: "splits by a hash of each image's content, or of its group"}

#: The file beside a data set that says in which split an image stands.
SPLIT_FILE = "splits.csv"

#: What data sets call the splits.
SPLIT_WORDS = {
    "train": "train", "training": "train", "restval": "train", "dev": "dev", "devel": "dev", "development": "dev",
    "val": "dev", "valid": "dev", "validation": "dev", "minival": "dev", "test": "test", "testing": "test",
}  # fmt: skip

#: Bytes at an image's beginning and end that tell it from others of its size.
_ENDS = 32 * 1024


def split_word(told: object) -> str:
    """The split that a word means; the word itself where it means none, "" for nothing.

    >>> split_word(" Validation "), split_word(None), split_word("holdout")
    ('dev', '', 'holdout')
    """
    if isinstance(told, bytes):
        told = decode(told).text
    if told is None or told != told:
        return ""
    word = str(told).strip().lower()
    return SPLIT_WORDS.get(word, word)


def split_of_name(name: str) -> str:
    """The split of a name: its hash decides, 80 : 10 : 10. Adding or removing names moves none of the others."""
    bucket = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def content_key(image: Path | bytes) -> str:
    """What an image is told apart by, the same for equal images: its size, its first and its last 32 KiB; "" where it
    cannot be read."""
    try:
        if isinstance(image, bytes):
            size, ends = len(image), image[:_ENDS] + image[-_ENDS:]
        else:
            with image.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                ends = file.read(_ENDS)
                file.seek(max(0, size - _ENDS))
                ends += file.read(_ENDS)
    except (OSError, ValueError):
        return ""
    return f"content {size} {hashlib.blake2b(ends, digest_size=16).hexdigest()}"


def read_split_file(path: Path) -> dict[str, tuple[str, str]]:
    """The splits that a file of `write_splits` gives, by image: split and place. Raises DataError for another file, and
    for an image in two splits."""
    lines = split_lines(decode(path.read_bytes()).text)
    rows = delimited(lines, ",", lambda cells: len(cells) == 2)
    header = next(rows, None)
    if header is None or [cell.strip().lower() for cell in header.cells] != ["image", "split"]:
        raise DataError(f"{path}, line 1: a file of splits has the columns image,split")
    found: dict[str, tuple[str, str]] = {}
    for row in rows:
        place = f"{path.name}, line {row.line}"
        split = split_word(row.cells[1]) if len(row.cells) == 2 else ""
        if split not in SPLITS:
            raise DataError(f"{path}, line {row.line}: expected an image and one of {', '.join(SPLITS)}")
        before = found.setdefault(row.cells[0], (split, place))
        if before[0] != split:
            raise DataError(f"{place}: {row.cells[0]} is in '{split}', and in '{before[0]}' by {before[1]}")
    return found


def grouped_splits(keys: Sequence[str]) -> list[str]:
    """Splits for a data set as it is now, none of them empty where there are three groups or more.

    A tenth of the images each for test and dev: whole groups, in the order of their hashes. keys: each image's group.
    """
    weight = Counter(keys)
    order = sorted(weight, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
    total, found = sum(weight.values()), {}
    for split, left in (("test", 2), ("dev", 1)):
        taken = 0
        while order and len(order) > left and (not taken or taken + weight[order[0]] <= total / 10):
            key = order.pop(0)
            taken += weight[key]
            found[key] = split
    return [found.get(key, "train") for key in keys]


def write_splits(data: CaptionedImages, near: Sequence[tuple[int, int]], path: Path) -> dict[str, int]:
    """Write a file that says in which split each image stands: those of one identity, equal and nearly equal ones
    together. Returns the images of each split.

    near: pairs of places of images that belong together. Where a data set has splits already, they stay. Raises
    FileExistsError, and DataError for an image that has no name to be found by.
    """
    if path.exists():
        raise FileExistsError(f"{path}: is there already, and is not overwritten: remove it, or give another file")
    if data.official_splits:
        raise DataError(f"{data.source}: has splits of its own; a file of splits is for a data set without")
    groups = list(range(len(data)))

    def top(place: int) -> int:
        while groups[place] != place:
            groups[place] = groups[groups[place]]
            place = groups[place]
        return place

    first: dict[str, int] = {}
    for place, row in enumerate(data):
        for key in (f"identity {row.identity}" if row.identity is not None else "", content_key(row.image)):
            if key:
                groups[top(place)] = top(first.setdefault(key, place))
    for left, right in near:
        groups[top(left)] = top(right)
    members: dict[int, list[str]] = {}
    for place, row in enumerate(data):
        members.setdefault(top(place), []).append(row.name)
    keys = [min(members[top(place)]) for place in range(len(data))]
    splits = grouped_splits(keys)
    with path.open("x", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "split"])
        writer.writerows([row.name, split] for row, split in zip(data, splits, strict=True))
    return {split: splits.count(split) for split in SPLITS}
