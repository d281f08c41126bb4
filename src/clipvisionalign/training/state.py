"""The state of a training, saved and loaded: weights, optimizer, and progress."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
from clipvisionalign.training.config import ScheduleConfig
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.ema import ExponentialMovingAverage
from clipvisionalign.training.forward import Towers
from clipvisionalign.training.sharding import local_shard
from clipvisionalign.training.validation import DevMetrics


@dataclass
class TrainProgress:
    """The progress of a run: what the loop counts, beside weights and random states.

    Attributes:
        step: Steps so far, skipped ones included.
        skipped: Steps that were not taken.
        left_out: Images that could not be read, or were in a skipped step, each as often as it came.
        epoch: Number of the epoch, from 1.
        step_in_epoch: Steps of it that are done.
        sums: Sums over the epoch of loss, fusion loss and accuracy.
        seen: Number of steps in these sums.
        best: Dev rsum of the best epoch; below 0 for none.
        chosen: The best epoch by all of dev, then by each half.
        history: Figures of each epoch.
        stopped: Whether patience has ended.
        seconds: Seconds of training, without pauses.
        records: Bytes of metrics.jsonl.
        start: Dev rsum of the model that the run starts from, and its interval: value, low and high, those None
            where there are too few images; empty for no model.
        distillation: Sum over the epoch of the distances from that model.
        reported: The severity at which each kind of failure was last logged.
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
    start: list[float | None] = field(default_factory=list)
    distillation: float = 0.0
    reported: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, state: dict[str, Any], best_by: str) -> TrainProgress:
        """The progress that a checkpoint has; one from before dev was halved has the best epoch of all of dev only.

        Args:
            state: The progress as a dictionary.
            best_by: What epochs are chosen by, "rsum" or "loss".

        Returns:
            The progress.
        """
        state = dict(state)
        epoch, chosen = state.pop("best_epoch", 0), state.pop("chosen", None)
        if chosen is None and epoch:
            chosen = [{"score": state["best"] if best_by == "rsum" else -math.inf, "epoch": epoch}]
        return cls(**state, chosen=[BestEpoch(**each) for each in chosen or []])

    @property
    def best_epoch(self) -> int:
        """The epoch whose model is the run's; 0 before there is one."""
        return self.chosen[0].epoch if self.chosen else 0

    def start_results(self) -> dict[str, Any]:
        """The entry of results.json about the model that the run starts from.

        Returns:
            Its dev rsum with the interval, under "start"; empty for a run that starts from none.
        """
        return {"start": {"rsum": dict(zip(("value", "low", "high"), self.start, strict=True))}} if self.start else {}

    def update_best(self, metrics: DevMetrics, config: ScheduleConfig, keep_last: bool = False) -> None:
        """Take the dev figures of an epoch into account.

        Training stops once all of dev and both halves have lost patience.

        Args:
            metrics: Figures on dev.
            config: The settings.
            keep_last: Whether this epoch is chosen whatever its figure: the dual encoder's does not depend on a fusion
                that is trained alone.
        """
        scores = metrics.scores(config.best_by)
        self.chosen += [BestEpoch() for _ in scores[len(self.chosen) :]]
        for each, score in zip(self.chosen, scores, strict=True):
            each.update(self.epoch, score, config.patience, always=keep_last)
        if self.best_epoch == self.epoch:
            self.best = metrics.metrics.rsum.value
        self.stopped = all(each.stopped for each in self.chosen)

    def add_step(self, values: np.ndarray, distillation: float = 0.0) -> None:
        """Count a step that was taken.

        Args:
            values: (3,) its loss, fusion loss and accuracy.
            distillation: Its distance from the start.
        """
        self.distillation += distillation
        self.step, self.seen = self.step + 1, self.seen + 1
        self.sums = [total + float(value) for total, value in zip(self.sums, values, strict=True)]

    def next_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.step_in_epoch, self.sums, self.seen = self.epoch + 1, 0, [0.0, 0.0, 0.0], 0
        self.distillation = 0.0


class TrainState:
    """Everything that changes while a model trains, to save and to load: as one file, or sharded as the model is.

    Args:
        towers: The towers with heads and loss.
        average: The moving average of the weights.
        optimizer: The optimizer.
        scheduler: The schedule of its learning rates.
    """

    def __init__(self, towers: Towers, average: ExponentialMovingAverage, optimizer: Any, scheduler: Any) -> None:
        self.towers, self.average, self.optimizer, self.scheduler = towers, average, optimizer, scheduler

    def state_dict(self, processes: Distributed) -> dict[str, Any]:
        """Everything, as a checkpoint of one file holds it; of a sharded model what is not sharded.

        Every process calls this.

        Args:
            processes: The processes.

        Returns:
            The state.
        """
        states = processes.all_gather_object(random_states())
        rest = {"scheduler": self.scheduler.state_dict(), "random": states, "updates": self.average.updates}
        if self.average.sharded:
            return rest
        parts = {"towers": self.towers.state_dict(), "average": self.average.state_dict()}
        return {**parts, "optimizer": optimizer_state(self.towers, self.optimizer), **rest}

    def save(self, out: Path, step: int, state: dict[str, Any], distributed: Distributed) -> None:
        """Write a checkpoint; every process calls this.

        Args:
            out: The run folder.
            step: Number of the step.
            state: `state_dict`, and what else belongs to the run.
            distributed: The processes.

        Raises:
            OSError: It cannot be written; nothing half written is left.
        """
        if self.average.sharded:
            by_parameter = optimizer_state(self.towers, self.optimizer)["state"]
            save_sharded(out, step, self._tensors(by_parameter), state, distributed)
            return
        # All get the error of one that cannot write, and continue together.
        distributed.run_on_main(lambda: save_checkpoint(out, step, state))

    def load(self, state: dict[str, Any], distributed: Distributed) -> None:
        """Restore everything from a checkpoint.

        Args:
            state: As `load_last_checkpoint` returns it.
            distributed: The processes; random states are those of the same rank.

        Raises:
            ValueError: The run was begun without `--shard true`, and this one has it.
        """
        if "shards" in state:
            self._load_shards(Path(state["shards"]))
            self.average.updates = state["updates"]
        elif self.average.sharded:
            raise ValueError("this run was begun without --shard true, and resumes without it")
        else:
            # First: a new optimizer is initialised by a step, if one with a learning rate of 0.
            load_optimizer_state(self.towers, self.optimizer, state["optimizer"])
            self.towers.load_state_dict(state["towers"])
            self.average.load_state_dict(state["average"])
        self.scheduler.load_state_dict(state["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        random_of = state["random"]
        restore_random_states(random_of[min(distributed.rank, len(random_of) - 1)])

    def is_finite(self) -> bool:
        """Whether all trained weights of this process's part are finite.

        Returns:
            Whether they are.
        """
        trained = [parameter for parameter in self.towers.parameters() if parameter.requires_grad]
        return are_finite([*trained, *self.average.weights.values()])

    def _tensors(self, by_parameter: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Every tensor of a sharded checkpoint. by_parameter: of the optimizer, under each parameter's name."""
        tensors = {f"towers.{name}": tensor for name, tensor in self.towers.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.weights.items()}
        for name, values in by_parameter.items():
            tensors |= {f"optimizer.{name}.{kind}": value for kind, value in values.items()}
        return tensors

    def _load_shards(self, folder: Path) -> None:
        saved_names = tensor_names(folder)
        # Absent before the first step; later only of parameters that had no gradient.
        if not any(name.startswith("optimizer.") for name in saved_names):
            load_sharded(folder, self._tensors({}))
            return
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        # Tensors to load into: a new optimizer has none, and this function gives it some.
        state: dict[str, Any] = get_optimizer_state_dict(self.towers, self.optimizer)
        state["state"] = {
            name: values for name, values in state["state"].items() if f"optimizer.{name}.exp_avg" in saved_names
        }
        load_sharded(folder, self._tensors(state["state"]))
        load_optimizer_state(self.towers, self.optimizer, state)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer under the names of the parameters, for a plain, DDP or FSDP2 model alike.

    Args:
        model: the model, whose parameters may be sharded; without a wrapper.
        optimizer: over parameters of the model.

    Returns:
        "state" by a parameter's name, "param_groups" with names as "params". Sharded tensors stay sharded.

    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.AdamW(layer.parameters())
    >>> layer(torch.ones(2)).backward(); optimizer.step()
    >>> sorted(optimizer_state(layer, optimizer)["state"]["weight"])
    ['exp_avg', 'exp_avg_sq', 'step']
    """
    if not optimizer.state:
        # The library would take a step to initialise it, which would count as the first one.
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned, or the state of a checkpoint from before, by position.

    Args:
        model: as of `optimizer_state`.
        optimizer: over the same parameters as the saved one; whatever state it has is replaced.
        state: "state" and "param_groups".
    """
    if not state["state"] or any(isinstance(key, int) for key in state["state"]):
        optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    # Not strict: a parameter without a gradient has no state.
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))


def are_finite(tensors: Collection[Tensor]) -> bool:
    """Whether all weights of this process's part are finite.

    Args:
        tensors: The weights, sharded or whole.

    Returns:
        Whether they are; true for none.
    """
    own = [part for part in (local_shard(tensor.detach()) for tensor in tensors) if part.numel()]
    return all(math.isfinite(norm) for norm in torch._foreach_norm(own, math.inf)) if own else True


def restore_aligner(aligner: Aligner, state: dict[str, Any]) -> None:
    """Load weights and buffers of a checkpoint into a model, those that are not trained too.

    Args:
        aligner: The model; it is changed itself.
        state: As `load_last_checkpoint` returns it.

    Raises:
        ValueError: They are another model's.
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
