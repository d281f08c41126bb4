"""The best epoch by all of dev and by each half of it, and the models of these epochs in the run folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipvisionalign.files import atomic_write
from clipvisionalign.models.run_files import CONFIG_FILE, MODEL_FOLDERS, WEIGHTS_FILE

#: In the folder of a run that is not finished: models that a half of dev chose, where all of dev chose another.
HALF_MODELS = "half-models"


@dataclass
class BestEpoch:
    """The best epoch so far by one gallery (all of dev, or a half), with its own patience.

    Attributes:
        score: Its score; more is better.
        epoch: Its number, from 1; 0 before there is one.
        stopped: Whether its patience has ended; later epochs are ignored.
    """

    score: float = -math.inf
    epoch: int = 0
    stopped: bool = False

    def update(self, epoch: int, score: float, patience: int, always: bool = False) -> None:
        """Take an epoch into account; on a tie the earlier one stays, and NaN is worse than any number.

        Args:
            epoch: Number of the epoch.
            score: Its score.
            patience: Epochs without a better score after which later ones are ignored.
            always: Whether the epoch is the best whatever its score.

        >>> best = BestEpoch()
        >>> for epoch, score in enumerate([1.0, 3.0, 2.0, 2.5, 9.0], start=1):
        ...     best.update(epoch, score, patience=2)
        >>> best.epoch, best.stopped
        (2, True)
        """
        if self.stopped:
            return
        # What is no number is worse than any.
        if always or not self.epoch or score > self.score or (math.isnan(self.score) and not math.isnan(score)):
            self.score, self.epoch = score, epoch
        else:
            self.stopped = epoch - self.epoch >= patience


def save_chosen_models(
    out: Path, save: Callable[[Path], None], epoch: int, saved_epoch: int, best: Sequence[BestEpoch]
) -> None:
    """Keep the model that all of dev chooses in the run folder, and beside it those that only a half chooses.

    A model of the run folder is set aside before it is replaced, so that a run that is interrupted anywhere still has,
    or recomputes, what its checkpoint refers to.

    Args:
        out: The run folder.
        save: Writes the model of this epoch into a folder.
        epoch: Number of this epoch.
        saved_epoch: The epoch whose model the run folder holds; 0 for none.
        best: The best epochs by all of dev, then by each half.

    Raises:
        OSError: A model cannot be written.
    """
    chosen = best[0].epoch
    for other in {each.epoch for each in best[1:]} - {chosen}:
        target = half_model_folder(out, other)
        if other == epoch:
            _write_folder(target, save)
        elif other == saved_epoch and not target.is_dir():
            _write_folder(target, lambda folder: _copy_model(out, folder))
    if chosen == epoch:
        save(out)


def prune_models(out: Path, best: Sequence[BestEpoch]) -> None:
    """Remove models that no half chooses any longer.

    Args:
        out: The run folder.
        best: The best epochs by all of dev, then by each half.
    """
    chosen_names = {half_model_folder(out, each.epoch).name for each in best[1:] if each.epoch != best[0].epoch}
    for folder in (out / HALF_MODELS).glob("*"):
        if folder.name not in chosen_names:
            shutil.rmtree(folder)
    if not chosen_names:
        shutil.rmtree(out / HALF_MODELS, ignore_errors=True)


def half_model_folder(out: Path, epoch: int) -> Path:
    """Where the model of an epoch is kept that only a half chooses; `load_aligner` opens it.

    Args:
        out: The run folder.
        epoch: Number of the epoch.

    Returns:
        The folder, which need not exist.
    """
    return out / HALF_MODELS / f"epoch-{epoch:04d}"


def _write_folder(target: Path, write: Callable[[Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target, sync=False) as folder:
        folder.mkdir()
        write(folder)


def _copy_model(source: Path, target: Path) -> None:
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        shutil.copy2(source / name, target / name)
    for name in MODEL_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
