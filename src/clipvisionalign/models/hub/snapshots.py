"""One commit of a repository, from the local cache or downloaded."""

from __future__ import annotations

import logging
from typing import Any

from clipvisionalign.models.hub.cache import CheckConfig, ChooseFiles, Snapshot, cached_snapshot
from clipvisionalign.models.hub.download import fetch_file
from clipvisionalign.models.hub.errors import CorruptedDownload, HubUnreachable, WeightsNotFound, translate_error
from clipvisionalign.models.hub.offline import is_offline
from clipvisionalign.models.hub.revisions import is_commit

logger = logging.getLogger(__name__)


def snapshot(
    name: str, revision: str, choose: ChooseFiles, *, check: CheckConfig | None = None, nested: bool = False
) -> Snapshot:
    """Files of one commit of a repository, fetched where the cache does not have them.

    A whole commit that is cached needs no request. Where the hub does not answer, what the cache has for the revision
    is used, and a message is logged.

    Args:
        name: Repository OWNER/NAME.
        revision: A branch, a tag or a commit; "" for the main branch.
        choose: Selects the required files by the names of the repository's, the weights last; raises WeightsNotFound.
        check: Called with the commit's folder once its JSON files are there, before anything large is fetched; what it
            raises ends the download. None for no check.
        nested: Whether `choose` is also given the files below folders, which are for other programs otherwise.

    Returns:
        The files, each verified by its hash.

    Raises:
        HubUnreachable: The files are not cached, and the hub may not be asked or does not answer.
        WeightsNotFound: The repository, the revision or files do not exist, or this account may not see them.
        CorruptedDownload: The content of a file is not that of the hub.
        DiskFull: There is no room for the download.
    """
    cache_error = ""
    if is_commit(revision) or is_offline():
        try:
            return cached_snapshot(name, revision, choose, nested=nested)
        except WeightsNotFound as error:
            cache_error = f"; {error}"
        except CorruptedDownload:
            if is_offline():
                raise
    if is_offline():
        raise HubUnreachable(f"the hub is not asked (--offline, or HF_HUB_OFFLINE){cache_error}")
    try:
        info = _request_info(name, revision)
    except HubUnreachable as error:
        try:
            cached = cached_snapshot(name, revision, choose, nested=nested)
        except WeightsNotFound:
            raise error from None
        logger.info(f"{name}: {error}; commit {cached.revision[:10]} is taken from the cache")
        return cached
    return fetch_file(name, revision, info, choose, check=check, nested=nested)


def _request_info(name: str, revision: str) -> Any:
    """The commit, files, sizes, hashes and licence of a repository, by one request."""
    from huggingface_hub import HfApi, constants

    try:
        return HfApi().model_info(
            name, revision=revision or "main", files_metadata=True, timeout=float(constants.HF_HUB_ETAG_TIMEOUT)
        )
    except Exception as error:
        raise translate_error(error, name, revision) from None
