"""The setup before the first step: run folder, data, model, frozen features, steps, optimizer."""

from __future__ import annotations

import copy
import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.files import run_lock
from clipvisionalign.models.io import pin_revisions
from clipvisionalign.models.run_names import resolve_run
from clipvisionalign.models.text_families import preserve_rng_state
from clipvisionalign.progress import progress_step
from clipvisionalign.retrieval.metrics import metrics_of_ranks
from clipvisionalign.training.build import (
    build_aligner,
    build_loss,
    check_batch_norm_statistics,
    count_trained_parameters,
    found_here,
    seed_everything,
    start_distributed,
)
from clipvisionalign.training.config import RunConfig, caches_image_features, images_per_process, starts_from_model
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.data import open_data
from clipvisionalign.training.data_checks import check_same_data
from clipvisionalign.training.distillation import Distillation, StartVectors
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.dry_run import check_later_stages
from clipvisionalign.training.ema import ExponentialMovingAverage
from clipvisionalign.training.epoch_log import record_start, start_line
from clipvisionalign.training.forward import FeatureLookup, Towers
from clipvisionalign.training.frozen_features import (
    describe_frozen_towers,
    load_frozen_caption_features,
    load_frozen_image_features,
)
from clipvisionalign.training.ineffective_settings import ineffective_settings
from clipvisionalign.training.init_run import check_init
from clipvisionalign.training.metrics_logger import MetricsLogger
from clipvisionalign.training.optimizer import build_optimizer, build_schedule
from clipvisionalign.training.precision import choose_dtypes, dtype_name
from clipvisionalign.training.profiling import Timings
from clipvisionalign.training.reduced_width import ReducedWidth, check_space, find_directions, recorded_width
from clipvisionalign.training.resume import (
    check_same_cache,
    check_same_partition,
    checkpoint_settings,
    epoch_partition,
)
from clipvisionalign.training.run_folder import LOCK_FILE, TRACKER_FOLDER, prepare_folder, write_run_files
from clipvisionalign.training.run_stage import RunStage
from clipvisionalign.training.start_vectors import build_start, write_start_vectors
from clipvisionalign.training.state import TrainProgress, TrainState, restore_aligner
from clipvisionalign.training.step import Step
from clipvisionalign.training.validation import DevGallery

logger = logging.getLogger(__name__)


class TrainerSetup:
    """The parts of a `Trainer`, each made by one method, in the order in which they stand here.

    Its attributes are there once the trainer is entered; most are gone after `fit`.

    Args:
        config: The settings.
        state: Of a checkpoint, to resume from; None for a run that starts.
        again: Whether a run that came to no checkpoint is begun once more in its folder.
        stage: The stage that this is of a training in stages; None for a run without.

    Attributes:
        config: The settings, with the hub's commits that the towers come from.
        out: The run folder.
        data: Training split and dev split, a `TrainingData`.
        aligner: The model that is trained.
        average: The moving average of its weights; `average.model()` is the model that is measured and saved.
        optimizer: AdamW.
        scheduler: The schedule of its learning rates.
        progress: Step, epoch and figures so far, a `TrainProgress`; a callback that sets `progress.stopped` ends the
            training after this epoch.
        steps: Number of steps in the run.
        steps_per_epoch: Number of steps in an epoch.
    """

    records: MetricsLogger

    def __init__(
        self, config: RunConfig, state: dict[str, Any] | None, again: bool, stage: RunStage | None = None
    ) -> None:
        self.config, self.stage = replace(config, init=resolve_run(config.init)), stage
        self.out = Path(config.out)
        self._state, self._again = state, again

    def _open(self, stack: ExitStack) -> None:
        """Check the settings, prepare and lock the run folder, open the data."""
        config, state, stage = self.config, self._state, self.stage
        if config.stages:
            raise ValueError("stages are a training each: call train(...), or `train_stages`, in the place of Trainer")
        check_settings(config)
        device, self.trackers, tracker_messages = found_here(config.runtime)
        self.processes: Distributed = start_distributed(config, device, self.trackers)
        processes = self.processes
        for line in tracker_messages:
            logger.info(line)
        if state is None:
            # Of a run in stages once, of all stages together.
            given = config if stage is None else stage.config
            for line in [] if stage is not None and stage.number else ineffective_settings(given, processes.world_size):
                logger.info(line)
            processes.run_on_main(lambda: check_space(config.model))
            if config.init:
                processes.run_on_main(lambda: check_init(config.init))
            if stage is not None:
                processes.run_on_main(lambda: stage.prepare_folder(stack))
            processes.run_on_main(lambda: prepare_folder(config, self._again, stack))
        processes.run_on_main(lambda: stack.enter_context(run_lock(self.out / LOCK_FILE, "trains this run")))
        if stage is not None:
            processes.run_on_main(lambda: stage.lock(stack))
        seed_everything(config.seed)

        self.data = open_data(config, processes, is_new_run=state is None)
        if config.distill and not isinstance(self.data.train, CaptionedImages):
            raise DataError(
                f"{config.data}: --distill keeps the vectors of all training images, which a stream has only as they "
                "come: give a data set that is not a stream, or leave it out"
            )
        # As when the run was begun: `cache` may be another one since.
        self._reads_images = caches_image_features(config.freezing)
        if state is not None:
            check_same_cache(state, config.freezing, self.out)
            self._reads_images = state.get("reads_images", self._reads_images)
        # A profile is never resumed.
        self._contents: dict[str, dict[str, str]] = (
            {}
            if config.profile
            else processes.run_on_main(lambda: self.data.contents(self._reads_images, processes.is_main))
        )
        if state is not None:
            check_same_data(state, self._contents, config.dataset, self.out)

    def _build_model(self) -> None:
        """The model on its device, its loss, and the dtype of each tower."""
        processes, state, device = self.processes, self._state, self.processes.device
        # One process fetches the towers' weights; the others find the commit in the cache.
        pinned = processes.run_on_main(lambda: pin_revisions(self.config.model))
        self.config = config = replace(self.config, model=pinned)
        stage = self.stage
        if stage is not None and not stage.number and state is None:
            whole = replace(stage.config, model=pinned)
            processes.run_on_all(lambda: check_later_stages(whole, processes), long_timeout=True)
        self.reduced_width, directions = self._find_directions(config, device)
        self.aligner = aligner = processes.run_on_all(
            lambda: build_aligner(config, device, state is None, directions=directions), long_timeout=True
        )
        if state is not None:
            # Before anything is made of them: what is frozen, its features, and the averaged copy are the checkpoint's.
            restore_aligner(aligner, state)
        check_batch_norm_statistics(aligner, config, processes)
        self.loss_fn = build_loss(config.loss, aligner)
        # A machine may time its formats otherwise the next time: a resumed run keeps those that it was begun in.
        with progress_step("timing the dtypes", visible=processes.is_main):
            self.dtypes = processes.run_on_main(partial(choose_dtypes, config, aligner, state))
        image_dtype, text_dtype, _ = map(dtype_name, self.dtypes)
        image, text = config.model.image_tower.name, config.model.text_tower.name
        if config.model.pretrained:
            image, text = f"images of {config.model.pretrained}", "captions"
        logger.info(
            f"design {config.model.design}: {image} in {image_dtype} + {text} in {text_dtype} on {device}"
            f"{f' and {processes.world_size - 1} more' if processes.is_distributed else ''}, "
            f"{aligner.parameter_count() / 1e6:.1f} M parameters, "
            f"{count_trained_parameters(aligner) / 1e6:.1f} M of them trained"
        )
        if config.compile:
            for tower in (aligner.image_tower, aligner.text_tower):
                tower.compile(dynamic=True)

    def _find_directions(self, config: RunConfig, device: torch.device) -> tuple[ReducedWidth | None, Tensor | None]:
        """The narrower common space that the settings ask for, if they do; a run that resumes, or starts from another
        one, has it in its weights."""
        if self._state is not None:
            return None, None
        if config.init:
            return self.processes.run_on_main(lambda: recorded_width(Path(config.init))), None
        visible = self.processes.is_main
        return self.processes.run_on_main(lambda: find_directions(config.model, self.data, device, visible))

    def _load_features(self) -> None:
        """Frozen towers' outputs, and what deals the training split into batches."""
        config, processes, aligner, data = self.config, self.processes, self.aligner, self.data
        # What a run keeps on disk it keeps to its end: other views would be other augmentations.
        uses_cache: list[bool | None] = [*(self._state or {}).get("kept", []), None, None]
        self.image_features, self._dev_image_features = load_frozen_image_features(
            config, aligner, data, self.dtypes.kept_blocks, processes, uses_cache[0]
        )
        caption_features, self._dev_caption_features = load_frozen_caption_features(
            config, aligner, data, processes, uses_cache[1]
        )
        images, captions = (
            (self.image_features, self._dev_image_features),
            (caption_features, self._dev_caption_features),
        )
        for line in describe_frozen_towers(config, aligner, data, images, captions):
            logger.info(line)
        has_captions = (caption_features or self._dev_caption_features) is not None
        self._uses_cache = [self.image_features is not None, has_captions]
        self.lookup = FeatureLookup(self.image_features, caption_features, processes.device)
        self.batches = data.batches(config.augment, aligner, self.image_features, config.seed)
        data.count_cut_captions(aligner, self.batches)
        if len(self.batches) < processes.world_size:
            detail = f"{len(self.batches)} images for {processes.world_size} processes: each needs one a step"
            raise DataError(f"{config.data}: {detail}")

    def _plan_steps(self) -> None:
        """How many steps an epoch and the run have, and how far the run is."""
        config, state = self.config, self._state
        self.steps_per_epoch = self.batches.steps_per_epoch(config.batch, self.processes.world_size)
        self._partition = epoch_partition(self.processes, config.workers, self.steps_per_epoch)
        self.progress = TrainProgress() if state is None else TrainProgress.of(state["place"], config.best_by)
        if state is not None:
            is_stream = not isinstance(self.data.train, CaptionedImages)
            check_same_partition(state, self._partition, is_stream, self.out)
        # Those of epochs that are done were as many as the processes were then.
        finished_steps = self.progress.step - self.progress.step_in_epoch
        steps = finished_steps + self.steps_per_epoch * max(0, config.epochs - self.progress.epoch + 1)
        if config.steps > steps and state is None:
            logger.info(f"no effect of --steps: all epochs are {steps}")
        self.steps = min(steps, config.steps or steps, config.profile or steps)
        self.epochs = self.progress.epoch - 1 + -(-(self.steps - finished_steps) // self.steps_per_epoch)
        self._settings = (
            checkpoint_settings(config) if state is None else state.get("settings", checkpoint_settings(config))
        )

    def _build_optimizer(self) -> None:
        """All that changes while the model trains, and the gallery that it is measured on."""
        config, processes, aligner = self.config, self.processes, self.aligner
        ema_model = copy.deepcopy(aligner)
        ema_model.show_progress = processes.is_main
        self.timings = Timings(exact=config.profile > 0)
        towers = Towers(aligner, self.loss_fn, self.dtypes[:2])
        self.step = Step(towers, processes, config.negatives, config.fusion_weight, self.timings)
        self.optimizer = build_optimizer(config.optimizer, self.step)
        steps = self.steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: build_schedule(done, steps, config.warmup)
        )
        self.average = ExponentialMovingAverage(aligner, ema_model, config.ema)
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # Each process drops out, and draws views, of its own.
        seed_everything(config.seed + processes.rank)
        self.dev = DevGallery(
            self.data.dev, self._dev_image_features, self.loss_fn, config.batch, processes, self._dev_caption_features
        )
        if self.dev.halves is None and not config.profile:
            few = f"{len(self.data.dev)} dev images are too few to be halved"
            logger.info(f"{few}: what is chosen on dev will be measured on it too")
        self.train_state = TrainState(self.step.towers, self.average, self.optimizer, self.scheduler)

    def _begin(self) -> None:
        """Write the run folder, or restore the checkpoint; from here on the run folder is this run's."""
        config, processes, state = self.config, self.processes, self._state
        if state is not None:
            self._resume(state)
            self.data.resume_counts(self.batches, state, processes)
        else:
            if self.stage is not None:
                processes.run_on_main(self.stage.begin)
            reduced = self.reduced_width
            write = partial(write_run_files, self.out, self.recorded, self.data, self.aligner, self._again, reduced)
            processes.run_on_main(write)
        if config.chunk >= images_per_process(config.schedule, processes.world_size):
            # Not in the settings, as they are recorded: on fewer processes it may count.
            self.config = replace(config, chunk=0)
        if self.trackers:
            purge = {"tensorboard": {"purge_step": self.progress.step + 1}} if "tensorboard" in self.trackers else {}
            processes.run_on_all(
                lambda: processes.accelerator.init_trackers(TRACKER_FOLDER, config=None, init_kwargs=purge)
            )
        self._saved_at = time.perf_counter()
        self._started_at = self._saved_at - self.progress.seconds
        #: The step that the last checkpoint is of.
        self.checkpoint_step = self.progress.step if state is not None else None
        self._state = None
        self._load_start_vectors(is_new=state is None)

    def _load_start_vectors(self, is_new: bool) -> None:
        """What a distillation keeps near: computed before the first step, and read by a run that resumes."""
        config, processes, train = self.config, self.processes, self.data.train
        if not config.distill or not config.epochs or config.freeze == "all":
            return
        assert isinstance(train, CaptionedImages)
        if is_new:
            stage = self.stage
            # Nothing that is done here is a part of what the run draws at random.
            with preserve_rng_state():
                if stage is not None and stage.number:
                    original = stage.recorded_start(config)
                    _, directions = self._find_directions(original, processes.device)
                    start = processes.run_on_all(lambda: build_start(original, processes.device, directions))
                    write_start_vectors(self.out, start, train, processes)
                else:
                    write_start_vectors(self.out, self.average.model(), train, processes, self.lookup)
        start_vectors = processes.run_on_all(lambda: StartVectors.open(self.out))
        self.step.distillation = Distillation(config.distill, start_vectors)

    def _measure_start(self) -> None:
        """Measure the model that the run starts from on dev, before the first step; every process calls this."""
        config, progress = self.config, self.progress
        if progress.step or progress.start or not starts_from_model(config) or config.freeze == "all":
            return
        if config.profile or not config.epochs:
            return
        with preserve_rng_state():
            metrics = self.dev.measure(self.average.model())
            positives = self.dev.positives
            rsum = metrics_of_ranks(metrics.metrics.ranks, positives.caption_image, unit=positives.identity).rsum
        progress.start = [rsum.value, rsum.low, rsum.high]
        self.processes.run_on_main(lambda: record_start(metrics, rsum, self.records))
        logger.info(start_line(metrics, rsum))

    def _resume(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)

        def truncate_metrics() -> None:
            # What was recorded after the checkpoint is done, and recorded, once more.
            with (self.out / "metrics.jsonl").open("a") as records:
                records.truncate(min(self.progress.records, records.tell()))

        self.processes.run_on_main(truncate_metrics)
        logger.info(f"{self.out}: resumes after step {self.progress.step}, in epoch {self.progress.epoch}")

    @property
    def recorded(self) -> RunConfig:
        """The settings that the run folder records: of the last stage of a run, those of the whole run."""
        return self.config if self.stage is None else self.stage.recorded(self.config)

    def state_dict(self) -> dict[str, Any]:
        """All that the run needs to be resumed, as a checkpoint holds it; every process calls this.

        The weights, moving average and optimizer state are absent where they are sharded: `save_checkpoint` writes
        those from all processes.

        Returns:
            Tensors, numbers, texts, and lists and dictionaries of these, which `load_state_dict` takes.
        """
        processes = self.processes
        state: dict[str, Any] = {"place": asdict(self.progress), "opened": self._contents, "settings": self._settings}
        state |= {**self._partition, "kept": self._uses_cache, "reads_images": self._reads_images}
        state |= {"precision": list(map(dtype_name, self.dtypes))}
        state |= {"counted": processes.all_gather_object(self.batches.counters())}
        return state | self.train_state.state_dict(processes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; every process calls this.

        Args:
            state: What `state_dict` returned, or `load_last_checkpoint` has read.

        Raises:
            ValueError: The state is of a sharded run and this one is not, or the other way round.
        """
        self.train_state.load(state, self.processes)
        self.progress = TrainProgress.of(state["place"], self.config.best_by)
