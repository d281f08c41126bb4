"""Data sets whose captions lie in one JSON file: Karpathy's splits, COCO captions, RSTPReid.

Sources: Karpathy and Fei-Fei, CVPR 2015 (the splits); Chen et al., "Microsoft COCO Captions", arXiv:1504.00325; Zhu et
al., "DSSL: Deep Surroundings-person Separation Learning for Text-based Person Retrieval", ACM MM 2021 (RSTPReid).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, CaptionTable, DataError, find_image
from clipvisionalign.data.formats.flickr import IMAGE_FOLDERS

#: Karpathy's names of the splits; `restval` is what he added to COCO's training split.
_KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test"}


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8, as JSON has to be (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None


def _entries(found: Any, key: str | None, path: Path) -> list[Any]:
    """The list of entries of a JSON file: under `key`, or the whole file."""
    entries = found.get(key) if key and isinstance(found, dict) else found
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list{f' under {key!r}' if key else ''}, found {type(entries).__name__}")
    return entries


def _karpathy_file(source: Path) -> Path | None:
    if source.is_file():
        return source if source.name.startswith("dataset") and source.suffix == ".json" else None
    return next(iter(sorted([*source.glob("dataset_*.json"), *source.glob("dataset.json")])), None)


def is_karpathy(source: Path) -> bool:
    """A dataset_*.json."""
    return _karpathy_file(source) is not None


def read_karpathy(source: Path) -> CaptionedImages:
    """Karpathy's `dataset_{flickr8k,flickr30k,coco}.json` beside (or above) the pictures."""
    path = _karpathy_file(source)
    if path is None:
        raise DataError(f"{source}: no dataset_*.json there")
    table = CaptionTable(source, "karpathy")
    roots = [path.parent / folder for folder in IMAGE_FOLDERS]
    for number, entry in enumerate(_entries(_load(path), "images", path)):
        place = f"{path.name}, images[{number}]"
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not name or not isinstance(entry.get("sentences"), list):
            table.report("wrong columns", place, "an entry needs 'filename' and 'sentences'")
            continue
        # COCO's pictures stand in train2014 and val2014, told by `filepath`.
        below = [entry["filepath"]] if entry.get("filepath") else []
        table.images[name] = find_image(name, [root / part for part in [*below, "."] for root in roots])
        told = str(entry.get("split", ""))
        table.splits[name] = _KARPATHY_SPLITS.get(told, told)
        for sentence in entry["sentences"]:
            text = sentence.get("raw") or " ".join(sentence.get("tokens", [])) if isinstance(sentence, dict) else ""
            table.add(name, text, place)
    return table.finish()


def _coco_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source] if source.name.startswith("captions_") and source.suffix == ".json" else []
    return sorted([*source.glob("annotations/captions_*.json"), *source.glob("captions_*.json")])


def is_coco(source: Path) -> bool:
    """annotations/captions_*.json."""
    return bool(_coco_files(source))


def read_coco(source: Path) -> CaptionedImages:
    """COCO caption annotations: captions_train2017.json is the training split, captions_val2017.json the dev split."""
    files = _coco_files(source)
    if not files:
        raise DataError(f"{source}: no annotations/captions_*.json there")
    table = CaptionTable(source, "coco")
    for path in files:
        found = _load(path)
        year = path.stem.removeprefix("captions_")
        split = {"tr": "train", "va": "dev", "te": "test"}.get(year[:2], "train")
        root = path.parent.parent if path.parent.name == "annotations" else path.parent
        names = {}
        for number, image in enumerate(_entries(found, "images", path)):
            if not isinstance(image, dict) or "id" not in image or not image.get("file_name"):
                table.report("wrong columns", f"{path.name}, images[{number}]", "an image needs 'id' and 'file_name'")
                continue
            name = names[image["id"]] = image["file_name"]
            table.splits[name] = split
            table.images[name] = find_image(name, [root / year, root / "images" / year, root / "images", root])
        for number, entry in enumerate(_entries(found, "annotations", path)):
            place = f"{path.name}, annotations[{number}]"
            name = names.get(entry.get("image_id")) if isinstance(entry, dict) else None
            if name is None:
                table.report("no image name", place, "its image_id is that of no image in the file")
                continue
            table.add(name, entry.get("caption"), place)
    return table.finish()


def _rstpreid_file(source: Path) -> Path | None:
    path = source if source.is_file() else source / "data_captions.json"
    return path if path.name == "data_captions.json" and path.is_file() else None


def is_rstpreid(source: Path) -> bool:
    """A data_captions.json."""
    return _rstpreid_file(source) is not None


def read_rstpreid(source: Path) -> CaptionedImages:
    """RSTPReid: images in imgs/, and an identity each; images of one person are partners of each other's captions."""
    path = _rstpreid_file(source)
    if path is None:
        raise DataError(f"{source}: no data_captions.json there")
    table = CaptionTable(source, "rstpreid")
    for number, entry in enumerate(_entries(_load(path), None, path)):
        place = f"{path.name}, [{number}]"
        name = entry.get("img_path") if isinstance(entry, dict) else None
        if not name or "id" not in entry or not isinstance(entry.get("captions"), list):
            table.report("wrong columns", place, "an entry needs 'id', 'img_path' and 'captions'")
            continue
        table.images[name] = find_image(name, [path.parent / "imgs", path.parent])
        told = str(entry.get("split", ""))
        table.splits[name] = _KARPATHY_SPLITS.get(told, told)
        table.identities[name] = str(entry["id"])
        for caption in entry["captions"]:
            table.add(name, str(caption), place)
    return table.finish()
