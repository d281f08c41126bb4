"""The local cache and its free disk space."""

from __future__ import annotations

import shutil
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder of huggingface_hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repository_folder(name: str) -> Path:
    """Where the cache keeps a repository: blobs/, refs/BRANCH, snapshots/COMMIT/.

    Args:
        name: Repository OWNER/NAME.

    Returns:
        The folder, which need not exist.
    """
    return cache_folder() / f"models--{name.replace('/', '--')}"


FREE_SPACE_HINT = "Make room, or set HF_HOME to a folder on another disk"


def free_bytes(name: str) -> int:
    """Free disk space where a repository is kept.

    Args:
        name: Repository OWNER/NAME.

    Returns:
        Bytes.
    """
    path = repository_folder(name)
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def free_space(name: str) -> str:
    """The free disk space in the cache folder, as a phrase for messages.

    Args:
        name: Repository OWNER/NAME.

    Returns:
        Such as "12.3 GB are free in /home/me/.cache/huggingface/hub".
    """
    return f"{format_bytes(free_bytes(name))} are free in {cache_folder()}"


def format_bytes(count: int) -> str:
    """A number of bytes in MB or GB, of 10^6 and 10^9 bytes.

    Args:
        count: Bytes.

    Returns:
        The number with its unit.

    >>> format_bytes(1_500_000), format_bytes(2_000_000_000)
    ('1.5 MB', '2.00 GB')
    """
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
