"""Branches, tags and commits of a repository."""

from __future__ import annotations

import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit, whose content cannot change.

    Args:
        revision: A branch, a tag or a commit.

    Returns:
        Whether it is 40 hex digits.

    >>> is_commit("main"), is_commit("0" * 40)
    (False, True)
    """
    return bool(_COMMIT.fullmatch(revision))


def split_revision(name: str, revision: str = "") -> tuple[str, str]:
    """Split a name that may end with @REVISION, as timm writes it.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.
        revision: The revision of a setting; "" for none. A commit takes precedence over the name's own revision.

    Returns:
        The name without its revision, and the revision ("" for none).

    Raises:
        ValueError: The two name different revisions, and the setting's is no commit.

    >>> split_revision("openai/clip-vit-base-patch32@main")
    ('openai/clip-vit-base-patch32', 'main')
    """
    plain, at, own_revision = name.partition("@")
    if at and revision and own_revision != revision and not is_commit(revision):
        raise ValueError(
            f"'{name}' asks for the revision '{own_revision}', and the setting 'revision' for '{revision}'"
        )
    return (plain, revision or own_revision) if at else (name, revision)


def has_hub_form(name: str) -> bool:
    """Whether a name has the form of a hub name, OWNER/NAME, also with "hf-hub:" before it or @REVISION behind it.

    Args:
        name: A name.

    Returns:
        Whether it has.
    """
    plain = name.removeprefix("hf-hub:").partition("@")[0]
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", plain) is not None


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of a hub name, and no local path begins like it.

    Args:
        name: A name; "hf-hub:OWNER/NAME" is one whatever folders are here.

    Returns:
        Whether it can be a hub name; the hub is not asked.

    >>> is_hub_name("openai/clip-vit-base-patch32"), is_hub_name("./runs/self")
    (True, False)
    """
    return has_hub_form(name) and (name.startswith("hf-hub:") or not Path(name.split("/")[0]).exists())
