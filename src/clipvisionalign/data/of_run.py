"""A run's data set, read as it was when the run was trained on it: the same layout, splits and partners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.formats import LAYOUTS, STREAM, is_stream, read_captioned_images
from clipvisionalign.data.formats.shards import stream_split
from clipvisionalign.data.splits import SPLIT_RULE


def about_data(run: str | Path) -> dict[str, Any]:
    """What a run folder's data.json holds; nothing where there is none."""
    kept = Path(run) / "data.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    return found if isinstance(found, dict) else {}


def is_unfinished(run: str | Path) -> bool:
    """Whether a folder is that of a training run that has not come to its end; a model saved alone is of none."""
    folder = Path(run)
    return not (folder / "results.json").is_file() and "data" in settings_of(folder)


def unfinished_note(run: str | Path) -> str | None:
    """What figures of a run that is not finished have to be read with; None for one that is."""
    if not is_unfinished(run):
        return None
    pairs = (settings_of(run).get("model") or {}).get("design") in ("late", "cross")
    weights = ", with weights of its pairs' parts that are not chosen yet" if pairs else ""
    return (
        f"{run} is not finished (it has no results.json): this is its best epoch so far{weights}; to finish it: "
        f"clipvisionalign train --resume {run}"
    )


def split_rule_of(run: str | Path) -> int:
    """The rule by which the images of a run's data set were split, where that has no splits: see `data/splits.py`."""
    about = about_data(run)
    return int(about.get("split_rule", 1)) if about else SPLIT_RULE


def read_data_of_run(
    run: str | Path, source: str | Path = "", layout: str = "auto", identity: str | None = None, split: str = ""
) -> CaptionedImages:
    """The data set that a run was trained on, or the one at `source`; of a stream only `split`, if one is given.

    The run's own is read in the layout in which it was trained on it, and its dev split from where the run had it. It
    is split by the rule that the run was trained with; grouped by the run's column, where it is the run's own data set;
    and captions belong to images as `identity` says, or as in the run. Raises ValueError where a run does not say what
    it was trained on, and DataError.
    """
    about = about_data(run)
    dev = dev_source(run) if split == "dev" else ""
    place = str(source or dev or about.get("source", ""))
    if not place:
        raise ValueError(f"{run}: does not say which data it was trained on; give --data")
    is_own = _same(place, about.get("source", ""))
    if layout == "auto" and is_own and about.get("layout") in LAYOUTS:
        layout = about["layout"]
    if split and is_stream(place, layout):
        found = stream_split(place, split)
    else:
        # A stream has no columns: a column is one of the data set that its dev split is of.
        is_grouped = is_own or (place == dev and about.get("layout") == STREAM)
        group = about.get("group", "") if is_grouped else ""
        found = read_captioned_images(place, layout, group, split_rule_of(run))
    return found.with_identity(about.get("identity", "auto") if identity is None else identity)


def dev_source(run: str | Path) -> str:
    """Where a run has its dev split from, if it is another data set than it was trained on (`--dev_data`); else ""."""
    about = about_data(run)
    if "dev_source" in about:
        return str(about["dev_source"])
    # A run from before that was recorded.
    given = settings_of(run).get("dev_data") or ""
    return str(directory_of(run) / given) if given else ""


def settings_of(run: str | Path) -> dict[str, Any]:
    """A run's settings, as its config.yaml has them; nothing where there is none."""
    import yaml

    path = Path(run) / "config.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def directory_of(run: str | Path) -> Path:
    """The directory in which a run was begun, from which its relative paths lead."""
    begun = Path(run) / "environment.json"
    return Path(json.loads(begun.read_text(encoding="utf-8")).get("directory", ".") if begun.is_file() else ".")


def _same(one: str, other: str) -> bool:
    return bool(one and other) and Path(one).resolve() == Path(other).resolve()
