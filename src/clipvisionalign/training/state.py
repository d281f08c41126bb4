"""What changes while a model trains: its weights, its optimizer, and how far the run is; saved and loaded."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.training.best_epoch import BestEpoch
from clipvisionalign.training.checkpoint import (
    load_sharded,
    random_states,
    restore_random_states,
    save_checkpoint,
    save_sharded,
    tensor_names,
)
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.distributed import Distributed, local_shard
from clipvisionalign.training.fine_tuning import ExponentialMovingAverage
from clipvisionalign.training.forward import Towers
from clipvisionalign.training.validation import DevMetrics


@dataclass
class TrainProgress:
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
    def of(cls, state: dict[str, Any], best_by: str) -> TrainProgress:
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

    def update_best(self, metrics: DevMetrics, config: RunConfig) -> None:
        """Take note of an epoch's dev figures; training stops once all of dev and both halves have lost patience."""
        scores = metrics.scores(config.best_by)
        self.chosen += [BestEpoch() for _ in scores[len(self.chosen) :]]
        for each, score in zip(self.chosen, scores, strict=True):
            # The dual encoder tells nothing of a fusion that is trained alone: its last epoch is kept.
            each.update(self.epoch, score, config.patience, always=config.freeze == "all")
        if self.best_epoch == self.epoch:
            self.best = metrics.metrics.rsum.value
        self.stopped = all(each.stopped for each in self.chosen)

    def add_step(self, values: np.ndarray) -> None:
        """One step more, with its loss, fusion loss and accuracy."""
        self.step, self.seen = self.step + 1, self.seen + 1
        self.sums = [total + float(value) for total, value in zip(self.sums, values, strict=True)]

    def next_epoch(self) -> None:
        """To the beginning of the next epoch."""
        self.epoch, self.step_in_epoch, self.sums, self.seen = self.epoch + 1, 0, [0.0, 0.0, 0.0], 0


class TrainState:
    """All that changes while a model trains, to save and to load: as one file, or sharded as the model is."""

    def __init__(self, towers: Towers, average: ExponentialMovingAverage, optimizer: Any, scheduler: Any) -> None:
        self.towers, self.average, self.optimizer, self.scheduler = towers, average, optimizer, scheduler

    def state_dict(self, processes: Distributed) -> dict[str, Any]:
        """Everything, as a checkpoint of one file holds it; of a sharded model what is not sharded. Every process calls
        this."""
        states = processes.all_gather_object(random_states())
        rest = {"scheduler": self.scheduler.state_dict(), "random": states, "updates": self.average.updates}
        if self.average.sharded:
            return rest
        parts = {"towers": self.towers, "average": self.average, "optimizer": self.optimizer}
        return {**{name: part.state_dict() for name, part in parts.items()}, **rest}

    def save(self, out: Path, step: int, state: dict[str, Any], distributed: Distributed) -> None:
        """Write a checkpoint: `state_dict` and what else belongs to the run; every process calls this.

        Raises OSError.
        """
        if self.average.sharded:
            save_sharded(out, step, self._tensors(), state, distributed)
            return
        # All get the error of one that cannot write, and go on together.
        distributed.run_on_main(lambda: save_checkpoint(out, step, state))

    def load(self, state: dict[str, Any], distributed: Distributed) -> None:
        """Put everything where a checkpoint has it."""
        if "shards" in state:
            self._fill_optimizer(tensor_names(Path(state["shards"])))
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
        restore_random_states(random_of[min(distributed.rank, len(random_of) - 1)])

    def is_finite(self) -> bool:
        """Whether nothing that is trained, of this process's part of it, is a NaN or infinite."""
        trained = [parameter for parameter in self.towers.parameters() if parameter.requires_grad]
        return are_finite([*trained, *self.average.weights.values()])

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"towers.{name}": tensor for name, tensor in self.towers.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.weights.items()}
        for name, parameter in self.towers.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{kind}"] = value
        return tensors

    def _fill_optimizer(self, saved_names: set[str]) -> None:
        """What AdamW keeps of each parameter, before its first step: there has to be something to load into.

        there: what a checkpoint has: nothing of a parameter that had no gradient, and of none before the first step.
        """
        for name, parameter in self.towers.named_parameters():
            if f"optimizer.{name}.exp_avg" in saved_names:
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def are_finite(tensors: Collection[Tensor]) -> bool:
    """Whether no weight, of this process's part of them, is a NaN or infinite."""
    own = [part for part in (local_shard(tensor.detach()) for tensor in tensors) if part.numel()]
    return all(math.isfinite(norm) for norm in torch._foreach_norm(own, math.inf)) if own else True


def restore_aligner(aligner: Aligner, state: dict[str, Any]) -> None:
    """Give a model the weights and buffers of a checkpoint, those that are not trained too.

    Raises ValueError where they are another model's.
    """
    if "shards" in state:
        tensors = {f"towers.aligner.{name}": tensor for name, tensor in aligner.state_dict().items()}
        load_sharded(Path(state["shards"]), tensors)
        return
    aligner_state = {
        name.removeprefix("aligner."): tensor for name, tensor in state["towers"].items() if name.startswith("aligner.")
    }
    try:
        aligner.load_state_dict(aligner_state)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is not of this model: {str(error).splitlines()[1].strip()}") from None
