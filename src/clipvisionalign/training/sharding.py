"""Parameters that are sharded over processes by FSDP2's `fully_shard` (Zhao et al., arXiv:2304.11277)."""

from __future__ import annotations

from torch import Tensor, nn

#: Modules that are sharded one by one: transformers' and timm's name for a layer's list.
LAYER_LISTS = ("layer", "layers", "blocks", "stages", "h")


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes.

    Args:
        tensor: The tensor.

    Returns:
        Whether it is a DTensor.
    """
    return hasattr(tensor, "full_tensor")


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process has.

    Args:
        tensor: The tensor.

    Returns:
        Its shard; a tensor that is not sharded itself.
    """
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes if it is sharded; every process calls this.

    Args:
        tensor: The tensor.

    Returns:
        The whole tensor.
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_model(model: nn.Module, ignored_names: list[str]) -> nn.Module:
    """Shard every layer of a tower, then what is left, over all processes, in place (FSDP2).

    Args:
        model: The model.
        ignored_names: Parameters that are used outside of the model's own call, and stay whole on every process.

    Returns:
        The model itself.
    """
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        # It cuts along the first axis of plain memory, and does not support channels-last.
        parameter.data = parameter.data.contiguous()
    for name, module in list(model.named_modules()):
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and name.rpartition(".")[2] in LAYER_LISTS
        if is_list and not any(ignored_name.startswith(f"{name}.") for ignored_name in ignored_names):
            for layer in module:
                fully_shard(layer)
    parameters = dict(model.named_parameters())
    fully_shard(model, ignored_params={parameters[name] for name in ignored_names})
    return model
