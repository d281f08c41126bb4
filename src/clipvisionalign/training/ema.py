"""The exponential moving average of the trained weights, which is measured and kept."""

from __future__ import annotations

from typing import Any

import torch

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.training.sharding import full_tensor, is_sharded, local_shard


class ExponentialMovingAverage:
    """An exponential moving average of the trained weights, in a copy of the model that is measured and kept.

    It forgets faster in its first steps, so that a short run is not averaged away. Sharded weights are averaged shard
    by shard and gathered when the copy is asked for.

    Args:
        aligner: The model that is trained.
        ema_model: A copy of it, which gets the average.
        decay: Factor of the average in each step, 0 to below 1.
    """

    def __init__(self, aligner: Aligner, ema_model: Aligner, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.aligner, self.ema_model = aligner, ema_model
        ema_parameters = dict(ema_model.named_parameters())
        self.trained_parameters = {
            name: parameter for name, parameter in aligner.named_parameters() if parameter.requires_grad
        }
        # What is trained may be whole where what is frozen is not.
        self.sharded = any(is_sharded(parameter) for parameter in aligner.parameters())
        self.weights = {
            name: parameter.detach().clone() if self.sharded else ema_parameters[name].detach()
            for name, parameter in self.trained_parameters.items()
        }
        # Looked for once: in a large model that takes as long as a step of its head.
        self.buffers = list(ema_model.buffers()), list(aligner.buffers())

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now; buffers are copied."""
        self.updates += 1
        step_fraction = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged, current = ([local_shard(t) for t in ts.values()] for ts in (self.weights, self.trained_parameters))
        torch._foreach_lerp_(averaged, [tensor.data for tensor in current], step_fraction)
        if self.buffers[0]:
            torch._foreach_copy_(*self.buffers)

    @torch.no_grad()
    def model(self) -> Aligner:
        """The copy with the averaged weights; every process calls this.

        Returns:
            The copy, the same object each time.
        """
        if self.sharded:
            ema_parameters = dict(self.ema_model.named_parameters())
            for name, tensor in self.weights.items():
                ema_parameters[name].copy_(full_tensor(tensor))
        return self.ema_model

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint keeps.

        Returns:
            "updates" and "weights".
        """
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint.

        Args:
            state: As `state_dict` returned it.
        """
        self.updates = state["updates"]
        with torch.no_grad():
            for name, tensor in state["weights"].items():
                self.weights[name].copy_(tensor)
