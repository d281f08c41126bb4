"""Class folders: dog/1.jpg, or train/dog/1.jpg with a folder for each split, as ImageNet and torchvision's ImageFolder.

A class is a folder, an image belongs to the class in whose folder it lies, at any depth. As captions an image has one,
made of its class's name; its identity is its class, so that images of one class are positives of each other's captions.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from clipvisionalign.counts import count_noun
from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.caption_templates import DEFAULT_TEMPLATE, fill_template
from clipvisionalign.data.captioned import SPLITS, CaptionedImages, DataError
from clipvisionalign.data.class_names import NAMES_FILES, has_wordnet_ids, name_classes
from clipvisionalign.data.formats.tables import caption_files
from clipvisionalign.data.splits import SPLIT_RULE, canonical_split
from clipvisionalign.images import ExcludedFiles, image_files, name_exclusion_reason

LAYOUT = "classes"

#: Folders that hold images of several kinds beside each other (images and their masks), and are mostly no classes.
_NO_CLASSES = frozenset({"images", "image", "imgs", "img", "masks", "labels", "annotations"})


@dataclass
class _ClassTree:
    """The images of class folders.

    images: each with its split and its class. outside: images in no class folder or in no split, by the folder in which
    they lie. empty: class folders without an image.
    """

    images: list[tuple[Path, str, str]] = field(default_factory=list)
    outside: dict[str, list[Path]] = field(default_factory=dict)
    empty: list[Path] = field(default_factory=list)
    has_splits: bool = False

    @property
    def classes(self) -> list[str]:
        """The names of the class folders that have an image, sorted."""
        return sorted({folder for _, _, folder in self.images})


def is_classes(source: Path) -> bool:
    """Return whether a folder has class folders and cannot be anything else.

    That is two classes or more in folders of splits, or with a names file beside them, or named by WordNet's ids; and
    no image and no caption file elsewhere.

    Args:
        source: The folder.

    Returns:
        Whether it has.
    """
    if not source.is_dir():
        return False
    tree = _list_classes(source)
    classes = tree.classes
    if tree.outside or len(classes) < 2 or not _NO_CLASSES.isdisjoint(map(str.lower, classes)):
        return False
    if set(caption_files(source)) - {source / name for name in NAMES_FILES}:
        return False
    return tree.has_splits or _names_file(source) is not None or has_wordnet_ids(classes)


def has_image_folders(source: Path) -> bool:
    """Return whether a folder has two folders or more with images, which may be classes.

    Args:
        source: The folder.

    Returns:
        Whether it has.
    """
    return source.is_dir() and len(_list_classes(source).classes) > 1


def read_classes(
    source: Path, group: str = "", split_rule: int = SPLIT_RULE, names: str | Path = ""
) -> CaptionedImages:
    """Read class folders.

    Args:
        source: The folder of the classes, or of the splits with their classes.
        group: None: class folders have no columns.
        split_rule: How images are split where there are no folders of splits; see `data/splits.py`.
        names: A names file, or "openai"; by default one of `NAMES_FILES` in the folder, else the folders' names.

    Returns:
        An image each with its class as identity, and the names of the classes.

    Raises:
        DataError: There are fewer than two classes, or their names cannot be read.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no folder: class folders are read of the folder that they lie in")
    tree = _list_classes(source)
    classes = tree.classes
    if len(classes) < 2:
        message = f"one class folder with images, '{classes[0]}'" if classes else "no class folder with images"
        raise DataError(
            f"{source}: {message}: expected two or more, CLASS/*.jpg, or SPLIT/CLASS/*.jpg with splits "
            f"{', '.join(SPLITS)}"
        )
    names_file = names or _names_file(source) or ""
    try:
        named = name_classes(classes, names_file)
    except DataError as error:
        raise DataError(str(error) if str(source) in str(error) else f"{source}: {error}") from None
    table = CaptionTable(source, LAYOUT, [source], split_rule, class_names=named.names)
    for path, split, folder in tree.images:
        name = path.relative_to(source).as_posix()
        caption = fill_template(DEFAULT_TEMPLATE, named.names[folder])
        table.add_row(name, caption, name, split=split, identity=folder)
    _report_others(table, tree)
    table.note(f"{len(classes):,} classes")
    if named.note:
        table.note(named.note)
    table.files_read |= {Path(names_file)} if names_file else set()
    table.report_unread(caption_files(source))
    return table.finish()


def _report_others(table: CaptionTable, tree: _ClassTree) -> None:
    """Report images outside of class folders, class folders without images, and classes that a split lacks."""
    for folder, paths in tree.outside.items():
        first = paths[0].relative_to(table.source).as_posix()
        known = f"a folder of a split is called {', '.join(SPLITS)}, an image lies in a class folder"
        message = f"{count_noun(len(paths), 'image')} in no class of a split, such as {first}; {known}"
        table.rows += len(paths)
        table.report("in no class", folder, message, rows=len(paths))
    for empty in tree.empty:
        table.report("empty class", empty.relative_to(table.source).as_posix(), "no image in this folder", "warning")
    if tree.has_splits:
        splits_of: dict[str, set[str]] = {}
        for _, split, folder in tree.images:
            splits_of.setdefault(folder, set()).add(split)
        every = set().union(*splits_of.values())
        partial = [folder for folder in sorted(splits_of) if splits_of[folder] != every]
        if partial:
            first = f"'{partial[0]}' ({', '.join(sorted(splits_of[partial[0]]))} alone)"
            table.note(f"{len(partial):,} of {len(splits_of):,} classes are not in every split, such as {first}")


def _names_file(source: Path) -> Path | None:
    return next((path for name in NAMES_FILES if (path := source / name).is_file()), None)


def _list_classes(source: Path) -> _ClassTree:
    """The images below a folder by split and class. Folders are splits where one is named so and has folders with
    images in it."""
    paths = image_files(source, ExcludedFiles())
    parts_of = [path.relative_to(source).parts for path in paths]
    has_splits = any(len(parts) > 2 and canonical_split(parts[0]) in SPLITS for parts in parts_of)
    tree = _ClassTree(has_splits=has_splits)
    depth = 1 if has_splits else 0
    for path, parts in zip(paths, parts_of, strict=True):
        split = canonical_split(parts[0]) if has_splits else ""
        if len(parts) < depth + 2 or (has_splits and split not in SPLITS):
            tree.outside.setdefault(parts[0] if len(parts) > 1 else ".", []).append(path)
        else:
            # One class whatever the Unicode form in which a system has written its name.
            tree.images.append((path, split, unicodedata.normalize("NFC", parts[depth])))
    with_images = {Path(*parts[: depth + 1]) for parts in parts_of if len(parts) > depth + 1}
    parents = [source / split for split in sorted({parts[0] for parts in parts_of})] if has_splits else [source]
    tree.empty = [
        folder for parent in parents if parent.is_dir() for folder in sorted(parent.iterdir())
        if folder.is_dir() and not name_exclusion_reason(folder.name) and folder.relative_to(source) not in with_images
    ]  # fmt: skip
    return tree
