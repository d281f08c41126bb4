"""The files of a run folder that hold an aligner."""

from __future__ import annotations

WEIGHTS_FILE = "model.safetensors"

CONFIG_FILE = "config.yaml"

TEXT_FOLDER = "text_tower"

#: Only where an image tower's name is not enough to build it.
IMAGE_FOLDER = "image_tower"
