"""Names of classes: from the names of their folders, or from a file that has one for each.

Names files are those that data sets come with: a name in each line, in the order of the folders (classes.txt); an id
and a name in each line (ImageNet's LOC_synset_mapping.txt); JSON, {"0": ["n01440764", "tench"]} or {"dog": "a dog"}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.data.captioned import DataError, normalize_caption
from clipvisionalign.data.json_text import parse_json
from clipvisionalign.data.text_files import decode, split_lines

#: Names files that are read where they lie in a data set's folder.
NAMES_FILES = ("classes.txt", "LOC_synset_mapping.txt", "imagenet_class_index.json")

#: The names of ImageNet's 1,000 classes as the package open_clip has them, by what `--names` takes.
OPENAI_NAMES = "openai"
IMAGENET_CLASSES = 1000

#: Classes that open_clip calls as another of them, by their number: WordNet's names.
_DISTINCT_NAMES = {744: "projectile", 836: "sunglass"}

#: What ImageNet calls its classes: the offset of a synset of WordNet 3.0.
_WORDNET_ID = re.compile(r"n\d{8}")

#: A number or WordNet's id in front of a name, as in "001.Albatross" or "n02085620-Chihuahua".
_NUMBER = re.compile(r"(?:\d+|n\d{8})[.\-_ ]+(?=\D)")


@dataclass(frozen=True)
class ClassNames:
    """Names of classes.

    Attributes:
        names: The name of each class by its folder.
        note: Where they come from; "" if the folders are the names.
    """

    names: dict[str, str]
    note: str = ""


@dataclass(frozen=True)
class _Entry:
    """A name in a names file.

    key: what stands before it in the same line or record, "" for nothing. name: what follows. whole: the name if `key`
    is no folder: the whole line, without a number that every line begins with. location: where in the file it stands.
    """

    key: str
    name: str
    whole: str
    location: str


def name_classes(folders: Sequence[str], names: str | Path = "") -> ClassNames:
    """Name classes.

    Args:
        folders: The names of their folders.
        names: A names file, or "openai" for those of ImageNet's 1,000 classes; "" for the names of the folders.

    Returns:
        The name of each class.

    Raises:
        DataError: The file cannot be read or has no name for a class, two classes have one name, or folders are named
            by WordNet's ids alone.
        ModuleNotFoundError: "openai" without the package open_clip.
    """
    order = sorted(folders, key=lambda folder: (int(folder), folder)) if _are_numbers(folders) else sorted(folders)
    if str(names) == OPENAI_NAMES:
        named = _openai_names(order)
    elif names:
        named = _names_from_file(order, Path(names))
    else:
        named = _names_from_folders(order)
    _check_distinct(named, str(names))
    return named


def folder_words(folder: str, without_number: bool = False) -> str:
    """Return the name of a folder as words: underscores and camel case are separated.

    Args:
        folder: The name of the folder.
        without_number: Whether a number or WordNet's id in front is left out.

    Returns:
        The words.

    >>> folder_words("golden_retriever"), folder_words("GoldenRetriever"), folder_words("001.Black_Cat", True)
    ('golden retriever', 'Golden Retriever', 'Black Cat')
    """
    text = _NUMBER.sub("", folder, count=1) if without_number and _NUMBER.match(folder) else folder
    text = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return " ".join(text.replace("_", " ").split())


def has_wordnet_ids(folders: Sequence[str]) -> bool:
    """Return whether all folders are named by WordNet's ids alone, as those of ImageNet.

    Args:
        folders: The names of class folders.

    Returns:
        Whether they are; true for none.
    """
    return all(map(_WORDNET_ID.fullmatch, folders))


def _are_numbers(folders: Sequence[str]) -> bool:
    return all(folder.isascii() and folder.isdigit() for folder in folders)


def _names_from_folders(folders: Sequence[str]) -> ClassNames:
    unnamed = [folder for folder in folders if _WORDNET_ID.fullmatch(folder)]
    if unnamed:
        raise DataError(
            f"the class folder {unnamed[0]} ({len(unnamed):,} such) is named by an id of WordNet, which no caption "
            f"has: put {NAMES_FILES[1]} into the data set's folder, or give its names with --names FILE"
        )
    without_number = all(map(_NUMBER.match, folders))
    names = {folder: folder_words(folder, without_number) for folder in folders}
    changed = [folder for folder in folders if names[folder] != folder]
    if not changed:
        return ClassNames(names)
    example = f"'{changed[0]}' as '{names[changed[0]]}'"
    counts = f"{len(changed):,} of {count_noun(len(names), 'class name')} "
    return ClassNames(names, f"{counts}made of their folders' names, such as {example}")


def _openai_names(folders: Sequence[str]) -> ClassNames:
    if len(folders) != IMAGENET_CLASSES or not has_wordnet_ids(folders):
        raise DataError(
            f"--names {OPENAI_NAMES}: names for the {IMAGENET_CLASSES:,} class folders of ImageNet (n01440764, ...), "
            f"and here are {len(folders):,}, such as {folders[0]}: give --names FILE"
        )
    import open_clip

    names = list(open_clip.IMAGENET_CLASSNAMES)
    for number, name in _DISTINCT_NAMES.items():
        names[number] = name
    note = f"class names of open_clip, but {' and '.join(_DISTINCT_NAMES.values())}, whose names there two classes have"
    return ClassNames(dict(zip(folders, names, strict=True)), note)


def _names_from_file(folders: Sequence[str], path: Path) -> ClassNames:
    """Names by what stands before them, by the folder that they spell, or in the order of the folders."""
    entries = _read_entries(path)
    by_key = {entry.key: entry for entry in entries if entry.key and entry.name}
    by_words = {_comparable(entry.whole): entry for entry in entries}
    matched = [folder for folder in folders if folder in by_key]
    spelled = [folder for folder in folders if _comparable(folder) in by_words]
    if len(matched) == len(folders):
        _check_one_name_each(path, entries, set(folders))
        names = {folder: _first_synonym(by_key[folder]) for folder in folders}
        return ClassNames(names, f"class names by {path.name}{_others(len(entries) - len(folders))}")
    if len(spelled) == len(folders):
        without_number = all(map(_NUMBER.match, folders))
        names = {
            folder: folder_words(folder, True) if without_number else _as_words(by_words[_comparable(folder)].whole)
            for folder in folders
        }
        return ClassNames(names, f"class names as {path.name} has them{_others(len(entries) - len(folders))}")
    if matched or spelled:
        known = max(matched, spelled, key=len)
        missing = [folder for folder in folders if folder not in known]
        raise DataError(
            f"{path}: has no name for the class folder '{missing[0]}' ({len(missing):,} such): add a line "
            f"'{missing[0]} NAME', or give another file with --names"
        )
    if len(entries) != len(folders):
        raise DataError(
            f"{path}: {count_noun(len(entries), 'name')} for {len(folders):,} class folders, none of which it "
            "mentions: one name in each line, in the order of the folders, or a folder and its name"
        )
    names = {folder: _as_words(entry.whole) for folder, entry in zip(folders, entries, strict=True)}
    first, last = folders[0], folders[-1]
    ends = f"'{first}' is '{names[first]}', ..., '{last}' is '{names[last]}'"
    return ClassNames(names, f"class names by {path.name}, in the order of the folders: {ends}")


def _check_one_name_each(path: Path, entries: Sequence[_Entry], folders: Set[str]) -> None:
    """Raises DataError where a class has two names, of which either may be meant."""
    first: dict[str, _Entry] = {}
    for entry in entries:
        if not entry.name or entry.key not in folders:
            continue
        other = first.setdefault(entry.key, entry)
        if other.name != entry.name:
            raise DataError(
                f"{path}: two names for the class folder '{entry.key}', '{other.name}' ({other.location}) and "
                f"'{entry.name}' ({entry.location}): leave one of them"
            )


def _comparable(text: str) -> str:
    return normalize_caption(folder_words(text.strip()))


def _others(count: int) -> str:
    return f", which has {count_noun(count, 'other name')}" if count > 0 else ""


def _first_synonym(entry: _Entry) -> str:
    """WordNet lists the synonyms of a synset: "tench, Tinca tinca"."""
    name = entry.name.partition(",")[0] if _WORDNET_ID.fullmatch(entry.key) else entry.name
    return _as_words(name)


def _as_words(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _read_entries(path: Path) -> list[_Entry]:
    if not path.is_file():
        raise DataError(f"--names {path}: no such file")
    text = decode(path.read_bytes()).text
    entries = _json_entries(path, text) if path.suffix.lower() == ".json" else _line_entries(text)
    if not entries:
        raise DataError(f"{path}: no name of a class in it")
    return entries


def _line_entries(text: str) -> list[_Entry]:
    """The names of lines. What stands before the first tab or blank is the key."""
    numbers = [number for number, line in enumerate(split_lines(text), 1) if line.strip()]
    lines = [line.strip() for line in split_lines(text) if line.strip()]
    parts = [line.partition("\t" if "\t" in line else " ") for line in lines]
    is_numbered = all(key.isdigit() and name for key, _, name in parts)
    return [
        _Entry(key.strip(), name.strip(), name.strip() if is_numbered else line, f"line {number}")
        for number, line, (key, _, name) in zip(numbers, lines, parts, strict=True)
    ]


def _json_entries(path: Path, text: str) -> list[_Entry]:
    try:
        content, repeated = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if isinstance(content, list):
        return [_json_entry(path, f"entry {number}", "", value) for number, value in enumerate(content, 1)]
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object of names by folder, or a list of names")
    if repeated:
        raise DataError(f"{path}: '{repeated.partition(':')[0]}' occurs twice in it: leave one of them")
    entries = [_json_entry(path, f"'{key}'", str(key), value) for key, value in content.items()]
    if _are_numbers([entry.key for entry in entries]):
        return sorted(entries, key=lambda entry: int(entry.key))
    return entries


def _json_entry(path: Path, what: str, key: str, value: Any) -> _Entry:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value):
        key, value = value
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{path}, {what}: expected a name, or an id and a name, and not {str(value)[:40]!r}")
    return _Entry(key, value.strip(), value.strip(), what)


def _check_distinct(named: ClassNames, source: str) -> None:
    """Raises DataError for two classes of one name, between which no model could decide."""
    folder_by_name: dict[str, str] = {}
    for folder, name in named.names.items():
        other = folder_by_name.setdefault(normalize_caption(name), folder)
        if other != folder:
            where = f" by {source}" if source else ""
            raise DataError(
                f"the classes '{other}' and '{folder}' are both called '{name}'{where}: give each a name of its own "
                "with --names FILE, a line each: its folder and its name"
            )
