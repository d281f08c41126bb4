"""Files of weights: which of a folder hold them, and the tensors in them; no pickle is ever run."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from clipvisionalign.models.hub import WeightsNotFound

#: The files in which timm and transformers keep weights, the safer first; and in parts, by the name of their table.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

_WEIGHT_TABLES = tuple(f"{name}.index.json" for name in _WEIGHT_FILES)


def _weights_of(source: object, names: Collection[str]) -> list[str]:
    """The files that hold a model's weights, with their table where they are in parts; safetensors first."""
    for file, table in zip(_WEIGHT_FILES, _WEIGHT_TABLES, strict=True):
        if file in names:
            return [file]
        if table in names:
            stem, _, ending = file.rpartition(".")
            parts = sorted(name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{ending}", name))
            count = int(parts[0].rpartition("-of-")[2].split(".")[0]) if parts else 0
            if parts and len(parts) == count:
                return [table, *parts]
            raise WeightsNotFound(f"{source}: {len(parts)} of {count or 'the'} parts that {table} names are there")
    others = sorted(
        name for name in names if name.endswith((".h5", ".msgpack", ".onnx", ".ot", ".ckpt", ".gguf", ".pth"))
    )
    has = f"; it has {', '.join(others[:4])}, which are for other programs" if others else ""
    raise WeightsNotFound(f"{source}: holds no weights: {' or '.join(_WEIGHT_FILES)} should be there{has}")


def weights_files(folder: Path) -> list[Path]:
    """The files with the weights in a model's folder, safetensors first. Raises WeightsNotFound."""
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    found = [folder / name for name in _weights_of(folder, names)]
    if found[0].name not in _WEIGHT_TABLES:
        return found
    table, *parts = found
    lacking = set(json.loads(table.read_text())["weight_map"].values()) - {path.name for path in parts}
    if lacking:
        raise WeightsNotFound(f"{table}: names {sorted(lacking)[0]}, which is not there")
    return parts


def read_tensors(path: Path) -> OrderedDict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file; no pickle is run (`weights_only`). Raises ValueError."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return OrderedDict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path}: not whole, or no safetensors file: {error}") from None
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: not weights alone, or not whole, and no pickle is run: {reason}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    return OrderedDict((key, value) for key, value in loaded.items() if isinstance(value, Tensor))


def match_by_order(tensors: OrderedDict[str, Tensor], names: OrderedDict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give another code's tensors this model's names, one by one in order. Raises ValueError where a shape differs."""
    if len(tensors) != len(names):
        raise ValueError(f"{path}: holds {len(tensors)} tensors, the model has {len(names)}")
    matched = {}
    for (theirs, tensor), (ours, place) in zip(tensors.items(), names.items(), strict=True):
        if tensor.shape != place.shape:
            told = f"{theirs} is {tuple(tensor.shape)}, the model's {ours} is {tuple(place.shape)}"
            raise ValueError(f"{path}: the tensors do not fit in order: {told}")
        matched[ours] = tensor
    return matched
