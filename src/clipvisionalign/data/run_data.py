"""A run's data set, read as it was when the run was trained on it: the same layout, splits and positives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, CaptionMode, DataError, validate_caption_mode
from clipvisionalign.data.formats import LAYOUTS, STREAM, detect_layout, is_stream, read_captioned_images
from clipvisionalign.data.hashes import changed_keys, dataset_hashes
from clipvisionalign.data.joined_captions import with_captions
from clipvisionalign.data.splits import SPLIT_RULE
from clipvisionalign.data.streams.in_memory import read_stream_split
from clipvisionalign.data.training_images import other_than_trained_on


def data_record(run: str | Path) -> dict[str, Any]:
    """What the data.json of a run folder holds.

    Args:
        run: The run folder.

    Returns:
        The record; empty where there is none.

    Raises:
        ValueError: The file is not JSON.
    """
    path = Path(run) / "data.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record if isinstance(record, dict) else {}


def is_unfinished(run: str | Path) -> bool:
    """Whether a folder is that of a training run that has not come to its end.

    Args:
        run: The run folder; a model that was saved alone is not unfinished.

    Returns:
        Whether it has settings of a training, and no results.json.
    """
    folder = Path(run)
    return not (folder / "results.json").is_file() and "data" in run_settings(folder)


def unfinished_note(run: str | Path) -> str | None:
    """What figures of an unfinished run have to be read with.

    Args:
        run: The run folder.

    Returns:
        A sentence; None for a finished run.
    """
    if not is_unfinished(run):
        return None
    pairs = (run_settings(run).get("model") or {}).get("design") in ("late", "cross")
    weights = ", with weights of its pairs' parts that are not chosen yet" if pairs else ""
    return (
        f"{run} is not finished (it has no results.json): this is its best epoch so far{weights}; to finish it: "
        f"clipvisionalign train --resume {run}"
    )


def split_rule_of(run: str | Path) -> int:
    """The rule by which the images of a run's data set were split, where that has no splits: see `data/splits.py`.

    Args:
        run: The run folder.

    Returns:
        Number of the rule; 1 where the run does not record it, the present one where it records nothing.
    """
    record = data_record(run)
    return int(record.get("split_rule", 1)) if record else SPLIT_RULE


def texts_of_run(run: str | Path) -> CaptionMode:
    """What stood for an image's captions when a run was trained and measured.

    Args:
        run: The run folder.

    Returns:
        "each" or "joined"; "each" where the run does not record it.
    """
    return validate_caption_mode(str(data_record(run).get("texts", "each")))


@dataclass(frozen=True)
class ReadOptions:
    """How a data set is read for a run.

    Attributes:
        layout: The dataset layout, or "auto".
        group: The column whose values are kept within one split; "" for none.
        split_rule: Number of the rule that assigns images without a split.
    """

    layout: str
    group: str
    split_rule: int


def read_options_of_run(run: str | Path, source: str | Path, layout: str = "auto", group: str = "") -> ReadOptions:
    """How a run read a data set, unless it is told otherwise.

    The run's own data set, or the one of its dev split, is read as it was; any other in the run's layout, where that
    matches, by the run's rule.

    Args:
        run: The run folder.
        source: The data set.
        layout: A layout that takes precedence; "auto" for the run's.
        group: A column that takes precedence; "" for the run's.

    Returns:
        The options.
    """
    record = data_record(run)
    recorded, rule = record.get("layout", ""), split_rule_of(run)
    is_own, is_dev = is_data_of_run(run, source), _same_path(str(source), dev_source(run))
    if layout == "auto" and is_dev and not is_own:
        # One setting for both; the layout of a stream is not that of another data set.
        setting = str(run_settings(run).get("layout", "auto"))
        layout = "auto" if setting == STREAM or setting not in LAYOUTS else setting
    elif layout == "auto" and recorded in LAYOUTS and (is_own or _has_layout(recorded, Path(source))):
        layout = recorded
    # A stream has no columns: its run's column is one of the data set that its dev split is of.
    is_grouped = (is_own and layout in ("auto", recorded)) or (is_dev and recorded == STREAM)
    column = record.get("group", "")
    if column and not group and not is_own and not is_dev and layout == recorded:
        is_grouped = _has_column(Path(source), layout, column)
    return ReadOptions(layout, group or (column if is_grouped else ""), rule)


def _has_column(source: Path, layout: str, column: str) -> bool:
    """Whether a data set elsewhere, such as the run's own that was moved, can be grouped as the run's was."""
    try:
        read_captioned_images(source, layout, column)
    except DataError:
        return False
    return True


def _has_layout(layout: str, path: Path) -> bool:
    """Whether a data set elsewhere, such as the run's own that was moved, can be read in the run's layout."""
    try:
        return layout != STREAM and path.exists() and LAYOUTS[layout].matches(path)
    except (OSError, DataError):
        return False


def read_data_of_run(
    run: str | Path, source: str | Path = "", layout: str = "auto", identity: str | None = None, split: str = "",
    captions: str | None = None,
) -> CaptionedImages:  # fmt: skip
    """The data set that a run was trained on, or another one, read as `read_options_of_run` decides.

    Args:
        run: The run folder.
        source: Another data set; "" for the run's own, of "dev" from where the run had it.
        layout: A layout that takes precedence; "auto" for the run's.
        identity: Which captions belong to which images; None for the run's rule.
        split: Of a stream the split to read; "" for all. Other data sets are read whole.
        captions: "each" or "joined"; None for what the run was trained with.

    Returns:
        The data set.

    Raises:
        ValueError: The run does not record what it was trained on, and no `source` is given; or `captions` are neither,
            or cannot be joined by this `identity`.
        DataError: The data set cannot be read.
    """
    record = data_record(run)
    location = str(source or (dev_source(run) if split == "dev" else "") or record.get("source", ""))
    if not location:
        raise ValueError(f"{run}: no record of the data that it was trained on; give --data")
    options = read_options_of_run(run, location, layout)
    if split and is_stream(location, options.layout):
        data = read_stream_split(location, split)
    else:
        data = read_captioned_images(location, options.layout, options.group, options.split_rule)
    data = data.with_identity(record.get("identity", "auto") if identity is None else identity)
    return with_captions(data, texts_of_run(run) if captions is None else validate_caption_mode(captions))


def is_data_of_run(run: str | Path, source: str | Path) -> bool:
    """Whether a data set is the one that a run was trained on, by its path.

    Args:
        run: The run folder.
        source: The data set.

    Returns:
        Whether both paths lead to one place.
    """
    return _same_path(str(source), str(data_record(run).get("source", "")))


def holds_data_of_run(run: str | Path, data: CaptionedImages, split: str) -> bool:
    """Whether a data set is the one that a run was trained on, by its path or by what it holds.

    Args:
        run: The run folder.
        data: The data set as it was read.
        split: The split that is measured.

    Returns:
        Whether it is read from where the run had it; else whether its captions and images are those that the run
        recorded: of that split, or of any where the run has no record of that one.
    """
    if is_data_of_run(run, data.source) or (split == "dev" and _same_path(str(data.source), dev_source(run))):
        return True
    record = data_record(run)
    recorded = {name: hashes for name, hashes in record.get("as_read", {}).items() if data.split_sizes().get(name)}
    if split in recorded:
        recorded = {split: recorded[split]}
    for name, hashes in recorded.items():
        part = with_captions(data, "each").with_identity(record.get("identity", "auto")).split(name)
        if changed_keys(hashes, dataset_hashes(part, name != "train")):
            return False
    return bool(recorded)


def differences_from_run(run: str | Path, data: CaptionedImages, split: str = "") -> list[str]:
    """In what a data set differs from what a run has recorded of it.

    Args:
        run: The run folder.
        data: The data set as it was read.
        split: The split that is measured, whose content is compared; "" compares the layout alone.

    Returns:
        A sentence for each difference; none where the run has no record.
    """
    record = data_record(run)
    if not record:
        return []
    source, run_source = str(data.source), str((split == "dev" and dev_source(run)) or record.get("source", ""))
    layout, is_run_source = record.get("layout"), _same_path(source, run_source)
    differences = []
    if is_data_of_run(run, source) and layout and data.layout != layout:
        differences.append(f"{source} is read as '{data.layout}'; the run was trained on it as '{layout}'")
    if not split:
        return differences
    if not is_run_source and data.layout == layout and data.layout != (detected := recognised(source)):
        differences.append(
            f"{source} is read as '{layout}', as the run's data was; by itself it is taken for '{detected}'"
        )
    identity = record.get("identity", "auto")
    if data.identity != identity:
        differences.append(f"captions belong to images by '{data.identity}'; in the run's training by '{identity}'")
    texts = texts_of_run(run)
    if data.caption_mode != texts:
        forms = {"each": "each caption as it is", "joined": "captions joined to long texts"}
        differences.append(f"measured with {forms[data.caption_mode]}; the run was trained with {forms[texts]}")
    recorded = record.get("as_read", {}).get(split)
    differing: list[str] = []
    if recorded and any(row.split == split for row in data.rows):
        part = with_captions(data, "each").with_identity(identity).split(split)
        differing = changed_keys(recorded, dataset_hashes(part, split != "train"))
        other = other_than_trained_on(Path(run), part.rows) if split == "train" and "images" not in differing else ""
        differing += [other] if other else []
    detail = f": {split} has other {', '.join(differing)}" if differing else ""
    if differing and is_run_source:
        differences.append(f"{source} is no longer what it was in training{detail}")
    elif not is_run_source and (differing or not recorded):
        differences.append(f"{source} is not the run's own data set, {run_source}{detail}")
    return differences


def recognised(source: str) -> str:
    """The layout that a data set is recognised as.

    Args:
        source: The data set.

    Returns:
        Its name; "" where there is none.
    """
    try:
        return detect_layout(source).name
    except DataError:
        return ""


def dev_source(run: str | Path) -> str:
    """Where a run has its dev split from, if it is not the data set that it was trained on (`--dev_data`).

    Args:
        run: The run folder.

    Returns:
        The path; "" for none.
    """
    record = data_record(run)
    if "dev_source" in record:
        return str(record["dev_source"])
    # A run from before that was recorded.
    setting = run_settings(run).get("dev_data") or ""
    return str(working_directory_of(run) / setting) if setting else ""


def run_settings(run: str | Path) -> dict[str, Any]:
    """The settings of a run, as its config.yaml has them.

    Args:
        run: The run folder.

    Returns:
        Names and values; empty where there is no such file.
    """
    from clipvisionalign.plain_yaml import safe_load

    path = Path(run) / "config.yaml"
    settings = safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def working_directory_of(run: str | Path) -> Path:
    """The directory in which a run was started, to which its relative paths refer.

    Args:
        run: The run folder.

    Returns:
        The directory; "." where it is not recorded.
    """
    path = Path(run) / "environment.json"
    return Path(json.loads(path.read_text(encoding="utf-8")).get("directory", ".") if path.is_file() else ".")


def run_chain(run: str | Path) -> Iterator[Path]:
    """A run, the run that it started from (`--init`), the one before that, and so on.

    Args:
        run: The run folder.

    Yields:
        The folders that are there, each once.
    """
    current, visited = Path(run), set[Path]()
    while current.is_dir() and current.resolve() not in visited:
        visited.add(current.resolve())
        yield current
        init = run_settings(current).get("init")
        if not init:
            return
        current = working_directory_of(current) / init


def _same_path(one: str, other: str) -> bool:
    return bool(one and other) and Path(one).resolve() == Path(other).resolve()
