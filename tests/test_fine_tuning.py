"""Which weights move, how far, and what is kept of it; what a run tells while it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tolerance import assert_as_exact, assert_same, in_float64, unit_roundoff

from clipvisionalign import load_aligner, read_captioned_images
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.fine_tuning import (
    LAYER,
    LoraConfig,
    add_lora,
    freeze,
    image_batch_norms,
    layer_indices,
    merge_lora,
    optimizer_groups,
    set_frozen_eval,
    text_layer_indices,
)
from clipvisionalign.training.metrics_logger import available_trackers, flatten_metrics
from clipvisionalign.training.train import train


def settings(data: Path, out: Path, model, **more) -> RunConfig:
    return RunConfig(
        **{
            "data": str(data), "out": str(out), "model": model, "epochs": 1, "batch": 16, "augment": "none",
            "precision": "float32", "cache": str(out.parent / "cache"), "workers": 0, "trackers": "", **more,
        }
    )  # fmt: skip


@pytest.mark.parametrize("towers", ["text", "image", "both"])
def test_merged_adapters_give_the_same_vectors_under_the_plain_names(tiny_model, scenes_folder, towers):
    torch.manual_seed(0)
    aligner = Aligner(tiny_model())
    plain = set(aligner.state_dict())
    data = read_captioned_images(scenes_folder).split("dev")
    before = aligner.encode_captions(data.captions), aligner.encode_images(data.images)
    start = in_float64(aligner).encode_captions(data.captions)
    add_lora(aligner, LoraConfig(towers, rank=2))
    # An adapter starts at nothing.
    assert_same(aligner.encode_captions(data.captions), before[0], start, size=1.0)
    moved = 0
    for name, parameter in aligner.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
            moved += 1
        assert parameter.requires_grad == ("lora_" in name) or not name.startswith(
            tuple({"text": ["text_tower"], "image": ["image_tower"], "both": ["text_tower", "image_tower"]}[towers])
        )
    assert moved
    adapted = aligner.encode_captions(data.captions), aligner.encode_images(data.images)
    merged_aligner = merge_lora(aligner)
    assert set(merged_aligner.state_dict()) == plain
    merged_vectors = merged_aligner.encode_captions(data.captions), merged_aligner.encode_images(data.images)
    exact = in_float64(merged_aligner)
    right = exact.encode_captions(data.captions), exact.encode_images(data.images)
    for one, other, was, sure, kind in zip(adapted, merged_vectors, before, right, ("text", "image"), strict=True):
        assert_same(one, other, sure, size=1.0)
        if towers in (kind, "both"):
            with pytest.raises(AssertionError, match="off by"):
                assert_as_exact(was, other, sure, size=1.0)
        else:
            assert_same(one, was, sure, size=1.0)


def test_a_run_with_adapters_leaves_an_aligner_like_any_other(tmp_path, scenes_folder, tiny_model):
    config = settings(scenes_folder, tmp_path / "run", tiny_model(), peft="lora", text_lr=1e-2)
    said = []
    train(config, say=said.append)
    aligner = load_aligner(tmp_path / "run")
    assert not any("lora" in name for name in aligner.state_dict())
    from clipvisionalign.training.build import seed_everything

    seed_everything(0)
    start = Aligner(tiny_model()).state_dict()
    moved = {name for name, tensor in aligner.state_dict().items() if not torch.equal(tensor, start[name])}
    text = {name for name in moved if name.startswith("text_tower")}
    assert text
    assert all(name.endswith("weight") and "embeddings" not in name and "LayerNorm" not in name for name in text)
    with pytest.raises(ValueError, match="--freeze both freezes both"):
        train(settings(scenes_folder, tmp_path / "no", tiny_model(), peft="lora", freeze="both"), say=said.append)


def test_parts_are_frozen_by_name(tiny_model):
    aligner = Aligner(tiny_model())
    freeze(aligner, "none", ["text_tower.encoder.encoder.layer.0.*", "image_head.*"])
    trained = {name for name, parameter in aligner.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("text_tower.encoder.encoder.layer.0.", "image_head.")) for name in trained)
    assert any(name.startswith("text_tower.encoder.encoder.layer.1.") for name in trained)
    with pytest.raises(
        ValueError, match=r"--freeze_layers text_tower: no parameter has such a name; text_tower.\* are "
    ):
        freeze(aligner, "none", ["text_tower"])
    with pytest.raises(ValueError, match=r"there are image_head.*"):
        freeze(aligner, "none", ["image_heads.weight"])
    with pytest.raises(ValueError, match=r"--freeze_layers text_tower.layer.9\*: no parameter has such a name"):
        freeze(aligner, "none", ["text_tower.layer.9*"])


def test_learning_rates_fall_with_depth(tiny_model):
    aligner = Aligner(tiny_model())
    layers = layer_indices(aligner)
    assert layers["text_tower.encoder.embeddings.word_embeddings.weight"] == (0, 2)
    assert layers["text_tower.encoder.encoder.layer.1.output.dense.weight"] == (2, 2)
    images = [layer for name, (layer, _) in layers.items() if name.startswith("image_tower")]
    assert images == sorted(images)
    assert len(set(images)) > 3
    rates = {"text_tower": 1.0, "image_tower": 2.0}
    groups = optimizer_groups(aligner.named_parameters(), aligner, rates, 3.0, 0.1, 0.5)
    rate_of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    known = dict(aligner.named_parameters())
    assert rate_of[id(known["text_tower.encoder.encoder.layer.1.output.dense.weight"])] == (1.0, 0.1)
    assert rate_of[id(known["text_tower.encoder.encoder.layer.0.output.dense.bias"])] == (0.5, 0.0)
    assert rate_of[id(known["text_head.weight"])] == (3.0, 0.1)
    assert rate_of[id(known["log_scale"])] == (3.0, 0.0)
    assert len(rate_of) == len(known)


@pytest.mark.parametrize(
    "family", ["distilbert", "bert", "gpt2", "roberta-prelayernorm", "modernbert", "deberta-v2", "electra", "mpnet"]
)
def test_what_follows_the_last_layer_learns_as_fast_as_it(family):
    """The final norm of an encoder with norms before its layers, whatever it is called; embeddings are the deepest."""
    from transformers import AutoConfig, AutoModel

    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50,
             "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "n_embd": 32, "n_layer": 3, "n_head": 2, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}  # fmt: skip
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(family, **small))
    depths = text_layer_indices([name for name, _ in model.named_parameters()])
    assert {last for _, last in depths.values()} == {3}
    for name, (depth, last) in depths.items():
        layer = LAYER.search(f".{name}")
        if layer:
            assert depth == int(layer[1]) + 1
        else:
            before = name.startswith(("embeddings", "wte", "wpe"))
            assert depth == (0 if before else last), name


def test_a_pretrained_batch_norm_keeps_its_statistics_where_its_tower_is_trained(tiny_model):
    config = tiny_model()
    aligner = Aligner(config)
    for weights, training in (("random", True), ("auto", False)):
        aligner.config.image_tower.weights = weights
        aligner.train()
        set_frozen_eval(aligner, "none")
        assert all(module.training == training for module in image_batch_norms(aligner))
        assert aligner.image_tower.training


@pytest.mark.slow
@pytest.mark.parametrize("design", ["self", "late"])
def test_both_towers_frozen_neither_runs_after_the_first_epoch(
    tmp_path, scenes_folder, tiny_model, monkeypatch, design
):
    """Their outputs are on disk, and give the run that they would have given themselves."""
    from dataclasses import replace

    from clipvisionalign.models.text_tower import TextTower

    # The choice of a view is drawn before what is dropped out.
    model = replace(tiny_model(design), dropout=0.0)
    plain = settings(scenes_folder, tmp_path / "plain", model, freeze="both", epochs=2, cache="off")
    train(plain, say=lambda line: None)
    cached = settings(scenes_folder, tmp_path / "cached", model, freeze="both", epochs=2)
    calls = []
    forward = TextTower.forward
    monkeypatch.setattr(
        TextTower, "forward", lambda self, *a, **k: calls.append(self.training) or forward(self, *a, **k)
    )
    train(cached, say=lambda line: None)
    epochs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "cached")
    ]
    losses = [[line["train_loss"] for line in lines if "dev" in line] for lines in epochs]
    # Features are kept in float16, each number rounded once.
    assert losses[1] == pytest.approx(losses[0], rel=4 * unit_roundoff(torch.float16))
    # Captions of training: once, in a few groups; of dev: after each epoch and at the end.
    before = len(calls)
    assert before < 40
    again = settings(scenes_folder, tmp_path / "again", model, freeze="both", epochs=2)
    train(again, say=lambda line: None)
    assert len(calls) - before < before


# --- records ---------------------------------------------------------------------------------------------------------


def test_figures_go_to_tensorboard_with_their_steps(tiny_runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tiny_runs["self"]
    events = EventAccumulator(str(run / "records"))
    events.Reload()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [(line["step"], line["train_loss"]) for line in lines if "dev" in line]
    logged = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert [step for step, _ in logged] == [step for step, _ in expected]
    # Six decimals are written into the one, float32 into the other.
    assert [value for _, value in logged] == pytest.approx([value for _, value in expected], abs=1e-6)
    assert {"dev/image_to_text/recall_at_1", "dev_loss", "dev_accuracy"} <= set(events.Tags()["scalars"])


def test_an_epoch_says_where_its_time_went(tiny_runs):
    lines = [json.loads(line) for line in (tiny_runs["self"] / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if "dev" in line]
    assert all({"image tower", "text tower", "loss", "optimiser", "waiting for data"} <= set(time) for time in times)


def test_profile_says_where_the_time_goes_and_leaves_no_run(tmp_path, scenes_folder, text_folder, capsys):
    from clipvisionalign.cli import main

    command = ["train", str(scenes_folder), "--out", str(tmp_path / "run"), "--profile", "3", "--batch", "16"]
    command += ["--model.image_tower.name", "test_resnet", "--model.image_tower.weights", "random"]
    command += ["--model.image_tower.size", "64", "--model.text_tower.name", str(text_folder), "--freeze", "none"]
    assert main([*command, "--trackers", "", "--workers", "0"]) == 0
    said = capsys.readouterr().out
    for kind in ("image tower", "text tower", "loss", "optimiser", "waiting for data", "decode", "tokenise"):
        assert kind in said
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_there_is_told_with_its_pip_line(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available_trackers(["tensorboard"], requested=False) == (
        [], ["no tensorboard records: tensorboard is not installed: pip install tensorboard"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="--trackers wandb: wandb is not installed: pip install wandb"):
        available_trackers(["wandb"], requested=True)
    with pytest.raises(ValueError, match="there are tensorboard, wandb, mlflow"):
        available_trackers(["paper"], requested=True)


def test_nested_figures_have_one_name_each():
    nested = {"epoch": 3, "loss": 1.5, "dev": {"rsum": {"value": 7, "low": 6}, "recall": {"at_1": {"value": 0.5}}}}
    assert flatten_metrics(nested) == {"loss": 1.5, "dev/rsum": 7.0, "dev/recall/at_1": 0.5}
