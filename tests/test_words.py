"""The sentences of a report: each says what its figures carry, with none, one, two and many of what it speaks of."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from made_reports import check_numbers, cost_round, made_report

from clipvisionalign.study.aggregate import length_terciles
from clipvisionalign.study.config import Comparison
from clipvisionalign.study.report.claims.captions import foils_note
from clipvisionalign.study.report.claims.claim import CLAIM_LEVEL, numbers_in
from clipvisionalign.study.report.plots.captions import plot_length
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.states import two_seeds_widen
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.report.tables import ReportTable, build_tables, to_latex, to_markdown
from clipvisionalign.study.statistics import estimate

few = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    # Not made smaller: each example is a report, and names itself.
    phases=[Phase.explicit, Phase.generate],
)  # fmt: skip


def sentences(report: dict[str, Any], about: str = "") -> list[str]:
    """The summary of a report, every number of it traced to its figure."""
    claims = report_claims(report)
    for claim in claims:
        check_numbers(report, claim)
    return [claim["text"] for claim in claims if about in ("", claim["about"])]


def starting(report: dict[str, Any], *prefixes: str) -> list[str]:
    return [text for text in sentences(report) if text.startswith(prefixes)]


@few
@given(
    skills=st.lists(st.sampled_from([0.0, 0.3, 0.31, 0.9, 1.0]), min_size=1, max_size=4), seeds=st.integers(1, 3),
    images=st.sampled_from([1, 2, 5, 6, 7, 40]), lengths=st.sampled_from([(4, 9), (5,), (3, 3), (3, 6, 6, 9, 12)]),
    alike=st.booleans(), gone=st.integers(0, 3), pairs=st.sampled_from([None, {"count": 1}, {"count": 2, "relation": 30}]),
    rounds=st.integers(0, 3), compared=st.booleans(),
)  # fmt: skip
def test_no_sentence_says_more_than_its_figures(skills, seeds, images, lengths, alike, gone, pairs, rounds, compared):
    """Whatever a study has had for a result."""
    names = ["self", "late", "cross", "sparse"][: len(skills)]
    trials = [(name, seed) for name in names for seed in range(seeds)]
    report = made_report(
        dict(zip(names, skills, strict=True)), range(seeds), images, lengths, alike=alike, pairs=pairs,
        missing=trials[:gone][: len(trials) - 1], costs={name: [cost_round()] * rounds for name in names} if rounds else None,
    )  # fmt: skip
    if compared and len(names) > 1:
        report["plan"]["compare"] |= {"a": names[0], "b": names[1]}
    results, texts = report["results"], sentences(report)
    for text in texts:
        assert not re.search(r"(?<![\w.])1 (?!Relation)\w+s\b(?<!is)|-0\.0\b|\[100\.0, 100\.0\]|\bNone\b", text), text
        for name in names:
            # No variant beside itself.
            assert not re.search(rf"(?:with|over|between) `{name}`[^;:]*(?:with|over|and) `{name}`", text), text
        for p in re.findall(r"p = ([\d.e-]+)", text):
            assert (float(p) < CLAIM_LEVEL) == (
                "finds more" in text or ("is shown" in text and "no difference" not in text)
            )
    of_rsum = [row for row in results["differences"] if row["figure"] == "rsum"]
    assert any("No" in text and "difference in rsum was shown" in text for text in texts) == any(
        row["p"] is not None and not row["shown"] for row in of_rsum
    )
    assert sum("finds more than" in text for text in texts) == sum(row["shown"] for row in of_rsum)
    if images < 6:
        assert not any("finds more" in text or "p = " in text for text in texts)
    best = [name for name, variant in results["variants"].items()
            if variant["figures"]["rsum"]["value"] == max(v["figures"]["rsum"]["value"] for v in results["variants"].values())]  # fmt: skip
    highest = [text for text in texts if "the highest" in text and "rsum" in text and "below" not in text]
    assert all(f"`{name}`" in text for text in highest for name in best)
    assert bool(highest) == (len(best) < len(results["variants"]))


@pytest.mark.parametrize("variants", [0, 1, 2, 4])
def test_what_is_told_of_no_variant_one_two_and_many(variants):
    names = ["self", "late", "cross", "sparse"][: max(variants, 1)]
    refused = [(name, seed) for name in names for seed in (0, 1)] if not variants else []
    texts = sentences(made_report(dict.fromkeys(names, 0.4), refused=refused, alike=True))
    first = {
        0: "No run has a result. Refused, as the audit failed: `self` seed 0 and `self` seed 1.",
        1: "`self` has an rsum of",
        2: "All variants have the same rsum,",
        4: "All variants have the same rsum,",
    }
    assert texts[0].startswith(first[variants])
    assert any(" between `self` and `late`" in text for text in texts) == (variants > 1)


def test_every_run_passed_only_where_there_is_one():
    full_report = made_report(seeds=[0])
    assert starting(full_report, "Every run in the results passed its audit.")
    one = made_report({"self": 0.4}, [0])
    assert starting(one, "The one run in the results passed its audit.")
    none = made_report({"self": 0.4}, [0], refused=[("self", 0)])
    assert starting(none, "No run has a result.")
    assert not any("passed" in text for text in sentences(none))


@pytest.mark.parametrize(
    ("skill", "dual", "word"), [(0.9, 0.1, "gains"), (0.1, 0.9, "loses"), (0.5, 0.5, "was not shown")]
)
def test_what_is_lost_is_told_without_a_minus(skill, dual, word):
    report = made_report({"late": skill}, [0], dual={"late": dual})
    (text,) = starting(report, "Re-ranking by `late`")
    value, low, high = map(float, numbers_in(text))
    assert f"`late` {word}" in text
    if word == "was not shown":
        assert low <= 0 <= high
    else:
        assert 0 < low <= value <= high
    (text,) = starting(made_report({"late": skill}, [0], images=2, dual={"late": dual}), "Re-ranking by `late`")
    assert "was not tested" in text


@pytest.mark.parametrize("pairs", [1, 2, 5, 6, 60])
def test_few_pairs_show_nothing(pairs):
    """All of them told apart, however many they are."""
    for names in (["self"], ["self", "late"]):
        report = made_report(dict.fromkeys(names, 1.0), pairs={"count": pairs})
        (text,) = starting(report, "Counts changed")
        if pairs < 6:
            assert text == f"Counts changed: not tested, as there are too few pairs ({pairs} pair{'s' * (pairs > 1)})."
        else:
            assert "above chance" in text
            assert "[100.0, 100.0]" not in text
        assert ("alike" in text) == (pairs >= 6 and len(names) > 1)


def test_a_named_comparison_that_was_not_made_is_told():
    report = made_report({"self": 0.4, "late": 0.4}, missing=[("late", 0), ("late", 1)])
    report["plan"]["compare"] |= {"a": "self", "b": "late"}
    (text,) = starting(report, "Named beforehand")
    assert text.endswith("not compared, as `late` has no result.")


@pytest.mark.parametrize("shown", [True, False])
def test_the_named_comparison_counts_among_what_was_shown(shown):
    """No sentence after it says that none was shown, or calls another the largest of all."""
    from clipvisionalign.study.config import Comparison

    skills = {"self": 0.2, "late": 0.9 if shown else 0.2, "cross": 0.2}
    report = made_report(skills, [0], compare=Comparison(a="self", b="late", passes="any"))
    del report["results"]["differences"][1:]
    report["results"]["differences"].append(
        {**report["results"]["differences"][0], "b": "cross", "value": 1.0, "low": -1.0, "high": 2.0, "p": 0.4,
         "p_holm": 0.4, "shown": False, "primary": False}
    )  # fmt: skip
    texts = sentences(report)
    assert texts[0].startswith("Named beforehand")
    assert ("the difference is shown" in texts[0]) == shown
    assert any(text.startswith("No other difference in rsum") for text in texts)


@few
@given(word_counts=st.lists(st.integers(1, 12), min_size=1, max_size=60))
def test_captions_of_one_length_stand_in_one_part(word_counts):
    captions = [" ".join(["a"] * count) for count in word_counts]
    terciles = length_terciles(captions)
    spans = list(terciles["words"].values())
    assert all(before[1] < after[0] for before, after in itertools.pairwise(spans))
    assert len(spans) == min(3, len(set(word_counts)))
    assert (sum(inside.astype(int) for inside in terciles["inside"].values()) == 1).all()
    for name, inside in terciles["inside"].items():
        assert [min(np.array(word_counts)[inside]), max(np.array(word_counts)[inside])] == terciles["words"][name]
    # The order of the file decides nothing.
    assert length_terciles(captions[::-1])["words"] == terciles["words"]
    if len(set(word_counts)) == len(word_counts) >= 3:
        sizes = [inside.sum() for inside in terciles["inside"].values()]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("a", "b", "text_part"), [
    ([2.0, 2.1, 2.2], [2.0, 2.2, 2.3], "differ by no more than one variant does"),
    ([2.0, 2.1, 2.2], [2.3, 2.4, 2.5], "differ by no more than one variant does"),
    ([2.0, 2.1, 2.2], [4.0, 4.1, 4.2], "2.1 ms with `self` and 4.1 ms with `late`"),
    ([2.0], [4.0], "spread of one variant was not measured"),
    ([2.0, 2.1], [2.2], "spread of one variant was not measured"),
    ([2.0], [4000.0], "2 ms with `self` and 4,000 ms with `late`"),
    ([2.0, 2.0], [2.0, 2.0], "2 ms with every variant"),
])  # fmt: skip
def test_a_difference_of_cost_is_told_where_it_exceeds_the_spread(a, b, text_part):
    """Of time and of memory alike; of memory that was measured once nothing is compared."""
    rounds = {"self": a, "late": b}
    times = {name: [cost_round(ms=value) for value in several] for name, several in rounds.items()}
    (text,) = starting(made_report(seeds=[0], costs=times), "Encoding a caption")
    assert text_part in text
    memory = {name: [cost_round(device=1000 * value) for value in several] for name, several in rounds.items()}
    (text,) = starting(made_report(seeds=[0], costs=memory), "Its memory on the GPU")
    if len(a) == 1:
        assert "was not measured, so that none is shown to take less" in text
    else:
        assert re.sub(r"(\d)(?:\.(\d))? ms", lambda match: f"{match[1]},{match[2] or 0}00 MiB", text_part) in text


def test_memory_of_whole_processes_that_differ_by_less_than_a_percent_is_told_to_be_equal():
    costs = {name: [cost_round(host=2040 + n + 3 * r) for r in range(2)] for n, name in enumerate(("self", "late"))}
    (text,) = starting(made_report(seeds=[0], costs=costs), "The memory of a process")
    assert "2,042 to 2,042 MiB" not in text
    assert "differ by no more than one variant does" in text


@pytest.mark.parametrize(
    ("steps", "text_part"),
    [
        ((96, 224), "equal passes planned, 96 and 224 steps trained"),
        ((96, 96), ", equal passes"),
        ((None, 96), ", equal passes planned)"),
    ],
)
def test_passes_are_called_equal_where_they_were(steps, text_part):
    """A run that stops early has made fewer than its plan says."""
    compared = Comparison("rsum", "self", "late", "equal")
    report = made_report(compare=compared, costs={name: [cost_round()] for name in ("self", "late")})
    # Reports from before steps had a place of their own have them with the cost.
    del report["training_steps"]
    for name, value in zip(("self", "late"), steps, strict=True):
        report["cost"][name]["training_steps"] = value and {"mean": value}
    (text,) = [claim["text"] for claim in report_claims(report) if claim["text"].startswith("Named")]
    assert text_part in text


def test_passes_that_are_equal_in_the_mean_alone_are_not_called_equal():
    report = made_report(compare=Comparison("rsum", "self", "late", "equal"))
    for name, each in (("self", [10.0, 20.0]), ("late", [20.0, 10.0])):
        report["training_steps"][name] = {"mean": 15.0, "each": each}
    (text,) = [claim["text"] for claim in report_claims(report) if claim["text"].startswith("Named")]
    assert "equal passes planned, 15 and 15 steps trained on average" in text


def test_a_control_is_told_to_be_one():
    report = made_report()
    report["plan"]["variants"]["late"]["same_as"] = "self"
    texts = [claim["text"] for claim in report_claims(report) if "as a control" in claim["text"]]
    shown = [
        row for row in report["results"]["differences"] if {row["a"], row["b"]} == {"self", "late"} and row["shown"]
    ]
    assert texts[0].startswith("`late` has all settings of `self`, as a control: what differs between them is chance")
    assert len(texts) == 1
    assert ("called a difference" in texts[0]) == bool(shown)


def test_what_is_written_with_the_same_digits_is_told_once():
    costs = {name: [cost_round(host=1076 + part)] for name, part in (("self", 0.1), ("late", 0.3))}
    (text,) = starting(made_report(seeds=[0], costs=costs), "The memory of a process")
    assert text.endswith("peaks at 1,076 MiB with every variant.")


@pytest.mark.parametrize(
    ("spans", "note"),
    [
        (((2, 10), (10, 13), (13, 33)), "Captions of 10 and 13 words stand in two parts"),
        (((2, 10), (10, 13), (14, 33)), "Captions of 10 words stand in two parts"),
        (((2, 9), (10, 13), (14, 33)), ""),
        (((5, 5),), ""),
    ],
)
def test_parts_of_length_that_share_a_length_are_told_wherever_they_are_shown(spans, note):
    """Reports from before the parts were cut between two lengths."""
    from matplotlib import pyplot

    report = made_report(seeds=[0], lengths=(4, 9, 14))
    names = list(report["results"]["lengths"]["words"])[: len(spans)]
    report["results"]["lengths"]["words"] = {name: list(span) for name, span in zip(names, spans, strict=True)}
    claims = [claim for claim in report_claims(report) if "two parts" in claim["text"]]
    (table,) = [each for each in build_tables(report) if each.name == "length"]
    figure, *about = plot_length(StudyReport.of(report))
    pyplot.close(figure)
    assert len(claims) == ("two parts" in table.note) == ("two parts" in " ".join(about)) == bool(note)
    for claim in claims:
        assert claim["text"].startswith(note)
        check_numbers(report, claim)


@pytest.mark.parametrize("scenes", [0, 40])
@pytest.mark.parametrize("sets", [["this data"], ["aro"], ["this data", "aro"], []])
def test_where_foils_come_from_is_told_of_the_data_and_not_of_the_plan(scenes, sets):
    report = made_report(seeds=[0], pairs={"count": 8}, scenes=scenes)
    assert report["data"]["drawn"] is False
    report["results"]["composition"] = dict.fromkeys(sets, report["results"]["composition"]["this data"])
    for drawn in (False, True):
        report["data"]["drawn"] = drawn
        text = foils_note(StudyReport.of(report))
        assert ("drawn" in text) == (drawn and "this data" in sets)
        assert ("by rule" in text) == (not drawn and "this data" in sets)
        assert ("aro are read" in text) == ("aro" in sets)
    # Reports from before it was written down: the plan's own data is not what it draws.
    del report["data"]["drawn"]
    assert "drawn" not in foils_note(StudyReport.of(report))
    report["plan"]["data"] = ""
    assert ("drawn" in foils_note(StudyReport.of(report))) == (bool(scenes) and "this data" in sets)


@pytest.mark.parametrize(
    ("value", "low", "high"), [(5.0, 1.0, 9.0), (-5.0, -9.0, -1.0), (0.5, -2.0, 3.0), (4.0, None, None)]
)
def test_a_run_and_a_study_are_told_of_in_the_same_words(value, low, high, capsys):
    """What `train` and `evaluate` print of one run's figures, and the summary of a study of the same."""
    from clipvisionalign.cli.output import print_metrics
    from clipvisionalign.retrieval.metrics import metric_label
    from clipvisionalign.study.aggregate import directed_metric_label

    gain = {"value": value, "low": low, "high": high}
    equal = {"texts": 1, "captions": 2, "images": 2, "best_rsum": 598.0, "cost": 2.0}
    block = {way: {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("recall_at_1", "map")}
             for way in ("image_to_text", "text_to_image")} | {"rsum": {"value": 300.0, "low": 290.0, "high": 310.0}}  # fmt: skip
    rerank_result = {"candidates": 5, "recall_at_1": [0.5, 0.5], "rsum": 300.0, "pairs": 10, "ms_per_query": 1.0}
    print_metrics({"run": "late", "data": "d", "split": "dev", "images": 2, "captions": 4, **block, "dual": block,
                    "reranked": block, "gain": gain, "depths": [rerank_result], "equal_captions": equal})  # fmt: skip
    printed = capsys.readouterr().out
    report = made_report({"late": 0.5}, [0], dual={"late": 0.5})
    report["results"]["variants"]["late"]["gain"] |= gain
    report["data"]["equal_captions"] |= equal
    (text,) = starting(report, "Re-ranking by")
    assert text.removeprefix("Re-ranking by `late` ").removesuffix(".") in printed.replace(
        "4.0 in", "4.0 (no interval) in"
    )
    (text,) = starting(report, "2 captions are equal")
    assert text.partition("; ")[0] in printed
    assert "(1 text of 2 images)" in printed
    for name in ("recall_at_1", "map"):
        assert metric_label(name) in printed
        assert directed_metric_label(f"image_to_text {name}") == f"{metric_label(name)} image to text"


def test_two_seeds_are_blamed_only_where_they_make_the_interval_wide():
    """Runs that are all but alike: what is wide is of the images, and a third seed changes nothing."""
    rng = np.random.default_rng(1)
    of_images = rng.normal(12, 60, (1, 300))
    for by_seed, is_blamed in ((0.2, False), (20.0, True)):
        table = of_images + rng.normal(0, 3, (3, 300)) + by_seed * np.array([[1.0], [-1.0], [0.5]])
        two, three = (estimate(table[:seeds], (-600, 600)) for seeds in (2, 3))
        assert two_seeds_widen(two.to_dict()) == is_blamed
        assert ((three.high - three.low) < 0.7 * (two.high - two.low)) == is_blamed
    assert not two_seeds_widen(estimate(table[:1], (-600, 600)).to_dict())
    # In the summary, and in the table's note.
    report = made_report({"self": 0.4, "late": 0.6}, [0, 1], images=60)
    row = next(row for row in report["results"]["differences"] if row["figure"] == "rsum")
    for spread, is_blamed in ((0.01, False), (row["high"] - row["value"], True)):
        for each in report["results"]["differences"]:
            each["spread"] = spread if each is row or not is_blamed else 0.01
        texts = [claim["text"] for claim in report_claims(report)]
        notes = " ".join(table.note for table in build_tables(report))
        assert any("degree of freedom" in text for text in texts) == is_blamed
        assert ("degree of freedom" in notes) == is_blamed


@pytest.mark.parametrize("named", ["self", ""])
def test_no_other_difference_was_shown_where_one_is_told_already(named):
    compare = Comparison(a="self", b="late") if named else None
    report = made_report(dict.fromkeys(("self", "late", "cross"), 0.45), [0], images=20, **({"compare": compare} if compare else {}))  # fmt: skip
    assert not any(row["shown"] for row in report["results"]["differences"])
    (text,) = starting(report, "No ")
    assert text.startswith("No other difference" if named else "No difference")


@pytest.mark.parametrize("failed", [(), ("cross",), ("cross", "late")])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("images", [2, 30])
def test_variants_without_results_are_in_no_all_and_no_highest(failed, alike, images):
    """Nor is an interval named where none is shown."""
    skills = {"self": 0.4, "late": 0.4 if alike else 0.9, "cross": 0.4 if alike else 0.6}
    report = made_report(skills, [0], images=images, alike=alike, missing=[(name, 0) for name in failed])
    sentence = next(text for text in sentences(report) if "rsum" in text)
    values = {result["figures"]["rsum"]["value"] for result in report["results"]["variants"].values()}
    if len(failed) < 2:
        assert ("All variants" in sentence) == (not failed and len(values) == 1)
        assert ("that have results" in sentence) == bool(failed)
    assert ("its interval" in sentence) == ("[" in sentence)


def test_steps_of_equal_passes_are_told_where_cost_was_not_measured():
    report = made_report({"self": 0.4, "late": 0.6}, [0, 1], compare=Comparison(a="self", b="late"))
    assert not report["cost"]
    assert ", equal passes)" in sentences(report)[0]
    report["training_steps"]["late"] = {"mean": 60.0, "each": [60, 60]}
    (text,) = [claim["text"] for claim in report_claims(report) if claim["text"].startswith("Named")]
    assert "equal passes planned, 20 and 60 steps trained" in text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from("\n\r\u2028^|&~\\")))
def test_a_table_has_a_line_for_each_row_whatever_stands_in_it(text):
    """As the lines of a model's error, which its audit tells."""
    table = ReportTable("t", "T", ["run", "what was seen"], [["self", text], ["late", "none"]], [[None, None]] * 2)
    rows = [line for line in to_markdown(table).splitlines() if line.startswith("| ")]
    assert len(rows) == 3
    assert all(row.count("|") == 3 for row in rows)
    lines = to_latex(table).splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == 2
    assert "" not in lines
    special = r"\textasciicircum{}"
    assert not set("^~") & set("".join(body).replace(special, ""))
