"""Checks of a run's settings, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

from clipvisionalign.data.captioned import validate_caption_mode
from clipvisionalign.data.joined_captions import IDENTITY_REFUSED
from clipvisionalign.models.aligner import AlignerConfig
from clipvisionalign.models.aligner_config import REPLACED_BY_PRETRAINED, TEXT_SETTINGS_BESIDE_PRETRAINED
from clipvisionalign.models.heads import HEADS
from clipvisionalign.training.config import RunConfig, starts_from_model
from clipvisionalign.training.stages import SET_BY_STAGES, check_stages


def check_settings(config: RunConfig) -> None:
    """Check that the settings of a run fit each other and are within their ranges (`RANGES`).

    Nothing is read or loaded: whether files and models exist is checked later.

    Args:
        config: The settings.

    Raises:
        ValueError: They do not; the message names the flag and what it should be.
    """
    if config.stages:
        given = [name for name in SET_BY_STAGES if getattr(config, name) != getattr(RunConfig, name)]
        adapted = config.lora.towers if config.peft == "lora" else ""
        check_stages(config.stages, given, config.model.design, bool(config.init), adapted)
    if config.distill and not starts_from_model(config):
        raise ValueError("--distill keeps a run near the model that it starts from: give --init or --model.pretrained")
    if validate_caption_mode(config.captions) == "joined":
        _check_joined(config)
    if config.epochs == 0 and not config.model.pretrained:
        raise ValueError(
            "--epochs should be at least 1, or 0 with --model.pretrained, to measure a pretrained model as it is"
        )
    if config.epochs == 0 and config.init:
        raise ValueError("--epochs 0 measures a pretrained model as it is: leave --init out")
    for name in ("batch", "views", "patience", "negatives"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} should be at least 1, not {getattr(config, name)}")
    if config.freeze == "all" and config.model.design != "cross":
        raise ValueError("--freeze all trains the fusion alone, and only the design 'cross' has one")
    if config.batch < 2:
        raise ValueError("--batch should be at least 2: an image alone has nothing to be told from")
    if config.train_images == 1:
        raise ValueError(
            "--train_images should be at least 2, or 0 for all: an image alone has nothing to be told from"
        )
    _check_widths(config.model)
    if config.model.pretrained:
        _check_overridden(config.model)
    if config.freeze_blocks:
        _check_frozen_blocks(config)
    if config.peft == "lora" and config.freeze in ("all", "both"):
        raise ValueError(f"--peft lora trains adapters in a tower, and --freeze {config.freeze} freezes both")
    if config.profile and config.overwrite:
        raise ValueError("--profile leaves no run, and replaces none: leave --overwrite out")
    for names, holds, allowed in RANGES:
        for name in names.split():
            value = reduce(getattr, name.split("."), config)
            # Not given: two settings have other values for a pretrained model.
            if value is not None and not holds(value):
                raise ValueError(f"--{name} should be {allowed}, not {value}")


def _check_frozen_blocks(config: RunConfig) -> None:
    """Raises ValueError for settings that frozen blocks of an image tower cannot be beside."""
    if config.model.pretrained:
        raise ValueError(
            "--freeze_blocks is for an image tower by timm: freeze layers of a pretrained model by name "
            "(--freeze_layers), or its whole tower (--freeze image)"
        )
    if config.peft == "lora" and config.lora.towers != "text":
        raise ValueError(
            "--freeze_blocks freezes a part of an image tower that is trained, and --peft lora all of it: leave one "
            "out, or give adapters to fewer layers (--freeze_layers)"
        )


def _check_joined(config: RunConfig) -> None:
    """Raises ValueError for settings that joined captions cannot be beside."""
    if config.identity == "caption":
        raise ValueError(IDENTITY_REFUSED)
    if config.distill:
        raise ValueError(
            "--distill with --captions joined: it keeps the vectors of texts that are the same in each epoch, and "
            "joined ones are others each time; leave one of them out"
        )


def _check_overridden(model: AlignerConfig) -> None:
    """Raises ValueError for settings that a pretrained model takes the place of."""
    usual, text_tower = AlignerConfig(), model.text_tower
    kept = replace(text_tower, **{name: getattr(usual.text_tower, name) for name in TEXT_SETTINGS_BESIDE_PRETRAINED})
    given = [name for name in REPLACED_BY_PRETRAINED if getattr(model, name) != getattr(usual, name)]
    given += ["text_tower"] * (kept != usual.text_tower)
    if given:
        raise ValueError(overridden_message(f"model.{given[0]}"))


def overridden_message(setting: str) -> str:
    """The message for a setting that a pretrained model has a value of its own for.

    Args:
        setting: Name of the setting, as the flag has it: "model.image_tower.name".

    Returns:
        A sentence with the flag, the reason, and the settings that can be given beside `--model.pretrained`.
    """
    return (
        f"--{setting}: a pretrained model has its own, and is used as it is; leave it out, or leave --model.pretrained "
        "out (beside it count the design, late, fusion, width, positions, text_tower.window and text_tower.max_tokens)"
    )


def _check_widths(model: AlignerConfig) -> None:
    """Raises ValueError for widths that their heads do not share out evenly."""
    if model.width is not None and model.width % HEADS and not model.pretrained:
        raise ValueError(f"--model.width should be a multiple of {HEADS}, not {model.width}")
    heads, width = model.fusion.heads, model.fusion.width
    if model.design == "cross" and heads > 0 and width % heads:
        raise ValueError(f"--model.fusion.heads {heads} do not share out --model.fusion.width {width} evenly")


#: Of settings that are numbers, which they may be; not a NaN, which is in no range.
RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("chunk epochs profile steps train_images workers seed freeze_blocks", lambda value: value >= 0, "at least 0"),
    ("warmup ema loss.smoothing model.dropout lora.dropout", lambda value: 0 <= value < 1,
     "from 0 to below 1"),
    # Below 0: the encoder's own.
    ("model.text_tower.dropout", lambda value: value < 1, "below 1"),
    ("text_lr image_lr head_lr", lambda value: 0 <= value <= 1, "from 0 to 1"),
    ("layer_decay", lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ("weight_decay fusion_weight distill loss.margin loss.beta checkpoint_minutes", lambda value: 0 <= value < math.inf,
     "at least 0, and finite"),
    ("loss.bias", math.isfinite, "finite"),
    ("model.late.keep_tokens model.image_tower.size model.image_tower.blocks", lambda value: value >= 0, "at least 0"),
    # Two of them are an encoder's own marks.
    ("model.text_tower.max_tokens", lambda value: value >= 3, "at least 3"),
    ("lora.rank model.width model.late.width model.fusion.candidates model.fusion.layers model.fusion.heads "
     "model.fusion.width", lambda value: value >= 1, "at least 1"),
    ("lora.alpha model.late.temperature", lambda value: 0 < value < math.inf, "above 0, and finite"),
    ("model.temperature", lambda value: 0.01 <= value <= 100, "from 0.01 to 100"),
]  # fmt: skip
