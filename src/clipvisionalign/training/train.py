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
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial, reduce
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.batch import Batch, group_by_length
from clipvisionalign.data.captioned import CaptionedImages, DataError, Identity
from clipvisionalign.data.streams import too_many_bad
from clipvisionalign.data.trained_on import TRAINED_ON
from clipvisionalign.files import PART, held, remove, remove_empty, written_aside
from clipvisionalign.models.aligner import (
    HEADS,
    IMAGE_FOLDER,
    REMEMBERED,
    TEXT_FOLDER,
    WEIGHTS_FILE,
    Aligner,
    AlignerConfig,
    Remembered,
    config_from_dict,
    load_aligner,
    pin_towers,
)
from clipvisionalign.models.device import best_device, machine, quick_format, versions
from clipvisionalign.models.text_families import kept_random_states
from clipvisionalign.progress import long_step
from clipvisionalign.retrieval.evaluate import RANKS
from clipvisionalign.training.checkpoint import FOLDER as CHECKPOINTS
from clipvisionalign.training.checkpoint import (
    asked_to_stop,
    checkpoints_in,
    last_checkpoint,
    load_sharded,
    names_in,
    random_states,
    restore_random_states,
    save_checkpoint,
    save_sharded,
)  # fmt: skip
from clipvisionalign.training.cross_fit import (
    HALF_MODELS,
    PAIR_WEIGHTS,
    BestEpoch,
    DevScores,
    chosen_dict,
    cross_fitted,
    evaluation_of,
    half_model,
    keep_models,
    prune_models,
    stitched,
)  # fmt: skip
from clipvisionalign.training.dev import DevFigures, DevGallery, Shared
from clipvisionalign.training.diagnosis import EpochFigures, diagnose
from clipvisionalign.training.feature_cache import CaptionCache, FeatureCache
from clipvisionalign.training.fine_tuning import (
    IMAGE_FROZEN,
    LoraConfig,
    WeightAverage,
    add_lora,
    freeze,
    keep_frozen_still,
    merged,
    norms,
    optimizer_groups,
)  # fmt: skip
from clipvisionalign.training.init_run import INIT_FILE, InitRun, check_init, refuse_frozen_at_random, start_from
from clipvisionalign.training.losses import LossConfig, PairLoss
from clipvisionalign.training.processes import Processes, own_part
from clipvisionalign.training.records import Records, usable_trackers
from clipvisionalign.training.resuming import dealt, recorded, refuse_other_deal, refuse_other_settings
from clipvisionalign.training.step import Known, Step, StepFigures, Towers
from clipvisionalign.training.timing import Timings
from clipvisionalign.training.trained_on import keep_trained_on
from clipvisionalign.training.training_data import (
    TrainingData,
    frozen_captions,
    frozen_features,
    keeps_features,
    open_data,
    refuse_changed,
    refuse_other_data,
)
from clipvisionalign.training.without_effect import share_of_step, without_effect

#: The folder of the trackers' records in a run folder.
TRACKED = "records"
#: All that a run writes in its folder beside its settings: a folder with other settings may have other things too.
WRITTEN = {
    "data.json", "environment.json", "weights.json", "metrics.jsonl", "results.json", RANKS, WEIGHTS_FILE, TEXT_FOLDER,
    IMAGE_FOLDER, HALF_MODELS, CHECKPOINTS, TRACKED, TRAINED_ON, INIT_FILE,
}  # fmt: skip
#: The settings of a run that has not yet come to its first step, and the directory in which it was begun.
BEGUN = "begun.yaml"
#: Held by the process that trains.
LOCK = "lock"
#: TensorBoard by default, where it is installed.
TRACKERS = "tensorboard"


@dataclass
class RunConfig:
    """A training run.

    Args:
        data: the data set: a folder or file in any of the known layouts; or a stream: WebDataset shards
            ("train-{000000..000099}.tar", or their folder), Parquet files by such a pattern, a folder of Hugging Face's
            `save_to_disk`.
        dev_data: where the dev split is, if not there.
        out: the run folder to write.
        layout: how the data set lies there; "auto" recognises it.
        group: a column of a table: without splits of its own, all images with one value of it stand in one split, as
            those of one identity do.
        identity: which captions belong to which images: "auto", an image's own, and those of all images of the identity
            that the data set gives it; "caption", also every caption that is equal to one of them word by word; "none",
            its own alone.
        model: the towers and the attention design.
        init: a finished run to start from, with the same towers, tokenizer and pooling; what it lacks (a fusion, say)
            starts anew, and has to be trained.
        epochs: passes over the training images.
        steps: end after so many steps, wherever in an epoch that is; 0 for all steps of all epochs.
        train_images: train on so many images only, the first by a hash of their names; 0 for all.
        batch: images in a step, over all processes; each brings all of its captions.
        chunk: images that go through the towers at a time, for batches beyond memory (gradient caching); 0 for all.
        text_lr: learning rate of the text tower.
        image_lr: learning rate of the picture tower, where it is trained.
        head_lr: learning rate of the projection heads and the fusion.
        loss: what the dual encoder is trained with.
        weight_decay: AdamW's.
        warmup: share of all steps in which the learning rates rise, before they fall along a cosine.
        ema: the kept weights are a moving average; after n steps it forgets by this factor a step, less at the start.
        freeze: which towers stay as they are; "all" also keeps the heads, so that the fusion alone is trained.
        freeze_layers: parameters that stay as they are, by name with *, such as "text_tower.encoder.encoder.layer.0.*".
        layer_decay: a tower's last layer learns at its rate, the one before at this times it, and so on.
        peft: "lora" trains low-rank adapters instead of a tower's own weights (needs clipvisionalign[scale]).
        lora: the adapters.
        augment: how training pictures vary; mirroring is left out by "crop", all variation by "none".
        views: how many variants of each picture are kept on disk for a frozen picture tower.
        negatives: hard negatives per image and per caption for the fusion of the design "cross".
        fusion_weight: weight of the late interaction's and the fusion's loss beside the dual encoder's.
        patience: epochs without a better dev figure after which training stops; all of dev, and each of its halves, has
            this patience of its own.
        best_by: what an epoch is chosen by on dev: "rsum", or "loss", the training's own loss of the dual encoder.
        seed: of everything drawn at random.
        precision: number format of training; "auto" times both towers in both and takes the quick one of each.
            Evaluation is in float32.
        device: "auto", "cpu", "cuda", ...
        workers: processes that decode pictures where the picture tower is trained.
        checkpoint_minutes: time between two checkpoints; one is also written after each epoch and when asked to
            stop.
        cache: where a frozen tower's features are kept: "auto" for the user's cache folder, a folder, or "off".
        trackers: where figures go beside metrics.jsonl, of tensorboard, wandb, mlflow, by commas; "" for nowhere.
        compile: let torch.compile make kernels for the towers; takes a minute at the start, and a C++ compiler. On the
            CPU measured (docs/results.md) a picture tower that only looks gained, a text tower that is trained lost.
        shard: with several processes, shard the parameters over them (FSDP2) instead of replicating them (DDP).
        profile: train so many steps, say where the time goes, and leave no run.
        overwrite: replace what is in the run folder.
    """

    data: str = ""
    dev_data: str = ""
    out: str = "runs/self"
    layout: str = "auto"
    group: str = ""
    identity: Identity = "auto"
    model: AlignerConfig = field(default_factory=AlignerConfig)
    init: str = ""
    epochs: int = 6
    steps: int = 0
    train_images: int = 0
    batch: int = 128
    chunk: int = 0
    text_lr: float = 1e-4
    image_lr: float = 3e-5
    head_lr: float = 1e-3
    loss: LossConfig = field(default_factory=LossConfig)
    weight_decay: float = 0.05
    warmup: float = 0.08
    ema: float = 0.99
    freeze: Literal["image", "text", "both", "none", "all"] = "image"
    freeze_layers: list[str] = field(default_factory=list)
    layer_decay: float = 1.0
    peft: Literal["none", "lora"] = "none"
    lora: LoraConfig = field(default_factory=LoraConfig)
    augment: Literal["flip+crop", "crop", "none"] = "flip+crop"
    views: int = 4
    negatives: int = 4
    fusion_weight: float = 1.0
    patience: int = 3
    best_by: Literal["rsum", "loss"] = "rsum"
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    workers: int = 2
    checkpoint_minutes: float = 5.0
    cache: str = "auto"
    trackers: str = TRACKERS
    compile: bool = False
    shard: bool = False
    profile: int = 0
    overwrite: bool = False


Say = Callable[[str], None]


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


def remove_unfinished(out: Path) -> None:
    """Remove what a run folder holds until the run is finished: a finished one goes on nowhere."""
    for name in (CHECKPOINTS, HALF_MODELS, LOCK):
        remove(out / name)


def begun_in(out: Path) -> Path:
    """The directory in which a run was begun; the current one, where that was not recorded."""
    try:
        told = json.loads((out / "environment.json").read_text()).get("directory")
    except (OSError, ValueError):
        # Cut off in the very first moment of a run.
        told = None
    return Path(told) if told and Path(told).is_dir() else Path.cwd()


def in_directory(config: RunConfig, directory: Path) -> RunConfig:
    """The same settings, with what they name by a relative path as it was found from `directory`."""
    if directory == Path.cwd():
        return config

    def found(name: str) -> str:
        if name in ("", "auto", "random", "off"):
            return name
        # A pattern of shards is no file: its folder is there.
        there = directory / name
        folder = next((parent for parent in [there, *there.parents] if "{" not in str(parent)), there)
        return name if Path(name).is_absolute() or not folder.exists() else str(there)

    image, text = config.model.image_tower, config.model.text_tower
    cache = config.cache if config.cache in ("auto", "off") else str(directory / config.cache)
    model = replace(
        config.model,
        image_tower=replace(image, weights=found(image.weights)),
        text_tower=replace(
            text,
            name=found(text.name) if (directory / text.name / "config.json").is_file() else text.name,
            weights=found(text.weights),
        ),
    )
    data, dev_data, init = found(config.data), found(config.dev_data), found(config.init)
    return replace(config, data=data, dev_data=dev_data, init=init, cache=cache, model=model)


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


#: What `find_formats` has found in this process, by all that it depends on.
_FORMATS: dict[str, tuple[torch.dtype, torch.dtype]] = {}


def find_formats(config: RunConfig, aligner: Aligner, state: dict[str, Any] | None) -> tuple[torch.dtype, torch.dtype]:
    """The number formats of the picture tower and of the text tower: those of a checkpoint, or found out by timing what
    each of them does in a step, there and, where it is trained, back."""
    if state is not None:
        image, text = (getattr(torch, name) for name in state["precision"])
        return image, text

    # Timed once in a process: the runs of a study that train alike compute alike.
    kind = repr((config.model.image_tower, config.model.text_tower, config.model.design, config.freeze,
                 config.freeze_layers, config.peft, config.lora, config.precision, aligner.device))  # fmt: skip
    if kind in _FORMATS:
        return _FORMATS[kind]

    def work(part: Callable[[], Tensor], module: torch.nn.Module) -> Callable[[], None]:
        trained = any(parameter.requires_grad for parameter in module.parameters())

        def run() -> None:
            with torch.set_grad_enabled(trained):
                found = part()
            if trained:
                found.float().square().mean().backward()
                module.zero_grad(set_to_none=True)

        return run

    device, size = aligner.device, aligner.image_tower.input.size
    aligner.train()
    keep_frozen_still(aligner, config.freeze)
    pixels = torch.randint(256, (8, 3, size, size), dtype=torch.uint8).to(device)
    ids = torch.randint(5, min(1000, aligner.text_tower.encoder.config.vocab_size), (64, 16)).to(device)

    def look(images: int) -> Callable[[], None]:
        return work(lambda: aligner.image_tower(pixels[:images]).patches, aligner.image_tower)

    def read(captions: int) -> Callable[[], None]:
        some = ids[:captions]
        return work(lambda: aligner.text_tower(some, torch.ones_like(some)).pooled, aligner.text_tower)

    states = [buffer.clone() for buffer in aligner.buffers()]
    random_before = random_states()
    # Two of each: a batch norm that trains needs more than one.
    found = (
        quick_format(device, look(8), config.precision, look(2)),
        quick_format(device, read(64), config.precision, read(2)),
    )
    # The trial leaves no trace: not in a batch norm's statistics, nor in what is drawn at random.
    restore_random_states(random_before)
    for buffer, before in zip(aligner.buffers(), states, strict=True):
        buffer.copy_(before)
    _FORMATS[kind] = found
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nothing(line: str) -> None:
    """What processes other than the first say."""


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


def are_finite(tensors: Collection[Tensor]) -> bool:
    """Whether no weight, of this process's part of them, is a NaN or infinite."""
    own = [part for part in (own_part(tensor.detach()) for tensor in tensors) if part.numel()]
    return all(math.isfinite(norm) for norm in torch._foreach_norm(own, math.inf)) if own else True


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


def can_be_remembered(config: RunConfig, data: CaptionedImages) -> bool:
    """Whether what a run's towers give for a data set is the same in every epoch, and little enough to be kept in
    memory."""
    frozen = config.freeze in ("both", "all") and config.peft == "none"
    return frozen and len(data) <= REMEMBERED[0] and len(data.captions) <= REMEMBERED[1]


def measure(
    config: RunConfig, where: Place, dev: DevGallery, out: Path, processes: Processes, say: Say,
    known: Remembered | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What results.json holds: cross-fitted figures of the whole dev gallery, what was chosen, and the run's own model
    on dev. Sets the model's weights of a pair's parts. Shared out over processes. known: as `remembered` in `train`."""

    # What stays the same in every epoch is computed once for the models that dev and its halves choose.
    remembered = (known or Remembered()) if can_be_remembered(config, dev.data) else None

    def scores_of(epoch: int) -> DevScores | None:
        folder = out if epoch == where.best_epoch else half_model(out, epoch)
        if not processes.first_does(folder.is_dir):
            return None
        aligner = processes.each(lambda: load_aligner(folder, str(processes.device)))
        aligner.show_progress, aligner.remembered = processes.first, remembered
        candidates = config.model.fusion.candidates if aligner.fusion is not None else 0
        return DevScores(Shared(aligner, processes), dev.data, candidates)

    halves = dev.halves
    scores, found = cross_fitted(scores_of, where.chosen, halves)
    weights = [chosen.weights for chosen in found]
    by_halves = f", by the halves {' and '.join(f'{each.late:g}' for each in weights[1:])}" if halves else ""
    if scores.late is not None:
        more = f", the fusion's correction {weights[0].fusion:g} times" if scores.fusion is not None else ""
        if more and halves:
            more += f", by the halves {' and '.join(f'{each.fusion:g}' for each in weights[1:])}"
        say(f"the late score counts {weights[0].late:g} times{by_halves}{more}, chosen on dev from {PAIR_WEIGHTS}")
        processes.first_does(lambda: scores.model.aligner.save(out))
    ranked = stitched(halves, found[1].ranked, found[2].ranked) if halves else found[0].ranked
    measured = evaluation_of(scores, ranked)
    processes.first_does(lambda: measured.save_ranks(out / RANKS))
    best_by = "last epoch" if config.freeze == "all" else config.best_by
    about = {"run": str(out), "data": config.data, "split": "dev"}

    def init_run() -> InitRun:
        # A run from before this was recorded finds it out now.
        return InitRun.load(out) or InitRun.of(out, config.init, Path(config.init), dev.data)

    init = processes.first_does(init_run) if config.init else InitRun("", "")
    chosen = chosen_dict(found, scores, halves, best_by, init.chosen_on, init.trained_on)
    return about | measured.to_dict() | {"chosen": chosen}


class Timed(Iterator[Batch]):
    """Batches, with the time that the training waits for them, and that was spent on making them."""

    def __init__(self, batches: Iterator[Batch], timings: Timings) -> None:
        self.batches, self.timings = batches, timings
        #: Seconds of work in the loader, by kind; with workers it goes on beside the training.
        self.loading: dict[str, float] = {}

    def __next__(self) -> Batch:
        with self.timings("waiting for data"):
            batch = next(self.batches)
        for kind, seconds in batch.seconds.items():
            self.loading[kind] = self.loading.get(kind, 0.0) + seconds
        return batch


class Whole:
    """All that changes while a model trains, to save and to load: as one file, or sharded as the model is."""

    def __init__(self, towers: Towers, average: WeightAverage, optimizer: Any, scheduler: Any) -> None:
        self.towers, self.average, self.optimizer, self.scheduler = towers, average, optimizer, scheduler

    def save(self, out: Path, step: int, about: dict[str, Any], processes: Processes) -> None:
        """Write a checkpoint; every process calls this. Raises OSError."""
        states = processes.objects(random_states())
        rest = {**about, "scheduler": self.scheduler.state_dict(), "random": states, "updates": self.average.updates}
        if self.average.sharded:
            save_sharded(out, step, self._tensors(), rest, processes)
            return
        parts = {"towers": self.towers, "average": self.average, "optimizer": self.optimizer}

        def write() -> None:
            save_checkpoint(out, step, {**{name: part.state_dict() for name, part in parts.items()}, **rest})

        # All get the error of one that cannot write, and go on together.
        processes.first_does(write)

    def load(self, state: dict[str, Any], processes: Processes) -> None:
        """Put everything where a checkpoint has it."""
        if "shards" in state:
            self._fill_optimizer(names_in(Path(state["shards"])))
            load_sharded(Path(state["shards"]), self._tensors())
            self.average.updates = state["updates"]
        elif self.average.sharded:
            raise ValueError("this run was begun without --shard true, and goes on without it")
        else:
            self.towers.load_state_dict(state["towers"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        random_of = state["random"]
        restore_random_states(random_of[min(processes.number, len(random_of) - 1)])

    def is_finite(self) -> bool:
        """Whether nothing that is trained, of this process's part of it, is a NaN or infinite."""
        trained = [parameter for parameter in self.towers.parameters() if parameter.requires_grad]
        return are_finite([*trained, *self.average.weights.values()])

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"towers.{name}": tensor for name, tensor in self.towers.state_dict().items()}
        found |= {f"average.{name}": tensor for name, tensor in self.average.weights.items()}
        for name, parameter in self.towers.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{kind}"] = value
        return found

    def _fill_optimizer(self, there: set[str]) -> None:
        """What AdamW keeps of each parameter, before its first step: there has to be something to load into.

        there: what a checkpoint has: nothing of a parameter that had no gradient, and of none before the first step.
        """
        for name, parameter in self.towers.named_parameters():
            if f"optimizer.{name}.exp_avg" in there:
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


@dataclass
class Place:
    """Where a run stands: what the loop counts, beside the weights and the random states.

    step: steps gone through; skipped: those among them that were none; epoch: the one that it is in, from 1;
    step_in_epoch: batches of it that are done. left_out: images that could not be read, or were in a step that was
    none, each as often as it was dealt. sums, seen: of the epoch's figures. best: dev rsum of the best epoch. chosen:
    the best epoch by all of dev, then by each half. records: bytes of metrics.jsonl. seconds: of training, pauses left
    out.
    """

    step: int = 0
    skipped: int = 0
    left_out: int = 0
    epoch: int = 1
    step_in_epoch: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seen: int = 0
    best: float = -1.0
    chosen: list[BestEpoch] = field(default_factory=list)
    history: list[list[Any]] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0
    records: int = 0

    @classmethod
    def of(cls, state: dict[str, Any], best_by: str) -> Place:
        """What a checkpoint has; one from before dev was halved knows the best epoch of all of dev only."""
        state = dict(state)
        epoch, chosen = state.pop("best_epoch", 0), state.pop("chosen", None)
        if chosen is None and epoch:
            chosen = [{"score": state["best"] if best_by == "rsum" else -math.inf, "epoch": epoch}]
        return cls(**state, chosen=[BestEpoch(**each) for each in chosen or []])

    @property
    def best_epoch(self) -> int:
        """The epoch whose model is the run's, 0 before there is one."""
        return self.chosen[0].epoch if self.chosen else 0

    def choose(self, figures: DevFigures, config: RunConfig) -> None:
        """Take note of an epoch's dev figures; training stops once all of dev and both halves have lost patience."""
        scores = figures.scores(config.best_by)
        self.chosen += [BestEpoch() for _ in scores[len(self.chosen) :]]
        for each, score in zip(self.chosen, scores, strict=True):
            # The dual encoder tells nothing of a fusion that is trained alone: its last epoch is kept.
            each.see(self.epoch, score, config.patience, always=config.freeze == "all")
        if self.best_epoch == self.epoch:
            self.best = figures.metrics.rsum.value
        self.stopped = all(each.stopped for each in self.chosen)

    def count(self, values: np.ndarray) -> None:
        """One step more, with its loss, fusion loss and accuracy."""
        self.step, self.seen = self.step + 1, self.seen + 1
        self.sums = [total + float(value) for total, value in zip(self.sums, values, strict=True)]

    def next_epoch(self) -> None:
        """To the beginning of the next epoch."""
        self.epoch, self.step_in_epoch, self.sums, self.seen = self.epoch + 1, 0, [0.0, 0.0, 0.0], 0


def _go_on(state: dict[str, Any], whole: Whole, out: Path, say: Say, processes: Processes, best_by: str) -> Place:
    """Put everything where the checkpoint has it."""
    whole.load(state, processes)
    where = Place.of(state["place"], best_by)

    def forget_later() -> None:
        # What was recorded after the checkpoint is done, and recorded, once more.
        with (out / "metrics.jsonl").open("a") as records:
            records.truncate(min(where.records, records.tell()))

    processes.first_does(forget_later)
    say(f"{out}: goes on after step {where.step}, in epoch {where.epoch}")
    return where


def restore_aligner(aligner: Aligner, state: dict[str, Any]) -> None:
    """Give a model the weights and buffers of a checkpoint, those that are not trained too.

    Raises ValueError where they are another model's.
    """
    if "shards" in state:
        tensors = {f"towers.aligner.{name}": tensor for name, tensor in aligner.state_dict().items()}
        load_sharded(Path(state["shards"]), tensors)
        return
    own = {
        name.removeprefix("aligner."): tensor for name, tensor in state["towers"].items() if name.startswith("aligner.")
    }
    try:
        aligner.load_state_dict(own)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is not of this model: {str(error).splitlines()[1].strip()}") from None


def _learns_from_random(config: RunConfig) -> bool:
    """Whether the image tower starts at random and is trained, so that its batch norms gather statistics."""
    return config.model.image_tower.weights == "random" and config.freeze not in IMAGE_FROZEN


def refuse_mixed_statistics(aligner: Aligner, config: RunConfig, processes: Processes) -> None:
    """Raises ValueError where a batch norm would gather statistics of a part of the batch: of a chunk, or of each of
    several processes' own images, so that the model that is measured would be a mixture of no process's."""
    chunked = 0 < config.chunk < share_of_step(config, processes.count)
    if not (processes.many or chunked) or not _learns_from_random(config) or not any(True for _ in norms(aligner)):
        return
    name = f"{config.model.image_tower.name} starts at random and has batch norms, whose statistics"
    told = "give it weights, --freeze image, or a backbone without batch norm, such as vit_tiny_patch16_224"
    if processes.many:
        raise ValueError(f"{name} {processes.count} processes would each gather of their own images; {told}")
    raise ValueError(f"--chunk: {name} would be those of a chunk, not of the batch; {told}")


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- the smaller parts, in the order in which `train` uses them ------------------------------------------------------


def check_settings(config: RunConfig) -> None:
    """Raises ValueError for settings that do not fit each other."""
    for name in ("epochs", "batch", "views", "patience", "negatives"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} should be at least 1, not {getattr(config, name)}")
    if config.freeze == "all" and config.model.design != "cross":
        raise ValueError("--freeze all trains the fusion alone, and only the design 'cross' has one")
    if config.batch < 2:
        raise ValueError("--batch should be at least 2: an image alone has nothing to be told from")
    if config.train_images == 1:
        raise ValueError(
            "--train_images should be at least 2, or 0 for all: an image alone has nothing to be told from"
        )
    _check_widths(config.model)
    if config.peft == "lora" and config.freeze in ("all", "both"):
        raise ValueError(f"--peft lora trains adapters in a tower, and --freeze {config.freeze} freezes both")
    if config.profile and config.overwrite:
        raise ValueError("--profile leaves no run, and replaces none: leave --overwrite out")
    for names, holds, told in RANGES:
        for name in names.split():
            value = reduce(getattr, name.split("."), config)
            if not holds(value):
                raise ValueError(f"--{name} should be {told}, not {value}")


def _check_widths(model: AlignerConfig) -> None:
    """Raises ValueError for widths that their heads do not share out evenly."""
    if model.width % HEADS:
        raise ValueError(f"--model.width should be a multiple of {HEADS}, not {model.width}")
    heads, width = model.fusion.heads, model.fusion.width
    if model.design == "cross" and heads > 0 and width % heads:
        raise ValueError(f"--model.fusion.heads {heads} do not share out --model.fusion.width {width} evenly")


#: Of settings that are numbers, which they may be; not a NaN, which is in no range.
RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("chunk profile steps train_images workers seed", lambda value: value >= 0, "at least 0"),
    ("warmup ema loss.smoothing model.dropout lora.dropout", lambda value: 0 <= value < 1,
     "from 0 to below 1"),
    # Below 0: the encoder's own.
    ("model.text_tower.dropout", lambda value: value < 1, "below 1"),
    ("text_lr image_lr head_lr", lambda value: 0 <= value <= 1, "from 0 to 1"),
    ("layer_decay", lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ("weight_decay fusion_weight loss.margin loss.beta checkpoint_minutes", lambda value: 0 <= value < math.inf,
     "at least 0, and finite"),
    ("loss.bias", math.isfinite, "finite"),
    ("model.late.keep_tokens model.image_tower.size model.image_tower.blocks", lambda value: value >= 0, "at least 0"),
    # Two of them are an encoder's own marks.
    ("model.text_tower.max_tokens", lambda value: value >= 3, "at least 3"),
    ("lora.rank model.width model.late.width model.fusion.candidates model.fusion.layers model.fusion.heads "
     "model.fusion.width", lambda value: value >= 1, "at least 1"),
    ("lora.alpha model.late.temperature", lambda value: 0 < value < math.inf, "above 0, and finite"),
    ("model.temperature", lambda value: 0.01 <= value <= 100, "from 0.01 to 100"),
]  # fmt: skip


def found_here(config: RunConfig) -> tuple[torch.device, list[str], list[str]]:
    """What settings ask of this machine: the device; the trackers that are installed; and a line for each that is not,
    though nobody named it. Raises ValueError for what is not to be had."""
    device = best_device(config.device)
    usable, words = usable_trackers(config.trackers.split(",") if config.trackers else [], config.trackers != TRACKERS)
    if config.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile true needs a C++ compiler: none is here as g++, nor is one named by CXX")
    return device, usable, words


def _processes(config: RunConfig, device: torch.device, trackers: list[str]) -> Processes:
    processes = Processes(device, config.shard, trackers, str(Path(config.out)))
    if config.batch < processes.count:
        told = f"each needs an image of every step: at least --batch {processes.count}"
        raise ValueError(f"--batch {config.batch} on {processes.count} processes: {told}")
    return processes


def _loss(config: RunConfig, aligner: Aligner) -> PairLoss:
    """What the dual encoder is trained with; its temperature stays where it starts if it is not to be learned."""
    if not config.loss.learn_temperature:
        aligner.log_scale.requires_grad_(False)
    return PairLoss(config.loss).to(aligner.device)


def _optimizer(config: RunConfig, step: Step) -> torch.optim.Optimizer:
    rates = {"text_tower": config.text_lr, "image_tower": config.image_lr}
    groups = optimizer_groups(
        step.towers.named_parameters(), step.aligner, rates, config.head_lr, config.weight_decay, config.layer_decay
    )
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def try_step(config: RunConfig, base: RunConfig | None = None) -> None:
    """Raises what `train` would raise before the end of its first step, whatever the data: the settings, what they ask
    of this machine, the towers with their weights, and a step with two made-up images. Nothing is written.

    base: the settings of the run `init`, which need not be trained yet.
    Raises ValueError, OSError and ModuleNotFoundError; what a model fails with in its step as a ValueError.
    """
    check_settings(config)
    device, _, _ = found_here(config)
    processes = _processes(config, device, [])
    with kept_random_states():
        below = None if base is None else Aligner(base.model)
        aligner = _build(config, device, _nothing, True, below)
        refuse_mixed_statistics(aligner, config, processes)
        loss_of = _loss(config, aligner)
        aligner.train()
        keep_frozen_still(aligner, config.freeze)
        try:
            step = Step(
                Towers(aligner, loss_of, (torch.float32,) * 2), processes, config.negatives, config.fusion_weight
            )
            _optimizer(config, step)
            step.whole(_made_up(aligner).to(device), Known())
        except (ValueError, OSError, ModuleNotFoundError):
            raise
        except Exception as error:
            reason = " ".join((str(error).strip().splitlines() or [""])[0].split())
            own = f", with --loss.name {config.loss.name}" if loss_of.own is not None else ""
            raise ValueError(f"a first step fails{own}: {type(error).__name__}: {reason}") from error


def _made_up(aligner: Aligner) -> Batch:
    """Two images with a caption each."""
    size, two = aligner.image_tower.input.size, torch.arange(2)
    tokens = aligner.text_tower.tokenize(["a dog", "two children run across the grass"])
    pixels = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    return Batch(two, pixels, group_by_length(tokens, aligner.text_tower.pad), two, two)


def _prepare_folder(config: RunConfig, again: bool, until_it_ends: ExitStack) -> None:
    """Make the run folder. A run that is there already is refused, or stays until `_write_records` takes its place; a
    call that is refused later, but before that, leaves what was there."""
    out = Path(config.out)
    if again:
        return
    # What a process left that was killed before the first step of a run.
    left = {BEGUN, f"{BEGUN}{PART}", f"config.yaml{PART}", LOCK}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - left):
        if not config.overwrite:
            raise FileExistsError(f"{out}: is there already; give another --out, or --overwrite true to replace it")
        if not (out / "config.yaml").is_file():
            raise FileExistsError(f"{out}: holds something that is no run, which --overwrite does not replace")
        _refuse_own_source(config, out)
    before = (out / BEGUN).read_bytes() if (out / BEGUN).is_file() else None
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    until_it_ends.push(partial(_undo_if_refused, out, made, before))
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.yaml").is_file():
        _write_settings(out / BEGUN, config)


def _undo_if_refused(out: Path, made: list[Path], before: bytes | None, kind: Any, *_: Any) -> bool:
    """before: what begun.yaml held; made: folders that this call has made. kind: of the error, None for none."""
    refused = kind is not None and issubclass(kind, (ValueError, OSError))
    if refused and out.is_dir() and not (out / "config.yaml").is_file():
        if before is None:
            remove(out / BEGUN)
        else:
            (out / BEGUN).write_bytes(before)
        remove_empty(made)
    return False


def _refuse_own_source(config: RunConfig, out: Path) -> None:
    """Raises ValueError where a run needs something of the folder that it is to replace."""
    image, text = config.model.image_tower, config.model.text_tower
    sources = {
        "init": config.init, "data": config.data, "dev_data": config.dev_data, "cache": config.cache,
        "model.image_tower.weights": image.weights, "model.text_tower.name": text.name,
        "model.text_tower.weights": text.weights,
    }  # fmt: skip
    for name, source in sources.items():
        # A pattern of shards is no file: the folder that they are in is there.
        parts = list(takewhile(lambda part: not set(part) & set("*?[{"), Path(source).parts)) if source else []
        there = Path(*parts)
        if parts and there.exists() and there.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--{name} {source} lies in --out {out}, which --overwrite true would remove")


def _remove_former(out: Path, only: Collection[str] = ()) -> None:
    """Remove what a run folder holds but its settings: cut off in the middle, this can be repeated. only: what has one
    of these names, or was to have."""
    for path in out.iterdir():
        known = not only or path.name.removesuffix(PART) in only
        if path.name not in ("config.yaml", BEGUN, LOCK) and known:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _build(config: RunConfig, device: torch.device, say: Say, begins: bool, base: Aligner | None = None) -> Aligner:
    """The model on its device; what is frozen, and adapters, as the settings want them. begins: unless weights of a
    checkpoint come. base: as in `start_from`."""
    aligner = Aligner(config.model)
    taken = start_from(aligner, config.init, base) if config.init and begins else set()
    aligner = aligner.to(device).to(memory_format=torch.channels_last)
    if config.init and begins:
        anew = sorted({name.split(".")[0] for name in set(aligner.state_dict()) - taken})
        say(f"weights of {config.init}; starting anew: {', '.join(anew) or 'nothing'}")
    idle = freeze(aligner, config.freeze, config.freeze_layers)
    if config.peft == "lora":
        add_lora(aligner, config.lora, config.freeze_layers)
    elif idle and begins:
        say(f"no effect of --freeze_layers {' '.join(idle)}: frozen without that")
    if not _trained(aligner):
        layers = " ".join(config.freeze_layers)
        raise ValueError(f"--freeze {config.freeze} with --freeze_layers {layers}: nothing is left to be trained")
    if begins and not config.profile:
        # A profile times what it does not keep.
        refuse_frozen_at_random(aligner, taken, config.freeze, config.freeze_layers, config.init)
    return aligner


def _trained(aligner: Aligner) -> int:
    return sum(parameter.numel() for parameter in aligner.parameters() if parameter.requires_grad)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear up, then a cosine down to a fiftieth."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _write_settings(path: Path, config: RunConfig) -> None:
    import yaml

    # Whoever repeats a run from its settings has not been asked whether to replace another one.
    settings: dict[str, Any] = asdict(replace(config, overwrite=False))
    if path.name == BEGUN:
        settings = {"directory": str(Path.cwd()), "settings": settings}
    with written_aside(path) as aside:
        aside.write_text(yaml.safe_dump(settings, sort_keys=False))


def _write_json(path: Path, value: Any) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n")


def _write_records(out: Path, config: RunConfig, data: TrainingData, aligner: Aligner, again: bool, say: Say) -> None:
    # Only now: what could be refused has been by then. Killed from here on, the run is the new one.
    if config.overwrite and not again:
        _write_settings(out / BEGUN, config)
    if again or config.overwrite:
        _remove_former(out, () if (out / BEGUN).is_file() else WRITTEN)
    _write_settings(out / "config.yaml", config)
    _write_json(out / "data.json", data.about())
    environment = {"versions": versions(), "machine": machine(), "directory": str(Path.cwd())}
    _write_json(out / "environment.json", environment)
    origins = {"image_tower": aligner.image_tower.origin, "text_tower": aligner.text_tower.origin}
    weights = {tower: origin.to_dict() for tower, origin in origins.items()}
    _write_json(out / "weights.json", weights)
    if config.init:
        found = InitRun.of(out, config.init, Path(config.init), data.dev)
        found.save(out)
        if found.trained_on:
            say(f"warning: {found.trained_on}")
    remove(out / BEGUN)


def _write_results(out: Path, results: dict[str, Any]) -> None:
    # A run either has its results or has not.
    with written_aside(out / "results.json") as aside:
        aside.write_text(json.dumps(results, indent=2) + "\n")
    remove_unfinished(out)


def end_of_epoch(
    where: Place, dev: DevFigures, shape: tuple[int, int], records: Records, timings: Timings, seconds: float
) -> None:
    """Record what an epoch showed. shape: images and captions of a step."""
    loss, fusion, accuracy = (value / max(where.seen, 1) for value in where.sums)
    where.history.append([loss, accuracy, dev.metrics.rsum.value, *shape, dev.loss, dev.accuracy])
    records.write(
        where.step, epoch=where.epoch, train_loss=loss, train_fusion_loss=fusion, train_accuracy=accuracy,
        **dev.to_dict(), seconds=seconds, time={kind: round(took, 2) for kind, took in timings.taken().items()},
    )  # fmt: skip


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


def _epoch_line(epoch: int, epochs: int, where: Place, dev: DevFigures, seconds: float, kept: Aligner) -> str:
    ways, chance = ("image_to_text", "text_to_image"), dev.metrics.chance
    loss, fusion, accuracy = (value / max(where.seen, 1) for value in where.sums)
    pair = f", fusion {fusion:.3f}" if kept.fusion is not None else ""
    recalls, by_chance = [], []
    for k in (1, 5):
        both = [getattr(dev.metrics, way)[f"recall_at_{k}"].value for way in ways]
        recalls.append(f"R@{k} {' / '.join(f'{100 * value:.1f}' for value in both)}")
        by_chance.append(" / ".join(f"{100 * chance[way][f'recall_at_{k}']:.1f}" for way in ways))
    return (
        f"epoch {epoch}/{epochs}: loss {loss:.3f}{pair}, accuracy {accuracy:.3f} | dev loss {dev.loss:.3f}, accuracy "
        f"{dev.accuracy:.3f}, {', '.join(recalls)} (image to text / text to image), rsum {dev.metrics.rsum.value:.1f} "
        f"(chance: {', '.join(by_chance)}, {chance['rsum']:.1f}) | temperature {1 / kept.scale().item():.3f} | "
        f"{seconds:.0f} s"
    )


@contextmanager
def progress_line(steps: int, done: int, shown: bool) -> Iterator[Callable[[int, np.ndarray, float, float], None]]:
    """Tells how far the training is, with loss, accuracy, dev rsum so far and images/s. done: steps before this one."""
    with long_step("training, step", steps, shown) as line:
        line.begin_at(done)

        def show(step: int, values: np.ndarray, speed: float, best: float) -> None:
            recall = f", dev rsum {best:.1f}" if best >= 0 else ""
            line.update(step, f"loss {values[0]:.3f}, accuracy {values[2]:.3f}{recall}, {speed:.1f} images/s")

        yield show
