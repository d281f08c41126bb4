"""The settings of a training run, in sections."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from clipvisionalign.data.captioned import CaptionMode, IdentityMode
from clipvisionalign.models.aligner import AlignerConfig
from clipvisionalign.training.contrastive import LossConfig
from clipvisionalign.training.fine_tuning import IMAGE_FROZEN, LoraConfig

#: TensorBoard by default, where it is installed.
DEFAULT_TRACKERS = "tensorboard"


@dataclass
class DatasetConfig:
    """Data: where it is, how it is read, and how images vary.

    Args:
        data: the data set: a folder or file in any of the known layouts; or a stream: WebDataset shards
            ("train-{000000..000099}.tar", or their folder), Parquet files by such a pattern, a folder of Hugging Face's
            `save_to_disk`.
        dev_data: where the dev split is, if not there.
        layout: the dataset layout; "auto" recognises it.
        group: a column of a table: without splits of its own, all images with one value of it stand in one split, as
            those of one identity do.
        identity: which captions belong to which images: "auto", an image's own, and those of all images of the identity
            that the data set gives it; "caption", also every caption that is equal to one of them word by word; "none",
            its own alone.
        captions: "each" caption as it is; or "joined", long texts: in each epoch an image has one text of any number of
            its captions in random order, and in the dev gallery one text of each number of them.
        train_images: train on so many images only, the first by a hash of their names; 0 for all.
        augment: how training images vary; mirroring is left out by "crop", all variation by "none".
    """

    data: str = ""
    dev_data: str = ""
    layout: str = "auto"
    group: str = ""
    identity: IdentityMode = "auto"
    captions: CaptionMode = "each"
    train_images: int = 0
    augment: Literal["flip+crop", "crop", "none"] = "flip+crop"


@dataclass
class ScheduleConfig:
    """Schedule: how long a run trains, in which steps, and which epoch it keeps.

    Args:
        epochs: passes over the training images; 0 to measure a pretrained model as it is.
        steps: end after so many steps, wherever in an epoch that is; 0 for all steps of all epochs.
        stages: train in stages, such as "heads:1,all:3": what is trained, and for how many epochs ("@1e-5" behind them
            for another learning rate in that stage, "@5e-5/1e-4/3e-4" for those of the text tower, the image tower and
            the heads). "heads" keeps both towers as they are, "text" and "image" train one of them, "all" both, each
            with the heads; "fusion" trains the fusion alone. Each stage starts from the last epoch of the one before
            it.
        batch: images in a step, over all processes; each brings all of its captions.
        warmup: share of all steps in which the learning rates rise, before they fall along a cosine.
        patience: epochs without a better dev figure after which training stops; all of dev, and each of its halves, has
            this patience of its own.
        best_by: what an epoch is chosen by on dev: "rsum", or "loss", the training's own loss of the dual encoder;
            "last" chooses nothing on dev, and keeps the last epoch.
    """

    epochs: int = 6
    steps: int = 0
    stages: str = ""
    batch: int = 128
    warmup: float = 0.08
    patience: int = 3
    best_by: Literal["rsum", "loss", "last"] = "rsum"


@dataclass
class OptimizerConfig:
    """Optimizer: learning rates, weight decay, and the moving average of the weights.

    Args:
        text_lr: learning rate of the text tower.
        image_lr: learning rate of the image tower, where it is trained.
        head_lr: learning rate of the projection heads and the fusion.
        weight_decay: AdamW's.
        layer_decay: a tower's last layer learns at its rate, the one before at this times it, and so on.
        ema: the kept weights are a moving average; after n steps it forgets by this factor a step, less at the start.
    """

    text_lr: float = 1e-4
    image_lr: float = 3e-5
    head_lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    ema: float = 0.99


@dataclass
class FusionLossConfig:
    """Loss of late interaction and fusion.

    Args:
        negatives: hard negatives per image and per caption for the fusion of the design "cross".
        fusion_weight: weight of the late interaction's and the fusion's loss beside the dual encoder's.
    """

    negatives: int = 4
    fusion_weight: float = 1.0


@dataclass
class FreezingConfig:
    """Freezing: what is trained, and where outputs of frozen towers are kept.

    Args:
        freeze: which towers stay as they are; "all" also keeps the heads, so that the fusion alone is trained. The
            embeddings of a text tower's tokens stay as they are in every mode, "none" too: tokens that no training
            caption has would lose their place beside those that some have.
        freeze_layers: parameters that stay as they are, by name with *, such as "text_tower.encoder.encoder.layer.0.*";
            several with commas between them.
        peft: "lora" trains low-rank adapters instead of a tower's own weights (needs clipvisionalign[scale]).
        lora: the adapters.
        views: how many variants of each image are kept on disk for a frozen image tower.
        cache: where a frozen tower's features are kept: "auto" for the user's cache folder, a folder, or "off".
        freeze_blocks: how many of the image tower's first blocks stay as they are where the tower is trained, for
            EfficientNets, MobileNets, ResNets and vision transformers. Their outputs are kept on disk, in `views`
            variants of each image, so that a step costs what the other blocks cost: of the 7 blocks of
            tf_efficientnet_lite2, 4 leave a third of it.
    """

    freeze: Literal["image", "text", "both", "none", "all"] = "image"
    freeze_layers: list[str] = field(default_factory=list)
    peft: Literal["none", "lora"] = "none"
    lora: LoraConfig = field(default_factory=LoraConfig)
    views: int = 4
    cache: str = "auto"
    freeze_blocks: int = 0


@dataclass
class CheckpointConfig:
    """Checkpoints and the run folder: what a run starts from and keeps of it, and what it leaves.

    Args:
        out: the run folder to write.
        overwrite: replace what is in the run folder.
        init: a finished run to start from, with the same towers, tokenizer and pooling; what it lacks (e.g. a fusion)
            is reinitialised, and has to be trained.
        distill: weight of a loss that keeps the vectors of training images and captions near those of the model that
            the run starts from (`init`, or the pretrained model); 0 for none.
        checkpoint_minutes: minutes between two checkpoints; one is also written after each epoch and when asked to
            stop.
    """

    out: str = "runs/self"
    overwrite: bool = False
    init: str = ""
    distill: float = 0.0
    checkpoint_minutes: float = 5.0


@dataclass
class RuntimeConfig:
    """Runtime: where and how a run is computed and recorded.

    Args:
        seed: of everything drawn at random.
        device: "auto", "cpu", "cuda", ...
        precision: dtype of training; "auto" times both towers in both and takes each one's fastest.
            Evaluation is in float32.
        chunk: images that go through the towers at a time, for batches beyond memory (gradient caching); 0 for all.
        workers: processes that decode images where the image tower is trained.
        compile: let torch.compile make kernels for the towers; takes a minute at the start, and a C++ compiler. On the
            CPU measured (docs/results.md) an image tower that only looks gained, a text tower that is trained lost.
        shard: with several processes, shard the parameters over them (FSDP2) instead of replicating them (DDP).
        trackers: where figures go beside metrics.jsonl, of tensorboard, wandb, mlflow, by commas; "" for nowhere.
        profile: train so many steps, print where the time goes, and leave no run.
    """

    seed: int = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    chunk: int = 0
    workers: int = 2
    compile: bool = False
    shard: bool = False
    trackers: str = DEFAULT_TRACKERS
    profile: int = 0


# The fields of the last base class come first.
@dataclass
class RunConfig(
    RuntimeConfig, CheckpointConfig, FreezingConfig, FusionLossConfig, OptimizerConfig, ScheduleConfig, DatasetConfig
):
    """The settings of a training run, in sections.

    Each setting has one name, by which a flag, a file, a plan and Python give it, and one section, of which it is a
    field. The sections `model` and `loss` are objects of their own; every other section is this same object, typed as
    that section, so that a function which takes an `OptimizerConfig` reads no other settings:

        >>> config = RunConfig(data="captions", epochs=3)
        >>> config.epochs, config.schedule.epochs, config.model.design
        (3, 3, 'self')

    `dataset` is a `DatasetConfig`, `schedule` a `ScheduleConfig`, `optimizer` an `OptimizerConfig`, `fusion_loss` a
    `FusionLossConfig`, `freezing` a `FreezingConfig`, `checkpoints` a `CheckpointConfig` and `runtime` a
    `RuntimeConfig`; these describe their settings. Nothing is checked here: `train` refuses settings that do not fit.

    Args:
        model: the towers and the attention design.
        loss: what the dual encoder is trained with.
    """

    model: AlignerConfig = field(default_factory=AlignerConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    @property
    def dataset(self) -> DatasetConfig:
        """The data, how it is read, and how images vary."""
        return self

    @property
    def schedule(self) -> ScheduleConfig:
        """How long the run trains, in which steps, and which epoch it keeps."""
        return self

    @property
    def optimizer(self) -> OptimizerConfig:
        """Learning rates, weight decay, and the moving average of the weights."""
        return self

    @property
    def fusion_loss(self) -> FusionLossConfig:
        """The loss of late interaction and fusion."""
        return self

    @property
    def freezing(self) -> FreezingConfig:
        """Which parameters are trained, and where outputs of frozen towers are kept."""
        return self

    @property
    def checkpoints(self) -> CheckpointConfig:
        """The run folder, what the run starts from, and when checkpoints are written."""
        return self

    @property
    def runtime(self) -> RuntimeConfig:
        """Where and how the run is computed and recorded."""
        return self


#: The sections whose settings have flags without a prefix; those of `model` and `loss` have `--model.` and `--loss.`.
SECTIONS: dict[str, type] = {
    "dataset": DatasetConfig, "schedule": ScheduleConfig, "optimizer": OptimizerConfig,
    "fusion_loss": FusionLossConfig, "freezing": FreezingConfig, "checkpoints": CheckpointConfig,
    "runtime": RuntimeConfig,
}  # fmt: skip


def flatten_sections(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the sections that a file may have them in.

    Args:
        settings: names and values, in sections or not: `{"schedule": {"epochs": 3}, "seed": 1}`.

    Returns:
        Names and values as flags have them: `{"epochs": 3, "seed": 1}`.

    Raises:
        ValueError: a setting of another section, one that is there twice, or a section without settings.
    """
    flat = {name: value for name, value in settings.items() if name not in SECTIONS}
    for section, kind in SECTIONS.items():
        if section not in settings:
            continue
        if not isinstance(settings[section], dict):
            raise ValueError(f"{section}: should be settings with their values, not {settings[section]!r}")
        names = [each.name for each in fields(kind)]
        for name, value in settings[section].items():
            if name not in names:
                raise ValueError(f"{section}.{name}: no such setting; '{section}' has {', '.join(names)}")
            if name in flat:
                raise ValueError(f"{section}.{name}: is there twice, in the section and outside of it")
            flat[name] = value
    return flat


def caches_image_features(config: FreezingConfig) -> bool:
    """Whether a run keeps its image tower's outputs on disk, by hashes of the images' bytes.

    Args:
        config: What is trained, and where outputs are kept.

    Returns:
        Whether the image tower or its first blocks are frozen, without adapters, and `cache` is not "off".
    """
    adapted = config.peft == "lora" and config.lora.towers != "text"
    frozen = config.freeze in IMAGE_FROZEN or config.freeze_blocks > 0
    return frozen and config.cache != "off" and not adapted


def frozen_blocks(config: FreezingConfig) -> int:
    """The number of the image tower's first blocks that are frozen, where not all of the tower is.

    Args:
        config: What is trained, and where outputs are kept.

    Returns:
        `freeze_blocks`; 0 where the tower is frozen as a whole.
    """
    return 0 if config.freeze in IMAGE_FROZEN else config.freeze_blocks


def caches_caption_features(config: FreezingConfig) -> bool:
    """Whether a run keeps its text tower's outputs for the captions on disk.

    Args:
        config: What is trained, and where outputs are kept.

    Returns:
        Whether the text tower is frozen together with the image tower, without adapters, and `cache` is not "off".
    """
    adapted = config.peft == "lora" and config.lora.towers != "image"
    return config.freeze in ("both", "all") and config.cache != "off" and not adapted


def starts_from_model(config: RunConfig) -> bool:
    """Whether a run starts from a model that has both towers and heads: another run, or a pretrained dual encoder.

    Args:
        config: The settings of the run.

    Returns:
        Whether `init` or `model.pretrained` is given.
    """
    return bool(config.init or config.model.pretrained)


def keeps_last_epoch(config: RunConfig) -> bool:
    """Whether a run keeps its last epoch whatever its dev figure, which does not depend on a fusion trained alone.

    Args:
        config: The settings of the run.

    Returns:
        Whether the fusion alone is trained, or `best_by` is "last".
    """
    return config.freeze == "all" or config.best_by == "last"


def images_per_process(config: ScheduleConfig, world_size: int) -> int:
    """The number of a step's images that one process has, at most: a chunk of as many is all of them.

    Args:
        config: The settings with `batch`, the images in a step.
        world_size: Number of processes.

    Returns:
        `batch` / `world_size`, rounded up.
    """
    return -(-config.batch // world_size)


def trains_from_random(config: RunConfig) -> bool:
    """Whether the image tower starts at random and is trained, so that its batch norms gather statistics.

    Args:
        config: The settings of the run.

    Returns:
        Whether `model.image_tower.weights` is "random" and `freeze` leaves the image tower to be trained.
    """
    return config.model.image_tower.weights == "random" and config.freeze not in IMAGE_FROZEN
