"""Models of the Hugging Face Hub: one commit of a repository, the files that are needed of it, each one checked.

- A repository is asked once, for the commit that a branch or tag stands for, its files, their sizes and its licence.
  Files of that commit that are in the local cache are not fetched again. A commit that is cached needs no request.
- What is used was verified: its SHA-256 (or git's SHA-1, for small files) is the hub's. A file gets its name in the
  cache once it is whole; a cut connection is resumed, and after that retried.
- Without a network, or offline (`HF_HUB_OFFLINE`, `offline`), what lies in the cache is used, and no socket is opened.

The cache is huggingface_hub's own (`HF_HOME`, `HF_HUB_CACHE`), shared with transformers and timm. `HF_ENDPOINT` names
another hub, `HF_TOKEN` or `hf auth login` an account. Files go through plain HTTP: hf_xet would ask other hosts.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.files import written_aside
from clipvisionalign.progress import LongStep, long_step

#: How often a file is asked for whose download failed, beyond what huggingface_hub resumes by itself.
TRIES = 2
#: Bytes that are written together: what a cut connection loses at most.
CHUNK = 1 << 20
#: A repository's description, which names its licence.
CARD = "README.md"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Longer descriptions are no description, and are not fetched.
_CARD_BYTES = 1_000_000

Say = Callable[[str], None]
#: From the names of a repository's files to those that are needed, the weights last. Raises WeightsNotFound.
Choose = Callable[[Collection[str]], list[str]]


class WeightsNotFound(FileNotFoundError):
    """No pretrained weights of that name are on this machine, and none could be fetched."""


class HubUnreachable(WeightsNotFound):
    """The hub was not asked (offline), or did not answer."""


class CorruptedDownload(OSError):
    """A file's content is not what the hub says it is."""


class DiskFull(OSError):
    """There is no room for a download."""


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


def tell(line: str) -> None:
    """A line on standard error, for callers that have no place of their own for it."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def offline() -> Iterator[None]:
    """No request to the hub in this block, nor in a process that it starts: HF_HUB_OFFLINE, set and set back."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    # It reads the variable when it is imported, which may have been before.
    constants: Any = sys.modules.get("huggingface_hub.constants")
    constant = constants is None or constants.HF_HUB_OFFLINE
    if constants is not None:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        was_imported, constants = constants is not None, sys.modules.get("huggingface_hub.constants")
        if constants is not None:
            constants.HF_HUB_OFFLINE = constant if was_imported else _is_set(*names[:2])


def _is_set(*names: str) -> bool:
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def is_offline() -> bool:
    """Whether no request may be made: `offline`, or HF_HUB_OFFLINE in the environment."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or _is_set("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit: what is there cannot change."""
    return bool(_COMMIT.fullmatch(revision))


def split_revision(name: str, revision: str = "") -> tuple[str, str]:
    """A name that may end with @REVISION, as timm writes it -> name, revision. Raises ValueError for two of them."""
    plain, at, own = name.partition("@")
    if at and revision and own != revision and not is_commit(revision):
        raise ValueError(f"'{name}' asks for the revision '{own}', and the setting 'revision' for '{revision}'")
    return (plain, revision or own) if at else (name, revision)


# --- a snapshot: from the cache, or fetched ---------------------------------------------------------------------------


def snapshot(name: str, revision: str, choose: Choose, say: Say = tell) -> Snapshot:
    """The files that `choose` picks of a repository's commit, fetched where the cache does not have them.

    revision: a branch, a tag or a commit; "" for the main branch. A whole commit that is cached needs no network.

    Raises HubUnreachable where the files are not cached and the hub is not asked or does not answer, WeightsNotFound
    for a repository, a revision or files that do not exist or that this account may not see, CorruptedDownload, and
    DiskFull.
    """
    lacking = ""
    if is_commit(revision) or is_offline():
        try:
            return cached_snapshot(name, revision, choose)
        except WeightsNotFound as error:
            lacking = f"; {error}"
        except CorruptedDownload:
            if is_offline():
                raise
    if is_offline():
        raise HubUnreachable(f"the hub is not asked (--offline, or HF_HUB_OFFLINE){lacking}")
    try:
        info = _ask(name, revision)
    except HubUnreachable as error:
        try:
            found = cached_snapshot(name, revision, choose)
        except WeightsNotFound:
            raise error from None
        say(f"{name}: {error}; commit {found.revision[:10]} is taken from the cache")
        return found
    return _fetch(name, revision, info, choose, say)


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


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _storage(name: str) -> Path:
    """Where the cache keeps a repository: blobs/, refs/BRANCH, snapshots/COMMIT/."""
    return _cache() / f"models--{name.replace('/', '--')}"


def _ask(name: str, revision: str) -> Any:
    """The commit, files, sizes, hashes and licence of a repository, by one request."""
    from huggingface_hub import HfApi, constants

    try:
        return HfApi().model_info(
            name, revision=revision or "main", files_metadata=True, timeout=float(constants.HF_HUB_ETAG_TIMEOUT)
        )
    except Exception as error:
        raise _explained(error, name, revision) from None


def _fetch(name: str, revision: str, info: Any, choose: Choose, say: Say) -> Snapshot:
    # What lies in sub-folders (onnx/, coreml/) is for other programs.
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or [] if "/" not in sibling.rfilename}
    files = choose(list(siblings))
    if CARD in siblings and (siblings[CARD].size or 0) < _CARD_BYTES and CARD not in files:
        files = [CARD, *files]
    folder = _storage(name) / "snapshots" / info.sha
    for file in files:
        expected = _expected_of_hub(siblings[file])
        if (folder / file).is_file() and (reason := _wrong(folder / file, expected)):
            say(f"{folder / file}: {reason}; it is fetched again")
            _drop(folder / file)
    missing = [file for file in files if not (folder / file).is_file()]
    licence = _licence(info) or _licence_of_card(folder / CARD)
    if missing:
        total = sum(siblings[file].size or 0 for file in missing)
        _check_room(name, total)
        files_of = f"{len(missing)} files, {_size(total)}" if len(missing) > 1 else f"{missing[0]}, {_size(total)}"
        told = f", licence {licence}" if licence else ""
        say(f"{name}: fetching {files_of}, from {_endpoint()} (commit {info.sha[:10]}{told})")
        with _quiet_hub(), long_step(f"fetching {name} (kB)", total // 1000) as step:
            bar = _Bar(step)
            for file in missing:
                _download(name, info.sha, file, siblings[file], bar, say)
    _remember_branch(name, revision or "main", info.sha)
    return Snapshot(name, info.id or name, info.sha, folder, tuple(files), licence)


def _download(name: str, commit: str, file: str, sibling: Any, bar: _Bar, say: Say) -> None:
    """One file into the cache, whole and verified. Raises what `snapshot` raises."""
    import inspect

    from huggingface_hub import constants, hf_hub_download

    options: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        options["tqdm_class"] = bar.counter
    for tries_left in reversed(range(TRIES)):
        done = bar.done
        try:
            path = hf_hub_download(
                name, file, revision=commit, etag_timeout=float(constants.HF_HUB_ETAG_TIMEOUT), **options
            )
            reason = _wrong(Path(path), _expected_of_hub(sibling))
            if not reason:
                return
            _drop(Path(path))
            problem: Exception = CorruptedDownload(
                f"{name}: {file} came with other content than the hub announces: {reason}; nothing of it is kept: try "
                "again, and if that does not help, a proxy or mirror on the way changes files"
            )
        except Exception as error:
            problem = _explained(error, name, commit, file)
        if not tries_left or not isinstance(problem, (HubUnreachable, CorruptedDownload)):
            raise problem from None
        bar.go_to(done)
        say(f"{name}: {file}: {problem}; once more")
        time.sleep(1)


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


# --- is a file what it should be --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Expected:
    """What a file should be: its size and its SHA-256, or git's SHA-1 of it; None where that is not known."""

    size: int | None = None
    sha256: str | None = None
    git: str | None = None


def _expected_of_hub(sibling: Any) -> _Expected:
    lfs = sibling.lfs
    if lfs is not None:
        return _Expected(lfs["size"], lfs["sha256"]) if isinstance(lfs, dict) else _Expected(lfs.size, lfs.sha256)
    return _Expected(sibling.size, git=sibling.blob_id)


def _expected_of_link(path: Path) -> _Expected:
    """In the cache a file links to a blob that is named by its hash."""
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    if _SHA256.fullmatch(blob):
        return _Expected(sha256=blob)
    return _Expected(git=blob) if is_commit(blob) else _Expected()


def _wrong(path: Path, expected: _Expected) -> str:
    """What is wrong with a file's content; "" for nothing."""
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        return f"{size:,} bytes where {expected.size:,} should be"
    if expected.sha256 and (found := sha256_of(path)) != expected.sha256:
        return f"its SHA-256 is {found[:12]}..., not {expected.sha256[:12]}..."
    if expected.git and (found := _git_hash(path)) != expected.git:
        return f"its git hash is {found[:12]}..., not {expected.git[:12]}..."
    return ""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _drop(path: Path) -> None:
    """Remove a file of the cache and what it links to."""
    if path.is_symlink():
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


# --- licences ---------------------------------------------------------------------------------------------------------


def _licence(info: Any) -> str:
    card = getattr(info, "card_data", None)
    stated = getattr(card, "license", None) or next(
        (tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")), ""
    )
    return _licence_name(stated, getattr(card, "license_name", None))


def _licence_of_card(path: Path) -> str:
    """From the head of a repository's README.md, where that is cached."""
    import yaml

    if not path.is_file():
        return ""
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        return ""
    return _licence_name(values.get("license"), values.get("license_name")) if isinstance(values, dict) else ""


def _licence_name(stated: Any, name: Any) -> str:
    stated = ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated or "")
    return str(name) if stated == "other" and name else stated


# --- what went wrong, in words ----------------------------------------------------------------------------------------

_LOGIN = "'hf auth login', or HF_TOKEN in the environment"


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _explained(error: Exception, name: str, revision: str, file: str = "") -> Exception:
    """One error of this module for whatever huggingface_hub, or the HTTP client beneath it, raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    what, hub = f"{name}: {file}" if file else name, _endpoint()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return WeightsNotFound(
            f"{what}: gated: its owners want to know who uses it. Accept its conditions on {hub}/{name}, then log in: "
            f"{_LOGIN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsNotFound(
            f"{name}: {hub} has no revision '{revision or 'main'}' of it: a branch, a tag or a commit"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 404 and not file):
        return NoSuchRepository(name, hub)
    if isinstance(error, errors.EntryNotFoundError) or status == 404:
        return WeightsNotFound(f"{what}: {hub} names it, and then does not have it")
    if status in (401, 403):
        return WeightsNotFound(f"{what}: {hub} refuses it ({status}): a wrong or expired token, or none: {_LOGIN}")
    if isinstance(error, errors.HFValidationError):
        return WeightsNotFound(f"'{name}' is no repository's name: {str(error).splitlines()[0]}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"{what}: the disk became full: {_room(name)}; nothing of it is kept. {_MORE_ROOM}")
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return CorruptedDownload(f"{what}: {hub} sent another size than it announces, each time; try again")
    if isinstance(error, PermissionError):
        return DiskFull(f"{what}: {error}: this cache cannot be written; set HF_HOME to a folder that can")
    if _is_of_network(error) or status is not None:
        reason = str(error).strip().splitlines()
        kind = type(error).__name__ if status is None else f"status {status}"
        return HubUnreachable(f"{hub} did not answer ({kind}{f': {reason[0]}' if reason else ''})")
    return error


class NoSuchRepository(WeightsNotFound):
    """The hub has no repository of that name, or none that this account may see."""

    def __init__(self, name: str, hub: str, near: Collection[str] = ()) -> None:
        self.name, self.hub = name, hub
        like = f" Near it: {', '.join(near)}." if near else ""
        super().__init__(f"{name}: {hub} has no such repository.{like} If it is a private one, log in: {_LOGIN}")


def _is_of_network(error: BaseException) -> bool:
    """Whether an error is the HTTP client's: which of them huggingface_hub uses has changed twice."""
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(modules & {"httpx", "httpx2", "httpcore", "requests", "urllib3"}) or isinstance(
        error, (ConnectionError, TimeoutError)
    )


_MORE_ROOM = "Make room, or set HF_HOME to a folder on another disk"


def _free(name: str) -> int:
    """Bytes that are free where a repository is kept."""
    path = _storage(name)
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _room(name: str) -> str:
    return f"{_size(_free(name))} are free in {_cache()}"


def _check_room(name: str, total: int) -> None:
    """Raises DiskFull."""
    if _free(name) < total:
        raise DiskFull(f"{name}: needs {_size(total)}, but {_room(name)}. {_MORE_ROOM}")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


# --- progress ---------------------------------------------------------------------------------------------------------


class _Bar:
    """The bytes of all files of a repository, in kB, as a step that is told of."""

    def __init__(self, step: LongStep) -> None:
        self.step, self.done = step, 0

    def go_to(self, done: int) -> None:
        """So many bytes are there; fewer than before where a download is begun again."""
        self.done = done
        self.step.update(done // 1000)

    def counter(self, *_: Any, **__: Any) -> _Counter:
        """What huggingface_hub calls for each file, in tqdm's place."""
        return _Counter(self)


class _Counter:
    """As much of tqdm as huggingface_hub uses."""

    def __init__(self, bar: _Bar) -> None:
        self.bar = bar

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, count: float | None = 1) -> None:
        """So many bytes more, or fewer."""
        self.bar.go_to(self.bar.done + int(count or 0))

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """huggingface_hub over plain HTTP, in small pieces, and without lines of its own: what happens is told here."""
    from huggingface_hub import constants
    from huggingface_hub.utils import logging

    verbosity, xet = logging.get_verbosity(), getattr(constants, "HF_HUB_DISABLE_XET", False)
    chunk = constants.DOWNLOAD_CHUNK_SIZE
    variable = os.environ.get("HF_HUB_DISABLE_XET")
    logging.set_verbosity(logging.CRITICAL)
    constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE = True, CHUNK
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE = xet, chunk
        if variable is None:
            del os.environ["HF_HUB_DISABLE_XET"]
        else:
            os.environ["HF_HUB_DISABLE_XET"] = variable
