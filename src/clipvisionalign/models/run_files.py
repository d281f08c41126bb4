"""The files of a run folder that hold an aligner."""

from __future__ import annotations

from pathlib import Path

WEIGHTS_FILE = "model.safetensors"

#: In the place of whole weights: what differs from the towers' own (`models/adapters.py`).
ADAPTERS_FILE = "adapters.safetensors"

CONFIG_FILE = "config.yaml"

TEXT_FOLDER = "text_tower"

#: Only where an image tower's name is not enough to build it.
IMAGE_FOLDER = "image_tower"

#: Config, tokenizer and preprocessing of the pretrained dual encoder that a run started from.
PRETRAINED_FOLDER = "pretrained"

#: All folders of files beside the weights that a model is built from.
MODEL_FOLDERS = (TEXT_FOLDER, IMAGE_FOLDER, PRETRAINED_FOLDER)


def weights_file(run: str | Path) -> Path | None:
    """The file that holds a run's model.

    Args:
        run: The run folder.

    Returns:
        Its whole weights, else its adapters; None where it has neither.
    """
    files = (Path(run) / name for name in (WEIGHTS_FILE, ADAPTERS_FILE))
    return next((file for file in files if file.is_file()), None)


def is_run_folder(folder: str | Path) -> bool:
    """Whether a folder holds the settings and the weights of a run.

    Args:
        folder: The folder, which need not exist.

    Returns:
        Whether it does.
    """
    return (Path(folder) / CONFIG_FILE).is_file() and weights_file(folder) is not None
