"""The commands as a person types them: real processes, their output, their exit status, their time to answer."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clipvisionalign.cli import COMMANDS, main


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "clipvisionalign", *arguments], capture_output=True, text=True)


def seconds(*commands: tuple[str, ...]) -> list[float]:
    """Of the processor, the least of four of each, in turns: what the command needs, not what else the machine does."""
    taken: list[list[float]] = [[] for _ in commands]
    for _ in range(4):
        for command, own in zip(commands, taken, strict=True):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            own.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return [min(own) for own in taken]


def test_the_import_is_light():
    """Beside what an interpreter needs that imports NumPy, which no command of ours is to need before its work."""
    numpy, imported, help_seconds = seconds(
        ("-c", "import numpy"), ("-c", "import clipvisionalign"), ("-m", "clipvisionalign", "--help")
    )
    assert imported < numpy
    assert help_seconds < 1.5 * numpy
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, clipvisionalign.cli; print('torch' in sys.modules, 'numpy' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded.stdout.split() == ["False", "False"]


@pytest.mark.slow
def test_help_lists_every_command_and_each_explains_itself():
    completed = run("--help")
    assert completed.returncode == 0
    for name, (help_text, _) in COMMANDS.items():
        assert name in completed.stdout
        assert help_text.split(":")[0].split()[0] in completed.stdout
    for name in ("scenes", "check", "evaluate", "audit"):
        own = run(name, "--help")
        assert own.returncode == 0
        assert f"clipvisionalign {name}" in own.stdout
    settings = run("train", "--help")
    for name in ("--model.design", "--model.image_tower.name", "--text_lr", "--freeze", "the data set"):
        assert name in settings.stdout


def test_no_command_and_unknown_command():
    assert run().returncode == 2
    unknown = run("fly")
    assert unknown.returncode == 2
    assert "invalid choice: 'fly'" in unknown.stderr
    assert run("--version").stdout.startswith("clipvisionalign 0.")


@pytest.mark.parametrize("design", ["self", "late", "cross"])
def test_evaluate_prints_json_alone_under_the_documented_keys(tiny_runs, design, capsys):
    assert main(["evaluate", str(tiny_runs[design]), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    blocks = [output, output["dual"], output["reranked"]] if design == "cross" else [output]
    assert {"run", "data", "split"} <= set(output)
    # By these images the epoch was chosen; the figure of other images needs no such word.
    own = json.loads((tiny_runs[design] / "results.json").read_text())
    assert "is in-sample" in output["in_sample"]
    assert f"{own['rsum']['value']:.1f}" in output["in_sample"]
    assert ("weights" in output["in_sample"]) == (design != "self")
    assert output["rsum"] == own["chosen"]["model_in_sample"]["rsum"]
    for block in blocks:
        assert (block["images"], block["captions"]) == (15, 75)
        assert set(block["rsum"]) == {"value", "low", "high"}
        for way in ("image_to_text", "text_to_image"):
            names = {"recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank", "map", "map_at_r"}
            assert set(block[way]) == names
            for figure in block[way].values():
                assert figure["low"] <= figure["value"] <= figure["high"]
            for k in (1, 5, 10):
                assert 0 <= block[way][f"recall_at_{k}"]["value"] <= 1
        recalls = [
            block[way][f"recall_at_{k}"]["value"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)
        ]
        assert block["rsum"]["value"] == pytest.approx(100 * sum(recalls))


@pytest.mark.slow
def test_figures_of_training_images_say_that_they_are(tiny_runs, scenes_folder, tmp_path, tiny_model, capsys):
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train

    def note(run: Path, *more: str) -> str | None:
        assert main(["evaluate", str(run), "--json", *more]) == 0
        return json.loads(capsys.readouterr().out).get("trained_on")

    run = tiny_runs["self"]
    expected = "the run was trained on these images: figures of training images, which do not generalise to others"
    assert note(run, "--split", "train") == expected
    assert note(run) is None
    assert note(run, "--split", "test") is None
    # The same images in another place.
    copy = shutil.copytree(scenes_folder, tmp_path / "copy")
    assert note(run, "--split", "train", "--data", str(copy)) == expected
    assert note(run, "--split", "train", "--identity", "caption", "--data", str(copy)) == expected
    # With other captions they are the same images.
    table = (copy / "metadata.csv").read_text()
    (copy / "metadata.csv").write_text(table.replace("circle", "ring"))
    assert note(run, "--split", "train", "--data", str(copy)) == expected
    assert main(["evaluate", str(run), "--split", "train"]) == 0
    assert expected in " ".join(capsys.readouterr().out.split())
    # Some of them, and those of a run that it starts from.
    config = RunConfig(
        data=str(scenes_folder), out=str(tmp_path / "run"), model=tiny_model(), epochs=1, batch=16, augment="none", steps=1,
        precision="float32", cache=str(tmp_path / "cache"), trackers="", train_images=40,
    )  # fmt: skip
    train(config, say=lambda line: None)
    assert note(tmp_path / "run", "--split", "train").startswith("the run was trained on 40 of these 94 images: ")
    train(replace(config, data=str(copy), init=str(run), out=str(tmp_path / "init")), say=lambda line: None)
    assert note(tmp_path / "init", "--split", "train", "--data", str(scenes_folder)).startswith(
        f"{run}, which the run starts from, was trained on these images: "
    )


def test_evaluate_and_audit_as_tables(tiny_runs, capsys):
    assert main(["evaluate", str(tiny_runs["cross"]), "--candidates", "3"]) == 0
    stdout = capsys.readouterr().out
    for text in ("R@1", "re-ranked", "re-ranking ", "by depth", "ms per query"):
        assert text in stdout
    assert main(["audit", str(tiny_runs["self"]), "--sample", "12"]) == 0
    stdout = capsys.readouterr().out
    assert "the audit passed" in stdout
    assert "splits apart" in stdout


def test_audit_as_json_on_other_data(tiny_runs, scenes_folder, capsys):
    status = main(["audit", str(tiny_runs["sparse"]), "--data", str(scenes_folder), "--split", "train", "--json"])
    output = json.loads(capsys.readouterr().out)
    assert status == (0 if output["passed"] else 1)
    assert {check["name"].split(" (")[0] for check in output["checks"]} == {
        "alone", "alone, other images before", "rectangular", "new captions", "shuffled partners", "blank captions",
        "splits apart",
    }  # fmt: skip
    assert "dealt to mirrored images" in next(c["meaning"] for c in output["checks"] if c["name"].startswith("new"))


def test_three_lines(tiny_runs, tmp_path):
    from PIL import Image

    from clipvisionalign import load_aligner

    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (50, 40), "green").save(tmp_path / name)
    aligner = load_aligner(tiny_runs["self"])
    images = [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    scores = aligner.score(images, ["a dog on the grass", "two people at a table"])
    assert scores.shape == (2, 2)


def test_brackets_in_the_name_of_a_run_are_no_markup(tiny_runs, scenes_folder, tmp_path, capsys):
    import shutil

    run = tmp_path / "[red]a[b]"
    shutil.copytree(tiny_runs["self"], run)
    assert main(["evaluate", str(run), "--data", str(scenes_folder)]) == 0
    printed = capsys.readouterr().out
    assert "[red]a[b]" in "".join(printed.split())
