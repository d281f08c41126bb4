"""The training loop, from settings to a run folder; `train` reads from top to bottom.

- One step: B images with all of their captions; the images go through their tower once.
- The weights that are kept are a moving average of the trained ones (`ema`), measured on the whole dev gallery after
  each epoch; the best epoch by dev rsum (or dev loss, `best_by`) is the run's model. No test picture is opened.
- The run's figures are cross-fitted: each half of dev by what the other half chose (`cross_fit.py`).
- A frozen picture tower's features are computed once and kept on disk, in several views of each picture.
- A run that was stopped, however, goes on from its last checkpoint (`resume`) and ends as the undisturbed one: bit for
  bit on a CPU.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipvisionalign.batch import Batch
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.streams import too_many_bad
from clipvisionalign.files import held
from clipvisionalign.models.aligner import Aligner, Remembered, config_from_dict, pin_towers
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
from clipvisionalign.training.checkpoint import FOLDER as CHECKPOINTS
from clipvisionalign.training.checkpoint import asked_to_stop, checkpoints_in, last_checkpoint
from clipvisionalign.training.config import RunConfig, check_settings, keeps_features, share_of_step
from clipvisionalign.training.cross_fit import keep_models, prune_models
from clipvisionalign.training.dev import DevGallery
from clipvisionalign.training.diagnosis import EpochFigures, diagnose
from clipvisionalign.training.epoch_log import _epoch_line, end_of_epoch, progress_line
from clipvisionalign.training.feature_cache import CaptionCache, FeatureCache
from clipvisionalign.training.fine_tuning import WeightAverage, keep_frozen_still, merged
from clipvisionalign.training.init_run import check_init
from clipvisionalign.training.optimizer import _optimizer, _schedule
from clipvisionalign.training.precision import _short, find_formats
from clipvisionalign.training.processes import Processes
from clipvisionalign.training.profiling import Timed, Timings
from clipvisionalign.training.records import Records, Say, _nothing
from clipvisionalign.training.results import measure
from clipvisionalign.training.resuming import dealt, recorded, refuse_other_deal, refuse_other_settings
from clipvisionalign.training.run_folder import (
    BEGUN,
    LOCK,
    TRACKED,
    _prepare_folder,
    _write_json,
    _write_records,
    _write_results,
    begun_in,
    in_directory,
    remove_unfinished,
)
from clipvisionalign.training.state import Place, Whole, _go_on, restore_aligner
from clipvisionalign.training.step import Known, Step, StepFigures, Towers
from clipvisionalign.training.trained_on import keep_trained_on
from clipvisionalign.training.training_data import (
    frozen_captions,
    frozen_features,
    open_data,
    refuse_changed,
    refuse_other_data,
)
from clipvisionalign.training.without_effect import without_effect


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
    remembered: Remembered | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train an aligner as `config` says, and leave a complete run folder. Returns what its results.json holds.

    state: of a checkpoint, to go on from there; again: a run that came to none is begun once more in its folder; see
    `resume`. remembered: what the same frozen towers gave in other runs of this process, to be used and added to. Under
    a launcher every process calls this.

    Raises DataError for unusable data, FileExistsError for a run folder that is there already, WeightsNotFound, and
    ValueError for settings that do not fit each other.
    """
    with ExitStack() as until_it_ends:
        return _train(config, say, state, again, until_it_ends, remembered)


def _train(
    config: RunConfig, say: Say, state: dict[str, Any] | None, again: bool, until_it_ends: ExitStack,
    remembered: Remembered | None,
) -> dict[str, Any]:  # fmt: skip
    check_settings(config)
    device, usable, words = found_here(config)
    processes = _processes(config, device, usable)
    if not processes.first:
        say = _nothing
    for line in words:
        say(line)
    out, device = Path(config.out), processes.device
    if state is None:
        for line in without_effect(config, processes.count):
            say(line)
        if config.init:
            processes.first_does(lambda: check_init(config.init))
        processes.first_does(lambda: _prepare_folder(config, again, until_it_ends))
    processes.first_does(lambda: until_it_ends.enter_context(held(out / LOCK, "trains this run")))
    seed_everything(config.seed)

    data = open_data(config, say, processes, begins=state is None)
    # A profile goes on nowhere.
    opened = (
        {} if config.profile else processes.first_does(lambda: data.opened(keeps_features(config), processes.first))
    )
    if state is not None:
        refuse_other_data(state, opened, config, out)
    # One process fetches the towers' weights; from then on the commit is known, and the others find it in the cache.
    config = replace(config, model=processes.first_does(lambda: pin_towers(config.model, say)))
    aligner = processes.each(lambda: _build(config, device, say, begins=state is None), patient=True)
    if state is not None:
        # Before anything is made of them: what is frozen, its features, and the copy that is kept are the checkpoint's.
        restore_aligner(aligner, state)
    refuse_mixed_statistics(aligner, config, processes)
    loss_of = _loss(config, aligner)
    # A machine may time its formats otherwise the next time: a run that goes on keeps those that it was begun in.
    with long_step("timing the number formats", shown=processes.first):
        formats = processes.first_does(partial(find_formats, config, aligner, state))
    say(
        f"design {config.model.design}: {config.model.image_tower.name} in {_short(formats[0])} + "
        f"{config.model.text_tower.name} in {_short(formats[1])} on {device}"
        f"{f' and {processes.count - 1} more' if processes.many else ''}, "
        f"{aligner.parameter_count() / 1e6:.1f} M parameters, {_trained(aligner) / 1e6:.1f} M of them trained"
    )
    if config.compile:
        for tower in (aligner.image_tower, aligner.text_tower):
            tower.compile(dynamic=True)
    # What a run keeps on disk it keeps to its end: other views would be other augmentations.
    keeps: list[bool | None] = [*(state or {}).get("kept", []), None, None]
    features, dev_features = frozen_features(config, aligner, data, formats[0], say, processes, keeps[0])
    read, dev_read = frozen_captions(config, aligner, data, say, processes, keeps[1])
    knows = Knowledge(features, read, device)
    batches = data.batches(config.augment, aligner, features)
    data.count_cut(aligner, batches, say)
    if len(batches) < processes.count:
        raise DataError(f"{config.data}: {len(batches)} images for {processes.count} processes: each needs one a step")
    in_epoch = batches.steps(config.batch, processes.count)
    how_dealt = dealt(processes, config.workers, in_epoch)
    where = Place() if state is None else Place.of(state["place"], config.best_by)
    if state is not None:
        refuse_other_deal(state, how_dealt, not isinstance(data.train, CaptionedImages), out)
    # Those of epochs that are done were as many as the processes were then.
    before = where.step - where.step_in_epoch
    steps = before + in_epoch * max(0, config.epochs - where.epoch + 1)
    if config.steps > steps and state is None:
        say(f"no effect of --steps: all epochs are {steps}")
    steps = min(steps, config.steps or steps, config.profile or steps)
    epochs = where.epoch - 1 + -(-(steps - before) // in_epoch)
    settings = recorded(config) if state is None else state.get("settings", recorded(config))

    kept = copy.deepcopy(aligner)
    kept.show_progress = processes.first
    timings = Timings(exact=config.profile > 0)
    step = Step(Towers(aligner, loss_of, formats), processes, config.negatives, config.fusion_weight, timings)
    optimizer = _optimizer(config, step)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _schedule(done, steps, config.warmup))
    average = WeightAverage(aligner, kept, config.ema)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Each process drops out, and looks at views, of its own.
    seed_everything(config.seed + processes.number)

    dev = DevGallery(data.dev, dev_features, loss_of, config.batch, processes, dev_read)
    if dev.halves is None and not config.profile:
        say(f"{len(data.dev)} dev images are too few to be halved: what is chosen on dev will be measured on it too")
    whole = Whole(step.towers, average, optimizer, scheduler)
    if state is not None:
        where = _go_on(state, whole, out, say, processes, config.best_by)
        data.count_on(batches, state, processes)
    else:
        processes.first_does(partial(_write_records, out, config, data, aligner, again, say))
    if config.chunk >= share_of_step(config, processes.count):
        # Not in the settings, as they are recorded: on fewer processes it may count.
        config = replace(config, chunk=0)
    if usable:
        purge = {"tensorboard": {"purge_step": where.step + 1}} if "tensorboard" in usable else {}
        processes.each(lambda: processes.accelerator.init_trackers(TRACKED, config=None, init_kwargs=purge))
    saved = start = time.perf_counter()
    start -= where.seconds
    # The step that the last checkpoint is of.
    kept_step = where.step if state is not None else None

    def last_kept() -> str:
        if kept_step is None:
            return "there is no checkpoint before it"
        return f"the last good checkpoint, of step {kept_step}, is in {out / CHECKPOINTS}"

    def refuse_not_finite() -> None:
        if not all(processes.everyone(lambda: whole.is_finite())):
            # What a run would go on from, and every one that is resumed.
            raise FloatingPointError(f"step {where.step}: weights are not finite; {last_kept()}")

    def keep() -> bool:
        nonlocal saved, kept_step
        refuse_not_finite()
        where.seconds = time.perf_counter() - start
        try:
            where.records = processes.first_does(records.tell)
            about: dict[str, Any] = {"place": asdict(where), "opened": opened, "settings": settings, **how_dealt}
            about |= {"kept": [features is not None, (read or dev_read) is not None]}
            about |= {"precision": list(map(_short, formats)), "counted": processes.objects(batches.counted())}
            whole.save(out, where.step, about, processes)
        except OSError as error:
            before = "the one before it is kept" if checkpoints_in(out) else "there is none before it"
            say(f"warning: no checkpoint at step {where.step}: {error}; training goes on, {before}")
            return False
        finally:
            saved = time.perf_counter()
        kept_step = where.step
        return True

    def leave() -> None:
        told = f"stopped after step {where.step}"
        if kept_step != where.step:
            told += ", which was not kept: "
            told += "there is no checkpoint" if kept_step is None else f"the last checkpoint is of step {kept_step}"
        again = "; begin anew with" if kept_step is None else "; go on with"
        say(f"{told}{again}: clipvisionalign train --resume {out}")
        raise KeyboardInterrupt

    # A run may have been stopped after its last epoch: then there is none to do, and no such model.
    model: Aligner | None = None
    tracked = processes.accelerator if usable else None
    records = processes.each(lambda: Records(out, tracked, processes.first))
    shown = progress_line(steps, where.step, processes.first)
    with asked_to_stop(processes.many) as stop, shown as show, closing(records):
        while where.epoch <= epochs and not where.stopped:
            epoch = where.epoch
            aligner.train()
            keep_frozen_still(aligner, config.freeze)
            images_seen, epoch_start = 0, time.perf_counter()
            workers = 0 if features else config.workers
            deal = (config.batch, epoch, config.seed, workers, where.step_in_epoch, processes.share)
            stream = Timed(batches.epoch(*deal, config.chunk), timings)
            for number in range(where.step_in_epoch, in_epoch):
                if where.step == steps:
                    break
                chunks = batches.chunks(config.batch, number, config.chunk, processes.count)
                figures = take_step(step, stream, config, knows, chunks)
                where.step_in_epoch += 1
                where.left_out += figures.left_out
                # Each process knows its own.
                for reasons in processes.objects(figures.skipped) if figures.left_out else []:
                    for reason in reasons:
                        say(f"left out: {reason}")
                if not figures.images:
                    # It counts as one of those that were planned, so that the schedule ends where it should.
                    where.step, where.skipped = where.step + 1, where.skipped + 1
                    say(f"step {where.step}: none: too few of its images could be read")
                    with warnings.catch_warnings():
                        # PyTorch thinks that the first step of the optimiser was forgotten.
                        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
                        scheduler.step()
                    if too_many_bad(where.skipped, steps):
                        told = "steps were none: too few of their images could be read"
                        raise DataError(f"{config.data}: {where.skipped} of {where.step} {told}; {last_kept()}")
                else:
                    with timings("optimiser"):
                        norm = processes.clip(parameters, 1.0)
                        for what, value in (("loss is", figures.loss + figures.pair_loss), ("gradients are", norm)):
                            if not math.isfinite(value):
                                told = f"step {where.step + 1}: the {what} not finite; its pictures: "
                                raise FloatingPointError(f"{told}{', '.join(figures.names)}, ...; {last_kept()}")
                        optimizer.step()
                        scheduler.step()
                        aligner.limit_temperatures()
                        average.update()
                        optimizer.zero_grad(set_to_none=True)

                    images_seen += figures.images
                    values = np.array([figures.loss, figures.pair_loss, figures.accuracy])
                    where.count(values)
                    show(where.step, values, images_seen / (time.perf_counter() - epoch_start), where.best)
                    if where.step % 10 == 0 or where.step == 1:
                        now = {"loss": figures.loss, "fusion_loss": figures.pair_loss, "accuracy": figures.accuracy}
                        processes.first_does(partial(records.write, where.step, epoch=epoch, **now))
                if config.profile and where.step == steps:
                    taken = where.step - where.skipped
                    found = {"profile": timings.taken(), "loading": stream.loading, "steps": taken}
                    if processes.first:
                        shutil.rmtree(out)
                    if not taken:
                        told = "steps could be taken: hardly an image could be read"
                        raise DataError(f"{config.data}: none of {where.step} {told}")
                    return {**found, "images": images_seen, "tokenise": batches.tokenise_seconds}
                asked, late = asked_of_any(processes, stop, time.perf_counter() - saved)
                if asked or late > 60 * config.checkpoint_minutes:
                    keep()
                if asked:
                    leave()

            refuse_not_finite()
            # Of an image without features it was known before the epoch that it cannot be read.
            where.left_out += len(features.failures) if features else 0
            model = average.model()
            figures_of_dev = dev.measure(model)
            seconds = time.perf_counter() - start
            per_step = min(config.batch, len(batches))
            shape = per_step, round(per_step * batches.captions_per_image)
            end = partial(end_of_epoch, where, figures_of_dev, shape, records, timings, seconds)
            processes.each(end)
            say(_epoch_line(epoch, epochs, where, figures_of_dev, seconds, model))
            history = [EpochFigures(*figures) for figures in where.history]
            vectors = figures_of_dev.image_vectors, figures_of_dev.caption_vectors
            for words_of in diagnose(history, *vectors, config.best_by):
                say(f"warning: {words_of}")
            best_before = where.best_epoch
            where.choose(figures_of_dev, config)
            processes.first_does(partial(_keep_models, config, out, model, where, best_before, say))
            if where.stopped:
                told = f"no better dev {config.best_by} for {config.patience} epochs"
                say(f"{told}: stopped; the best was epoch {where.best_epoch}")
            where.next_epoch()
            if keep():
                processes.first_does(partial(prune_models, out, where.chosen))
            if asked_of_any(processes, stop)[0]:
                leave()

    seconds = time.perf_counter() - start
    if where.skipped == where.step:
        raise DataError(f"{config.data}: none of {where.step} steps could be taken: hardly an image could be read")
    if where.skipped:
        say(f"{where.skipped} of {where.step} steps were none: too few of their images could be read")
    if data.count_stream(batches, say, processes):
        processes.first_does(lambda: _write_json(out / "data.json", data.about()))
    processes.wait()
    # The measuring has the memory for itself.
    vars(whole).clear()
    del step, aligner, kept, model, average, optimizer
    say(f"best epoch {where.best_epoch}; measuring the saved model on the whole dev gallery")
    with long_step("measuring the saved model", shown=processes.first):
        results = measure(config, where, dev, out, processes, say, remembered)
    results |= {"best_epoch": where.best_epoch, "training_seconds": round(seconds, 1)}
    results |= {"steps": where.step - where.skipped, "steps_skipped": where.skipped, "images_left_out": where.left_out}
    processes.first_does(lambda: keep_trained_on(out, data.train, say, processes.first))
    processes.first_does(partial(_write_results, out, results))
    processes.end()
    return results


@dataclass
class Knowledge:
    """What is known of a batch without its towers. features: of pictures, each seen in a view drawn at random;
    captions: what the text tower gives for all training captions."""

    features: FeatureCache | None
    captions: CaptionCache | None
    device: torch.device

    def __call__(self, batch: Batch) -> Known:
        images, captions = None, None
        if self.features is not None:
            views = torch.randint(self.features.views, (len(batch),))
            images = self.features(batch.image_index, views, self.device)
        if self.captions is not None and batch.caption_index is not None:
            captions = self.captions(batch.caption_index, self.device)
        return Known(images, captions)


def asked_of_any(processes: Processes, stop: Callable[[], bool], late: float = 0.0) -> tuple[bool, float]:
    """Whether any process has been asked to stop, since all have to at the same step; and the first one's `late`."""
    told = processes.everyone(lambda: (stop(), late), patient=True)
    return any(asked for asked, _ in told), told[0][1]


def take_step(
    step: Step, stream: Iterator[Batch], config: RunConfig, knows: Callable[[Batch], Known], chunks: int
) -> StepFigures:
    """The gradients of the next batch, and what it showed; its `images` are 0 where it could not be taken.

    chunks: in how many the stream gives the batch, twice; 0 where it comes whole, and is cut here if it has to be.
    """
    processes, device = step.processes, step.processes.device
    if chunks:
        return step.cached((batch.to(device) for batch in stream), chunks, knows)
    read: list[Batch] = []

    def one_more() -> int:
        read.append(next(stream).to(device))
        return len(read[0])

    # Every process takes part in a step, or none.
    sizes, batch = processes.everyone(one_more), read[0]
    if min(sizes) == 0 or sum(sizes) < 2:
        return step.none([batch])
    if config.chunk:
        # As many on every process: a sharded model is called together.
        count = min(-(-max(sizes) // config.chunk), min(sizes))
        parts = [part.to(device) for part in batch.chunks(count, step.aligner.text_tower.pad)]
        return step.cached(iter([*parts, *parts]), len(parts), knows)
    return step.whole(batch, knows(batch))


def _keep_models(config: RunConfig, out: Path, model: Aligner, where: Place, before: int, say: Say) -> None:
    def save(folder: Path) -> None:
        (merged(model) if config.peft == "lora" else model).save(folder)

    try:
        keep_models(out, save, where.epoch, before, where.chosen)
    except OSError as error:
        if where.best_epoch == where.epoch:
            # What a half chose can be done without, the run's own model cannot.
            save(out)
        say(f"warning: a half of dev chose another epoch than all of dev, and its model was not kept: {error}")
