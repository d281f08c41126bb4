"""Captions of an image as one long text: which captions are in it, when, and that all who read captions agree on it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from clipvisionalign import read_captioned_images
from clipvisionalign.adaptation.curve_trainings import plan_trainings
from clipvisionalign.adaptation.galleries import read_galleries
from clipvisionalign.batch import Batch
from clipvisionalign.cli import main
from clipvisionalign.cli.output import print_metrics
from clipvisionalign.data.batches import CaptionedBatches
from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages, normalize_caption
from clipvisionalign.data.foils import make_minimal_pairs
from clipvisionalign.data.joined_captions import (
    distinct_captions,
    gallery_texts,
    join_captions,
    log_single_captions,
    training_text,
    with_captions,
)
from clipvisionalign.data.streams.loader import StreamedBatches
from clipvisionalign.data.streams.sources import open_stream
from clipvisionalign.data.streams.writing import write_shards
from clipvisionalign.study.config import Measurements, Plan, Variant, trials_of
from clipvisionalign.study.plan_file import read_plan
from clipvisionalign.study.runner import run_study
from clipvisionalign.study.seal import plan_hash
from clipvisionalign.study.verify import verify_report
from clipvisionalign.training import trainer
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.halves import split_halves
from clipvisionalign.training.train import resume, train

CAPTIONS = st.lists(st.text("ab .", min_size=1).filter(str.strip), min_size=1, max_size=6)


# --- one text --------------------------------------------------------------------------------------------------------


@given(numbers=st.lists(st.integers(0, 20), min_size=1, max_size=6), seed=st.integers(0, 9), epoch=st.integers(1, 99))
def test_a_text_holds_captions_of_its_image_none_twice_and_is_always_the_same(numbers, seed, epoch):
    captions = [f"number {number}" for number in numbers]
    text = training_text(captions, seed, epoch, "1.jpg")
    parts = re.findall(r"number \d+", text)
    assert set(parts) <= set(captions)
    assert len(parts) == len(set(parts)) >= 1
    assert text == training_text(captions, seed, epoch, "1.jpg")


@given(captions=CAPTIONS)
def test_captions_that_are_equal_word_by_word_count_once(captions):
    different = distinct_captions(captions)
    assert {normalize_caption(caption) for caption in captions} == {normalize_caption(each) for each in different}
    assert len(gallery_texts(captions)) == len(different) == len({normalize_caption(each) for each in different})


def test_every_caption_every_number_of_them_and_every_order_comes():
    captions, texts = ["one", "two", "three"], set()
    for epoch in range(1, 400):
        texts.add(training_text(captions, 0, epoch, "1.jpg"))
    # Ordered samples of one, two and three of three.
    assert len(texts) == 3 + 6 + 6
    counts = [len(training_text(captions, 0, epoch, "1.jpg").split()) for epoch in range(1, 3001)]
    for number in (1, 2, 3):
        assert counts.count(number) == pytest.approx(1000, abs=150)


def test_seed_epoch_and_image_each_change_the_texts():
    captions = [f"number {number}" for number in range(5)]

    def texts(seed: int = 0, epoch: int = 1, name: str = "") -> list[str]:
        return [training_text(captions, seed, epoch, f"{name}{number}.jpg") for number in range(20)]

    assert texts() == texts()
    assert all(texts() != other for other in (texts(seed=1), texts(epoch=2), texts(name="a")))


def test_a_gallery_has_a_text_of_each_number_of_captions_and_is_this_one_everywhere():
    captions = ["a dog runs", "Two dogs .", "a brown dog", "dogs!"]
    texts = gallery_texts(captions)
    assert texts == (
        "a dog runs",
        "a dog runs. a brown dog",
        "a brown dog. Two dogs . dogs!",
        "Two dogs . a brown dog. dogs! a dog runs",
    )
    assert texts[0] in captions
    for text in texts:
        assert sum(caption.rstrip("!. ") in text for caption in ("dog runs", "Two dogs", "brown dog", "dogs!"))


def test_sentences_end_before_the_next_begins():
    assert join_captions(["a dog", "a cat .", "a bird!", "an ant"]) == "a dog. a cat . a bird! an ant"
    assert join_captions([" a dog"]) == " a dog"


# --- what a data set gives -------------------------------------------------------------------------------------------


def numbered(images: int = 40, captions: int = 5) -> CaptionedImages:
    """Captions of one number each, no two alike; every fourth image is of dev."""
    rows = [
        CaptionedImage(
            f"{n}.jpg", b"", tuple(f"number {n * captions + k + 1}" for k in range(captions)), "dev" if n % 4 == 3 else "train"
        )
        for n in range(images)
    ]  # fmt: skip
    return CaptionedImages(rows)


def tokenize(texts) -> list[list[int]]:
    return [[int(number) for number in re.findall(r"\d+", text)] for text in texts]


def texts_of(batch: Batch) -> dict[int, tuple[int, ...]]:
    """By the place of its image in the data set, the numbers in each text."""
    ids = {}
    for group in batch.captions:
        for row, mask, position in zip(
            group.ids.tolist(), group.mask.sum(1).tolist(), group.rows.tolist(), strict=True
        ):
            ids[int(batch.image_index[batch.caption_image[position]])] = tuple(row[:mask])
    return ids


def epoch_texts(batches, epoch: int = 1, batch: int = 8, **more) -> dict[int, tuple[int, ...]]:
    return dict(chain.from_iterable(texts_of(each).items() for each in batches.epoch(batch, epoch, 3, **more)))


def numbers_of(captions) -> set[int]:
    return set(chain.from_iterable(tokenize(captions)))


def write_numbered(folder: Path, kind: str) -> str:
    """Shards or Parquet files of `numbered`, with images."""
    rows = []
    for row in numbered():
        image = folder / "images" / row.name
        image.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(image)
        rows.append(replace(row, image=image))
    if kind == "shards":
        write_shards(CaptionedImages(rows), str(folder / "shards"), per_shard=7)
        return str(folder / "shards")
    import pyarrow
    import pyarrow.parquet

    train = [row for row in rows if row.split == "train"]
    columns = {
        "image": [{"bytes": row.image.read_bytes(), "path": row.name} for row in train],
        "captions": [list(row.captions) for row in train],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train-0.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train-1.parquet")
    return str(folder / "train-{0..1}.parquet")


def of_kind(kind: str, folder: Path, seed: int = 3) -> CaptionedBatches | StreamedBatches:
    if kind == "table":
        return CaptionedBatches(numbered().split("train"), tokenize, 0, None, seed)
    return StreamedBatches(open_stream(write_numbered(folder, kind)), tokenize, 0, None, "auto", seed)


@pytest.mark.parametrize("kind", ["table", "shards", "parquet"])
def test_no_caption_of_the_dev_gallery_is_trained_on_and_every_one_of_training_can_come(kind, tmp_path):
    data = numbered()
    gallery = numbers_of(with_captions(data.split("dev"), "joined").captions)
    assert gallery == numbers_of(data.split("dev").captions)
    batches, seen = of_kind(kind, tmp_path), set()
    for epoch in range(1, 30):
        texts = epoch_texts(batches, epoch)
        assert all(len(set(text)) == len(text) for text in texts.values())
        # Those of one image.
        assert all(len({(number - 1) // 5 for number in text}) == 1 for text in texts.values())
        seen |= set(chain.from_iterable(texts.values()))
    assert not seen & gallery
    assert seen == numbers_of(data.split("train").captions)


@pytest.mark.parametrize("kind", ["table", "shards"])
def test_the_texts_of_an_epoch_are_the_same_however_it_is_dealt(kind, tmp_path):
    batches = of_kind(kind, tmp_path)
    whole = epoch_texts(batches, 2)
    assert len(whole) == 30
    assert epoch_texts(batches, 2, batch=5) == whole
    assert epoch_texts(batches, 2, workers=2) == whole
    shares = [epoch_texts(batches, 2, process_rank=(rank, 2)) for rank in (0, 1)]
    assert shares[0] | shares[1] == whole
    # A run that resumes: the steps from the third on, by a reader that has read nothing.
    rest = epoch_texts(of_kind(kind, tmp_path / "again") if kind == "table" else batches, 2, start=2)
    assert 0 < len(rest) < 30
    assert rest.items() <= whole.items()
    assert epoch_texts(batches, 3) != whole


def test_a_chunk_that_comes_twice_has_the_same_texts():
    batches = CaptionedBatches(numbered().split("train"), tokenize, 0, None, 3)
    chunks = [texts_of(batch) for batch in batches.epoch(8, 1, 3, chunk_size=3)]
    count = batches.num_chunks(8, 0, 3)
    assert count > 1
    assert chunks[:count] == chunks[count : 2 * count]
    assert dict(chain.from_iterable(each.items() for each in chunks)) == epoch_texts(batches, 1)


def test_joining_can_be_undone_and_images_that_share_a_caption_stay_in_one_half():
    data = numbered().split("dev")
    shared = [replace(row, captions=(*row.captions, f"the same {index // 2}")) for index, row in enumerate(data.rows)]
    data = replace(data, rows=shared)
    joined = with_captions(data, "joined")
    assert with_captions(joined, "joined") is joined
    assert with_captions(joined, "each") == data
    assert joined.fingerprint() != data.fingerprint()
    halves = split_halves(joined)
    assert halves is not None
    assert halves.image_half[::2].tolist() == halves.image_half[1::2].tolist()
    assert halves.image_half.tolist() == split_halves(data).image_half.tolist()


def test_minimal_pairs_are_of_single_captions():
    rows = [
        CaptionedImage(f"{n}.jpg", b"", ("a dog chases a cat", "a red car beside a blue car"), "dev") for n in range(3)
    ]
    data = CaptionedImages(rows)
    assert make_minimal_pairs(with_captions(data, "joined")) == make_minimal_pairs(data)
    assert make_minimal_pairs(data)


@pytest.fixture(scope="module")
def make(tiny_settings):
    return tiny_settings("late", captions="joined", epochs=2, freeze="both")


@pytest.fixture(scope="module")
def joined_run(make) -> tuple[RunConfig, dict]:
    """Settings of a run that is trained with joined captions, and its results."""
    config = make("recorded", design="self", epochs=1)
    return config, train(config)


# --- settings that do not fit ----------------------------------------------------------------------------------------


def test_what_joined_captions_cannot_be_beside_is_refused_by_name(joined_run, capsys):
    usual = RunConfig(data="x", captions="joined")
    with pytest.raises(ValueError, match=r"--captions joined with --identity caption: .* give --identity auto"):
        check_settings(replace(usual, identity="caption"))
    with pytest.raises(ValueError, match=r"--distill with --captions joined: .*; leave one of them out"):
        check_settings(replace(usual, distill=1.0, init="run"))
    check_settings(usual)
    run = joined_run[0].out
    assert main(["evaluate", run, "--captions", "joined", "--identity", "caption"]) == 1
    assert "--captions joined with --identity caption" in capsys.readouterr().err
    assert main(["evaluate", run, "--captions", "some"]) == 1
    assert "--captions some: it is one of each, joined" in capsys.readouterr().err
    assert main(["evaluate", "--vectors", "a.parquet", "--captions", "joined"]) == 1
    assert "--captions is of a run's data" in capsys.readouterr().err


def test_a_plan_has_one_form_of_captions_for_all(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("data: somewhere\ncaptions: joined\nvariants: [self, late]\n")
    read = read_plan(plan)
    assert {trial.config.captions for trial in trials_of(read, tmp_path)} == {"joined"}
    plan.write_text("data: somewhere\nvariants: [self, late]\n")
    assert "captions" not in read_plan(plan).to_dict()
    assert plan_hash(read_plan(plan)) != plan_hash(read)
    for text, message in (
        ("variants: {self: {settings: {captions: joined}}}", r"variants\.self\.settings\.captions: is the study's own"),
        ("captions: joined\nidentity: caption\nvariants: [self]", r"captions: joined texts are not compared"),
        ("captions: joined\nvariants: {self: {settings: {distill: 1, model: {pretrained: a/b}}}}",
         r"variants\.self\.settings\.distill: --distill with --captions joined"),
        ("captions: jointed\nvariants: [self]", "captions"),
    ):  # fmt: skip
        plan.write_text(f"data: somewhere\n{text}\n")
        with pytest.raises(ValueError, match=message):
            read_plan(plan)


# --- runs ------------------------------------------------------------------------------------------------------------


class CutOffError(Exception):
    """Stands for a kill."""


def cut_off(config: RunConfig, before: int) -> None:
    """Train, but for the steps from this one on."""
    calls, forward_backward = 0, trainer.forward_backward

    def counted(*arguments):
        nonlocal calls
        calls += 1
        if calls == before:
            raise CutOffError
        return forward_backward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "forward_backward", counted)
        with pytest.raises(CutOffError):
            train(config)


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_with_frozen_features_and_chunks_resumes_with_the_same_texts(make):
    """The dev gallery's features are on disk; training texts, others in each epoch, go through the tower."""
    whole, stopped = (make(name, chunk=5) for name in ("whole", "stopped"))
    train(whole)
    cut_off(stopped, before=9)
    resume(stopped.out)
    assert same_weights(Path(whole.out), Path(stopped.out))
    other = make("each", chunk=5, captions="each")
    train(other)
    assert not same_weights(Path(whole.out), Path(other.out))


def test_a_run_records_what_it_was_measured_on_and_the_commands_follow(joined_run, capsys):
    config, results = joined_run
    run = config.out
    dev = with_captions(read_captioned_images(config.data).split("dev"), "joined")
    assert results["texts"] == "joined"
    assert results["captions"] == len(dev.captions)
    data = json.loads((Path(run) / "data.json").read_text())
    assert data["texts"] == "joined"
    assert data["cut_captions"]["train"]["captions"] == data["train"]["images"]
    capsys.readouterr()
    assert main(["evaluate", run, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rsum"]["value"] == pytest.approx(results["chosen"]["model_in_sample"]["rsum"]["value"], abs=1e-9)
    assert again["texts"] == "joined"
    assert "differs_from_run" not in again
    assert "in-sample" in again.get("in_sample", "in-sample")
    assert main(["evaluate", run, "--captions", "each", "--json"]) == 0
    single = json.loads(capsys.readouterr().out)
    assert "texts" not in single
    assert single["differs_from_run"] == (
        "measured with each caption as it is; the run was trained with captions joined to long texts"
    )
    # Whatever is asked of them, these are the images that its epoch may have been chosen by.
    assert ("in_sample" in single) == ("in_sample" in again)
    assert main(["audit", run, "--json", "--sample", "12"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["texts"] == "joined"


def test_a_comparison_with_its_base_and_a_learning_curve_have_the_texts_of_the_run(joined_run, scenes_folder, capsys):
    run, data = joined_run[0].out, str(scenes_folder)
    for gallery in read_galleries(run, [data], "dev"):
        assert gallery == replace(with_captions(read_captioned_images(data), "joined"), source=gallery.source)
    assert {training.captions for training in plan_trainings(run)} == {"joined"}
    capsys.readouterr()
    # What makes images of equal captions each other's partners cannot be beside joined ones.
    equal = {"captions": 2, "texts": 1, "images": 2, "best_rsum": 590.0, "cost": 10.0}
    for texts, way in (({"texts": "joined"}, "; '--captions each --identity"), ({}, "; '--identity")):
        print_metrics({**joined_run[1], "texts": "each", **texts, "equal_captions": equal})
        assert way in capsys.readouterr().out


def test_an_epoch_is_chosen_on_the_same_images_whatever_their_texts_are(make, capsys):
    config = make("chosen", design="self", captions="each")
    train(config)
    for captions in ("each", "joined"):
        capsys.readouterr()
        assert main(["evaluate", config.out, "--captions", captions, "--json"]) == 0
        note = json.loads(capsys.readouterr().out)["in_sample"]
        assert "in-sample" in note
        # The cross-fitted figure is of the texts that the run was measured with.
        assert ("cross-fitted" in note) == (captions == "each")


def test_of_single_captions_nothing_is_joined_which_is_told(tmp_path, tiny_model):
    from clipvisionalign.log import log_to

    for n in range(40):
        Image.new("RGB", (64, 64), (5 * n, (37 * n) % 256, (91 * n) % 256)).save(tmp_path / f"{n}.png")
    rows = [f"{n}.png,a circle of {n},{'dev' if n % 4 == 0 else 'train'}" for n in range(40)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption,split", *rows]))
    lines: list[str] = []
    with log_to(lines.append):
        train(RunConfig(
            data=str(tmp_path), out=str(tmp_path / "run"), captions="joined", model=tiny_model("self"), epochs=1,
            batch=12, augment="none", precision="float32", cache="off", trackers="", workers=0,
        ))  # fmt: skip
    for split in ("train", "dev"):
        assert f"no effect of --captions joined on {split}: no image has two different captions" in lines
    lines.clear()
    several = [CaptionedImage(str(n), b"", ("a dog", "A dog.", "two dogs")[: n + 1], "dev") for n in range(3)]
    with log_to(lines.append):
        log_single_captions({"dev": CaptionedImages(several), "test": CaptionedImages(several[2:])})
    assert lines == ["dev: 2 of 3 images have one caption, and no other text"]


# --- a study ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_study_of_joined_captions_measures_one_gallery_and_is_verified(scenes_folder, text_folder, tmp_path):
    """Minimal pairs and the words-alone baseline are of single captions, lengths of the joined texts."""
    model = {
        "image_tower": {"name": "test_resnet", "weights": "random", "size": 64}, "width": 32,
        "text_tower": {"name": str(text_folder), "window": 4},
    }  # fmt: skip
    plan = Plan(
        data=str(scenes_folder), captions="joined", seeds=[0], variants={"self": Variant(), "sparse": Variant()},
        settings={"epochs": 1, "batch": 16, "augment": "none", "precision": "float32", "model": model},
        measure=Measurements(rounds=0, composition=20, audit_images=12, examples=0, protocol=False),
    )  # fmt: skip
    report = run_study(plan, tmp_path / "study")
    dev = with_captions(read_captioned_images(scenes_folder).split("dev"), "joined")
    assert report["data"]["texts"] == "joined"
    assert report["data"]["gallery"] == {"images": len(dev), "captions": len(dev.captions)}
    assert report["plan"]["captions"] == "joined"
    words = [len(text.split()) for text in dev.captions]
    terciles = report["results"]["lengths"]["words"]
    assert (terciles["short"][0], terciles["long"][1]) == (min(words), max(words))
    states = {part.part: part.state for part in verify_report(tmp_path / "study")}
    assert "fails" not in states.values()
    assert states["data set by its content"] == states["results"] == "holds"
