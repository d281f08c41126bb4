"""The settings of a training run, and their checks before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

from clipvisionalign.data.captioned import IdentityMode
from clipvisionalign.models.aligner import AlignerConfig
from clipvisionalign.models.heads import HEADS
from clipvisionalign.training.contrastive import LossConfig
from clipvisionalign.training.fine_tuning import IMAGE_FROZEN, LoraConfig

#: TensorBoard by default, where it is installed.
DEFAULT_TRACKERS = "tensorboard"


@dataclass
class RunConfig:
    """A training run.

    Args:
        data: the data set: a folder or file in any of the known layouts; or a stream: WebDataset shards
            ("train-{000000..000099}.tar", or their folder), Parquet files by such a pattern, a folder of Hugging Face's
            `save_to_disk`.
        dev_data: where the dev split is, if not there.
        out: the run folder to write.
        layout: the dataset layout; "auto" recognises it.
        group: a column of a table: without splits of its own, all images with one value of it stand in one split, as
            those of one identity do.
        identity: which captions belong to which images: "auto", an image's own, and those of all images of the identity
            that the data set gives it; "caption", also every caption that is equal to one of them word by word; "none",
            its own alone.
        model: the towers and the attention design.
        init: a finished run to start from, with the same towers, tokenizer and pooling; what it lacks (e.g. a fusion)
            is reinitialised, and has to be trained.
        epochs: passes over the training images.
        steps: end after so many steps, wherever in an epoch that is; 0 for all steps of all epochs.
        train_images: train on so many images only, the first by a hash of their names; 0 for all.
        batch: images in a step, over all processes; each brings all of its captions.
        chunk: images that go through the towers at a time, for batches beyond memory (gradient caching); 0 for all.
        text_lr: learning rate of the text tower.
        image_lr: learning rate of the image tower, where it is trained.
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
        augment: how training images vary; mirroring is left out by "crop", all variation by "none".
        views: how many variants of each image are kept on disk for a frozen image tower.
        negatives: hard negatives per image and per caption for the fusion of the design "cross".
        fusion_weight: weight of the late interaction's and the fusion's loss beside the dual encoder's.
        patience: epochs without a better dev figure after which training stops; all of dev, and each of its halves, has
            this patience of its own.
        best_by: what an epoch is chosen by on dev: "rsum", or "loss", the training's own loss of the dual encoder.
        seed: of everything drawn at random.
        precision: dtype of training; "auto" times both towers in both and takes each one's fastest.
            Evaluation is in float32.
        device: "auto", "cpu", "cuda", ...
        workers: processes that decode images where the image tower is trained.
        checkpoint_minutes: time between two checkpoints; one is also written after each epoch and when asked to
            stop.
        cache: where a frozen tower's features are kept: "auto" for the user's cache folder, a folder, or "off".
        trackers: where figures go beside metrics.jsonl, of tensorboard, wandb, mlflow, by commas; "" for nowhere.
        compile: let torch.compile make kernels for the towers; takes a minute at the start, and a C++ compiler. On the
            CPU measured (docs/results.md) an image tower that only looks gained, a text tower that is trained lost.
        shard: with several processes, shard the parameters over them (FSDP2) instead of replicating them (DDP).
        profile: train so many steps, print where the time goes, and leave no run.
        overwrite: replace what is in the run folder.
    """

    data: str = ""
    dev_data: str = ""
    out: str = "runs/self"
    layout: str = "auto"
    group: str = ""
    identity: IdentityMode = "auto"
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
    trackers: str = DEFAULT_TRACKERS
    compile: bool = False
    shard: bool = False
    profile: int = 0
    overwrite: bool = False


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
    for names, holds, allowed in RANGES:
        for name in names.split():
            value = reduce(getattr, name.split("."), config)
            if not holds(value):
                raise ValueError(f"--{name} should be {allowed}, not {value}")


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


def caches_image_features(config: RunConfig) -> bool:
    """Whether a run would keep its image tower's features on disk, by hashes of the images' bytes."""
    adapted = config.peft == "lora" and config.lora.towers != "text"
    return config.freeze in IMAGE_FROZEN and config.cache != "off" and not adapted


def caches_caption_features(config: RunConfig) -> bool:
    """Whether a run would keep on disk what its text tower gives for the captions."""
    adapted = config.peft == "lora" and config.lora.towers != "image"
    return config.freeze in ("both", "all") and config.cache != "off" and not adapted


def images_per_process(config: RunConfig, world_size: int) -> int:
    """How many images of a step a process has, at most: a chunk of as many is the whole of it."""
    return -(-config.batch // world_size)


def trains_from_random(config: RunConfig) -> bool:
    """Whether the image tower starts at random and is trained, so that its batch norms gather statistics."""
    return config.model.image_tower.weights == "random" and config.freeze not in IMAGE_FROZEN
