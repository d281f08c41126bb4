"""One commit of a repository in the local cache."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from clipvisionalign.files import atomic_write
from clipvisionalign.models.hub.errors import CorruptedDownload, WeightsNotFound
from clipvisionalign.models.hub.licence import licence_of_card
from clipvisionalign.models.hub.revisions import is_commit
from clipvisionalign.models.hub.room import cache_folder, repository_folder
from clipvisionalign.models.hub.verification import expected_of_link, find_mismatch

#: A repository's description, which names its licence.
MODEL_CARD = "README.md"

#: From the names of a repository's files to those that are needed, the weights last. Raises WeightsNotFound.
ChooseFiles = Callable[[Collection[str]], list[str]]

#: From the folder of a commit, of which only the JSON files may be there; raises for a model of another kind.
CheckConfig = Callable[[Path], None]


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repository, in the local cache and verified.

    Attributes:
        name: The repository as it was asked for.
        repository: Its name on the hub, which may have moved.
        revision: The commit, 40 hex digits.
        folder: Folder of the files.
        files: Names of the files below it.
        licence: The licence that the repository states; "" where it states none.
    """

    name: str
    repository: str
    revision: str
    folder: Path
    files: tuple[str, ...]
    licence: str

    def paths(self) -> list[Path]:
        """The files with their folder.

        Returns:
            A path for each of `files`, in their order.
        """
        return [self.folder / name for name in self.files]


def cached_snapshot(name: str, revision: str, choose: ChooseFiles, *, nested: bool = False) -> Snapshot:
    """The files of one commit, from the local cache alone.

    Args:
        name: Repository OWNER/NAME; a name without an owner is also found under the one that it has now.
        revision: A branch, a tag or a commit; "" for the main branch, as it was when it was last fetched.
        choose: Selects the required files by the names of those that are there; raises WeightsNotFound if some are
            missing.
        nested: Whether `choose` is also given the files below folders.

    Returns:
        The files, each verified by its hash.

    Raises:
        WeightsNotFound: The revision is not in the cache, or required files are missing.
        CorruptedDownload: The content of a file is not that of the hub.
    """
    for repository in _repository_names(name):
        storage = repository_folder(repository)
        commit = revision
        if not is_commit(revision):
            ref = storage / "refs" / (revision or "main")
            commit = ref.read_text().strip() if ref.is_file() else ""
        folder = storage / "snapshots" / commit
        if commit and folder.is_dir():
            break
    else:
        at = f" at the revision '{revision}'" if revision else ""
        raise WeightsNotFound(f"'{name}' is not in the cache{at}, {cache_folder()}")
    paths = folder.rglob("*") if nested else folder.iterdir()
    files = choose([path.relative_to(folder).as_posix() for path in paths if path.is_file()])
    for file in files:
        if reason := find_mismatch(folder / file, expected_of_link(folder / file)):
            blob = (folder / file).resolve()
            raise CorruptedDownload(f"{folder / file}: {reason}; remove {blob} and run this again with a network")
    # Of names without an owner, the one that has it is the hub's.
    return Snapshot(
        name,
        max(_repository_names(repository), key=len),
        commit,
        folder,
        tuple(files),
        licence_of_card(folder / MODEL_CARD),
    )


#: Who owns the repositories that once had no owner's name, by how their names begin.
_OWNERS = {
    "bert-": "google-bert", "distilbert-": "distilbert", "distilroberta-": "distilbert", "roberta-": "FacebookAI",
    "xlm-roberta-": "FacebookAI", "albert-": "albert",
}  # fmt: skip


def _repository_names(name: str) -> list[str]:
    """The names under which the cache may have a repository: as given, and with or without its owner."""
    owner, slash, base_name = name.rpartition("/")
    own = next((own for start, own in _OWNERS.items() if base_name.startswith(start)), None)
    if own is None or (slash and owner != own):
        return [name]
    return [name, base_name if slash else f"{own}/{base_name}"]


def record_branch(name: str, revision: str, commit: str) -> None:
    """Record which commit a branch or tag stood for, where huggingface_hub reads it without a network.

    A cache that cannot be written is left as it is.

    Args:
        name: Repository OWNER/NAME.
        revision: The branch or tag; nothing is recorded for a commit.
        commit: The commit.
    """
    if revision == commit:
        return
    ref = repository_folder(name) / "refs" / revision
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(ref, unique_name=True) as aside:
            aside.write_text(commit)
    except OSError:
        # A cache that may only be read is as good.
        return
