"""Records of a run in progress: metrics.jsonl always, TensorBoard and others through Accelerate's trackers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

#: The package that a tracker needs.
TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def available_trackers(names: list[str], requested: bool) -> tuple[list[str], list[str]]:
    """The trackers that are installed.

    Args:
        names: The trackers that are wanted.
        requested: Whether the user named them; else one that is missing is left out.

    Returns:
        Those that are installed, and a message for each that is not.

    Raises:
        ValueError: A tracker is unknown, or is missing though it was requested.
    """
    from importlib.util import find_spec

    usable, messages = [], []
    for name in names:
        if name not in TRACKER_PACKAGES:
            raise ValueError(f"--trackers {name}: there are {', '.join(TRACKER_PACKAGES)}")
        if find_spec(TRACKER_PACKAGES[name]) is not None:
            usable.append(name)
            continue
        message = f"{name} is not installed: pip install {TRACKER_PACKAGES[name]}"
        if requested:
            raise ValueError(f"--trackers {name}: {message}")
        messages.append(f"no {name} records: {message}")
    return usable, messages


class MetricsLogger:
    """Writes metrics.jsonl of a run folder, a line for each call, and passes figures on to trackers.

    Args:
        out: The run folder.
        accelerator: Accelerate's accelerator with the trackers; None for none.
        is_main: Whether this is the main process; others write nothing.
    """

    def __init__(self, out: Path, accelerator: Any = None, is_main: bool = True) -> None:
        self.accelerator = accelerator
        self.file = (out / "metrics.jsonl").open("a") if is_main else None

    def write(self, step: int, **values: Any) -> None:
        """Write a line at once.

        Args:
            step: Number of the step.
            **values: Figures by name, floats rounded to six digits.
        """
        if self.file is None:
            return
        rounded = {name: round(v, 6) if isinstance(v, float) else v for name, v in values.items()}
        self.file.write(json.dumps({"step": step, **rounded}) + "\n")
        self.file.flush()
        if self.accelerator is not None:
            self.accelerator.log(flatten_metrics(values), step=step)

    def sync(self) -> int:
        """Flush the file to the disk, so that a checkpoint may refer to it.

        Returns:
            Bytes written so far; 0 on other processes than the main one.
        """
        if self.file is None:
            return 0
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()


def flatten_metrics(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested figures, each under one name, as trackers take them.

    Args:
        values: Figures by name; one with an interval is its value.
        prefix: Put before each name.

    Returns:
        Numbers by name, without "epoch".

    >>> flatten_metrics({"dev": {"rsum": {"value": 300.0, "low": None}}, "epoch": 1})
    {'dev/rsum': 300.0}
    """
    flattened: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            if "value" in value:
                flattened[prefix + name] = float(value["value"])
            else:
                flattened |= flatten_metrics(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "epoch":
            flattened[prefix + name] = float(value)
    return flattened
