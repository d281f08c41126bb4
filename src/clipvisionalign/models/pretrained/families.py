"""Families of pretrained dual encoders: which one a folder holds, and its parts.

A family is one module of this package with MODEL_TYPES, the `model_type` of its config.json, and `load`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torch import Tensor, nn

from clipvisionalign.json_io import read_json
from clipvisionalign.models.pretrained import chinese_clip, clip, open_clip, siglip, vision_text
from clipvisionalign.models.pretrained.checks import check_parts
from clipvisionalign.models.pretrained.parts import DualEncoderParts, PretrainedTextTower
from clipvisionalign.models.pretrained.transformers_layout import read_config
from clipvisionalign.models.run_files import CONFIG_FILE
from clipvisionalign.models.weight_files import WEIGHT_FILES

#: Families in transformers' layout.
FAMILIES: tuple[ModuleType, ...] = (clip, siglip, chinese_clip, vision_text)

BY_MODEL_TYPE: dict[str, ModuleType] = {kind: family for family in FAMILIES for kind in family.MODEL_TYPES}

#: Of a folder with weights in transformers' layout, whole or in parts.
_TRANSFORMERS_WEIGHTS = {f"{name}{end}" for name in WEIGHT_FILES for end in ("", ".index.json")}

KNOWN = "CLIP, SigLIP (2), Chinese CLIP, VisionTextDualEncoder, and open_clip's models"


def is_open_clip_layout(names: Collection[str]) -> bool:
    """Whether files of these names are a model in open_clip's layout.

    Args:
        names: Names of the files in a folder.

    Returns:
        Whether they are. Where both layouts are there, transformers' is taken, unless open_clip's alone has weights.
    """
    if open_clip.CONFIG_FILE not in names:
        return False
    if not {"config.json", "preprocessor_config.json"} <= set(names):
        return True
    return not _TRANSFORMERS_WEIGHTS & set(names) and any(name in names for name in open_clip.WEIGHT_FILES)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder has the config of a published model, of whatever kind.

    Args:
        folder: A folder; one that does not exist has none.

    Returns:
        Whether it has a config.json or an open_clip_config.json.
    """
    return (folder / open_clip.CONFIG_FILE).is_file() or (folder / "config.json").is_file()


def model_type(folder: Path) -> str:
    """The `model_type` of a folder's config.json.

    Args:
        folder: A folder with a config.json.

    Returns:
        It; "" where the file has none.

    Raises:
        FileNotFoundError: There is no config.json.
        ValueError: It cannot be parsed.
    """
    config = read_json(folder / "config.json", "get the publisher's")
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""


def load_dual_encoder(folder: Path, load_weights: bool = True) -> DualEncoderParts:
    """Open a pretrained dual encoder.

    Args:
        folder: In transformers' layout (config.json, weights, tokenizer, preprocessor_config.json) or in open_clip's
            (open_clip_config.json, weights, tokenizer).
        load_weights: Whether to read the weights; else they are random, to be replaced by those of a run.

    Returns:
        The parts, on the CPU, in float32, in evaluation mode.

    Raises:
        FileNotFoundError: There is no config.
        WeightsNotFound: There are no weights.
        ValueError: The model is of another kind, or its files are not whole or do not belong together.
    """
    check_is_dual_encoder(folder)
    if layout_of(folder) == "open_clip":
        parts = open_clip.load(folder, open_clip.read_open_clip_config(folder), load_weights)
    else:
        parts = BY_MODEL_TYPE[model_type(folder)].load(folder, read_config(folder), load_weights)
    check_parts(parts, folder)
    modules: list[Any] = [parts.image_tower, parts.text_tower, parts.image_head, parts.text_head]
    for module in modules:
        module.eval()
    return parts


def save_dual_encoder(state: Mapping[str, Tensor], source: Path, folder: Path) -> None:
    """Write the weights of a dual encoder as its library reads them; the reverse of `load_dual_encoder`.

    Args:
        state: The tensors of an aligner that started from a pretrained dual encoder, under the aligner's names.
        source: The small files of that dual encoder, as its publisher or a run has them.
        folder: Where the weights are written, and config.json, which records their dtype. What else a model needs is
            copied by the text tower's `save`.

    Raises:
        ValueError: There are tensors that the library's model has no place for, or lacks.
    """
    if layout_of(source) == "open_clip":
        open_clip.save(state, source, folder)
    else:
        BY_MODEL_TYPE[model_type(source)].save(state, read_config(source), folder)


def width_of(folder: Path) -> int:
    """The width of the common space of a dual encoder, by its config alone.

    Args:
        folder: Config of a dual encoder, in either layout, with or without its weights.

    Returns:
        D, how many numbers its vectors have.

    Raises:
        FileNotFoundError: There is no config.
        ValueError: The config is of another kind of model, or cannot be parsed.
    """
    check_is_dual_encoder(folder)
    if layout_of(folder) == "open_clip":
        config = open_clip.read_open_clip_config(folder)
        return int(config.get("model_cfg", config)["embed_dim"])
    config = read_config(folder)
    # SigLIP projects nothing behind its pooling, and has no such setting.
    return int(getattr(config, "projection_dim", None) or siglip.common_width(config))


def is_dual_encoder(folder: Path) -> bool:
    """Whether a folder holds the config of a dual encoder of a known family, with or without its weights.

    Args:
        folder: A folder; one that does not exist holds none.

    Returns:
        Whether it does.

    Raises:
        ValueError: Its config.json cannot be parsed.
    """
    if is_open_clip_layout([path.name for path in folder.iterdir()] if folder.is_dir() else []):
        return True
    return (folder / "config.json").is_file() and model_type(folder) in BY_MODEL_TYPE


def open_caption_tokenizer(folder: Path, max_tokens: int = 0) -> PretrainedTextTower:
    """The text tower of a dual encoder for its `tokenize` alone: it has no weights.

    Args:
        folder: Config and tokenizer of a dual encoder, in either layout.
        max_tokens: Where captions are cut; 0 for all tokens that the encoder has positions for.

    Returns:
        The tower; it cannot encode.
    """
    if layout_of(folder) == "open_clip":
        tower: PretrainedTextTower = open_clip.load_tokenizer(folder)
    else:
        tower = BY_MODEL_TYPE[model_type(folder)].text_tower(nn.Identity(), read_config(folder), folder)
    if max_tokens:
        tower.limit_tokens(max_tokens)
    return tower


def layout_of(folder: Path) -> Literal["transformers", "open_clip"]:
    """Which library's layout the folder of a dual encoder has.

    Args:
        folder: The folder, which exists.

    Returns:
        "transformers" or "open_clip"; where both are there, transformers', unless open_clip's alone has weights.
    """
    return "open_clip" if is_open_clip_layout([path.name for path in folder.iterdir()]) else "transformers"


def check_is_dual_encoder(folder: Path, source: object = None) -> None:
    """Check that a folder has the config of a dual encoder of a known family.

    Args:
        folder: Of a model; only its JSON files are read.
        source: What a message calls the model; None for the folder.

    Raises:
        FileNotFoundError: There is no config.
        ValueError: The config is of another kind of model, or cannot be parsed.
    """
    source = source or folder
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if is_open_clip_layout(names):
        open_clip.read_open_clip_config(folder)
        return
    if CONFIG_FILE in names and "config.json" not in names:
        raise FileNotFoundError(
            f"{source}: a run, and no pretrained model: --init {source} starts from it, beside --model.pretrained with "
            f"the model that it started from (in its {CONFIG_FILE})"
        )
    if "config.json" not in names:
        raise FileNotFoundError(f"{source}: no pretrained model: it has no config.json and no {open_clip.CONFIG_FILE}")
    kind = model_type(folder)
    if kind not in BY_MODEL_TYPE:
        raise ValueError(f"{source}: {describe_kind(kind, source)}; known are {KNOWN}")


def describe_kind(kind: str, source: object) -> str:
    """What a model of a `model_type` is instead of a dual encoder, and what to do with it.

    Args:
        kind: Of config.json; "" where it has none.
        source: The model's folder or name.

    Returns:
        The end of a message.
    """
    if not kind:
        return "config.json has no model_type, so it is no model of transformers: get the publisher's config.json"
    if kind.endswith(("_text_model", "_vision_model")):
        return f"'{kind}' is one tower of a dual encoder, not both: get the whole model"
    if kind in _models_of("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES"):
        return f"'{kind}' generates text, and gives no vectors of images and captions to compare"
    if kind in _models_of("MODEL_FOR_MASKED_LM_MAPPING_NAMES"):
        return f"'{kind}' reads text alone; it can be a text tower, --model.text_tower.name {source}"
    if kind in _models_of("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"):
        return f"'{kind}' generates text, and takes no images"
    if kind in _models_of("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"):
        return f"'{kind}' takes images alone; a backbone of timm can be an image tower, --model.image_tower.name"
    return f"'{kind}' is no dual encoder that can be opened"


def _models_of(*tables: str) -> set[str]:
    """The model types in transformers' tables of models for one task."""
    from transformers.models.auto import modeling_auto

    return {kind for table in tables for kind in getattr(modeling_auto, table, {})}
