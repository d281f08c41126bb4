"""What a run is built from: device, processes, model and loss, each as the settings want it."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.device import best_device
from clipvisionalign.training.config import TRACKERS, RunConfig, _learns_from_random, share_of_step
from clipvisionalign.training.fine_tuning import add_lora, freeze, norms
from clipvisionalign.training.init_run import refuse_frozen_at_random, start_from
from clipvisionalign.training.losses import PairLoss
from clipvisionalign.training.processes import Processes
from clipvisionalign.training.records import Say, usable_trackers


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
