"""The demo: one question named beforehand, images that were never trained on, a search whose right answers are known."""

from __future__ import annotations

import json
import random
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.scene_dataset import random_scenes, read_scenes, write_scenes
from clipvisionalign.data.scenes import Group, Scene, draw_scene, swap_first_groups
from clipvisionalign.scene_search import draw_queries, search_quality
from clipvisionalign.study.config import Comparison, Plan, Variant
from clipvisionalign.study.plan_checks import check_plan
from clipvisionalign.study.plan_file import read_plan
from clipvisionalign.study.primary_comparison import correct_for_primary
from clipvisionalign.study.statistics import holm_correction


def gallery(count: int = 300) -> dict[str, Scene]:
    return {f"{number}.png": scene for number, (_, _, scene) in enumerate(random_scenes(count, 3, plain=True))}


def holds(scene: Scene, query: str) -> bool:
    """Read from the words, not from what the query was drawn as."""
    things = [part.split()[-2:] for part in query.split(" and ")]
    return all(any([group.colour, group.shape] == thing for group in scene.groups) for thing in things)


def test_every_right_answer_of_a_query_is_known():
    scenes = gallery()
    queries = draw_queries(scenes, 50, seed=1)
    assert len({query.text for query in queries}) == 50
    for query in queries:
        assert query.relevant == {name for name, scene in scenes.items() if holds(scene, query.text)}
        assert query.relevant
        assert query.cutoff == min(5, len(query.relevant))
    assert queries == draw_queries(scenes, 50, seed=1)
    assert queries != draw_queries(scenes, 50, seed=2)
    with pytest.raises(ValueError, match="different pairs"):
        draw_queries(gallery(4), 50)


def test_quality_is_the_share_of_right_answers_and_chance_that_of_a_blind_search():
    scenes = gallery()
    queries = draw_queries(scenes, 50)
    right = {query.text: sorted(query.relevant) for query in queries}
    assert search_quality(queries, len(scenes), lambda words, count: right[words][:count])["share"] == 100
    wrong = {query.text: [name for name in scenes if name not in query.relevant] for query in queries}
    assert search_quality(queries, len(scenes), lambda words, count: wrong[words][:count])["share"] == 0
    # What is found too little counts as wrong.
    assert search_quality(queries, len(scenes), lambda words, count: [])["share"] == 0
    rng = random.Random(0)
    blind = [search_quality(queries, len(scenes), lambda words, count: rng.sample(sorted(scenes), count))
             for _ in range(400)]  # fmt: skip
    assert sum(quality["share"] for quality in blind) / 400 == pytest.approx(blind[0]["chance"], rel=0.2)


def test_plain_scenes_have_the_splits_that_are_asked_for_and_no_near_duplicates_across_them(tmp_path):
    splits = {"train": 60, "dev": 20, "test": 40}
    folder = write_scenes(tmp_path / "scenes", 120, seed=5, size=64, plain=True, splits=splits)
    data = read_captioned_images(folder)
    assert data.split_sizes() == splits
    assert all(len(row.captions) == 2 for row in data)
    scenes = read_scenes(folder)
    assert all(name.startswith(f"images/{row.split}/") for name, row in zip(scenes, data, strict=True))
    assert all(group.count == 1 and group.size == "large" for scene in scenes.values() for group in scene.groups)
    # Twins stay in one split, and there are many of them.
    split_of = {scene.key(): name.split("/")[1] for name, scene in scenes.items()}
    foil_keys = [(key, swap_first_groups(scene).key()) for key, scene in ((s.key(), s) for s in scenes.values())]
    pairs = [(split_of[a], split_of[b]) for a, b in foil_keys if b in split_of]
    assert len(pairs) > 20
    assert all(a == b for a, b in pairs)
    with pytest.raises(DataError, match="splits of 120 images, where 119"):
        write_scenes(tmp_path / "other", 119, splits=splits)


def test_scenes_that_differ_by_yellow_and_orange_alone_are_drawn_once(tmp_path):
    """Or a gallery would hold near-duplicates of training images, and every audit would refuse its figures."""
    from clipvisionalign.data.image_fingerprints import fingerprint_image, near_pairs

    scene = Scene("white", (Group("star", "yellow", "large", 1, 0, 0), Group("ring", "blue", "large", 1, 2, 1)), 1)
    other = replace(scene, groups=(replace(scene.groups[0], colour="orange"), scene.groups[1]))
    for name, each in (("a", scene), ("b", other)):
        draw_scene(each, 64).save(tmp_path / f"{name}.png")
    marks = [fingerprint_image(tmp_path / f"{name}.png") for name in "ab"]
    assert near_pairs(marks[:1], marks[1:]), "they are near-duplicates"
    keys = set()
    for _, _, drawn in random_scenes(3000, 1, plain=True):
        groups = {(g.shape, {"yellow": "orange"}.get(g.colour, g.colour), g.column, g.row) for g in drawn.groups}
        key = drawn.background, frozenset(groups)
        assert key not in keys
        keys.add(key)


def row(a: str, b: str, figure: str, p: float | None) -> dict:
    return {"a": a, "b": b, "figure": figure, "value": 1.0, "p": p, "p_holm": None if p is None else 1.0, "shown": False,
            "seeds": [0]}  # fmt: skip


def test_the_comparison_named_beforehand_is_tested_alone_and_the_others_without_it():
    pairs = [("self", "sparse"), ("self", "late"), ("sparse", "late")]
    ps = [0.02, 0.04, 0.03]
    rows = [row(*pair, "rsum", p) for pair, p in zip(pairs, ps, strict=True)]
    rows += [row(*pair, "image_to_text recall_at_1", 0.5) for pair in pairs] + [row("self", "cross", "rsum", None)]
    rows_with_primary = correct_for_primary(rows, Comparison("rsum", "late", "self"))
    assert [each.get("primary", False) for each in rows_with_primary] == [False, True] + 5 * [False]
    assert (rows_with_primary[1]["p_holm"], rows_with_primary[1]["shown"]) == (0.04, True)
    assert [rows_with_primary[0]["p_holm"], rows_with_primary[2]["p_holm"]] == holm_correction([0.02, 0.03])
    assert rows_with_primary[3:] == rows[3:], "other families stay, and what was not tested stays untested"
    assert correct_for_primary(rows, Comparison()) == rows
    assert correct_for_primary(rows, Comparison("rsum", "self", "gone")) == rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare": Comparison("rsum", "self", "other")}, "no variant of the plan"),
        ({"compare": Comparison("rsum", "self", "self")}, "with itself"),
        ({"compare": Comparison("speed", "self", "late")}, "no figure 'speed'"),
        ({"variants": {"self": Variant(), "late": Variant({"epochs": 3})}}, "passes are not equal: epochs"),
        ({"variants": {"self": Variant(), "late": Variant(base="self")}}, "stands on another"),
    ],
)
def test_a_comparison_that_is_none_is_refused(change, message):
    plan = Plan(variants={"self": Variant(), "late": Variant()}, compare=Comparison("rsum", "self", "late"))
    check_plan(plan)
    with pytest.raises(ValueError, match=message):
        check_plan(replace(plan, **change))
    if "passes" in message or "stands" in message:
        check_plan(replace(plan, **change, compare=replace(plan.compare, passes="any")))


def test_the_demos_plan_names_its_question_and_measures_what_was_not_trained_on():
    plan = read_plan("demo")
    assert plan.compare == Comparison("rsum", "self", "late", "equal")
    assert plan.drawing.splits[plan.split] >= 1000
    assert plan.split == "test"


@pytest.mark.slow
def test_the_demo_ends_with_a_search_and_the_second_call_takes_what_is_finished(
    tmp_path, tiny_model, monkeypatch, capsys
):
    from dataclasses import asdict

    from clipvisionalign import cli, demo
    from clipvisionalign.study.report.build import read_report

    monkeypatch.chdir(tmp_path)
    plan = read_plan("demo")
    settings = plan.settings | {"model": asdict(tiny_model()), "epochs": 1, "batch": 16, "trackers": ""}
    settings["model"].pop("design")
    small = replace(
        plan, scenes=200, drawing=replace(plan.drawing, pixels=64, splits={"train": 48, "dev": 24, "test": 128}),
        seeds=[0], settings=settings, measure=replace(plan.measure, rounds=0, composition=20, audit_images=8),
    )  # fmt: skip
    report = demo.demo(Path("demo"), small)
    captured = capsys.readouterr()
    search_report = report["search"]
    assert search_report["queries"] == 50
    assert search_report["gallery"] == 128
    assert len(search_report["each"]) == 50
    assert next(row for row in report["results"]["differences"] if row.get("primary"))["figure"] == "rsum"
    assert any(claim["text"].startswith("Named beforehand") for claim in report["claims"])
    assert f"{search_report['share']:.0f} % of the first answers" in captured.out
    kept = read_report("demo")
    assert kept["search"] == search_report
    assert "Named beforehand" in Path("demo/report.html").read_text()
    # What the last lines say to type is what was measured.
    command = next(line for line in captured.out.splitlines() if " search " in line and "demo/index" in line)
    arguments = shlex.split(command)[1:]
    assert cli.main([*arguments, "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["found"]
    assert len(hits) == 10
    assert arguments[-2:] == ["--rerank", str(demo.RERANK_DEPTH)] or not search_report["rerank"]
    # Once more: nothing is trained, measured or encoded anew, and the answer is the same.
    monkeypatch.setattr("clipvisionalign.training.trainer_setup.Step", None)
    monkeypatch.setattr("clipvisionalign.study.trial.evaluate", None)
    again = demo.demo(Path("demo"), small)
    assert again["search"] == search_report
