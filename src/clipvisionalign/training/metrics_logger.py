"""Records of a run in progress: metrics.jsonl always, TensorBoard and others through Accelerate's trackers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

#: The package that a tracker needs.
TRACKER_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def available_trackers(names: list[str], requested: bool) -> tuple[list[str], list[str]]:
    """The trackers that are installed, and a word for each that is not.

    requested: whether the user named them; then one that is missing raises ValueError.
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
    """metrics.jsonl of a run folder, one line each; figures go to the trackers too, with their step.

    accelerator: whose trackers these are, None for none. Only the main process writes.
    """

    def __init__(self, out: Path, accelerator: Any = None, is_main: bool = True) -> None:
        self.accelerator = accelerator
        self.file = (out / "metrics.jsonl").open("a") if is_main else None

    def write(self, step: int, **values: Any) -> None:
        """One line, now."""
        if self.file is None:
            return
        rounded = {name: round(v, 6) if isinstance(v, float) else v for name, v in values.items()}
        self.file.write(json.dumps({"step": step, **rounded}) + "\n")
        self.file.flush()
        if self.accelerator is not None:
            self.accelerator.log(flatten_metrics(values), step=step)

    def sync(self) -> int:
        """Bytes written, which are on the disk now: a checkpoint that refers to them is."""
        if self.file is None:
            return 0
        os.fsync(self.file.fileno())
        return self.file.tell()

    def close(self) -> None:
        """No more lines."""
        if self.file is not None:
            self.file.close()


def flatten_metrics(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of nested figures under one name each: a tracker has no nesting. A figure's own value stands for it."""
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
