"""YAML without implicit conversions: what is not a plain number, true, false or null is a string.

PyYAML reads YAML 1.1, in which 010 is eight, 1:30 is ninety, and off is false. Here these are texts, as a date is;
whoever wants a number, or a boolean, of such a text reads it with `boolean`, int or float.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import yaml

#: Where None is a value: flags that are no settings, and settings that a model has of its own.
UNSET = ("", "recipe", "resume", "model.width", "model.text_tower.max_tokens")


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with fewer plain values that are no texts."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012 (PyYAML's own name for them)


_KINDS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    # With a point, as 12e45 may be a commit.
    "float": (r"[-+]?(?:0|[1-9][0-9]*)?\.[0-9]+(?:[eE][-+]?[0-9]+)?|[-+]?(?:0|[1-9][0-9]*)\.(?:[eE][-+]?[0-9]+)?"
              r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+0123456789."),
    "merge": (r"<<", "<"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
}  # fmt: skip
for _kind, (_form, _first) in _KINDS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_form})\\Z"), list(_first))


def load(text: str) -> Any:
    """Parse YAML without implicit conversions of numbers such as 010 or 1:30 and of words such as off.

    Args:
        text: The YAML.

    Returns:
        Its value.

    Raises:
        yaml.YAMLError: The text is not YAML.

    >>> load("a: 010")
    {'a': '010'}
    """
    return yaml.load(text, Loader)


def safe_load(text: str) -> Any:
    """Load YAML 1.1 as `yaml.safe_load` does, which is how programs write it; ten times as fast where PyYAML has
    libyaml.

    Args:
        text: YAML.

    Returns:
        What it holds.

    Raises:
        yaml.YAMLError: It is no YAML.
    """
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def load_settings(text: str, numbers: Collection[str] = ()) -> Any:
    """Load a file of settings, whose texts jsonargparse reads once more as YAML 1.1 where it wants a number.

    Args:
        text: YAML.
        numbers: The settings that are numbers, by their names with dots.

    Returns:
        What it holds.

    Raises:
        ValueError: A value would be another number than stands there, or a key has nothing after it; names the key.
    """
    settings = load(text)
    _refuse_misread(settings, "", numbers)
    return settings


def _refuse_misread(value: Any, key: str, numbers: Collection[str]) -> None:
    if isinstance(value, dict):
        for name, each in value.items():
            _refuse_misread(each, f"{key}.{name}" if key else str(name), numbers)
    elif isinstance(value, str) and key in numbers and is_clock(value):
        raise ValueError(f"{key}: {value} is no number")
    elif value is None and key not in UNSET:
        raise ValueError(f"{key}: nothing stands there: give a value, or leave the line out")


def is_clock(text: str) -> bool:
    """Whether YAML 1.1 reads a text as a number of base 60.

    Args:
        text: The text.

    Returns:
        Whether it does.

    >>> is_clock("1:30"), is_clock("130")
    (True, False)
    """
    return bool(re.fullmatch(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?", text))


def boolean(text: str) -> bool:
    """A boolean that is written as a word.

    Args:
        text: true, yes, on or their opposites.

    Returns:
        Its value.

    Raises:
        KeyError: Any other word.

    >>> boolean("yes"), boolean("off")
    (True, False)
    """
    return yaml.SafeLoader.bool_values[text.lower()]
