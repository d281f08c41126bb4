"""`Trainer` from Python: callbacks, single steps, and a state that another trainer takes over."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from clipvisionalign import Callback, RunConfig, Trainer, train
from clipvisionalign.training.checkpoint import list_checkpoints
from clipvisionalign.training.state import load_optimizer_state, optimizer_state


@pytest.fixture(scope="module")
def settings(scenes_folder, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")

    def made(name: str, **others) -> RunConfig:
        given = {"epochs": 2, "batch": 16, "precision": "float32", "trackers": "", "cache": str(folder / "cache")}
        return RunConfig(data=str(scenes_folder), out=str(folder / name), model=tiny_model("self"), **(given | others))

    return made


class Recorded(Callback):
    def __init__(self) -> None:
        self.steps, self.epochs, self.checkpoints = [], [], []

    def on_step(self, trainer, metrics) -> None:
        assert metrics.images
        self.steps.append(trainer.progress.step)

    def on_epoch(self, trainer, metrics) -> None:
        self.epochs.append((trainer.progress.epoch, metrics.metrics.rsum.value))

    def on_checkpoint(self, trainer, step) -> None:
        assert list_checkpoints(trainer.out)
        self.checkpoints.append(step)


@pytest.mark.slow
def test_callbacks_are_called_and_change_nothing(settings):
    recorded, lines = Recorded(), []
    results = train(settings("with"), lines.append, callbacks=[recorded])
    plain = train(settings("without"), lines.append)
    assert recorded.steps == list(range(1, results["steps"] + 1))
    assert [epoch for epoch, _ in recorded.epochs] == [1, 2]
    assert recorded.checkpoints == [results["steps"] // 2, results["steps"]]
    assert results["rsum"] == plain["rsum"]
    models = [load_file(settings(name).out + "/model.safetensors") for name in ("with", "without")]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


class StopTrainingError(Exception):
    pass


class Stops(Callback):
    def on_step(self, trainer, metrics) -> None:
        raise StopTrainingError("enough")


def test_an_error_of_a_callback_ends_the_training_and_unlocks_its_folder(settings):
    with pytest.raises(StopTrainingError):
        train(settings("stops"), lambda line: None, callbacks=[Stops()])
    results = train(settings("stops", overwrite=True, steps=1, epochs=1), lambda line: None)
    assert results["steps"] == 1


@pytest.mark.parametrize("by_name", [True, False])
def test_a_step_after_a_state_was_loaded_is_the_step_of_the_trainer_that_it_is_of(settings, tmp_path, by_name):
    def step(trainer: Trainer) -> float:
        batches = trainer.batches.epoch(
            16, 1, 0, 0, trainer.progress.step_in_epoch, trainer.processes.rank_and_world_size, 0
        )
        return trainer.train_step(batches).loss

    # The first computes the features of the frozen tower, the second reads them.
    cache = str(tmp_path / "cache")
    with Trainer(settings(f"first-{by_name}", cache=cache), lambda line: None) as first:
        step(first)
        state = copy.deepcopy(first.state_dict())
        assert set(state["optimizer"]["state"]) <= set(first.step.towers.state_dict())
        if not by_name:
            # As checkpoints before this version have it.
            state["optimizer"] = copy.deepcopy(first.optimizer.state_dict())
        loss = step(first)
        weights = {name: tensor.clone() for name, tensor in first.aligner.state_dict().items()}
    with Trainer(settings(f"second-{by_name}", cache=cache), lambda line: None) as second:
        second.validate()
        second.load_state_dict(state)
        assert second.progress.step == 1
        assert step(second) == loss
        assert second.validate().metrics.rsum.value > 0
        assert all(torch.equal(tensor, weights[name]) for name, tensor in second.aligner.state_dict().items())


def test_an_optimizer_is_saved_and_loaded_before_its_first_step_as_it_is():
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters())
    state = optimizer_state(layer, optimizer)
    assert (state["state"], dict(optimizer.state)) == ({}, {})
    load_optimizer_state(layer, optimizer, state)
    assert not optimizer.state


def test_a_parameter_without_a_gradient_has_no_state_once_it_is_loaded():
    def made() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 1)
        return layer, torch.optim.AdamW([{"params": [layer.bias]}, {"params": [layer.weight]}], lr=0.1)

    layer, optimizer = made()
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    other, loaded = made()
    before = copy.deepcopy(other.state_dict())
    load_optimizer_state(other, loaded, copy.deepcopy(optimizer_state(layer, optimizer)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert list(loaded.state) == [other.weight]
    assert torch.equal(loaded.state[other.weight]["exp_avg"], optimizer.state[layer.weight]["exp_avg"])
    assert loaded.param_groups[1]["lr"] == 0.1


@pytest.mark.slow
def test_the_package_offers_training_without_loading_torch_at_once():
    program = (
        "import sys, clipvisionalign; assert 'torch' not in sys.modules; print(clipvisionalign.RunConfig.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "RunConfig", done.stderr
