"""The optimizer, and its learning rate over the steps of a run."""

from __future__ import annotations

import math

import torch

from clipvisionalign.training.config import OptimizerConfig
from clipvisionalign.training.fine_tuning import optimizer_groups
from clipvisionalign.training.step import Step


def build_optimizer(config: OptimizerConfig, step: Step) -> torch.optim.Optimizer:
    """AdamW with a learning rate for each tower and for the heads, and layer-wise decay."""
    rates = {"text_tower": config.text_lr, "image_tower": config.image_lr}
    groups = optimizer_groups(
        step.towers.named_parameters(), step.aligner, rates, config.head_lr, config.weight_decay, config.layer_decay
    )
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def build_schedule(step: int, steps: int, warmup: float) -> float:
    """Linear up, then a cosine down to a fiftieth."""
    warmup_steps = max(1, round(steps * warmup))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
