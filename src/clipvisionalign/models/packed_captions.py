"""Captions of several lengths in one row, without padding, for encoders of BERT's kin.

Linear layers, norms and dropout see all tokens at once; attention alone takes them apart into captions again, those of
one length together. In half precision on a CPU this matters: oneDNN makes a kernel for each new size of a matrix
product, and the sizes of padded groups are new in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

#: Encoders of transformers whose layers hand the layout on to their attention, and take positions from outside.
PACKABLE = frozenset({"bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"})


class PackedCaptions:
    """Where each caption of some padded groups stands in one row of tokens, the shortest captions first.

    Args:
        groups: Token ids and mask (b, T) of each group, 1 on the first tokens of a row, 0 on the padding behind them.

    Attributes:
        ids: (1, N) the tokens of all captions.
        positions: (1, N) the place of each within its caption, from 0.
        runs: Numbers of captions and of tokens in each, one pair for each length.
        was_used: Whether an attention took the row apart; without it, captions would see each other.

    >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    >>> packed = PackedCaptions([(torch.tensor([[5, 6, 7], [8, 9, 0]]), mask)])
    >>> packed.ids.tolist(), packed.positions.tolist(), packed.runs
    ([[8, 9, 5, 6, 7]], [[0, 1, 0, 1, 2]], [(1, 2), (1, 3)])
    """

    def __init__(self, groups: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.masks = [mask.bool() for _, mask in groups]
        lengths = torch.cat([mask.sum(dim=1) for mask in self.masks])
        order = lengths.argsort(stable=True)
        starts = lengths.cumsum(0) - lengths
        counts = lengths[order]
        indices = torch.arange(int(lengths.sum()), device=lengths.device)
        position = indices - (counts.cumsum(0) - counts).repeat_interleave(counts)
        #: (N,) for each token of the row, its place among those of all groups.
        self._source = starts[order].repeat_interleave(counts) + position
        self.ids = torch.cat([ids[mask] for (ids, _), mask in zip(groups, self.masks, strict=True)])[self._source][None]
        self.positions = position[None]
        self.runs = [(len(list(same)), length) for length, same in groupby(counts.tolist())]
        self.was_used = False

    def attend(self, attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention within each caption.

        Args:
            attention: From (b, H, T, d), three times, to (b, H, T, d); captions of one length at a time.
            query: (1, H, N, d).
            key: (1, H, N, d).
            value: (1, H, N, d).

        Returns:
            (1, N, H, d).
        """
        self.was_used = True
        sizes = [count * length for count, length in self.runs]
        parts = zip(*(tensor[0].transpose(0, 1).split(sizes) for tensor in (query, key, value)), strict=True)
        outputs = []
        for run, of_run in zip(self.runs, parts, strict=True):
            apart = (part.unflatten(0, run).transpose(1, 2) for part in of_run)
            outputs.append(attention(*apart).transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[None]

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        """Pad the tokens again.

        Args:
            tokens: (N, W) in the row's order.

        Returns:
            (b, T, W) for each group, 0 on padding.
        """
        parts = tokens[self._source.argsort()].split([int(mask.sum()) for mask in self.masks])
        return [
            part.new_zeros(*mask.shape, part.shape[-1]).masked_scatter(mask[..., None], part)
            for part, mask in zip(parts, self.masks, strict=True)
        ]
