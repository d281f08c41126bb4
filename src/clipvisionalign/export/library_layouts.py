"""A model that started from a pretrained dual encoder, in the layout of the library that it came from.

The folder is opened by transformers' or open_clip's own classes, by `load_aligner`, and by programs that take theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from clipvisionalign.data.run_data import run_chain
from clipvisionalign.data.training_images import TRAINED_ON_FILE, TrainedOnImages
from clipvisionalign.export.folders import export_folder, target_folder
from clipvisionalign.json_io import read_json, write_json
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.pretrained import PretrainedTextTower, layout_of, save_dual_encoder
from clipvisionalign.models.pretrained.known_checkpoints import base_checkpoint
from clipvisionalign.models.run_names import resolve_run

#: What an export's option is called for each layout, and the library.
OPTIONS = {"transformers": "--transformers", "open_clip": "--open-clip"}

#: Files that only the other library reads: with them it would take the folder for one of its own.
_OTHERS_FILES = {
    "transformers": ("open_clip_config.json",), "open_clip": ("preprocessor_config.json", "processor_config.json")
}  # fmt: skip


def export_library_layout(model: str | Path, out: str | Path, layout: Literal["transformers", "open_clip"]) -> Path:
    """Write a model into a new folder as its library saves it: config, weights, tokenizer, preprocessing.

    Args:
        model: Run folder of a model that started from a pretrained dual encoder, or such a dual encoder itself.
        out: The folder to write; nothing may be in it.
        layout: The library that shall open it.

    Returns:
        The folder.

    Raises:
        FileExistsError: Something is in `out`.
        ValueError: What the model computes cannot be expressed in that layout.
        Held: Another process exports to `out`.
        RuntimeError: The folder, opened again, is not the same model; nothing is left of it.
    """
    target_folder(out)
    model = resolve_run(model)
    aligner = load_aligner(model, "cpu", packed=False)
    _check(aligner, model, layout)
    text_tower = aligner.text_tower
    assert isinstance(text_tower, PretrainedTextTower)
    with export_folder(out) as aside:
        text_tower.save(aside)
        for name in _OTHERS_FILES[layout]:
            (aside / name).unlink(missing_ok=True)
        try:
            save_dual_encoder(_tensors(aligner), text_tower.source, aside)
        except ValueError as error:
            raise ValueError(
                f"{model}: not written in {layout}'s layout: {error}; use --huggingface or --onnx"
            ) from None
        if layout == "transformers":
            _record_base(aside, base_checkpoint(model))
            _record_max_tokens(aside, text_tower.max_tokens)
        _verify(aligner, aside)
        _keep_trained_on(Path(model), aside)
    return Path(out)


def _check(aligner: Aligner, model: str | Path, layout: str) -> None:
    """Raises ValueError for a model that no folder of the layout describes."""
    option, text_tower = OPTIONS[layout], aligner.text_tower
    if not isinstance(text_tower, PretrainedTextTower):
        raise ValueError(
            f"{model}: {option} writes models that started from a pretrained dual encoder (--model.pretrained); this "
            "one has towers and heads of its own: use --huggingface or --onnx"
        )
    own_layout = layout_of(text_tower.source)
    if own_layout != layout:
        raise ValueError(f"{model}: a model in {own_layout}'s layout: use {OPTIONS[own_layout]} in place of {option}")
    if aligner.config.design != "self":
        raise ValueError(
            f"{model}: {layout}'s layout has no place for the design '{aligner.config.design}', only for 'self': use "
            "--huggingface or --onnx"
        )
    is_cut = text_tower.max_tokens < text_tower.max_positions
    if is_cut and (layout == "open_clip" or text_tower.fixed_length):
        raise ValueError(
            f"{model}: captions are cut after {text_tower.max_tokens} tokens, and {layout}'s layout cannot express "
            f"fewer than the {text_tower.max_positions} of this model: use --huggingface or --onnx"
        )


def _tensors(aligner: Aligner) -> dict[str, torch.Tensor]:
    """The aligner's tensors, with the temperature that it applies."""
    state = {name: tensor.detach() for name, tensor in aligner.state_dict().items() if name != "max_log_scale"}
    state["log_scale"] = aligner.scale().detach().log().reshape(1)
    return state


def _record_base(folder: Path, base: str) -> None:
    """Name in config.json the published model that this one started from: transformers' own key for it."""
    settings = read_json(folder / "config.json")
    # A path of this machine is of no use elsewhere.
    settings.pop("_name_or_path", None)
    if base:
        settings["_name_or_path"] = base
    write_json(folder / "config.json", settings)


def _keep_trained_on(run: Path, folder: Path) -> None:
    """Keep by what the training images of a run, and of those before it, are recognised; no other library reads it."""
    files = [each / TRAINED_ON_FILE for each in run_chain(run)]
    records = [TrainedOnImages.load(file) for file in files if file.is_file()]
    if records:
        TrainedOnImages.merged(records).save(folder / TRAINED_ON_FILE)


def _record_max_tokens(folder: Path, max_tokens: int) -> None:
    """Let the tokenizer cut captions where the model does."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if settings.get("model_max_length") != max_tokens:
        write_json(path, settings | {"model_max_length": max_tokens})


def _verify(aligner: Aligner, folder: Path) -> None:
    """Raises RuntimeError where a folder, opened again, is another model."""
    reopened = load_aligner(folder, "cpu", packed=False)
    expected, state = _tensors(aligner), _tensors(reopened)
    differing = [
        name
        for name in expected.keys() | state.keys()
        if name not in state or name not in expected or not torch.allclose(state[name], expected[name], atol=1e-6)
    ]
    if aligner.image_tower.image_transform != reopened.image_tower.image_transform:
        differing.append("preprocessing")
    if aligner.text_tower.max_tokens != reopened.text_tower.max_tokens:
        differing.append("max_tokens")
    if differing:
        raise RuntimeError(f"{folder}: opened again, it is another model: {', '.join(sorted(differing)[:3])}")
