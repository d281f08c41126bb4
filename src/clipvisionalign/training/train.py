"""From settings to a run folder, and on with one that was stopped: `train` and `resume`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipvisionalign.models.aligner import TowerOutputCache
from clipvisionalign.settings import config_from_dict
from clipvisionalign.training.checkpoint import list_checkpoints, load_last_checkpoint
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.data import check_data_unchanged
from clipvisionalign.training.metrics_logger import Log
from clipvisionalign.training.resume import check_same_settings
from clipvisionalign.training.run_folder import BEGUN_FILE, remove_unfinished_files, resolve_paths, start_directory
from clipvisionalign.training.trainer import Callback, Trainer


def resume(run: str | Path, say: Log = print, encodings_cache: TowerOutputCache | None = None) -> dict[str, Any]:
    """Go on with a run where its last checkpoint stands; returns what its results.json holds, finished runs at once.

    remembered: as in `train`.
    Raises FileNotFoundError where the folder is no run of this project's, DataError where its data is no longer what it
    was trained on, OSError where none of its checkpoints reads back.
    """
    import yaml

    out = Path(run)
    if (out / BEGUN_FILE).is_file():
        begun = yaml.safe_load((out / BEGUN_FILE).read_text())
        directory = Path(begun["directory"]) if Path(begun["directory"]).is_dir() else Path.cwd()
        say(f"{out}: stopped before its first step: the run starts anew")
        settings = resolve_paths(config_from_dict(RunConfig, begun["settings"]), directory)
        return train(replace(settings, out=str(out)), say, restart=True, encodings_cache=encodings_cache)
    if not (out / "config.yaml").is_file():
        raise FileNotFoundError(f"--resume {out}: not a run folder: it has no config.yaml")
    settings = config_from_dict(RunConfig, yaml.safe_load((out / "config.yaml").read_text()))
    as_written, settings = settings, resolve_paths(settings, start_directory(out))
    if (out / "results.json").is_file():
        check_data_unchanged(out, settings, say)
        # Killed once it had its results, before it had tidied up.
        remove_unfinished_files(out)
        say(f"{out}: finished already")
        return json.loads((out / "results.json").read_text())
    state = load_last_checkpoint(out, say)
    if state is None and list_checkpoints(out):
        # It would take the place of all that is there: that is for the user to say.
        raise OSError(f"{out}: none of its checkpoints reads back; train anew with another --out, or --overwrite true")
    if state is None:
        say(f"{out}: no checkpoint yet: the run starts anew")
        return train(replace(settings, out=str(out)), say, restart=True, encodings_cache=encodings_cache)
    check_same_settings(state, as_written, out)
    return train(replace(settings, out=str(out)), say, state, encodings_cache=encodings_cache)


def train(
    config: RunConfig, say: Log = print, state: dict[str, Any] | None = None, restart: bool = False,
    encodings_cache: TowerOutputCache | None = None, callbacks: Sequence[Callback] = (),
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
    with Trainer(config, say, state, restart, encodings_cache, callbacks) as trainer:
        return trainer.fit()
