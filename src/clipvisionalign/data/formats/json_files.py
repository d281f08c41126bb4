"""Data sets with captions in one JSON file: Karpathy's splits, COCO captions, RSTPReid.

Sources: Karpathy and Fei-Fei, CVPR 2015 (the splits); Chen et al., "Microsoft COCO Captions", arXiv:1504.00325; Zhu et
al., "DSSL: Deep Surroundings-person Separation Learning for Text-based Person Retrieval", ACM MM 2021 (RSTPReid).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from clipvisionalign.data.caption_table import CaptionTable
from clipvisionalign.data.captioned import SPLITS, CaptionedImages, DataError
from clipvisionalign.data.formats.flickr import IMAGE_FOLDERS
from clipvisionalign.data.formats.tables import caption_files
from clipvisionalign.data.json_text import parse_json
from clipvisionalign.data.splits import SPLIT_RULE, canonical_split
from clipvisionalign.data.text_files import decode


def _load(path: Path, table: CaptionTable) -> Any:
    decoded = decode(path.read_bytes())
    if decoded.repair:
        table.report("broken encoding", f"{path.name}, line {decoded.line}", decoded.repair, "mended")
    table.files_read.add(path)
    try:
        value, repeated = parse_json(decoded.text)
        if repeated:
            message = f"a key stands twice in one object, and the second is not read ({repeated})"
            table.report("repeated key", path.name, message[:400], "warning")
        return value
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: JSON that cannot be read: {error}") from None


def _text_or_empty(value: Any) -> str:
    """A text that names something; "" for anything else."""
    return value.strip() if isinstance(value, str) else ""


def _id_key(value: Any) -> str:
    """A number or a text as a key that is the same for 7, 7.0 and "7"; "" for what is neither."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, (int, float, str)) and not isinstance(value, bool) else ""


def _entries(content: Any, key: str | None, path: Path) -> list[Any]:
    """The list of entries of a JSON file: under `key`, or the whole file."""
    entries = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list{f' under {key!r}' if key else ''}, found {type(entries).__name__}")
    return entries


def _report_unread(table: CaptionTable) -> None:
    if table.source.is_dir():
        table.report_unread(caption_files(table.source))


def _karpathy_file(source: Path) -> Path | None:
    if source.is_file():
        return source if source.name.startswith("dataset") and source.suffix == ".json" else None
    return next(iter(sorted([*source.glob("dataset_*.json"), *source.glob("dataset.json")])), None)


def is_karpathy(source: Path) -> bool:
    """Whether there is a dataset_*.json.

    Args:
        source: A folder or a file.

    Returns:
        Whether there is.
    """
    return _karpathy_file(source) is not None


def read_karpathy(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """Read Karpathy's `dataset_{flickr8k,flickr30k,coco}.json` beside (or above) the images.

    Args:
        source: Its folder, or the file.
        group: Not used: the layout has no columns.
        split_rule: How images without a split are assigned, see `data/splits.py`.

    Returns:
        The images with their captions; "restval" counts as train.

    Raises:
        DataError: The file is missing or not of this form, or no row can be used.
    """
    path = _karpathy_file(source)
    if path is None:
        raise DataError(f"{source}: no dataset_*.json there")
    roots = [path.parent / folder for folder in IMAGE_FOLDERS]
    table = CaptionTable(source, "karpathy", roots, split_rule)
    for index, entry in enumerate(_entries(_load(path, table), "images", path)):
        location = f"{path.name}, images[{index}]"
        name = _text_or_empty(entry.get("filename")) if isinstance(entry, dict) else ""
        if not name or not isinstance(entry.get("sentences"), list):
            table.skip_row("wrong columns", location, "an entry needs 'filename' and 'sentences'")
            continue
        # COCO's images are in train2014 and val2014, named by `filepath`.
        subfolders = [_text_or_empty(entry["filepath"])] if _text_or_empty(entry.get("filepath")) else []
        folders = [root / part for part in [*subfolders, "."] for root in roots] if subfolders else []
        table.add_row(name, entry["sentences"], location, split=entry.get("split"), folders=folders)
    _report_unread(table)
    return table.finish()


def _coco_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source] if source.name.startswith("captions_") and source.suffix == ".json" else []
    return sorted([*source.glob("annotations/captions_*.json"), *source.glob("captions_*.json")])


def is_coco(source: Path) -> bool:
    """Whether there is an annotations/captions_*.json.

    Args:
        source: A folder or a file.

    Returns:
        Whether there is.
    """
    return bool(_coco_files(source))


def read_coco(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """Read COCO's captions: captions_train2017.json is the training split, captions_val2017.json the dev split.

    Args:
        source: The folder of annotations/, or one of the files.
        group: Not used: the layout has no columns.
        split_rule: How images without a split are assigned, see `data/splits.py`.

    Returns:
        The images with their captions.

    Raises:
        DataError: The files are missing or not of this form, or no row can be used.
    """
    files = _coco_files(source)
    if not files:
        raise DataError(f"{source}: no annotations/captions_*.json there")
    table = CaptionTable(source, "coco", [source if source.is_dir() else source.parent], split_rule)
    for path in files:
        _read_coco_file(path, table)
    _report_unread(table)
    return table.finish()


def _coco_split(year: str) -> str:
    """The split of `captions_YEAR.json`, such as train2017, val, dev or minival2014; "" where the name has none."""
    words = [canonical_split(word) for word in re.split(r"[^a-z]+", year.lower())]
    return "train" if "valminusminival" in year.lower() else next((word for word in words if word in SPLITS), "")


def _read_coco_file(path: Path, table: CaptionTable) -> None:
    """The rows of one file: its annotations, each about one of its images."""
    content = _load(path, table)
    year = path.stem.removeprefix("captions_")
    split = _coco_split(year)
    root = path.parent.parent if path.parent.name == "annotations" else path.parent
    folders = [root / year, root / "images" / year, root / "images", root]
    names: dict[str, str] = {}
    duplicate_ids: set[str] = set()
    annotated: set[str] = set()
    for index, image in enumerate(_entries(content, "images", path)):
        key = _id_key(image.get("id")) if isinstance(image, dict) else ""
        if not key or not _text_or_empty(image.get("file_name")):
            table.report("wrong columns", f"{path.name}, images[{index}]", "an image needs 'id' and 'file_name'")
        elif names.setdefault(key, _text_or_empty(image["file_name"])) != _text_or_empty(image["file_name"]):
            message = f"the id {key} is that of {names[key]} as well: none of its captions belongs to one of them"
            table.report("id of two images", f"{path.name}, images[{index}]", message)
            duplicate_ids.add(key)
    for index, entry in enumerate(_entries(content, "annotations", path)):
        location = f"{path.name}, annotations[{index}]"
        key = _id_key(entry.get("image_id")) if isinstance(entry, dict) else ""
        if key not in names:
            table.skip_row("no image name", location, "its image_id is that of no image in the file")
            continue
        annotated.add(key)
        if key in duplicate_ids:
            table.skip_row("id of two images", location, f"its image_id {key} is that of two images in the file")
            continue
        table.add_row(names[key], entry.get("caption"), location, split=split, folders=folders)
    for key in names:
        if key not in annotated:
            table.report("no captions", f"{path.name}, image {key}", f"{names[key]} has no annotation")


def _rstpreid_file(source: Path) -> Path | None:
    path = source if source.is_file() else source / "data_captions.json"
    return path if path.name == "data_captions.json" and path.is_file() else None


def is_rstpreid(source: Path) -> bool:
    """Whether there is a data_captions.json.

    Args:
        source: A folder or a file.

    Returns:
        Whether there is.
    """
    return _rstpreid_file(source) is not None


def read_rstpreid(source: Path, group: str = "", split_rule: int = SPLIT_RULE) -> CaptionedImages:
    """Read RSTPReid: images in imgs/, and an identity each.

    Images of one person are positives of each other's captions.

    Args:
        source: Its folder, or data_captions.json.
        group: Not used: the layout has no columns.
        split_rule: How images without a split are assigned, see `data/splits.py`.

    Returns:
        The images with their captions.

    Raises:
        DataError: The file is missing or not of this form, or no row can be used.
    """
    path = _rstpreid_file(source)
    if path is None:
        raise DataError(f"{source}: no data_captions.json there")
    table = CaptionTable(source, "rstpreid", [path.parent / "imgs", path.parent], split_rule)
    for index, entry in enumerate(_entries(_load(path, table), None, path)):
        location = f"{path.name}, [{index}]"
        name = _text_or_empty(entry.get("img_path")) if isinstance(entry, dict) else ""
        if not name or not _id_key(entry.get("id")) or not isinstance(entry.get("captions"), list):
            table.skip_row("wrong columns", location, "an entry needs 'id', 'img_path' and 'captions'")
        else:
            identity = _id_key(entry["id"])
            table.add_row(name, entry["captions"], location, split=entry.get("split"), identity=identity)
    _report_unread(table)
    return table.finish()
