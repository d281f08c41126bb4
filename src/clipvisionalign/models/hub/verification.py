"""Verify a file's size and hash against the hub's."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.models.hub.revisions import is_commit

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class _Expected:
    """What a file should be: its size and its SHA-256, or git's SHA-1 of it; None if unknown."""

    size: int | None = None
    sha256: str | None = None
    git: str | None = None


def expected_of_hub(sibling: Any) -> _Expected:
    """A file's size and hash as the hub's API gives them.

    Args:
        sibling: The file's entry in huggingface_hub's ModelInfo.

    Returns:
        Its size, and its SHA-256 or git's SHA-1.
    """
    lfs = sibling.lfs
    if lfs is not None:
        return _Expected(lfs["size"], lfs["sha256"]) if isinstance(lfs, dict) else _Expected(lfs.size, lfs.sha256)
    return _Expected(sibling.size, git=sibling.blob_id)


def expected_of_link(path: Path) -> _Expected:
    """A file's hash as the cache has it: the file links to a blob that is named by its hash.

    Args:
        path: The file.

    Returns:
        Its SHA-256 or git's SHA-1; neither where it is no such link.
    """
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    if _SHA256.fullmatch(blob):
        return _Expected(sha256=blob)
    return _Expected(git=blob) if is_commit(blob) else _Expected()


def find_mismatch(path: Path, expected: _Expected) -> str:
    """What is wrong with the content of a file.

    Args:
        path: The file.
        expected: Its size and hash; what is None is not compared.

    Returns:
        The difference; "" for none.
    """
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        return f"{size:,} bytes where {expected.size:,} should be"
    if expected.sha256 and (actual := sha256_of(path)) != expected.sha256:
        return f"its SHA-256 is {actual[:12]}..., not {expected.sha256[:12]}..."
    if expected.git and (actual := _git_hash(path)) != expected.git:
        return f"its git hash is {actual[:12]}..., not {expected.git[:12]}..."
    return ""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file.

    Args:
        path: The file, which is read in pieces.

    Returns:
        64 hex digits.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def remove_cached(path: Path) -> None:
    """Remove a file of the cache and what it links to.

    Args:
        path: The file, which need not exist.
    """
    if path.is_symlink():
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
