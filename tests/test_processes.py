"""Two processes are one: same gradients, same curve, each thing once. Real processes over gloo; some of them by torchrun."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import many_processes
import pytest
import torch
from forked import several
from tolerance import TIMES, rounding, unit_roundoff

from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.models.io import load_aligner
from clipvisionalign.retrieval import evaluate


def run(count: int, work: str, given: dict, out: Path) -> str:
    """A work of `many_processes.py` in `count` processes; what they said."""
    return several(count, many_processes.work, work, given, out=out)


def torchrun(count: int, work: str, given: dict) -> str:
    """The same as a user starts it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [sys.executable, *launcher, many_processes.__file__, work, json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


def worst(first: dict, second: dict) -> float:
    # A wrapper has zeros where a process alone has no gradient at all.
    zero = torch.zeros(())
    norm = torch.cat([g.flatten() for g in first.values()]).norm()
    return max(float((first.get(n, zero) - second.get(n, zero)).norm() / norm) for n in {*first, *second})


@pytest.fixture(scope="module")
def alone(tmp_path_factory, scenes_folder, tiny_model):
    """Of a design and a loss: what a work is given, and the gradients of one process, in float32 and in float64."""

    @functools.cache
    def gradients_alone(design: str, loss: str, identity: str) -> tuple[dict, dict, dict]:
        folder = tmp_path_factory.mktemp("alone")
        given = {"data": str(scenes_folder), "model": asdict(tiny_model(design)), "loss": loss, "identity": identity}
        for exact in (False, True):
            many_processes.work("gradients", {**given, "exact": exact, "out": str(folder / f"{exact}")})
        return given, *(torch.load(folder / name, weights_only=True) for name in ("False", "True"))

    return gradients_alone


@pytest.mark.parametrize(
    ("design", "loss", "more"),
    [
        ("self", "softmax", {}), ("self", "sigmoid", {}), ("self", "hardest", {}), ("self", "hard_weighted", {}),
        ("self", "softmax", {"chunk": 5}), ("self", "sigmoid", {"shard": True}),
        ("self", "softmax", {"shard": True, "chunk": 5}),
        ("self", "softmax", {"identity": "caption"}), ("late", "softmax", {}), ("late", "softmax", {"shard": True, "chunk": 5}),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path, alone, design, loss, more):
    given, one, exact = alone(design, loss, more.get("identity", "auto"))
    run(2, "gradients", {**given, **more, "out": str(tmp_path / "two")}, tmp_path / "said")
    two = torch.load(tmp_path / "two", weights_only=True)
    assert 20 < two["images"] == one["images"] <= 24
    assert two["loss"] == pytest.approx(exact["loss"], rel=rounding(24 * 120))
    error = worst(exact["gradients"], one["gradients"])
    assert error < unit_roundoff(torch.float32) ** 0.5
    assert worst(exact["gradients"], two["gradients"]) < TIMES * error


def assert_same_curve(actual: list[float], expected: list[float]) -> None:
    """Losses over 16 images and 80 captions; each step adds its rounding to that of the steps before it."""
    allowed = rounding(16 * 80, size=max(expected), steps=len(expected))
    assert actual == pytest.approx(expected, abs=allowed)


def curve(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line] + [line["train_loss"] for line in lines if "dev" in line]


def dev_losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["dev_loss"] for line in lines if "dev_loss" in line]


@pytest.fixture
def settings(tmp_path, scenes_folder, tiny_model):
    def made(name: str, **more) -> dict:
        model = asdict(tiny_model("self"))
        # Dropout differs from process to process; without it the curves have to be the same.
        model["dropout"] = model["text_tower"]["dropout"] = 0.0
        return {
            "data": str(scenes_folder), "out": str(tmp_path / name), "model": model, "epochs": 3, "batch": 16,
            "augment": "none", "precision": "float32", "cache": str(tmp_path / "cache"), "trackers": "",
            "device": "cpu", "checkpoint_minutes": 0.0, **more,
        }  # fmt: skip

    return made


@pytest.mark.slow
def test_replicated_and_sharded_runs_have_the_curve_of_one_process(tmp_path, settings):
    few = {"train_images": 32}
    many_processes.work("train", settings("one", **few))
    said = torchrun(2, "train", settings("two", **few))
    assert said.count("best epoch") == 1
    run(2, "train", settings("sharded", shard=True, **few), tmp_path / "said")
    one, two, sharded = (curve(tmp_path / name) for name in ("one", "two", "sharded"))
    assert len(one) > 3
    assert_same_curve(two, one)
    assert_same_curve(sharded, one)
    losses = [dev_losses(tmp_path / name) for name in ("one", "two", "sharded")]
    assert len(losses[0]) == 3
    assert_same_curve(losses[1], losses[0])
    assert_same_curve(losses[2], losses[0])
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two", "sharded")]
    assert results[0]["images"] == results[1]["images"] == results[2]["images"]
    # Of 15 images and 75 captions one image and two captions may have changed places with their next.
    one, two = (each["chosen"]["model_in_sample"]["rsum"]["value"] for each in results[:2])
    assert two == pytest.approx(one, abs=100 / 15 + 200 / 75)


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_in_one_process_and_in_two(tmp_path, settings):
    import shutil

    from clipvisionalign.training.train import resume

    # With a late interaction: what it learns is used outside of the sharded model, and stays whole.
    late = {"shard": True, "model": {**settings("")["model"], "design": "late"}, "train_images": 32}
    run(2, "train", settings("whole", **late), tmp_path / "said")
    # Stopped by its own patience of one step: a run that is asked to stop writes its checkpoint and leaves.
    given = settings("stopped", **late)
    run(2, "stop", {**given, "after": 4}, tmp_path / "said")
    folder = tmp_path / "stopped"
    (checkpoint,) = sorted((folder / "checkpoints").glob("*.shards"))[-1:]
    assert len(list(checkpoint.glob("*.safetensors"))) == 2
    shutil.copytree(folder, tmp_path / "alone")
    config = (tmp_path / "alone" / "config.yaml").read_text()
    (tmp_path / "alone" / "config.yaml").write_text(config.replace("shard: true", "shard: false"))
    run(2, "train", {"resume": str(folder)}, tmp_path / "said")
    said = []
    resume(tmp_path / "alone", said.append)
    assert any("resumes after step 4" in line for line in said)
    expected = curve(tmp_path / "whole")
    assert_same_curve(curve(folder), expected)
    assert_same_curve(curve(tmp_path / "alone"), expected)


@pytest.mark.slow
def test_a_fusion_trains_and_is_measured_in_two_processes(tmp_path, settings, scenes_folder, tiny_model):
    """Late interaction and fusion have gradients of their own, which no wrapper averages: all processes have the same."""
    run(2, "train", settings("cross", model=asdict(tiny_model("cross")), epochs=2), tmp_path / "said")
    results = json.loads((tmp_path / "cross" / "results.json").read_text())
    # Measured by both together, each pair once: the figures are those of one process.
    dev = read_captioned_images(scenes_folder).split("dev")
    evaluation = evaluate(load_aligner(tmp_path / "cross"), dev.images, dev.captions, dev.caption_image, candidates=5)
    for name in ("dual", "reranked"):
        assert results["chosen"]["model_in_sample"][name]["rsum"] == evaluation.to_dict()[name]["rsum"]
    lines = [json.loads(line) for line in (tmp_path / "cross" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_fusion_loss"] for line in lines if "dev" in line]
    assert losses[1] < losses[0]


def test_the_others_wait_for_the_first_longer_than_a_collective_may_take(tmp_path):
    run(2, "wait", {"out": str(tmp_path / "found")}, tmp_path / "said")
    assert [(tmp_path / f"found.{number}").read_text() for number in (0, 1)] == ["done", "done"]


@pytest.mark.slow
def test_a_batch_of_three_on_two_processes_takes_the_steps_that_were_planned(tmp_path, settings):
    run(2, "train", settings("three", batch=3, epochs=1, train_images=13), tmp_path / "said")
    results = json.loads((tmp_path / "three" / "results.json").read_text())
    assert (results["steps"], results["steps_skipped"], results["images_left_out"]) == (5, 0, 0)
    many_processes.work("train", settings("alone", batch=3, epochs=1, train_images=13))
    assert_same_curve(curve(tmp_path / "three"), curve(tmp_path / "alone"))


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_fusion_is_trained_alone_in_two_processes(tmp_path, settings, tiny_model, shard):
    late = settings("late", model=asdict(tiny_model("late")), epochs=1, steps=1)
    many_processes.work("train", late)
    more = {"model": asdict(tiny_model("cross")), "freeze": "all", "epochs": 1, "train_images": 32, "shard": shard}
    more |= {"init": late["out"]}
    run(2, "train", settings("fusion", **more), tmp_path / "said")
    results = json.loads((tmp_path / "fusion" / "results.json").read_text())
    assert (results["steps"], results["steps_skipped"]) == (2, 0)
    # And it goes on.
    run(2, "stop", settings("stopped", **more) | {"after": 1}, tmp_path / "said")
    assert not (tmp_path / "stopped" / "results.json").exists()
    run(2, "train", {"resume": str(tmp_path / "stopped")}, tmp_path / "said")
    assert_same_curve(curve(tmp_path / "stopped"), curve(tmp_path / "fusion"))


def test_what_several_processes_cannot_do_is_refused_before_the_first_step(tmp_path, settings):
    for more, message in (
        ({"freeze": "none"}, "starts at random and has batch norms, whose statistics 2 processes would each gather"),
        ({"batch": 2, "train_images": 3, "freeze": "text", "model": settings("")["model"]}, "starts at random"),
    ):
        with pytest.raises(AssertionError, match="starts at random") as caught:
            run(2, "train", settings("refused", **more), tmp_path / "said")
        assert message in str(caught.value)
        assert not (tmp_path / "refused" / "results.json").exists()
