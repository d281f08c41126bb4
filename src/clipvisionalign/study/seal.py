"""A study whose plan is sealed before its first training, and whose split is opened once.

The seal (`seal.json`) holds hashes of the plan and of the data set, and when it was made; each measurement on the
sealed split is a line of `looks.jsonl` (`clipvisionalign.data.sealed_split`). Both protect from accidents and from
forgetting, not from somebody who writes other files: a reader who was given the plan's hash before can compare it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.hashes import dataset_hashes
from clipvisionalign.data.sealed_split import (
    BY_STUDY,
    SEAL_FILE,
    further_looks,
    image_hashes,
    now,
    read_looks,
    read_seal,
    record_look,
)
from clipvisionalign.json_io import write_json
from clipvisionalign.models.device import library_versions
from clipvisionalign.study.config import Plan, Trial
from clipvisionalign.study.gaps import NOT_TRAINED, UNFINISHED, Gaps, is_begun

logger = logging.getLogger(__name__)

SEAL_FORMAT = 1
#: The split that a plan is sealed for: dev is looked at in each epoch.
SEALED_SPLIT = "test"


def plan_hash(plan: Plan) -> str:
    """Hash all that a plan asks for but where and in which layout its data are, whose content is hashed itself.

    Args:
        plan: The plan as it is carried out.

    Returns:
        SHA-256 in 64 hex digits.

    >>> from dataclasses import replace
    >>> plan = Plan(data="here", seeds=[0, 1])
    >>> plan_hash(plan) == plan_hash(replace(plan, data="there"))
    True
    >>> plan_hash(plan) == plan_hash(replace(plan, seeds=[0]))
    False
    """
    # Without what is as by default: a later version may have more of that.
    content = _without_defaults(plan.to_dict(), asdict(Plan()))
    content |= {"data": bool(plan.data), "layout": ""}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_defaults(value, defaults[name])
        if isinstance(value, dict) and isinstance(defaults.get(name), dict) and name not in ("variants", "settings")
        else value
        for name, value in values.items()
        if name not in defaults or value != defaults[name]
    }


def check_sealed_split(plan: Plan) -> None:
    """Check that a plan measures a split that can be sealed.

    Args:
        plan: The plan.

    Raises:
        ValueError: It measures another one, or looks at it after each seed.
    """
    if plan.split != SEALED_SPLIT:
        raise ValueError(f"--sealed: the split '{plan.split}' is looked at in each training; seal '{SEALED_SPLIT}'")
    if plan.until.width:
        raise ValueError("--sealed: opens the test split once, and --until looks at it after each seed; leave one out")


def seal_study(plan: Plan, study: Path, data: CaptionedImages, trials: Sequence[Trial], seal: bool) -> bool:
    """Seal a study that is to be sealed, and check one that is.

    Args:
        plan: The plan as it is carried out.
        study: The study's folder.
        data: The checked data set.
        trials: All trials.
        seal: Whether a study without a seal gets one.

    Returns:
        Whether the study is sealed.

    Raises:
        DataError: The data set is another one than the one that was sealed.
        ValueError: The plan is another one, has the wrong split, or has been begun without a seal.
    """
    if (study / SEAL_FILE).is_file():
        _check_seal(plan, study, data)
        return True
    if not seal:
        return False
    check_sealed_split(plan)
    begun = [trial.folder.name for trial in trials if is_begun(trial)]
    if begun:
        raise ValueError(
            f"{study}: has trainings already ({', '.join(begun[:3])}{' ...' if len(begun) > 3 else ''}): a plan is "
            "sealed before its first; give another --out"
        )
    images = image_hashes(data.split(plan.split))
    _refuse_sealed_dev(plan, set(images))
    digest = plan_hash(plan)
    content = {
        "format": SEAL_FORMAT,
        "at": now(),
        "plan": digest,
        "split": plan.split,
        "data": dataset_hashes(data),
        "images": sorted(images),
        "versions": library_versions(),
    }
    study.mkdir(parents=True, exist_ok=True)
    write_json(study / SEAL_FILE, content)
    logger.info(f"{study}: the plan is sealed, and its {plan.split} split; to prove it later, publish now: {digest}")
    return True


def _refuse_sealed_dev(plan: Plan, sealed: set[str]) -> None:
    """Raises DataError where epochs would be chosen on images that are sealed."""
    elsewhere = plan.settings.get("dev_data")
    if not elsewhere:
        return
    dev = read_captioned_images(elsewhere, plan.layout).split("dev")
    if shared := sealed & set(image_hashes(dev)):
        raise DataError(f"{elsewhere}: epochs would be chosen on {len(shared)} of the images that are to be sealed")


def _check_seal(plan: Plan, study: Path, data: CaptionedImages) -> None:
    """Raises where plan or data are not those of the seal, or its looks were changed."""
    sealed = read_seal(study)
    read_looks(study)
    if sealed["plan"] != plan_hash(plan):
        raise ValueError(
            f"{study}: its plan was sealed at {sealed['at']}, and this one is another (split, seeds, variants or "
            f"settings); give '{study}/plan.yaml', or another --out"
        )
    if sealed["data"] != dataset_hashes(data):
        raise DataError(f"{data.source}: other images or captions than were sealed at {sealed['at']}; put them back")


def refuse_to_open(study: Path, trials: Sequence[Trial], gaps: Gaps) -> None:
    """Keep the sealed split closed while trainings are to be done.

    Args:
        study: The study's folder.
        trials: All trials.
        gaps: What became of those that are not trained; what failed will not be trained, and opens it.

    Raises:
        ValueError: A training is not finished.
    """
    unfinished = [
        trial.folder.name
        for trial in trials
        if gaps.states.get((trial.variant, trial.seed), ("",))[0] in (UNFINISHED, NOT_TRAINED)
    ]
    if unfinished:
        named = ", ".join(unfinished[:5]) + (" ..." if len(unfinished) > 5 else "")
        raise ValueError(f"{study}: the sealed split stays closed until all is trained: {named}; repeat the command")


def record_measurement(study: Path, run: str, model: str) -> None:
    """Write down, in a sealed study, that a trial is measured, before it is.

    Args:
        study: The study's folder.
        run: Name of the trial's folder.
        model: Hash of its model.

    Raises:
        ValueError: It cannot be written down.
    """
    if (study / SEAL_FILE).is_file():
        record_look(study, run, BY_STUDY, model)


def seal_block(study: Path) -> dict[str, Any] | None:
    """The block "seal" of a report.

    Args:
        study: The study's folder.

    Returns:
        When it was sealed, hash of the plan, split, looks, and those looks among them after which figures may have been
        chosen; None for a study without a seal.

    Raises:
        ValueError: The seal or its looks were changed.
    """
    if not (study / SEAL_FILE).is_file():
        return None
    sealed, looks = read_seal(study), read_looks(study)
    names = ("at", "by", "run")

    def listed(several: Sequence[Any]) -> list[dict[str, str]]:
        return [{name: asdict(entry)[name] for name in names} for entry in several]

    return {
        "at": sealed["at"],
        "plan": sealed["plan"],
        "split": sealed["split"],
        "runs": list(dict.fromkeys(entry.run for entry in looks)),
        "looks": listed(looks),
        "further": listed(further_looks(looks)),
    }


def seal_fault(study: Path, plan: Plan, data: CaptionedImages, finished: Sequence[Path]) -> str:
    """What contradicts a study's seal.

    Args:
        study: The study's folder.
        plan: Its plan.
        data: Its data set.
        finished: The run folders whose figures are reported.

    Returns:
        The fault; "" where there is none.
    """
    try:
        _check_seal(plan, study, data)
        looks = read_looks(study)
    except (ValueError, OSError) as error:
        return str(error)
    missing = sorted({folder.name for folder in finished} - {entry.run for entry in looks})
    if missing:
        return f"{', '.join(missing)}: has figures of the sealed split, and no look at it is written down"
    return ""
