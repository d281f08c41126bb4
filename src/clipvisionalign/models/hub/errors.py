"""Faults between this machine and a hub, as one set of errors."""

from __future__ import annotations

import errno
from collections.abc import Collection

from clipvisionalign.models.hub.room import FREE_SPACE_HINT, free_space


class WeightsNotFound(FileNotFoundError):
    """No pretrained weights of that name are on this machine, and none could be fetched."""


class HubUnreachable(WeightsNotFound):
    """The hub was not asked (offline), or did not answer."""


class CorruptedDownload(OSError):
    """A file's content is not that of the hub."""


class DiskFull(OSError):
    """There is no room for a download."""


_LOGIN = "'hf auth login', or HF_TOKEN in the environment"


def hub_endpoint() -> str:
    """The hub's address: `HF_ENDPOINT`, or the public hub."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def translate_error(error: Exception, name: str, revision: str, file: str = "") -> Exception:
    """Translate an error of huggingface_hub, or of the HTTP client below it, into one of this module.

    Args:
        error: The error.
        name: Repository that was asked for.
        revision: Its revision; "" for main.
        file: The file that was asked for; "" where it was the repository.

    Returns:
        The error to raise; `error` itself if it is of no known kind.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    subject, hub = f"{name}: {file}" if file else name, hub_endpoint()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return WeightsNotFound(
            f"{subject}: gated: its owners require an account. Accept its conditions on {hub}/{name}, "
            "then log in: "
            f"{_LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsNotFound(
            f"{name}: {hub} has no revision '{revision or 'main'}' of it: a branch, a tag or a commit"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 404 and not file):
        return NoSuchRepository(name, hub)
    if isinstance(error, errors.EntryNotFoundError) or status == 404:
        return WeightsNotFound(f"{subject}: {hub} names it, and then does not have it")
    if status in (401, 403):
        return WeightsNotFound(f"{subject}: {hub} refuses it ({status}): a wrong or expired token, or none: {_LOGIN}")
    if isinstance(error, errors.HFValidationError):
        return WeightsNotFound(f"'{name}' is no repository's name: {str(error).splitlines()[0]}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"{subject}: the disk became full: {free_space(name)}; nothing of it is kept. {FREE_SPACE_HINT}"
        )
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return CorruptedDownload(f"{subject}: {hub} sent another size than it announces, each time; try again")
    if isinstance(error, PermissionError):
        return DiskFull(f"{subject}: {error}: this cache cannot be written; set HF_HOME to a folder that can")
    if _is_network_error(error) or status is not None:
        reason = str(error).strip().splitlines()
        kind = type(error).__name__ if status is None else f"status {status}"
        return HubUnreachable(f"{hub} did not answer ({kind}{f': {reason[0]}' if reason else ''})")
    return error


class NoSuchRepository(WeightsNotFound):
    """The hub has no repository of that name, or none that this account may see.

    Args:
        name: The repository.
        hub: Address of the hub.
        suggestions: Names that are close to it, for the message.
    """

    def __init__(self, name: str, hub: str, suggestions: Collection[str] = ()) -> None:
        self.name, self.hub = name, hub
        like = f" Near it: {', '.join(suggestions)}." if suggestions else ""
        super().__init__(f"{name}: {hub} has no such repository.{like} If it is a private one, log in: {_LOGIN}")


def _is_network_error(error: BaseException) -> bool:
    """Whether an error is the HTTP client's: which of them huggingface_hub uses has changed twice."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"httpx", "httpx2", "httpcore", "requests", "urllib3"}) or isinstance(
        error, (ConnectionError, TimeoutError)
    )
