"""The four designs on top of a pretrained dual encoder: new parts that change no vector and no rank before a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipvisionalign.models.late_interaction import LateInteraction
from clipvisionalign.models.positions import Positions, extend_table
from clipvisionalign.models.pretrained.parts import PretrainedTextTower


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
    positions = extend_table(table.weight, how)
    extended = nn.Embedding(len(positions), positions.shape[1])
    extended.weight.copy_(positions)
    tower.set_position_table(extended)
    tower.max_positions = tower.max_tokens = len(positions)


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
