"""`train` and `resume`: from settings to a run folder, and continuing an interrupted run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipvisionalign.allocator import reused_memory
from clipvisionalign.log import Log, deprecated_say
from clipvisionalign.models.aligner import TowerOutputCache
from clipvisionalign.models.run_names import resolve_run
from clipvisionalign.training.callbacks import Callback
from clipvisionalign.training.checkpoint import list_checkpoints, load_last_checkpoint
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.data_checks import check_data_unchanged
from clipvisionalign.training.recorded import read_settings
from clipvisionalign.training.resume import check_same_settings
from clipvisionalign.training.run_folder import BEGUN_FILE, remove_unfinished_files, resolve_paths, start_directory
from clipvisionalign.training.run_stage import stage_settings
from clipvisionalign.training.staged_run import train_stages
from clipvisionalign.training.stages import STAGES_FOLDER
from clipvisionalign.training.trainer import Trainer

logger = logging.getLogger(__name__)


def resume(run: str | Path, say: Log | None = None, encodings_cache: TowerOutputCache | None = None) -> dict[str, Any]:
    """Resume a run from its last checkpoint; a finished run returns at once.

    Args:
        run: the run folder.
        say: deprecated: takes the lines that are logged otherwise.
        encodings_cache: as in `train`.

    Returns:
        What results.json of the run folder holds.

    Raises:
        FileNotFoundError: the folder is not a run folder.
        DataError: its data is no longer what it was trained on.
        OSError: none of its checkpoints reads back.
    """
    with deprecated_say(say):
        return _resume(Path(run), encodings_cache)


def _resume(out: Path, encodings_cache: TowerOutputCache | None) -> dict[str, Any]:
    import yaml

    if (out / BEGUN_FILE).is_file():
        begun = yaml.safe_load((out / BEGUN_FILE).read_text())
        directory = Path(begun["directory"]) if Path(begun["directory"]).is_dir() else Path.cwd()
        settings = resolve_paths(read_settings(begun["settings"]), directory)
        if not (out / STAGES_FOLDER).is_dir():
            logger.info(f"{out}: stopped before its first step: the run starts again")
        return train(replace(settings, out=str(out)), restart=True, encodings_cache=encodings_cache)
    if not (out / "config.yaml").is_file():
        raise FileNotFoundError(f"--resume {out}: not a run folder: it has no config.yaml")
    settings = read_settings(yaml.safe_load((out / "config.yaml").read_text()))
    as_written, settings = settings, resolve_paths(settings, start_directory(out))
    if (out / "results.json").is_file():
        check_data_unchanged(out, settings.dataset)
        # Killed once it had its results, before it had tidied up.
        remove_unfinished_files(out)
        logger.info(f"{out}: finished already")
        return json.loads((out / "results.json").read_text())
    state = load_last_checkpoint(out)
    if state is None and list_checkpoints(out):
        # It would take the place of all that is there: that is for the user to decide.
        raise OSError(f"{out}: none of its checkpoints reads back; train again with another --out, or --overwrite true")
    if state is None:
        logger.info(f"{out}: no checkpoint yet: the run starts again")
        return train(replace(settings, out=str(out)), restart=True, encodings_cache=encodings_cache)
    check_same_settings(state, stage_settings(as_written), out)
    return train(replace(settings, out=str(out)), state=state, encodings_cache=encodings_cache)


@reused_memory()
def train(
    config: RunConfig, say: Log | None = None, state: dict[str, Any] | None = None, restart: bool = False,
    encodings_cache: TowerOutputCache | None = None, callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train an aligner with the settings of `config`, and leave a complete run folder, which `load_aligner` opens.

    Under a launcher (`torchrun`) every process calls this. A run that was interrupted is continued by `resume`.

    >>> results = train(RunConfig(data="scenes", out="runs/mine", epochs=1, batch=4))
    scenes: read as 'folder', its own splits: dev 4, train 8 images
    ...
    best epoch 1; measuring the saved model on the whole dev gallery
    >>> results["images"], results["captions"], results["steps"]
    (4, 20, 2)

    Args:
        config: the settings.
        say: deprecated: takes the lines that are logged otherwise.
        state: a checkpoint to resume from, as `load_last_checkpoint` returns it; None for a new run.
        restart: whether a run without a checkpoint is started again in its folder.
        encodings_cache: outputs of frozen towers, kept from other runs of this process; it is read and added to.
        callbacks: called after each step, epoch and checkpoint.

    Returns:
        What results.json of the run folder holds: the figures of the saved model on the whole dev gallery, recall in
        percent. With `config.profile` no run is left, and the result has the seconds of the parts of a step.

    Raises:
        DataError: the data set cannot be read, or too few of its images can.
        FileExistsError: the run folder holds a run already; `config.overwrite` replaces it.
        WeightsNotFound: there are no weights of a tower's name here or on the hub.
        ValueError: settings that do not fit each other, or are out of range.
        FloatingPointError: loss, gradients or weights are no longer finite; the last checkpoint is kept.
        KeyboardInterrupt: the run was asked to stop; `resume` continues it from its checkpoint.
    """
    with deprecated_say(say):
        config = replace(config, init=resolve_run(config.init))
        if config.stages and not config.profile:
            return train_stages(config, state, restart, encodings_cache, callbacks)
        if config.stages:
            check_settings(config)
            # A profile is of the last stage: what the others leave does not change its speed.
            config = replace(stage_settings(config), init=config.init)
        with Trainer(config, None, state, restart, encodings_cache, callbacks) as trainer:
            return trainer.fit()
