"""A cell of a study that stands on another is known by that one's weights, and a study by what lies there."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_going_on import cut_off

from clipvisionalign.log import log_to
from clipvisionalign.study.config import Measurements, Plan, Trial, Variant, trials_of
from clipvisionalign.study.trial import train_trial
from clipvisionalign.study.trial_checks import refuse_other_settings


@pytest.fixture(scope="module")
def settings(tiny_settings):
    """Settings of a tiny run into a folder of this module's."""
    return tiny_settings("late", epochs=1, train_images=32)


def planned(settings, epochs: int = 1, base: str = "late") -> Plan:
    """A run, one that stands on it, and one that stands on that."""
    given = settings("")
    model = {
        "image_tower": vars(given.model.image_tower), "width": 32, "text_tower": vars(given.model.text_tower),
        "late": {"width": 16}, "fusion": {"layers": 1, "heads": 2, "width": 32, "candidates": 5},
    }  # fmt: skip
    more = {
        "batch": 16,
        "augment": "none",
        "precision": "float32",
        "workers": 0,
        "checkpoint_minutes": 0.0,
        "train_images": 32,
    }
    variants = {
        "late": Variant({"epochs": epochs, "freeze": "text"}),
        "cross": Variant({"freeze": "all", "epochs": 1}, "late"),
        "more": Variant({"model": {"design": "cross"}, "freeze": "both", "epochs": 1}, "cross"),
    }
    return Plan(
        title="A base", data=given.data, seeds=[0], variants=variants, settings={"model": model, **more},
        measure=Measurements(rounds=0),
    )  # fmt: skip


def trained(trials: list[Trial]) -> None:
    for trial in trials:
        train_trial(trial)


@pytest.mark.slow
def test_a_cell_is_not_used_and_not_resumed_on_another_base(settings, tmp_path, monkeypatch):
    study = tmp_path / "study"
    trials = trials_of(planned(settings), study)
    trained(trials)
    for trial in trials:
        refuse_other_settings(trial)
    longer = trials_of(planned(settings, epochs=2), study)
    shutil.rmtree(study / "cells" / "late-0")
    # Not known yet: the same settings may give the same weights.
    refuse_other_settings(trials[1])
    train_trial(trials[0])
    trained(trials[1:])
    shutil.rmtree(study / "cells" / "late-0")
    train_trial(longer[0])
    message = "cells/cross-0: stands on other weights than .*late-0 has now, .* remove .*cells/cross-0"
    for asked in (lambda: train_trial(longer[1]), lambda: refuse_other_settings(longer[1])):
        with pytest.raises(FileExistsError, match=message):
            asked()
    # The way out, once more cut off and then on another base; and what stands on that in turn.
    shutil.rmtree(longer[1].folder)
    cut_off(longer[1].config, monkeypatch, before=2)
    shutil.rmtree(study / "cells" / "late-0")
    train_trial(trials[0])
    with pytest.raises(FileExistsError, match=message):
        train_trial(trials[1])
    shutil.rmtree(trials[1].folder)
    # Killed before its first step, it has taken nothing that it would go on with.
    cut_off(trials[1].config, monkeypatch, before=1)
    train_trial(trials[1])
    late, cross = (load_file(trial.folder / "model.safetensors") for trial in trials[:2])
    assert not [name for name in late if name != "late.weight" and not torch.equal(late[name], cross[name])]
    train_trial(trials[2])
    shutil.rmtree(trials[1].folder)
    train_trial(replace(trials[1], config=replace(trials[1].config, seed=5)))
    with pytest.raises(FileExistsError, match=r"cells/more-0: stands on other weights than .*cross-0 has now"):
        train_trial(trials[2])


@pytest.mark.slow
def test_a_cell_from_before_its_base_was_recorded_says_that_it_was_not_compared(settings, tmp_path):
    trials = trials_of(planned(settings), tmp_path / "study")[:2]
    trained(trials)
    (trials[1].folder / "init.json").unlink(missing_ok=True)
    said: list[str] = []
    with log_to(said.append):
        train_trial(trials[1])
    assert any("whether late-0 is still what it stands on was not compared" in line for line in said)


@pytest.mark.slow
def test_a_study_is_the_same_by_whatever_path_it_is_named(settings, tmp_path, monkeypatch):
    plan = planned(settings)
    data = tmp_path / "data"
    data.symlink_to(plan.data)
    monkeypatch.chdir(tmp_path)
    trained(trials_of(replace(plan, data="data"), Path("study")))
    (tmp_path / "linked").symlink_to("study")
    (tmp_path / "else").mkdir()
    named = [(tmp_path, name) for name in ("study", "./study", "else/../study", "linked", str(tmp_path / "study"))]
    for directory, name in [
        *named,
        (tmp_path / "else", "../study"),
        (Path("/"), os.path.relpath(tmp_path / "study", "/")),
    ]:
        monkeypatch.chdir(directory)
        for source in (plan.data, os.path.relpath(data), str(data)):
            for trial in trials_of(replace(plan, data=source), Path(name)):
                refuse_other_settings(trial)
    monkeypatch.chdir(tmp_path)
    # And wherever it is moved; another data set, and other settings, are still refused.
    Path("study").rename("else/moved")
    for trial in trials_of(plan, Path("else/moved")):
        refuse_other_settings(trial)
    shutil.copytree(plan.data, "copy")
    for other in (replace(plan, data="copy"), planned(settings, epochs=2)):
        with pytest.raises(FileExistsError, match="a run with other settings is there"):
            refuse_other_settings(trials_of(other, Path("else/moved"))[0])
