"""The folder of a run: its lock, its settings as written, and what a refused or repeated call leaves of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from clipvisionalign.data.trained_on import TRAINED_ON
from clipvisionalign.files import PART, remove, remove_empty, written_aside
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.device import machine, versions
from clipvisionalign.models.run_files import IMAGE_FOLDER, TEXT_FOLDER, WEIGHTS_FILE
from clipvisionalign.retrieval.evaluate import RANKS
from clipvisionalign.training.checkpoint import FOLDER as CHECKPOINTS
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.cross_fit import HALF_MODELS, keep_models
from clipvisionalign.training.fine_tuning import merged
from clipvisionalign.training.init_run import INIT_FILE, InitRun
from clipvisionalign.training.records import Say
from clipvisionalign.training.state import Place
from clipvisionalign.training.training_data import TrainingData

#: The folder of the trackers' records in a run folder.
TRACKED = "records"
#: All that a run writes in its folder beside its settings: a folder with other settings may have other things too.
WRITTEN = {
    "data.json", "environment.json", "weights.json", "metrics.jsonl", "results.json", RANKS, WEIGHTS_FILE, TEXT_FOLDER,
    IMAGE_FOLDER, HALF_MODELS, CHECKPOINTS, TRACKED, TRAINED_ON, INIT_FILE,
}  # fmt: skip
#: The settings of a run that has not yet come to its first step, and the directory in which it was begun.
BEGUN = "begun.yaml"
#: Held by the process that trains.
LOCK = "lock"


def remove_unfinished(out: Path) -> None:
    """Remove what a run folder holds until the run is finished: a finished one goes on nowhere."""
    for name in (CHECKPOINTS, HALF_MODELS, LOCK):
        remove(out / name)


def begun_in(out: Path) -> Path:
    """The directory in which a run was begun; the current one, where that was not recorded."""
    try:
        told = json.loads((out / "environment.json").read_text()).get("directory")
    except (OSError, ValueError):
        # Cut off in the very first moment of a run.
        told = None
    return Path(told) if told and Path(told).is_dir() else Path.cwd()


def in_directory(config: RunConfig, directory: Path) -> RunConfig:
    """The same settings, with what they name by a relative path as it was found from `directory`."""
    if directory == Path.cwd():
        return config

    def found(name: str) -> str:
        if name in ("", "auto", "random", "off"):
            return name
        # A pattern of shards is no file: its folder is there.
        there = directory / name
        folder = next((parent for parent in [there, *there.parents] if "{" not in str(parent)), there)
        return name if Path(name).is_absolute() or not folder.exists() else str(there)

    image, text = config.model.image_tower, config.model.text_tower
    cache = config.cache if config.cache in ("auto", "off") else str(directory / config.cache)
    model = replace(
        config.model,
        image_tower=replace(image, weights=found(image.weights)),
        text_tower=replace(
            text,
            name=found(text.name) if (directory / text.name / "config.json").is_file() else text.name,
            weights=found(text.weights),
        ),
    )
    data, dev_data, init = found(config.data), found(config.dev_data), found(config.init)
    return replace(config, data=data, dev_data=dev_data, init=init, cache=cache, model=model)


def _prepare_folder(config: RunConfig, again: bool, until_it_ends: ExitStack) -> None:
    """Make the run folder. A run that is there already is refused, or stays until `_write_records` takes its place; a
    call that is refused later, but before that, leaves what was there."""
    out = Path(config.out)
    if again:
        return
    # What a process left that was killed before the first step of a run.
    left = {BEGUN, f"{BEGUN}{PART}", f"config.yaml{PART}", LOCK}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - left):
        if not config.overwrite:
            raise FileExistsError(f"{out}: is there already; give another --out, or --overwrite true to replace it")
        if not (out / "config.yaml").is_file():
            raise FileExistsError(f"{out}: holds something that is no run, which --overwrite does not replace")
        _refuse_own_source(config, out)
    before = (out / BEGUN).read_bytes() if (out / BEGUN).is_file() else None
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    until_it_ends.push(partial(_undo_if_refused, out, made, before))
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.yaml").is_file():
        _write_settings(out / BEGUN, config)


def _undo_if_refused(out: Path, made: list[Path], before: bytes | None, kind: Any, *_: Any) -> bool:
    """before: what begun.yaml held; made: folders that this call has made. kind: of the error, None for none."""
    refused = kind is not None and issubclass(kind, (ValueError, OSError))
    if refused and out.is_dir() and not (out / "config.yaml").is_file():
        if before is None:
            remove(out / BEGUN)
        else:
            (out / BEGUN).write_bytes(before)
        remove_empty(made)
    return False


def _refuse_own_source(config: RunConfig, out: Path) -> None:
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
        there = Path(*parts)
        if parts and there.exists() and there.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--{name} {source} lies in --out {out}, which --overwrite true would remove")


def _remove_former(out: Path, only: Collection[str] = ()) -> None:
    """Remove what a run folder holds but its settings: cut off in the middle, this can be repeated. only: what has one
    of these names, or was to have."""
    for path in out.iterdir():
        known = not only or path.name.removesuffix(PART) in only
        if path.name not in ("config.yaml", BEGUN, LOCK) and known:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _write_settings(path: Path, config: RunConfig) -> None:
    import yaml

    # Whoever repeats a run from its settings has not been asked whether to replace another one.
    settings: dict[str, Any] = asdict(replace(config, overwrite=False))
    if path.name == BEGUN:
        settings = {"directory": str(Path.cwd()), "settings": settings}
    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(settings, sort_keys=False))


def _write_json(path: Path, value: Any) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def _write_records(out: Path, config: RunConfig, data: TrainingData, aligner: Aligner, again: bool, say: Say) -> None:
    # Only now: what could be refused has been by then. Killed from here on, the run is the new one.
    if config.overwrite and not again:
        _write_settings(out / BEGUN, config)
    if again or config.overwrite:
        _remove_former(out, () if (out / BEGUN).is_file() else WRITTEN)
    _write_settings(out / "config.yaml", config)
    _write_json(out / "data.json", data.about())
    environment = {"versions": versions(), "machine": machine(), "directory": str(Path.cwd())}
    _write_json(out / "environment.json", environment)
    origins = {"image_tower": aligner.image_tower.origin, "text_tower": aligner.text_tower.origin}
    weights = {tower: origin.to_dict() for tower, origin in origins.items()}
    _write_json(out / "weights.json", weights)
    if config.init:
        found = InitRun.of(out, config.init, Path(config.init), data.dev)
        found.save(out)
        if found.trained_on:
            say(f"warning: {found.trained_on}")
    remove(out / BEGUN)


def _write_results(out: Path, results: dict[str, Any]) -> None:
    # A run either has its results or has not.
    with written_aside(out / "results.json") as aside:
        aside.write_text(json.dumps(results, indent=2) + "\n")
    remove_unfinished(out)


def _keep_models(config: RunConfig, out: Path, model: Aligner, where: Place, before: int, say: Say) -> None:
    def save(folder: Path) -> None:
        (merged(model) if config.peft == "lora" else model).save(folder)

    try:
        keep_models(out, save, where.epoch, before, where.chosen)
    except OSError as error:
        if where.best_epoch == where.epoch:
            # What a half chose can be done without, the run's own model cannot.
            save(out)
        say(f"warning: a half of dev chose another epoch than all of dev, and its model was not kept: {error}")
