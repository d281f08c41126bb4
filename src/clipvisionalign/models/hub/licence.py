"""The licence of a repository, as it states it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def licence_of(info: Any) -> str:
    """The licence in the metadata of a repository.

    Args:
        info: huggingface_hub's ModelInfo.

    Returns:
        The licence, several with commas between; "" where none is stated.
    """
    card = getattr(info, "card_data", None)
    stated = getattr(card, "license", None) or next(
        (tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")), ""
    )
    return _licence_name(stated, getattr(card, "license_name", None))


def licence_of_card(path: Path) -> str:
    """The licence in the head of a cached README.md.

    Args:
        path: The file, which need not exist.

    Returns:
        The licence; "" where none is stated or the head cannot be parsed.
    """
    import yaml

    if not path.is_file():
        return ""
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        return ""
    return _licence_name(values.get("license"), values.get("license_name")) if isinstance(values, dict) else ""


def _licence_name(stated: Any, name: Any) -> str:
    stated = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated or "")
    return str(name) if stated == "other" and name else stated
