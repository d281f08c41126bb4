"""The training loop: `Trainer`.

- One step: B images with all of their captions; the images go through their tower once.
- The weights that are kept are a moving average of the trained ones (`ema`), measured on the whole dev gallery after
  each epoch; the best epoch by dev rsum (or dev loss, `best_by`) is the run's model. No test image is opened.
- The run's figures are cross-fitted: each half of dev by what the other half chose (`cross_fit.py`).
- A frozen image tower's features are computed once and kept on disk, in several views of each image.
- A run that was stopped resumes from its last checkpoint (`resume`) and ends as an undisturbed one, bit for bit on CPU.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from clipvisionalign.batch import Batch
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.streams.loader import too_many_bad
from clipvisionalign.json_io import write_json
from clipvisionalign.log import Log, deprecated_say
from clipvisionalign.models.aligner import TowerOutputCache
from clipvisionalign.progress import progress_step
from clipvisionalign.training.best_epoch import prune_models
from clipvisionalign.training.callbacks import Callback
from clipvisionalign.training.checkpoint import CHECKPOINT_FOLDER as CHECKPOINTS
from clipvisionalign.training.checkpoint import list_checkpoints
from clipvisionalign.training.config import RunConfig, frozen_blocks, keeps_last_epoch
from clipvisionalign.training.epoch_log import epoch_line, log_findings, progress_line, record_epoch
from clipvisionalign.training.fine_tuning import set_train_mode
from clipvisionalign.training.metrics_logger import MetricsLogger
from clipvisionalign.training.overlap import save_trained_on
from clipvisionalign.training.profiling import TimedBatches
from clipvisionalign.training.results import evaluate_run
from clipvisionalign.training.run_folder import save_models, write_results
from clipvisionalign.training.run_stage import RunStage
from clipvisionalign.training.step import StepMetrics, forward_backward
from clipvisionalign.training.stopping import any_stop_requested, stop_signal
from clipvisionalign.training.trainer_setup import TrainerSetup
from clipvisionalign.training.validation import DevMetrics

logger = logging.getLogger(__name__)


class Trainer(TrainerSetup):
    """Trains an aligner and leaves a complete run folder; `train` does the same in one call.

    A context manager: the run folder is prepared and locked, data and model are loaded on entering; the folder is
    unlocked on leaving, and removed again where the settings were refused. `fit` enters by itself. Its attributes
    are those of `TrainerSetup`: `config`, `aligner`, `progress` and others.

    >>> with Trainer(RunConfig(data="scenes", out="runs/self", epochs=1, batch=4)) as trainer:
    ...     results = trainer.fit()
    scenes: read as 'folder', its own splits: dev 4, train 8 images...

    Args:
        config: the settings.
        say: deprecated: takes the lines that are logged otherwise.
        state: a checkpoint to resume from, as `load_last_checkpoint` returns it; None for a new run.
        again: whether a run without a checkpoint is started again in its folder.
        remembered: outputs of frozen towers, kept from other runs of this process; it is read and added to.
        callbacks: called after each step, epoch and checkpoint.
        stage: the stage that this is of a training in stages, see `train_stages`; None for a run without.

    Raises:
        DataError: the data set cannot be read, or too few of its images can.
        FileExistsError: the run folder holds a run already; `config.overwrite` replaces it.
        WeightsNotFound: there are no weights of a tower's name here or on the hub.
        ValueError: settings that do not fit each other, or are out of range.
    """

    def __init__(
        self,
        config: RunConfig,
        say: Log | None = None,
        state: dict[str, Any] | None = None,
        again: bool = False,
        remembered: TowerOutputCache | None = None,
        callbacks: Sequence[Callback] = (),
        stage: RunStage | None = None,
    ) -> None:
        super().__init__(config, state, again, stage)
        self.callbacks, self._remembered = list(callbacks), remembered
        self._say = say
        self._exit_stack: ExitStack | None = None

    def __enter__(self) -> Trainer:
        with ExitStack() as stack:
            stack.enter_context(deprecated_say(self._say))
            self._open(stack)
            self._build_model()
            self._load_features()
            self._plan_steps()
            self._build_optimizer()
            self._begin()
            self._exit_stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        stack, self._exit_stack = self._exit_stack, None
        if stack is not None:
            stack.__exit__(*error)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Train to the end of the run.

        Returns:
            What results.json holds: figures on the whole dev gallery, recall in percent. With `profile`, the seconds
            of the parts of a step.

        Raises:
            FloatingPointError: loss, gradients or weights are not finite.
            KeyboardInterrupt: the run was asked to stop; its checkpoint was written.
            DataError: too few images can be read.
        """
        if self._exit_stack is None:
            with self:
                return self.fit()
        processes, progress = self.processes, self.progress
        tracked = processes.accelerator if self.trackers else None
        self.records = processes.run_on_all(lambda: MetricsLogger(self.out, tracked, processes.is_main))
        shown = progress_line(self.steps, progress.step, processes.is_main)
        with stop_signal(processes.is_distributed) as self._stop, shown as self._show, closing(self.records):
            self._measure_start()
            while progress.epoch <= self.epochs and not progress.stopped:
                self._train_epoch()
                if self.config.profile and progress.step == self.steps:
                    return self._profile_result()
                self._end_epoch()
            if not self.config.epochs and not progress.chosen:
                # The model as it is stands for an epoch without a step.
                progress.epoch = 0
                self._end_epoch()
        return self._finish()

    def _train_epoch(self) -> None:
        """The steps of an epoch that are not done yet, with checkpoints between them."""
        config, progress, processes = self.config, self.progress, self.processes
        self._epoch_images, self._epoch_start = 0, time.perf_counter()
        workers = 0 if self.image_features else config.workers
        epoch_arguments = (
            config.batch,
            progress.epoch,
            config.seed,
            workers,
            progress.step_in_epoch,
            processes.rank_and_world_size,
        )
        self._stream = TimedBatches(self.batches.epoch(*epoch_arguments, config.chunk), self.timings)
        for number in range(progress.step_in_epoch, self.steps_per_epoch):
            if progress.step == self.steps:
                break
            chunks = self.batches.num_chunks(config.batch, number, config.chunk, processes.world_size)
            metrics = self.train_step(self._stream, chunks)
            if metrics.images:
                self._record_step(metrics)
            if config.profile and progress.step == self.steps:
                break
            stopping, elapsed = any_stop_requested(processes, self._stop, time.perf_counter() - self._saved_at)
            if stopping or elapsed > 60 * config.checkpoint_minutes:
                self.save_checkpoint()
            if stopping:
                self._leave()

    def train_step(self, batches: Iterator[Batch], chunks: int = 0) -> StepMetrics:
        """Take one step: forward, backward, optimizer.

        Args:
            batches: gives this process's part of the next batch; with `chunks`, its chunks twice.
            chunks: number of chunks in which `batches` gives it; 0 if it gives it whole.

        Returns:
            Loss and accuracy over all processes; `images` is 0 where too few images could be read for a step.

        Raises:
            FloatingPointError: loss or gradients are not finite.
            DataError: too many steps could not be taken.
        """
        progress = self.progress
        # Each time: features that were computed, and a validation, leave modules in evaluation mode.
        set_train_mode(self.aligner, self.config.freeze, frozen_blocks(self.config))
        metrics = forward_backward(self.step, batches, self.config.runtime, self.lookup, chunks)
        progress.step_in_epoch += 1
        progress.left_out += metrics.left_out
        # Each process has its own.
        for reasons in self.processes.all_gather_object(metrics.skipped) if metrics.left_out else []:
            for reason in reasons:
                logger.info(f"left out: {reason}")
        if not metrics.images:
            self._skip_step()
            return metrics
        with self.timings("optimiser"):
            self._optimizer_step(metrics)
        progress.add_step(np.array([metrics.loss, metrics.pair_loss, metrics.accuracy]), metrics.distillation)
        return metrics

    def _record_step(self, metrics: StepMetrics) -> None:
        """Show a step that was taken, and record one in ten."""
        progress, values = self.progress, np.array([metrics.loss, metrics.pair_loss, metrics.accuracy])
        self._epoch_images += metrics.images
        speed = self._epoch_images / (time.perf_counter() - self._epoch_start)
        self._show(progress.step, values, speed, progress.best)
        if progress.step % 10 == 0 or progress.step == 1:
            logged = {"loss": metrics.loss, "fusion_loss": metrics.pair_loss, "accuracy": metrics.accuracy}
            logged |= {"distillation": metrics.distillation} if self.step.distillation else {}
            self.processes.run_on_main(partial(self.records.write, progress.step, epoch=progress.epoch, **logged))
        self._call(lambda callback: callback.on_step(self, metrics))

    def _optimizer_step(self, metrics: StepMetrics) -> None:
        """From gradients to weights. Raises FloatingPointError where loss or gradients are not finite."""
        norm = self.processes.clip_grad_norm(self._parameters, 1.0)
        loss = metrics.loss + metrics.pair_loss + metrics.distillation
        for what, value in (("loss is", loss), ("gradients are", norm)):
            if not math.isfinite(value):
                message = f"step {self.progress.step + 1}: the {what} not finite; its images: "
                raise FloatingPointError(f"{message}{', '.join(metrics.names)}, ...; {self._checkpoint_note()}")
        self.optimizer.step()
        self.scheduler.step()
        self.aligner.clamp_temperatures()
        self.average.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _skip_step(self) -> None:
        """Count a step that could not be taken as one of those planned, so that the schedule ends where it should."""
        progress = self.progress
        progress.step, progress.skipped = progress.step + 1, progress.skipped + 1
        logger.info(f"step {progress.step}: none: too few of its images could be read")
        with warnings.catch_warnings():
            # PyTorch thinks that the first step of the optimiser was forgotten.
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            self.scheduler.step()
        if too_many_bad(progress.skipped, self.steps):
            detail = "steps were none: too few of their images could be read"
            message = f"{progress.skipped} of {progress.step} {detail}; {self._checkpoint_note()}"
            raise DataError(f"{self.config.data}: {message}")

    # --- between and after epochs -------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        """Measure, record, choose, keep, write a checkpoint."""
        config, progress, processes = self.config, self.progress, self.processes
        self._refuse_not_finite()
        # Of an image without features it was detected before the epoch that it cannot be read.
        progress.left_out += len(self.image_features.failures) if self.image_features else 0
        metrics = self.validate()
        seconds = time.perf_counter() - self._started_at
        per_step = min(config.batch, len(self.batches))
        shape = per_step, round(per_step * self.batches.captions_per_image)
        processes.run_on_all(partial(record_epoch, progress, metrics, shape, self.records, self.timings, seconds))
        model = self.average.model()
        logger.info(epoch_line(progress.epoch, self.epochs, progress, metrics, seconds, model))
        start = self.stage.destroyed_start(progress.start) if self.stage else progress.start
        log_findings(progress, metrics, config, start)
        previous_best = progress.best_epoch
        progress.update_best(metrics, config.schedule, keep_last=keeps_last_epoch(config))
        processes.run_on_main(partial(save_models, config.freezing, self.out, model, progress, previous_best))
        if progress.stopped:
            reason = f"no better dev {config.best_by} for {config.patience} epochs"
            logger.info(f"{reason}: stopped; the best was epoch {progress.best_epoch}")
        self._call(lambda callback: callback.on_epoch(self, metrics))
        progress.next_epoch()
        if self.save_checkpoint():
            processes.run_on_main(partial(prune_models, self.out, progress.chosen))
        if any_stop_requested(processes, self._stop)[0]:
            self._leave()

    def validate(self) -> DevMetrics:
        """Measure the averaged weights on the whole dev gallery; every process calls this.

        Returns:
            Retrieval metrics (recall in percent), loss and accuracy.
        """
        return self.dev.measure(self.average.model())

    def _finish(self) -> dict[str, Any]:
        """Measure the saved model, and write results.json."""
        config, progress, processes, data, out = self.config, self.progress, self.processes, self.data, self.out
        seconds = time.perf_counter() - self._started_at
        if progress.step and progress.skipped == progress.step:
            detail = f"none of {progress.step} steps could be taken: hardly an image could be read"
            raise DataError(f"{config.data}: {detail}")
        if progress.skipped:
            logger.info(f"{progress.skipped} of {progress.step} steps were none: too few of their images could be read")
        if data.count_stream(self.batches, processes):
            processes.run_on_main(lambda: write_json(out / "data.json", data.to_dict()))
        processes.barrier()
        # The measuring has the memory for itself.
        vars(self.train_state).clear()
        del self.step, self.aligner, self.average, self.optimizer, self.scheduler, self._parameters
        logger.info(f"best epoch {progress.best_epoch}; measuring the saved model on the whole dev gallery")
        with progress_step("measuring the saved model", visible=processes.is_main):
            results = evaluate_run(
                replace(config, init=self.recorded.init), progress, self.dev, out, processes, self._remembered
            )
        results |= {"best_epoch": progress.best_epoch, "training_seconds": round(seconds, 1)}
        results |= {"steps": progress.step - progress.skipped, "steps_skipped": progress.skipped}
        results |= {"images_left_out": progress.left_out} | progress.start_results()
        results = self.stage.whole_results(results) if self.stage else results
        processes.run_on_main(lambda: save_trained_on(out, data.train, processes.is_main))
        processes.run_on_main(partial(write_results, out, results))
        processes.close(between_stages=self.stage is not None and not self.stage.is_last)
        return results

    def _profile_result(self) -> dict[str, Any]:
        """Where the time went; the run folder is removed. Raises DataError where no step could be taken."""
        steps_taken = self.progress.step - self.progress.skipped
        result = {"profile": self.timings.pop(), "loading": self._stream.loading_seconds, "steps": steps_taken}
        if self.processes.is_main:
            shutil.rmtree(self.out)
        if not steps_taken:
            detail = "steps could be taken: hardly an image could be read"
            raise DataError(f"{self.config.data}: none of {self.progress.step} {detail}")
        return {**result, "images": self._epoch_images, "tokenise": self.batches.tokenise_seconds}

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> bool:
        """Write a checkpoint into the run folder; every process calls this.

        Returns:
            Whether it was written; on a full disk it is not, which is logged, and the training continues.

        Raises:
            FloatingPointError: weights are not finite.
        """
        self._refuse_not_finite()
        self.progress.seconds = time.perf_counter() - self._started_at
        try:
            self.progress.records = self.processes.run_on_main(self.records.sync)
            self.train_state.save(self.out, self.progress.step, self.state_dict(), self.processes)
        except OSError as error:
            fallback = "the one before it is kept" if list_checkpoints(self.out) else "there is none before it"
            logger.warning(f"no checkpoint at step {self.progress.step}: {error}; training continues, {fallback}")
            return False
        finally:
            self._saved_at = time.perf_counter()
        self.checkpoint_step = self.progress.step
        self._call(lambda callback: callback.on_checkpoint(self, self.progress.step))
        return True

    def _checkpoint_note(self) -> str:
        if self.checkpoint_step is None:
            return "there is no checkpoint before it"
        return f"the last good checkpoint, of step {self.checkpoint_step}, is in {self.out / CHECKPOINTS}"

    def _refuse_not_finite(self) -> None:
        if not all(self.processes.run_and_gather(lambda: self.train_state.is_finite())):
            # What every resumed run would start from.
            raise FloatingPointError(f"step {self.progress.step}: weights are not finite; {self._checkpoint_note()}")

    def _leave(self) -> None:
        """Raise KeyboardInterrupt, with a line on how to resume the run."""
        step, kept = self.progress.step, self.checkpoint_step
        message = f"stopped after step {step}"
        if kept != step:
            message += ", which was not kept: "
            message += "there is no checkpoint" if kept is None else f"the last checkpoint is of step {kept}"
        hint = "; start again with" if kept is None else "; resume with"
        logger.info(f"{message}{hint}: clipvisionalign train --resume {self.stage.out if self.stage else self.out}")
        raise KeyboardInterrupt

    def _call(self, event: Callable[[Callback], None]) -> None:
        """Call one method of every callback; an error of one process's callback is raised on all."""
        for callback in self.callbacks:
            self.processes.run_on_all(partial(event, callback))
