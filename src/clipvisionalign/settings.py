"""Settings dataclasses from what YAML or JSON holds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any


def config_from_dict(cls: Callable[..., Any], values: dict[str, Any]) -> Any:
    """A settings dataclass from the values of a YAML or JSON file.

    Args:
        cls: The dataclass.
        values: Its fields by name; nested dataclasses as dictionaries.

    Returns:
        An instance of `cls`.

    Raises:
        ValueError: A name is unknown, or a value has the wrong type.
    """
    try:
        text = json.dumps(values)
    except (TypeError, ValueError):
        # A date, for one, which is refused by its key.
        return _parse(cls, values)
    return copy.deepcopy(_parsed(cls, text))


@lru_cache(maxsize=64)
def _parsed(cls: Callable[..., Any], text: str) -> Any:
    """Kept: parsing takes longer than reading a small model, and the models of a study have the same settings."""
    return _parse(cls, json.loads(text))


def _parse(cls: Callable[..., Any], values: dict[str, Any]) -> Any:
    from jsonargparse import ArgumentError

    parser = _parser_of(cls)
    try:
        return parser.instantiate_classes(parser.parse_object({"settings": values})).settings
    except ArgumentError as error:
        raise ValueError(str(error)) from None


@cache
def _parser_of(cls: Callable[..., Any]) -> Any:
    """Made once: that takes as long as building a small model."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "settings")
    return parser
