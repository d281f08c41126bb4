"""What a run owes to the one that it starts from: what is taken has the same meaning, what is frozen came from there,
what the other one saw is told, and what was begun from other weights is not taken for it."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_going_on import cut_off, silent

from clipvisionalign.cli import main
from clipvisionalign.images import ImageTransform
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.training.build import build_aligner
from clipvisionalign.training.train import resume, train


@pytest.fixture(scope="module")
def settings(tiny_settings):
    """Settings of a tiny run into a folder of this module's."""
    return tiny_settings("late", epochs=1, train_images=32)


@pytest.fixture(scope="module")
def runs(settings) -> dict[str, str]:
    """A finished run of some designs."""
    folders = {}
    for design in ("self", "sparse", "late", "cross"):
        config = settings(f"base-{design}", design, freeze="image", steps=2)
        train(config, silent)
        folders[design] = config.out
    return folders


def copied(run: str, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


# --- the command line takes its model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "flags", "design", "window"),
    [
        ("self", (), "self", 4),
        ("late", ("--model.design", "cross"), "cross", 4),
        ("sparse", (), "sparse", 4),
        ("late", ("--config", "{folder}/more.yaml"), "late", 4),
    ],
)
def test_the_model_of_the_run_need_not_be_given_again(
    base, flags, design, window, settings, runs, tmp_path, monkeypatch, capsys
):
    """Whatever is given counts more, from wherever the command is called."""
    source = Path(runs[base]).resolve()
    data = yaml.safe_load((source / "config.yaml").read_text())["data"]
    (tmp_path / "more.yaml").write_text("epochs: 1\nmodel:\n  late:\n    temperature: 0.1\n")
    monkeypatch.chdir(tmp_path)
    more = [flag.format(folder=tmp_path) for flag in flags]
    command = ["train", str(data), "--init", str(source), "--out", "new", "--steps=1", "--batch=8", "--augment=none"]
    assert main([*command, "--precision=float32", "--trackers=", *more]) == 0
    recorded = yaml.safe_load(Path("new/config.yaml").read_text())["model"]
    before = yaml.safe_load((source / "config.yaml").read_text())["model"]
    expected = before | {"design": design}
    if "--config" in flags:
        expected |= {"late": before["late"] | {"temperature": 0.1}}
    assert recorded == expected
    assert recorded["text_tower"]["window"] == window
    assert "the settings of its model are taken" in capsys.readouterr().err


# --- what is taken has the same meaning ------------------------------------------------------------------------------


def text_folder_with(change: str, source: Path, folder: Path) -> Path:
    """The text tower of the tests, with the same weights, and one thing of it changed that no weight's shape tells."""
    from transformers import BertTokenizerFast

    shutil.copytree(source, folder)
    vocabulary = (folder / "vocab.txt").read_text().split("\n")
    if change in ("words in another order", "capitals kept"):
        if change == "words in another order":
            (folder / "vocab.txt").write_text("\n".join([*vocabulary[:5], *vocabulary[:4:-1]]))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        kept = change == "capitals kept"
        BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=not kept).save_pretrained(folder)
        return folder
    changed = {
        "heads": {"num_attention_heads": 2}, "activation": {"hidden_act": "relu"}, "epsilon": {"layer_norm_eps": 0.1},
    }[change]  # fmt: skip
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | changed))
    return folder


@pytest.mark.parametrize("change", ["words in another order", "capitals kept", "heads", "activation", "epsilon"])
def test_another_text_tower_of_the_same_shape_is_refused(change, settings, runs, text_folder, tmp_path):
    config = settings(f"other {change}", init=runs["late"])
    folder = text_folder_with(change, text_folder, tmp_path / "text")
    model = replace(config.model, text_tower=replace(config.model.text_tower, name=str(folder)))
    with pytest.raises(ValueError, match=rf"--init {runs['late']}: other towers than this run's: .* or another --init"):
        train(replace(config, model=model), silent)


@pytest.mark.parametrize(
    ("base", "part", "change", "message"),
    [
        ("late", "text_tower", {"pooling": "first"}, "--model.text_tower.pooling mean"),
        ("sparse", "text_tower", {"window": 8}, "--model.text_tower.attention and --model.text_tower.window"),
        ("late", "image_tower", {"size": 60}, "--model.image_tower.size 64"),
        ("late", "image_tower", {"name": "test_resnet.r160_in1k", "size": 62}, "--model.image_tower.size 64"),
        ("cross", "fusion", {"heads": 4}, "--model.fusion.heads 2"),
    ],
)
def test_a_setting_that_gives_the_same_weights_another_meaning_is_refused(base, part, change, message, settings, runs):
    config = settings(f"other {part} {len(change)} {message[-4:]}", base, init=runs[base])
    model = replace(config.model, **{part: replace(getattr(config.model, part), **change)})
    with pytest.raises(ValueError, match=f"--init .*: other towers than this run's: .*give {message}"):
        train(replace(config, model=model), silent)


def test_images_scaled_otherwise_are_refused_and_what_changes_no_vector_is_not(settings, runs):
    from clipvisionalign.training.init_run import check_same_encodings, load_init_weights

    model = settings("").model
    own, other = (Aligner(model) for _ in range(2))
    for aligner in (own, other):
        load_init_weights(aligner, runs["late"])
    check_same_encodings(own, other, "there")
    for changed in ({"mean": (0.1, 0.2, 0.3)}, {"std": (0.1, 0.2, 0.3)}):
        other.image_tower.image_transform = ImageTransform(**{**vars(own.image_tower.image_transform), **changed})
        with pytest.raises(ValueError, match=r"images' .* give --model.image_tower.name"):
            check_same_encodings(own, other, "there")
    # Dropout, the length at which captions are cut, what late tokens are kept: how it is trained, not what it means.
    text = replace(model.text_tower, dropout=0.3, max_tokens=64)
    load_init_weights(
        Aligner(replace(model, dropout=0.5, text_tower=text, late=replace(model.late, keep_tokens=3))), runs["late"]
    )


def test_what_is_drawn_after_it_is_drawn_as_without_it(settings, runs, monkeypatch):
    config = settings("drawn", "cross", init=runs["late"], peft="lora")

    def built() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return build_aligner(config, torch.device("cpu"), is_new_run=True).state_dict()

    first = built()
    monkeypatch.setattr("clipvisionalign.training.init_run.check_same_encodings", lambda *_: None)
    second = built()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


# --- what is frozen came from there ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_stays_as_it_was_drawn_at_random(settings, runs):
    """Heads, late interaction and fusion, in any combination: trained, or what the other run has, or refused."""
    layers = [[], ["image_head.*"], ["late.*", "text_head.*"], ["*.position", "fusion.blocks*"], ["late.log_scale"]]
    frozen = ["image", "both", "none", "all"]
    refused = 0
    every = list(product(["", "self", "late", "cross"], ["self", "late", "cross"], frozen, layers))
    for base, design, freeze, some in random.Random(0).sample(every, 50):
        config = settings("frozen", design, init=runs.get(base, ""), freeze=freeze, freeze_layers=some)
        there = load_file(Path(runs[base]) / "model.safetensors") if base else {}
        try:
            aligner = build_aligner(config, torch.device("cpu"), is_new_run=True)
        except ValueError as error:
            # No such layer, or the way out.
            message = str(error)
            assert any(text in message for text in ("no parameter has such a name", "nothing is left", "give --init"))
            assert "give --init" not in message or f"--freeze{'_layers' if freeze != 'all' else ' all'}" in message
            refused += "give --init" in message
            continue
        for name, weight in aligner.named_parameters():
            drawn = name.startswith(("image_head.", "text_head.", "late.", "fusion."))
            if drawn and not weight.requires_grad and len(weight.unique()) > 1:
                assert torch.equal(weight, there[name]), (base, design, freeze, some, name)
    assert refused


def test_the_way_out_of_a_random_late_interaction_is_named(settings, runs):
    config = settings("from self", "cross", init=runs["self"], freeze="all")
    message = rf"would keep late as drawn .* --init {runs['self']} brings none of it: give --init a finished run of the design"
    with pytest.raises(ValueError, match=f"--freeze all {message} 'late', or --freeze both"):
        train(config, silent)
    with pytest.raises(ValueError, match=r"image_head, text_head, late as drawn at random .* there is no --init"):
        train(replace(config, init=""), silent)
    assert not (Path(config.out) / "config.yaml").exists()


# --- what the other one saw ------------------------------------------------------------------------------------------


def chosen_otherwise(run: Path) -> None:
    """A run of which a half of dev chose another epoch than all of dev: its dev figures are not out of sample."""
    results = json.loads((run / "results.json").read_text())
    results["chosen"]["epoch"]["halves"] = [1, 2]
    (run / "results.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_what_a_run_is_not_out_of_sample_for_stays_told_whatever_became_of_its_init(
    settings, runs, tmp_path, monkeypatch
):
    base = copied(runs["late"], tmp_path / "base")
    chosen_otherwise(base)
    undisturbed = settings("undisturbed", "cross", init=str(base), freeze="all")
    expected = train(undisturbed, silent)["chosen"]
    assert "whose epoch was chosen by all of these images" in expected["with_init"]
    for became in ("gone", "another", "unfinished"):
        stopped = replace(undisturbed, out=f"{undisturbed.out} {became}")
        cut_off(stopped, monkeypatch, before=2)
        if became == "gone":
            base.rename(tmp_path / "elsewhere")
        elif became == "another":
            shutil.copytree(runs["self"], base, dirs_exist_ok=True)
        else:
            (base / "results.json").unlink()
        chosen = resume(stopped.out, silent)["chosen"]
        assert chosen["with_init"] == expected["with_init"]
        assert chosen["figures"] == expected["figures"]
        shutil.rmtree(base, ignore_errors=True)
        copied(runs["late"], base)
        chosen_otherwise(base)


def test_a_run_of_an_earlier_version_whose_init_is_gone_says_that_it_does_not_know(
    settings, runs, tmp_path, monkeypatch
):
    base = copied(runs["late"], tmp_path / "base")
    stopped = settings("earlier", "cross", init=str(base), freeze="all")
    cut_off(stopped, monkeypatch, before=2)
    (Path(stopped.out) / "init.json").unlink(missing_ok=True)
    shutil.rmtree(base)
    assert "whether its epoch was chosen by these images is unknown" in resume(stopped.out, silent)["chosen"]["figures"]


@pytest.mark.slow
def test_an_unfinished_run_is_no_init_and_a_model_saved_alone_is(settings, tiny_model, tmp_path, monkeypatch):
    stopped = settings("stopped", epochs=2)
    cut_off(stopped, monkeypatch)
    assert (Path(stopped.out) / "model.safetensors").is_file()
    config = settings("from stopped", "cross", init=stopped.out)
    with pytest.raises(ValueError, match=f"not finished .*: finish it first, with .* --resume {stopped.out}"):
        train(config, silent)
    assert not Path(config.out).exists()
    resume(stopped.out, silent)
    train(config, silent)
    Aligner(tiny_model("late")).save(tmp_path / "alone")
    train(replace(config, init=str(tmp_path / "alone"), out=f"{config.out} alone"), silent)


def swapped(data: Path, folder: Path) -> Path:
    """The same images, those of dev for training."""
    shutil.copytree(data, folder)
    head, *rows = (folder / "metadata.csv").read_text().splitlines()
    other = {"train": "test", "dev": "train", "test": "dev"}
    rows = [",".join([*row.split(",")[:-1], other[row.split(",")[-1]]]) for row in rows]
    (folder / "metadata.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder


@pytest.mark.slow
def test_an_init_that_was_trained_on_the_dev_images_is_told_through_others_and_when_it_is_gone(
    settings, scenes_folder, tmp_path
):
    data = swapped(scenes_folder, tmp_path / "swapped")
    first = settings("on dev", data=str(data), train_images=0, epochs=1, batch=8)
    train(first, silent)
    said: list[str] = []
    second = settings("from on dev", init=first.out)
    figures = train(second, said.append)["chosen"]["figures"]
    message = f"{first.out}, which the run starts from, was trained on these images"
    assert message in figures
    assert any(line.startswith(f"warning: {message}") for line in said)
    # What that one started from may be gone.
    shutil.rmtree(first.out)
    assert message in train(settings("from that", init=second.out), silent)["chosen"]["figures"]
    assert "trained on" not in train(settings("from none"), silent)["chosen"]["figures"]


# --- an unfinished run ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("split", ["dev", "test"])
def test_figures_and_audits_of_an_unfinished_run_say_that_it_is(split, settings, runs, monkeypatch, capsys):
    stopped = settings(f"unfinished {split}", epochs=2)
    cut_off(stopped, monkeypatch)
    for command in ("evaluate", "audit"):
        main([command, stopped.out, "--split", split, "--json"])
        output = json.loads(capsys.readouterr().out)
        assert output["unfinished"].startswith(f"{stopped.out} is not finished (it has no results.json)")
        assert "weights of its pairs' parts that are not chosen yet" in output["unfinished"]
        assert "weights" not in output.get("in_sample", "")
        main([command, stopped.out, "--split", split])
        assert "is not finished (it has no results.json)" in " ".join(capsys.readouterr().out.split())
        main([command, runs["late"], "--split", split, "--json"])
        assert "unfinished" not in json.loads(capsys.readouterr().out)
