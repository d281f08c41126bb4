"""The study: plans, cells that fail or are killed, the fence, the words of the summary, cost, the published formats."""

from __future__ import annotations

import copy
import csv
import html
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import many_processes
import numpy as np
import pytest
from forked import Forked
from made_reports import check_numbers

from clipvisionalign.cli import main
from clipvisionalign.log import log_to
from clipvisionalign.study.config import Budget, Variant, trials_of
from clipvisionalign.study.plan_file import plan_text, read_plan, ready_plans
from clipvisionalign.study.report.claims.claim import numbers_in
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.results_check import ResultsError, check_results
from clipvisionalign.study.runner import run_study

# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ready_plans()))
def test_a_ready_plan_can_be_carried_out(name):
    plan = replace(read_plan(name), data="anywhere")
    trials = trials_of(plan, Path("study"))
    assert len(trials) == len(plan.variants) * len(plan.seeds)
    trained = [(trial.variant, trial.seed) for trial in trials]
    for trial in trials:
        base = plan.variants[trial.variant].base
        assert not base or trained.index((base, trial.seed)) < trained.index((trial.variant, trial.seed))


def test_a_plan_that_is_not_there_names_those_that_are(capsys):
    assert main(["study", "nothing"]) == 1
    assert "no such file, and no ready plan; there are demo, " in capsys.readouterr().err


def test_a_budget_of_seconds_gives_each_variant_its_own_steps(plan, tmp_path):
    plan = replace(plan, budget=Budget("seconds", 1.0))
    trials = trials_of(plan, tmp_path, {"self": 3, "late": 2, "sparse": 3, "cross": 4, "broken": 1})
    assert {trial.variant: trial.config.steps for trial in trials}["cross"] == 4
    assert len({trial.config.steps for trial in trials if trial.variant == "self"}) == 1


# --- the report ------------------------------------------------------------------------------------------------------


def test_a_failed_cell_is_shown_with_its_reason_and_the_rest_goes_on(report, plan):
    assert {(trial["variant"], trial["seed"]) for trial in report["failed"]} == {("broken", 0), ("broken", 1)}
    assert all("no space left for the loss" in trial["reason"] for trial in report["failed"])
    assert set(report["results"]["variants"]) == {"self", "sparse", "late", "cross"}
    assert all(variant["seeds"] == plan.seeds for variant in report["results"]["variants"].values())


def test_dev_figures_of_a_report_are_said_to_be_cross_fitted(report, study):
    from clipvisionalign.study.aggregate import selection_note

    choice = report["results"]["choice"]
    assert choice.startswith("cross-fitted")
    assert choice in html.unescape((study / "report.html").read_text())
    assert choice.capitalize() in (study / "tables" / "accuracy.md").read_text()
    assert all(len(curve["dev_loss"]) == len(curve["rsum"]) > 0 for curve in report["curves"])
    # A run from before dev was halved, and another split.
    from types import SimpleNamespace

    old = [SimpleNamespace(variant="self", measurements={})]
    assert selection_note(old, "dev").startswith("in-sample")
    assert selection_note(old, "test").startswith("out of sample")


def test_every_file_of_a_report_is_there(study):
    for name in ("report.html", "report.json", "references.bib", "figures/accuracy.svg", "figures/time.png",
                 "tables/accuracy.md", "tables/cost.tex"):  # fmt: skip
        assert (study / name).stat().st_size > 200, name
    assert "@misc{he2016" in (study / "references.bib").read_text()
    assert r"\toprule" in (study / "tables" / "accuracy.tex").read_text()


def test_every_table_of_recall_tells_chance(study, report):
    chance = report["results"]["chance"]
    gallery = report["data"]["gallery"]
    assert chance["text_to_image recall_at_1"] == pytest.approx(100 / gallery["images"])
    assert chance["rsum"] == pytest.approx(sum(share for figure, share in chance.items() if figure != "rsum"))
    assert set(report["results"]["lengths"]["chance"]) == set(report["results"]["lengths"]["words"])
    for name in ("accuracy", "length"):
        for ending in ("md", "tex"):
            assert "chance: a random ranking" in (study / "tables" / f"{name}.{ending}").read_text()
    assert "chance: a random ranking" in (study / "report.html").read_text()
    first = next(claim for claim in report["claims"] if claim["about"] == "accuracy")
    assert "results/chance/rsum" in [figure["path"] for figure in first["figures"]]
    assert all("chance" in bar for bar in (report["what_it_would_have_looked_like"] or {"bars": []})["bars"])


@pytest.mark.slow
def test_a_finished_study_trains_nothing_again(study, plan, report):

    def stamps() -> dict[Path, int]:
        """When each run's weights and figures were written, and each measurement of cost."""
        finished = [path.parent for path in study.glob("cells/*/results.json")]
        runs = [path for run in finished for path in (run / "model.safetensors", *run.glob("*.json"))]
        return {path: path.stat().st_mtime_ns for path in [*runs, *study.glob("costs/*")]}

    before = stamps()
    again = run_study(plan, study)
    assert len(before) > 30
    assert stamps() == before
    assert without_times(again) == without_times(report)


def without_times(report: dict) -> dict:
    """A report without what depends on the clock and on where it lies."""
    clocked = ("cost", "commands", "depths", "machine", "made_from")
    remaining = {key: value for key, value in report.items() if key not in clocked}
    remaining["claims"] = [claim for claim in remaining["claims"] if claim["about"] != "cost"]
    remaining = json.loads(json.dumps(remaining))
    for frontier in remaining["frontier"].values():
        for row in [*frontier["fixed"], *frontier["margins"], frontier.get("chosen", {})]:
            row.pop("ms_per_query", None)
    return remaining


def test_another_plan_in_the_same_folder_is_refused(study, plan):
    other = replace(plan, settings={**plan.settings, "epochs": 3})
    before = (study / "plan.yaml").read_text()
    with pytest.raises(FileExistsError, match="a run with other settings is there"):
        run_study(other, study)
    assert (study / "plan.yaml").read_text() == before


@pytest.mark.slow
def test_killed_at_random_moments_and_restarted_it_ends_with_the_same_report(plan, tmp_path):
    """Real processes, SIGKILL, five times; two variants, so that it takes seconds."""
    few = {name: plan.variants[name] for name in ("self", "late")}
    measure = replace(plan.measure, protocol=False, examples=1, composition=8, audit_images=8)
    short = replace(plan, variants=few, seeds=[0], measure=measure)
    (tmp_path / "plan.yaml").write_text(plan_text(short))

    def start(out: str) -> Forked:
        # One thread, as all processes of the tests: the same number of threads adds up in the same order.
        given = (str(tmp_path / "plan.yaml"), "--out", str(tmp_path / out))
        return Forked(many_processes.study, *given, out=tmp_path / f"{out}.txt")

    began = time.perf_counter()
    start("whole").ended()
    seconds = time.perf_counter() - began
    uninterrupted = json.loads((tmp_path / "whole" / "report.json").read_text())
    rng = random.Random(3)
    kills = 0
    for _ in range(5):
        process = start("killed")
        # A third of the whole at most each time, so that all the moments of a study are reached.
        if process.wait(rng.uniform(0.02, 0.33) * seconds) is None:
            process.kill()
            kills += 1
    assert kills >= 3
    start("killed").ended()
    killed = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert without_times(killed) == without_times(uninterrupted)


# --- the words -------------------------------------------------------------------------------------------------------


def test_every_number_of_the_summary_stands_in_the_report(report):
    assert len(report["claims"]) > 5
    for claim in report["claims"]:
        check_numbers(report, claim)


def test_no_number_of_a_report_is_shown_with_an_exponent_for_being_large(report):
    from clipvisionalign.study.report.tables import build_tables

    slow = copy.deepcopy(report)
    for cost in slow["cost"].values():
        cost["ms_per_1000_pairs"]["median"], cost["ms_per_caption"]["median"], cost["ms_per_query"] = (
            1012.3,
            99.996,
            54321.0,
        )
    summary = " ".join(claim["text"] for claim in report_claims(slow))
    assert "takes 1,012 ms with" in summary
    assert "takes 100 ms with" in summary
    (costs,) = [table for table in build_tables(slow) if table.name == "cost"]
    shown = [cell for row in costs.rows for cell in row]
    assert {"1,012", "54,321"} <= set(shown)
    assert "e+" not in summary + " ".join(shown)


def test_a_claim_follows_its_figures(report):
    """With a difference that is not shown the summary says so; with the same one shown, it says that."""
    other = copy.deepcopy(report)
    for row in other["results"]["differences"]:
        row["shown"] = False
    summary = " ".join(claim["text"] for claim in report_claims(other))
    assert "No difference in rsum was shown" in summary
    row = next(row for row in other["results"]["differences"] if row["figure"] == "rsum")
    row |= {"shown": True, "value": -20.0, "low": -30.0, "high": -10.0, "p_holm": 0.01}
    summary = " ".join(claim["text"] for claim in report_claims(other))
    assert f"`{row['b']}` finds more than `{row['a']}`: 20.0 [10.0, 30.0] in rsum" in summary
    assert "No other difference in rsum was shown" in summary


# --- the fence -------------------------------------------------------------------------------------------------------


def _in_batch(report):
    run = report["results"]["variants"]["self"]["runs"][0]
    run |= {"protocol": "inside batches of 8", "images": 8, "captions": 8}


def _hidden_in_batch(report):
    """The figures of another protocol under the label of the right one: they are not the means of the runs."""
    report["results"]["variants"]["self"]["figures"]["rsum"]["value"] = 590.0


def _small_gallery(report):
    report["results"]["gallery"] = {"images": 8, "captions": 8}


def _leak(report):
    run = report["results"]["variants"]["self"]["runs"][0]
    run["audit"] = copy.deepcopy(report["what_it_would_have_looked_like"]["audit_of_the_leak"])


def _extra_block(report):
    bars = report["what_it_would_have_looked_like"]["bars"]
    report["results"]["variants"]["self"]["in_batch"] = bars[1]


def _unmeasured_seed(report):
    report["results"]["variants"]["self"]["seeds"].append(7)


@pytest.mark.parametrize("tamper", [_in_batch, _hidden_in_batch, _small_gallery, _leak, _extra_block, _unmeasured_seed])
def test_what_is_no_result_does_not_get_into_the_results(report, tamper, tmp_path):
    from clipvisionalign.study.report.build import write_report

    check_results(report)
    other = copy.deepcopy(report)
    tamper(other)
    with pytest.raises(ResultsError):
        write_report(tmp_path, other)
    assert not list(tmp_path.iterdir())


def test_the_other_protocols_flatter_and_the_leak_fails_its_audit(report):
    other = report["what_it_would_have_looked_like"]
    honest, *flattering = other["bars"]
    assert honest["honest"]
    assert flattering
    assert not any(bar["honest"] for bar in flattering)
    assert not other["audit_of_the_leak"]["passed"]


def test_recall_inside_a_batch_is_that_of_a_loop():
    from clipvisionalign.study.flawed_protocols import in_batch_recall

    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 6))
    captions = np.repeat(images, 2, axis=0) + rng.normal(size=(32, 6))
    recall = in_batch_recall(images, captions, np.repeat(np.arange(16), 2), 8, seed=4)
    rng = np.random.default_rng(4)
    order = rng.permutation(16)
    own = [rng.choice([2 * image, 2 * image + 1]) for image in order]
    hits = []
    for start in (0, 8):
        for i in range(start, start + 8):
            i2t = [images[order[i]] @ captions[own[j]] for j in range(start, start + 8)]
            t2i = [images[order[j]] @ captions[own[i]] for j in range(start, start + 8)]
            hits += [sum(s >= i2t[i - start] for s in i2t) == 1, sum(s >= t2i[i - start] for s in t2i) == 1]
    assert recall["recall_at_1"] == pytest.approx(np.mean(hits))


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_known_memory_and_a_known_sleep_show_in_the_measures(tiny_runs, scenes_folder, tmp_path):
    def measured(mebibytes: int, milliseconds: int) -> dict:
        given = str(tiny_runs["self"]), str(scenes_folder), mebibytes, milliseconds
        return json.loads(Forked(many_processes.measure_costlier, *given, out=tmp_path / f"{mebibytes}.txt").ended())

    plain, more = measured(0, 0), measured(500, 20)
    assert more["peak_memory_mib"] - plain["peak_memory_mib"] == pytest.approx(500, rel=0.05)
    # A sleep takes what was asked for at least; what comes on top is the encoding, however busy the machine is.
    assert 20 < more["caption_latency_ms"]["p50"] < 20 + 5 * plain["caption_latency_ms"]["p50"]
    # Once for every call, so for each caption where they go one by one.
    assert more["by_batch"][0]["ms_per_caption"]["median"] < more["caption_latency_ms"]["p50"]


def test_the_cost_of_a_report_is_whole(report):
    for cost in report["cost"].values():
        assert cost["ms_per_query"] >= cost["caption_latency_ms"]["p50"]
        assert cost["flops_per_caption"] > 1000
        assert cost["flops_per_picture"] > 1000
        assert [row["batch"] for row in cost["by_batch"]] == [1, 8, 64]
        assert cost["by_length"][0]["tokens"] <= 8
    costs = report["cost"]
    # What `cross` stands on is counted too.
    seconds = {name: cost["training_seconds"]["mean"] for name, cost in costs.items()}
    assert seconds["cross"] > seconds["late"]
    assert costs["late"]["bytes_per_picture"] > costs["self"]["bytes_per_picture"]


def test_runs_of_the_same_frozen_towers_look_at_dev_once(tiny_settings, monkeypatch):
    from clipvisionalign.models.aligner import TowerOutputCache
    from clipvisionalign.models.image_tower import ImageTower
    from clipvisionalign.training.train import train

    settings = tiny_settings("self", freeze="both", epochs=1, steps=2)
    plain = train(settings("plain"), lambda line: None)
    remembered = TowerOutputCache()
    first = train(settings("first", "late"), lambda line: None, encodings_cache=remembered)
    assert len(remembered.images) == first["images"]
    kept, batch_sizes = dict(remembered.images), []
    # The features of this very tower are on disk already: what is left is the saved model on dev.
    forward = ImageTower.forward
    monkeypatch.setattr(
        ImageTower, "forward", lambda self, pixels: batch_sizes.append(len(pixels)) or forward(self, pixels)
    )
    again = train(settings("again"), lambda line: None, encodings_cache=remembered)
    # A tower looks at two blank images when it is built.
    assert sum(batch_sizes) < first["images"]
    assert remembered.images == kept
    assert {name: again[name] for name in ("rsum", "chosen")} == {name: plain[name] for name in ("rsum", "chosen")}


@pytest.mark.parametrize(("weights", "shared"), [("auto", True), ("random", False)])
def test_what_towers_gave_is_shared_by_cells_that_have_the_same_ones(plan, tmp_path, weights, shared):
    from clipvisionalign.study.trial import _tower_cache

    model = {**plan.settings["model"], "image_tower": {"name": "test_resnet", "weights": weights}}
    few = {name: plan.variants[name] for name in ("self", "late", "cross")}
    own = replace(plan, variants=few, settings={**plan.settings, "freeze": "both", "model": model})
    trials = {(trial.variant, trial.seed): trial for trial in trials_of(own, tmp_path)}
    kept = {}
    assert _tower_cache(trials["cross", 0], kept) is None
    one, other = _tower_cache(trials["self", 0], kept), _tower_cache(trials["late", 1], kept)
    assert (one is other is not None) == shared
    assert one is None or _tower_cache(trials["self", 0], kept, "minimal pairs") is not one


# --- commands --------------------------------------------------------------------------------------------------------


def test_two_studies_side_by_side(study, tmp_path, capsys):
    assert main(["report", str(study), "--compare", str(study), "--out", str(tmp_path / "both.html"), "--json"]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["settings"] == []
    rows = output["tables"][0]["rows"]
    assert [row[3] for row in rows if row[1] != "no result"] == ["overlap"] * 4 + [""]
    assert rows[-1][0].startswith("chance")
    assert rows[-1][1] == rows[-1][2]
    assert "two studies" in (tmp_path / "both.html").read_text()


@pytest.mark.slow
def test_a_report_is_written_anew_from_its_figures(study, capsys):
    before = (study / "report.html").read_text()
    (study / "report.html").unlink()
    assert main(["report", str(study)]) == 0
    assert (study / "report.html").read_text() == before
    assert "has the highest rsum" in capsys.readouterr().out


def test_a_dry_run_says_how_long_and_trains_nothing(plan, tmp_path, capsys):
    few = replace(plan, variants={"self": Variant()}, seeds=[0, 1])
    (tmp_path / "plan.yaml").write_text(plan_text(few))
    assert main(["study", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    stdout = capsys.readouterr().out
    assert "in all, for 2 cells" in stdout
    assert not (tmp_path / "out" / "cells").exists()


# --- people ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_made_up_set_in_rstpreids_layout_runs_the_whole_study(plan, tmp_path, monkeypatch):
    from PIL import Image, ImageDraw

    rng = random.Random(0)
    colours = ["red", "blue", "green", "yellow", "purple", "orange", "pink", "brown"]
    (tmp_path / "people" / "imgs").mkdir(parents=True)
    entries = []
    for person, (shirt, trousers) in enumerate((a, b) for a in colours for b in colours if a != b):
        split = ("train", "train", "train", "val")[person % 4]
        for camera in range(2):
            image = Image.new("RGB", (48, 96), ("white", "lightgrey")[camera])
            pencil, shift = ImageDraw.Draw(image), rng.randint(-4, 4)
            pencil.rectangle((14 + shift, 20, 34 + shift, 50), fill=shirt)
            pencil.rectangle((14 + shift, 51, 34 + shift, 90), fill=trousers)
            name = f"{person:04}_c{camera}.jpg"
            image.save(tmp_path / "people" / "imgs" / name)
            captions = [f"a {shirt} square above a {trousers} square", f"{trousers} below {shirt} in the picture"]
            entries.append({"id": person, "img_path": name, "captions": captions, "split": split})
    (tmp_path / "people" / "data_captions.json").write_text(json.dumps(entries))
    few = {name: plan.variants[name] for name in ("self", "late")}
    people = replace(plan, data=str(tmp_path / "people"), variants=few, seeds=[0])
    monkeypatch.setattr("clipvisionalign.study.cost_rounds.profile_run", many_processes.Costs(tmp_path))
    monkeypatch.setattr("clipvisionalign.study.flawed_protocols.LEAK_STEPS", 20)
    report = run_study(people, tmp_path / "out")
    assert report["data"]["layout"] == "rstpreid"
    assert not report["failed"]
    for variant in report["results"]["variants"].values():
        run = variant["runs"][0]
        for way in ("image_to_text", "text_to_image"):
            assert variant["figures"][f"{way} map"]["value"] == pytest.approx(100 * run[way]["map"]["value"])
            for k in (1, 5, 10):
                assert variant["figures"][f"{way} recall_at_{k}"]["value"] == pytest.approx(
                    100 * run[way][f"recall_at_{k}"]["value"]
                )
    assert "mAP text to image" in (tmp_path / "out" / "tables" / "accuracy.md").read_text()


def test_the_report_tells_of_captions_that_are_equal_or_cut(report):
    from clipvisionalign.study.report.html import render_page
    from clipvisionalign.study.report.summary import report_claims
    from clipvisionalign.study.report.tables import build_tables

    for name in report["results"]["variants"]:
        assert report["cut_captions"][name]["splits"].keys() >= {"train", "dev"}
    altered = copy.deepcopy(report)
    altered["cut_captions"] = {"self": {"max_tokens": 16, "splits": {
        "train": {"captions": 900, "cut": 180, "tokens_lost": 2345, "longest": 77, "share": 0.2},
        "dev": {"captions": 90, "cut": 0, "tokens_lost": 0, "longest": 16, "share": 0.0},
    }}}  # fmt: skip
    altered["data"]["equal_captions"] = {"texts": 3, "captions": 8, "images": 7, "best_rsum": 580.25, "cost": 19.75}
    claims = report_claims(altered)
    (cut,) = [claim for claim in claims if "longer ones" in claim["text"]]
    assert cut["text"].endswith("which are cut: 180 of the train split (20.0 %).")
    (equal,) = [claim for claim in claims if "word by word" in claim["text"]]
    assert "exceeds rsum 580.2, 19.8 below the highest" in equal["text"]
    for claim in (cut, equal):
        assert set(numbers_in(claim["text"])) == {figure["shown"] for figure in claim["figures"]}
    (table,) = [table for table in build_tables(altered) if table.name == "cut"]
    assert table.rows == [["self", "train", "16", "900", "180", "20.0", "77", "2,345"]]
    assert "Captions that are cut" in render_page({**altered, "claims": claims}, {})
    # Reports from before they were counted.
    for old in (altered["data"].pop("equal_captions"), altered.pop("cut_captions")):
        assert old
    assert len(report_claims(altered)) == len(claims) - 2


# --- figures that are used again -------------------------------------------------------------------------------------


def edit_captions(folder: Path, split: str) -> None:
    """The first caption of a split backwards, in place: as many bytes as before."""
    table = folder / "metadata.csv"
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    caption, split_column = rows[0].index("caption"), rows[0].index("split")
    row = next(row for row in rows[1:] if row[split_column] == split)
    row[caption] = row[caption][::-1]
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.slow
def test_figures_of_other_captions_are_not_used_again(plan, scenes_folder, tmp_path, monkeypatch):
    import shutil

    from clipvisionalign.data.captioned import DataError
    from clipvisionalign.training.train import resume

    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(scenes_folder, data)
    # What is looked at are the figures, not the files that show them.
    monkeypatch.setattr("clipvisionalign.study.kept_report.write_report", lambda study, report: None)
    monkeypatch.setattr("clipvisionalign.study.flawed_protocols.LEAK_STEPS", 5)
    quick = replace(plan.measure, protocol=True, composition=0, examples=0, rounds=0)
    settings = {**plan.settings, "epochs": 1}
    small = replace(
        plan, data=str(data), variants={"self": Variant()}, seeds=[0], measure=quick, settings=settings
    )  # fmt: skip
    before = run_study(small, out)
    trial = out / "cells" / "self-0"
    weights = (trial / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []
    with log_to(said.append):
        assert without_times(run_study(small, out)) == without_times(before)
    assert not [line for line in said if "measured again" in line]
    # An earlier version kept no word of what was measured: once more, and once only; nothing is trained again.
    for path in (trial / "measured.json", out / "other-protocols.json"):
        kept = json.loads(path.read_text())
        path.write_text(
            json.dumps({**kept, "asked": {"split": "dev"}} if "cells" in str(path) else {**kept, "asked": 0})
        )
    with log_to(said.append):
        run_study(small, out)
    assert len([line for line in said if "an earlier version kept the figures" in line]) == 2
    said.clear()
    with log_to(said.append):
        run_study(small, out)
    assert not [line for line in said if "measured again" in line]

    edit_captions(data, "dev")
    with log_to(said.append):
        after = run_study(small, out)
    messages = [line for line in said if "measured again" in line]
    assert len(messages) == 2
    assert all(line.endswith("not the same as before: captions") for line in messages)
    assert after["data"]["fingerprint"] != before["data"]["fingerprint"]
    assert (trial / "ranks-dev.npz").is_file()
    assert after["results"]["variants"]["self"]["runs"] != before["results"]["variants"]["self"]["runs"]
    with pytest.raises(DataError, match="no longer the data that it was trained on: dev has other captions now"):
        resume(trial)

    edit_captions(data, "train")
    with pytest.raises(ValueError, match="no longer the data that it was trained on: train has other captions now"):
        run_study(small, out)
    assert (trial / "model.safetensors").stat().st_mtime_ns == weights
    # Back as it was: the figures that the training kept are right again.
    shutil.rmtree(data)
    shutil.copytree(scenes_folder, data)
    with log_to(said.append):
        assert without_times(run_study(small, out)) == without_times(before)
    with log_to(said.append):
        assert resume(trial)["rsum"] == json.loads((trial / "results.json").read_text())["rsum"]
