"""index.json: the aligner, the source folder and the kind of an index."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clipvisionalign.search.fingerprint import aligner_fingerprint
from clipvisionalign.search.storage import InvalidIndexError, Storage, as_storage

INDEX_FORMAT = 1
MANIFEST_FILE = "index.json"


@dataclass
class IndexManifest:
    """The content of index.json.

    Attributes:
        run: Run folder of the aligner that encoded the index.
        aligner: Fingerprint of its weights (`aligner_fingerprint`).
        folder: Path or URL of the images.
        width: D, the width of a vector.
        kind: "exact"; "HNSW" of a graph in files beside the tables; or LanceDB's "IVF_HNSW_SQ" or "IVF_PQ".
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


def read_manifest(index: str | Path | Storage) -> IndexManifest:
    """Read index.json.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        Its manifest.

    Raises:
        InvalidIndexError: There is no index.json, it cannot be read, or it has another format.
    """
    text = as_storage(index).read(MANIFEST_FILE)
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


def open_manifest(run: str | Path, folder: str, index: Storage, width: int) -> IndexManifest:
    """The manifest of an index that is about to be written; it is created where there is none yet.

    Args:
        run: The run folder that is to encode.
        folder: Path or URL of the images.
        index: The storage of the index.
        width: D, the width of the run's vectors.

    Returns:
        The manifest.

    Raises:
        InvalidIndexError: `index` belongs to another aligner or folder, or holds something else.
    """
    from clipvisionalign.models.io import resolve_model

    manifest = IndexManifest(resolve_model(run), aligner_fingerprint(run), folder, width)
    if index.read(MANIFEST_FILE) is not None:
        existing = read_manifest(index)
        if existing.aligner != manifest.aligner:
            hint = f"it was made by {existing.run}; search it with that run, or give another --out"
            raise InvalidIndexError(f"{index}: an index of another aligner: {hint}")
        if existing.folder != manifest.folder:
            raise InvalidIndexError(f"{index}: an index of {existing.folder}; give another --out")
        return existing
    if not index.is_empty():
        raise InvalidIndexError(f"{index}: is there already and no index; give another --out")
    write_manifest(index, manifest)
    return manifest
