"""Which weights a model has, without PyTorch where the model is a run folder.

The hash of a model's files is kept in the user's cache with their sizes and times, as git keeps those of its index:
files that are unchanged by these are not read again, which for 100 MB takes longer than a search.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from clipvisionalign.files import atomic_write, user_cache_folder
from clipvisionalign.models.run_files import CONFIG_FILE, weights_file
from clipvisionalign.models.run_names import resolve_run

logger = logging.getLogger(__name__)

#: Below the user's cache folder.
FINGERPRINT_FOLDER = "fingerprints"

#: Of a file: path, size, time of the last change of its content and of its entry, in nanoseconds, and its number.
_FileState = tuple[str, int, int, int, int]


def aligner_fingerprint(run: str | Path) -> str:
    """The hash of a model's weights.

    Args:
        run: A run folder, `starter`, or a pretrained model.

    Returns:
        32 hexadecimal digits, of BLAKE2b over the files of its weights, and of the way it looks at images.

    Raises:
        FileNotFoundError: The folder has no weights.
        WeightsNotFound: There is no such pretrained model here or on the hub.
    """
    run = resolve_run(run)
    of_weights = _weights_fingerprint(run)
    if not _looks_both_ways(run):
        return of_weights
    # The same weights give other vectors then.
    return hashlib.blake2b(f"{of_weights} mirrored".encode(), digest_size=16).hexdigest()


def _looks_both_ways(run: str | Path) -> bool:
    """Whether a run's image tower is `mirrored`."""
    path = Path(run) / CONFIG_FILE
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    if not re.search(r"mirrored\b(?!: false\b)", text):
        # Nearly always; a search that loads no YAML starts sooner.
        return False
    from clipvisionalign import plain_yaml

    settings = plain_yaml.safe_load(text)
    model = settings.get("model") if isinstance(settings, dict) else None
    image = model.get("image_tower") if isinstance(model, dict) else None
    return isinstance(image, dict) and image.get("mirrored") is True


def _weights_fingerprint(run: str | Path) -> str:
    """The hash of a model's files of weights."""
    key = str(Path(run).resolve()) if Path(run).exists() else str(run)
    name = hashlib.blake2b(os.fsencode(key), digest_size=16).hexdigest()
    record = user_cache_folder() / FINGERPRINT_FOLDER / f"{name}.json"
    if known := _read_record(record, key):
        return known
    files = _weight_files(run)
    before = _file_states(files)
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    fingerprint = digest.hexdigest()
    if before == _file_states(files):
        _write_record(record, {"run": key, "files": before, "fingerprint": fingerprint})
    return fingerprint


def _weight_files(run: str | Path) -> list[Path]:
    folder = Path(run)
    if (folder / CONFIG_FILE).is_file() and (file := weights_file(folder)) is not None:
        return [file]
    if folder.is_absolute() and not folder.exists():
        raise FileNotFoundError(f"{run}: no such folder")
    from clipvisionalign.models.io import model_files

    return model_files(run)


def _file_states(files: Sequence[Path]) -> list[_FileState]:
    states = []
    for path in files:
        stat = path.stat()
        states.append((str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return states


def _read_record(record: Path, key: str) -> str:
    """The fingerprint that was kept; "" where there is none, or a file has changed since."""
    try:
        kept = json.loads(record.read_text(encoding="utf-8"))
        unchanged = kept["run"] == key and kept["files"] == [
            list(state) for state in _file_states([Path(file[0]) for file in kept["files"]])
        ]
        return str(kept["fingerprint"]) if unchanged and kept["files"] else ""
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return ""


def _write_record(record: Path, content: dict[str, object]) -> None:
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(record, sync=False, unique_name=True) as aside:
            aside.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        logger.debug(f"{record}: not written: {error}")
