"""From settings to a run folder, and on with one that was stopped: `train` and `resume`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipvisionalign.models.aligner import Remembered
from clipvisionalign.settings import config_from_dict
from clipvisionalign.training.checkpoint import checkpoints_in, last_checkpoint
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.records import Say
from clipvisionalign.training.resuming import refuse_other_settings
from clipvisionalign.training.run_folder import BEGUN, begun_in, in_directory, remove_unfinished
from clipvisionalign.training.trainer import Callback, Trainer
from clipvisionalign.training.training_data import refuse_changed


def resume(run: str | Path, say: Say = print, remembered: Remembered | None = None) -> dict[str, Any]:
    """Go on with a run where its last checkpoint stands; returns what its results.json holds, finished runs at once.

    remembered: as in `train`.
    Raises FileNotFoundError where the folder is no run of this project's, DataError where its data is no longer what it
    was trained on, OSError where none of its checkpoints reads back.
    """
    import yaml

    out = Path(run)
    if (out / BEGUN).is_file():
        told = yaml.safe_load((out / BEGUN).read_text())
        directory = Path(told["directory"]) if Path(told["directory"]).is_dir() else Path.cwd()
        say(f"{out}: stopped before its first step: the run starts anew")
        settings = in_directory(config_from_dict(RunConfig, told["settings"]), directory)
        return train(replace(settings, out=str(out)), say, again=True, remembered=remembered)
    if not (out / "config.yaml").is_file():
        raise FileNotFoundError(f"--resume {out}: not a run folder: it has no config.yaml")
    settings = config_from_dict(RunConfig, yaml.safe_load((out / "config.yaml").read_text()))
    as_written, settings = settings, in_directory(settings, begun_in(out))
    if (out / "results.json").is_file():
        refuse_changed(out, settings, say)
        # Killed once it had its results, before it had tidied up.
        remove_unfinished(out)
        say(f"{out}: finished already")
        return json.loads((out / "results.json").read_text())
    state = last_checkpoint(out, say)
    if state is None and checkpoints_in(out):
        # It would take the place of all that is there: that is for the user to say.
        raise OSError(f"{out}: none of its checkpoints reads back; train anew with another --out, or --overwrite true")
    if state is None:
        say(f"{out}: no checkpoint yet: the run starts anew")
        return train(replace(settings, out=str(out)), say, again=True, remembered=remembered)
    refuse_other_settings(state, as_written, out)
    return train(replace(settings, out=str(out)), say, state, remembered=remembered)


def train(
    config: RunConfig, say: Say = print, state: dict[str, Any] | None = None, again: bool = False,
    remembered: Remembered | None = None, callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train an aligner as `config` says, and leave a complete run folder.

        >>> from clipvisionalign import RunConfig, train  # doctest: +SKIP
        >>> results = train(RunConfig(data="captions", out="runs/mine", epochs=2))  # doctest: +SKIP

    Args:
        config: the settings.
        say: prints a line.
        state: of a checkpoint, to go on from there; see `resume`.
        again: a run that came to no checkpoint is begun once more in its folder.
        remembered: what the same frozen towers gave in other runs of this process, to be used and added to.
        callbacks: called after each step, epoch and checkpoint.

    Returns:
        What results.json of the run folder holds.

    Raises:
        DataError: unusable data.
        FileExistsError: the run folder is there already.
        WeightsNotFound: no weights for a tower.
        ValueError: settings that do not fit each other.

    Under a launcher every process calls this.
    """
    with Trainer(config, say, state, again, remembered, callbacks) as trainer:
        return trainer.fit()
