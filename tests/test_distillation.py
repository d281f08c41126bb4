"""Distillation from the start, and the figures before the first step: what they are of, and that nothing changes them."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import test_gradient_cache
import torch
from combined import CutOffError, Watched, comparable_results
from safetensors.torch import load_file
from test_going_on import silent
from test_gradient_cache import gradients, worst

from clipvisionalign import read_captioned_images
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.streams.writing import write_shards
from clipvisionalign.models.io import load_aligner
from clipvisionalign.training import trainer
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.diagnostics import Finding, diagnose_forgetting, unreported
from clipvisionalign.training.distillation import START_VECTORS, Distillation, StartVectors
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.forward import PrecomputedFeatures
from clipvisionalign.training.gathered_batch import GatheredBatch
from clipvisionalign.training.optimizer import trained_rates
from clipvisionalign.training.start_vectors import write_start_vectors
from clipvisionalign.training.state import TrainProgress
from clipvisionalign.training.step import Step
from clipvisionalign.training.train import resume, train

build = test_gradient_cache.build


@pytest.fixture(scope="module")
def settings(tiny_settings):
    return tiny_settings("self", train_images=16, epochs=2, batch=8)


@pytest.fixture(scope="module")
def first(settings) -> str:
    """The run that the others start from."""
    return train(settings("first", epochs=1), silent)["run"]


def lines(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


# --- the loss --------------------------------------------------------------------------------------------------------


def random_start(batches, width: int = 32) -> StartVectors:
    """Unit vectors of all images and captions, drawn at random."""
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=(count, width)).astype(np.float32) for count in (len(batches), batches.ends[-1])]
    return StartVectors(*(each / np.linalg.norm(each, axis=1, keepdims=True) for each in drawn))


def by_hand(step: Step, batch, start: StartVectors) -> torch.Tensor:
    """Half the mean distance of images, and of captions, caption by caption."""
    outputs = step.towers(batch, PrecomputedFeatures())
    images = [1 - vector @ torch.from_numpy(start.images[row])
              for vector, row in zip(outputs.images.vectors, batch.image_index.tolist(), strict=True)]  # fmt: skip
    captions = []
    for group, embeddings in zip(batch.captions, outputs.captions, strict=True):
        for row, vector in zip(group.rows.tolist(), embeddings.vectors, strict=True):
            captions.append(1 - vector @ torch.from_numpy(start.captions[batch.caption_index[row]]))
    return (torch.stack(images).mean() + torch.stack(captions).mean()) / 2


def test_its_gradients_are_those_of_the_distance_and_of_chunks_those_of_the_whole(build):
    step, batches = build()
    step.aligner.eval()
    batch, start, weight = batches[(0, list(range(9)))], random_start(batches), 3.0
    plain = step.backward(batch, PrecomputedFeatures())
    without = gradients(step)
    distance = by_hand(step, batch, start)
    (weight * distance).backward()
    added = gradients(step)
    step.distillation = Distillation(weight, start)
    figures = step.backward(batch, PrecomputedFeatures())
    both = gradients(step)
    # The loss is the contrastive one, as dev has it.
    assert figures.loss == pytest.approx(plain.loss, rel=1e-6)
    assert figures.distillation == pytest.approx(float(distance), rel=1e-5)
    assert worst(both, {name: without[name] + added.get(name, torch.zeros(())) for name in without}) < 1e-5
    assert worst(both, without) > 1e-2
    parts = batch.chunks(3, step.aligner.text_tower.pad)
    cached = step.backward_cached(iter([*parts, *parts]), 3, lambda part: PrecomputedFeatures())
    assert cached.distillation == pytest.approx(float(distance), rel=1e-5)
    assert worst(gradients(step), both) < 1e-5


def test_two_processes_add_up_to_one(build):
    """Each counts its own rows, divided by all."""
    _, batches = build()
    start, halves = random_start(batches), [batches[(0, [0, 1, 2, 3, 4])], batches[(0, [5, 6])]]
    whole = batches[(0, list(range(7)))]
    vectors = [torch.nn.functional.normalize(torch.randn(n, 32), dim=1) for n in (7, len(whole.caption_index))]
    indices = [part.caption_index[part.order] for part in halves]
    rows = torch.cat(indices)
    identity = torch.zeros(1)
    parts, first_image, first_caption = [], 0, 0
    for part, own in zip(halves, indices, strict=True):
        images, captions = slice(first_image, first_image + len(part)), slice(first_caption, first_caption + len(own))
        gallery = GatheredBatch(vectors[0], vectors[1], identity, identity, images, captions, 2)
        parts.append(float(Distillation(1.0, start).loss(gallery, [part])))
        first_image, first_caption = images.stop, captions.stop
    images = 1 - (vectors[0] * torch.from_numpy(start.images[:7])).sum(dim=1)
    captions = 1 - (vectors[1] * torch.from_numpy(start.captions[rows.numpy()])).sum(dim=1)
    assert sum(parts) == pytest.approx(float(images.mean() + captions.mean()) / 2, rel=1e-5)


# --- the start -------------------------------------------------------------------------------------------------------


def test_the_vectors_are_those_of_the_start_whatever_is_on_disk(settings, first, tmp_path):
    data = read_captioned_images(settings("").data).split("train").first_by_hash(5)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    rows = [replace(row, image=broken) if number == 3 else row for number, row in enumerate(data.rows)]
    start = load_aligner(first, "cpu", packed=False)
    write_start_vectors(tmp_path, start, replace(data, rows=rows), Distributed(torch.device("cpu")))
    vectors = StartVectors.open(tmp_path)
    good = [0, 1, 2, 4]
    assert np.allclose(vectors.images[good], start.encode_images([data.images[row] for row in good]), atol=1e-6)
    assert np.allclose(vectors.captions, start.encode_captions(data.captions), atol=1e-6)
    assert not vectors.images[3].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"freeze": "none", "augment": "flip+crop"},
        {"freeze": "both", "cache": "off"},
        {"stages": "heads:1,text:1@1e-3", "epochs": 6, "freeze": "image"},
    ],
)
def test_it_keeps_the_model_near_and_resumes_with_the_vectors_of_the_start(more, settings, first, monkeypatch):
    name = f"near-{more['freeze']}-{len(more)}"
    config = settings(name, init=first, distill=30.0, head_lr=1e-2, **more)
    seen = []
    real = Distillation.loss

    def watched(self, gallery, batches):
        seen.append((np.array(self.start.images), np.array(self.start.captions)))
        return real(self, gallery, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "loss", watched)
        results = train(config, silent)
    start = load_aligner(first, "cpu", packed=False)
    data = read_captioned_images(config.data).split("train").first_by_hash(16)
    # In a later stage too, whose own start is another model.
    for images, captions in seen:
        assert np.allclose(images, start.encode_images(data.images), atol=2e-3)
        assert np.allclose(captions, start.encode_captions(data.captions), atol=1e-5)
    assert not (Path(config.out) / START_VECTORS).exists()
    far = replace(config, out=f"{config.out}-far", distill=0.0)
    train(far, silent)

    def moved(run: str) -> float:
        model = load_aligner(run, "cpu", packed=False)
        return float((1 - (model.encode_captions(data.captions) * start.encode_captions(data.captions)).sum(1)).mean())

    assert moved(config.out) < 0.7 * moved(far.out)
    stopped = replace(config, out=f"{config.out}-stopped")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "forward_backward", Watched(before=4))
        with pytest.raises(CutOffError):
            train(stopped, silent)
    assert (Path(stopped.out) / START_VECTORS / "images.npy").is_file()
    assert comparable_results(resume(stopped.out, silent)) == comparable_results(results)
    one, other = (load_file(Path(run) / "model.safetensors") for run in (config.out, stopped.out))
    assert all(torch.equal(one[key], other[key]) for key in one)
    kept = [line for line in lines(stopped.out) if "train_loss" in line]
    assert [line["train_distillation"] for line in kept] == [
        line["train_distillation"] for line in lines(config.out) if "train_loss" in line
    ]


def test_without_a_start_and_for_streams_it_is_refused(settings, first, tmp_path):
    with pytest.raises(ValueError, match=r"--distill keeps .* starts from: give --init or --model.pretrained"):
        train(settings("refused", distill=1.0), silent)
    with pytest.raises(ValueError, match="--distill should be at least 0, and finite"):
        check_settings(settings("refused", distill=-1.0, init=first))
    data = read_captioned_images(settings("").data)
    write_shards(data, tmp_path / "shards", per_shard=40)
    config = settings("refused", distill=1.0, init=first)
    with pytest.raises(DataError, match=r"--distill .*a stream has only as they come.*leave it out"):
        train(replace(config, data=str(tmp_path / "shards"), train_images=0), silent)
    assert not Path(config.out).exists()


# --- the figures before the first step -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_starts_from_a_model_is_measured_before_its_first_step(settings, first, monkeypatch):
    config = settings("measured", init=first, text_lr=0.0, head_lr=0.0)
    results = train(config, silent)
    start, *later = [line for line in lines(config.out) if "dev" in line]
    assert (start["step"], start["epoch"]) == (0, 0)
    assert "train_loss" not in start
    # Nothing was learned: it is the figure of every epoch.
    assert {line["dev"]["rsum"]["value"] for line in later} == {start["dev"]["rsum"]["value"]}
    assert results["start"]["rsum"] == start["dev"]["rsum"]
    assert start["dev"]["rsum"]["low"] < start["dev"]["rsum"]["value"] < start["dev"]["rsum"]["high"]
    stopped = replace(config, out=f"{config.out}-stopped")
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "forward_backward", Watched(before=3))
        with pytest.raises(CutOffError):
            train(stopped, silent)
    assert resume(stopped.out, silent)["start"] == results["start"]
    assert [line["epoch"] for line in lines(stopped.out) if "dev" in line] == [0, 1, 2]
    # One that starts from none has nothing to be measured.
    assert "start" not in json.loads((Path(first) / "results.json").read_text())
    assert [line["epoch"] for line in lines(first) if "dev" in line] == [1]


@pytest.mark.slow
def test_measuring_the_start_changes_no_weight(settings, first, monkeypatch):
    config = settings("with-figures", init=first, model=replace(settings("").model, dropout=0.3))
    train(config, silent)
    monkeypatch.setattr(trainer.TrainerSetup, "_measure_start", lambda self: None)
    without = replace(config, out=f"{config.out}-out")
    train(without, silent)
    one, other = (load_file(Path(run) / "model.safetensors") for run in (config.out, without.out))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_learning_rates_that_destroy_are_told_with_both_figures():
    rates = trained_rates(RunConfig(freeze="none", text_lr=1e-3, image_lr=1e-3))
    assert list(rates) == ["text_lr", "image_lr", "head_lr"]
    assert list(trained_rates(RunConfig(freeze="both"))) == ["head_lr"]
    assert list(trained_rates(RunConfig(freeze="both", peft="lora"))) == ["text_lr", "head_lr"]
    start = [310.0, 300.0, 320.0]
    (finding,) = diagnose_forgetting(210.0, start, rates, 20.0)
    assert "dev rsum is 210.0, and was 310.0 [300.0, 320.0] before the first step" in finding.message
    assert "--text_lr 0.001, --image_lr 0.001, --head_lr 0.001" in finding.message
    assert "\n" not in finding.message
    assert diagnose_forgetting(301.0, start, rates, 20.0) == []
    assert diagnose_forgetting(10.0, [], rates, 20.0) == []
    # Too few images for an interval, and a start that is not above chance: nothing is known to be lost.
    assert diagnose_forgetting(10.0, [310.0, None, None], rates, 20.0) == []
    assert diagnose_forgetting(10.0, [30.0, 15.0, 45.0], rates, 20.0) == []


def test_a_failure_is_told_once_and_again_when_it_is_twice_as_bad():
    rates, start, reported = {"text_lr": 1e-3}, [310.0, 300.0, 320.0], {}
    messages = [
        len(unreported(diagnose_forgetting(rsum, start, rates, 20.0), reported))
        for rsum in (305.0, 299.0, 295.0, 299.0, 260.0, 262.0, 215.0, 209.0)
    ]
    assert messages == [0, 1, 0, 0, 1, 0, 0, 1]
    # Kinds do not hide each other, and a run that is resumed remembers.
    other = [Finding("guessing", 1.0, "nothing is learned")]
    assert unreported(other, reported) == other
    again = TrainProgress.of(json.loads(json.dumps(asdict(TrainProgress(reported=reported)))), "rsum")
    assert unreported([*other, *diagnose_forgetting(209.0, start, rates, 20.0)], again.reported) == []


@pytest.mark.slow
def test_a_run_is_told_that_its_rates_destroy_and_another_is_not(settings, tmp_path, scenes_folder, caplog):
    # A model that has learned: its dev images are of those that it was trained on.
    known = shutil.copytree(scenes_folder, tmp_path / "known")
    rows = [row for row in csv.reader((known / "metadata.csv").read_text().splitlines()) if row[-1] == "train"]
    with (known / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption", "split"])
        table.writerows([*row[:-1], "dev"] for row in rows)
    learned = settings(
        "learned", epochs=12, train_images=0, freeze="none", head_lr=5e-3, text_lr=2e-3, image_lr=2e-3,
        dev_data=str(known),
    )  # fmt: skip
    learned = replace(
        learned, model=replace(learned.model, image_tower=replace(learned.model.image_tower, name="test_vit"))
    )
    train(learned, silent)
    for name, rate, is_told in (("destroys", 0.5, True), ("keeps", 1e-6, False)):
        caplog.clear()
        config = replace(
            learned, out=f"{learned.out}-{name}", init=learned.out, epochs=1, text_lr=rate, image_lr=rate, head_lr=rate,
            train_images=16, ema=0.0,
        )  # fmt: skip
        with caplog.at_level("INFO"):
            train(config)
        assert ("these learning rates destroy" in caplog.text) == is_told
        assert "before the first step: dev loss" in caplog.text
