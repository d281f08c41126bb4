"""The optimizer, and its learning rate over the steps of a run."""

from __future__ import annotations

import math

import torch

from clipvisionalign.training.config import OptimizerConfig, RunConfig
from clipvisionalign.training.fine_tuning import IMAGE_FROZEN, TEXT_FROZEN, optimizer_groups
from clipvisionalign.training.step import Step


def build_optimizer(config: OptimizerConfig, step: Step) -> torch.optim.Optimizer:
    """AdamW with a learning rate for each tower and for the heads, and layer-wise decay.

    Args:
        config: The settings.
        step: The step, whose model's trainable parameters are optimized.

    Returns:
        The optimizer.

    Source: Loshchilov and Hutter, "AdamW", arXiv:1711.05101.
    """
    rates = {"text_tower": config.text_lr, "image_tower": config.image_lr}
    groups = optimizer_groups(
        step.towers.named_parameters(), step.aligner, rates, config.head_lr, config.weight_decay, config.layer_decay
    )
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def build_schedule(step: int, steps: int, warmup: float) -> float:
    """The factor of the learning rates at a step: linear up, then along a cosine down to a fiftieth.

    Args:
        step: Number of the step, from 0.
        steps: Number of all steps.
        warmup: Share of all steps in which the factor rises; at least one step.

    Returns:
        Above 0 and at most 1.

    Source: Loshchilov and Hutter, "SGDR", arXiv:1608.03983, for the cosine.

    >>> [round(build_schedule(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.51, 0.02]
    """
    warmup_steps = max(1, round(steps * warmup))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def trained_rates(config: RunConfig) -> dict[str, float]:
    """The learning rates of what a run trains.

    Args:
        config: The settings of the run.

    Returns:
        The rates by the names of their settings: of the towers that are trained, or have adapters, and of the heads.

    >>> trained_rates(RunConfig(freeze="image", text_lr=1e-5, head_lr=1e-3))
    {'text_lr': 1e-05, 'head_lr': 0.001}
    """
    adapted = config.lora.towers if config.peft == "lora" else ""
    towers = {"text": TEXT_FROZEN, "image": IMAGE_FROZEN}
    trained = [name for name, frozen in towers.items() if config.freeze not in frozen or adapted in (name, "both")]
    return {f"{name}_lr": getattr(config, f"{name}_lr") for name in [*trained, "head"]}
