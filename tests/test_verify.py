"""`verify`: a true report passes, and each of many that were tampered with is found."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from clipvisionalign.cli import main
from clipvisionalign.retrieval.evaluate import RANKS_FILE
from clipvisionalign.study import verify
from clipvisionalign.study.assemble import assemble_report
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.runner import ADDED_PART, read_study_report
from clipvisionalign.study.verify import first_difference, verify_report

PUBLISHED = [
    Path(__file__).parents[1] / "docs" / "results" / "flickr8k-small",
    Path(__file__).parent / "data" / "v0.1" / "study",
]


@pytest.fixture
def copy(study: Path, tmp_path: Path) -> Path:
    """A copy of the finished study in which files may be replaced."""
    return Path(shutil.copytree(study, tmp_path / "study", copy_function=os.link))


def change_json(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    before = json.dumps(value)
    change(value)
    assert json.dumps(value) != before, "nothing was changed"
    # The file is shared with the study that it was copied from.
    path.unlink()
    path.write_text(json.dumps(value, indent=1))


def failed(study: Path, with_models: bool = False) -> list[str]:
    return [f"{part.part}: {part.detail}" for part in verify_report(study, with_models) if part.state == "fails"]


@pytest.mark.slow
def test_a_true_report_holds(copy, capsys):
    parts = verify_report(copy)
    assert [part for part in parts if part.state == "fails"] == []
    holding = {part.part for part in parts if part.state == "holds"}
    assert {"results", "claims", "cells", "curves", "cost", "plan", "data set by its content"} <= holding
    assert {f"results.json of {name}-{seed}" for name in ("self", "late", "cross") for seed in (0, 1)} <= holding
    assert main(["verify", str(copy)]) == 0
    assert "0 parts fail" in capsys.readouterr().out
    assert main(["verify", str(copy / "report.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {
        "part": "structure, and means over runs", "state": "holds", "detail": ""
    }  # fmt: skip


@pytest.mark.slow
def test_a_report_from_before_near_duplicates_counted_as_one_holds(copy):
    """Its figures are derived as they were then, whatever images are nearly the same."""
    assert json.loads((copy / "report.json").read_text())["results"]["units"] > 0
    change_json(copy / "report.json", lambda report: report["results"].pop("units"))
    assert failed(copy) == []


@pytest.mark.parametrize("folder", PUBLISHED, ids=str)
def test_a_published_report_without_ranks_is_consistent_and_said_not_to_be_derived(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    assert (
        "not verified  figures by the ranks: no ranks and measurements lie beside the report" in capsys.readouterr().out
    )


def _raise_mean(report: dict[str, Any]) -> None:
    variant = report["results"]["variants"]["late"]
    for each in (variant["figures"]["rsum"], *(run["rsum"] for run in variant["runs"])):
        each["value"] += 3


def _swap_p(report: dict[str, Any]) -> None:
    report["results"]["differences"][0]["p_holm"] = 0.001


def _widen(report: dict[str, Any]) -> None:
    report["results"]["variants"]["self"]["figures"]["rsum"]["low"] += 1


def _drop_seed(report: dict[str, Any]) -> None:
    variant = report["results"]["variants"]["self"]
    del variant["runs"][1], variant["seeds"][1]


def _cheaper(report: dict[str, Any]) -> None:
    costs = report["cost"]
    variant = next(iter(costs))
    number = next(name for name, value in costs[variant].items() if isinstance(value, float) and value)
    costs[variant][number] /= 2


#: What is changed in report.json, and the part that fails.
TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "one figure": (lambda r: r["results"]["variants"]["late"]["figures"]["rsum"].update(value=500.0), "structure"),
    "a mean with its runs": (_raise_mean, "results"),
    "an interval": (_widen, "results"),
    "a corrected p": (_swap_p, "results"),
    "a seed that is left out": (_drop_seed, "structure|results"),
    "a gallery": (lambda r: r["data"]["gallery"].update(images=100), "structure|data"),
    "the content of the data": (lambda r: r["data"]["contents"].update(images="0" * 64), "data set"),
    "a sentence": (lambda r: r["claims"][0].update(text="late is better by 123.4 [120, 130]"), "sentences"),
    "a sentence added": (lambda r: r["claims"].append(dict(r["claims"][0], text="sparse gains 77.7")), "sentences"),
    "a cell that failed": (lambda r: r["cells"].pop(), "cells"),
    "the plan": (lambda r: r["plan"]["settings"].update(epochs=9), "plan"),
    "a curve": (lambda r: r["curves"][0]["rsum"].__setitem__(0, 1.0), "curves"),
    "a cost": (_cheaper, "cost"),
    "chance": (lambda r: r["results"]["chance"].update(rsum=0.1), "results"),
    "composition": (lambda r: next(iter(r["results"]["composition"].values()))[0].update(value=99.0), "results"),
    "words alone": (lambda r: next(iter(r["text_only"].values()))[0].update(value=1.0), "text_only"),
}  # fmt: skip


@pytest.fixture(scope="module")
def derived(study) -> dict[str, Any]:
    """What the study's report is derived to, once for all that is changed in report.json alone."""
    made: list[dict[str, Any]] = []

    def once(*arguments: Any) -> dict[str, Any]:
        made.append(assemble_report(*arguments))
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "assemble_report", once)
        assert not [part for part in verify_report(study) if part.state == "fails"]
    return made[0]


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_report_is_found_with_its_place(copy, derived, name, monkeypatch):
    monkeypatch.setattr(verify, "assemble_report", lambda *arguments: json.loads(json.dumps(derived)))
    change, part = TAMPERED[name]
    change_json(copy / "report.json", change)
    failures = failed(copy)
    assert failures, "it passes"
    assert any(line.split(":")[0].startswith(tuple(part.split("|"))) for line in failures), failures


def better_ranks(path: Path) -> None:
    """Every second caption finds its image first."""
    with np.load(path) as file:
        arrays = dict(file)
    name = next(name for name in arrays if name.endswith("text_to_image"))
    assert (arrays[name][::2] != 1).any()
    arrays[name][::2] = np.minimum(arrays[name][::2], 1)
    path.unlink()
    np.savez(path, **arrays)


def test_ranks_of_a_run_that_do_not_give_its_figures_are_found(copy):
    better_ranks(copy / "cells" / "late-0" / RANKS_FILE)
    failures = failed(copy)
    assert any(line.startswith("results.json of late-0: late-0.") for line in failures), failures
    assert any(line.startswith("results: results.variants.late") for line in failures), failures


def test_a_measurement_that_was_changed_is_found(copy):
    def change(measured: dict[str, Any]) -> None:
        kinds = next(iter(measured["composition"].values()))
        kind = next(iter(kinds))
        kinds[kind] = [1.0] * len(kinds[kind])

    change_json(copy / "cells" / "self-0" / "measured.json", change)
    assert any(line.startswith("results: results.composition") for line in failed(copy))


def test_another_model_and_another_data_set_are_found(copy, study, tmp_path):
    model = copy / "cells" / "self-0" / "model.safetensors"
    model.unlink()
    shutil.copy(copy / "cells" / "self-1" / "model.safetensors", model)
    assert any("self" in line and line.startswith(("cells", "results")) for line in failed(copy))
    model.unlink()
    shutil.copy(study / "cells" / "self-0" / "model.safetensors", model)
    plan = yaml.safe_load((copy / "plan.yaml").read_text())
    data = Path(shutil.copytree(plan["data"], tmp_path / "data"))
    (copy / "plan.yaml").unlink()
    (copy / "plan.yaml").write_text(yaml.safe_dump(plan | {"data": str(data)}))
    images = sorted((data / "images").glob("*.png"))
    shutil.copy(images[0], images[1])
    assert any(line.startswith(("data set by its content", "cells")) for line in failed(copy))
    shutil.rmtree(data)
    (part,) = [part for part in verify_report(copy) if part.part == "figures by the ranks"]
    assert part.state == "not verified"
    assert "is not there: put it back" in part.detail


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["cross"])
def test_ranks_that_were_changed_together_with_all_figures_are_found_by_the_models(copy, variant):
    """Whoever changes the ranks of a run and all that follows from them passes until its model is asked."""
    cell = copy / "cells" / f"{variant}-0"

    def own_model(measured: dict[str, Any]) -> None:
        # As of a split on which nothing was chosen.
        measured["chosen"] = {}

    for folder in copy.glob("cells/*"):
        if (folder / "measured.json").is_file():
            change_json(folder / "measured.json", own_model)
    from clipvisionalign.models.io import load_aligner
    from clipvisionalign.retrieval.evaluate import evaluate
    from clipvisionalign.study.foils import foil_accuracy
    from clipvisionalign.study.runner import open_kept_study

    context, _ = open_kept_study(copy)
    data = context.eval_data
    # Only this run is encoded again.
    for weights in copy.glob("cells/*/*.safetensors"):
        if weights.parent != cell:
            weights.unlink()
    aligner = load_aligner(cell, "cpu")
    candidates = aligner.config.fusion.candidates if aligner.fusion is not None else 0
    true = evaluate(
        aligner, data.images, data.captions, data.caption_image, data.image_identity, candidates, 0,
        caption_group=data.shared_text_ids,
    )  # fmt: skip
    ranks = cell / "ranks-dev.npz"
    true.save_ranks(ranks)
    # Pairs of images that took part in choosing were scored by the weights that the other half chose.
    pairs = {name: foil_accuracy(aligner, each) for name, each in context.pairs.items()}
    change_json(cell / "measured.json", lambda measured: measured["composition"].update(pairs))
    rewrite(copy)
    assert not [line for line in failed(copy, with_models=True) if line.startswith(f"{variant}-0 by its model")]
    better_ranks(ranks)
    rewrite(copy)
    assert not [line for line in failed(copy) if not line.startswith("results.json of")]
    failures = [line for line in failed(copy, with_models=True) if line.startswith(f"{variant}-0 by its model")]
    assert len(failures) == 1
    assert "by the model" in failures[0]


def rewrite(study: Path) -> None:
    """A report that follows from what lies beside it now."""
    report = study / "report.json"
    report.unlink()
    report.write_text(json.dumps(read_study_report(study)))


def test_why_a_part_could_not_be_made_and_words_of_another_version_do_not_fail(copy, derived, monkeypatch):
    monkeypatch.setattr(verify, "assemble_report", lambda *arguments: json.loads(json.dumps(derived)))

    def change(report: dict[str, Any]) -> None:
        # The reason is of the process that tried, and the claims name it.
        report["not_made"].append({"part": ADDED_PART, "of": "", "reason": "MemoryError: none left"})
        report["claims"] = report_claims(report)
        claim = report["claims"][0]
        claim["text"] = "In other words: " + claim["text"]

    change_json(copy / "report.json", change)
    assert failed(copy) == []
    change_json(copy / "report.json", lambda r: r["not_made"].append({"part": "examples", "of": "", "reason": "x"}))
    assert any(line.startswith("not_made") for line in failed(copy))


def test_the_first_difference_is_named():
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 2, 3]}}, "x") == "x.a.b: 2 entries, derived: 3"
    assert first_difference({"a": 1}, {}, "x") == "x.a: not derived from anything"
    assert first_difference({}, {"a": 1}, "x") == "x.a: left out"
    assert first_difference(True, 1.0, "x") == "x: True, derived: 1.0"
    assert first_difference(1.0, 1.0 + 1e-8, "x") == ""
    assert first_difference("a" * 6000, "b" * 6001, "x") == ""


def test_what_is_no_report_is_one_line(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    (tmp_path / "report.json").write_text("{")
    assert main(["verify", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2
    assert "no report.json there" in error[0]
    assert "cannot be read" in error[1]
