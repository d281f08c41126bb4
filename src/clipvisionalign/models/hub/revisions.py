"""Branches, tags and commits of a repository."""

from __future__ import annotations

import re

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit: what is there cannot change."""
    return bool(_COMMIT.fullmatch(revision))


def split_revision(name: str, revision: str = "") -> tuple[str, str]:
    """A name that may end with @REVISION, as timm writes it -> name, revision. Raises ValueError for two of them."""
    plain, at, own_revision = name.partition("@")
    if at and revision and own_revision != revision and not is_commit(revision):
        raise ValueError(
            f"'{name}' asks for the revision '{own_revision}', and the setting 'revision' for '{revision}'"
        )
    return (plain, revision or own_revision) if at else (name, revision)
