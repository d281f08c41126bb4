"""The sealed split of a study: each time that a model is measured on it is written down beside the study's seal.

A seal (`clipvisionalign.study.seal`) names a split by its content. Whoever opens a run of that study on that split,
by whatever command, adds a line to `looks.jsonl`; each line holds the hash of the one before, so that a line that is
removed from the middle, or changed, shows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.hashes import hash_content, hash_file, run_hash
from clipvisionalign.files import fsync_paths, run_lock
from clipvisionalign.json_io import read_json

logger = logging.getLogger(__name__)

#: In a study's folder: its seal, the looks at the sealed split, and the lock that is held while one is added.
SEAL_FILE, LOOKS_FILE, LOOKS_LOCK = "seal.json", "looks.jsonl", "looks.lock"
#: Who looks: the study itself, or a command that was given one of its runs.
BY_STUDY, BY_HAND = "study", "command"


@dataclass(frozen=True)
class Look:
    """A model that was measured on a sealed split.

    Attributes:
        at: When, in UTC, as ISO 8601.
        by: `BY_STUDY` or `BY_HAND`.
        run: Name of the run's folder.
        model: Hash of its model.
        after: SHA-256 of the line before; of the seal, for the first line.
    """

    at: str
    by: str
    run: str
    model: str
    after: str


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sealed_trial(run: str | Path) -> tuple[Path, str] | None:
    """The sealed study that a model belongs to, and its run there.

    Args:
        run: A run folder, or a folder below one (a stage, the model of an epoch), by whatever path.

    Returns:
        The study's folder and the name of the run's; None where it is of no study, or of one without a seal.
    """
    path = Path(run).resolve()
    for folder in (path, *path.parents):
        if folder.parent.name == "cells" and (folder.parent.parent / SEAL_FILE).is_file():
            return folder.parent.parent, folder.name
    return None


def read_seal(study: Path) -> dict[str, Any]:
    """The seal of a study.

    Args:
        study: Its folder.

    Returns:
        What seal.json holds.

    Raises:
        ValueError: It is no seal.
    """
    seal = read_json(study / SEAL_FILE, "a seal cannot be put back: the study has to be carried out again elsewhere")
    if not isinstance(seal, dict) or not {"at", "plan", "split", "data", "images"} <= seal.keys():
        raise ValueError(f"{study / SEAL_FILE}: no seal of a study")
    return seal


def read_looks(study: Path) -> list[Look]:
    """The looks at a study's sealed split.

    Args:
        study: Its folder.

    Returns:
        The looks in their order.

    Raises:
        ValueError: A line was changed or removed, or is no look.
    """
    path = study / LOOKS_FILE
    looks, before = [], _hash((study / SEAL_FILE).read_bytes())
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            entry = Look(**json.loads(line))
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number}: no look at a sealed split") from None
        if entry.after != before:
            raise ValueError(f"{path}, line {number}: the seal, or a line before it, was changed or removed")
        looks.append(entry)
        before = _hash(line)
    return looks


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, without a last one that has no end: its process was killed before it measured anything."""
    content = path.read_bytes() if path.is_file() else b""
    return content[: content.rfind(b"\n") + 1].splitlines()


def further_looks(looks: Sequence[Look]) -> list[Look]:
    """Looks after which figures may have been chosen: by hand, or of a run whose model was another one before.

    A study that measures the same model again, since it was interrupted, learns nothing by that.

    Args:
        looks: All looks in their order.

    Returns:
        Those that a study which opens its split once does not have.
    """
    models: dict[str, str] = {}
    further = []
    for entry in looks:
        if entry.by != BY_STUDY or models.get(entry.run, entry.model) != entry.model:
            further.append(entry)
        if entry.by == BY_STUDY:
            models[entry.run] = entry.model
    return further


def record_look(study: Path, run: str, by: str, model: str) -> int:
    """Write down that a run is measured on the sealed split, before it is.

    Args:
        study: The study's folder.
        run: Name of the run's folder.
        by: `BY_STUDY` or `BY_HAND`.
        model: Hash of its model, as `run_hash` gives it.

    Returns:
        How many further looks there are by now, this one included.

    Raises:
        ValueError: The looks cannot be read, or this one cannot be written.
    """
    path = study / LOOKS_FILE
    try:
        with run_lock(study / LOOKS_LOCK, "writes down a look at the sealed split", waits=True):
            looks, lines = read_looks(study), _whole_lines(path)
            before = lines[-1] if lines else (study / SEAL_FILE).read_bytes()
            entry = Look(now(), by, run, model, _hash(before))
            with path.open("ab") as file:
                file.truncate(sum(len(line) + 1 for line in lines))
                file.write(json.dumps(asdict(entry)).encode() + b"\n")
            fsync_paths(path)
    except OSError as error:
        reason = f"the look at its sealed split cannot be written down ({error.strerror or error})"
        raise ValueError(f"{study}: {reason}; make its folder writable") from None
    return len(further_looks([*looks, entry]))


def image_hashes(data: CaptionedImages) -> list[str]:
    """Hash each image by its bytes.

    Args:
        data: Images, such as those of a split.

    Returns:
        A hash for each, in their order; images whose file is missing have none.
    """
    images = (row.image for row in data.rows)
    return [
        hash_content(image) if isinstance(image, bytes) else hash_file(image)
        for image in images
        if isinstance(image, bytes) or image.is_file()
    ]


def record_look_by_hand(run: str | Path, measured: CaptionedImages) -> str:
    """Write down that a command measures a run on images that its study has sealed; nothing for other runs and images.

    Args:
        run: A run folder.
        measured: The images that it is measured on.

    Returns:
        A line for the user; "" where nothing was written down.

    Raises:
        ValueError: The look cannot be written down.
    """
    trial = sealed_trial(run)
    if trial is None:
        return ""
    study, name = trial
    seal = read_seal(study)
    if not set(seal["images"]) & set(image_hashes(measured)):
        return ""
    count = record_look(study, name, BY_HAND, run_hash(study / "cells" / name))
    return (
        f"{study}: the {seal['split']} split is sealed: this is further look {count} at it, written down in "
        f"{LOOKS_FILE}, and its report has it"
    )


def warn_of_look(run: str | Path, measured: CaptionedImages) -> None:
    """`record_look_by_hand`, whose line is logged.

    Args:
        run: A run folder.
        measured: The images that it is measured on.

    Raises:
        ValueError: The look cannot be written down.
    """
    if notice := record_look_by_hand(run, measured):
        logger.warning(notice)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
