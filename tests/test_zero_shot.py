"""A pretrained model as it is: a run without a step, and the first row of every study over it."""

from __future__ import annotations

import json
from pathlib import Path

import many_processes
import pytest
from pretrained_models import make_pretrained

from clipvisionalign.models.io import load_aligner
from clipvisionalign.study.config import Budget, Measurements, Plan, Variant, variant_config
from clipvisionalign.study.report.claims.claim import numbers_in
from clipvisionalign.study.runner import run_study
from clipvisionalign.study.zero_shot import add_zero_shot
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.opened_run import open_run
from clipvisionalign.training.train import train


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A small CLIP."""
    return make_pretrained("clip", tmp_path_factory.mktemp("models") / "clip")


@pytest.mark.slow
def test_no_epoch_leaves_the_model_and_its_figures_as_they_are(clip, scenes_folder, tmp_path):
    config = RunConfig(data=str(scenes_folder), out=str(tmp_path / "run"), epochs=0, trackers="", precision="float32")
    config.model.pretrained = str(clip)
    results = train(config)
    assert (results["steps"], results["best_epoch"]) == (0, 0)
    evaluated = open_run(str(clip), str(scenes_folder)).evaluate()
    for direction in ("image_to_text", "text_to_image"):
        for name, figure in evaluated[direction].items():
            assert results[direction][name]["value"] == pytest.approx(figure["value"]), name
    saved, alone = load_aligner(tmp_path / "run").state_dict(), load_aligner(clip).state_dict()
    assert saved.keys() == alone.keys()
    assert all(bool((saved[name] == alone[name]).all()) for name in saved)
    assert json.loads((tmp_path / "run" / "weights.json").read_text())["image_tower"]["files"][0]["bytes"] > 0


def test_settings_that_a_pretrained_model_takes_the_place_of_are_refused(scenes_folder):
    for name, value in {"dropout": 0.5, "temperature": 0.1}.items():
        config = RunConfig(data=str(scenes_folder))
        config.model.pretrained = "a/b"
        setattr(config.model, name, value)
        with pytest.raises(ValueError, match=f"--model.{name}: a pretrained model has its own"):
            check_settings(config)
    with pytest.raises(ValueError, match=r"--epochs should be at least 1, or 0 with --model\.pretrained"):
        check_settings(RunConfig(data=str(scenes_folder), epochs=0))


@pytest.mark.slow
def test_a_study_over_a_pretrained_model_has_it_as_first_row(clip, scenes_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("clipvisionalign.study.cost_rounds.profile_run", many_processes.Costs(tmp_path))
    monkeypatch.setattr("clipvisionalign.study.flawed_protocols.LEAK_STEPS", 5)
    plan = Plan(
        data=str(scenes_folder), seeds=[0, 1], variants={"self": Variant(), "late": Variant()},
        settings={"epochs": 1, "batch": 16, "augment": "none", "precision": "float32",
                  "model": {"pretrained": str(clip), "late": {"width": 16}}},
        measure=Measurements(rounds=1, brief=True, composition=0, audit_images=12, examples=0),
    )  # fmt: skip
    report = run_study(plan, tmp_path / "study")
    figures = open_run(str(clip), str(scenes_folder)).evaluate()
    rows = report["results"]["variants"]
    assert next(iter(rows)) == "zero-shot"
    for run in rows["zero-shot"]["runs"]:
        assert run["rsum"]["value"] == pytest.approx(figures["rsum"]["value"])
    # No part of a report is left out for a pretrained model.
    assert not report["not_made"]
    pairs = {frozenset((row["a"], row["b"])) for row in report["results"]["differences"]}
    assert {frozenset(("zero-shot", name)) for name in ("self", "late")} <= pairs
    # What the model was pretrained on stands in the summary and in a table; unknown is said to be unknown.
    (pretraining,) = report["pretraining"]
    assert (pretraining["model"], pretraining["known"], pretraining["coco"]) == ("clip", False, "unknown")
    assert pretraining["variants"] == list(rows)
    (text,) = [claim["text"] for claim in report["claims"] if "pretraining data" in claim["text"]]
    assert "what it was trained on is not known" in text
    assert numbers_in(text) == []
    assert "unknown" in (tmp_path / "study" / "tables" / "pretraining.md").read_text()
    assert "What the models were pretrained on" in (tmp_path / "study" / "report.html").read_text()
    # Asked again, the same plan is the same study.
    assert next(iter(run_study(plan, tmp_path / "study")["results"]["variants"])) == "zero-shot"


def test_a_plan_keeps_its_own_zero_shot_and_has_one_for_each_model(clip):
    def models(plan: Plan) -> dict[str, str]:
        return {name: variant.settings["model"]["pretrained"] for name, variant in plan.variants.items()}

    def tuned(model: str, **settings: object) -> Variant:
        return Variant({"model": {"pretrained": model}, **settings})

    two = add_zero_shot(Plan(variants={"a": tuned("org/one@abc"), "b": tuned("two/two")}))
    assert models(two) == {
        "zero-shot-one": "org/one@abc",
        "zero-shot-two": "two/two",
        "a": "org/one@abc",
        "b": "two/two",
    }
    own = Plan(variants={"as it is": tuned("two/two", epochs=0), "b": tuned("two/two")})
    assert add_zero_shot(own) == own
    none = Plan(variants={"self": Variant()})
    assert add_zero_shot(none) == none
    assert add_zero_shot(two) == two
    # A name that is taken, by a variant of another meaning or by another model of the same last part, is not given twice.
    taken = add_zero_shot(Plan(variants={"zero-shot": tuned("a/clip", epochs=3)}))
    assert list(taken.variants) == ["zero-shot-2", "zero-shot"]
    same = add_zero_shot(Plan(variants={"x": tuned("a/clip"), "y": tuned("b/clip")}))
    assert list(models(same).values())[:2] == ["a/clip", "b/clip"]
    # What a plan sets for its variants is none of the model's own.
    stretched = Plan(variants={"b": tuned("two/two")}, settings={"model": {"positions": "stretched"}})
    assert variant_config(add_zero_shot(stretched), "zero-shot").model.positions == "own"
    seconds = add_zero_shot(Plan(variants={"b": tuned("two/two")}, budget=Budget("seconds", 10)))
    assert list(seconds.variants) == ["zero-shot", "b"]
