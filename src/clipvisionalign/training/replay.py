"""Random states of a chunk, restored for its second pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipvisionalign.batch import Batch


def capture_random_state(batch: Batch) -> tuple[Tensor, Any]:
    """The states of PyTorch's generators, for `replay_random_state`.

    Args:
        batch: The batch, whose device counts.

    Returns:
        The state on the CPU, and on the batch's device; None for the CPU alone.
    """
    device = batch.identity.device
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state() if device.type != "cpu" else None


class replay_random_state:
    """Draw the same random numbers once more in a block; the former state is restored at its end.

    Args:
        state: The states from which on they are drawn.
        batch: The batch, whose device counts.
    """

    def __init__(self, state: tuple[Tensor, Any], batch: Batch) -> None:
        self.state, self.device = state, batch.identity.device

    def __enter__(self) -> None:
        device = [self.device] if self.device.type != "cpu" else []
        self.fork = torch.random.fork_rng(devices=device, device_type=self.device.type if device else "cuda")
        self.fork.__enter__()
        torch.set_rng_state(self.state[0])
        if self.state[1] is not None:
            torch.get_device_module(self.device).set_rng_state(self.state[1])

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)
