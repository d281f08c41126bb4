"""Whether the data of a run is still what it was trained on, or begun with."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.formats import is_stream, read_captioned_images
from clipvisionalign.data.hashes import changed_keys
from clipvisionalign.data.run_data import split_rule_of
from clipvisionalign.data.training_images import other_than_trained_on
from clipvisionalign.log import Log, deprecated_say
from clipvisionalign.training.config import DatasetConfig
from clipvisionalign.training.data import hashes_as_read, read_dev_data, resolve_layout

logger = logging.getLogger(__name__)


def check_data_unchanged(
    run: Path, config: DatasetConfig, say: Log | None = None, splits: Sequence[str] = ("train", "dev")
) -> None:
    """Check that the data of a finished run is still what it was trained on.

    A data set that is not there, a stream, and a run from before this was recorded cannot be compared: that is logged.

    Args:
        run: The run folder.
        config: How the data is read.
        say: Deprecated: takes the lines that are logged otherwise.
        splits: The splits that are compared.

    Raises:
        DataError: It is not; the message names what differs.
    """
    with deprecated_say(say):
        _check_data_unchanged(run, config, splits)


def _check_data_unchanged(run: Path, config: DatasetConfig, splits: Sequence[str]) -> None:
    data_file = run / "data.json"
    recorded = json.loads(data_file.read_text()).get("as_read", {}) if data_file.is_file() else {}
    if not recorded:
        stream = "a stream" if is_stream(config.data, config.layout) else "from before that was recorded"
        logger.info(f"{run}: {stream}: whether its data is still what it was trained on was not compared")
        return
    try:
        rule = split_rule_of(run)
        layout = resolve_layout(run, config)
        data = read_captioned_images(config.data, layout, config.group, rule).with_identity(config.identity)
        current = hashes_as_read(data, read_dev_data(config, rule) if config.dev_data else data)
    except (OSError, DataError) as error:
        logger.info(f"{run}: its data was not compared with what it was trained on: {error}")
        return
    for split in splits:
        differing = changed_keys(recorded[split], current[split])
        if split == "train" and not differing:
            # Of an equal size another image may be: the run has kept what the bytes were.
            other = other_than_trained_on(run, data.split(split).rows, shown=True)
            differing = [other] if other else []
        if differing:
            raise DataError(
                f"{run}: finished, but {config.data} is no longer the data that it was trained on: {split} has other "
                f"{', '.join(differing)} now; its figures are of the former data. Put the data back, or train "
                f"again: give another --out, or remove {run}"
            )


def check_same_data(
    state: dict[str, Any], contents: dict[str, dict[str, str]], config: DatasetConfig, out: Path
) -> None:
    """Check that a run is resumed with the data that it was begun with.

    Args:
        state: The checkpoint.
        contents: Of both splits, see `TrainingData.contents`.
        config: How the data is read.
        out: The run folder.

    Raises:
        DataError: It is not; the message names what differs.
    """
    if "opened" not in state:
        raise DataError(f"{out}: its checkpoint is of an earlier version, with another order of images: train again")
    for split, current in contents.items():
        differing = changed_keys(state["opened"].get(split), current)
        if differing:
            source = config.dev_data or config.data if split == "dev" else config.data
            raise DataError(
                f"{source}: not the {split} data that {out} was begun with: {', '.join(differing)} differ; "
                "put it back, "
                f"or train again with another --out"
            )
