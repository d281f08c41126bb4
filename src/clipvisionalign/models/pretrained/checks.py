"""Checks of a pretrained dual encoder that was opened: its weights are numbers, and its parts fit each other."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from clipvisionalign.models.file_pages import release_pages
from clipvisionalign.models.pretrained.parts import DualEncoderParts


def check_parts(parts: DualEncoderParts, source: Path) -> None:
    """Check the weights and the tokenizer of a model that was opened.

    Args:
        parts: Of the model.
        source: Its folder, for messages.

    Raises:
        ValueError: Weights are no finite numbers, or the tokenizer has numbers without an embedding.
    """
    check_finite(parts, source)
    check_vocabulary(parts, source)


def check_finite(parts: DualEncoderParts, source: Path) -> None:
    """Check that no weight is NaN or infinity.

    Args:
        parts: Of the model.
        source: Its folder, for messages.

    Raises:
        ValueError: One is; the message names its tensor.
    """
    modules: dict[str, nn.Module] = {
        "image_tower": parts.image_tower, "text_tower": parts.text_tower, "image_head": parts.image_head,
        "text_head": parts.text_head,
    }  # fmt: skip
    broken = []
    for part, module in modules.items():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
                broken.append(f"{part}.{name}")
            release_pages(tensor)
    scalars = {"logit_scale": parts.log_scale, "logit_bias": parts.logit_bias or 0.0}
    broken += [name for name, value in scalars.items() if not abs(value) < float("inf")]
    if broken:
        raise ValueError(
            f"{source}: its weights are broken: NaN or infinity in {len(broken)} of the tensors, such as {broken[0]}; "
            "get the weights again from their publisher"
        )


def check_vocabulary(parts: DualEncoderParts, source: Path) -> None:
    """Check that the text tower has an embedding for each token.

    Args:
        parts: Of the model.
        source: Its folder, for messages.

    Raises:
        ValueError: The tokenizer has numbers that there is no embedding for.
    """
    tokenizer, count = parts.text_tower.tokenizer, parts.text_tower.vocab_size
    if hasattr(tokenizer, "get_vocab"):
        highest = max(tokenizer.get_vocab().values(), default=0)
    else:
        # open_clip's own tokenizer.
        highest = getattr(tokenizer, "vocab_size", 0) - 1
    if highest >= count:
        raise ValueError(
            f"{source}: the tokenizer numbers tokens up to {highest}, but the text tower has embeddings for {count} "
            "only; give it the tokenizer that it was trained with"
        )
