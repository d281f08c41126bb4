"""What `train` would refuse, without a run folder: a step with synthetic images, and what later stages train."""

from __future__ import annotations

import copy

import torch

from clipvisionalign.batch import Batch, group_by_length
from clipvisionalign.log import log_to
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.text_families import preserve_rng_state
from clipvisionalign.training.build import (
    build_aligner,
    build_loss,
    check_batch_norm_statistics,
    found_here,
    freeze_parts,
    start_distributed,
)
from clipvisionalign.training.config import RunConfig, frozen_blocks
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.fine_tuning import set_train_mode
from clipvisionalign.training.forward import PrecomputedFeatures, Towers
from clipvisionalign.training.optimizer import build_optimizer
from clipvisionalign.training.run_stage import stage_settings
from clipvisionalign.training.stages import parse_stages
from clipvisionalign.training.step import Step


def try_step(config: RunConfig, base: RunConfig | None = None) -> None:
    """Raise what `train` would raise before the end of its first step, whatever the data.

    Tried are the settings, what they ask of this machine, the towers with their weights, and a step with two made-up
    images. Nothing is written.

    Args:
        config: The settings of the run.
        base: The settings of the run `init`, which need not be trained yet; None for one that is there.

    Raises:
        ValueError: The settings do not fit each other, or the model fails in its step.
        OSError: Weights or files cannot be read.
        ModuleNotFoundError: A package is missing.
    """
    check_settings(config)
    for number in range(len(parse_stages(config.stages)) or 1):
        stage = stage_settings(config, number)
        _try_stage(stage, base)
        base = stage


def check_later_stages(config: RunConfig, distributed: Distributed) -> None:
    """Check, before the first stage of a run trains, that no later one would be refused by its settings.

    Args:
        config: The settings of the run, with the commits of its towers.
        distributed: The processes of the run.

    Raises:
        ValueError: The settings of a later stage do not fit the model, or nothing would be trained.
        ModuleNotFoundError: A package is missing.
    """
    later = [stage_settings(config, number) for number in range(1, len(parse_stages(config.stages)))]
    if not later:
        return
    with preserve_rng_state():
        # What a stage refuses depends on no weight.
        model = Aligner(config.model, load_weights=False)
        for stage in later:
            check_settings(stage)
            aligner = copy.deepcopy(model)
            freeze_parts(aligner, stage)
            check_batch_norm_statistics(aligner, stage, distributed)


def _try_stage(config: RunConfig, base: RunConfig | None) -> None:
    """`try_step` of a run without stages. base: the settings of the run `init`; None for one that is there."""
    device, _, _ = found_here(config.runtime)
    processes = start_distributed(config, device, [])
    with preserve_rng_state():
        below = None if base is None else Aligner(base.model)
        with log_to(lambda line: None):
            aligner = build_aligner(config, device, True, below)
        check_batch_norm_statistics(aligner, config, processes)
        loss_of = build_loss(config.loss, aligner)
        set_train_mode(aligner, config.freeze, frozen_blocks(config))
        try:
            step = Step(
                Towers(aligner, loss_of, (torch.float32,) * 2), processes, config.negatives, config.fusion_weight
            )
            build_optimizer(config.optimizer, step)
            step.backward(_made_up(aligner).to(device), PrecomputedFeatures())
        except (ValueError, OSError, ModuleNotFoundError):
            raise
        except Exception as error:
            reason = " ".join((str(error).strip().splitlines() or [""])[0].split())
            own = f", with --loss.name {config.loss.name}" if loss_of.custom_loss is not None else ""
            raise ValueError(f"a first step fails{own}: {type(error).__name__}: {reason}") from error


def _made_up(aligner: Aligner) -> Batch:
    """Two images with a caption each."""
    two = torch.arange(2)
    tokens = aligner.text_tower.tokenize(["a dog", "two children run across the grass"])
    pixels = aligner.image_tower.image_transform.random_pixels(2)
    return Batch(two, pixels, group_by_length(tokens, aligner.text_tower.pad), two, two)
