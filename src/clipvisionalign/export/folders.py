"""The folder that an export writes."""

from pathlib import Path


def target_folder(out: str | Path) -> Path:
    """Where an export goes. Raises FileExistsError where something is there."""
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out}: is there already and not empty; give another folder, or remove it first")
    return target
