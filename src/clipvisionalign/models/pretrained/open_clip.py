"""Dual encoders in open_clip's layout: open_clip_config.json with the weights beside it.

The models are built by the package open_clip itself, from the folder alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from clipvisionalign.json_io import read_json, write_json
from clipvisionalign.models.hub import CorruptedDownload, WeightsNotFound, cached_snapshot, snapshot
from clipvisionalign.models.pretrained.open_clip_image_towers import image_tower
from clipvisionalign.models.pretrained.open_clip_towers import HF_CONFIG_FOLDER, OpenClipTextTower, text_tower
from clipvisionalign.models.pretrained.parts import (
    DualEncoderParts,
    PretrainedImageHead,
    common_width,
    fit_tensors,
    rename_tensors,
)
from clipvisionalign.models.pretrained.transforms import CLIP_MEAN, CLIP_STD, PretrainedTransform
from clipvisionalign.models.weight_files import read_tensors

CONFIG_FILE = "open_clip_config.json"

#: Under which names open_clip publishes weights, the safer first.
WEIGHT_FILES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
    "open_clip_pytorch_model.bin", "pytorch_model.bin",
)  # fmt: skip


def load(folder: Path, config: dict[str, Any], load_weights: bool) -> DualEncoderParts:
    """The parts of an open_clip model; see `families.load_dual_encoder`.

    Args:
        folder: The model's folder.
        config: What open_clip_config.json holds.
        load_weights: Whether to read the weights; else they are random.

    Returns:
        The parts, on the CPU, in float32.

    Raises:
        ValueError: The package open_clip is missing, or the files describe no model that it builds.
        WeightsNotFound: There are no weights.
    """
    open_clip = _import_open_clip(folder)
    model_config = copy.deepcopy(config.get("model_cfg", config))
    transform = _transform(model_config, config.get("preprocess_cfg") or {}, folder)
    text_config = model_config["text_cfg"]
    model = _build_model(open_clip, model_config, folder)
    if load_weights:
        _load_weights(open_clip, model, folder)
    tokenizer = _read_tokenizer(open_clip, folder)
    visual, image_projection = image_tower(model.visual.eval(), transform)
    context_length = text_config.get("context_length", 77)
    text, text_projection = text_tower(model.text, tokenizer, folder, context_length)
    return DualEncoderParts(
        family="open_clip",
        image_tower=visual,
        text_tower=text,
        image_head=PretrainedImageHead(image_projection),
        text_head=text_projection,
        width=model_config["embed_dim"],
        log_scale=model.logit_scale.item(),
        logit_bias=None if model.logit_bias is None else model.logit_bias.item(),
    )


def load_tokenizer(folder: Path) -> OpenClipTextTower:
    """The text tower of an open_clip model for its `tokenize` alone: it has no weights.

    Args:
        folder: Config and tokenizer of a model.

    Returns:
        The tower; it cannot encode.
    """
    import torch

    open_clip = _import_open_clip(folder)
    model_config = copy.deepcopy(read_open_clip_config(folder))
    model_config = model_config.get("model_cfg", model_config)
    # Without an image tower and without memory for the weights.
    model_config["vision_cfg"] = {"layers": 1, "width": 64}
    with torch.device("meta"):
        model = _build_model(open_clip, model_config, folder)
    context_length = model_config["text_cfg"].get("context_length", 77)
    return text_tower(model.text, _read_tokenizer(open_clip, folder), folder, context_length)[0]


def _read_tokenizer(open_clip: Any, folder: Path) -> Any:
    try:
        return open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:
        raise ValueError(
            f"{folder}: no tokenizer that open_clip reads: {_first_line(error)}; copy the publisher's tokenizer files "
            "there"
        ) from None


def save(state: Mapping[str, Tensor], source: Path, folder: Path) -> None:
    """Write the weights of an open_clip model; see `families.save_dual_encoder`.

    Args:
        state: Tensors under the aligner's names.
        source: Folder with the model's small files.
        folder: Where the weights are written.
    """
    from safetensors.torch import save_file

    config = read_open_clip_config(source)
    model_config = config.get("model_cfg", config)
    if (width := common_width(state)) not in (None, model_config["embed_dim"]):
        model_config["embed_dim"] = width
        write_json(folder / CONFIG_FILE, config)
    names = {
        "image_tower.backbone.": "visual.", "text_tower.encoder.": "text.",
        "image_head.projection.": "visual.head.", "text_head.": "text.proj.",
        "log_scale": "logit_scale", "logit_bias": "logit_bias",
    }  # fmt: skip
    expected = _build_model(_import_open_clip(source), copy.deepcopy(model_config), source).state_dict()
    renamed = rename_tensors(state, names)
    # open_clip's own towers project by a matrix (C, D) and not by a layer, whose weight is (D, C).
    for layer, matrix in (("visual.head.weight", "visual.proj"), ("text.proj.weight", "text.text_projection")):
        if matrix in expected and layer in renamed:
            renamed[matrix] = renamed.pop(layer).T
    # Or its text transformer by a layer, with or without a bias.
    for name in ("weight", "bias"):
        if f"text.text_projection.{name}" in expected and f"text.proj.{name}" in renamed:
            renamed[f"text.text_projection.{name}"] = renamed.pop(f"text.proj.{name}")
    fitted = fit_tensors(renamed, expected, "open_clip's model")
    if not model_config.get("custom_text") and not model_config["text_cfg"].get("hf_model_name"):
        # Of such a model open_clip keeps the text transformer's parts beside the image tower.
        fitted = {name.removeprefix("text."): tensor for name, tensor in fitted.items()}
    save_file({name: tensor.contiguous().clone() for name, tensor in fitted.items()}, folder / WEIGHT_FILES[0])


def _import_open_clip(folder: Path) -> Any:
    try:
        import open_clip
    except ImportError:
        raise ValueError(
            f'{folder}: is in open_clip\'s layout, which needs pip install "clipvisionalign[pretrained]"'
        ) from None
    return open_clip


def _build_model(open_clip: Any, model_config: dict[str, Any], folder: Path) -> Any:
    """open_clip's model with random weights, of settings that are completed in place."""
    model_config.pop("custom_text", None)
    model_config["vision_cfg"]["timm_model_pretrained"] = False
    text_config = model_config["text_cfg"]
    if text_config.get("hf_model_name"):
        hf_folder = _hf_folder(folder, text_config["hf_model_name"])
        text_config |= {"hf_model_name": str(hf_folder), "hf_model_pretrained": False}
    try:
        return open_clip.CustomTextCLIP(**model_config)
    except Exception as error:
        raise ValueError(
            f"{folder / CONFIG_FILE}: open_clip {open_clip.__version__} builds no model of it: {_first_line(error)}; "
            "a newer open_clip_torch may, or get the publisher's file"
        ) from None


def weight_file(folder: Path) -> Path:
    """The file of a folder that holds the weights.

    Args:
        folder: The folder.

    Returns:
        Its path.

    Raises:
        WeightsNotFound: There is none.
    """
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if file is None:
        raise WeightsNotFound(f"{folder}: holds no weights: one of {', '.join(WEIGHT_FILES)} should be there")
    return file


def _load_weights(open_clip: Any, model: Any, folder: Path) -> None:
    file = weight_file(folder)
    try:
        open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except Exception as error:
        # A file that cannot be read has its own words.
        read_tensors(file)
        raise ValueError(
            f"{file}: not the whole weights of the model in {CONFIG_FILE}: {_first_line(error)}; get both from one and "
            "the same model"
        ) from None


def _transform(model_config: dict[str, Any], preprocess: dict[str, Any], folder: Path) -> PretrainedTransform:
    size = preprocess.get("size") or model_config["vision_cfg"].get("image_size", 224)
    sides = {size} if isinstance(size, int) else set(size)
    mode, interpolation = preprocess.get("resize_mode", "shortest"), preprocess.get("interpolation", "bicubic")
    if len(sides) > 1:
        raise ValueError(f"{folder / CONFIG_FILE}: images of {size} pixels: only squares are supported")
    if mode not in ("shortest", "squash"):
        raise ValueError(f"{folder / CONFIG_FILE}: resize_mode '{mode}': only 'shortest' and 'squash' are supported")
    side = sides.pop()
    return PretrainedTransform(
        side,
        tuple(preprocess.get("mean", CLIP_MEAN)),
        tuple(preprocess.get("std", CLIP_STD)),
        resize=side if mode == "shortest" else 0,
        interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
        rounds_half_to_even=True,
    )


def _hf_folder(folder: Path, name: str) -> Path:
    """Where a Hugging Face text model's config.json is: beside the model, in a folder, in the cache, on the hub."""
    for inside in (folder / HF_CONFIG_FOLDER, Path(name)):
        if (inside / "config.json").is_file():
            return inside
    try:
        return cached_snapshot(name, "", partial(_choose_config, name)).folder
    except (WeightsNotFound, CorruptedDownload):
        pass
    try:
        return snapshot(name, "", partial(_choose_config, name)).folder
    except WeightsNotFound as error:
        raise WeightsNotFound(
            f"{folder}: the settings of its text model, config.json of '{name}', are not here, and {error}; copy that "
            f"file into {folder / HF_CONFIG_FOLDER}"
        ) from None


def _choose_config(repository: str, names: Collection[str]) -> list[str]:
    if "config.json" not in names:
        raise WeightsNotFound(f"'{repository}' has no config.json")
    return ["config.json"]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # PyTorch's own first line only says that loading failed; what is missing comes after it, as a list.
    line = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s)") else lines[0]
    names = re.match(r"(.*?key\(s\) in state_dict: )(.*)", line)
    if names and (count := names[2].count(", ") + 1) > 1:
        line = f"{names[1]}{names[2].split(', ')[0]} and {count - 1} more"
    return " ".join(line.split())[:200].rstrip(".")


def read_open_clip_config(folder: Path) -> dict[str, Any]:
    """What a folder's open_clip_config.json holds.

    Args:
        folder: The folder.

    Returns:
        Names and values.

    Raises:
        ValueError: It describes no dual encoder, or one that is not supported.
    """
    file = folder / CONFIG_FILE
    config = read_json(file, "get the publisher's")
    model_config = config.get("model_cfg", config) if isinstance(config, dict) else {}
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    wrong = [
        key for key, kind in kinds.items()
        if not isinstance(model_config, dict) or not isinstance(model_config.get(key), kind)
    ]  # fmt: skip
    if wrong:
        raise ValueError(
            f"{file}: describes no dual encoder: {', '.join(wrong)} should be in its model_cfg; get the publisher's "
            "file"
        )
    if "multimodal_cfg" in model_config:
        raise ValueError(
            f"{file}: CoCa is a model that also writes captions, which is not supported; CLIP and SigLIP are"
        )
    return config
