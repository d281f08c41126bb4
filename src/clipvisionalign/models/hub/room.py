"""The local cache and its free disk space."""

from __future__ import annotations

import shutil
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder of huggingface_hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(name: str) -> Path:
    """Where the cache keeps a repository: blobs/, refs/BRANCH, snapshots/COMMIT/."""
    return cache_folder() / f"models--{name.replace('/', '--')}"


FREE_SPACE_HINT = "Make room, or set HF_HOME to a folder on another disk"


def free_bytes(name: str) -> int:
    """Bytes that are free where a repository is kept."""
    path = repository_folder(name)
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def free_space(name: str) -> str:
    """The free disk space in the cache folder, as a phrase for messages."""
    return f"{format_bytes(free_bytes(name))} are free in {cache_folder()}"


def format_bytes(count: int) -> str:
    """A number of bytes in MB or GB."""
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
