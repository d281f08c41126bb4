"""The files of a run folder that hold an aligner."""

from __future__ import annotations

WEIGHTS_FILE = "model.safetensors"

CONFIG_FILE = "config.yaml"

TEXT_FOLDER = "text_tower"

#: Only where an image tower's name is not enough to build it.
IMAGE_FOLDER = "image_tower"

#: Config, tokenizer and preprocessing of the pretrained dual encoder that a run started from.
PRETRAINED_FOLDER = "pretrained"

#: All folders of files beside the weights that a model is built from.
MODEL_FOLDERS = (TEXT_FOLDER, IMAGE_FOLDER, PRETRAINED_FOLDER)
