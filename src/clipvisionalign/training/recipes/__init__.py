"""Settings of `train` by name: a YAML file each, its first line a comment with its description."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def recipes() -> dict[str, str]:
    """The recipes.

    Returns:
        By name what it is, in a line.
    """
    descriptions = {}
    for path in sorted(_folder().glob("*.yaml")):
        with path.open(encoding="utf-8") as file:
            descriptions[path.stem] = file.readline().lstrip("# ").strip()
    return descriptions


def recipe_file(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: Its name.

    Returns:
        A YAML file of settings.

    Raises:
        ValueError: There is no such recipe; the message lists them.
    """
    path = _folder() / f"{name}.yaml"
    if name not in recipes():
        known = "".join(f"\n  {each}: {words}" for each, words in recipes().items())
        raise ValueError(f"--recipe {name}: no such recipe; those are:{known}")
    return path


def _folder() -> Path:
    return Path(str(files("clipvisionalign.training.recipes")))
