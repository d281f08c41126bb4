"""What one of several processes cannot do ends on all of them, with the error that names it. Real processes over gloo."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import test_processes
from test_processes import run

from clipvisionalign import read_captioned_images
from clipvisionalign.training.checkpoint import load_last_checkpoint

settings = test_processes.settings


@pytest.mark.parametrize(("kind", "raised"), [("DataError", "DataError"), ("UnicodeError", "UnicodeError")])
def test_an_error_of_one_process_is_raised_by_all(tmp_path, kind, raised):
    run(2, "fails", {"out": str(tmp_path / "told"), "kind": kind}, tmp_path / "said")
    first, second = (json.loads((tmp_path / f"told.{number}").read_text()) for number in (0, 1))
    assert first == second
    assert [line.startswith(f"{raised}: process 1 of 2: ") for line in first] == [True, True, False]
    assert first[-1] == "[0, 1]"


@pytest.mark.parametrize("fails", [0, 1])
def test_a_sharded_checkpoint_that_one_process_cannot_write_is_none_on_all(tmp_path, fails):
    run(2, "save_sharded", {"out": str(tmp_path), "fails": fails}, tmp_path / "said")
    for number in (0, 1):
        message = (tmp_path / f"told.{number}").read_text()
        assert f"{tmp_path}/checkpoints/step-000000002.shards: could not be written by process {fails}: " in message
        assert "File too large" in message
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000001.shards", "step-000000003.shards"
    ]  # fmt: skip
    assert load_last_checkpoint(tmp_path, print)["step"] == 3
    # What a pulled plug, or a disk that is not shared, may leave of it.
    said: list[str] = []
    newest = tmp_path / "checkpoints" / "step-000000003.shards"
    shard = max(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    assert load_last_checkpoint(tmp_path, said.append)["step"] == 1
    assert f"{newest}: does not read back ({shard.name} is not whole); taking the one before it" in said
    shard.unlink()
    assert load_last_checkpoint(tmp_path, said.append)["step"] == 1


@pytest.mark.slow
def test_a_sharded_run_goes_on_where_one_process_cannot_write_a_checkpoint(tmp_path, settings):
    said = run(2, "trouble", settings("run", epochs=2, train_images=48, shard=True), tmp_path / "said")
    message = (
        "step-000000002.shards: could not be written by process 1: [Errno 27] File too large; training continues, "
    )
    assert message in said
    # After two steps, after three, and at the end of the epoch that these are.
    assert said.count("warning: no checkpoint") == 3
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 6


def test_an_image_that_one_process_misses_ends_the_run_on_both(tmp_path, settings, scenes_folder):
    data = shutil.copytree(scenes_folder, tmp_path / "scenes")
    gone = read_captioned_images(data).split("dev").rows[1].image
    given = settings("run", data=str(data), epochs=1, train_images=32, cache="off", gone=str(gone))
    with pytest.raises(AssertionError):
        run(2, "trouble", given, tmp_path / "said")
    for number in (0, 1):
        last = (tmp_path / f"said.{number}").read_text().strip().splitlines()[-1]
        assert "Error: process 1 of 2: " in last
        assert gone.name in last


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_an_epoch_without_a_step(tmp_path, settings):
    given = settings("run", epochs=2, train_images=32, shard=True)
    run(2, "stop", {**given, "after": 2, "none": 2}, tmp_path / "said")
    assert "stopped after step 2" in (tmp_path / "said.0").read_text()
    run(2, "train", {"resume": str(tmp_path / "run")}, tmp_path / "said")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["steps"], results["steps_skipped"]) == (2, 2)


def test_what_is_a_stream_for_one_process_alone_is_refused_by_all(tmp_path):
    run(2, "differing", {"out": str(tmp_path)}, tmp_path / "said")
    first, second = (json.loads((tmp_path / str(number) / "told").read_text()) for number in (0, 1))
    assert first == second
    assert first[0].startswith("DataError: shards: a stream for process 1 of 2, and none for 0")
    # Nor does anything wait for ever where a collective is called within another.
    assert all(line.startswith("RuntimeError: ") and "without the others" in line for line in first[1:3])
    assert first[3] == "[0, 1]"


def test_an_error_within_a_sharded_models_pass_ends_with_its_own_words(tmp_path, scenes_folder, tiny_model):
    given = {"data": str(scenes_folder), "model": asdict(tiny_model()), "loss": "softmax", "chunk": 4}
    # Three chunks of each process twice: its second one, the second time.
    with pytest.raises(AssertionError):
        run(2, "fails_sharded", {**given, "after": 5, "out": str(tmp_path / "out")}, tmp_path / "said")
    assert (tmp_path / "said.1").read_text().strip().endswith("MemoryError: no room for the second pass")


def test_a_signal_to_any_process_stops_all_after_the_same_step(tmp_path, settings):
    given = settings("run", train_images=48, epochs=40, checkpoint_minutes=60.0)
    said = run(2, "stop", {**given, "after": 3, "rank": 1}, tmp_path / "said")
    assert "stopped after step 3; resume with" in said
    assert load_last_checkpoint(tmp_path / "run", print)["place"]["step"] == 3
