"""The trainings of a learning curve: the settings of a run with fewer captions and as many steps."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from clipvisionalign.adaptation.blended_run import BLEND_FILE
from clipvisionalign.counts import count_noun
from clipvisionalign.data.batches import steps_in_epoch
from clipvisionalign.data.run_data import data_record
from clipvisionalign.json_io import read_json
from clipvisionalign.retrieval.evaluate import RANKS_FILE
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.recorded import read_settings
from clipvisionalign.training.reduced_width import recorded_width
from clipvisionalign.training.resume import checkpoint_settings
from clipvisionalign.training.run_folder import resolve_paths, start_directory
from clipvisionalign.training.stages import parse_stages, total_epochs

#: Parts of the training images that are trained on, beside all: one of so many.
DIVISORS = (8, 4, 2)
#: The folder of the trainings in the run's own.
CURVE_FOLDER = "curve"
#: The smallest training split with a curve: an eighth of fewer is no data set.
MIN_TRAIN_IMAGES = 32


def plan_trainings(run: str | Path, folder: str | Path = "") -> list[RunConfig]:
    """The settings of the trainings with fewer captions, in ascending order of their number.

    Args:
        run: as in `learning_curve`.
        folder: as in `learning_curve`.

    Returns:
        Settings that differ from the run's in `train_images`, `epochs`, `stages`, `steps`, `patience`, `out` and
        `trackers`.

    Raises:
        FileNotFoundError: as in `learning_curve`; nothing is read but the run's small files.
        FileExistsError: likewise.
        ValueError: likewise.
    """
    run = Path(run)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a learning curve is trained by one process: start it without torchrun or accelerate launch")
    config, images = settings_of(run), training_counts(run)[0]
    if images < MIN_TRAIN_IMAGES:
        raise ValueError(
            f"{run}: trained on {count_noun(images, 'image')}: a learning curve needs {MIN_TRAIN_IMAGES} or more, of "
            f"which it takes 1/{DIVISORS[0]}"
        )
    folder = Path(folder) if str(folder) else run / CURVE_FOLDER
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is a file; the trainings of a learning curve need a folder")
    trainings = []
    for divisor in DIVISORS:
        training = replace(
            _with_as_many_steps(config, images, images // divisor), out=str(folder / f"1-{divisor}"),
            train_images=images // divisor, trackers="", overwrite=False,
        )  # fmt: skip
        _refuse_other_settings(training)
        trainings.append(training)
    return trainings


def planned_steps(config: RunConfig, images: int) -> int:
    """The steps of a run without an early end.

    Args:
        config: settings.
        images: training images.

    Returns:
        The number of steps; of a run in stages, of all of them.
    """
    steps = total_epochs(config.stages, config.epochs) * steps_in_epoch(images, config.batch)
    return min(steps, config.steps or steps)


def _with_as_many_steps(config: RunConfig, images: int, count: int) -> RunConfig:
    """The settings that take as many steps on `count` images as `config` on `images`; stages as many whole epochs as
    these steps need."""
    ratio = steps_in_epoch(images, config.batch) / steps_in_epoch(count, config.batch)
    patience = math.ceil(config.patience * ratio)
    if config.stages:
        stages = [replace(stage, epochs=math.ceil(stage.epochs * ratio)) for stage in parse_stages(config.stages)]
        return replace(config, stages=",".join(map(str, stages)), patience=patience)
    steps = planned_steps(config, images)
    return replace(config, epochs=-(-steps // steps_in_epoch(count, config.batch)), steps=steps, patience=patience)


def settings_of(run: Path) -> RunConfig:
    """The settings of a finished run, whose relative paths lead where they led when it was begun.

    Args:
        run: the run folder.

    Returns:
        The settings.

    Raises:
        FileNotFoundError: it is no run folder, or the run is not finished.
        ValueError: a blended run, one of no epochs, or one whose narrower width was found in its training images.
    """
    import yaml

    if not (run / "config.yaml").is_file() or not (run / "data.json").is_file():
        raise FileNotFoundError(f"{run}: no run folder: a learning curve repeats a training, by its config.yaml")
    if not (run / "results.json").is_file() or not (run / RANKS_FILE).is_file():
        raise FileNotFoundError(
            f"{run}: not finished, so that there is nothing to extrapolate from; finish it with: "
            f"clipvisionalign train --resume {run}"
        )
    _refuse_blend(run)
    config = read_settings(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    if not config.epochs:
        raise ValueError(f"{run}: a model as it is (--epochs 0) was trained on no captions and has no learning curve")
    _refuse_found_width(run, config)
    return resolve_paths(config, start_directory(run))


def _refuse_blend(run: Path) -> None:
    """Raises ValueError for a blended run: its settings train the run that it was made of, not the blend."""
    blend = read_json(run / "results.json").get("blend")
    if blend or (run / BLEND_FILE).is_file():
        tuned = (blend or {}).get("run") or "the run that it was made of"
        raise ValueError(
            f"{run}: a blended run, which is not what its settings train; give the run that it was made of: "
            f"clipvisionalign curve {tuned}"
        )


def _refuse_found_width(run: Path, config: RunConfig) -> None:
    """Raises ValueError where the start itself is of the training images: a width found in them, not in another run."""
    width = None if config.init else recorded_width(run)
    if width is not None:
        raise ValueError(
            f"{run}: its {width.width} of {width.own} dimensions were found in its own training images, so that "
            "trainings on fewer would start from other weights; train its start alone (the same settings with "
            "--epochs 0 and another --out), then the run from that with --init: such a run has a learning curve"
        )


def training_counts(run: Path) -> tuple[int, int]:
    """Training images and captions of a run.

    Args:
        run: the run folder.

    Returns:
        Number of images and of captions.

    Raises:
        ValueError: they are a stream's.
    """
    split = data_record(run).get("train") or {}
    if "captions" not in split:
        raise ValueError(
            f"{run}: trained on a stream, of which no part can be picked (train_images); train on the data set in "
            "memory for a learning curve"
        )
    return int(split["images"]), int(split["captions"])


def _refuse_other_settings(config: RunConfig) -> None:
    """Raises FileExistsError where another training is in the folder of this one."""
    import yaml

    path = Path(config.out) / "config.yaml"
    if not path.is_file():
        return
    there = read_settings(yaml.safe_load(path.read_text(encoding="utf-8")))
    names = ("epochs", "steps", "patience")
    recorded, planned = (
        checkpoint_settings(each) | {name: getattr(each, name) for name in names} for each in (there, config)
    )
    differing = sorted(name for name in planned if recorded.get(name) != planned[name])
    if differing:
        raise FileExistsError(
            f"{config.out}: a training with another {', '.join(differing)} is there; remove {config.out}, or give "
            "another folder"
        )
