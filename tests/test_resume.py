"""A run that is stopped, whichever way, goes on and ends as the undisturbed one: same weights, each step recorded once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from forked import Forked, command

from clipvisionalign.training.checkpoint import (
    load_last_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.train import resume, train


def settings(data: Path, out: Path, model, **more) -> RunConfig:
    """Dropout in both towers, views drawn at random, the image tower's features on disk."""
    return RunConfig(
        **{
            "data": str(data), "out": str(out), "model": model, "epochs": 3, "batch": 16, "augment": "flip+crop",
            "views": 2, "precision": "float32", "cache": str(out.parent / "cache"), "checkpoint_minutes": 0.0, **more,
        }
    )  # fmt: skip


def same_run(run: Path, other: Path) -> bool:
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (run, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def records(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "time")} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, scenes_folder, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(settings(scenes_folder, folder, tiny_model("cross")), say=lambda line: None)
    return folder


def start(run: Path) -> Forked:
    """The command that goes on with a run, in a process of its own."""
    return Forked(command, "train", "--resume", str(run), out=run.with_suffix(".txt"))


def begin(config: RunConfig) -> Path:
    """A run folder that holds its settings and nothing else, as a kill in the first second leaves it."""
    out = Path(config.out)
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    return out


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path, undisturbed, scenes_folder, tiny_model):
    run = begin(settings(scenes_folder, tmp_path / "run", tiny_model("cross"), cache=str(undisturbed.parent / "cache")))
    rng = random.Random(0)
    kills = 0
    while kills < 3:
        process = start(run)
        there = {path.name for path in (run / "checkpoints").glob("step-*.pt")}
        # Once it makes progress, at any moment, the writing of a checkpoint included.
        while {path.name for path in (run / "checkpoints").glob("step-*.pt")} <= there and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is not None:
            break
        process.kill()
        assert process.poll() == -signal.SIGKILL
        kills += 1
    assert kills
    said = start(run).ended()
    assert "resumes after step" in said
    assert same_run(run, undisturbed)
    assert records(run) == records(undisturbed)
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_asked_to_stop_it_finishes_its_step_and_says_how_to_go_on(tmp_path, undisturbed, scenes_folder, tiny_model):
    run = begin(settings(scenes_folder, tmp_path / "run", tiny_model("cross"), cache=str(undisturbed.parent / "cache")))
    process = start(run)
    while not list((run / "checkpoints").glob("step-*.pt")) and process.poll() is None:
        time.sleep(0.01)
    process.signal(signal.SIGINT)
    assert process.wait(60) == 130, process.said
    said = process.said
    assert f"resume with: clipvisionalign train --resume {run}" in said
    assert "Traceback" not in said
    said = []
    resume(run, said.append)
    assert same_run(run, undisturbed)
    assert records(run) == records(undisturbed)
    assert resume(run, said.append)["rsum"] == json.loads((undisturbed / "results.json").read_text())["rsum"]
    assert said[-1].endswith("finished already")


def test_a_checkpoint_that_does_not_read_back_is_skipped_with_a_word(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.full((100,), float(step))})
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert files == ["step-000000002.pt", "step-000000003.pt"]
    said = []
    assert load_last_checkpoint(tmp_path, said.append)["step"] == 3
    newest = tmp_path / "checkpoints" / files[-1]
    newest.write_bytes(newest.read_bytes()[:300])
    assert load_last_checkpoint(tmp_path, said.append)["step"] == 2
    assert "does not read back" in said[0]
    (tmp_path / "checkpoints" / files[0]).write_bytes(b"")
    assert load_last_checkpoint(tmp_path, said.append) is None


def test_a_sharded_checkpoint_that_is_replaced_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """Killed while it removes the former checkpoint of the same step, or one that is no longer kept."""
    from clipvisionalign.training import checkpoint

    def save(step: int) -> None:
        checkpoint.save_sharded(
            tmp_path, step, {"weights": torch.full((4,), float(step))}, {}, Distributed(torch.device("cpu"))
        )

    def cut_off(folder: Path, *_: object, **__: object) -> None:
        if Path(folder).exists():
            next(path for path in Path(folder).iterdir() if path.name != checkpoint.REST_FILE).unlink()
            raise KeyboardInterrupt

    for step in (1, 2):
        save(step)
    for step, left in ((2, 2), (3, 3)):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint.shutil, "rmtree", cut_off)
            with pytest.raises(KeyboardInterrupt):
                save(step)
        state = load_last_checkpoint(tmp_path, print)
        weights = torch.zeros(4)
        checkpoint.load_sharded(Path(state["shards"]), {"weights": weights})
        assert weights[0] == left
        save(step)
        # And nothing of it stays.
        assert {path.suffix for path in (tmp_path / "checkpoints").iterdir()} == {".shards"}


@pytest.mark.parametrize("kill", range(6))
def test_a_step_that_is_written_again_has_a_checkpoint_at_every_moment(tmp_path, monkeypatch, kill):
    """Killed before the rename of this number, of those after the first writing."""
    from clipvisionalign.training import checkpoint

    def save(value: float, step: int = 1) -> None:
        tensors = {"weights": torch.full((4,), value)}
        checkpoint.save_sharded(tmp_path, step, tensors, {"value": value}, Distributed(torch.device("cpu")))

    def values() -> list[float]:
        return [torch.load(path / checkpoint.REST_FILE)["value"] for path in checkpoint.list_checkpoints(tmp_path)]

    save(1.0)
    renames, replaced = 0, Path.replace

    def cut_off(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == kill + 1:
            raise KeyboardInterrupt
        # All that is there between two renames reads back, the newest last.
        assert values() in ([1.0], [1.0, 2.0], [2.0], [2.0, 3.0], [3.0], [1.0, 3.0])
        return replaced(path, target)

    monkeypatch.setattr(Path, "replace", cut_off)
    for value in (2.0, 3.0):
        with contextlib.suppress(KeyboardInterrupt):
            save(value)
        assert values()
    monkeypatch.undo()
    save(4.0)
    assert values() == [4.0]
    # One of each kind, of one step, that lose their names one after the other.
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000000001.shards"}
    save_checkpoint(tmp_path, 1, {"value": 5.0})
    for step in (2, 3):
        save(float(step), step)
    assert values() == [2.0, 3.0]


@pytest.mark.slow
def test_a_run_killed_twice_before_its_first_checkpoint_can_be_resumed(
    tmp_path, undisturbed, scenes_folder, tiny_model, monkeypatch
):
    from clipvisionalign.training import trainer, trainer_setup

    run = begin(settings(scenes_folder, tmp_path / "run", tiny_model("cross"), cache=str(undisturbed.parent / "cache")))

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    for owner, function_name in (
        (trainer_setup, "open_data"),
        (trainer_setup, "pin_revisions"),
        (trainer, "forward_backward"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, function_name, cut_off)
            with pytest.raises(KeyboardInterrupt):
                resume(run, say=lambda line: None)
    resume(run, say=lambda line: None)
    assert same_run(run, undisturbed)
    assert records(run) == records(undisturbed)
    # Killed once it had its results, before it had tidied up.
    (run / "checkpoints").mkdir()
    resume(run, say=lambda line: None)
    assert not (run / "checkpoints").exists()


def test_a_model_whose_writing_was_killed_leaves_nothing_once_it_is_written_again(tmp_path, tiny_model, monkeypatch):
    """safetensors writes a file of another name beside the one that is wanted."""
    import safetensors.torch

    from clipvisionalign.models.aligner import Aligner

    aligner = Aligner(tiny_model("self"))
    aligner.save(tmp_path / "whole")

    def killed(state: dict, path: Path) -> None:
        (path.parent / ".tmp123").write_bytes(b"half of it")
        os._exit(9)

    process = os.fork()
    if not process:
        monkeypatch.setattr(safetensors.torch, "save_file", killed)
        aligner.save(tmp_path / "killed")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    aligner.save(tmp_path / "killed")
    undisturbed, again = ({path.name for path in (tmp_path / name).rglob("*")} for name in ("whole", "killed"))
    assert again == undisturbed


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})

    # A device that is always full, behind the name that is written to.
    (tmp_path / "checkpoints" / "step-000000002.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left|could not be written"):
        save_checkpoint(tmp_path, 2, {"weights": torch.zeros(1 << 20)})
    assert load_last_checkpoint(tmp_path, print)["step"] == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000001.pt"]


def test_random_states_come_back():
    import numpy as np

    states = random_states()
    first = torch.rand(3), np.random.rand(3), [random.random() for _ in range(3)]
    torch.rand(5), np.random.rand(5), random.random()
    restore_random_states(states)
    assert torch.equal(torch.rand(3), first[0])
    assert (np.random.rand(3) == first[1]).all()
    assert [random.random() for _ in range(3)] == first[2]


def test_other_data_other_settings_and_no_run_are_refused(tmp_path, scenes_folder, tiny_model, capsys):
    from clipvisionalign.cli import main
    from clipvisionalign.data.captioned import DataError

    with pytest.raises(FileNotFoundError, match="not a run folder"):
        resume(tmp_path)
    assert main(["train", "--resume", str(tmp_path), "--epochs", "9"]) == 1
    assert "it takes no others" in capsys.readouterr().err
    config = settings(scenes_folder, tmp_path / "run", tiny_model("self"), cache=str(tmp_path / "cache"))
    run = begin(config)
    save_checkpoint(run, 1, {"opened": {"train": {"captions": "others"}}, "precision": "float32"})
    with pytest.raises(DataError, match="not the train data"):
        resume(run, say=lambda line: None)


def test_a_run_stopped_after_its_last_epoch_is_measured_and_ends(tmp_path, scenes_folder, tiny_model, monkeypatch):
    """Killed between the last checkpoint and results.json: nothing is left to train."""
    from clipvisionalign.training import train as training
    from clipvisionalign.training import trainer
    from clipvisionalign.training.config import RunConfig

    config = RunConfig(
        data=str(scenes_folder), out=str(tmp_path / "run"), model=tiny_model("self"), epochs=1, batch=16, augment="none",
        precision="float32", cache=str(tmp_path / "cache"), trackers="",
    )  # fmt: skip

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "evaluate_run", cut_off)
        with pytest.raises(KeyboardInterrupt):
            training.train(config, lambda line: None)
    assert not (tmp_path / "run" / "results.json").exists()
    results = training.resume(tmp_path / "run", lambda line: None)
    assert results["steps"] > 0
    assert (tmp_path / "run" / "results.json").is_file()
