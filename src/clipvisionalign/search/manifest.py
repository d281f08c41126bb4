"""index.json: the aligner, the source folder and the kind of an index; shards.json of an index in shards.

An index in shards is a folder of complete indexes. It has no index.json: whatever needs one index refuses it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from clipvisionalign.search.fingerprint import aligner_fingerprint
from clipvisionalign.search.storage import InvalidIndexError, Storage, as_storage

INDEX_FORMAT = SHARDS_FORMAT = 1
MANIFEST_FILE, SHARDS_FILE = "index.json", "shards.json"
#: Shards of an index at most: two digits in their names.
MAX_SHARDS = 100


@dataclass
class IndexManifest:
    """The content of index.json.

    Attributes:
        run: Run folder of the aligner that encoded the index.
        aligner: Fingerprint of its weights (`aligner_fingerprint`).
        folder: Path or URL of the images.
        width: D, the width of a vector.
        kind: "exact"; "IVF" of lists in files beside the tables; or LanceDB's "IVF_HNSW_SQ" or "IVF_PQ".
        recall: Share of the exact first ten that an approximate search finds, measured on a sample; 1 for "exact".
        settings: Of the approximate index, such as its number of partitions.
        format: Version of this file.
    """

    run: str
    aligner: str
    folder: str
    width: int
    kind: str = "exact"
    recall: float = 1.0
    settings: dict[str, int] = field(default_factory=dict)
    format: int = INDEX_FORMAT


@dataclass
class ShardsManifest:
    """The content of shards.json.

    Attributes:
        run: Run folder of the aligner that encoded the index.
        aligner: Fingerprint of its weights.
        folder: Path or URL of the images.
        width: D, the width of a vector.
        shards: Names of the shards, folders beside the file, in order.
        format: Version of this file.
    """

    run: str
    aligner: str
    folder: str
    width: int
    shards: list[str]
    format: int = SHARDS_FORMAT


def read_shards(index: str | Path | Storage) -> ShardsManifest | None:
    """Read shards.json.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        The manifest; None for an index that is not in shards, or for none.

    Raises:
        InvalidIndexError: The file cannot be read, or it has another format.
    """
    text = as_storage(index).read(SHARDS_FILE)
    if text is None:
        return None
    try:
        manifest = ShardsManifest(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise InvalidIndexError(f"{index}/{SHARDS_FILE}: cannot be read: {error}") from None
    if manifest.format != SHARDS_FORMAT:
        raise InvalidIndexError(
            f"{index}/{SHARDS_FILE}: of another version (format {manifest.format}, not {SHARDS_FORMAT})"
        )
    return manifest


def has_index(index: str | Path | Storage) -> bool:
    """Whether there is an index, in shards or not.

    Args:
        index: Path, URL or storage of what may be one.

    Returns:
        Whether it has the file of one.
    """
    storage = as_storage(index)
    return storage.read(MANIFEST_FILE) is not None or storage.read(SHARDS_FILE) is not None


def shard_storage(index: str | Path | Storage, name: str) -> Storage:
    """The storage of a shard.

    Args:
        index: Path, URL or storage of the index in shards.
        name: Of the shard; "" for the index itself.

    Returns:
        The storage.
    """
    return Storage(f"{as_storage(index).location}/{name}") if name else as_storage(index)


def read_whole_manifest(index: str | Path | Storage) -> IndexManifest:
    """What an index is as a whole: the manifest of one index, or of all shards together.

    Args:
        index: Path, URL or storage of an index, in shards or not.

    Returns:
        The manifest; of shards the kind is "exact" if all of them are, and the recall is the least.

    Raises:
        InvalidIndexError: There is no index, a shard is missing or of another aligner, or a manifest cannot be read.
    """
    shards = read_shards(index)
    if shards is None:
        return read_manifest(index)
    manifests = [_read_shard(index, shards, name) for name in shards.shards]
    kind = next((each.kind for each in manifests if each.kind != "exact"), "exact")
    recall = min(each.recall for each in manifests)
    return IndexManifest(shards.run, shards.aligner, shards.folder, shards.width, kind, recall)


def _read_shard(index: str | Path | Storage, shards: ShardsManifest, name: str) -> IndexManifest:
    storage = shard_storage(index, name)
    if storage.read(MANIFEST_FILE) is None:
        raise InvalidIndexError(
            f"{index}: its {name} is missing: the command that made the index encodes the images of that shard again"
        )
    manifest = read_manifest(storage)
    if manifest.aligner != shards.aligner:
        raise InvalidIndexError(f"{index}: its {name} is an index of another aligner: remove it and index again")
    return manifest


def read_manifest(index: str | Path | Storage) -> IndexManifest:
    """Read index.json.

    Args:
        index: Path, URL or storage of an index that is not in shards.

    Returns:
        Its manifest.

    Raises:
        InvalidIndexError: There is no index.json, it cannot be read, or it has another format.
    """
    text = as_storage(index).read(MANIFEST_FILE)
    if text is None and (shards := read_shards(index)) is not None:
        raise InvalidIndexError(
            f"{index}: an index in {len(shards.shards)} shards, which search, serve and calibrate take; this needs a "
            f"single one: 'clipvisionalign index {shards.run} {shards.folder} --out OTHER' makes it"
        )
    if text is None:
        raise InvalidIndexError(f"{index}: no index there; 'clipvisionalign index FOLDER --out {index}' makes one")
    try:
        manifest = IndexManifest(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise InvalidIndexError(f"{index}/{MANIFEST_FILE}: cannot be read: {error}") from None
    if manifest.format != INDEX_FORMAT:
        raise InvalidIndexError(
            f"{index}/{MANIFEST_FILE}: of another version (format {manifest.format}, not {INDEX_FORMAT})"
        )
    return manifest


def write_manifest(index: Storage, manifest: IndexManifest) -> None:
    """Write index.json.

    Args:
        index: The storage of the index.
        manifest: The content.
    """
    index.write(MANIFEST_FILE, json.dumps(asdict(manifest), indent=2) + "\n")


def check_shards(shards: int | None) -> None:
    """Check a number of shards.

    Args:
        shards: The number; None for one that is not given.

    Raises:
        ValueError: It is out of range.
    """
    if shards is not None and not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"--shards {shards}: an index has 1 to {MAX_SHARDS} shards")


def open_manifests(
    run: str | Path, folder: str, index: Storage, width: int, shards: int | None = None
) -> tuple[list[str], list[IndexManifest]]:
    """The manifests of an index that is about to be written; they are created where there are none yet.

    Args:
        run: The run folder that is to encode.
        folder: Path or URL of the images.
        index: The storage of the index.
        width: D, the width of the run's vectors.
        shards: Number of shards; None for those that the index has, and none of a new one.

    Returns:
        The names of the shards, and for each its manifest; the name "" and one manifest of an index that has none.

    Raises:
        InvalidIndexError: `index` belongs to another aligner or folder, has another number of shards, is itself a
            shard, or holds something else.
    """
    from clipvisionalign.models.io import resolve_model

    _check_is_no_shard(index)
    manifest = IndexManifest(resolve_model(run), aligner_fingerprint(run), folder, width)
    if index.read(MANIFEST_FILE) is not None:
        if shards:
            raise InvalidIndexError(f"{index}: an index without shards; leave --shards out, or give another --out")
        return [""], [_checked(index, read_manifest(index), manifest)]
    whole = read_shards(index)
    if whole is None and not index.is_empty():
        raise InvalidIndexError(f"{index}: is there already and no index; give another --out")
    if whole is None and shards is None:
        write_manifest(index, manifest)
        return [""], [manifest]
    if whole is None and shards is not None:
        names = [f"shard-{number:02}" for number in range(shards)]
        whole = ShardsManifest(manifest.run, manifest.aligner, manifest.folder, manifest.width, names)
        _write_shards(index, whole)
    assert whole is not None
    if shards is not None and shards != len(whole.shards):
        raise InvalidIndexError(
            f"{index}: an index in {len(whole.shards)} shards, not {shards}; leave --shards out, or give another --out"
        )
    _checked(index, whole, manifest)
    return whole.shards, [_open_shard(shard_storage(index, name), manifest) for name in whole.shards]


def _open_shard(storage: Storage, manifest: IndexManifest) -> IndexManifest:
    if storage.read(MANIFEST_FILE) is not None:
        return _checked(storage, read_manifest(storage), manifest)
    created = IndexManifest(manifest.run, manifest.aligner, manifest.folder, manifest.width)
    write_manifest(storage, created)
    return created


def _check_is_no_shard(index: Storage) -> None:
    parent, _, name = index.location.rpartition("/")
    if not parent or parent.endswith(":/"):
        return
    whole = read_shards(parent)
    if whole is not None and name in whole.shards:
        raise InvalidIndexError(f"{index}: a shard of {parent}, which is updated whole: give --out {parent}")


AnyManifest = TypeVar("AnyManifest", IndexManifest, ShardsManifest)


def _checked(index: Storage, existing: AnyManifest, manifest: IndexManifest) -> AnyManifest:
    """The manifest of an index, with the folder that its images were moved to.

    Raises:
        InvalidIndexError: It is an index of another aligner, or of another folder that is still there.
    """
    if existing.aligner != manifest.aligner:
        hint = f"it was made by {existing.run}; search it with that run, or give another --out"
        raise InvalidIndexError(f"{index}: an index of another aligner: {hint}")
    if existing.folder == manifest.folder:
        return existing
    if not (is_gone(existing.folder) or _is_same_folder(existing.folder, manifest.folder)):
        is_below = f"{existing.folder}/".startswith(f"{manifest.folder.rstrip('/')}/")
        hint = "that folder, its data set (--captions, or a file), or another --out" if is_below else "another --out"
        raise InvalidIndexError(f"{index}: an index of {existing.folder}; give {hint}")
    return replace(existing, folder=manifest.folder)


def is_gone(folder: str) -> bool:
    """Whether a folder of images is no longer where it was.

    Args:
        folder: Its path or URL.

    Returns:
        Whether it is a path of this machine where nothing is; of a URL, and of what may not be examined or does not
        answer, it is not known.
    """
    if "://" in folder:
        return False
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _is_same_folder(one: str, other: str) -> bool:
    """Whether two paths lead to one folder, such as a link that was left where it was."""
    try:
        return "://" not in one + other and os.path.samefile(one, other)
    except OSError:
        return False


def recorded_folders(index: Storage, names: Sequence[str]) -> set[str]:
    """Where an index has its images.

    Args:
        index: The storage of the index.
        names: The names of its shards; "" for an index that has none.

    Returns:
        Paths or URLs: one, or two after an interruption between shards.
    """
    storages = [shard_storage(index, name) if name else index for name in names]
    shards = read_shards(index)
    return {read_manifest(storage).folder for storage in storages} | ({shards.folder} if shards else set())


def recorded_folder(index: Storage) -> str:
    """Where the images of an index as a whole are.

    Args:
        index: The storage of what may be an index.

    Returns:
        Path or URL; "" where there is no index.

    Raises:
        InvalidIndexError: Its manifest cannot be read.
    """
    if shards := read_shards(index):
        return shards.folder
    return read_manifest(index).folder if index.read(MANIFEST_FILE) is not None else ""


def record_folder(index: Storage, names: Sequence[str], folder: str) -> None:
    """Record where the images of an index are.

    Args:
        index: The storage of the index.
        names: The names of its shards; "" for an index that has none.
        folder: Path or URL of the images.
    """
    for name in names:
        storage = shard_storage(index, name) if name else index
        stored = read_manifest(storage)
        if stored.folder != folder:
            write_manifest(storage, replace(stored, folder=folder))
    shards = read_shards(index)
    if shards is not None and shards.folder != folder:
        _write_shards(index, replace(shards, folder=folder))


def _write_shards(index: Storage, shards: ShardsManifest) -> None:
    index.write(SHARDS_FILE, json.dumps(asdict(shards), indent=2) + "\n")
