"""What published dual encoders were trained on, as far as their publishers tell it.

The table is `known_checkpoints.json`, a row for checkpoints of one training set, each with its sources. A figure on
images that a model was trained on is no zero-shot figure, so that it has to be read with what is known of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from clipvisionalign.json_io import read_json
from clipvisionalign.models.hub import split_revision
from clipvisionalign.models.run_files import CONFIG_FILE, PRETRAINED_FOLDER

#: Whether a published set of captioned images is part of a training set: "not inside" only where the publisher states
#: so of all of its splits.
Membership: TypeAlias = Literal["inside", "not inside", "unknown"]

#: Keys of the table, and what the sets are called.
DATA_SETS = {"flickr8k": "Flickr8k", "flickr30k": "Flickr30k", "coco": "COCO captions"}

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
#: A repository's folder in the hub's local cache.
_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True)
class KnownCheckpoint:
    """A row of the table.

    Attributes:
        names: hub names of the checkpoints, with * for any letters; case-insensitive.
        trained_on: the training set.
        flickr8k: whether Flickr8k is part of it.
        flickr30k: whether Flickr30k is.
        coco: whether the images of COCO captions are.
        detail: what else the publisher states of these; "" for nothing.
        sources: papers and model cards.
    """

    names: tuple[str, ...]
    trained_on: str
    flickr8k: Membership
    flickr30k: Membership
    coco: Membership
    detail: str
    sources: tuple[str, ...]

    def matches(self, name: str) -> bool:
        """Whether a hub name is one of these.

        Args:
            name: The name, without a revision; in any case of letters.

        Returns:
            Whether it fits one of `names`.
        """
        return any(fnmatchcase(name.lower(), pattern.lower()) for pattern in self.names)


@dataclass(frozen=True)
class Pretraining:
    """What a model started from, and what is known of that.

    Attributes:
        model: its hub name, or the name of its folder where none is recorded.
        checkpoint: its row of the table; None for one that is not there.
        is_derived: whether the model is only recorded to be made from it: it may have been trained on more since then.
    """

    model: str
    checkpoint: KnownCheckpoint | None
    is_derived: bool = False

    def membership(self, data_set: str) -> Membership:
        """Whether a published set is part of the training set.

        Args:
            data_set: A key of `DATA_SETS`.

        Returns:
            What is stated; "unknown" also for "not inside" of a model that is only made from this one.
        """
        stated: Membership = "unknown" if self.checkpoint is None else getattr(self.checkpoint, data_set)
        return stated if stated == "inside" or not self.is_derived else "unknown"

    def note(self) -> str:
        """What is known of the training set, in one sentence.

        Returns:
            The sentence, without a full stop.
        """
        groups: dict[str, list[str]] = {}
        for data_set, label in DATA_SETS.items():
            groups.setdefault(self.membership(data_set), []).append(label)
        sets = "; ".join(f"{', '.join(labels)}: {status}" for status, labels in groups.items())
        if self.checkpoint is None:
            return f"what {self.model} was pretrained on is not known; {sets}"
        origin = f"made from {self.model}, which was" if self.is_derived else self.model
        detail = f" ({self.checkpoint.detail})" if self.checkpoint.detail else ""
        source = self.checkpoint.sources[0]
        return f"{origin} pretrained on {self.checkpoint.trained_on}; in that data: {sets}{detail}; source: {source}"

    def to_dict(self) -> dict[str, Any]:
        """As reports have it.

        Returns:
            The model, whether it is known, its training set and sources where it is, each set of `DATA_SETS` with its
            membership, and the note.
        """
        record: dict[str, Any] = {"model": self.model, "known": self.checkpoint is not None}
        if self.checkpoint is not None:
            row = asdict(self.checkpoint)
            record |= {"trained_on": row["trained_on"], "detail": row["detail"], "sources": list(row["sources"])}
        return {**record, **{data_set: self.membership(data_set) for data_set in DATA_SETS}, "note": self.note()}


@cache
def known_checkpoints() -> tuple[KnownCheckpoint, ...]:
    """The table of known checkpoints.

    Returns:
        Its rows, in order: the first that matches a name holds.

    Raises:
        ValueError: A row has other keys or values than `KnownCheckpoint` has.
    """
    text = files("clipvisionalign.models.pretrained").joinpath("known_checkpoints.json").read_text(encoding="utf-8")
    return tuple(_read_row(row) for row in json.loads(text))


def _read_row(row: dict[str, Any]) -> KnownCheckpoint:
    try:
        known = KnownCheckpoint(**{**row, "names": tuple(row["names"]), "sources": tuple(row["sources"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"known_checkpoints.json: {row.get('names')}: {error}") from None
    statuses = {getattr(known, data_set) for data_set in DATA_SETS}
    if unknown := statuses - set(get_args(Membership)):
        raise ValueError(f"known_checkpoints.json: {row['names']}: {unknown} is none of {get_args(Membership)}")
    if not known.names or not known.sources:
        raise ValueError(f"known_checkpoints.json: {row['names']}: a row has names and sources")
    return known


def find_checkpoint(name: str) -> KnownCheckpoint | None:
    """The row of a hub name.

    Args:
        name: The name, also with `hf-hub:` before it and @REVISION after it.

    Returns:
        Its row; None for one that is not known.

    Raises:
        ValueError: A row of the table has other keys or values than `KnownCheckpoint` has.

    >>> find_checkpoint("openai/clip-vit-base-patch32").trained_on
    'WIT, 400 million pairs of images and texts from the web, which are not published'
    >>> find_checkpoint("someone/clip-of-cats") is None
    True
    """
    plain = split_revision(name.removeprefix("hf-hub:"), "")[0]
    return next((row for row in known_checkpoints() if row.matches(plain)), None)


def pretraining_of(model: str | Path) -> Pretraining | None:
    """What a model started from.

    Args:
        model: A pretrained dual encoder by folder or hub name, or the folder of a run.

    Returns:
        The model that it is or started from, with its row of the table; None for a run that started from no dual
        encoder.

    Raises:
        ValueError: Its config.json cannot be parsed.
    """
    folder = Path(model)
    name = str(model)
    if (folder / CONFIG_FILE).is_file():
        name = _pretrained_setting(folder)
        if not name:
            return None
        recorded = _recorded_name(folder / PRETRAINED_FOLDER)
    else:
        recorded = _recorded_name(folder)
    if hub_name := _as_hub_name(name):
        return Pretraining(hub_name, find_checkpoint(hub_name))
    if recorded:
        return Pretraining(recorded, find_checkpoint(recorded), is_derived=True)
    # Its path is of this machine.
    return Pretraining(Path(name).resolve().name, None)


def base_checkpoint(model: str | Path) -> str:
    """The hub name of the published model that a model started from, or is.

    Args:
        model: A pretrained dual encoder by folder or hub name, or the folder of a run.

    Returns:
        The hub name; "" where none is recorded.

    Raises:
        ValueError: Its config.json cannot be parsed.
    """
    pretraining = pretraining_of(model)
    return pretraining.model if pretraining is not None and _HUB_NAME.fullmatch(pretraining.model) else ""


def _pretrained_setting(run: Path) -> str:
    """`model.pretrained` of a run's settings; "" for a run without."""
    import yaml

    settings = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    model = settings.get("model") if isinstance(settings, dict) else None
    return str(model.get("pretrained") or "") if isinstance(model, dict) else ""


def _as_hub_name(name: str) -> str:
    """The hub name that a name is, or whose files in the hub's local cache a folder is; "" for neither."""
    if cached := _CACHE_FOLDER.search(Path(name).as_posix()):
        return f"{cached[1]}/{cached[2]}"
    plain = split_revision(name.removeprefix("hf-hub:"), "")[0]
    # A relative path may have the same form: whoever gives one has it on this machine.
    return plain if _HUB_NAME.fullmatch(plain) and not Path(name).exists() else ""


def _recorded_name(folder: Path) -> str:
    """The hub name that transformers, or an export of ours, has recorded in a folder's config.json; "" for none."""
    path = folder / "config.json"
    settings = read_json(path) if path.is_file() else {}
    name = str(settings.get("_name_or_path") or "") if isinstance(settings, dict) else ""
    return name if _HUB_NAME.fullmatch(name) else ""
