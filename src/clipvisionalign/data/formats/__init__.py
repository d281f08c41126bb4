"""One reader per published layout, each a function from a path to `CaptionedImages`.

The layout is recognised by what lies in the folder (or by the file's own form), and can be named. A new layout is a
new function in a file of this folder and a line in `LAYOUTS`: a recogniser, a reader, and what to expect there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.formats import classes, flickr, folders, json_files, tables
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.data.streams.files import has_tar_files, is_pattern, is_shards, shards_in_folder
from clipvisionalign.data.streams.huggingface import is_saved_dataset
from clipvisionalign.data.streams.in_memory import read_stream
from clipvisionalign.images import ExcludedFiles, image_files


@dataclass(frozen=True)
class Layout:
    """A dataset layout.

    Attributes:
        name: Its name, as `--layout` takes it.
        expects: What its files are, in a few words.
        matches: Whether a path has the layout.
        read: Reads a path, given the column to group by and the split rule.
    """

    name: str
    expects: str
    matches: Callable[[Path], bool]
    read: Callable[..., CaptionedImages]


#: The layout of shards, Parquet files by a pattern and Hugging Face's saved data sets.
STREAM = "stream"

#: In the order in which they are tried: the more particular before the more general.
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(STREAM, "train-*.tar, *-{0..9}.parquet, save_to_disk", is_shards, read_stream),
        Layout("rstpreid", "data_captions.json and imgs/", json_files.is_rstpreid, json_files.read_rstpreid),
        Layout("karpathy", "dataset_*.json and its images", json_files.is_karpathy, json_files.read_karpathy),
        Layout("coco", "annotations/captions_*.json, train2017/", json_files.is_coco, json_files.read_coco),
        Layout("flickr30k-kaggle", "results.csv, '| ' separated", flickr.is_kaggle30k, flickr.read_kaggle30k),
        Layout("flickr30k", "results_20130124.token", flickr.is_flickr30k, flickr.read_flickr30k),
        Layout("flickr8k", "captions.txt or Flickr8k.token.txt", flickr.is_flickr8k, flickr.read_flickr8k),
        Layout("folder", "images with metadata.csv or .jsonl", folders.is_folder, folders.read_folder),
        Layout("table", "one CSV, TSV, JSONL or Parquet file", tables.is_table, tables.read_table),
        Layout("texts", "images with one .txt each", folders.is_texts, folders.read_texts),
        Layout(classes.LAYOUT, "train/CLASS/*.jpg, val/CLASS/*.jpg", classes.is_classes, classes.read_classes),
    )
}

#: Layouts without a list of their images: those that are there are all.
UNLISTED_LAYOUTS = ("texts", classes.LAYOUT)

#: Layouts whose rows have columns.
LAYOUTS_WITH_COLUMNS = ("folder", "table")


def read_captioned_images(
    path: str | Path, layout: str = "auto", group: str = "", split_rule: int = SPLIT_RULE
) -> CaptionedImages:
    """Read a data set in any known layout.

    Names of images are resolved to files. No image is decoded: `clipvisionalign.data.check.check` lists broken ones.

    Args:
        path: A folder or a file.
        layout: Its layout ("flickr8k", "flickr30k", "coco", "karpathy", "folder", "table" and so on: the keys of
            `LAYOUTS`), or "auto" to recognise it.
        group: A column of a table: without splits of its own, all images with one value of it are in one split.
        split_rule: Number of the rule for images without a split; by default that of new runs, see `data/splits.py`.

    Returns:
        The images with their captions; `problems` lists every row that was not read, with file, line and reason.

    Raises:
        DataError: Nothing can be read, or `group` is given for a layout without columns.

    >>> from clipvisionalign.data.scene_dataset import write_scenes
    >>> data = read_captioned_images(write_scenes("ten-scenes", 10, size=32))
    >>> len(data), len(data.captions), data.layout, len(data.problems)
    (10, 50, 'folder', 0)
    """
    reader = detect_layout(path, layout)
    if group and reader.name not in LAYOUTS_WITH_COLUMNS:
        raise DataError(f"{path}: the layout '{reader.name}' has no columns to group by; --group is for tables")
    data = reader.read(Path(path), group, split_rule)
    if reader.name != STREAM and (shard_files := shards_in_folder(Path(path))):
        more = f" and {len(shard_files) - 1:,} more" if len(shard_files) > 1 else ""
        data.notes.append(
            f"the samples of {shard_files[0].name}{more} are not read: the unpacked files beside them are; "
            "to read the "
            f"shards, name them, such as {shard_files[0]}, or give --layout {STREAM}"
        )
    return data


def detect_layout(path: str | Path, layout: str = "auto") -> Layout:
    """The layout by which a data set is read, for all commands alike.

    Args:
        path: A folder or a file.
        layout: A name from `LAYOUTS`, or "auto" to recognise it.

    Returns:
        The layout.

    Raises:
        DataError: There is nothing at the path, or no layout is recognised.
    """
    source = Path(path)
    if layout not in ("auto", *LAYOUTS):
        raise DataError(f"unknown layout '{layout}'; supported are: auto, {', '.join(LAYOUTS)}")
    if is_pattern(source) and not source.is_dir():
        # Nothing else reads them: a layout that is given is that of another data set, of `--dev_data`.
        return LAYOUTS[STREAM]
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    return _detect(source) if layout == "auto" else LAYOUTS[layout]


def is_stream(path: str | Path, layout: str = "auto") -> bool:
    """Whether a data set is read as a stream: shards, Parquet files by a pattern, or a saved Hugging Face data set.

    Args:
        path: A folder, a file or a pattern.
        layout: A name from `LAYOUTS`, or "auto" to recognise it.

    Returns:
        Whether it is; false where no layout is recognised, which the reader reports.
    """
    try:
        return detect_layout(path, layout).name == STREAM
    except DataError:
        # Reported by the reader.
        return False


def _detect(source: Path) -> Layout:
    """Tar files that hold samples are a stream unless images lie beside them as another layout has them: an archive
    beside what it was unpacked to holds no more than that, and often less."""
    others = (layout for layout in LAYOUTS.values() if layout.name != STREAM)
    if LAYOUTS[STREAM].matches(source):
        unpacked = source.is_dir() and not is_saved_dataset(source) and image_files(source, ExcludedFiles())
        return next((layout for layout in others if unpacked and layout.matches(source)), LAYOUTS[STREAM])
    for layout in others:
        if layout.matches(source):
            return layout
    if has_tar_files(source) and not (len(tables.tables_in(source)) > 1 and image_files(source, ExcludedFiles())):
        # An archive beside what it was unpacked to is recognised by that.
        return LAYOUTS[STREAM]
    if len(several := tables.tables_in(source)) > 1:
        names = ", ".join(path.name for path in several[:5])
        raise DataError(f"{source}: holds {len(several)} tables ({names}): name the one to read")
    known = "\n".join(f"  {layout.name:<17} {layout.expects}" for layout in LAYOUTS.values())
    hint = ""
    if classes.has_image_folders(source):
        hint = f"; if each folder of images in it is a class, give --layout {classes.LAYOUT}"
    raise DataError(f"{source}: none of the supported dataset layouts{hint}. They are:\n{known}")
