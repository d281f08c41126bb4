"""A run that is asked to stop, by whom and in whatever way, keeps its last step, or says that it could not; and no
checkpoint holds weights that are not finite."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import test_going_on
import torch
import yaml
from forked import Forked, command, wait_until
from test_going_on import silent

from clipvisionalign import read_captioned_images
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.loader import iterate_dataset
from clipvisionalign.data.streams.writing import write_shards
from clipvisionalign.models.image_tower import ImageTowerConfig
from clipvisionalign.training import trainer
from clipvisionalign.training.checkpoint import list_checkpoints, load_last_checkpoint
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.ema import ExponentialMovingAverage
from clipvisionalign.training.state import TrainState
from clipvisionalign.training.stopping import stop_signal
from clipvisionalign.training.train import resume, train

settings = test_going_on.settings


def in_a_group(*arguments: str) -> int:
    """The command in a process group of its own, as a launcher starts it."""
    os.setsid()
    return command(*arguments)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, scenes_folder) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(read_captioned_images(scenes_folder), folder, per_shard=20)
    return folder


def trained(settings, out: Path, **more):
    """A run whose image tower is trained, so that workers decode; without batch norms."""
    config = settings("unused", freeze="none", epochs=400, workers=2, checkpoint_minutes=60.0, **more)
    config.out, config.model.image_tower = str(out), ImageTowerConfig("test_vit", weights="random", size=32)
    return config


@pytest.mark.parametrize(("kind", "number"), [("table", signal.SIGTERM), ("stream", signal.SIGTERM),
                                              ("table", signal.SIGINT)])  # fmt: skip
def test_a_signal_to_the_whole_process_group_leaves_a_checkpoint(settings, shards, tmp_path, kind, number):
    more = {"data": str(shards), "train_images": 0} if kind == "stream" else {}
    run = tmp_path / "run"
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(asdict(trained(settings, run, **more)), sort_keys=False))
    process = Forked(in_a_group, "train", "--config", str(config), out=tmp_path / "said")
    try:
        while "1 epoch" not in process.said and "epoch 1/" not in process.said and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.15)
        os.killpg(process.process.pid, number)
        if number == signal.SIGTERM:
            # Slurm and torchrun pass on what all have had.
            time.sleep(0.02)
            process.signal(number)
        assert process.wait(60) == 130, process.said
    finally:
        process.kill()
    state = load_last_checkpoint(run, print)
    assert state is not None
    assert (
        f"stopped after step {state['place']['step']}; resume with: clipvisionalign train --resume {run}"
        in process.said
    )
    assert "Traceback" not in process.said


class Endless(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> int:
        return os.getpid()


def use_workers(out: str, method: str) -> int:
    """Starts two workers, and ends with an error whose traceback holds them."""
    multiprocessing.set_start_method(method, force=True)
    items = iterate_dataset(Endless(), 2, list(range(100)))
    Path(out).write_text(f"{next(items)} {next(items)}")
    global kept
    kept = items
    raise RuntimeError("an error that nobody handles")


def wait_for_ever(out: str, method: str) -> int:
    multiprocessing.set_start_method(method, force=True)
    items = iterate_dataset(Endless(), 2, list(range(100)))
    Path(out).write_text(f"{next(items)} {next(items)}")
    time.sleep(600)
    return 0


def alive(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
@pytest.mark.parametrize("work", [use_workers, wait_for_ever])
def test_workers_end_with_the_process_that_they_work_for(tmp_path, work, method):
    if not Path("/proc").is_dir():
        pytest.skip("no /proc")
    process = Forked(work, str(tmp_path / "workers"), method, out=tmp_path / "said")
    numbers = tmp_path / "workers"
    wait_until(lambda: numbers.is_file() and numbers.read_text(), process)
    workers = list(map(int, numbers.read_text().split()))
    if work is wait_for_ever:
        assert all(map(alive, workers))
        # Often enough that each thread of a worker, whoever's, would be chosen to take one.
        for worker in 20 * workers:
            os.kill(worker, signal.SIGTERM)
            time.sleep(0.01)
        time.sleep(0.3)
        assert all(map(alive, workers))
        process.kill()
    else:
        assert process.wait(60) == 1
        # How the workers were ended is no error beside it.
        assert process.said.strip().splitlines()[-1] == "RuntimeError: an error that nobody handles"
    limit = time.monotonic() + 15
    while any(map(alive, workers)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(alive, workers))


@pytest.fixture
def interrupts():
    """SIGINT as a terminal's programs have it: where the tests run in the background, a shell has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_a_second_signal_is_the_launchers_first_one_or_stops_at_once():
    def term() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with stop_signal() as stop:
        term()
        term()
        assert stop()
    with stop_signal(launched=True) as stop:
        interrupt()
        interrupt()
        term()
        assert stop()
    with stop_signal() as stop:
        interrupt()
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            interrupt()


@pytest.mark.usefixtures("interrupts")
def test_the_launchers_signal_may_come_after_the_run_has_ended(monkeypatch):
    from clipvisionalign.training import stopping

    had: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: had.append(number))
    try:
        with stop_signal():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert had == []
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(stopping, "REPEATED_SIGNAL_SECONDS", 0.0)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert had == [signal.SIGTERM]
        # And whoever was not asked to stop has the handler of before.
        with stop_signal():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert had == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("interrupts")
def test_a_later_signal_stops_at_once(monkeypatch):
    from clipvisionalign.training import stopping

    monkeypatch.setattr(stopping, "REPEATED_SIGNAL_SECONDS", 0.0)
    with stop_signal(launched=True):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("kept", [0, 1])
def test_who_leaves_without_a_checkpoint_is_told_so(settings, tmp_path, monkeypatch, kept):
    config = settings(f"full-{kept}")
    config.out = str(tmp_path / "run")
    steps, saves, said = 0, 0, []
    forward_backward, save = trainer.forward_backward, TrainState.save

    def counted(*arguments):
        nonlocal steps
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(*arguments)

    def full(*arguments):
        nonlocal saves
        saves += 1
        if saves > kept:
            raise OSError(28, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(trainer, "forward_backward", counted)
    monkeypatch.setattr(TrainState, "save", full)
    with pytest.raises(KeyboardInterrupt):
        train(config, said.append)
    assert len(list_checkpoints(tmp_path / "run")) == kept
    advice = "the last checkpoint is of step 1; resume with" if kept else "there is no checkpoint; start again with"
    assert said[-1] == (
        f"stopped after step 2, which was not kept: {advice}: clipvisionalign train --resume {tmp_path / 'run'}"
    )


# --- numbers that are not finite -------------------------------------------------------------------------------------


def root_at_zero(images: torch.Tensor, captions: torch.Tensor, positives) -> torch.Tensor:
    """Finite, with gradients that are not."""
    return (images @ captions.T).mean() + (0.0 * images).abs().sum().sqrt()


def test_finite_losses_whose_gradients_are_not_finite_are_not_stepped_on(settings, tmp_path, monkeypatch):
    config = settings("gradients")
    config.out = str(tmp_path / "run")
    clip, steps = Distributed.clip_grad_norm, 0

    def spoilt(self, parameters, most):
        nonlocal steps
        steps += 1
        if steps == 3:
            parameters[0].grad.view(-1)[0] = float("nan")
        return clip(self, parameters, most)

    monkeypatch.setattr(Distributed, "clip_grad_norm", spoilt)
    with pytest.raises(FloatingPointError, match=r"step 3: the gradients are not finite; .*of step 2, is in"):
        train(config, silent)
    state = load_last_checkpoint(tmp_path / "run", print)
    assert state["place"]["step"] == 2
    assert all(tensor.isfinite().all() for tensor in state["towers"].values() if tensor.is_floating_point())
    monkeypatch.setattr(Distributed, "clip_grad_norm", clip)
    assert resume(config.out, silent)["steps"] == 6


def test_a_loss_of_ones_own_with_such_gradients_ends_in_words(settings, tmp_path):
    config = settings("own-loss")
    config.out, config.loss.name = str(tmp_path / "run"), "test_stopping:root_at_zero"
    with pytest.raises(FloatingPointError, match=r"step 1: the gradients are not finite; .*there is no checkpoint"):
        train(config, silent)
    assert not list_checkpoints(tmp_path / "run")


@pytest.mark.parametrize("step", [2, 3])
def test_weights_that_are_not_finite_are_never_kept(settings, tmp_path, monkeypatch, step):
    """In the middle of an epoch, and at its end."""
    config = settings(f"weights-{step}")
    config.out = str(tmp_path / "run")
    update, steps = ExponentialMovingAverage.update, 0

    def spoilt(self):
        nonlocal steps
        steps += 1
        if steps == step:
            next(iter(self.trained_parameters.values())).data.view(-1)[0] = float("inf")
        update(self)

    monkeypatch.setattr(ExponentialMovingAverage, "update", spoilt)
    with pytest.raises(FloatingPointError, match=rf"step {step}: weights are not finite; .*of step {step - 1}, is in"):
        train(config, silent)
    assert load_last_checkpoint(tmp_path / "run", print)["place"]["step"] == step - 1


# --- errors of workers -----------------------------------------------------------------------------------------------


def tokenize(captions: list[str]) -> list[list[int]]:
    return [[1] for _ in captions]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_is_raised_in_its_own_words(shards, tmp_path, workers):
    from clipvisionalign.data.streams.loader import StreamedBatches
    from clipvisionalign.data.streams.sources import open_stream

    folder = tmp_path / "shards"
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    stream = open_stream(str(folder))
    cut = folder / "train-000001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2 + 100])
    batches = StreamedBatches(stream, tokenize, 0, None)
    with pytest.raises(DataError, match=r"^\S*train-000001.tar: ") as caught:
        list(batches.epoch(8, 1, 0, workers=workers))
    assert "Caught" not in str(caught.value)
    assert not workers or "in _read_range" in "".join(caught.value.__notes__)


class Broken(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> int:
        raise DataError("/there/a.jpg: gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_so_is_one_of_a_table(workers):
    with pytest.raises(DataError) as caught:
        next(iterate_dataset(Broken(), workers, [0]))
    assert str(caught.value) == "/there/a.jpg: gone"
