"""Checks of the run in a trial's folder: it has the settings, the base and the data of the plan."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from clipvisionalign.data.hashes import hash_parts, run_hash
from clipvisionalign.data.run_data import data_record
from clipvisionalign.log import Log, log_to
from clipvisionalign.models.aligner_config import AlignerConfig
from clipvisionalign.models.text_families import DEFAULT_MAX_TOKENS
from clipvisionalign.study.config import Trial
from clipvisionalign.training.checkpoint import list_checkpoints
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.data_checks import check_data_unchanged
from clipvisionalign.training.init_run import InitRun
from clipvisionalign.training.recorded import read_settings
from clipvisionalign.training.run_folder import start_directory


def refuse_other_settings(trial: Trial) -> None:
    """Check that no other run stands in a trial's place.

    Args:
        trial: The trial.

    Raises:
        FileExistsError: A run with other settings, or of another base, does.
    """
    import yaml

    settings = trial.folder / "config.yaml"
    if not settings.is_file():
        return
    existing = read_settings(yaml.safe_load(settings.read_text()))
    # A run records the commits that it took its towers from, whichever its settings left open.
    towers = ("image_tower", "text_tower")
    requested = {name: getattr(trial.config.model, name) for name in towers}
    recorded = {name: getattr(existing.model, name) for name in towers}
    same = {
        name: replace(recorded[name], revision=requested[name].revision)
        for name in towers
        if not requested[name].revision or not recorded[name].revision
    }
    pretrained = trial.config.model.pretrained
    if pretrained and _is_same_pretrained(pretrained, existing.model.pretrained):
        existing = replace(existing, model=replace(existing.model, pretrained=pretrained))
    existing = replace(existing, model=replace(existing.model, **same))
    # One that left its layout open has recorded which one it was.
    if "auto" in (layouts := {existing.layout, trial.config.layout}) and layouts <= {
        "auto",
        recorded_layout(trial.folder),
    }:
        existing = replace(existing, layout=trial.config.layout)
    if _with_resolved_paths(existing, start_directory(trial.folder)) != _with_resolved_paths(trial.config, Path.cwd()):
        raise FileExistsError(f"{trial.folder}: a run with other settings is there; give another --out, or remove it")
    if trial.config.init and (Path(trial.config.init) / "results.json").is_file():
        # One that is yet to be trained is looked at when it is.
        refuse_other_base(trial)


def _is_same_pretrained(requested: str, recorded: str) -> bool:
    """Whether a plan's pretrained model is the one that a run has recorded: a folder by its absolute path, a hub name
    by its commit, where the plan left that open or named a branch or tag (`tower_commits` pins those)."""
    if Path(requested).is_dir():
        return str(Path(requested).resolve()) == str(Path(recorded).resolve())
    name, _, revision = requested.partition("@")
    return name == recorded.partition("@")[0] and (not re.fullmatch("[0-9a-f]{40}", revision) or requested == recorded)


def _with_resolved_paths(config: RunConfig, directory: Path) -> RunConfig:
    """A cell's settings with resolved paths, independent of how the study, or the data, was named: what is within the
    study by its place there. directory: that paths are relative to."""
    study = (directory / config.out).resolve().parent.parent

    def resolve(name: str) -> str:
        if name in ("", "auto", "off"):
            return name
        path = (directory / name).resolve()
        return f"STUDY/{path.relative_to(study)}" if path.is_relative_to(study) else str(path)

    def resolve_if_exists(name: str) -> str:
        # It may be a name of the hub's, or a word.
        return resolve(name) if name and (directory / name).exists() else name

    model = config.model.resolved()
    image, text = model.image_tower, model.text_tower
    model = replace(
        model,
        image_tower=replace(image, weights=resolve_if_exists(image.weights)),
        text_tower=replace(text, name=resolve_if_exists(text.name), weights=resolve_if_exists(text.weights)),
    )
    paths: dict[str, Any] = {
        name: resolve(getattr(config, name)) for name in ("data", "dev_data", "out", "init", "cache")
    }
    return replace(config, model=model, **paths)


def settings_hash(trial: Trial) -> str:
    """What the runs of a variant have in common, whatever the study is named by.

    Args:
        trial: The trial.

    Returns:
        A hash of all settings but seed, folders and the number of steps.
    """
    config = replace(_with_resolved_paths(trial.config, Path.cwd()), seed=0, out="", init="", steps=0, epochs=0)
    config, given = replace(config, model=_hashed_model(config.model)), _given_beside_pretrained(config.model)
    unused = {
        each.name for each in fields(config) if each.name in _ADDED and getattr(config, each.name) == each.default
    }
    names = [each.name for each in fields(config) if each.name not in unused]
    hashed = [name for name in _HASH_ORDER if name in names] + [name for name in names if name not in _HASH_ORDER]
    text = f"RunConfig({', '.join(f'{name}={getattr(config, name)!r}' for name in hashed)})"
    # A study that was begun before these settings were there has hashes without them.
    for unused_text in (_WITHOUT_PRETRAINED, _NOT_MIRRORED):
        text = text.replace(unused_text, "")
    return hash_parts([text, *given])


def _hashed_model(model: AlignerConfig) -> AlignerConfig:
    """The model as hashes have it: one that is pretrained with the width and the limit of tokens of towers by name,
    which stood there, unused, before they could be given."""
    return replace(replace(model, pretrained="").resolved(), pretrained=model.pretrained)


def _given_beside_pretrained(model: AlignerConfig) -> list[str]:
    """What is given beside a pretrained model, and had no effect there when hashes without it were recorded."""
    if not model.pretrained:
        return []
    width = [] if model.width is None else [f"width={model.width}"]
    max_tokens = model.text_tower.max_tokens
    return [*width, f"max_tokens={max_tokens}"] if max_tokens == DEFAULT_MAX_TOKENS else width


#: Settings that came later, which hashes hold where they are used.
_ADDED = ("stages", "distill", "captions", "freeze_blocks")

#: How the settings of the model that came later are written where they are not used.
_WITHOUT_PRETRAINED = ", pretrained='', positions='own'"
_NOT_MIRRORED = ", mirrored=False"


#: The order of settings in hashes that studies of version 0.1 have recorded; settings added since then follow.
_HASH_ORDER = (
    "data", "dev_data", "out", "layout", "group", "identity", "model", "init", "epochs", "steps", "train_images",
    "batch", "chunk", "text_lr", "image_lr", "head_lr", "loss", "weight_decay", "warmup", "ema", "freeze",
    "freeze_layers", "layer_decay", "peft", "lora", "augment", "views", "negatives", "fusion_weight", "patience",
    "best_by", "seed", "precision", "device", "workers", "checkpoint_minutes", "cache", "trackers", "compile", "shard",
    "profile", "overwrite",
)  # fmt: skip


def refuse_other_base(trial: Trial, on_unrecorded: Log = lambda line: None) -> None:
    """Check that a trial's run, finished or stopped, was begun from the weights of the trial that it stands on.

    Args:
        trial: The trial.
        on_unrecorded: Receives a line for a run from before this was recorded, which cannot be compared.

    Raises:
        FileExistsError: It was begun from others: that trial was trained again since.
    """
    has_run = (trial.folder / "results.json").is_file() or list_checkpoints(trial.folder)
    if not trial.config.init or not has_run:
        return
    base, init_run = Path(trial.config.init), InitRun.load(trial.folder)
    if init_run is None:
        note = f"whether {base.name} is still what it stands on was not compared"
        on_unrecorded(f"{trial.folder}: from before that was recorded: {note}")
    elif init_run.contents != run_hash(base):
        raise FileExistsError(
            f"{trial.folder}: stands on other weights than {base} has now, which was trained again since; remove "
            f"{trial.folder}, to train it again too, or give another --out"
        )


def recorded_layout(run: Path) -> str:
    """The layout that a run's data set was read in.

    Args:
        run: The run folder.

    Returns:
        Its name; "" where that is not recorded.
    """
    try:
        return str(data_record(run).get("layout", ""))
    except ValueError:
        return ""


def refuse_changed_data(cells: Sequence[Trial]) -> None:
    """Check that finished trials were trained on the data that is there now: figures of both would stand beside each
    other.

    Of those that recorded the same, one is compared; what cannot be compared is reported when its turn comes
    (`train_trial`).

    Args:
        cells: All trials.

    Raises:
        DataError: Some were trained on other data.
    """
    finished: dict[str, Trial] = {}
    for cell in cells:
        if (cell.folder / "results.json").is_file():
            with suppress(ValueError):
                finished.setdefault(json.dumps(data_record(cell.folder).get("as_read")), cell)
    for cell in finished.values():
        with log_to(lambda line: None):
            check_data_unchanged(cell.folder, cell.config.dataset, splits=("train",))
