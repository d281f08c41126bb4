"""A run's data set, read as it was when the run was trained on it: the same layout, splits and partners."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.fingerprint import changed, data_contents
from clipvisionalign.data.formats import LAYOUTS, STREAM, is_stream, layout_of, read_captioned_images
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.data.streams.in_memory import stream_split
from clipvisionalign.data.trained_on import other_than_trained_on


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


@dataclass(frozen=True)
class Reading:
    """How a data set is read for a run: as which layout, in one split by which column's values, by which rule."""

    layout: str
    group: str
    split_rule: int


def reading_of_run(run: str | Path, place: str | Path, layout: str = "auto", group: str = "") -> Reading:
    """How the run read the data set at `place`, unless `layout` or `group` say otherwise: its own, or the one of its
    dev split, as it was; any other in the run's layout, where that is one that lies there, by the run's rule."""
    about = about_data(run)
    recorded, rule = about.get("layout", ""), split_rule_of(run)
    is_own, is_dev = is_data_of_run(run, place), _same(str(place), dev_source(run))
    if layout == "auto" and is_dev and not is_own:
        # One setting for both; the layout of a stream is not that of another data set.
        given = str(settings_of(run).get("layout", "auto"))
        layout = "auto" if given == STREAM or given not in LAYOUTS else given
    elif layout == "auto" and recorded in LAYOUTS and (is_own or _lies_there(recorded, Path(place))):
        layout = recorded
    # A stream has no columns: its run's column is one of the data set that its dev split is of.
    is_grouped = (is_own and layout in ("auto", recorded)) or (is_dev and recorded == STREAM)
    column = about.get("group", "")
    if column and not group and not is_own and not is_dev and layout == recorded:
        is_grouped = _has_column(Path(place), layout, column)
    return Reading(layout, group or (column if is_grouped else ""), rule)


def _has_column(place: Path, layout: str, column: str) -> bool:
    """Whether a data set elsewhere, such as the run's own that was moved, can be grouped as the run's was."""
    try:
        read_captioned_images(place, layout, column)
    except DataError:
        return False
    return True


def _lies_there(layout: str, place: Path) -> bool:
    """Whether a data set elsewhere, such as the run's own that was moved, can be read in the run's layout."""
    try:
        return layout != STREAM and place.exists() and LAYOUTS[layout].recognises(place)
    except (OSError, DataError):
        return False


def read_data_of_run(
    run: str | Path, source: str | Path = "", layout: str = "auto", identity: str | None = None, split: str = ""
) -> CaptionedImages:
    """The data set that a run was trained on, or the one at `source`; of a stream only `split`, if one is given.

    It is read as `reading_of_run` says, its dev split from where the run had it, and captions belong to images as
    `identity` says, or as in the run. Raises ValueError where a run does not say what it was trained on, and DataError.
    """
    about = about_data(run)
    place = str(source or (dev_source(run) if split == "dev" else "") or about.get("source", ""))
    if not place:
        raise ValueError(f"{run}: does not say which data it was trained on; give --data")
    how = reading_of_run(run, place, layout)
    if split and is_stream(place, how.layout):
        found = stream_split(place, split)
    else:
        found = read_captioned_images(place, how.layout, how.group, how.split_rule)
    return found.with_identity(about.get("identity", "auto") if identity is None else identity)


def is_data_of_run(run: str | Path, place: str | Path) -> bool:
    """Whether a data set is the one that a run was trained on, by its place."""
    return _same(str(place), str(about_data(run).get("source", "")))


def differs_from_run(run: str | Path, data: CaptionedImages, split: str = "") -> list[str]:
    """What of a data set that was read is otherwise than the run has recorded it, a line each: its layout; and, where a
    split of it is measured, to whom captions belong and what the split holds."""
    about = about_data(run)
    if not about:
        return []
    place, home = str(data.source), str((split == "dev" and dev_source(run)) or about.get("source", ""))
    layout, is_home = about.get("layout"), _same(place, home)
    found = []
    if is_data_of_run(run, place) and layout and data.layout != layout:
        found.append(f"{place} is read as '{data.layout}'; the run was trained on it as '{layout}'")
    if not split:
        return found
    if not is_home and data.layout == layout and data.layout != (own := recognised(place)):
        found.append(f"{place} is read as '{layout}', as the run's data was; by itself it is taken for '{own}'")
    identity = about.get("identity", "auto")
    if data.identity != identity:
        found.append(f"captions belong to images by '{data.identity}'; in the run's training by '{identity}'")
    before = about.get("as_read", {}).get(split)
    differing: list[str] = []
    if before and any(row.split == split for row in data.rows):
        part = data.with_identity(identity).split(split)
        differing = changed(before, data_contents(part, split != "train"))
        other = other_than_trained_on(Path(run), part.rows) if split == "train" and "pictures" not in differing else ""
        differing += [other] if other else []
    what = f": {split} has other {', '.join(differing)}" if differing else ""
    if differing and is_home:
        found.append(f"{place} is no longer what it was in training{what}")
    elif not is_home and (differing or not before):
        found.append(f"{place} is not the run's own data set, {home}{what}")
    return found


def recognised(place: str) -> str:
    """The layout that a data set is taken for, "" where it is none."""
    try:
        return layout_of(place).name
    except DataError:
        return ""


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
