"""The files of a run folder that hold an aligner."""

from __future__ import annotations

WEIGHTS_FILE = "model.safetensors"

CONFIG_FILE = "config.yaml"

TEXT_FOLDER = "text_tower"

#: Only where a picture tower's name does not tell how it is built.
IMAGE_FOLDER = "image_tower"
