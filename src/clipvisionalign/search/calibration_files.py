"""Calibrations in run folders and indexes, and what chance gives in an index."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.files import atomic_write
from clipvisionalign.search.calibration import CALIBRATION_FILE, Calibration, UncalibratedError
from clipvisionalign.search.manifest import IndexManifest
from clipvisionalign.search.null_queries import SHORT_LENGTHS, null_texts, short_null_texts
from clipvisionalign.search.storage import Storage, as_storage
from clipvisionalign.search.table_reader import LanceDBReader
from clipvisionalign.search.tables import vector_column

logger = logging.getLogger(__name__)

#: The file of an index that has what chance gives in it.
NULL_FILE = "chance.json"
_BEST_COSINES, _BEST_BY_WORDS = "best_cosines_of_meaningless_texts", "best_cosines_by_number_of_words"


def read_calibration(index: str | Path | Storage, aligner: str) -> Calibration | UncalibratedError | None:
    """The calibration of an index.

    Args:
        index: Path, URL or storage of the index.
        aligner: Fingerprint of its model.

    Returns:
        The calibration; None where there is none; an error where it cannot be read or is of another model, which is of
        no concern to a search without a promise.
    """
    storage = as_storage(index)
    text = storage.read(CALIBRATION_FILE)
    if text is None:
        return None
    location = f"{storage}/{CALIBRATION_FILE}"
    try:
        calibration = Calibration.from_json(text, location)
    except UncalibratedError as error:
        return error
    if calibration.aligner != aligner:
        return UncalibratedError(f"{location}: of another model than the index; calibrate again with --overwrite")
    return calibration


def calibration_time(index: str | Path | Storage) -> int:
    """When the calibration of an index was written, by which an open index notices another one.

    Args:
        index: Path, URL or storage of the index.

    Returns:
        The time of the file, in nanoseconds; 0 where there is none, and behind a URL.
    """
    storage = as_storage(index)
    try:
        return (storage.folder / CALIBRATION_FILE).stat().st_mtime_ns if storage.is_local else 0
    except OSError:
        return 0


def check_calibration_target(target: Path | Storage, overwrite: bool) -> None:
    """Check that a calibration can be written, before it is computed.

    Args:
        target: The file, or the storage of an index.
        overwrite: Whether one that is there is replaced.

    Raises:
        FileExistsError: There is one, and it is not to be replaced.
    """
    exists = target.exists() if isinstance(target, Path) else target.read(CALIBRATION_FILE) is not None
    if exists and not overwrite:
        location = target if isinstance(target, Path) else f"{target}/{CALIBRATION_FILE}"
        raise FileExistsError(f"{location}: there is a calibration already; --overwrite replaces it")


def write_calibration(target: Path | Storage, calibration: Calibration) -> str:
    """Write a calibration.

    Args:
        target: The file, or the storage of an index.
        calibration: The calibration.

    Returns:
        Where it was written.
    """
    if isinstance(target, Storage):
        target.write(CALIBRATION_FILE, calibration.to_json())
        return f"{target}/{CALIBRATION_FILE}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as aside:
        aside.write_text(calibration.to_json(), encoding="utf-8")
    return str(target)


def copy_calibration(run: str | Path, index: Storage, manifest: IndexManifest) -> None:
    """Copy the calibration of a run to an index that has none, so that a search needs no run for it.

    Args:
        run: The run folder.
        index: The storage of the index.
        manifest: Its manifest.
    """
    path = Path(run) / CALIBRATION_FILE
    if not path.is_file():
        return
    text, existing = path.read_text(encoding="utf-8"), index.read(CALIBRATION_FILE)
    if existing is not None:
        if existing != text:
            logger.info(f"note: {index} keeps its own calibration, which is not that of {path}")
        return
    try:
        calibration = Calibration.from_json(text, path)
    except UncalibratedError as error:
        logger.info(f"note: {error}")
        return
    if calibration.aligner != manifest.aligner:
        logger.info(f"note: {path} is of other weights and is not copied to the index; calibrate the run again")
        return
    index.write(CALIBRATION_FILE, text)


def write_null_cosines(index: Storage, tables: Sequence[Any], encode: Callable[[Sequence[str]], Any]) -> None:
    """Write the best cosines that texts which mean nothing have in an index, unless they are of this version of it.

    Args:
        index: The storage of the index.
        tables: Its table of images; or those of its shards.
        encode: Encodes M texts as vectors (M, D).
    """
    versions = [int(table.version) for table in tables]
    # That of one table is a number in files of before.
    version = versions[0] if len(versions) == 1 else versions
    existing = _read_nulls(index)
    if existing.get("table_version") == version and _BEST_BY_WORDS in existing:
        return
    groups = [null_texts(), *(short_null_texts(words) for words in SHORT_LENGTHS)]
    texts = np.asarray(encode([text for group in groups for text in group]), dtype=np.float32)
    best = np.full(len(texts), -np.inf, dtype=np.float32)
    # All texts in one pass over the vectors.
    for table in tables:
        for rows in LanceDBReader(table).batches(["vector"]):
            if rows.num_rows:
                best = np.maximum(best, (texts @ vector_column(rows).T).max(axis=1))
    parts = np.split(best, np.cumsum([len(group) for group in groups])[:-1])
    mixed, *short = [sorted(round(float(cosine), 6) for cosine in part if np.isfinite(cosine)) for part in parts]
    by_words = {str(words): cosines for words, cosines in zip(SHORT_LENGTHS, short, strict=True)}
    content = {_BEST_COSINES: mixed, _BEST_BY_WORDS: by_words, "table_version": version}
    index.write(NULL_FILE, json.dumps(content) + "\n")


def forget_null_cosines(index: Storage) -> None:
    """Take back what `write_null_cosines` wrote of a table that was removed: another one has its versions.

    Args:
        index: The storage of the index.
    """
    if _read_nulls(index):
        index.write(NULL_FILE, "{}\n")


def read_null_cosines(index: str | Path | Storage) -> list[float]:
    """Read what `write_null_cosines` wrote.

    Args:
        index: Path, URL or storage of the index.

    Returns:
        The cosines, ascending; none where there are none that can be read, as in indexes of before.
    """
    try:
        return [float(each) for each in _read_nulls(as_storage(index))[_BEST_COSINES]]
    except (KeyError, TypeError, ValueError):
        return []


def read_short_null_cosines(index: str | Path | Storage) -> dict[int, list[float]]:
    """Read what `write_null_cosines` wrote of short texts.

    Args:
        index: Path, URL or storage of the index.

    Returns:
        By number of words the cosines, ascending; empty where there are none that can be read, as in indexes of before.
    """
    try:
        by_words = _read_nulls(as_storage(index))[_BEST_BY_WORDS]
        return {int(words): [float(each) for each in cosines] for words, cosines in by_words.items() if cosines}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _read_nulls(index: Storage) -> dict[str, Any]:
    """The content of `NULL_FILE`; empty where there is none that can be read."""
    try:
        content = json.loads(index.read(NULL_FILE) or "null")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
