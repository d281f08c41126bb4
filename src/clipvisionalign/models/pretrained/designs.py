"""The four designs on top of a pretrained dual encoder: new parts that change no vector and no rank before a step.

Positions are stretched as by Long-CLIP (Zhang et al., arXiv:2403.15378): the first 20, which are the best trained, are
kept, and four stand for each of the rest. Or they are repeated, as Longformer's were made from RoBERTa's
(arXiv:2004.05150, section 5).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from clipvisionalign.models.late_interaction import LateInteraction
from clipvisionalign.models.pretrained.parts import PretrainedTextTower

#: How a text tower gets positions for longer captions; "own" for those that it has.
Positions = Literal["own", "stretched", "repeated"]

#: Of Long-CLIP: positions that are kept, and how many stand for each of the others.
KEPT_POSITIONS, STRETCH = 20, 4

#: As many positions as `extend_positions` makes by repeating.
REPEATED_POSITIONS = 4096


@torch.no_grad()
def extend_positions(tower: PretrainedTextTower, how: Positions) -> None:
    """Give a text tower positions for longer captions; its captions are then cut at the new length.

    Args:
        tower: A tower with a table of T learned positions.
        how: "stretched" for 20 + 4 x (T - 20), "repeated" for 4,096, "own" for those that it has.

    Raises:
        ValueError: The captions of the tower have a fixed length, or it has no such table.

    Source: Zhang et al., "Long-CLIP", arXiv:2403.15378; Beltagy et al., "Longformer", arXiv:2004.05150, section 5.
    """
    if how == "own":
        return
    table = tower.position_table()
    if table is None:
        raise ValueError(f"{tower.config.name}: its text tower has no positions that can be {how}")
    learned = table.weight
    positions = stretch_positions(learned) if how == "stretched" else _repeat(learned, REPEATED_POSITIONS)
    extended = nn.Embedding(len(positions), positions.shape[1])
    extended.weight.copy_(positions)
    tower.set_position_table(extended)
    tower.max_positions = tower.max_tokens = len(positions)


def count_positions(own: int, how: Positions) -> int:
    """How many positions `extend_positions` makes.

    Args:
        own: The number of the tower's own positions.
        how: As of `extend_positions`.

    Returns:
        The number.

    >>> count_positions(77, "stretched")
    248
    """
    stretched = KEPT_POSITIONS + STRETCH * (own - KEPT_POSITIONS)
    return {"own": own, "stretched": stretched, "repeated": REPEATED_POSITIONS}[how]


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


def _repeat(learned: Tensor, length: int) -> Tensor:
    return learned.repeat(-(-length // len(learned)), 1)[:length]


@torch.no_grad()
def start_from_projections(late: LateInteraction, tower: PretrainedTextTower, text_head: nn.Module) -> None:
    """Start a late interaction from the model's own projections, and let it count nothing until it is trained.

    Patches come in the common space already; tokens are projected there as the pooled token is. Both are then reduced
    to the late interaction's width by the same directions: those in which the text projection varies most.

    Args:
        late: a new late interaction.
        tower: the text tower.
        text_head: its projection.
    """
    late.weight.fill_(0.0)
    projection = tower.token_projection(text_head)
    if projection is None:
        return
    weight, bias = projection
    directions = _main_directions(weight, late.config.width)
    late.patch.weight.copy_(directions)
    late.token.weight.copy_(directions @ weight)
    late.patch.bias.zero_()
    late.token.bias.copy_(directions @ bias)


def _main_directions(weight: Tensor, count: int) -> Tensor:
    """(D, W) -> (count, D): orthonormal rows, the directions of the outputs that vary most first; 0 beyond D."""
    left = torch.linalg.svd(weight.double(), full_matrices=True).U.T[:count].float()
    return nn.functional.pad(left, (0, 0, 0, count - len(left)))
