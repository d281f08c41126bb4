"""The dtype in which each tower is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.device import fastest_dtype
from clipvisionalign.training.checkpoint import random_states, restore_random_states
from clipvisionalign.training.config import RunConfig, caches_image_features, frozen_blocks
from clipvisionalign.training.fine_tuning import divided_tower, set_train_mode


class TowerDtypes(NamedTuple):
    """The dtypes of a run.

    Attributes:
        image: Of the image tower in a step.
        text: Of the text tower.
        kept_blocks: Of the image tower's first blocks where their outputs for training images are kept on disk (those
            for dev are always in float32); without, as `image`.
    """

    image: torch.dtype
    text: torch.dtype
    kept_blocks: torch.dtype


#: What `choose_dtypes` has found in this process, by all that it depends on.
_CHOSEN_DTYPES: dict[str, TowerDtypes] = {}


def choose_dtypes(config: RunConfig, aligner: Aligner, state: dict[str, Any] | None) -> TowerDtypes:
    """The dtypes in which the towers are trained.

    Each tower is timed in what it does in a step: forward, and backward where it is trained; blocks whose outputs are
    kept on disk forward alone. Batch norm statistics and random states are as before afterwards.

    Args:
        config: The settings of the run.
        aligner: The model.
        state: The state of a checkpoint, whose dtypes count; None for a run that starts.

    Returns:
        The dtypes.
    """
    if state is not None:
        image, text, *kept_blocks = (getattr(torch, name) for name in state["precision"])
        return TowerDtypes(image, text, *(kept_blocks or [image]))

    frozen = frozen_blocks(config.freezing)
    # What is kept on disk takes no time in a step.
    kept = frozen if caches_image_features(config.freezing) else 0
    # Timed once in a process: the runs of a study that train alike compute alike.
    key = repr((config.model.image_tower, config.model.text_tower, config.model.pretrained, config.model.positions,
                 config.model.design, config.freeze, frozen, kept,
                 config.freeze_layers, config.peft, config.lora, config.precision, aligner.device))  # fmt: skip
    if key in _CHOSEN_DTYPES:
        return _CHOSEN_DTYPES[key]

    def work(part: Callable[[], Tensor], module: torch.nn.Module) -> Callable[[], None]:
        trained = any(parameter.requires_grad for parameter in module.parameters())

        def run() -> None:
            with torch.set_grad_enabled(trained):
                output = part()
            if output.requires_grad:
                output.float().square().mean().backward()
                module.zero_grad(set_to_none=True)

        return run

    device = aligner.device
    set_train_mode(aligner, config.freeze, frozen)
    pixels = aligner.image_tower.image_transform.random_pixels(8).to(device)
    ids = torch.randint(5, min(1000, aligner.text_tower.vocab_size), (64, 16)).to(device)

    def image_work(images: int) -> Callable[[], None]:
        given = pixels[:images]
        if kept:
            with torch.no_grad():
                given = divided_tower(aligner, kept).early_features(given, kept)
        return work(lambda: torch.cat([each.flatten() for each in aligner.image_tower(given)]), aligner.image_tower)

    def text_work(captions: int) -> Callable[[], None]:
        tokens = ids[:captions]
        return work(lambda: aligner.text_tower(tokens, torch.ones_like(tokens)).pooled, aligner.text_tower)

    def early_work(images: int) -> Callable[[], Any]:
        @torch.no_grad()
        def run() -> None:
            divided_tower(aligner, kept).early_features(pixels[:images], kept)

        return run

    states = [buffer.clone() for buffer in aligner.buffers()]
    random_before = random_states()
    # Two of each: a batch norm that trains needs more than one.
    image_dtype = fastest_dtype(device, image_work(8), config.precision, image_work(2))
    dtypes = TowerDtypes(
        image_dtype,
        fastest_dtype(device, text_work(64), config.precision, text_work(2)),
        fastest_dtype(device, early_work(8), config.precision, early_work(2)) if kept else image_dtype,
    )
    # The trial leaves no trace: not in a batch norm's statistics, nor in what is drawn at random.
    restore_random_states(random_before)
    for buffer, saved in zip(aligner.buffers(), states, strict=True):
        buffer.copy_(saved)
    _CHOSEN_DTYPES[key] = dtypes
    return dtypes


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.".

    Args:
        dtype: The dtype.

    Returns:
        Its name.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")
