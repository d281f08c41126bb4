"""JSON texts and headers of tables in which a name is repeated: each keeps its value."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def unique_names(names: Sequence[str]) -> list[str]:
    """Names of columns, those that are repeated numbered, so that each keeps its cells.

    Args:
        names: The names.

    Returns:
        As many different names.

    >>> unique_names(["image", "caption", "caption"])
    ['image', 'caption', 'caption.2']
    """
    unique: list[str] = []
    used = set(names)
    repeats: dict[str, int] = {}
    for name in names:
        repeats[name] = repeats.get(name, 0) + 1
        candidate = name
        while repeats[name] > 1 and candidate in used:
            candidate = f"{name}.{repeats[name]}"
            repeats[name] += candidate in used
        used.add(candidate)
        unique.append(candidate)
    return unique


def parse_json(text: str) -> tuple[Any, str]:
    """Parse JSON; of a key that occurs twice in one object both values are kept.

    Args:
        text: The text.

    Returns:
        The value, and the repeated keys as "caption: caption.2", with commas between; "" for none.

    Raises:
        ValueError: It is not JSON.
        RecursionError: It is nested too deeply.
    """
    repeated: dict[str, str] = {}

    def one_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = unique_names([name for name, _ in pairs])
        repeated.update((other, name) for other, (name, _) in zip(names, pairs, strict=True) if other != name)
        return dict(zip(names, (value for _, value in pairs), strict=True))

    content = json.loads(text, object_pairs_hook=one_object)
    return content, ", ".join(f"{name}: {other}" for other, name in repeated.items())
