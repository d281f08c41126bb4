"""The audit passes models that are honest, good or bad, and fails those that see what they must not."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from clipvisionalign.retrieval import audit, evaluate

IMAGES = 60
RNG = np.random.default_rng(0)
PROJECTION = RNG.standard_normal((64, 32))


def picture(number: int) -> np.ndarray:
    """A made-up picture: what stands on it is told by its numbers."""
    return np.random.default_rng(number).standard_normal(64)


PICTURES = [picture(number) for number in range(IMAGES)]
CAPTIONS = [f"caption {place} of picture {number}" for number in range(IMAGES) for place in range(5)]
OWNERS = np.arange(5 * IMAGES) // 5


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def letters(caption: str) -> np.ndarray:
    """A poor but honest caption vector: from its letters alone."""
    return np.bincount([ord(letter) % 32 for letter in caption], minlength=32) + 0.01 * np.arange(32)


class Honest:
    """Knows which words belong to which picture because it learned so: by the words, not by the place."""

    def encode_images(self, images):
        return unit(np.stack([image @ PROJECTION for image in images]))

    def encode_captions(self, captions):
        found = []
        for caption in captions:
            number = int(caption.split()[-1]) if caption.split()[-1].isdigit() else -1
            known = picture(number) @ PROJECTION if number >= 0 else np.ones(32)
            found.append(unit(known) + 0.02 * unit(letters(caption)))
        return unit(np.stack(found))


class Untrained(Honest):
    def encode_captions(self, captions):
        return unit(np.stack([letters(caption) for caption in captions]))


class HonestScorer:
    """Answers `score` only, every pair alike."""

    def score(self, images, captions):
        return Honest().encode_images(images) @ Honest().encode_captions(captions).T


class AttendsToTruePicture:
    """The seed's kind: each caption's tokens attend to the picture at its own place in the batch, and are then scored
    against all pictures of the batch. "Recall" of nearly 1 with random weights."""

    def score(self, images, captions):
        pictures = np.stack([image @ PROJECTION for image in images])
        texts = np.stack([letters(caption) for caption in captions])
        pictures_of_captions = np.repeat(pictures, len(captions) // len(images), axis=0)
        fused = unit(texts) + unit(pictures_of_captions)  # fails where N and M are unrelated
        return unit(pictures) @ unit(fused).T


class RemembersPictures:
    """The same leak behind the two encode calls: captions attend to the pictures that were encoded last."""

    def encode_images(self, images):
        self.seen = unit(np.stack([image @ PROJECTION for image in images]))
        return self.seen

    def encode_captions(self, captions):
        places = np.arange(len(captions)) * len(self.seen) // max(len(captions), 1)
        texts = unit(np.stack([letters(caption) for caption in captions]))
        return unit(texts + self.seen[places])


class BatchNormInTraining(Honest):
    """Batch norm left in training mode: a vector depends on the other rows of its batch."""

    def encode_captions(self, captions):
        vectors = super().encode_captions(captions)
        return unit((vectors - vectors.mean(axis=0)) / (vectors.std(axis=0) + 1e-5))


class ScoreDependsOnGallery:
    """A softmax over the gallery: a pair's score depends on who else stands there."""

    def score(self, images, captions):
        scores = 20 * HonestScorer().score(images, captions)
        return np.exp(scores) / np.exp(scores).sum(axis=0, keepdims=True)


class KnowsPlaces(Honest):
    """Scores pairs by their places alone: what a loader that deals pairs in order invites."""

    def score(self, images, captions):
        place = np.arange(len(captions)) * len(images) // len(captions)
        return -np.abs(np.arange(len(images))[:, None] - place[None, :]).astype(float)


def run(model, **options):
    return audit(model, PICTURES, CAPTIONS, OWNERS, **options)


def failed(report):
    return {check.name for check in report.checks if not check.passed}


@pytest.mark.parametrize("model", [Honest(), Untrained(), HonestScorer()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("seed", range(5))
def test_honest_models_pass(model, seed):
    assert failed(run(model, seed=seed)) == set()


def test_seeds_kind_of_cross_attention_fails():
    """It "finds" nearly everything in a batch of 8 without having learned anything, and the audit says so."""
    model = AttendsToTruePicture()
    eight = evaluate(model, PICTURES[:8], CAPTIONS[:40], OWNERS[:40], resamples=0)
    assert eight.metrics.image_to_text["recall_at_1"].value > 0.9
    names = failed(run(model))
    assert {"alone (score)", "shuffled partners (score)", "blank captions (score)", "rectangular (score)"} <= names


def test_leak_through_state_fails():
    model = RemembersPictures()
    names = failed(run(model))
    assert "alone, other images before (vectors)" in names
    assert "shuffled partners (vectors)" in names
    assert "blank captions (vectors)" in names


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (BatchNormInTraining(), "alone (vectors)"),
        (ScoreDependsOnGallery(), "alone (score)"),
        (KnowsPlaces(), "shuffled partners (score)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_dependence_on_others_fails(model, name):
    assert name in failed(run(model))


def test_batch_norm_of_torch_in_training_mode_fails():
    """The same with torch's own layer, in the mode in which it is forgotten."""
    import torch

    class Model(Honest):
        def __init__(self, training):
            self.norm = torch.nn.BatchNorm1d(32).double().train(training)

        def encode_captions(self, captions):
            with torch.no_grad():
                return unit(self.norm(torch.from_numpy(super().encode_captions(captions))).numpy())

    assert "alone (vectors)" in failed(run(Model(training=True)))
    assert failed(run(Model(training=False))) == set()


def test_overlapping_splits_fail():
    assert run(Honest(), split_overlap=[]).passed
    report = run(Honest(), split_overlap=["a.jpg (train) and b.jpg (dev)"])
    assert failed(report) == {"splits apart"}
    assert "a.jpg" in report.checks[-1].meaning


def test_model_that_answers_nothing_is_refused():
    with pytest.raises(TypeError, match="answers neither"):
        run(object())


def test_report_is_json(tiny_runs):
    import json

    assert json.loads(json.dumps(run(Honest()).to_dict()))["passed"] is True


@pytest.mark.parametrize("design", ["self", "sparse", "late", "cross"])
def test_the_four_designs_pass(design, tiny_runs, scenes_folder):
    from clipvisionalign import load_aligner, read_captioned_images

    part = read_captioned_images(scenes_folder).split("train")
    report = audit(load_aligner(tiny_runs[design]), part.images, part.captions, part.caption_image, sample=24)
    assert failed(report) == set()


@pytest.mark.parametrize("design", ["self", "late", "cross"])
def test_a_tower_left_in_training_mode_fails(design, tiny_runs, scenes_folder, monkeypatch):
    """The project's own model with its batch norm and dropout switched on while it encodes."""
    from clipvisionalign import load_aligner, read_captioned_images
    from clipvisionalign.models import aligner as module

    monkeypatch.setattr(module, "evaluating", lambda model: contextlib.nullcontext())
    part = read_captioned_images(scenes_folder).split("train")
    model = load_aligner(tiny_runs[design]).train()
    assert "alone (vectors)" in failed(audit(model, part.images, part.captions, part.caption_image, sample=24))
