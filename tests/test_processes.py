"""Two processes are one: same gradients, same curve, each thing once. Real processes, by torchrun, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.models.aligner import load_aligner
from clipvisionalign.retrieval import evaluate

SCRIPT = Path(__file__).with_name("many_processes.py")


def run(count: int, work: str, given: dict) -> str:
    """`many_processes.py` in `count` processes; what they said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, str(SCRIPT), work, json.dumps(given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr + done.stdout


def worst(first: dict, second: dict) -> float:
    # A wrapper has zeros where a process alone has no gradient at all.
    zero = torch.zeros(())
    norm = torch.cat([g.flatten() for g in first.values()]).norm()
    return max(float((first.get(n, zero) - second.get(n, zero)).norm() / norm) for n in {*first, *second})


@pytest.mark.parametrize(
    ("design", "loss", "more"),
    [
        ("self", "softmax", {}), ("self", "sigmoid", {}), ("self", "hardest", {}), ("self", "hard_weighted", {}),
        ("self", "softmax", {"chunk": 5}), ("self", "sigmoid", {"shard": True}),
        ("self", "softmax", {"shard": True, "chunk": 5}),
        ("self", "softmax", {"identity": "caption"}), ("late", "softmax", {}), ("late", "softmax", {"shard": True, "chunk": 5}),
    ],
)  # fmt: skip
def test_two_processes_have_the_gradients_of_one(tmp_path, scenes_folder, tiny_model, design, loss, more):
    given = {
        "data": str(scenes_folder),
        "model": asdict(tiny_model(design)),
        "loss": loss,
        "out": str(tmp_path / "one"),
        "identity": more.get("identity", "auto"),
    }
    run(1, "gradients", given)
    run(2, "gradients", {**given, **more, "out": str(tmp_path / "two")})
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert two["images"] == one["images"] == 24
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert worst(one["gradients"], two["gradients"]) < 1e-5


def curve(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line] + [line["train_loss"] for line in lines if "dev" in line]


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


def test_replicated_and_sharded_runs_have_the_curve_of_one_process(tmp_path, settings):
    run(1, "train", settings("one"))
    said = run(2, "train", settings("two"))
    assert said.count("best epoch") == 1
    run(2, "train", settings("sharded", shard=True))
    one, two, sharded = (curve(tmp_path / name) for name in ("one", "two", "sharded"))
    assert len(one) > 3
    assert two == pytest.approx(one, abs=1e-4)
    assert sharded == pytest.approx(one, abs=1e-4)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two", "sharded")]
    assert results[0]["images"] == results[1]["images"] == results[2]["images"]
    assert results[1]["rsum"]["value"] == pytest.approx(results[0]["rsum"]["value"], abs=10)


def test_a_sharded_checkpoint_goes_on_in_one_process_and_in_two(tmp_path, settings):
    import shutil

    from clipvisionalign.training.train import resume

    # With a late interaction: what it learns is used outside of the sharded model, and stays whole.
    late = {"shard": True, "model": {**settings("")["model"], "design": "late"}}
    run(2, "train", settings("whole", **late))
    # Stopped by its own patience of one step: a run that is asked to stop writes its checkpoint and leaves.
    given = settings("stopped", **late)
    run(2, "stop", {**given, "after": 4})
    folder = tmp_path / "stopped"
    (checkpoint,) = sorted((folder / "checkpoints").glob("*.shards"))[-1:]
    assert len(list(checkpoint.glob("*.safetensors"))) == 2
    shutil.copytree(folder, tmp_path / "alone")
    config = (tmp_path / "alone" / "config.yaml").read_text()
    (tmp_path / "alone" / "config.yaml").write_text(config.replace("shard: true", "shard: false"))
    run(2, "train", {"resume": str(folder)})
    said = []
    resume(tmp_path / "alone", said.append)
    assert any("goes on after step 4" in line for line in said)
    expected = curve(tmp_path / "whole")
    assert curve(folder) == pytest.approx(expected, abs=1e-4)
    assert curve(tmp_path / "alone") == pytest.approx(expected, abs=1e-4)


def test_a_fusion_trains_and_is_measured_in_two_processes(tmp_path, settings, scenes_folder, tiny_model):
    """Late interaction and fusion have gradients of their own, which no wrapper averages: all processes have the same."""
    run(2, "train", settings("cross", model=asdict(tiny_model("cross")), epochs=2))
    results = json.loads((tmp_path / "cross" / "results.json").read_text())
    # Measured by both together, each pair once: the figures are those of one process.
    dev = read_captioned_images(scenes_folder).split("dev")
    found = evaluate(load_aligner(tmp_path / "cross"), dev.images, dev.captions, dev.caption_image, candidates=5)
    for name in ("dual", "reranked"):
        assert results[name]["rsum"] == found.to_dict()[name]["rsum"]
    lines = [json.loads(line) for line in (tmp_path / "cross" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train_fusion_loss"] for line in lines if "dev" in line]
    assert losses[1] < losses[0]
