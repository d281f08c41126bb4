"""Weights files of a folder, and their tensors; no pickle is loaded."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from clipvisionalign.json_io import read_json
from clipvisionalign.models.hub import WeightsNotFound

#: The files in which timm and transformers keep weights, the safer first; and in parts, by the name of their table.
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

_WEIGHT_INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)


def choose_weight_files(source: object, names: Collection[str]) -> list[str]:
    """The files that hold a model's weights, by their names.

    Args:
        source: The model, for messages.
        names: Names of the files that are there.

    Returns:
        One file, or a table and all of its parts; safetensors if there are any.

    Raises:
        WeightsNotFound: There are none, or parts are missing.

    >>> choose_weight_files("a model", ["pytorch_model.bin", "model.safetensors", "config.json"])
    ['model.safetensors']
    """
    for file, index_file in zip(WEIGHT_FILES, _WEIGHT_INDEX_FILES, strict=True):
        if file in names:
            return [file]
        if index_file in names:
            stem, _, ending = file.rpartition(".")
            shards = sorted(name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{ending}", name))
            count = int(shards[0].rpartition("-of-")[2].split(".")[0]) if shards else 0
            if shards and len(shards) == count:
                return [index_file, *shards]
            raise WeightsNotFound(
                f"{source}: {len(shards)} of {count or 'the'} parts that {index_file} names are there; get the others"
            )
    others = sorted(
        name for name in names if name.endswith((".h5", ".msgpack", ".onnx", ".ot", ".ckpt", ".gguf", ".pth"))
    )
    has = f"; it has {', '.join(others[:4])}, which are for other programs" if others else ""
    raise WeightsNotFound(f"{source}: holds no weights: {' or '.join(WEIGHT_FILES)} should be there{has}")


def weights_files(folder: Path) -> list[Path]:
    """The files with the weights in a model's folder.

    Args:
        folder: The folder.

    Returns:
        One file, or all parts; safetensors if there are any.

    Raises:
        WeightsNotFound: There are none, or parts are missing.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    files = [folder / name for name in choose_weight_files(folder, names)]
    if files[0].name not in _WEIGHT_INDEX_FILES:
        return files
    index_file, *shards = files
    table = read_json(index_file, "get it again, with the parts of the weights").get("weight_map", {})
    if lacking := set(table.values()) - {path.name for path in shards}:
        raise WeightsNotFound(f"{index_file}: names {sorted(lacking)[0]}, which is not there")
    return shards


def read_tensors(path: Path) -> OrderedDict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file; no pickle is run.

    Args:
        path: The file.

    Returns:
        Tensors by name, on the CPU, in the order of the file.

    Raises:
        ValueError: The file is not whole, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return OrderedDict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path}: not whole, or no safetensors file: {error}; get the file again") from None
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        text = str(error).strip()
        # PyTorch's own words advise to run the pickle.
        code = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", text)
        reason = " ".join(text.splitlines()[0].split())[:120] if text else "it is empty"
        if isinstance(error, pickle.UnpicklingError):
            reason = f"it calls {code[1]}" if code else "it holds more than tensors"
        raise ValueError(
            f"{path}: not weights alone, or not whole, and no pickle is run: {reason}; get the weights as "
            "model.safetensors"
        ) from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    return OrderedDict((key, value) for key, value in loaded.items() if isinstance(value, Tensor))


def match_by_order(tensors: OrderedDict[str, Tensor], names: OrderedDict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Another program's tensors under this model's names, one by one in order.

    Args:
        tensors: The other program's tensors.
        names: This model's tensors.
        path: The file, for messages.

    Returns:
        The tensors by this model's names.

    Raises:
        ValueError: Their number or a shape differs.
    """
    if len(tensors) != len(names):
        raise ValueError(f"{path}: holds {len(tensors)} tensors, the model has {len(names)}")
    matched = {}
    for (theirs, tensor), (ours, expected) in zip(tensors.items(), names.items(), strict=True):
        if tensor.shape != expected.shape:
            message = f"{theirs} is {tuple(tensor.shape)}, the model's {ours} is {tuple(expected.shape)}"
            raise ValueError(f"{path}: the tensors do not fit in order: {message}")
        matched[ours] = tensor
    return matched
