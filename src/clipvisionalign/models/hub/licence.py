"""The licence of a repository, as it states it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def licence_of(info: Any) -> str:
    """The licence in the metadata of a repository, "" for none."""
    card = getattr(info, "card_data", None)
    stated = getattr(card, "license", None) or next(
        (tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")), ""
    )
    return _licence_name(stated, getattr(card, "license_name", None))


def licence_of_card(path: Path) -> str:
    """From the head of a repository's README.md, where that is cached."""
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
