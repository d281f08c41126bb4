"""Linear layers with weights packed for a CPU's kernels.

oneDNN lays a weight out as its kernels read it, once, instead of at every product: on a CPU with AVX-512 that is a
seventh quicker over hundreds of tokens and twice as quick over eight (`benchmarks/attention.py --only linear`). With
AVX2 alone it is as quick or quicker from 2 to 32 rows, and up to a fifth slower over hundreds, so that only few rows
take that way; one row is a product of a matrix and a vector, which needs no layout. Only for models that are loaded to
be used, in evaluation without gradients, in float32. A module that is trained after all drops what it has packed, and
packs no more until it comes from training into evaluation.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipvisionalign.models.file_pages import copy_and_release

#: Whether this PyTorch has the operation (it is the one that torch.compile's frozen graphs use).
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

#: Rows that the layout is chosen for; it serves all others as well.
PACKING_ROWS = 512

#: Rows of a product that packed weights are used for; by the kernels of the CPU, not by a measurement, so that one
#: machine gives the same vectors in every process.
MIN_PACKED_ROWS = 2
MAX_PACKED_ROWS = None if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 32

#: Bytes to whose multiples PyTorch allocates tensors on the CPU.
ALIGNMENT = 64

#: Beside the modules, so that a copy or a state of one does not hold a layout that nobody else can read.
_packed: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


class PackedLinear(nn.Linear):
    """nn.Linear, its weight packed on first use in evaluation."""

    #: Whether gradients went through since its mode last changed: an optimiser may then change the weight, and
    #: the fused ones do so without leaving a trace in the weight's version.
    had_gradients = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, with packed weights where they are faster.

        They are used in evaluation, without gradients, in float32 on a CPU.

        Args:
            x: (..., in).

        Returns:
            (..., out).
        """
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self.had_gradients = True
            _packed.pop(self, None)
        if not self._packs(x):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed_weight(), self.bias, "none", [], "")

    def train(self, mode: bool = True) -> PackedLinear:
        """Set training or evaluation mode; a change of mode drops the packed weights.

        Args:
            mode: Whether to train.

        Returns:
            The layer itself.
        """
        if mode != self.training:
            _packed.pop(self, None)
            self.had_gradients = False
        return super().train(mode)

    def _packs(self, x: Tensor) -> bool:
        return (
            AVAILABLE
            and not (self.training or self.had_gradients)
            and not torch.is_grad_enabled()
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and type(x) is Tensor
            and type(self.weight) is nn.Parameter
            and not self.weight.is_inference()
            and self._has_packed_rows(x)
        )

    def _has_packed_rows(self, x: Tensor) -> bool:
        """Whether packed weights are the quicker ones for as many rows as x (..., in) has."""
        rows = x.numel() // self.in_features
        return rows >= MIN_PACKED_ROWS and (MAX_PACKED_ROWS is None or rows <= MAX_PACKED_ROWS)

    def _packed_weight(self) -> Tensor:
        # A version counts what is written into a weight in place: a file that is loaded, an average that moves.
        version = self.weight.data_ptr(), self.weight._version
        cached = _packed.get(self)
        if cached is None or cached[0] != version:
            cached = _packed[self] = (
                version,
                torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), PACKING_ROWS),
            )
        return cached[1]


def pack_linears(model: nn.Module) -> None:
    """Let all linear layers of a model pack their weights; subclasses of nn.Linear are left as they are.

    Args:
        model: A model that is loaded to be used; it is changed itself.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PackedLinear


def align_weights(model: nn.Module) -> None:
    """Copy weights that lie as a file had them to where a CPU's kernels read them in whole vectors.

    A matrix product of other addresses is summed in another order: the same model, from one file or from several,
    would have vectors that differ in their last bit. Tables of embeddings stay as they are: rows are taken out of them,
    and a mapped file's pages are read as they are needed.

    Args:
        model: A model that is loaded to be used; its tensors are replaced by equal ones.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT and id(tensor) not in tables:
            mapped = tensor.data
            tensor.data = torch.empty_like(mapped)
            copy_and_release(tensor.data, mapped)
