"""Dropout whose random numbers cost an eighth on a CPU.

PyTorch draws a number for each element, one after the other on one core: a quarter of a training step of a small text
tower. Here four elements share one draw of 64 bits. On other devices, and where a graph is compiled, it is PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Numbers that 16 bits tell apart: the share that is dropped is rounded to a multiple of its inverse.
_LEVELS = 1 << 16


def drop(x: Tensor, share: float) -> Tensor:
    """Drop elements at random, as in training; what is left is scaled so that the mean stays.

    The numbers come from PyTorch's own generator, so that `torch.manual_seed` and a restored state repeat them.

    Args:
        x: Of any shape.
        share: Of the elements that become 0, from 0 to 1; on a CPU rounded to a multiple of 1 / 65,536.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: `share` is not from 0 to 1.

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15 (2014).

    >>> sorted(set(drop(torch.ones(1000), 0.5).tolist()))
    [0.0, 2.0]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"dropout of {share}: it should be from 0 to 1")
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.dropout(x, share)
    threshold = round(share * _LEVELS)
    if not threshold or not x.numel():
        return x
    if threshold == _LEVELS:
        return x * 0.0
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - _LEVELS // 2
    # A product, so that what is no number stays none.
    return (x * kept).mul_(_LEVELS / (_LEVELS - threshold))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `drop`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements in training mode.

        Args:
            input: Of any shape.

        Returns:
            The same shape and dtype; `input` itself in evaluation mode.
        """
        return drop(input, self.p) if self.training else input


def replace_dropout(model: nn.Module) -> None:
    """Let all `torch.nn.Dropout` of a model be `Dropout`; in training mode it draws other numbers, of the same kind.

    Args:
        model: Any model, which is changed in place.
    """
    replaced: dict[nn.Module, Dropout] = {}
    for module in model.modules():
        # Not named_children, which leaves a child's second name out.
        for name, child in list(module._modules.items()):
            if child is not None and type(child) is nn.Dropout:
                replaced.setdefault(child, Dropout(child.p).train(child.training))
                module.register_module(name, replaced[child])
