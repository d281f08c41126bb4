"""`Callback`: what a training calls after its steps, epochs and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipvisionalign.training.step import StepMetrics
from clipvisionalign.training.validation import DevMetrics

if TYPE_CHECKING:
    from clipvisionalign.training.trainer import Trainer


class Callback:
    """Base class of callbacks; each method does nothing until it is overridden.

    Callbacks are passed to `train` or `Trainer`: `train(config, callbacks=[StepCounter()])`. Every process of a
    training calls them. An error of one of them is raised on all processes.

    >>> class StepCounter(Callback):
    ...     steps = 0
    ...     def on_step(self, trainer, metrics):
    ...         self.steps += 1
    """

    def on_step(self, trainer: Trainer, metrics: StepMetrics) -> None:
        """Called after each step of the optimizer.

        Args:
            trainer: the training, whose `progress.step` is this step, from 1.
            metrics: loss and accuracy of the step, over all processes: `metrics.loss`, `metrics.accuracy`.
        """

    def on_epoch(self, trainer: Trainer, metrics: DevMetrics) -> None:
        """Called after each epoch, once the dev gallery was measured.

        Args:
            trainer: the training, whose `progress.epoch` is this epoch, from 1.
            metrics: retrieval figures and loss of the averaged model on dev: `metrics.metrics.rsum.value` (0 to 600),
                `metrics.loss`.
        """

    def on_checkpoint(self, trainer: Trainer, step: int) -> None:
        """Called after a checkpoint was written.

        Args:
            trainer: the training.
            step: number of steps that were taken before it.
        """
