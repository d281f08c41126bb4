"""A cell of a study that stands on another is known by that one's weights, and a study by what lies there."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_going_on import cut_off, silent

from clipvisionalign.study.cells import refuse_other, train_cell
from clipvisionalign.study.plan import Cell, Measurements, Plan, Variant, cells_of


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


def trained(cells: list[Cell]) -> None:
    for cell in cells:
        train_cell(cell, silent)


def test_a_cell_is_not_used_and_not_resumed_on_another_base(settings, tmp_path, monkeypatch):
    study = tmp_path / "study"
    cells = cells_of(planned(settings), study)
    trained(cells)
    for cell in cells:
        refuse_other(cell)
    longer = cells_of(planned(settings, epochs=2), study)
    shutil.rmtree(study / "cells" / "late-0")
    # Not known yet: the same settings may give the same weights.
    refuse_other(cells[1])
    train_cell(cells[0], silent)
    trained(cells[1:])
    shutil.rmtree(study / "cells" / "late-0")
    train_cell(longer[0], silent)
    told = "cells/cross-0: stands on other weights than .*late-0 has now, .* remove .*cells/cross-0"
    for asked in (lambda: train_cell(longer[1], silent), lambda: refuse_other(longer[1])):
        with pytest.raises(FileExistsError, match=told):
            asked()
    # The way out, once more cut off and then on another base; and what stands on that in turn.
    shutil.rmtree(longer[1].folder)
    cut_off(longer[1].config, monkeypatch, before=2)
    shutil.rmtree(study / "cells" / "late-0")
    train_cell(cells[0], silent)
    with pytest.raises(FileExistsError, match=told):
        train_cell(cells[1], silent)
    shutil.rmtree(cells[1].folder)
    # Killed before its first step, it has taken nothing that it would go on with.
    cut_off(cells[1].config, monkeypatch, before=1)
    train_cell(cells[1], silent)
    late, cross = (load_file(cell.folder / "model.safetensors") for cell in cells[:2])
    assert not [name for name in late if name != "late.weight" and not torch.equal(late[name], cross[name])]
    train_cell(cells[2], silent)
    shutil.rmtree(cells[1].folder)
    train_cell(replace(cells[1], config=replace(cells[1].config, seed=5)), silent)
    with pytest.raises(FileExistsError, match=r"cells/more-0: stands on other weights than .*cross-0 has now"):
        train_cell(cells[2], silent)


def test_a_cell_from_before_its_base_was_recorded_says_that_it_was_not_compared(settings, tmp_path):
    cells = cells_of(planned(settings), tmp_path / "study")[:2]
    trained(cells)
    (cells[1].folder / "init.json").unlink(missing_ok=True)
    said: list[str] = []
    train_cell(cells[1], said.append)
    assert any("whether late-0 is still what it stands on was not compared" in line for line in said)


def test_a_study_is_the_same_by_whatever_path_it_is_named(settings, tmp_path, monkeypatch):
    plan = planned(settings)
    data = tmp_path / "data"
    data.symlink_to(plan.data)
    monkeypatch.chdir(tmp_path)
    trained(cells_of(replace(plan, data="data"), Path("study")))
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
            for cell in cells_of(replace(plan, data=source), Path(name)):
                refuse_other(cell)
    monkeypatch.chdir(tmp_path)
    # And wherever it is moved; another data set, and other settings, are still refused.
    Path("study").rename("else/moved")
    for cell in cells_of(plan, Path("else/moved")):
        refuse_other(cell)
    shutil.copytree(plan.data, "copy")
    for other in (replace(plan, data="copy"), planned(settings, epochs=2)):
        with pytest.raises(FileExistsError, match="a run with other settings is there"):
            refuse_other(cells_of(other, Path("else/moved"))[0])
