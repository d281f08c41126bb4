"""Settings beside a pretrained model: what is recorded is true and repeats the run, what is given counts, and what
would count nothing is refused."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from pretrained_models import CAPTIONS, FAMILIES
from test_pretrained import drawn_images

from clipvisionalign import RunConfig, train
from clipvisionalign.cli import main
from clipvisionalign.data.scene_dataset import write_scenes
from clipvisionalign.export.huggingface import model_card
from clipvisionalign.export.library_layouts import export_library_layout
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.caption_tokenizer import open_tokenizer
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.text_tower import TextTowerConfig
from clipvisionalign.study.config import Plan, Variant
from clipvisionalign.study.report.bibliography import entries_for
from clipvisionalign.training.build import build_aligner, build_loss
from clipvisionalign.training.contrastive import LossConfig
from clipvisionalign.training.init_run import load_init_weights
from clipvisionalign.training.recorded import read_settings
from clipvisionalign.training.resume import check_same_settings, checkpoint_settings

#: What no file about a run on a pretrained model may name.
DEFAULT_TOWERS = ("MiniLM", "efficientnet")


def settings(scenes_folder: Path, out: Path, folder: Path, **more) -> RunConfig:
    """A run of one step on a pretrained model."""
    model = AlignerConfig(pretrained=str(folder), **more.pop("model", {}))
    usual = {"epochs": 1, "steps": 1, "batch": 16, "trackers": "", "cache": "off", "workers": 0, "augment": "none"}
    return RunConfig(
        **usual | {"data": str(scenes_folder), "out": str(out), "model": model, "precision": "float32"} | more
    )


@pytest.fixture(scope="module")
def tuned(folders, scenes_folder, tmp_path_factory):
    """A finished run on a small CLIP."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    train(settings(scenes_folder, out, folders("clip")))
    return out


def as_recorded_before(run: Path) -> dict:
    """What config.yaml held before: every setting of a model, those that it has its own of at their defaults."""
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    before = asdict(AlignerConfig(width=256, text_tower=TextTowerConfig(max_tokens=128)))
    return recorded | {"model": before | {"pretrained": recorded["model"]["pretrained"]}}


def test_no_file_of_a_run_names_what_its_model_does_not_have(tuned):
    recorded = yaml.safe_load((tuned / "config.yaml").read_text())["model"]
    assert not {"image_tower", "temperature", "dropout"} & recorded.keys()
    assert recorded["text_tower"].keys() == {"window"}
    card = model_card(tuned)
    assert "in a 24-wide space" in card
    assert "256" not in card.split("## Figures")[0]
    for text in [card, *(path.read_text() for path in tuned.glob("*.yaml")), (tuned / "weights.json").read_text()]:
        assert not [name for name in DEFAULT_TOWERS if name in text]


def test_a_run_is_repeated_from_its_own_settings(tuned, tmp_path, capsys):
    assert main(["train", "--config", str(tuned / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    first, again = (load_aligner(run, "cpu").state_dict() for run in (tuned, tmp_path / "again"))
    assert not [name for name in first if not torch.equal(first[name], again[name])]


@pytest.mark.slow
def test_a_run_that_records_defaults_of_before_is_the_same_run(tuned, tmp_path, capsys):
    """Its width of 256 and its 128 tokens were nobody's wish."""
    before = as_recorded_before(tuned)
    assert read_settings(before).model == read_settings(yaml.safe_load((tuned / "config.yaml").read_text())).model
    copied = tmp_path / "before"
    load_aligner(tuned, "cpu", packed=False).save(copied)
    (copied / "config.yaml").write_text(yaml.safe_dump(before))
    opened, expected = load_aligner(copied, "cpu"), load_aligner(tuned, "cpu")
    assert opened.width == expected.width == 24
    assert torch.equal(opened.encode_captions(CAPTIONS), expected.encode_captions(CAPTIONS))
    assert open_tokenizer(copied).max_tokens == 77
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(before))
    assert main(["train", "--config", str(tmp_path / "before.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert load_aligner(tmp_path / "again", "cpu").width == 24
    capsys.readouterr()


def test_a_checkpoint_of_before_has_the_settings_of_the_run(tuned):
    from clipvisionalign.training.resume import _flatten

    saved = {"settings": _flatten(as_recorded_before(tuned))}
    config = read_settings(as_recorded_before(tuned))
    check_same_settings(saved, config, tuned)
    check_same_settings({"settings": checkpoint_settings(config)}, config, tuned)
    for changed in (replace(config.model, positions="stretched"), replace(config.model, width=16)):
        with pytest.raises(ValueError, match="changed since the run was begun"):
            check_same_settings(saved, replace(config, model=changed), tuned)


def test_a_study_cites_the_model_and_no_tower_that_it_does_not_have(tmp_path, scenes_folder):
    from clipvisionalign.data.formats import read_captioned_images

    for name, key in {"clip": "radford2021", "siglip-base": "zhai2023", "metaclip-b32": "xu2024"}.items():
        plan = Plan(
            data=str(scenes_folder),
            variants={"self": Variant(settings={"model": {"pretrained": f"someone/{name}", "design": "self"}})},
        )
        keys = {entry["key"] for entry in entries_for(plan, read_captioned_images(scenes_folder))}
        assert key in keys
        assert not {"wang2020", "tan2019"} & keys


@pytest.mark.parametrize("flag", ["--model.temperature=0.05", "--model.dropout=0.2", "--model.text_tower.pooling=auto"])
def test_a_flag_that_the_model_has_its_own_of_is_refused_at_its_default_too(
    flag, folders, tmp_path, capsys, scenes_folder
):
    arguments = [
        "train",
        str(scenes_folder),
        "--out",
        str(tmp_path / "run"),
        "--model.pretrained",
        str(folders("clip")),
    ]
    assert main([*arguments, flag]) == 1
    assert f"{flag.partition('=')[0]}: a pretrained model has its own" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "own", "stretched", "repeated"), [(None, 77, 248, 4096), (128, 77, 128, 128), (20,) * 4]
)
def test_a_limit_of_tokens_that_is_given_counts_and_no_other(given, own, stretched, repeated, folders, tmp_path):
    for positions, expected in {"own": own, "stretched": stretched, "repeated": repeated}.items():
        config = AlignerConfig(
            pretrained=str(folders("clip")), positions=positions, text_tower=TextTowerConfig(max_tokens=given)
        )
        aligner = Aligner(config)
        assert aligner.text_tower.max_tokens == expected
        aligner.save(tmp_path / positions)
        assert load_aligner(tmp_path / positions, "cpu").text_tower.max_tokens == expected
        assert open_tokenizer(tmp_path / positions).max_tokens == expected


# --- another run's weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_run_are_taken_or_refused_in_a_line(family, folders, tmp_path):
    tuned = Aligner(AlignerConfig(pretrained=str(folders(family))))
    with torch.no_grad():
        tuned.image_tower.backbone.get_parameter(next(iter(dict(tuned.image_tower.backbone.named_parameters())))).mul_(
            1.1
        )
    tuned.save(tmp_path / "run")
    aligner = Aligner(AlignerConfig("cross", pretrained=str(folders(family))))
    assert load_init_weights(aligner, str(tmp_path / "run")) == tuned.state_dict().keys()
    assert torch.equal(aligner.encode_images(drawn_images(3)), tuned.eval().encode_images(drawn_images(3)))
    # Another tokenizer, with as many words.
    words = aligner.text_tower.vocabulary()
    aligner.text_tower.vocabulary = lambda: dict(zip(words, [*words.values()][::-1], strict=True))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"its tokenizer is of other words.*give --model.pretrained"):
        load_init_weights(aligner, str(tmp_path / "run"))


# --- what is trained -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_trains_no_vector_is_refused(family, folders):
    """Families whose projections are within their towers have nothing left to train where both are frozen."""
    config = RunConfig(freeze="both", model=AlignerConfig(pretrained=str(folders(family))))
    heads = Aligner(config.model)
    parameters = [*heads.image_head.parameters(), *heads.text_head.parameters()]
    if parameters:
        build_aligner(config, torch.device("cpu"), is_new_run=True)
        return
    for loss in ("softmax", "sigmoid"):
        with pytest.raises(ValueError, match=r"--freeze both would train the temperature alone.*within its towers"):
            build_aligner(replace(config, loss=LossConfig(loss)), torch.device("cpu"), is_new_run=True)
    late = replace(config, model=AlignerConfig("late", pretrained=str(folders(family))))
    build_aligner(late, torch.device("cpu"), is_new_run=True)


def test_frozen_heads_of_a_pretrained_model_are_its_own(folders):
    """They are not drawn at random, as new ones are, which may not stay so."""
    model = AlignerConfig("late", pretrained=str(folders("clip")))
    config = RunConfig(model=model, freeze_layers=["image_head.*", "text_head.*"])
    aligner = build_aligner(config, torch.device("cpu"), is_new_run=True)
    assert not any(parameter.requires_grad for parameter in aligner.image_head.parameters())


def test_some_families_have_their_projections_within_their_towers(folders):
    """Else the test above would refuse nothing."""
    aligner = Aligner(AlignerConfig(pretrained=str(folders("siglip"))))
    assert not [*aligner.image_head.parameters(), *aligner.text_head.parameters()]


@pytest.mark.parametrize("family", ["siglip", "naflex", "oc_siglip"])
def test_the_sigmoid_loss_starts_from_the_models_bias_and_trains_it(family, folders, tmp_path, scenes_folder, caplog):
    folder = folders(family)
    before = load_aligner(folder, "cpu")
    assert before.logit_bias is not None
    config = settings(
        scenes_folder, tmp_path / "run", folder, steps=3, freeze="none", loss=LossConfig("sigmoid"), ema=0.0
    )
    built = build_aligner(config, torch.device("cpu"), is_new_run=True)
    loss = build_loss(config.loss, built)
    bias = loss.bias_of(built.logit_bias)
    assert bias is built.logit_bias
    assert bias.requires_grad
    assert not list(loss.parameters())
    with caplog.at_level(logging.INFO, logger="clipvisionalign"):
        train(config)
    assert f"bias {before.logit_bias.item():.2f}" in caplog.text
    after = load_aligner(tmp_path / "run", "cpu")
    moved = (after.logit_bias - before.logit_bias).abs().item()
    # A few steps of the heads' learning rate.
    assert 0 < moved < 0.1
    export_library_layout(tmp_path / "run", tmp_path / "out", "open_clip" if family == "oc_siglip" else "transformers")
    assert torch.equal(load_aligner(tmp_path / "out", "cpu").logit_bias, after.logit_bias)


@pytest.mark.parametrize(("loss", "freeze"), [("softmax", "none"), ("hardest", "none"), ("sigmoid", "all")])
def test_the_bias_stays_where_no_loss_of_the_dual_encoder_has_a_gradient_for_it(loss, freeze, folders):
    model = AlignerConfig("cross", pretrained=str(folders("siglip")))
    config = RunConfig(freeze=freeze, loss=LossConfig(loss), model=model, profile=1)
    aligner = build_aligner(config, torch.device("cpu"), is_new_run=True)
    build_loss(config.loss, aligner)
    assert not aligner.logit_bias.requires_grad


def test_chunks_give_the_bias_the_gradient_of_the_whole(folders, scenes_folder, tmp_path):
    """However many chunks a step is taken in."""
    results = {}
    for name, more in {"whole": {}, "chunks": {"chunk": 4}}.items():
        config = settings(
            scenes_folder, tmp_path / name, folders("siglip"), steps=2, loss=LossConfig("sigmoid"), ema=0.0, **more
        )
        train(config)
        results[name] = load_aligner(tmp_path / name, "cpu").logit_bias
    assert torch.allclose(results["whole"], results["chunks"], atol=1e-5)


# --- what is said ----------------------------------------------------------------------------------------------------


def test_an_estimate_counts_the_cells_that_a_study_will_have(monkeypatch, tmp_path, capsys, folders):
    plan = {"data": "somewhere", "settings": {"model": {"pretrained": str(folders("clip"))}}, "seeds": [0, 1]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan | {"variants": {"self": {}, "late": {}}}))
    monkeypatch.setattr("clipvisionalign.study.runner.estimate_study_time", lambda *_, **__: {"training": 60.0})
    assert main(["study", str(tmp_path / "plan.yaml"), "--dry-run"]) == 0
    assert "in all, for 6 cells" in capsys.readouterr().out


def test_tokens_are_counted_by_the_tokenizer_of_a_model_or_refused_without_its_weights(folders, scenes_folder, capsys):
    assert main(["check", str(scenes_folder), "--quick", "--tokens", str(folders("siglip"))]) == 0
    capsys.readouterr()
    for name in ("ViT-B/32", "nowhere/../here", "https://huggingface.co/openai/clip-vit-base-patch32"):
        assert main(["check", str(scenes_folder), "--quick", "--tokens", name]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"clipvisionalign: error: {name}: no tokenizer: ")
        assert "weights" not in error


def test_a_pretrained_model_has_no_figures_for_a_card(folders, tmp_path, capsys):
    assert main(["export", str(folders("clip")), "--huggingface", str(tmp_path / "out")]) == 1
    assert "measure it first: clipvisionalign train DATA --model.pretrained" in capsys.readouterr().err


@pytest.mark.slow
def test_transformers_prints_nothing_of_its_own(folders, tmp_path):
    """In a process of its own: what it prints, it prints once."""
    import subprocess
    import sys

    program = "import sys; from clipvisionalign.models.io import load_aligner; load_aligner(sys.argv[1], 'cpu')"
    done = subprocess.run(
        [sys.executable, "-c", program, str(folders("siglip"))], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    assert not done.stdout


@pytest.mark.slow
def test_an_export_knows_the_images_that_it_was_trained_on(tuned, folders, scenes_folder, tmp_path, capsys):
    """Of the run and of the one before it; and whoever may read a new file may read the weights."""
    train(settings(scenes_folder, tmp_path / "again", folders("clip"), init=str(tuned)))
    for run, trained in ((tuned, True), (tmp_path / "again", True), (folders("clip"), False)):
        out = tmp_path / f"export-{Path(run).name}"
        export_library_layout(run, out, "transformers")
        capsys.readouterr()
        assert main(["evaluate", str(out), "--data", str(scenes_folder), "--split", "train", "--json", "--quiet"]) == 0
        note = json.loads(capsys.readouterr().out).get("trained_on")
        assert ("was trained on these images" in note) if trained else note is None
        (tmp_path / "new").touch()
        assert {path.stat().st_mode for path in out.rglob("*") if path.is_file()} == {(tmp_path / "new").stat().st_mode}


def test_a_dev_split_too_small_for_intervals_is_measured_before_the_first_step_all_the_same(folders, tmp_path):
    data = write_scenes(tmp_path / "data", 12, size=64, splits={"train": 9, "dev": 2, "test": 1})
    train(settings(data, tmp_path / "run", folders("clip"), batch=4))
    start = json.loads((tmp_path / "run" / "results.json").read_text())["start"]["rsum"]
    assert start["value"] > 0
    assert (start["low"], start["high"]) == (None, None)


def test_to_start_from_a_run_over_a_pretrained_model_both_are_named(tuned, folders, scenes_folder, tmp_path):
    by_name = replace(
        settings(scenes_folder, tmp_path / "run", folders("clip")), model=AlignerConfig(), init=str(tuned)
    )
    with pytest.raises(ValueError, match=f"give --model.pretrained {folders('clip')} beside --init {tuned}"):
        train(by_name)
    with pytest.raises(FileNotFoundError, match=f"--init {tuned} starts from it, beside --model.pretrained"):
        train(settings(scenes_folder, tmp_path / "run", tuned))
