"""The training loop, from settings to a run folder; `train` reads from top to bottom.

- One step: B images with all of their captions; the images go through their tower once.
- The weights that are kept are a moving average of the trained ones (`ema`), measured on the whole dev gallery after
  each epoch; the best epoch by dev rsum is the run's model. No test picture is opened.
- A frozen picture tower's features are computed once and kept on disk, in several views of each picture.
- A run that was stopped, however, goes on from its last checkpoint (`resume`) and ends as the undisturbed one: bit for
  bit on a CPU.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.batch import Batch
from clipvisionalign.data.batches import CaptionedBatches
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.models.aligner import (
    Aligner,
    AlignerConfig,
    CaptionStates,
    ImageStates,
    config_from_dict,
    load_aligner,
)  # fmt: skip
from clipvisionalign.models.device import best_device, machine, quick_format, versions
from clipvisionalign.models.late_interaction import late_scores
from clipvisionalign.retrieval.evaluate import evaluate
from clipvisionalign.retrieval.metrics import RetrievalMetrics, metrics_of_ranks, retrieval_metrics
from clipvisionalign.retrieval.ranks import Partners, ranks_of_scores
from clipvisionalign.retrieval.rerank import reranked
from clipvisionalign.training.checkpoint import FOLDER as CHECKPOINTS
from clipvisionalign.training.checkpoint import (
    asked_to_stop,
    last_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)  # fmt: skip
from clipvisionalign.training.diagnosis import EpochFigures, diagnose
from clipvisionalign.training.feature_cache import (
    FeatureCache,
    cache_folder,
    open_features,
    room_for,
    size_on_disk,
    views_of,
)  # fmt: skip
from clipvisionalign.training.losses import LossConfig, PairLoss, contrastive_loss, sample_hard_negatives


@dataclass
class RunConfig:
    """A training run.

    Args:
        data: the data set: a folder or file in any of the known layouts.
        out: the run folder to write.
        layout: how the data set lies there; "auto" recognises it.
        model: the towers and the attention design.
        init: a finished run to start from, with the same towers; what it lacks (a fusion, say) starts anew.
        epochs: passes over the training images.
        batch: images in a step; each brings all of its captions.
        text_lr: learning rate of the text tower.
        image_lr: learning rate of the picture tower, where it is trained.
        head_lr: learning rate of the projection heads and the fusion.
        loss: what the dual encoder is trained with.
        weight_decay: AdamW's.
        warmup: share of all steps in which the learning rates rise, before they fall along a cosine.
        ema: the kept weights are a moving average; after n steps it forgets by this factor a step, less at the start.
        freeze: which towers stay as they are; "all" also keeps the heads, so that the fusion alone is trained.
        augment: how training pictures vary; mirroring is left out by "crop", all variation by "none".
        views: how many variants of each picture are kept on disk for a frozen picture tower.
        negatives: hard negatives per image and per caption for the fusion of the design "cross".
        fusion_weight: weight of the late interaction's and the fusion's loss beside the dual encoder's.
        patience: epochs without a better dev rsum after which training stops.
        seed: of everything drawn at random.
        precision: number format of training; "auto" times both and takes the quick one. Evaluation is in float32.
        device: "auto", "cpu", "cuda", ...
        workers: processes that decode pictures where the picture tower is trained.
        checkpoint_minutes: time between two checkpoints; one is also written after each epoch and when asked to stop.
        cache: where a frozen tower's features are kept: "auto" for the user's cache folder, a folder, or "off".
        overwrite: replace what is in the run folder.
    """

    data: str = ""
    out: str = "runs/self"
    layout: str = "auto"
    model: AlignerConfig = field(default_factory=AlignerConfig)
    init: str = ""
    epochs: int = 6
    batch: int = 128
    text_lr: float = 1e-4
    image_lr: float = 3e-5
    head_lr: float = 1e-3
    loss: LossConfig = field(default_factory=LossConfig)
    weight_decay: float = 0.05
    warmup: float = 0.08
    ema: float = 0.99
    freeze: Literal["image", "text", "both", "none", "all"] = "image"
    augment: Literal["flip+crop", "crop", "none"] = "flip+crop"
    views: int = 4
    negatives: int = 4
    fusion_weight: float = 1.0
    patience: int = 3
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    workers: int = 2
    checkpoint_minutes: float = 5.0
    cache: str = "auto"
    overwrite: bool = False


Say = Callable[[str], None]


def resume(run: str | Path, say: Say = print) -> dict[str, Any]:
    """Go on with a run where its last checkpoint stands; returns what its results.json holds, finished runs at once.

    Raises FileNotFoundError where the folder is no run of this project's.
    """
    import yaml

    out = Path(run)
    if not (out / "config.yaml").is_file():
        raise FileNotFoundError(f"--resume {out}: not a run folder: it has no config.yaml")
    if (out / "results.json").is_file():
        say(f"{out}: finished already")
        return json.loads((out / "results.json").read_text())
    settings = config_from_dict(RunConfig, yaml.safe_load((out / "config.yaml").read_text()))
    state = last_checkpoint(out, say)
    if state is None:
        say(f"{out}: no checkpoint yet: the run starts anew")
        return train(replace(settings, out=str(out), overwrite=True), say)
    return train(replace(settings, out=str(out)), say, state)


def train(config: RunConfig, say: Say = print, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train an aligner as `config` says, and leave a complete run folder. Returns what its results.json holds.

    state: of a checkpoint, to go on from there; see `resume`.

    Raises DataError for unusable data, FileExistsError for a run folder that is there already, WeightsNotFound, and
    ValueError for settings that do not fit each other.
    """
    _check_settings(config)
    out = _prepare_folder(config) if state is None else Path(config.out)
    seed_everything(config.seed)
    device = best_device(config.device)
    # A machine may time its formats otherwise the next time: a run that goes on keeps the one that it was begun in.
    dtype = quick_format(device, config.precision if state is None else state["precision"])

    train_data, dev_data, left_out = load_splits(config, say)
    aligner = Aligner(config.model).to(device).to(memory_format=torch.channels_last)
    if config.init and state is None:
        anew = start_from(aligner, config.init)
        say(f"weights of {config.init}; starting anew: {', '.join(anew) or 'nothing'}")
    _freeze(aligner, config.freeze)
    if not config.loss.learn_temperature:
        aligner.log_scale.requires_grad_(False)
    say(
        f"design {config.model.design}: {config.model.image_tower.name} + {config.model.text_tower.name}, "
        f"{aligner.parameter_count() / 1e6:.1f} M parameters, {_trained(aligner) / 1e6:.1f} M of them trained, "
        f"{str(dtype).removeprefix('torch.')} on {device}"
    )
    features, dev_features = _frozen_features(config, aligner, train_data, dev_data, dtype, say)
    if features is not None:
        train_data = _without_failures(train_data, features, say)

    flip = 0.5 if config.augment == "flip+crop" else 0.0
    look = aligner.image_tower.input.transform(augment=config.augment != "none", flip=flip)
    tower = aligner.text_tower
    batches = CaptionedBatches(train_data, tower.tokenize, tower.pad, None if features else look)
    steps = batches.steps(config.batch) * config.epochs
    loss_of = PairLoss(config.loss).to(device)
    optimizer = _optimizer(aligner, loss_of, config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps, config.warmup))
    average = torch.optim.swa_utils.AveragedModel(aligner, multi_avg_fn=_moving_average(config.ema))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    where = Place()
    parts: dict[str, Any] = {
        "model": aligner,
        "average": average,
        "loss": loss_of,
        "optimizer": optimizer,
        "scheduler": scheduler,
    }
    if state is None:
        _write_records(out, config, train_data, dev_data, left_out)
    else:
        where = _go_on(state, parts, train_data, out, say)
    saved = start = time.perf_counter()
    start -= where.seconds

    def keep() -> None:
        nonlocal saved
        where.seconds, where.records = time.perf_counter() - start, records.tell()
        whole = {name: part.state_dict() for name, part in parts.items()}
        about = {"place": asdict(where), "random": random_states(), "data": train_data.fingerprint()}
        about["precision"] = str(dtype).removeprefix("torch.")
        try:
            save_checkpoint(out, where.step, {**whole, **about})
        except OSError as error:
            say(f"warning: no checkpoint at step {where.step}: {error}; training goes on, the one before it is kept")
        saved = time.perf_counter()

    def leave() -> None:
        say(f"stopped after step {where.step}; go on with: clipvisionalign train --resume {out}")
        raise KeyboardInterrupt

    with (
        asked_to_stop() as stop,
        (out / "metrics.jsonl").open("a") as records,
        progress_line(steps, say) as show,
    ):
        while where.epoch <= config.epochs and not where.stopped:
            epoch = where.epoch
            aligner.train()
            _keep_frozen_still(aligner, config.freeze)
            images_seen, epoch_start = 0, time.perf_counter()
            workers = 0 if features else config.workers
            for batch in batches.epoch(config.batch, epoch, config.seed, workers, where.step_in_epoch):
                where.step_in_epoch += 1
                for reason in batch.skipped:
                    say(f"left out: {reason}")
                if len(batch) < 2:
                    continue
                batch = batch.to(device)
                known = features(batch.image_index, _views(features, batch), device) if features else None
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    images, captions = aligner(batch, known)
                    loss, pair_loss, accuracy = step_loss(aligner, batch, images, captions, config, loss_of)
                if not torch.isfinite(loss + pair_loss):
                    names = ", ".join(train_data.rows[i].name for i in batch.image_index[:5].tolist())
                    told = f"step {where.step + 1}: the loss is not finite; its pictures: {names}, ..."
                    raise FloatingPointError(f"{told}; the last good checkpoint is in {out / CHECKPOINTS}")
                optimizer.zero_grad(set_to_none=True)
                (loss + config.fusion_weight * pair_loss).backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                scheduler.step()
                average.update_parameters(aligner)

                images_seen += len(batch)
                values = np.array([loss.item(), pair_loss.item(), accuracy])
                where.count(values)
                show(where.step, values, images_seen / (time.perf_counter() - epoch_start), where.best)
                if where.step % 10 == 0 or where.step == 1:
                    now = {"loss": values[0], "fusion_loss": values[1], "accuracy": accuracy}
                    _record(records, step=where.step, epoch=epoch, **now)
                if stop():
                    keep()
                    leave()
                if time.perf_counter() - saved > 60 * config.checkpoint_minutes:
                    keep()

            kept: Aligner = average.module  # type: ignore[assignment]
            metrics, image_vectors, caption_vectors = dev_metrics(kept, dev_data, dev_features)
            loss_mean, fusion_mean, accuracy_mean = (value / max(where.seen, 1) for value in where.sums)
            rsum = metrics.rsum.value
            per_step = min(config.batch, len(batches))
            captions_per_step = round(per_step * len(train_data.captions) / len(train_data))
            where.history.append([loss_mean, accuracy_mean, rsum, per_step, captions_per_step])
            history = [EpochFigures(*figures) for figures in where.history]
            seconds = time.perf_counter() - start
            _record(
                records, step=where.step, epoch=epoch, train_loss=loss_mean, train_fusion_loss=fusion_mean,
                train_accuracy=accuracy_mean, dev=metrics.to_dict(), seconds=seconds,
            )  # fmt: skip
            say(_epoch_line(epoch, config.epochs, history[-1], float(fusion_mean), metrics, seconds, kept))
            for words in diagnose(history, image_vectors, caption_vectors):
                say(f"warning: {words}")
            # The dual encoder tells nothing of a fusion that is trained alone: its last epoch is kept.
            if rsum > where.best or config.freeze == "all":
                where.best, where.best_epoch = rsum, epoch
                kept.save(out)
            elif epoch - where.best_epoch >= config.patience:
                say(f"no better dev rsum for {config.patience} epochs: stopped; the best was epoch {where.best_epoch}")
                where.stopped = True
            where.next_epoch()
            keep()
            if stop():
                leave()

    seconds = time.perf_counter() - start
    parts.clear()
    del aligner, average, optimizer
    say(f"best epoch {where.best_epoch}; measuring the saved model on the whole dev gallery")
    aligner = load_aligner(out, config.device)
    aligner.show_progress = True
    candidates = config.model.fusion.candidates if aligner.fusion is not None else 0
    if aligner.late is not None:
        late, fusion = choose_pair_weights(aligner, dev_data, candidates)
        more = f", the fusion's correction {fusion:g} times" if aligner.fusion is not None else ""
        say(f"the late score counts {late:g} times{more}, chosen on dev from {PAIR_WEIGHTS}")
        aligner.save(out)
    measured = evaluate(
        aligner, dev_data.images, dev_data.captions, dev_data.caption_image, dev_data.image_identity, candidates
    )
    results = {
        "run": str(out), "data": config.data, "split": "dev", "best_epoch": where.best_epoch,
        "training_seconds": round(seconds, 1), "steps": where.step, **measured.to_dict(),
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    # A finished run goes on nowhere.
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    return results


@dataclass
class Place:
    """Where a run stands: what the loop counts, beside the weights and the random states.

    step: steps done; epoch: the one that it is in, from 1; step_in_epoch: batches of it that are done. sums, seen: of
    the epoch's figures. records: bytes of metrics.jsonl. seconds: of training, pauses left out.
    """

    step: int = 0
    epoch: int = 1
    step_in_epoch: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seen: int = 0
    best: float = -1.0
    best_epoch: int = 0
    history: list[list[Any]] = field(default_factory=list)
    stopped: bool = False
    seconds: float = 0.0
    records: int = 0

    def count(self, values: np.ndarray) -> None:
        """One step more, with its loss, fusion loss and accuracy."""
        self.step, self.seen = self.step + 1, self.seen + 1
        self.sums = [total + float(value) for total, value in zip(self.sums, values, strict=True)]

    def next_epoch(self) -> None:
        """To the beginning of the next epoch."""
        self.epoch, self.step_in_epoch, self.sums, self.seen = self.epoch + 1, 0, [0.0, 0.0, 0.0], 0


def _go_on(state: dict[str, Any], parts: dict[str, Any], data: CaptionedImages, out: Path, say: Say) -> Place:
    """Put everything where the checkpoint has it. Raises DataError where the training data is not what it was."""
    if state["data"] != data.fingerprint():
        raise DataError(f"{data.source}: not the training data that {out} was begun with: it cannot go on")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    restore_random_states(state["random"])
    where = Place(**state["place"])
    # What was recorded after the checkpoint is done, and recorded, once more.
    with (out / "metrics.jsonl").open("a") as records:
        records.truncate(where.records)
    say(f"{out}: goes on after step {where.step}, in epoch {where.epoch}")
    return where


def step_loss(
    aligner: Aligner,
    batch: Batch,
    images: ImageStates,
    captions: list[CaptionStates],
    config: RunConfig,
    loss_of: PairLoss,
) -> tuple[Tensor, Tensor, float]:
    """The dual encoder's loss, that of what scores pairs (0 without), and the share of captions whose image
    comes first by the dual encoder."""
    order = torch.cat([group.rows for group in batch.captions])
    vectors = torch.cat([group.vectors for group in captions])
    partners = batch.partners[:, order]
    loss = loss_of(images.vectors, vectors, partners, aligner.scale())
    with torch.no_grad():
        logits = aligner.scale() * images.vectors @ vectors.T
        accuracy = float(partners.gather(0, logits.argmax(dim=0, keepdim=True)).float().mean())
    if aligner.late is None:
        return loss, torch.zeros((), device=loss.device), accuracy
    patches = aligner.late.patches(images.patches)
    tokens = [aligner.late.tokens(*_tokens(group)) for group in captions]
    late = aligner.late.scale() * torch.cat([late_scores(patches, some) for some in tokens], dim=1)
    pair_loss = contrastive_loss(late, partners)
    if aligner.fusion is not None:
        known = (logits + late).detach()
        pair_loss = pair_loss + fusion_loss(aligner, images, patches, captions, known, partners, config.negatives)
    return loss, pair_loss, accuracy


def _tokens(group: CaptionStates) -> tuple[Tensor, Tensor]:
    assert group.tokens is not None
    return group.tokens, group.mask


def fusion_loss(
    aligner: Aligner,
    images: ImageStates,
    patches: Tensor,
    captions: list[CaptionStates],
    logits: Tensor,
    partners: Tensor,
    count: int,
) -> Tensor:
    """Each true pair told from `count` hard negatives, both ways.

    One caption of each image is drawn. It is scored with its image and with hard negative images; its image is scored
    with it and with hard negative captions. logits, partners: (B, M), columns in the order of `captions`; logits are
    all that is known without the fusion, the dual encoder's and the late interaction's.

    The fused score is that plus a correction, and the negatives were drawn by its probability. A softmax over drawn
    candidates has to take the log of that probability off each score (Bengio and Senecal, IEEE Transactions on Neural
    Networks 19 (2008), 713), which leaves the correction alone: it learns what the rest lacks, instead of learning to
    take back what the drawing has made common.
    """
    assert aligner.fusion is not None
    assert aligner.late is not None
    count = min(count, int((~partners).sum(dim=1).min()), int((~partners).sum(dim=0).min()))
    rows = torch.arange(len(partners), device=logits.device)
    drawn = torch.multinomial(partners.float(), 1).squeeze(1)
    wrong_images = sample_hard_negatives(logits.T[drawn], partners.T[drawn], count)
    wrong_captions = sample_hard_negatives(logits, partners, count)
    image_index = torch.cat([rows, wrong_images.flatten(), rows.repeat_interleave(count)])
    caption_index = torch.cat([drawn, drawn.repeat_interleave(count), wrong_captions.flatten()])

    lengths = torch.cat([group.mask.sum(dim=1) for group in captions])
    longest = int(lengths.max())
    tokens = torch.cat(
        [nn.functional.pad(found, (0, 0, 0, longest - found.shape[1])) for found, _ in map(_tokens, captions)]
    )
    key_values = aligner.fusion.project_patches(images.patches)
    corrections = torch.zeros(len(image_index), device=logits.device)
    # Pairs of like caption length go together, so that little is padded.
    order = lengths[caption_index].argsort(stable=True)
    for pairs in order.split(512):
        chosen = caption_index[pairs]
        width = int(lengths[chosen].max())
        mask = torch.arange(width, device=logits.device) < lengths[chosen, None]
        some, where = tokens[chosen, :width], image_index[pairs]
        matches = aligner.late.matches(some, patches[where]).detach()
        found = aligner.fusion(some, mask, key_values[where], matches)
        corrections = corrections.index_copy(0, pairs, found.float())
    true, by_caption, by_image = corrections.split([len(rows), len(rows) * count, len(rows) * count])
    target = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
    ways = (torch.cat([true[:, None], wrong.view(-1, count)], dim=1) for wrong in (by_caption, by_image))
    return sum((nn.functional.cross_entropy(way, target) for way in ways), torch.zeros((), device=logits.device)) / 2


def dev_metrics(
    aligner: Aligner, data: CaptionedImages, features: FeatureCache | None
) -> tuple[RetrievalMetrics, np.ndarray, np.ndarray]:
    """The dual encoder on the whole dev gallery, without intervals; and its vectors (N, D) and (M, D)."""
    if features is None:
        images = aligner.encode_images(data.images).numpy()
    else:
        aligner.eval()
        parts = []
        with torch.inference_mode():
            for index in torch.arange(len(data)).split(256):
                known = features(index, torch.zeros_like(index), aligner.device)
                parts.append(aligner.image_states(known).vectors.cpu().numpy())
        images = np.concatenate(parts)
    captions = aligner.encode_captions(data.captions).numpy()
    metrics = retrieval_metrics(images, captions, data.caption_image, data.image_identity, resamples=0)
    return metrics, images, captions


#: What the late score and the fusion's correction may count beside the dual encoder's score; 0 leaves them out.
PAIR_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)


def choose_pair_weights(aligner: Aligner, data: CaptionedImages, candidates: int) -> tuple[float, float]:
    """Set what the late score and the fusion's correction count to what gives the best rsum; returns both.

    The towers have seen the training captions many times and are surer there than on new pictures, so that the weights
    cannot be learned with them. Like the best epoch they are chosen on dev: what they are worth shows outside of dev.
    """
    assert aligner.late is not None
    score = aligner.pair_scorer(data.images, data.captions)
    partners = Partners.of(data.caption_image, len(data), data.image_identity)
    if aligner.fusion is None:
        aligner.late.weight.fill_(0.0)
        dual = score.table().numpy()
        aligner.late.weight.fill_(1.0)
        late = score.table().numpy() - dual

        def rsum(weights: tuple[float, float]) -> float:
            ranks = ranks_of_scores(dual + weights[0] * late, partners)
            return metrics_of_ranks(ranks, partners.caption_image, resamples=0).rsum.value

        grid = [(weight, 0.0) for weight in PAIR_WEIGHTS]
    else:
        parts: list[np.ndarray] = []

        def rsum(weights: tuple[float, float]) -> float:
            def weighted(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
                # The candidates are the same for every weight: scored once.
                if not parts:
                    parts.append(score.parts(images, captions))
                return parts[0] @ np.array([1.0, *weights], dtype=np.float32)

            vectors = score.image_vectors.numpy(), score.caption_vectors.numpy()
            _, after = reranked(*vectors, partners, weighted, candidates)
            return metrics_of_ranks(after, partners.caption_image, resamples=0).rsum.value

        grid = [(late, fusion) for late in PAIR_WEIGHTS for fusion in PAIR_WEIGHTS]
    # On a tie the smaller weights: what shows no gain is not trusted.
    best = max(grid, key=lambda weights: (rsum(weights), -sum(weights)))
    aligner.late.weight.fill_(best[0])
    if aligner.fusion is not None:
        aligner.fusion.weight.fill_(best[1])
    return best


def start_from(aligner: Aligner, run: str) -> list[str]:
    """Take the weights of a finished run, as far as it has them; returns the parts that start anew.

    Raises FileNotFoundError where `run` is no run folder, ValueError where its towers are others.
    """
    from safetensors.torch import load_file

    path = Path(run) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"--init {run}: not a run folder: no model.safetensors in it")
    state, own = load_file(path), aligner.state_dict()
    shared = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    optional = ("late.", "fusion.")
    strange = [name for name in {*state, *own} - set(shared) if not name.startswith(optional)]
    if strange:
        raise ValueError(f"--init {run}: other towers than this run's: {sorted(strange)[0]} does not fit")
    aligner.load_state_dict(shared, strict=False)
    return sorted({name.split(".")[0] for name in set(own) - set(shared)})


def load_splits(config: RunConfig, say: Say) -> tuple[CaptionedImages, CaptionedImages, list[str]]:
    """The checked training and dev splits, and what was left out of them. Raises DataError where one is empty."""
    if not config.data:
        raise DataError("no data set given: clipvisionalign train DATA --out RUN")
    data = read_captioned_images(config.data, config.layout)
    how = "official splits" if data.official_splits else "splits by a hash of each name"
    sizes = ", ".join(f"{split} {count:,}" for split, count in sorted(data.split_sizes().items()))
    say(f"{config.data}: read as '{data.layout}', {how}: {sizes} images")
    # The dev gallery is decoded as a whole, since every figure is over all of it; training pictures by their headers.
    train_data, _ = check(data.split("train"), full=False, shown=True)
    dev_data, dev_report = check(data.split("dev"), full=True, shown=True)
    problems = dict.fromkeys([*train_data.problems, *dev_report.problems])
    left_out = [str(problem) for problem in problems if problem.effect != "warning"]
    for line in left_out[:5]:
        say(f"check: {line}")
    if len(left_out) > 5:
        say(f"check: and {len(left_out) - 5} more; 'clipvisionalign check {config.data}' lists all")
    if len(train_data) < 2 or len(dev_data) < 2:
        raise DataError(
            f"{config.data}: too little is left to train on: {len(train_data)} train, {len(dev_data)} dev images"
        )
    return train_data, dev_data, left_out


def seed_everything(seed: int) -> None:
    """Python's, NumPy's and torch's random numbers."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- the smaller parts, in the order in which `train` uses them ------------------------------------------------------


def _check_settings(config: RunConfig) -> None:
    for name in ("epochs", "batch", "views", "patience", "negatives"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} should be at least 1, not {getattr(config, name)}")
    if config.freeze == "all" and config.model.design != "cross":
        raise ValueError("--freeze all trains the fusion alone, and only the design 'cross' has one")
    if config.batch < 2:
        raise ValueError("--batch should be at least 2: an image alone has nothing to be told from")
    for name in ("warmup", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"--{name} should be from 0 to below 1, not {getattr(config, name)}")


def _prepare_folder(config: RunConfig) -> Path:
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not config.overwrite:
            raise FileExistsError(f"{out}: is there already; give another --out, or --overwrite true to replace it")
        if not (out / "config.yaml").is_file():
            raise FileExistsError(f"{out}: holds something that is no run, which --overwrite does not replace")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    return out


def _freeze(aligner: Aligner, freeze: str) -> None:
    if freeze == "all":
        aligner.requires_grad_(False)
        if aligner.fusion is not None:
            aligner.fusion.requires_grad_(True)
        return
    aligner.image_tower.requires_grad_(freeze not in ("image", "both"))
    aligner.text_tower.requires_grad_(freeze not in ("text", "both"))
    if freeze not in ("text", "both"):
        # Words that no training caption holds should keep their place beside those that some hold.
        aligner.text_tower.encoder.get_input_embeddings().requires_grad_(False)


def _keep_frozen_still(aligner: Aligner, freeze: str) -> None:
    """A frozen tower also keeps its batch norm's statistics and drops nothing out."""
    if freeze in ("image", "both", "all"):
        aligner.image_tower.eval()
    if freeze in ("text", "both", "all"):
        aligner.text_tower.eval()
    if freeze == "all":
        aligner.image_head.eval()


def _trained(aligner: Aligner) -> int:
    return sum(parameter.numel() for parameter in aligner.parameters() if parameter.requires_grad)


def _frozen_features(
    config: RunConfig,
    aligner: Aligner,
    train_data: CaptionedImages,
    dev_data: CaptionedImages,
    dtype: torch.dtype,
    say: Say,
) -> tuple[FeatureCache | None, FeatureCache | None]:
    if config.freeze not in ("image", "both", "all") or config.cache == "off":
        return None, None
    root = cache_folder(config.cache)
    views = views_of(config.augment, config.views)
    wanted = size_on_disk(len(train_data), len(views), aligner.image_tower)
    if not room_for(root, wanted):
        say(f"{root}: no room for {wanted / 2**30:.1f} GiB of features: pictures go through the tower in every epoch")
        return None, None
    tower = aligner.image_tower
    features = open_features(root, train_data, tower, views, dtype, "train")
    return features, open_features(root, dev_data, tower, views_of("none", 1), torch.float32, "dev")


def _without_failures(data: CaptionedImages, features: FeatureCache, say: Say) -> CaptionedImages:
    if not features.failures:
        return data
    for reason in features.failures.values():
        say(f"left out: {reason}")
    good = np.array([place for place in range(len(data)) if place not in features.failures])
    features.keep(good)
    rows = [data.rows[place] for place in good]
    return CaptionedImages(rows, data.source, data.layout, data.official_splits, data.problems)


def _views(features: FeatureCache, batch: Batch) -> Tensor:
    return torch.randint(features.views, (len(batch),))


def _optimizer(aligner: Aligner, loss_of: PairLoss, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW with a learning rate for each tower and the rest; no decay for biases, norms and the temperature."""
    rates = {"text_tower": config.text_lr, "image_tower": config.image_lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in [*aligner.named_parameters(), *loss_of.named_parameters()]:
        if parameter.requires_grad:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rates.get(name.split(".")[0], config.head_lr), decay), []).append(parameter)
    settings = [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
    return torch.optim.AdamW(settings, betas=(0.9, 0.98), fused=True)


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear up, then a cosine down to a fiftieth."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average that forgets faster in its first steps, so that a short run is not averaged away."""

    @torch.no_grad()
    def update(averaged: Any, current: Any, updates: Any) -> None:
        count = float(updates)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))

    return update


def _record(file: Any, **values: Any) -> None:
    file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}) + "\n")
    file.flush()


def _write_records(
    out: Path, config: RunConfig, train_data: CaptionedImages, dev_data: CaptionedImages, left_out: list[str]
) -> None:
    import yaml

    (out / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    about_data = {
        "source": str(Path(config.data).resolve()), "layout": train_data.layout,
        "official_splits": train_data.official_splits,
        "train": _about(train_data),
        "dev": _about(dev_data),
        "left_out": left_out,
    }  # fmt: skip
    (out / "data.json").write_text(json.dumps(about_data, indent=2) + "\n")
    environment = {"versions": versions(), "machine": machine()}
    (out / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")


def _about(data: CaptionedImages) -> dict[str, Any]:
    return {"images": len(data), "captions": len(data.captions), "fingerprint": data.fingerprint()}


def _epoch_line(
    epoch: int,
    epochs: int,
    figures: EpochFigures,
    fusion: float,
    metrics: RetrievalMetrics,
    seconds: float,
    kept: Aligner,
) -> str:
    forth, back = metrics.image_to_text, metrics.text_to_image
    pair = f", fusion {fusion:.3f}" if kept.fusion is not None else ""
    temperature = 1 / kept.scale().item()
    return (
        f"epoch {epoch}/{epochs}: loss {figures.loss:.3f}{pair}, accuracy {figures.accuracy:.3f} | dev rsum "
        f"{figures.rsum:.1f}, R@1 {100 * forth['recall_at_1'].value:.1f} image to text, "
        f"{100 * back['recall_at_1'].value:.1f} text to image | temperature {temperature:.3f} | {seconds:.0f} s"
    )


@contextmanager
def progress_line(steps: int, say: Say) -> Iterator[Callable[[int, np.ndarray, float, float], None]]:
    """A live line with loss, accuracy, dev rsum so far, images/s and ETA; if not a terminal, a plain one a minute."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as live:
        task = live.add_task("", total=steps)
        said = start = time.perf_counter()

        def show(step: int, values: np.ndarray, speed: float, best: float) -> None:
            nonlocal said
            recall = f", dev rsum {best:.1f}" if best >= 0 else ""
            words = f"loss {values[0]:.3f}, accuracy {values[2]:.3f}{recall}, {speed:.1f} images/s"
            live.update(task, completed=step, description=words)
            now = time.perf_counter()
            if not console.is_terminal and now - said > 60:
                left = (now - start) / step * (steps - step)
                say(f"step {step}/{steps}: {words}, about {left / 60:.0f} min left")
                said = now

        yield show
