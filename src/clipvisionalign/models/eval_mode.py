"""A context manager for evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode in a block, and back into the mode that it was in.

    Args:
        model: The model; all of its modules get the mode that itself was in.

    Yields:
        Nothing.
    """
    if not any(module.training for module in model.modules()):
        # To set the mode of each module takes as long as a small model's caption.
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
