"""Where the local cache is, and how much room is left there."""

from __future__ import annotations

import shutil
from pathlib import Path


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _storage(name: str) -> Path:
    """Where the cache keeps a repository: blobs/, refs/BRANCH, snapshots/COMMIT/."""
    return _cache() / f"models--{name.replace('/', '--')}"


_MORE_ROOM = "Make room, or set HF_HOME to a folder on another disk"


def _free(name: str) -> int:
    """Bytes that are free where a repository is kept."""
    path = _storage(name)
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _room(name: str) -> str:
    return f"{_size(_free(name))} are free in {_cache()}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
