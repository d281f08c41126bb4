"""Models of the Hugging Face Hub: the required files of one commit, each verified.

- A repository is asked once, for the commit that a branch or tag stands for, its files, their sizes and its licence.
  Files of that commit that are in the local cache are not fetched again. A commit that is cached needs no request.
- What is used was verified: its SHA-256 (or git's SHA-1, for small files) is the hub's. A file gets its name in the
  cache once it is whole; a cut connection is resumed, and after that retried.
- Without a network, or offline (`HF_HUB_OFFLINE`, `offline`), what lies in the cache is used, and no socket is opened.

The cache is huggingface_hub's own (`HF_HOME`, `HF_HUB_CACHE`), shared with transformers and timm. `HF_ENDPOINT` names
another hub, `HF_TOKEN` or `hf auth login` an account. Files go through plain HTTP: hf_xet would ask other hosts.
"""

from clipvisionalign.models.hub.cache import MODEL_CARD, CheckConfig, ChooseFiles, Snapshot, cached_snapshot
from clipvisionalign.models.hub.download import CHUNK, TRIES
from clipvisionalign.models.hub.errors import (
    CorruptedDownload,
    DiskFull,
    HubUnreachable,
    NoSuchRepository,
    WeightsNotFound,
)
from clipvisionalign.models.hub.offline import is_offline, offline
from clipvisionalign.models.hub.revisions import has_hub_form, is_commit, is_hub_name, split_revision
from clipvisionalign.models.hub.room import repository_folder
from clipvisionalign.models.hub.snapshots import snapshot
from clipvisionalign.models.hub.verification import sha256_of

__all__ = [
    "CHUNK",
    "MODEL_CARD",
    "TRIES",
    "CheckConfig",
    "ChooseFiles",
    "CorruptedDownload",
    "DiskFull",
    "HubUnreachable",
    "NoSuchRepository",
    "Snapshot",
    "WeightsNotFound",
    "cached_snapshot",
    "has_hub_form",
    "is_commit",
    "is_hub_name",
    "is_offline",
    "offline",
    "repository_folder",
    "sha256_of",
    "snapshot",
    "split_revision",
]
