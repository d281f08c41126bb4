"""A dual encoder in a folder of transformers' layout: its model, tokenizer and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from clipvisionalign.models.pretrained.parts import (
    TRANSFORMERS_NAMES,
    DualEncoderParts,
    PretrainedImageHead,
    PretrainedImageTower,
    PretrainedTextTower,
    common_width,
    fit_tensors,
    rename_tensors,
)
from clipvisionalign.models.text_tower import layer_pattern, silence_transformers
from clipvisionalign.models.weight_files import read_tensors, weights_files

#: What to do about a config and weights that do not fit.
_WAY_OUT = "get config.json and the weights of one and the same model"


def load_model(model_class: Any, config: Any, folder: Path, load_weights: bool) -> Any:
    """transformers' own model, in float32.

    Args:
        model_class: Such as `transformers.CLIPModel`.
        config: Its settings.
        folder: Where config.json and the weights are.
        load_weights: Whether to read the weights; else they are random, to be replaced.

    Returns:
        The model, on the CPU.

    Raises:
        WeightsNotFound: There are no weights.
        ValueError: The settings build no model, or the weights are not all of this model's.
    """

    silence_transformers()
    if not load_weights:
        return _quote_reason(
            lambda: model_class(config), f"{folder}: transformers builds no '{config.model_type}' of its config.json"
        )
    files = weights_files(folder)
    model, report = _quote_reason(
        lambda: model_class.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True,
            use_safetensors=files[0].suffix == ".safetensors", ignore_mismatched_sizes=True,
        ),
        f"{files[0]}: weights that cannot be read, or are not this model's",
        files,
    )  # fmt: skip
    # transformers initialises what is missing at random, silently.
    mismatched_names = {name for name, *_ in report.get("mismatched_keys", ())}
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()} - mismatched_names)
    if missing:
        raise ValueError(
            f"{files[0]}: not the weights of this '{config.model_type}': {len(missing)} tensors are missing, such as "
            f"{missing[0]}; {_WAY_OUT}"
        )
    if mismatched := sorted(report.get("mismatched_keys", ())):
        name, there, wanted = mismatched[0]
        raise ValueError(
            f"{files[0]}: not the shapes that config.json describes: {name} is {tuple(there)} and not {tuple(wanted)} "
            f"({len(mismatched)} such tensors); {_WAY_OUT}"
        )
    layers = {kind for kind in map(layer_pattern, dict(model.named_parameters())) if "#" in kind}
    if extra := sorted(name for name in report["unexpected_keys"] if layer_pattern(name) in layers):
        raise ValueError(
            f"{files[0]}: weights of more layers than config.json counts: {len(extra)} tensors, such as {extra[0]}; "
            f"{_WAY_OUT}"
        )
    return model.float()


def save_model(model_class: Any, config: Any, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write config.json and model.safetensors of transformers' own model, in float32.

    Args:
        model_class: Such as `transformers.CLIPModel`.
        config: Its settings.
        state: The model's tensors, under the names of an aligner's.
        folder: Where the files are written.

    Raises:
        ValueError: There are tensors that are not this model's, or some are missing.
    """
    if hasattr(config, "projection_dim"):
        config.projection_dim = common_width(state) or config.projection_dim
    model = load_model(model_class, config, folder, load_weights=False)
    model.load_state_dict(
        fit_tensors(rename_tensors(state, TRANSFORMERS_NAMES), model.state_dict(), model_class.__name__)
    )
    model.float().save_pretrained(folder)


def projected_parts(
    model: Any, family: str, image_tower: PretrainedImageTower, text_tower: PretrainedTextTower
) -> DualEncoderParts:
    """The parts of a model that projects both towers linearly, as CLIP and its kin do.

    Args:
        model: transformers' own model.
        family: Its name, for messages.
        image_tower: Around its vision model.
        text_tower: Around its text model.

    Returns:
        The parts.
    """
    return DualEncoderParts(
        family=family,
        image_tower=image_tower,
        text_tower=text_tower,
        image_head=PretrainedImageHead(model.visual_projection),
        text_head=model.text_projection,
        width=model.config.projection_dim,
        log_scale=model.logit_scale.item(),
    )


def read_config(folder: Path) -> Any:
    """transformers' settings of a folder.

    Args:
        folder: A folder with a config.json.

    Returns:
        The settings.

    Raises:
        ValueError: config.json describes no model that transformers supports.
    """
    import transformers

    silence_transformers()
    return _quote_reason(
        lambda: transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False),
        f"{folder / 'config.json'}: not read by transformers {transformers.__version__}",
    )


def _quote_reason(call: Any, message: str, files: Sequence[Path] = ()) -> Any:
    """What a call gives; a ValueError with the first line of another library's error.

    files: of weights, for a file among them that is the reason.
    """
    try:
        return call()
    except Exception as error:
        for file in files:
            read_tensors(file)
        reason = " ".join((str(error).strip().splitlines() or [type(error).__name__])[0].split())[:200]
        raise ValueError(f"{message}: {reason}") from None
