"""One commit of a repository in the local cache."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from clipvisionalign.files import written_aside
from clipvisionalign.models.hub.errors import CorruptedDownload, WeightsNotFound
from clipvisionalign.models.hub.licence import _licence_of_card
from clipvisionalign.models.hub.revisions import is_commit
from clipvisionalign.models.hub.room import _cache, _storage
from clipvisionalign.models.hub.verification import _expected_of_link, _wrong

#: A repository's description, which names its licence.
CARD = "README.md"

#: From the names of a repository's files to those that are needed, the weights last. Raises WeightsNotFound.
Choose = Callable[[Collection[str]], list[str]]


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository, in the local cache and verified.

    name: the repository as it was asked for; repository: its name on the hub, which may have moved; revision: the
    commit; folder: where the files are; licence: as the repository states it, "" where it does not.
    """

    name: str
    repository: str
    revision: str
    folder: Path
    files: tuple[str, ...]
    licence: str

    def paths(self) -> list[Path]:
        """The files, where they are."""
        return [self.folder / name for name in self.files]


def cached_snapshot(name: str, revision: str, choose: Choose) -> Snapshot:
    """The same from the local cache alone. Raises WeightsNotFound where it has not got all, CorruptedDownload."""
    for own in _names(name):
        storage = _storage(own)
        commit = revision
        if not is_commit(revision):
            ref = storage / "refs" / (revision or "main")
            commit = ref.read_text().strip() if ref.is_file() else ""
        folder = storage / "snapshots" / commit
        if commit and folder.is_dir():
            break
    else:
        at = f" at the revision '{revision}'" if revision else ""
        raise WeightsNotFound(f"'{name}' is not in the cache{at}, {_cache()}")
    files = choose([path.name for path in folder.iterdir() if path.is_file()])
    for file in files:
        if reason := _wrong(folder / file, _expected_of_link(folder / file)):
            blob = (folder / file).resolve()
            raise CorruptedDownload(f"{folder / file}: {reason}; remove {blob} and run this again with a network")
    # Of names without an owner, the one that has it is the hub's.
    return Snapshot(name, max(_names(own), key=len), commit, folder, tuple(files), _licence_of_card(folder / CARD))


#: Who owns the repositories that once had no owner's name, by how their names begin.
_OWNERS = {
    "bert-": "google-bert", "distilbert-": "distilbert", "distilroberta-": "distilbert", "roberta-": "FacebookAI",
    "xlm-roberta-": "FacebookAI", "albert-": "albert",
}  # fmt: skip


def _names(name: str) -> list[str]:
    """The names under which the cache may have a repository: as given, and with or without its owner."""
    owner, slash, plain = name.rpartition("/")
    own = next((own for start, own in _OWNERS.items() if plain.startswith(start)), None)
    if own is None or (slash and owner != own):
        return [name]
    return [name, plain if slash else f"{own}/{plain}"]


def _remember_branch(name: str, revision: str, commit: str) -> None:
    """What a branch stood for, as huggingface_hub's cache has it: for the time without a network."""
    if revision == commit:
        return
    ref = _storage(name) / "refs" / revision
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(ref, own=True) as aside:
            aside.write_text(commit)
    except OSError:
        # A cache that may only be read is as good.
        return
