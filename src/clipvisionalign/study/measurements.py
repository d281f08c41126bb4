"""Kept measurements of a trial, and whether they are current."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from clipvisionalign.data.foils import MinimalPair
from clipvisionalign.data.hashes import changed_keys, dataset_hashes, hash_file, hash_parts, run_hash
from clipvisionalign.log import Log
from clipvisionalign.retrieval.evaluate import RANKS_FILE, load_ranks
from clipvisionalign.retrieval.ranks import PositiveRanks
from clipvisionalign.study.config import Trial
from clipvisionalign.study.data import StudyContext
from clipvisionalign.study.documents import TrialMeasurements

#: What a cell's folder holds beside the run, once it is measured.
MEASUREMENTS_FILE = "measured.json"


def measurement_inputs(trial: Trial, context: StudyContext) -> dict[str, Any]:
    """What the measurements of a trial are made from, by content; kept beside them, to compare before they are reused.

    Args:
        trial: A trained trial.
        context: The data, minimal pairs and settings that it is measured with.

    Returns:
        Hashes and settings by name.
    """
    return {
        "model": run_hash(trial.folder),
        **dataset_hashes(context.eval_data),
        "minimal pairs": {name: _pairs_hash(pairs) for name, pairs in context.pairs.items()},
        "overlap of splits": context.overlap,
        "split": context.plan.split,
        "audit": context.plan.measure.audit_images,
    }


def _pairs_hash(pairs: Sequence[MinimalPair]) -> str:
    images = (hash_parts([p.image]) if isinstance(p.image, bytes) else hash_file(p.image) for p in pairs)
    return hash_parts(
        item for p, image in zip(pairs, images, strict=True) for item in (image, p.caption, p.foil, p.kind)
    )


def read_if_current(path: Path, inputs: dict[str, Any], on_stale: Log, label: str) -> Any:
    """The content of a file of measurements if it was made from these inputs, else None.

    Args:
        path: A JSON file with its inputs under "asked".
        inputs: What it would be made from now.
        on_stale: Receives one line with the reason where a file is not current.
        label: What was measured; the beginning of that line.

    Returns:
        The content, or None.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        previous_inputs = content.get("asked")
    except (OSError, ValueError, AttributeError):
        on_stale(f"{label}: measured again: {path} cannot be read")
        return None
    changed_inputs = changed_keys(previous_inputs, inputs)
    if not changed_inputs:
        return content
    if not isinstance(previous_inputs, dict) or not set(inputs) <= set(previous_inputs):
        on_stale(f"{label}: measured again: an earlier version kept the figures, and not what they were made from")
    else:
        on_stale(f"{label}: measured again: not the same as before: {', '.join(changed_inputs)}")
    return None


def load_measurements(trial: Trial, inputs: dict[str, Any], on_stale: Log) -> TrialMeasurements | None:
    """The kept measurements of a trial, None if they are not current; the reason is passed to `on_stale`.

    Args:
        trial: A trained trial.
        inputs: What `measurement_inputs` returns for it.
        on_stale: Receives one line with the reason.

    Returns:
        The measurements, or None.
    """
    measurements = read_if_current(trial.folder / MEASUREMENTS_FILE, inputs, on_stale, trial.folder.name)
    if measurements is None:
        return None
    ranks = ranks_file(trial.folder, inputs["split"])
    if not has_ranks(ranks):
        on_stale(f"{trial.folder.name}: measured again: {ranks} cannot be read")
        return None
    return measurements


def has_ranks(ranks: Path) -> bool:
    """Whether a file of ranks is there and can be read.

    Args:
        ranks: The file.

    Returns:
        Whether it is.
    """
    try:
        return "ranks" in load_ranks(ranks)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return False


def study_ranks_file(folder: Path, split: str) -> Path:
    """Where the ranks are that a study measured itself.

    Args:
        folder: A trial's folder.
        split: The split that was measured.

    Returns:
        The file, which need not exist.
    """
    return folder / f"ranks-{split}.npz"


def ranks_file(folder: Path, split: str) -> Path:
    """Where the ranks of a split are kept: the study's own, or those of dev that the training kept.

    Args:
        folder: A trial's folder.
        split: The split that was measured.

    Returns:
        The file, which need not exist.
    """
    study_file = study_ranks_file(folder, split)
    return study_file if study_file.is_file() or split != "dev" else folder / RANKS_FILE


def load_trial_ranks(trial: Trial, split: str) -> dict[str, PositiveRanks]:
    """The ranks of a measured cell: "ranks", and "dual" for one that re-ranks.

    Args:
        trial: A measured trial.
        split: The split that was measured.

    Returns:
        Ranks by these names.
    """
    return load_ranks(ranks_file(trial.folder, split))


def why_not_kept(said: Sequence[str]) -> str:
    """Why kept measurements are not taken, from the lines that `read_if_current` passes to `on_stale`; "" for none.

    Args:
        said: The lines.

    Returns:
        The reason.
    """
    return said[0].rpartition("measured again: ")[2] if said else ""
