"""A run's data set, read as it was when the run was trained on it: the same splits, the same partners."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.splits import SPLIT_RULE


def about_data(run: str | Path) -> dict[str, Any]:
    """What a run folder's data.json holds; nothing where there is none."""
    kept = Path(run) / "data.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    return found if isinstance(found, dict) else {}


def split_rule_of(run: str | Path) -> int:
    """The rule by which the images of a run's data set were split, where that has no splits: see `data/splits.py`."""
    about = about_data(run)
    return int(about.get("split_rule", 1)) if about else SPLIT_RULE


def read_data_of_run(
    run: str | Path, source: str | Path = "", layout: str = "auto", identity: str | None = None
) -> CaptionedImages:
    """The data set that a run was trained on, or the one at `source`.

    It is split by the rule that the run was trained with; grouped by the run's column, where it is the run's own data
    set; and captions belong to images as `identity` says, or as in the run. Raises ValueError where a run does not say
    what it was trained on, and DataError.
    """
    about = about_data(run)
    place = source or about.get("source", "")
    if not place:
        raise ValueError(f"{run}: does not say which data it was trained on; give --data")
    is_own = Path(place).resolve() == Path(about.get("source", "")).resolve()
    group = about.get("group", "") if is_own else ""
    found = read_captioned_images(place, layout, group, split_rule_of(run))
    return found.with_identity(about.get("identity", "auto") if identity is None else identity)
