"""Learned positions for longer captions than an encoder was trained with: repeated, or stretched.

Repeated as Longformer's were made from RoBERTa's: captions within the encoder's own limit keep their vectors.
Stretched as by Long-CLIP (Zhang et al., arXiv:2403.15378): the first 20, which are the best trained, are kept, and four
stand for each of the rest, so that captions of more than 20 tokens have other vectors.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

#: How a text tower gets positions for longer captions; "own" for those that it has.
Positions = Literal["own", "stretched", "repeated"]

#: Of Long-CLIP: positions that are kept, and how many stand for each of the others.
KEPT_POSITIONS, STRETCH = 20, 4

#: As many positions are made by repeating, as Longformer has.
REPEATED_POSITIONS = 4096


def positions_by_name(how: Positions, has_windows: bool) -> Positions:
    """How a text tower by name gets its positions.

    Args:
        how: The setting `positions`.
        has_windows: Whether its attention is in sliding windows.

    Returns:
        The same, but "repeated" in the place of "own" for sliding windows.
    """
    return "repeated" if has_windows and how == "own" else how


def extend_table(learned: Tensor, how: Positions, length: int = REPEATED_POSITIONS) -> Tensor:
    """Learned positions for longer captions.

    Args:
        learned: (T, W), those that an encoder has.
        how: "stretched" for 20 + 4 x (T - 20), "repeated" for `length`, "own" for these.
        length: How many there are when they are repeated.

    Returns:
        (T', W), never fewer: the learned ones where these are as many.

    Source: Zhang et al., "Long-CLIP", arXiv:2403.15378; Beltagy, Peters and Cohan, "Longformer", arXiv:2004.05150,
    section 5.
    """
    if count_positions(len(learned), how, length) == len(learned):
        return learned
    if how == "stretched":
        return stretch_positions(learned)
    return learned.repeat(-(-length // len(learned)), 1)[:length]


def count_positions(own: int, how: Positions, length: int = REPEATED_POSITIONS) -> int:
    """How many positions `extend_table` makes.

    Args:
        own: The number of the tower's own positions.
        how: As of `extend_table`.
        length: As of `extend_table`.

    Returns:
        The number.

    >>> count_positions(77, "stretched"), count_positions(8192, "repeated")
    (248, 8192)
    """
    stretched = KEPT_POSITIONS + STRETCH * (own - KEPT_POSITIONS)
    return max(own, {"own": own, "stretched": stretched, "repeated": length}[how])


def stretch_positions(learned: Tensor, kept: int = KEPT_POSITIONS, factor: int = STRETCH) -> Tensor:
    """Interpolate learned positions linearly, but for the first ones.

    The last ones continue the line of the last two.

    Args:
        learned: (T, W), at least two beyond `kept`.
        kept: Number of positions that stay as they are.
        factor: Positions that take the place of each of the others.

    Returns:
        (kept + factor (T - kept), W).

    Source: Zhang et al., "Long-CLIP", arXiv:2403.15378.

    >>> stretch_positions(torch.tensor([[0.0], [1.0], [2.0], [4.0]]), kept=2, factor=2).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    rest = learned[kept:]
    following = torch.cat([rest[1:], 2 * rest[-1:] - rest[-2:-1]])
    shares = torch.arange(factor, device=learned.device)[None, :, None] / factor
    between = rest[:, None] * (1 - shares) + following[:, None] * shares
    return torch.cat([learned[:kept], between.flatten(0, 1)])
