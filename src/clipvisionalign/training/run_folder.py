"""The folder of a run: lock, recorded settings, and clean-up after a refused or repeated call."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from clipvisionalign.data.training_images import TRAINED_ON_FILE
from clipvisionalign.files import PARTIAL_SUFFIX, atomic_write, remove, remove_empty
from clipvisionalign.json_io import write_json
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.device import library_versions, machine_info
from clipvisionalign.models.run_files import MODEL_FOLDERS, WEIGHTS_FILE
from clipvisionalign.retrieval.evaluate import RANKS_FILE
from clipvisionalign.training.best_epoch import HALF_MODELS, save_chosen_models
from clipvisionalign.training.checkpoint import CHECKPOINT_FOLDER as CHECKPOINTS
from clipvisionalign.training.config import FreezingConfig, RunConfig
from clipvisionalign.training.data import TrainingData
from clipvisionalign.training.distillation import START_VECTORS
from clipvisionalign.training.fine_tuning import merge_lora
from clipvisionalign.training.init_run import INIT_FILE, InitRun
from clipvisionalign.training.recorded import record_settings
from clipvisionalign.training.reduced_width import ReducedWidth
from clipvisionalign.training.stages import STAGES_FOLDER
from clipvisionalign.training.state import TrainProgress

logger = logging.getLogger(__name__)

#: The folder of the trackers' records in a run folder.
TRACKER_FOLDER = "records"
#: All that a run writes in its folder beside its settings: a folder with other settings may have other things too.
RUN_FILES = {
    "data.json",
    "environment.json",
    "weights.json",
    "metrics.jsonl",
    "results.json",
    RANKS_FILE,
    WEIGHTS_FILE,
    *MODEL_FOLDERS,
    HALF_MODELS,
    CHECKPOINTS,
    TRACKER_FOLDER,
    TRAINED_ON_FILE,
    INIT_FILE,
    STAGES_FOLDER,
    START_VECTORS,
}
#: The settings of a run that has not yet come to its first step, and the directory in which it was begun.
BEGUN_FILE = "begun.yaml"
#: Held by the process that trains.
LOCK_FILE = "lock"


def remove_unfinished_files(out: Path) -> None:
    """Remove what a run folder holds until the run is finished: a finished one is not resumed.

    Args:
        out: The run folder.

    Raises:
        OSError: Something cannot be removed.
    """
    for name in (CHECKPOINTS, HALF_MODELS, START_VECTORS, LOCK_FILE):
        remove(out / name)


def start_directory(out: Path) -> Path:
    """The directory in which a run was begun.

    Args:
        out: The run folder.

    Returns:
        The directory; the current one, where it was not recorded or is no longer there.
    """
    try:
        directory = json.loads((out / "environment.json").read_text()).get("directory")
    except (OSError, ValueError):
        # Cut off in the very first moment of a run.
        directory = None
    return Path(directory) if directory and Path(directory).is_dir() else Path.cwd()


def resolve_paths(config: RunConfig, directory: Path) -> RunConfig:
    """Find what settings name by a relative path.

    Args:
        config: The settings.
        directory: Where the paths start.

    Returns:
        The same settings, with each relative path of something that is there as a path from `directory`.
    """
    if directory == Path.cwd():
        return config

    def resolve(name: str) -> str:
        if name in ("", "auto", "random", "off"):
            return name
        # A pattern of shards is no file: its folder is there.
        path = directory / name
        folder = next((parent for parent in [path, *path.parents] if "{" not in str(parent)), path)
        return name if Path(name).is_absolute() or not folder.exists() else str(path)

    image, text = config.model.image_tower, config.model.text_tower
    cache = config.cache if config.cache in ("auto", "off") else str(directory / config.cache)
    model = replace(
        config.model,
        image_tower=replace(image, weights=resolve(image.weights)),
        text_tower=replace(
            text,
            name=resolve(text.name) if (directory / text.name / "config.json").is_file() else text.name,
            weights=resolve(text.weights),
        ),
    )
    data, dev_data, init = resolve(config.data), resolve(config.dev_data), resolve(config.init)
    return replace(config, data=data, dev_data=dev_data, init=init, cache=cache, model=model)


def check_output(config: RunConfig) -> None:
    """Check that a run may be written into its folder.

    Args:
        config: The settings of the run.

    Raises:
        FileExistsError: The folder holds a run that is not to be replaced, or something that is no run.
        ValueError: The run needs something of the folder that it is to replace.
    """
    out = Path(config.out)
    # What a process left that was killed before the first step of a run.
    leftovers = {BEGUN_FILE, f"{BEGUN_FILE}{PARTIAL_SUFFIX}", f"config.yaml{PARTIAL_SUFFIX}", LOCK_FILE}
    if not out.exists() or (out.is_dir() and not {path.name for path in out.iterdir()} - leftovers):
        return
    if not config.overwrite:
        raise FileExistsError(f"{out}: is there already; give another --out, or --overwrite true to replace it")
    # A run whose last stage has not begun has no config.yaml yet.
    has_stages = (out / BEGUN_FILE).is_file() and (out / STAGES_FOLDER).is_dir()
    if not (out / "config.yaml").is_file() and not has_stages:
        raise FileExistsError(f"{out}: holds something that is no run, which --overwrite does not replace")
    _check_sources_outside_output(config, out)


def prepare_folder(config: RunConfig, restart: bool, exit_stack: ExitStack) -> None:
    """Make the run folder.

    A run that is there already is refused, or stays until `write_run_files` takes its place; a call that is refused
    later, but before that, leaves what was there.

    Args:
        config: The settings of the run.
        restart: Whether a run is begun once more in its folder, which then stays as it is.
        exit_stack: Given what undoes this where the call is refused.

    Raises:
        FileExistsError: The folder holds a run that is not to be replaced, or something that is no run.
        ValueError: The run needs something of the folder that it is to replace.
        OSError: The folder cannot be made.
    """
    out = Path(config.out)
    if restart:
        return
    check_output(config)
    begun_settings = (out / BEGUN_FILE).read_bytes() if (out / BEGUN_FILE).is_file() else None
    created = [folder for folder in (out, *out.parents) if not folder.exists()]
    exit_stack.push(partial(_undo_on_error, out, created, begun_settings))
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.yaml").is_file():
        _write_settings(out / BEGUN_FILE, config)


def _undo_on_error(out: Path, created: list[Path], begun_settings: bytes | None, kind: Any, *_: Any) -> bool:
    """begun_settings: what begun.yaml held; created: folders that this call has made.

    kind: of the error, None for none.
    """
    refused = kind is not None and issubclass(kind, (ValueError, OSError, ModuleNotFoundError))
    if refused and out.is_dir() and not (out / "config.yaml").is_file():
        if begun_settings is None:
            remove(out / BEGUN_FILE)
        else:
            (out / BEGUN_FILE).write_bytes(begun_settings)
        remove_empty(created)
    return False


def _check_sources_outside_output(config: RunConfig, out: Path) -> None:
    """Raises ValueError where a run needs something of the folder that it is to replace."""
    image, text = config.model.image_tower, config.model.text_tower
    sources = {
        "init": config.init, "data": config.data, "dev_data": config.dev_data, "cache": config.cache,
        "model.image_tower.weights": image.weights, "model.text_tower.name": text.name,
        "model.text_tower.weights": text.weights,
    }  # fmt: skip
    for name, source in sources.items():
        # A pattern of shards is no file: the folder that they are in is there.
        parts = list(takewhile(lambda part: not set(part) & set("*?[{"), Path(source).parts)) if source else []
        path = Path(*parts)
        if parts and path.exists() and path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--{name} {source} lies in --out {out}, which --overwrite true would remove")


def _clear_run_folder(out: Path, only: Collection[str] = (), kept: Collection[str] = ()) -> None:
    """Remove what a run folder holds but its settings: cut off in the middle, this can be repeated.

    only: what has one of these names, or was to have. kept: names of what stays as well.
    """
    for path in out.iterdir():
        is_run_file = not only or path.name.removesuffix(PARTIAL_SUFFIX) in only
        if path.name not in ("config.yaml", BEGUN_FILE, LOCK_FILE, *kept) and is_run_file:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _write_settings(path: Path, config: RunConfig) -> None:
    import yaml

    # Whoever repeats a run from its settings has not been asked whether to replace another one.
    settings = record_settings(replace(config, overwrite=False))
    if path.name == BEGUN_FILE:
        settings = {"directory": str(Path.cwd()), "settings": settings}
    with atomic_write(path) as aside:
        aside.write_text(yaml.safe_dump(settings, sort_keys=False))


def write_begun(config: RunConfig) -> None:
    """Write the settings of a run that has not come to its first step, by which it is begun again.

    Args:
        config: The settings.

    Raises:
        OSError: They cannot be written.
    """
    _write_settings(Path(config.out) / BEGUN_FILE, config)


def write_run_files(
    out: Path, config: RunConfig, data: TrainingData, aligner: Aligner, restart: bool,
    reduced_width: ReducedWidth | None = None,
) -> None:  # fmt: skip
    """Write the settings and the description of the data into the run folder.

    Args:
        out: The run folder, which `prepare_folder` has made.
        config: The settings of the run.
        data: What it is trained on, as data.json describes it.
        aligner: The model as it starts, whose towers know where their weights are from.
        restart: Whether the run is begun once more in its folder.
        reduced_width: How the common space was made narrower; None where it was not.

    Raises:
        OSError: Something cannot be written.
    """
    # Only now: what could be refused has been by then. Killed from here on, the run is the new one.
    if config.overwrite and not restart:
        _write_settings(out / BEGUN_FILE, config)
    if restart or config.overwrite:
        # The last stage begins in the folder that holds the others.
        kept = (STAGES_FOLDER,) if restart and config.stages else ()
        _clear_run_folder(out, () if (out / BEGUN_FILE).is_file() else RUN_FILES, kept)
    _write_settings(out / "config.yaml", config)
    write_json(out / "data.json", data.to_dict())
    environment = {"versions": library_versions(), "machine": machine_info(), "directory": str(Path.cwd())}
    write_json(out / "environment.json", environment)
    origins = {"image_tower": aligner.image_tower.origin, "text_tower": aligner.text_tower.origin}
    weights: dict[str, Any] = {tower: origin.to_dict() for tower, origin in origins.items()}
    # A model's own width is in no setting.
    weights["common_space"] = {"width": aligner.width} if reduced_width is None else reduced_width.to_dict()
    write_json(out / "weights.json", weights)
    if config.init:
        init_run = InitRun.of(out, config.init, Path(config.init), data.dev)
        init_run.save(out)
        if init_run.trained_on:
            logger.warning(f"{init_run.trained_on}")
    remove(out / BEGUN_FILE)


def write_results(out: Path, results: dict[str, Any]) -> None:
    """Write results.json, atomically, and remove what only an unfinished run needs.

    Args:
        out: The run folder.
        results: What the file holds.

    Raises:
        OSError: It cannot be written.
    """
    # A run either has its results or has not.
    with atomic_write(out / "results.json") as aside:
        aside.write_text(json.dumps(results, indent=2) + "\n")
    remove_unfinished_files(out)


def save_models(config: FreezingConfig, out: Path, model: Aligner, progress: TrainProgress, previous_best: int) -> None:
    """Save the model of this epoch where dev has chosen it; what only a half chose and cannot be written is reported.

    Args:
        config: Whether the model has LoRA, which is merged before it is saved.
        out: The run folder.
        model: The model, with the weights of this epoch.
        progress: Which epoch this is, and what was chosen.
        previous_best: The best epoch before this one.

    Raises:
        OSError: The run's own model cannot be written.
    """

    def save(folder: Path) -> None:
        (merge_lora(model) if config.peft == "lora" else model).save(folder)

    try:
        save_chosen_models(out, save, progress.epoch, previous_best, progress.chosen)
    except OSError as error:
        if progress.best_epoch == progress.epoch:
            # What a half chose can be done without, the run's own model cannot.
            save(out)
        logger.warning(f"a half of dev chose another epoch than all of dev, and its model was not kept: {error}")
