"""Checks that a resumed run agrees with its start: settings, and the steps of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clipvisionalign.training.config import FreezingConfig, RunConfig
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.recorded import record_settings

#: Settings that may be edited in a run's config.yaml before it is resumed: where things are, how they are computed, and
#: where the run ends. What a checkpoint holds (weights, dtypes) it has from there.
CHANGEABLE_SETTINGS = {
    "data", "dev_data", "out", "init", "cache", "model.image_tower.weights", "model.text_tower.weights",
    "device", "workers", "chunk", "compile", "shard", "checkpoint_minutes", "trackers", "profile", "overwrite",
    "epochs", "steps", "patience",
}  # fmt: skip


#: Settings that are not recorded beside a pretrained model where they were not given.
_UNASKED = ("model.width", "model.text_tower.max_tokens")


def checkpoint_settings(config: RunConfig) -> dict[str, Any]:
    """A run's settings by name, as a checkpoint keeps them and `check_same_settings` compares them.

    Args:
        config: The settings.

    Returns:
        Their values by name, with dots between the parts of a name; none of `CHANGEABLE_SETTINGS`.

    >>> from clipvisionalign.training.config import RunConfig
    >>> checkpoint_settings(RunConfig(batch=64))["batch"], "device" in checkpoint_settings(RunConfig())
    (64, False)
    """
    settings = dict.fromkeys(_UNASKED) | _flatten(record_settings(config))
    return {name: value for name, value in settings.items() if name not in CHANGEABLE_SETTINGS}


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flattened: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flattened |= _flatten(value, f"{prefix}{name}.")
        else:
            flattened[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flattened


def check_same_settings(state: dict[str, Any], config: RunConfig, out: Path) -> None:
    """Check that a run is resumed with the settings that it was begun with.

    Args:
        state: Of its checkpoint.
        config: The settings, as the run's config.yaml has them.
        out: The run folder, for the message.

    Raises:
        ValueError: A setting that may not change has another value.
    """
    # A checkpoint of a version without a setting has nothing of it.
    saved, current = state.get("settings", {}), checkpoint_settings(config)
    if "model.temperature" in saved and "model.temperature" not in current:
        # From before that: its values of them may be nobody's wish.
        current = {name: value for name, value in current.items() if name not in _UNASKED or value is not None}
    changed = [f"{name} {current[name]!r}, begun with {saved[name]!r}" for name in current.keys() & saved.keys()
               if current[name] != saved[name]]  # fmt: skip
    if changed:
        raise ValueError(
            f"{out / 'config.yaml'}: changed since the run was begun: {'; '.join(sorted(changed))}: put it back, or "
            f"train again with another --out; what may change is in docs/training.md"
        )


def check_same_cache(state: dict[str, Any], config: FreezingConfig, out: Path) -> None:
    """Check that a run that was begun with outputs of frozen towers on disk may keep them there.

    Args:
        state: Of its checkpoint.
        config: What is trained, and where outputs are kept.
        out: The run folder, for the message.

    Raises:
        ValueError: They are to be kept no longer.
    """
    if config.cache == "off" and any(state.get("kept", ())):
        raise ValueError(
            f"{out}: cache 'off', begun with a cache: without it images vary otherwise than in the views on disk, and "
            "outputs are not rounded as there, so that the run would end as another one: put back a folder or 'auto', "
            "or train again with another --out"
        )


def epoch_partition(distributed: Distributed, workers: int, steps: int) -> dict[str, int]:
    """What decides which images of an epoch's order come in which step, beside the settings.

    Args:
        distributed: The processes of the run.
        workers: Those of each process that read images.
        steps: Of the epoch.

    Returns:
        These numbers, as a checkpoint keeps them.
    """
    return {"processes": distributed.world_size, "workers": workers, "in_epoch": steps}


def check_same_partition(state: dict[str, Any], current: dict[str, int], is_stream: bool, out: Path) -> None:
    """Check that a run that was cut off within an epoch would have the rest of it.

    A table's epoch is the same for all that deal it in as many steps; of a stream each worker of each process has
    stretches of its own.

    Args:
        state: Of its checkpoint.
        current: What `epoch_partition` gives now.
        is_stream: Whether the training data is a stream.
        out: The run folder, for the message.

    Raises:
        ValueError: It would not: some images would come twice and others never.
    """
    saved = {name: state[name] for name in current if name in state}
    differs = [name for name in (("processes", "workers") if is_stream else ("in_epoch",))
               if saved.get(name, current[name]) != current[name]]  # fmt: skip
    if not differs or not state["place"]["step_in_epoch"]:
        return
    if is_stream:
        template = "a stream that {processes} processes with {workers} workers each read, each its stretches of it"
    else:
        template = "{in_epoch} steps on {processes} processes"
    descriptions = [
        template.format_map({name: each.get(name, "as many") for name in current}) for each in (saved, current)
    ]
    raise ValueError(
        f"{out}: was cut off within an epoch of {descriptions[0]}; now it would be one of {descriptions[1]}, "
        "and some images would "
        f"come twice and others never: resume it as before; at the end of an epoch this may change"
    )
