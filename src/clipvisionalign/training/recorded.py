"""The settings of a run as its files hold them, written and read."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from clipvisionalign.models.aligner_config import read_recorded_settings, recorded_settings
from clipvisionalign.settings import config_from_dict
from clipvisionalign.training.config import RunConfig


def record_settings(config: RunConfig) -> dict[str, Any]:
    """What config.yaml of a run folder holds: all settings, but none that a pretrained model takes the place of.

    Args:
        config: The settings.

    Returns:
        Their values, as YAML can hold them.
    """
    return asdict(config) | {"model": recorded_settings(config.model)}


def read_settings(values: Any) -> RunConfig:
    """The settings that a file of `record_settings`, or of a version before, holds.

    Args:
        values: What the file holds, of whatever type.

    Returns:
        The settings.

    Raises:
        ValueError: They are no settings of a run.
    """
    if isinstance(values, dict) and "model" in values:
        values = values | {"model": read_recorded_settings(values["model"])}
    config: RunConfig = config_from_dict(RunConfig, values)
    return config
