"""Assignment of images to splits, for data sets without splits: by a hash, 80 : 10 : 10.

The hash is of what stays when images are added, renamed or moved: of the group that an image belongs to (a column that
is named), else of the identity shown on it, else of its content. Images that have one of these in common stand in one
split, over as many steps as it takes. Near-duplicates too where they were grouped once, into a file that later readings
go by (`write_splits`); where a data set has splits of its own, the file may not contradict them.

Runs from before this rule (rule 1) go by a hash of each image's name, as their table wrote it; they are measured so.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from clipvisionalign.data.captioned import SPLITS, CaptionedImages, DataError
from clipvisionalign.data.split_file import SPLIT_FILE, split_file_path
from clipvisionalign.data.text_files import decode

#: The rule that decides now: `SPLIT_FILE` where it is there, else `HASH_RULE`. 1 is that of earlier versions.
HASH_RULE, SPLIT_RULE = 2, 3

#: What each rule uses, for messages.
SPLIT_RULES = {
    1: "splits by a hash of each name", HASH_RULE: "splits by a hash of each image's content, or of its group",
    SPLIT_RULE: f"splits by {SPLIT_FILE}",
}  # fmt: skip

#: What data sets call the splits.
SPLIT_ALIASES = {
    "train": "train", "training": "train", "restval": "train", "dev": "dev", "devel": "dev", "development": "dev",
    "val": "dev", "valid": "dev", "validation": "dev", "minival": "dev", "test": "test", "testing": "test",
}  # fmt: skip

#: Bytes at an image's beginning and end that distinguish it from others of its size.
_END_BYTES = 32 * 1024


def canonical_split(value: object) -> str:
    """The split that a word means.

    Args:
        value: A cell of a table: text, bytes, a number, None or NaN.

    Returns:
        "train", "dev" or "test"; the word itself in small letters where it means none, "" for nothing.

    >>> canonical_split(" Validation "), canonical_split(None), canonical_split("holdout")
    ('dev', '', 'holdout')
    """
    if isinstance(value, bytes):
        value = decode(value).text
    if value is None or value != value:
        return ""
    word = str(value).strip().lower()
    return SPLIT_ALIASES.get(word, word)


def hash_split(name: str) -> str:
    """The split of a name by its hash, 80 : 10 : 10.

    Adding or removing names moves none of the others.

    Args:
        name: Any text.

    Returns:
        "train", "dev" or "test".

    >>> hash_split("content 123 abc") == hash_split("content 123 abc")
    True
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def content_key(image: Path | bytes) -> str:
    """The key of an image's content, equal for equal images.

    Its size, its first and its last 32 KiB count: of a larger file what is between is not read.

    Args:
        image: A file, or the bytes of one.

    Returns:
        The key; "" where it cannot be read or is no plain file.
    """
    try:
        if isinstance(image, bytes):
            size, ends = len(image), image[:_END_BYTES] + image[-_END_BYTES:]
        elif not image.is_file():
            # A pipe would be waited for.
            return ""
        else:
            with image.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                ends = file.read(_END_BYTES)
                file.seek(max(0, size - _END_BYTES))
                ends += file.read(_END_BYTES)
    except (OSError, ValueError):
        return ""
    return f"content {size} {hashlib.blake2b(ends, digest_size=16).hexdigest()}"


def read_split_file(path: Path) -> dict[str, tuple[str, str]]:
    """Read a file that `write_splits` wrote.

    Args:
        path: The file, a CSV with the columns image,split.

    Returns:
        By an image's name its split, and the line that gives it.

    Raises:
        DataError: It is another file, or an image is in two splits.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        # As it is written: a name may be bytes that are no UTF-8.
        text = content.decode("utf-8-sig", "surrogateescape") if b"\0" not in content else decode(content).text
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [cell.strip().lower() for cell in next(rows, [])]
        if header != ["image", "split"]:
            raise DataError(f"{path}, line 1: a file of splits has the columns image,split")
        splits: dict[str, tuple[str, str]] = {}
        for row in filter(None, rows):
            location = f"{path.name}, line {rows.line_num}"
            split = canonical_split(row[1]) if len(row) == 2 else ""
            if split not in SPLITS:
                raise DataError(f"{path}, line {rows.line_num}: expected an image and one of {', '.join(SPLITS)}")
            previous = splits.setdefault(row[0], (split, location))
            if previous[0] != split:
                raise DataError(f"{location}: {row[0]} is in '{split}', and in '{previous[0]}' by {previous[1]}")
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from None
    return splits


def key_priority(key: str) -> tuple[int, bytes]:
    """The order in which the keys of an image decide about its split.

    Its group comes first, then its identity, its content and its name; of two keys of one sort a hash decides.

    Args:
        key: A key of `grouping_keys`.

    Returns:
        A value to sort by; the least decides.
    """
    kinds = ("group", "identity", "content", "name")
    return kinds.index(key.partition(" ")[0]), hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def grouping_keys(name: str, image: Path | bytes, group: str | None, identity: str | None) -> list[str]:
    """What an image shares with those that have to be in its split.

    Args:
        name: Its name.
        image: Its file, or the bytes of one, whose content is hashed.
        group: Value of the column `--group`; None for none.
        identity: The identity shown on it; None for none.

    Returns:
        Keys of its group and identity, if any, and of its content, or of its name where that cannot be read.
    """
    known_keys = [f"{what} {value}" for what, value in (("group", group), ("identity", identity)) if value is not None]
    return [*known_keys, content_key(image) or f"name {name}"]


def connected_groups(keys: Sequence[Sequence[Hashable]], linked_pairs: Sequence[tuple[int, int]] = ()) -> list[int]:
    """Group images that share a key, over as many steps as it takes.

    Args:
        keys: (N,) keys of each image.
        linked_pairs: Pairs of image numbers that belong together too.

    Returns:
        (N,) a number for each image, equal within a group.

    >>> connected_groups([["identity 1", "content a"], ["content a"], ["content b"]])
    [0, 0, 2]
    """
    groups = list(range(len(keys)))

    def find_root(index: int) -> int:
        while groups[index] != index:
            groups[index] = groups[groups[index]]
            index = groups[index]
        return index

    first_with_key: dict[Hashable, int] = {}
    for index, image_keys in enumerate(keys):
        for key in image_keys:
            groups[find_root(index)] = find_root(first_with_key.setdefault(key, index))
    for one, other in linked_pairs:
        groups[find_root(one)] = find_root(other)
    return [find_root(index) for index in range(len(keys))]


#: Images that training needs: of the split that it learns from, and of the one that it is measured on meanwhile.
MIN_TRAIN_IMAGES, MIN_DEV_IMAGES = 2, 2


def grouped_splits(keys: Sequence[str]) -> list[str]:
    """Assign whole groups to splits: a tenth of the images each to dev and test, by the hashes of the groups.

    Dev has two images at least; test has one where two are left for train.

    Args:
        keys: (N,) the group of each image.

    Returns:
        (N,) "train", "dev" or "test".

    Raises:
        ValueError: There are too few images or groups for two images each in train and dev.
    """
    weight = Counter(keys)
    order = sorted(weight, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest())
    total, remaining, split_of_key = len(keys), len(keys), {}
    for split, least in (("dev", MIN_DEV_IMAGES), ("test", 1)):
        assigned = 0
        for key in [key for key in order if key not in split_of_key]:
            enough = assigned >= least
            if (enough and assigned + weight[key] > total / 10) or remaining - weight[key] < MIN_TRAIN_IMAGES:
                continue
            split_of_key[key] = split
            assigned, remaining = assigned + weight[key], remaining - weight[key]
        if split == "dev" and assigned < least:
            raise ValueError(f"{total} images in {len(weight)} groups are too few to share out: two are needed each in "
                             "train and dev")  # fmt: skip
    return [split_of_key.get(key, "train") for key in keys]


def write_splits(data: CaptionedImages, linked_pairs: Sequence[tuple[int, int]], path: Path) -> CaptionedImages:
    """Write a file with the split of each image: those of one group or identity, equal and nearly equal ones together.

    Args:
        data: A data set without splits of its own.
        linked_pairs: Pairs of image numbers that belong together, such as near-duplicates.
        path: The file to write; beside the data set it has to be `SPLIT_FILE`.

    Returns:
        The data set with these splits.

    Raises:
        FileExistsError: The file is there already.
        DataError: The data set has splits of its own, the file would be taken for a table of it, or images are too few.
    """
    if path.absolute().parent == split_file_path(data.source).absolute().parent and path.name != SPLIT_FILE:
        raise DataError(f"{path}: beside the data set only {split_file_path(data.source)} is read as its splits")
    if path.exists():
        raise FileExistsError(f"{path}: is there already, and is not overwritten: remove it, or give another file")
    if data.official_splits:
        raise DataError(f"{data.source}: has splits of its own; a file of splits is for a data set without")
    groups = connected_groups(
        [grouping_keys(row.name, row.image, row.group, None if data.class_names else row.identity) for row in data],
        linked_pairs,
    )
    representatives: dict[int, str] = {}
    for row, group in zip(data, groups, strict=True):
        representatives[group] = min(row.name, representatives.get(group, row.name))
    keys = [representatives[group] for group in groups]
    try:
        splits = grouped_splits(keys)
    except ValueError as error:
        raise DataError(f"{data.source}: {error}") from None
    with path.open("x", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "split"])
        writer.writerows([row.name, split] for row, split in zip(data, splits, strict=True))
    rows = [replace(row, split=split) for row, split in zip(data, splits, strict=True)]
    return replace(data, rows=rows, official_splits=True, split_rule=SPLIT_RULE)
