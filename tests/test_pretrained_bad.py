"""Folders and names that are no whole pretrained dual encoder: one line each that names the thing and the way out."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pretrained_models import clip_tokenizer
from safetensors.torch import load_file, save_file

from clipvisionalign.cli import main
from clipvisionalign.models.io import load_aligner


@pytest.fixture
def whole(folders):
    """A folder a family, whole: copied before it is broken."""
    return folders


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    """Change the values of a JSON file in place."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def config(**values: Any) -> Callable[[Path], None]:
    """A change of config.json: by key, or section__key."""

    def change(settings: Any) -> None:
        for name, value in values.items():
            section, _, key = name.rpartition("__")
            (settings[section] if section else settings)[key] = value

    return lambda folder: edit_json(folder / "config.json", change)


def preprocessing(**values: Any) -> Callable[[Path], None]:
    """A change of preprocessor_config.json."""
    return lambda folder: edit_json(folder / "preprocessor_config.json", lambda settings: settings.update(values))


def open_clip_config(section: str, **values: Any) -> Callable[[Path], None]:
    """A change of open_clip_config.json, in a section of model_cfg, or "" for that itself."""

    def change(settings: Any) -> None:
        model = settings["model_cfg"]
        (model[section] if section else model).update(values)

    return lambda folder: edit_json(folder / "open_clip_config.json", change)


def remove(*patterns: str) -> Callable[[Path], None]:
    """Files by patterns."""
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)] and None


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """A file of other content."""
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, size: int) -> Callable[[Path], None]:
    """A file without its end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """A change of the tensors of a weights file."""

    def apply(folder: Path) -> None:
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name, {"format": "pt"})

    return apply


def set_nan(key: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Not a number in one place of a tensor."""

    def change(state: dict[str, torch.Tensor]) -> None:
        state[key] = state[key].clone()
        state[key].view(-1)[0] = float("nan")

    return change


class Code:
    """Creates a file when a pickle of it is loaded."""

    def __reduce__(self) -> Any:
        return (open, ("code-ran", "w"))


def pickled(name: str, as_pytorch_file: bool = False) -> Callable[[Path], None]:
    """The weights replaced by a pickle that runs code."""

    def change(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            file.unlink()
        if as_pytorch_file:
            torch.save({"weight": Code()}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps({"weight": Code()}, protocol=2))

    return change


def in_parts(folder: Path) -> None:
    """Weights in parts, one of which is missing."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    next(folder.glob("model-00002*")).unlink()


def more_tokens(folder: Path) -> None:
    """A tokenizer with tokens that the model has no embedding for."""
    tokenizer = clip_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)


def kind(model_type: str) -> Callable[[Path], None]:
    """config.json of another kind of model."""
    return write("config.json", json.dumps({"model_type": model_type}).encode())


CLIP, OPEN_CLIP, BIN = "model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"

#: By a name: the family, what is done to its folder, and what the message says of the thing and of the way out.
BROKEN: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    "weights cut short": ("clip", cut(CLIP, 100_000), CLIP, "get the file again"),
    "weights cut in the header": ("clip", cut(CLIP, 100), CLIP, "get the file again"),
    "no weights": ("clip", remove(CLIP), "holds no weights", "model.safetensors or pytorch_model.bin should be there"),
    "no config": ("clip", remove("config.json"), "lacks config.yaml", "which has a config.json or an open_clip_config"),
    "no tokenizer": ("clip", remove("tok*", "vocab*", "merges*"), "no tokenizer", "copy the publisher's there"),
    "tokenizer.json is no JSON": ("clip", write("tokenizer.json", b"{"), "tokenizer that cannot be read", "publisher's"),
    "no preprocessing": ("clip", remove("preproc*"), "no preprocessor_config.json", "copy the publisher's there"),
    "preprocessing is no JSON": ("clip", write("preprocessor_config.json", b"{"), "preprocessor_config", "publisher's"),
    "preprocessing is a list": ("clip", write("preprocessor_config.json", b"[]"), "preprocessor_config", "publisher's"),
    "images of another size": ("clip", preprocessing(crop_size=64), "gives 64 x 64 pixels", "one and the same model"),
    "unknown filter": ("clip", preprocessing(resample=9), "resample 9", "0 to 5"),
    "one mean for three colours": ("clip", preprocessing(image_mean=[0.5]), "image_mean", "a colour has 3"),
    "heads of another width": ("clip", config(projection_dim=16), "(24, 32) and not (16, 32)", "of one and the same"),
    "weights of another model": ("clip", config(vision_config__hidden_size=64), CLIP, "of one and the same model"),
    "layers missing": ("clip", config(text_config__num_hidden_layers=3), "16 tensors are missing", "one and the same"),
    "more layers": ("clip", config(vision_config__num_hidden_layers=1), "more layers than config", "one and the same"),
    "a part is missing": ("clip", in_parts, "parts that model.safetensors.index.json names", "get the others"),
    "more tokens than embeddings": ("clip", more_tokens, "up to 2514", "the tokenizer that it was trained with"),
    "NaN": ("clip", tensors(CLIP, set_nan("visual_projection.weight")), "NaN", "get the weights again"),
    "a scale of NaN": ("siglip", tensors(CLIP, set_nan("logit_scale")), "logit_scale", "get the weights again"),
    "a pickle with code": ("clip", pickled(BIN), "no pickle is run: it calls", "as model.safetensors"),
    "a file of PyTorch with code": ("clip", pickled(BIN, True), "no pickle is run: it calls", "as model.safetensors"),
    "a pickle in open_clip's layout": ("oc_vit", pickled("open_clip_pytorch_model.bin"), "no pickle is run", "as model."),
    "config.json is no JSON": ("clip", write("config.json", b"not json"), "config.json: cannot be read", "publisher's"),
    "config.json is binary": ("clip", write("config.json", b"\xff\xfe\0"), "config.json: cannot be read", "publisher's"),
    "config.json is a list": ("clip", write("config.json", b"[1]"), "no model_type", "get the publisher's config.json"),
    "gpt2": ("clip", kind("gpt2"), "'gpt2' generates text", "known are CLIP, SigLIP"),
    "llava": ("clip", kind("llava"), "'llava' generates text", "known are CLIP, SigLIP"),
    "blip": ("clip", kind("blip"), "'blip' generates text", "known are CLIP, SigLIP"),
    "bert": ("clip", kind("bert"), "'bert' reads text alone", "--model.text_tower.name"),
    "vit": ("clip", kind("vit"), "'vit' takes images alone", "--model.image_tower.name"),
    "text tower alone": ("clip", kind("clip_text_model"), "one tower of a dual encoder", "get the whole model"),
    "vision tower alone": ("clip", kind("clip_vision_model"), "one tower of a dual encoder", "get the whole model"),
    "unknown dual encoder": ("clip", kind("align"), "'align' is no dual encoder that can be opened", "known are CLIP"),
    "open_clip without weights": ("oc_vit", remove(OPEN_CLIP), "holds no weights", "should be there"),
    "open_clip cut short": ("oc_vit", cut(OPEN_CLIP, 100_000), OPEN_CLIP, "get the file again"),
    "open_clip without model_cfg": ("oc_vit", write("open_clip_config.json", b"{}"), "embed_dim, vision_cfg", "publisher"),
    "open_clip with an empty tower": ("oc_vit", open_clip_config("", vision_cfg=None), "vision_cfg", "publisher's file"),
    "open_clip with another width": ("oc_vit", open_clip_config("", embed_dim=16), "size mismatch for visual.proj", "one"),
    "open_clip with more layers": ("oc_vit", open_clip_config("text_cfg", layers=3), "Missing key(s)", "and 11 more"),
    "open_clip with NaN": ("oc_vit", tensors(OPEN_CLIP, set_nan("visual.proj")), "NaN", "get the weights again"),
    "open_clip with an unknown tower": (
        "oc_timm", open_clip_config("vision_cfg", timm_model_name="no_such"), "(no_such)", "a newer open_clip_torch may",
    ),
    "open_clip with an unknown setting": (
        "oc_vit", open_clip_config("vision_cfg", new_setting=1), "'new_setting'", "a newer open_clip_torch may",
    ),
    "CoCa": ("oc_vit", open_clip_config("", multimodal_cfg={}), "CoCa", "CLIP and SigLIP are"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_one_line(case, whole, tmp_path, monkeypatch, capsys):
    """From Python and from the command line: the thing and the way out, no traceback, and nothing is run or written."""
    family, damage, thing, way_out = BROKEN[case]
    folder = tmp_path / "model"
    shutil.copytree(whole(family), folder)
    damage(folder)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError)) as error:
        load_aligner(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    assert thing in message
    assert way_out in message
    assert len(message) < 600
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    capsys.readouterr()
    assert main(["explain", str(folder), "a.png", "a dog"]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"clipvisionalign: error: {message}"]
    assert not printed.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "model"]


NAMES = {
    "open ai/clip": "no such folder.*OWNER/NAME",
    "../nowhere": "no such folder.*OWNER/NAME",
    "a/..": "no such folder.*OWNER/NAME",
    "a/b/c": "no such folder.*OWNER/NAME",
    "clip": "no such folder.*OWNER/NAME",
    "hf-hub:clip": "no such folder.*OWNER/NAME",
    "runs/self": "no such folder.*hf-hub:runs/self, since a folder runs is here",
    "nowhere/self": r"no such folder.*--offline.*path of a run folder",
    "a.png": "a file.*OWNER/NAME",
    "https://huggingface.co/openai/clip-vit-base-patch32/tree/v2": "write openai/clip-vit-base-patch32@v2$",
    "ViT-B/32": "on the hub it is openai/clip-vit-base-patch32$",
    "ViT-L-14": "on the hub it is openai/clip-vit-large-patch14$",
    "openai/clip@": "should follow the @; leave it out for the main branch: openai/clip$",
    "runs/model.safetensors": "give the folder that it is in, runs$",
    "runs": "it lacks config.yaml.*no pretrained model",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["evaluate", "audit", "encode", "index", "explain", "export", "train"])
def test_a_name_that_is_none(name, command, tmp_path, monkeypatch, capsys, scenes_folder):
    """Offline, each command says what it looked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    Image.new("RGB", (40, 30)).save("a.png")
    (tmp_path / "runs" / "model.safetensors").write_bytes(b"")
    arguments = {
        "evaluate": ["--data", str(scenes_folder)],
        "audit": ["--data", str(scenes_folder)],
        "encode": ["--data", str(scenes_folder), "--out", "vectors.npy"],
        "index": [".", "--out", "index"],
        "explain": ["a.png", "a dog"],
        "export": ["--onnx", "out"],
        "train": [str(scenes_folder), "--out", "run", "--device", "cpu", "--workers", "0", "--model.pretrained"],
    }[command]
    given = [*arguments, name] if command == "train" else [name, *arguments]
    assert main([command, *given]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert name in lines[0]
    import re

    pattern = "no pretrained model" if command == "train" and name == "runs" else NAMES[name]
    assert re.search(pattern, lines[0]), lines[0]


@pytest.mark.parametrize("tower", ["image_tower", "text_tower"])
@pytest.mark.parametrize("family", ["clip", "siglip", "oc_vit"])
def test_a_dual_encoder_in_the_place_of_a_tower(tower, family, whole, tmp_path, monkeypatch, capsys, scenes_folder):
    """Not half of it, and no new encoder in silence: the setting that takes the whole."""
    monkeypatch.chdir(tmp_path)
    folder = str(whole(family))
    line = ["train", str(scenes_folder), "--out", "run", "--device", "cpu", "--workers", "0", "--trackers", ""]
    assert main([*line, f"--model.{tower}.name", folder]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error.startswith(f"clipvisionalign: error: {folder}: ")
    assert error.endswith(f"is no {tower.replace('_', ' ')}: open it whole, --model.pretrained {folder}")


WITHOUT_PACKAGE = """
import sys
sys.modules[sys.argv[1]] = None
from clipvisionalign.cli import main
sys.exit(main(["explain", sys.argv[2], sys.argv[3], "a dog"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("package", "family"), [("open_clip", "oc_vit"), ("sentencepiece", "siglip")])
def test_a_package_that_is_not_installed_is_named(package, family, whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole(family), folder)
    if family == "siglip":
        # As google/siglip-base-patch16-224 once was: the vocabulary of sentencepiece alone.
        (folder / "tokenizer.json").unlink(missing_ok=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, package, str(folder), str(tmp_path / "a.png")],
        capture_output=True, text=True, timeout=900, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if "clipvisionalign: error" in line]
    assert len(lines) == 1, done.stderr[-2000:]
    assert str(folder) in lines[0]
    assert 'pip install "clipvisionalign[pretrained]"' in lines[0]
    assert "Traceback" not in done.stderr
