"""A setting that would count nothing is refused, or told with what makes it so."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from clipvisionalign.log import log_to
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.fusion import FusionConfig
from clipvisionalign.models.image_weights import find_image_weights
from clipvisionalign.models.late_interaction import LateConfig
from clipvisionalign.models.text_tower import TextTowerConfig
from clipvisionalign.models.text_weights import find_text_weights
from clipvisionalign.training.build import build_aligner
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.contrastive import LOSSES, LossConfig
from clipvisionalign.training.data import open_data
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.fine_tuning import LoraConfig, add_lora, freeze, set_frozen_eval
from clipvisionalign.training.ineffective_settings import LOSS_OF_SETTING, ineffective_settings
from clipvisionalign.training.train import train

CROSS = AlignerConfig("cross")


@pytest.mark.parametrize(
    ("idle", "message", "used"),
    [
        ({"lora": LoraConfig(rank=2)}, "lora.rank: --peft none", {"peft": "lora"}),
        ({"fusion_weight": 2.0}, "fusion_weight: the design 'self' has no late", {"model": AlignerConfig("late")}),
        ({"negatives": 2}, "negatives: the design 'self' has no fusion", {"model": CROSS}),
        ({"model": AlignerConfig(late=LateConfig(8))}, "model.late.width: ", {"model": replace(CROSS, late=LateConfig(8))}),
        (
            {"model": AlignerConfig("late", fusion=FusionConfig(1))}, "model.fusion.layers: the design 'late'",
            {"model": replace(CROSS, fusion=FusionConfig(1))},
        ),
        (
            {"model": AlignerConfig(text_tower=TextTowerConfig(window=4))}, "model.text_tower.window: the text tower keeps",
            {"model": AlignerConfig("sparse", text_tower=TextTowerConfig(window=4))},
        ),
        (
            {"model": AlignerConfig(text_tower=TextTowerConfig(dropout=0.2)), "freeze": "text"},
            "model.text_tower.dropout: --freeze text", {"freeze": "none"},
        ),
        ({"loss": LossConfig(margin=0.3)}, "loss.margin: it is of the loss 'hardest'", {"loss": LossConfig("hardest", 0.3)}),
        ({"image_lr": 1e-5}, "image_lr: --freeze image", {"freeze": "none"}),
        ({"image_lr": 1e-5}, "image_lr: --freeze image", {"peft": "lora", "lora": LoraConfig("image")}),
        ({"text_lr": 1e-5, "freeze": "text"}, "text_lr: --freeze text", {"freeze": "image"}),
        ({"layer_decay": 0.8, "freeze": "both"}, "layer_decay: --freeze both", {"freeze": "text"}),
        ({"patience": 1, "freeze": "all", "model": CROSS}, "patience: --freeze all", {"freeze": "both"}),
        ({"views": 2, "augment": "none"}, "views: --augment none", {"augment": "crop"}),
        ({"views": 2, "freeze": "none"}, "views: views are of features", {"freeze": "both"}),
        ({"layout": "coco", "data": "shards/{0..3}.tar"}, "layout: a stream", {"data": "folder"}),
        (
            {"loss": LossConfig(smoothing=0.1), "freeze": "all", "model": CROSS},
            "loss.smoothing: --freeze all: the dual encoder is not trained", {"freeze": "both"},
        ),
        ({"cache": "features", "freeze": "none"}, "cache: what is trained, or comes", {"freeze": "image"}),
        ({"cache": "features", "data": "shards/{0..3}.tar"}, "cache: what is trained, or comes", {"freeze": "both"}),
        ({"chunk": 128}, "chunk: a step is 128 images, one chunk", {"chunk": 127}),
        (
            {"negatives": 7, "batch": 7, "model": CROSS}, "negatives: a step is 7 images: at most 6 of them",
            {"negatives": 6},
        ),
    ],
)  # fmt: skip
def test_what_counts_nothing_is_told_and_what_counts_is_not(idle, message, used):
    messages = ineffective_settings(RunConfig(**idle))
    assert len(messages) == 1
    assert messages[0].startswith(f"no effect of --{message}")
    assert not ineffective_settings(RunConfig(**idle | used))


def test_every_setting_of_a_loss_has_its_loss():
    """Otherwise a new setting is ignored without a line when another loss is trained."""
    assert {field.name for field in fields(LossConfig)} - {"name", "learn_temperature"} == set(LOSS_OF_SETTING)
    assert set(LOSS_OF_SETTING.values()) <= set(LOSSES)


def test_usual_settings_are_not_spoken_of():
    assert not ineffective_settings(RunConfig())
    assert ineffective_settings(RunConfig(chunk=64), world_size=2) == [
        "no effect of --chunk: a step is 64 images of a process, one chunk"
    ]


def test_a_run_tells_what_counts_nothing_once(tmp_path, scenes_folder, tiny_model):
    config = RunConfig(
        data=str(scenes_folder), out=str(tmp_path / "run"), model=tiny_model(), epochs=1, batch=64, steps=99, chunk=64,
        augment="none", precision="float32", cache=str(tmp_path / "cache"), trackers="", train_images=1000,
        freeze_layers=["image_tower.*"],
    )  # fmt: skip
    said: list[str] = []
    train(config, said.append)
    for message in (
        "--chunk: a step is 64 images, one chunk", "--steps: all epochs are 2", "--train_images: there are 94",
        "--freeze_layers image_tower.*: frozen without that",
    ):  # fmt: skip
        assert said.count(f"no effect of {message}") == 1
    # A run that goes on has been told.
    said.clear()
    with log_to(said.append):
        open_data(config, Distributed(torch.device("cpu")), is_new_run=False)
    assert len(said) == 1
    assert "no effect" not in said[0]


@pytest.mark.parametrize("weights", ["auto", "random"])
def test_a_revision_of_a_folder_is_refused(text_folder, weights):
    assert find_text_weights(str(text_folder), weights).folder == text_folder
    with pytest.raises(
        ValueError, match=r"--model.text_tower.revision v1: the folder .* has no revisions; leave it out"
    ):
        find_text_weights(str(text_folder), weights, "v1")


def test_a_revision_of_a_file_and_of_random_weights_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for name, revision in (("resnet50", "v1"), ("resnet50@v1", "")):
        for weights in ("random", str(tmp_path)):
            with pytest.raises(ValueError, match=r"--model.image_tower.revision v1: .* has no revisions; leave it out"):
                find_image_weights(name, weights, revision)
    assert find_image_weights("resnet50", "random") is None
    # Of a repository that timm has no name for, the config is taken.
    assert find_image_weights("hf-hub:someone/tower", "random", "v1") is None


def test_layers_frozen_by_name_are_frozen_beside_whatever_else_is_asked_for(tiny_model):
    aligner = Aligner(tiny_model("cross"))
    with pytest.raises(ValueError, match=r"--freeze_layers fusio.\*: no parameter has such a name"):
        freeze(aligner, "all", ["fusio.*"])
    name = next(name for name, _ in aligner.named_parameters() if name.startswith("fusion."))
    assert freeze(aligner, "all", [name, "image_tower.*"]) == ["image_tower.*"]
    assert not aligner.get_parameter(name).requires_grad


def test_nothing_left_to_be_trained_is_refused_and_adapters_are_something(tiny_model):
    """Where all but a tower's adapters is frozen, these are trained."""
    layers = ["text_*", "image_head*", "log_scale"]
    config = RunConfig(model=tiny_model(), freeze="image", freeze_layers=layers)
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="nothing is left to be trained"):
        build_aligner(config, device, is_new_run=True)
    adapted = replace(config, peft="lora", lora=LoraConfig("image", rank=2))
    # Begun from another run, as its heads stay what they are.
    aligner = build_aligner(adapted, device, is_new_run=False)
    assert all("lora_" in name for name, each in aligner.named_parameters() if each.requires_grad)
    config = RunConfig(model=tiny_model("cross"), freeze="all", freeze_layers=["fusion.*"])
    with pytest.raises(ValueError, match="nothing is left to be trained"):
        build_aligner(config, device, is_new_run=True)


def test_layers_frozen_by_name_have_no_adapters(tiny_model):
    aligner = Aligner(tiny_model())
    frozen = ["text_tower.encoder.encoder.layer.0.*"]
    freeze(aligner, "image", frozen)
    add_lora(aligner, LoraConfig(rank=2), frozen)
    adapted = [name for name, _ in aligner.named_parameters() if "lora_" in name]
    assert adapted
    assert all(".layer.1." in name for name in adapted)
    with pytest.raises(ValueError, match="no layer of the text tower is left to be adapted"):
        add_lora(Aligner(tiny_model()), LoraConfig(rank=2), ["text_tower.*"])


def test_an_adapter_in_a_frozen_tower_drops_out(tiny_model):
    aligner = Aligner(tiny_model())
    freeze(aligner, "image", [])
    add_lora(aligner, LoraConfig("image", rank=2, dropout=0.5))
    aligner.train()
    set_frozen_eval(aligner, "image")
    dropouts = [module for name, module in aligner.named_modules() if ".lora_dropout." in name]
    assert dropouts
    assert all(module.training for module in dropouts)
    assert not aligner.image_tower.training
