"""JSON files: read, with errors that name the file and what to do, and written atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipvisionalign.files import atomic_write


def read_json(path: Path, hint: str = "put back a whole one, or remove it") -> Any:
    """The value that a JSON file holds.

    Args:
        path: A file in UTF-8.
        hint: What the user can do about a file that cannot be read; the end of the error's message.

    Returns:
        The value, of whatever type.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is not JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error}); {hint}") from None


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file, atomically: a process that is killed leaves no half of a file.

    Args:
        path: The file, which is replaced if it exists.
        value: Anything that `json.dumps` takes.
    """
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
