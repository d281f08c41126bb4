"""A training in stages: a run for each, of which the last is the run itself.

All stages but the last are runs in `stages/` of the run's folder and keep their last epoch: nothing is selected on dev
there, so that the cross-fitted figures of the run are what they are without stages. Each stage starts from the model of
the one before it, as with `--init`. A run that was interrupted resumes in the stage that was interrupted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from clipvisionalign.models.aligner import TowerOutputCache
from clipvisionalign.training.callbacks import Callback
from clipvisionalign.training.checkpoint import list_checkpoints, load_last_checkpoint
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.recorded import read_settings
from clipvisionalign.training.resume import checkpoint_settings
from clipvisionalign.training.run_folder import BEGUN_FILE, remove_unfinished_files, resolve_paths, start_directory
from clipvisionalign.training.run_stage import RunStage, stage_settings
from clipvisionalign.training.stages import parse_stages
from clipvisionalign.training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _StageFolder:
    """What the folder of a stage holds: nothing, its results, or a training to be resumed or begun again."""

    results: dict[str, Any] | None = None
    state: dict[str, Any] | None = None
    restart: bool = False

    @classmethod
    def read(cls, own: RunConfig) -> _StageFolder:
        """Look into the folder of a stage with the settings `own`.

        Raises ValueError where it was begun with others, OSError where none of its checkpoints reads back.
        """
        folder = Path(own.out)
        if (folder / BEGUN_FILE).is_file():
            return cls(restart=True)
        if not (folder / "config.yaml").is_file():
            return cls()
        _check_same(own, _recorded(folder))
        if (folder / "results.json").is_file():
            remove_unfinished_files(folder)
            return cls(results=json.loads((folder / "results.json").read_text(encoding="utf-8")))
        state = load_last_checkpoint(folder)
        if state is None and list_checkpoints(folder):
            raise OSError(f"{folder}: none of its checkpoints reads back; remove it, and its stage starts again")
        return cls(state=state, restart=state is None)


def _recorded(folder: Path) -> RunConfig:
    """The settings that a stage's run was begun with."""
    return read_settings(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))


def _check_same(own: RunConfig, recorded: RunConfig) -> None:
    """Raises ValueError where a stage was begun with other settings, apart from the model, whose commits it pinned."""
    asked, begun = ({**checkpoint_settings(each), "epochs": each.epochs} for each in (own, recorded))
    changed = [
        f"{name} {asked[name]!r}, begun with {begun[name]!r}"
        for name in sorted(asked.keys() & begun.keys())
        if asked[name] != begun[name] and not name.startswith("model.")
    ]
    if changed:
        raise ValueError(
            f"{own.out}: this stage has other settings by now: {'; '.join(changed)}: put them back, or train again "
            "with another --out"
        )


def train_stages(
    config: RunConfig,
    state: dict[str, Any] | None = None,
    restart: bool = False,
    encodings_cache: TowerOutputCache | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train a run in stages, or resume it.

    Args:
        config: The settings, with `stages`.
        state: Of the run's own checkpoint, that is of the last stage's.
        restart: Whether stages that are in the run's folder are finished, or resumed.
        encodings_cache: As in `train`, for the first stage: the towers of the others have been trained.
        callbacks: Called in all stages.

    Returns:
        What results.json of the run holds.

    Raises:
        ValueError: Settings that do not fit each other, or not the stages that are there.
        OSError: None of a stage's checkpoints reads back.
    """
    check_settings(config)
    resumes, number_of_stages = restart or state is not None, len(parse_stages(config.stages))
    summaries: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for number in range(number_of_stages):
        own = stage_settings(config, number)
        stage = RunStage(config, number, not resumes and not number, summaries)
        logger.info(stage.title())
        if stage.is_last:
            there = _StageFolder(state=state, restart=(resumes or number > 0) and state is None)
        else:
            there = _StageFolder.read(own) if resumes else _StageFolder()
        if there.results is not None:
            results, folder = there.results, Path(own.out)
            logger.info(f"{folder}: finished already")
            pinned = resolve_paths(_recorded(folder), start_directory(folder)).model
        else:
            remembered = None if number else encodings_cache
            with Trainer(own, None, there.state, there.restart, remembered, callbacks, stage) as trainer:
                results, pinned = trainer.fit(), trainer.config.model
        summaries = [*summaries, stage.summary(results)] if not stage.is_last else summaries
        # The same commits in all stages.
        config = replace(config, model=pinned)
    return results
