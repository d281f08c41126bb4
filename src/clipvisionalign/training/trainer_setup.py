"""What stands before the first step of a training: run folder, data, model, frozen features, steps, optimizer."""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.files import held
from clipvisionalign.models.io import pin_towers
from clipvisionalign.progress import long_step
from clipvisionalign.training.build import (
    _build,
    _loss,
    _processes,
    _trained,
    found_here,
    refuse_mixed_statistics,
    seed_everything,
)
from clipvisionalign.training.config import RunConfig, check_settings, keeps_features, share_of_step
from clipvisionalign.training.dev import DevGallery
from clipvisionalign.training.fine_tuning import WeightAverage
from clipvisionalign.training.forward import Knowledge, Towers
from clipvisionalign.training.frozen_features import frozen_captions, frozen_features
from clipvisionalign.training.init_run import check_init
from clipvisionalign.training.optimizer import _optimizer, _schedule
from clipvisionalign.training.precision import _short, find_formats
from clipvisionalign.training.processes import Processes
from clipvisionalign.training.profiling import Timings
from clipvisionalign.training.records import Say, _nothing
from clipvisionalign.training.resuming import dealt, recorded, refuse_other_deal
from clipvisionalign.training.run_folder import LOCK, TRACKED, _prepare_folder, _write_records
from clipvisionalign.training.state import Place, Whole, restore_aligner
from clipvisionalign.training.step import Step
from clipvisionalign.training.training_data import open_data, refuse_other_data
from clipvisionalign.training.without_effect import without_effect


class TrainerSetup:
    """The parts of a `Trainer`, each made by one method, in the order in which they stand here."""

    def __init__(self, config: RunConfig, say: Say, state: dict[str, Any] | None, again: bool) -> None:
        self.config, self.say = config, say
        self.out = Path(config.out)
        self._state, self._again = state, again

    def _open(self, stack: ExitStack) -> None:
        """Check the settings, prepare and lock the run folder, open the data."""
        config, state = self.config, self._state
        check_settings(config)
        device, self.trackers, tracker_messages = found_here(config)
        self.processes: Processes = _processes(config, device, self.trackers)
        processes = self.processes
        if not processes.first:
            self.say = _nothing
        for line in tracker_messages:
            self.say(line)
        if state is None:
            for line in without_effect(config, processes.count):
                self.say(line)
            if config.init:
                processes.first_does(lambda: check_init(config.init))
            processes.first_does(lambda: _prepare_folder(config, self._again, stack))
        processes.first_does(lambda: stack.enter_context(held(self.out / LOCK, "trains this run")))
        seed_everything(config.seed)

        self.data = open_data(config, self.say, processes, begins=state is None)
        # A profile is never resumed.
        self._contents: dict[str, dict[str, str]] = (
            {}
            if config.profile
            else processes.first_does(lambda: self.data.opened(keeps_features(config), processes.first))
        )
        if state is not None:
            refuse_other_data(state, self._contents, config, self.out)

    def _build_model(self) -> None:
        """The model on its device, its loss, and the number format of each tower."""
        processes, state, device = self.processes, self._state, self.processes.device
        # One process fetches the towers' weights; from then on the commit is known: the others find it in the cache.
        pinned = processes.first_does(lambda: pin_towers(self.config.model, self.say))
        self.config = config = replace(self.config, model=pinned)
        self.aligner = aligner = processes.each(
            lambda: _build(config, device, self.say, begins=state is None), patient=True
        )
        if state is not None:
            # Before anything is made of them: what is frozen, its features, and the averaged copy are the checkpoint's.
            restore_aligner(aligner, state)
        refuse_mixed_statistics(aligner, config, processes)
        self.loss_fn = _loss(config, aligner)
        # A machine may time its formats otherwise the next time: a resumed run keeps those that it was begun in.
        with long_step("timing the number formats", shown=processes.first):
            self.dtypes = processes.first_does(partial(find_formats, config, aligner, state))
        image_dtype, text_dtype = map(_short, self.dtypes)
        self.say(
            f"design {config.model.design}: {config.model.image_tower.name} in {image_dtype} + "
            f"{config.model.text_tower.name} in {text_dtype} on {device}"
            f"{f' and {processes.count - 1} more' if processes.many else ''}, "
            f"{aligner.parameter_count() / 1e6:.1f} M parameters, {_trained(aligner) / 1e6:.1f} M of them trained"
        )
        if config.compile:
            for tower in (aligner.image_tower, aligner.text_tower):
                tower.compile(dynamic=True)

    def _load_features(self) -> None:
        """Frozen towers' outputs, and what deals the training split into batches."""
        config, processes, aligner, data = self.config, self.processes, self.aligner, self.data
        # What a run keeps on disk it keeps to its end: other views would be other augmentations.
        uses_cache: list[bool | None] = [*(self._state or {}).get("kept", []), None, None]
        self.image_features, self._dev_image_features = frozen_features(
            config, aligner, data, self.dtypes[0], self.say, processes, uses_cache[0]
        )
        caption_features, self._dev_caption_features = frozen_captions(
            config, aligner, data, self.say, processes, uses_cache[1]
        )
        has_captions = (caption_features or self._dev_caption_features) is not None
        self._uses_cache = [self.image_features is not None, has_captions]
        self.lookup = Knowledge(self.image_features, caption_features, processes.device)
        self.batches = data.batches(config.augment, aligner, self.image_features)
        data.count_cut(aligner, self.batches, self.say)
        if len(self.batches) < processes.count:
            detail = f"{len(self.batches)} images for {processes.count} processes: each needs one a step"
            raise DataError(f"{config.data}: {detail}")

    def _plan_steps(self) -> None:
        """How many steps an epoch and the run have, and how far the run is."""
        config, state = self.config, self._state
        self.steps_per_epoch = self.batches.steps(config.batch, self.processes.count)
        self._partition = dealt(self.processes, config.workers, self.steps_per_epoch)
        self.progress = Place() if state is None else Place.of(state["place"], config.best_by)
        if state is not None:
            is_stream = not isinstance(self.data.train, CaptionedImages)
            refuse_other_deal(state, self._partition, is_stream, self.out)
        # Those of epochs that are done were as many as the processes were then.
        finished_steps = self.progress.step - self.progress.step_in_epoch
        steps = finished_steps + self.steps_per_epoch * max(0, config.epochs - self.progress.epoch + 1)
        if config.steps > steps and state is None:
            self.say(f"no effect of --steps: all epochs are {steps}")
        self.steps = min(steps, config.steps or steps, config.profile or steps)
        self.epochs = self.progress.epoch - 1 + -(-(self.steps - finished_steps) // self.steps_per_epoch)
        self._settings = recorded(config) if state is None else state.get("settings", recorded(config))

    def _build_optimizer(self) -> None:
        """All that changes while the model trains, and the gallery that it is measured on."""
        config, processes, aligner = self.config, self.processes, self.aligner
        kept = copy.deepcopy(aligner)
        kept.show_progress = processes.first
        self.timings = Timings(exact=config.profile > 0)
        towers = Towers(aligner, self.loss_fn, self.dtypes)
        self.step = Step(towers, processes, config.negatives, config.fusion_weight, self.timings)
        self.optimizer = _optimizer(config, self.step)
        steps = self.steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: _schedule(done, steps, config.warmup)
        )
        self.average = WeightAverage(aligner, kept, config.ema)
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # Each process drops out, and draws views, of its own.
        seed_everything(config.seed + processes.number)
        self.dev = DevGallery(
            self.data.dev, self._dev_image_features, self.loss_fn, config.batch, processes, self._dev_caption_features
        )
        if self.dev.halves is None and not config.profile:
            few = f"{len(self.data.dev)} dev images are too few to be halved"
            self.say(f"{few}: what is chosen on dev will be measured on it too")
        self.train_state = Whole(self.step.towers, self.average, self.optimizer, self.scheduler)

    def _begin(self) -> None:
        """Write the run folder, or restore the checkpoint; from here on the run folder is this run's."""
        config, processes, state = self.config, self.processes, self._state
        if state is not None:
            self._resume(state)
            self.data.count_on(self.batches, state, processes)
        else:
            write = partial(_write_records, self.out, config, self.data, self.aligner, self._again, self.say)
            processes.first_does(write)
        if config.chunk >= share_of_step(config, processes.count):
            # Not in the settings, as they are recorded: on fewer processes it may count.
            self.config = replace(config, chunk=0)
        if self.trackers:
            purge = {"tensorboard": {"purge_step": self.progress.step + 1}} if "tensorboard" in self.trackers else {}
            processes.each(lambda: processes.accelerator.init_trackers(TRACKED, config=None, init_kwargs=purge))
        self._saved_at = time.perf_counter()
        self._started_at = self._saved_at - self.progress.seconds
        #: The step that the last checkpoint is of.
        self.checkpoint_step = self.progress.step if state is not None else None
        self._state = None

    def _resume(self, state: dict[str, Any]) -> None:
        self.load_state_dict(state)

        def truncate_metrics() -> None:
            # What was recorded after the checkpoint is done, and recorded, once more.
            with (self.out / "metrics.jsonl").open("a") as records:
                records.truncate(min(self.progress.records, records.tell()))

        self.processes.first_does(truncate_metrics)
        self.say(f"{self.out}: goes on after step {self.progress.step}, in epoch {self.progress.epoch}")

    def state_dict(self) -> dict[str, Any]:
        """All that the run needs to be resumed, as a checkpoint holds it; every process calls this.

        The weights, moving average and optimizer state are absent where they are sharded: `save_checkpoint` writes
        those from all processes.
        """
        processes = self.processes
        state: dict[str, Any] = {"place": asdict(self.progress), "opened": self._contents, "settings": self._settings}
        state |= {**self._partition, "kept": self._uses_cache, "precision": list(map(_short, self.dtypes))}
        state |= {"counted": processes.objects(self.batches.counted())}
        return state | self.train_state.state_dict(processes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, or what `last_checkpoint` has read; every process calls this.

        Raises ValueError where the state is of a sharded run and this one is not, or the other way round.
        """
        self.train_state.load(state, self.processes)
        self.progress = Place.of(state["place"], self.config.best_by)
