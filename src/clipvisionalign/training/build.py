"""Device, processes, model and loss of a run, built from its settings."""

from __future__ import annotations

import logging
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.device import best_device
from clipvisionalign.models.run_files import PRETRAINED_FOLDER
from clipvisionalign.training.config import (
    DEFAULT_TRACKERS,
    FreezingConfig,
    RunConfig,
    RuntimeConfig,
    frozen_blocks,
    images_per_process,
    trains_from_random,
)
from clipvisionalign.training.contrastive import DualEncoderLoss, LossConfig
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.fine_tuning import add_lora, divided_tower, freeze, image_batch_norms
from clipvisionalign.training.init_run import check_frozen_initialised, load_init_weights
from clipvisionalign.training.metrics_logger import available_trackers

logger = logging.getLogger(__name__)


def found_here(config: RuntimeConfig) -> tuple[torch.device, list[str], list[str]]:
    """What settings ask of this machine.

    Args:
        config: The settings.

    Returns:
        The device; the trackers that are installed; and a line for each that is not, though nobody named it.

    Raises:
        ValueError: Something that was asked for by name is not to be had.
    """
    device = best_device(config.device)
    usable, words = available_trackers(
        config.trackers.split(",") if config.trackers else [], config.trackers != DEFAULT_TRACKERS
    )
    if config.compile and device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile true needs a C++ compiler: none is here as g++, nor is one named by CXX")
    return device, usable, words


def start_distributed(config: RunConfig, device: torch.device, trackers: list[str]) -> Distributed:
    """Join the processes of a run.

    Args:
        config: The settings of the run.
        device: The device of this process.
        trackers: Names of the trackers that record the run.

    Returns:
        The processes.

    Raises:
        ValueError: A batch has fewer images than there are processes, or there is one to shard parameters over.
    """
    processes = Distributed(device, config.shard, trackers, str(Path(config.out)))
    if config.batch < processes.world_size:
        message = f"each needs an image of every step: at least --batch {processes.world_size}"
        raise ValueError(f"--batch {config.batch} on {processes.world_size} processes: {message}")
    return processes


def build_loss(config: LossConfig, aligner: Aligner) -> DualEncoderLoss:
    """What the dual encoder is trained with.

    Args:
        config: The settings of the loss.
        aligner: The model; its temperature stays where it starts if it is not to be learned.

    Returns:
        The loss, on the model's device.
    """
    if not config.learn_temperature:
        aligner.log_scale.requires_grad_(False)
    model_bias = aligner.logit_bias
    if model_bias is not None and config.name == "sigmoid":
        scale, bias = aligner.scale().item(), model_bias.item()
        logger.info(f"the sigmoid loss has the model's own scale {scale:.1f} and bias {bias:.2f}, and trains them")
        if config.bias != LossConfig.bias:
            logger.info("no effect of --loss.bias: the pretrained model has its own, which is trained")
    return DualEncoderLoss(config, model_bias is not None).to(aligner.device)


def build_aligner(
    config: RunConfig, device: torch.device, is_new_run: bool, base: Aligner | None = None,
    directions: torch.Tensor | None = None,
) -> Aligner:  # fmt: skip
    """The model on its device; what is frozen, and adapters, as the settings want them.

    Args:
        config: The settings of the run.
        device: Where the model is trained.
        is_new_run: Whether no weights of a checkpoint come.
        base: As `model` in `load_init_weights`.
        directions: As of `Aligner`.

    Returns:
        The model.

    Raises:
        FileNotFoundError: Weights of a tower are not there.
        ValueError: The settings do not fit the model, another run's weights do not fit it, or no step would change a
            vector or a score.
    """
    # A run that resumes has the files that it began with, whatever became of the folder they are from.
    kept = Path(config.out) if not is_new_run and (Path(config.out) / PRETRAINED_FOLDER).is_dir() else None
    aligner = Aligner(config.model, kept, load_weights=kept is None, directions=directions)
    loaded = load_init_weights(aligner, config.init, base) if config.init and is_new_run else set()
    aligner = aligner.to(device).to(memory_format=torch.channels_last)
    if config.init and is_new_run:
        reinitialised = sorted({name.split(".")[0] for name in set(aligner.state_dict()) - loaded})
        logger.info(f"weights of {config.init}; reinitialised: {', '.join(reinitialised) or 'nothing'}")
    if aligner.logit_bias is not None:
        # No other loss has a gradient for it.
        aligner.logit_bias.requires_grad_(config.loss.name == "sigmoid")
    redundant_patterns = freeze_parts(aligner, config)
    if redundant_patterns and is_new_run and config.peft == "none":
        logger.info(f"no effect of --freeze_layers {' '.join(redundant_patterns)}: frozen without that")
    if is_new_run and not config.profile:
        # A profile times what it does not keep.
        check_frozen_initialised(aligner, loaded, config.freeze, config.freeze_layers, config.init)
    return aligner


def freeze_parts(aligner: Aligner, config: RunConfig) -> list[str]:
    """Freeze what the settings keep as it is, and add their adapters.

    Args:
        aligner: The model; it is changed itself.
        config: The settings of the run.

    Returns:
        The patterns of `freeze_layers` that froze nothing more.

    Raises:
        ValueError: The settings do not fit the model, or no step would change a vector or a score.
        ModuleNotFoundError: Adapters are wanted, and their package is not installed.
    """
    redundant_patterns = freeze(aligner, config.freeze, config.freeze_layers, frozen_blocks(config.freezing))
    if config.peft == "lora":
        add_lora(aligner, config.lora, config.freeze_layers)
    if config.epochs:
        _check_trains_something(aligner, config.freezing)
    return redundant_patterns


def _check_trains_something(aligner: Aligner, config: FreezingConfig) -> None:
    """Raises ValueError where no step would change a vector or a score."""
    names = {name for name, parameter in aligner.named_parameters() if parameter.requires_grad}
    if names - {"log_scale", "logit_bias"}:
        return
    flags = f"--freeze {config.freeze}"
    if config.freeze_layers:
        flags += f" with --freeze_layers {' '.join(config.freeze_layers)}"
    if not names:
        raise ValueError(f"{flags}: nothing is left to be trained")
    towers = aligner.config.pretrained and not any(True for _ in aligner.image_head.parameters())
    why = ", as this model has its projections within its towers" if towers else ""
    raise ValueError(
        f"{flags} would train the temperature alone, which changes no rank{why}: train a tower (--freeze image or "
        "--freeze none; of --stages, leave heads out), adapters (--peft lora --freeze image), or the design 'late' or "
        "'cross'"
    )


def count_trained_parameters(aligner: Aligner) -> int:
    """The number of parameters that receive gradients.

    Args:
        aligner: The model, frozen as it is trained.

    Returns:
        The number of their elements.
    """
    return sum(parameter.numel() for parameter in aligner.parameters() if parameter.requires_grad)


def _gathers_statistics(aligner: Aligner, blocks: int) -> bool:
    """Whether the image tower has batch norms behind its frozen blocks."""
    norms = set(image_batch_norms(aligner))
    if blocks:
        early = divided_tower(aligner, blocks).parts().early_modules(blocks)
        norms -= {module for part in early for module in part.modules()}
    return bool(norms)


def check_batch_norm_statistics(aligner: Aligner, config: RunConfig, distributed: Distributed) -> None:
    """Check that no batch norm would gather statistics of a part of the batch.

    Of a chunk, or of each of several processes' own images, they would make the model that is measured a mixture of no
    process's.

    Args:
        aligner: The model.
        config: The settings of the run.
        distributed: Its processes.

    Raises:
        ValueError: One would.
    """
    chunked = 0 < config.chunk < images_per_process(config.schedule, distributed.world_size)
    if (
        not (distributed.is_distributed or chunked)
        or not trains_from_random(config)
        or not _gathers_statistics(aligner, frozen_blocks(config.freezing))
    ):
        return
    name = f"{config.model.image_tower.name} starts at random and has batch norms, whose statistics"
    remedy = "give it weights, --freeze image, or a backbone without batch norm, such as vit_tiny_patch16_224"
    if distributed.is_distributed:
        raise ValueError(f"{name} {distributed.world_size} processes would each gather of their own images; {remedy}")
    raise ValueError(f"--chunk: {name} would be those of a chunk, not of the batch; {remedy}")


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and torch.

    Args:
        seed: From 0 to 2**32 - 1.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
