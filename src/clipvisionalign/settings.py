"""Settings dataclasses from what YAML or JSON holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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
