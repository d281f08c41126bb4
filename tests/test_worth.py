"""Was a fine-tuning worth it: sentences that claim what their intervals carry, and the figures that they cite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pretrained_models import make_pretrained

from clipvisionalign.adaptation.worth_claims import worth_claims, worth_verdict
from clipvisionalign.cli import main
from clipvisionalign.cli.adaptation import _print_comparison
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.scene_dataset import write_scenes
from clipvisionalign.models.aligner import AlignerConfig
from clipvisionalign.study.report.claims.claim import lookup, numbers_in
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.train import train


def document_of(gain: tuple[float, float, float, float | None], same_model: bool = False) -> dict[str, Any]:
    """A document of one gallery with a difference: value, low, high, p."""
    value, low, high, p = gain
    row = {"a": "run", "b": "base", "value": value, "low": low, "high": high, "p": p, "p_holm": p}
    row |= {"shown": p is not None and p < 0.05, "same_model": same_model}
    rsum = {"rsum": {"value": 300.0, "low": 280.0, "high": 320.0}}
    kept = {"run": {"value": (300.0 + value) / 300.0, "low": 0.9, "high": 1.1}}
    gallery = {
        "data": "/data/flickr8k",
        "own": True,
        "foreign": False,
        "split": "test",
        "images": 9,
        "own_images": 0,
        "chance": 20.5,
        "base": rsum,
    }
    return {"split": "test", "galleries": [{**gallery, "differences": [row], "kept": kept}]}


def test_a_sentence_claims_a_difference_only_where_it_is_shown():
    text = {
        name: worth_claims(document_of(gain))[0].text
        for name, gain in {
            "gain": (45.0, 40.0, 50.0, 0.001), "loss": (-45.0, -50.0, -40.0, 0.001),
            "none": (4.0, -2.0, 10.0, 0.2), "untested": (4.0, None, None, None),
        }.items()
    }  # fmt: skip
    assert "the run finds more than the base: 45.0 [40.0, 50.0] in rsum" in text["gain"]
    assert "the run finds less than the base: 45.0 [40.0, 50.0] in rsum" in text["loss"]
    assert "no difference between the run and the base was shown: 4.0 [-2.0, 10.0]" in text["none"]
    assert "was not tested against the base, as there are too few images: 4.0 (no interval)" in text["untested"]


def test_the_verdict_claims_of_each_data_set_what_is_shown():
    document = document_of((45.0, 40.0, 50.0, 0.001))
    for gain, name in (
        ((-12.0, -20.0, -4.0, 0.01), "coco"),
        ((4.0, -2.0, 10.0, 0.2), "scenes"),
        ((4.0, None, None, None), "few"),
    ):
        other = document_of(gain)["galleries"][0]
        document["galleries"].append(other | {"data": f"/data/{name}", "own": False, "foreign": True})
    document["alpha"] = {"model": 0.5, "given": False}
    verdict = worth_verdict(document)
    assert verdict.text == (
        "On `flickr8k` (own data) the run gained 45.0 [40.0, 50.0] rsum; on `coco` (other data) the run lost 12.0 [4.0, "
        "20.0] rsum; on `scenes` (other data) no loss or gain was shown: 4.0 [-2.0, 10.0] rsum; on `few` (other data) too "
        "few images to tell: 4.0 (no interval) rsum; of the models between the two, alpha 0.5 was chosen on dev."
    )
    document["claims"] = [verdict.to_dict()]
    check_citations(document)
    assert "no gain was shown: 0.0" in worth_verdict(document_of((0.0, 0.0, 0.0, None), same_model=True)).text


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_no_figure_is_broken_between_lines(columns, monkeypatch, capsys):
    """Three data sets and three models, with the widest figures there are."""
    monkeypatch.setenv("COLUMNS", str(columns))
    widest = {"value": -100.1, "low": -200.2, "high": -300.3}
    gallery = {"data": "/data/a data set with a long name", "own": True, "foreign": False, "images": 31783, "notes": []}
    gallery |= {name: {"rsum": widest} for name in ("base", "run", "blend")} | {"chance": 20.5}
    gallery["kept"] = {name: {"value": 1.001, "low": 1.002, "high": 1.003} for name in ("run", "blend")}
    gallery["differences"] = [
        {"a": a, "b": b, **widest} for a, b in (("run", "base"), ("blend", "base"), ("run", "blend"))
    ]
    document = {"run": "r", "base": "b", "split": "test", "galleries": [gallery] * 3, "alpha": {"model": 0.5}}
    _print_comparison(document)
    printed = capsys.readouterr().out
    assert printed.count("-100.1 [-200.2, -300.3]") == 3 * 6
    assert printed.count("100.1 % [100.2, 100.3]") == 3 * 2
    assert max(map(len, printed.splitlines())) <= columns


def test_a_model_is_not_compared_with_itself():
    claims = worth_claims(document_of((0.0, 0.0, 0.0, None), same_model=True))
    assert len(claims) == 1
    assert "the run has 100.0 %" in claims[0].text


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        ((0.2, 0.1, 0.3), "20.0 [10.0, 30.0] points more."),
        ((-0.2, -0.3, -0.1), "20.0 [10.0, 30.0] points less."),
        ((0.2, -0.1, 0.5), "no difference was shown, 20.0 [-10.0, 50.0] points."),
        ((-0.2, -0.5, 0.1), "no difference was shown, -20.0 [-50.0, 10.0] points."),
        ((-0.2, None, None), "-20.0 (no interval) points, not tested, as there are too few images."),
        ((0.2, None, None), "20.0 (no interval) points, not tested, as there are too few images."),
    ],
)
def test_a_difference_in_classification_is_claimed_only_where_it_is_shown(gain, words):
    value, low, high = gain
    run = {"data": "/data/shapes", "split": "test", "top_1": {"value": 0.5 + value}, "chance": {"top_1": 0.25}}
    block = {"run": run, "baseline": {"top_1": {"value": 0.5}}}
    block["difference"] = {"top_1": {"value": value, "low": low, "high": high}}
    document = document_of((45.0, 40.0, 50.0, 0.001)) | {"classes": [block]}
    claims = worth_claims(document)
    assert claims[-1].text.endswith(words)
    document["claims"] = [claim.to_dict() for claim in claims]
    check_citations(document)


@pytest.mark.parametrize(
    ("gain", "holds", "words"),
    [
        ((1.9, 0.4, 3.6), True, "would bring +1.9 [+0.4, +3.6] in rsum, 90 % interval."),
        ((-1.9, -3.6, -0.4), True, "would cost rsum: -1.9 [-3.6, -0.4] in rsum, 90 % interval."),
        ((1.9, -0.4, 3.6), False, "is not shown: +1.9 [-0.4, +3.6] in rsum, 90 % interval; but fewer captions did not"),
    ],
)
def test_what_more_captions_bring_is_claimed_only_where_it_is_shown(gain, holds, words):
    value, low, high = gain
    twice = {"captions": 2000, "gain": value, "gain_low": low, "gain_high": high}
    test = {"value": 240.0, "low": 230.0, "high": 250.0, "measured": 245.0 if holds else 220.0, "holds": holds}
    curve = {"points": [{"captions": 500}, {"captions": 1000}], "twice": twice, "test": test, "start": None}
    document = document_of((45.0, 40.0, 50.0, 0.001)) | {"learning_curve": curve}
    claims = worth_claims(document)
    assert words in claims[-1].text
    assert "2,000 in place of 1,000" in claims[-1].text
    assert ("220" in claims[-1].text) is not holds
    for each in claims[-1].to_dict()["figures"]:
        assert float(each["shown"].replace(",", "")) == pytest.approx(lookup(document, each["path"]))


def check_citations(document: dict[str, Any]) -> None:
    """Every number of a sentence is cited, and shown as the document has it."""
    assert document["claims"]
    for claim in document["claims"]:
        shown = sorted(each["shown"] for each in claim["figures"])
        assert sorted(numbers_in(claim["text"])) == shown, claim["text"]
        for each in claim["figures"]:
            value = lookup(document, each["path"]) * float(each["factor"])
            assert float(each["shown"]) == pytest.approx(value, abs=0.051, rel=0.06)


def test_every_number_of_a_sentence_is_cited():
    for gain in ((45.0, 40.0, 50.0, 0.001), (4.0, -2.0, 10.0, 0.2)):
        document = document_of(gain)
        document["claims"] = [claim.to_dict() for claim in worth_claims(document)]
        check_citations(document)


@pytest.mark.parametrize(
    ("own", "foreign", "own_images", "words"),
    [
        (True, False, 0, "`flickr8k`, the data that it was tuned on, the run"),
        (False, False, 0, "`flickr8k`, another data set than it was tuned on, the run"),
        (False, True, 0, "`flickr8k`, data that it was not tuned on, the run"),
        (False, True, 4, "`flickr8k`, of whose 9 images 4 are of the data that it was tuned on, the run"),
    ],
)
def test_a_sentence_says_of_its_data_what_is_known(own, foreign, own_images, words):
    document = document_of((45.0, 40.0, 50.0, 0.001))
    document["galleries"][0] |= {"own": own, "foreign": foreign, "own_images": own_images}
    claims = worth_claims(document)
    assert words in claims[0].text
    document["claims"] = [claim.to_dict() for claim in claims]
    check_citations(document)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, scenes_folder) -> Any:
    """A run from a small CLIP."""
    folder = tmp_path_factory.mktemp("worth")
    clip = make_pretrained("clip", folder / "clip")
    model = AlignerConfig(pretrained=str(clip))
    settings = {"epochs": 1, "batch": 32, "precision": "float32", "trackers": "", "workers": 0, "augment": "none"}
    train(RunConfig(data=str(scenes_folder), out=str(folder / "run"), model=model, text_lr=1e-3, **settings))
    return folder / "run"


@pytest.mark.slow
def test_worth_measures_run_base_and_blend_and_keeps_its_answer(tuned, tmp_path, capsys):
    other = write_scenes(tmp_path / "other", 60, seed=9, size=64)
    flags = ["--foreign", str(other), "--alphas", "0.5", "--quiet"]
    assert main(["worth", str(tuned), *flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tuned / "worth.json").read_text())
    check_citations(document)
    check_citations({**document, "claims": [document["verdict"]]})
    assert document["earlier"] == []
    assert [gallery["own"] for gallery in document["galleries"]] == [True, False]
    assert {row["p_holm"] is None for row in document["galleries"][0]["differences"] if row["p"] is not None} <= {False}
    # Not known is said to be not known.
    assert "is not known" in document["pretraining"]["note"]
    assert main(["worth", str(tuned), *flags]) == 1
    assert "is there already" in capsys.readouterr().err
    own = json.loads((tuned / "data.json").read_text())["source"]
    images = sorted((other / "images").iterdir())
    for number, image in enumerate(images[:24]):
        folder = tmp_path / "classes" / ("circle", "square")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder)
    flags = ["--no-blend", "--foreign", own, "--classes", str(tmp_path / "classes"), "--overwrite", "--quiet"]
    assert main(["worth", str(tuned), *flags]) == 0
    printed = capsys.readouterr().out
    document = json.loads((tuned / "worth.json").read_text())
    assert printed.splitlines()[0] == document["verdict"]["text"]
    assert "is the run's own data set" in printed
    assert "chance" in printed
    assert "blend" not in printed
    assert "alpha" not in document
    check_citations(document)
    (block,) = document["classes"]
    difference = block["run"]["top_1"]["value"] - block["baseline"]["top_1"]["value"]
    assert block["difference"]["top_1"]["value"] == pytest.approx(difference)
    assert f"chance: {100 * block['run']['chance']['top_1']:.1f} %" in printed


@pytest.mark.slow
def test_worth_can_say_what_twice_the_captions_would_bring(tuned, tmp_path, capsys):
    flags = ["--no-blend", "--curve", "--out", str(tmp_path / "worth.json"), "--quiet"]
    assert main(["worth", str(tuned), *flags]) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "worth.json").read_text())
    assert document["learning_curve"] == json.loads((tuned / "curve" / "curve.json").read_text())
    claims = [claim for claim in document["claims"] if claim["text"].startswith(("Twice", "That twice"))]
    assert len(claims) == 1
    assert claims[0]["text"] in printed
    assert document["learning_curve"]["start"] is None
    document["learning_curve"]["start"] = {"run": "first", "images": 40}
    claim, images = worth_claims(document)[-1], document["learning_curve"]["points"][-1]["images"]
    assert f"was trained on 40 of the {images} images before" in claim.text
    cited = {each["path"] for each in claim.citations}
    assert {"learning_curve/start/images", "learning_curve/points/3/images"} <= cited


@pytest.mark.slow
def test_a_base_of_another_architecture_is_compared_where_nothing_is_between(tuned, scenes_folder, tmp_path, capsys):
    clip = str(tuned.parent / "clip")
    model = AlignerConfig(pretrained=clip, width=16)
    settings = {"epochs": 1, "batch": 32, "precision": "float32", "trackers": "", "workers": 0, "augment": "none"}
    train(RunConfig(data=str(scenes_folder), out=str(tmp_path / "narrow"), model=model, **settings))
    capsys.readouterr()
    assert main(["worth", str(tmp_path / "narrow"), "--quiet"]) == 1
    assert "worth --no-blend" in capsys.readouterr().err
    own = {}
    for run in (tmp_path / "narrow", tuned):
        assert main(["worth", str(run), "--no-blend", "--out", str(tmp_path / f"{run.name}.json"), "--quiet"]) == 0
        own[run] = json.loads((tmp_path / f"{run.name}.json").read_text())["galleries"][0]
    narrow, wide = own.values()
    assert narrow["base"]["rsum"] == wide["base"]["rsum"]
    gain = narrow["run"]["rsum"]["value"] - narrow["base"]["rsum"]["value"]
    assert narrow["differences"][0]["value"] == pytest.approx(gain)


def answered(capsys, run: Path, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """What worth says of run and base alone, of which every number is checked."""
    out = ["--out", str(tmp_path / "answer.json"), "--overwrite", "--no-blend", "--quiet", "--json"]
    assert main(["worth", str(run), *flags, *out]) == 0
    document = json.loads(capsys.readouterr().out)
    check_citations(document)
    return document


@pytest.mark.slow
def test_the_own_data_are_recognised_wherever_they_are_and_others_are_not_taken_for_them(tuned, tmp_path, capsys):
    own = Path(json.loads((tuned / "data.json").read_text())["source"])
    moved = shutil.copytree(own, tmp_path / "moved")
    for split in ("dev", "test"):
        document = answered(capsys, tuned, tmp_path, "--data", str(moved), "--split", split)
        assert "`moved`, the data that it was tuned on," in document["claims"][0]["text"]
    other = write_scenes(tmp_path / "other", 60, seed=9, size=64)
    for split in ("dev", "test"):
        document = answered(capsys, tuned, tmp_path, "--data", str(other), "--split", split)
        assert not document["galleries"][0]["own"]
        texts = [claim["text"] for claim in document["claims"]]
        assert all("another data set than it was tuned on" in text for text in texts), texts


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "dev"])
def test_images_of_the_run_are_not_taken_for_foreign_ones(tuned, tmp_path, capsys, split):
    """Under other names, with other captions: those that it was trained on, and those that it was chosen by."""
    own = read_captioned_images(json.loads((tuned / "data.json").read_text())["source"]).split(split).rows
    foreign = write_scenes(tmp_path / "foreign", 60, seed=9, size=64)
    gallery = read_captioned_images(foreign).split("dev").rows
    shutil.copy(own[0].image, gallery[0].image)
    document = answered(capsys, tuned, tmp_path, "--foreign", str(foreign))
    block = document["galleries"][1]
    assert (block["own_images"], block["images"]) == (1, len(gallery))
    assert any(f"1 of these {len(gallery)} images are the run's own" in note for note in block["notes"])
    assert not any("data that it was not tuned on" in claim["text"] for claim in document["claims"])
    # Some may stand in what alpha is chosen by, most may not.
    flags = ["--foreign", str(foreign), "--alphas", "0.5", "--quiet"]
    assert main(["blend", str(tuned), *flags, "--out", str(tmp_path / "some")]) == 0
    assert "are the run's own" in capsys.readouterr().out
    for theirs, ours in zip(gallery, own, strict=False):
        shutil.copy(ours.image, theirs.image)
    for command in ("blend", "worth"):
        assert main([command, str(tuned), *flags, "--out", str(tmp_path / "most")]) == 1
        error = capsys.readouterr().err
        assert f"{len(gallery)} of its {len(gallery)} images (dev) are the run's own" in error
        assert not (tmp_path / "most").exists()
    given = ["--alpha", "0.5", "--foreign", str(foreign), "--out", str(tmp_path / "given"), "--quiet"]
    assert main(["blend", str(tuned), *given]) == 0


@pytest.mark.slow
def test_without_a_choice_no_dev_split_is_needed_and_its_lack_is_told_with_the_way_out(tuned, tmp_path, capsys):
    """The figures are those of a comparison that reads dev as well."""
    other = write_scenes(tmp_path / "other", 60, seed=9, size=64)
    table = other / "metadata.csv"
    table.write_text(table.read_text().replace(",dev", ",train"))
    flags = ["--foreign", str(other), "--alphas", "0.5", "--quiet", "--split", "test"]
    for command in ("worth", "blend"):
        assert main([command, str(tuned), *flags, "--out", str(tmp_path / "out")]) == 1
        assert "'worth --no-blend --split test' needs none" in capsys.readouterr().err
    document = answered(capsys, tuned, tmp_path, "--foreign", str(other), "--split", "test")
    assert (
        main(
            [
                "worth",
                str(tuned),
                "--alphas",
                "0.5",
                "--split",
                "test",
                "--json",
                "--quiet",
                "--out",
                str(tmp_path / "f"),
            ]
        )
        == 0
    )
    blended = json.loads(capsys.readouterr().out)
    for name in ("base", "run"):
        assert document["galleries"][0][name] == blended["galleries"][0][name]


@pytest.mark.slow
def test_what_a_base_was_tuned_from_is_told(tuned, scenes_folder, tmp_path, capsys):
    """A run of a run of CLIP: the first model is named, with the command that compares with it."""
    clip = str(tuned.parent / "clip")
    settings = {"epochs": 1, "batch": 32, "precision": "float32", "trackers": "", "workers": 0, "augment": "none"}
    again = tmp_path / "again"
    train(
        RunConfig(
            data=str(scenes_folder),
            out=str(again),
            init=str(tuned),
            model=AlignerConfig(pretrained=clip),
            steps=1,
            **settings,
        )
    )
    capsys.readouterr()
    assert main(["worth", str(again), "--no-blend", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert f"{tuned} was itself tuned from {clip}: " in printed
    assert f"'clipvisionalign worth {again} --with {clip} --out FILE'" in printed
    assert json.loads((again / "worth.json").read_text())["earlier"] == [clip]
    assert (
        main(["worth", str(again), "--no-blend", "--with", clip, "--out", str(tmp_path / "first.json"), "--quiet"]) == 0
    )
    assert "was itself tuned" not in capsys.readouterr().out
