"""The audit passes models that are honest, good or bad, and fails those that see what they must not."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clipvisionalign.retrieval import audit, evaluate
from clipvisionalign.retrieval.audit import MIN_SAMPLE
from clipvisionalign.retrieval.audit.answers import ModelScores, _narrowest_vector_format
from clipvisionalign.retrieval.audit.chance import _assign_and_score, _check_chance_level, _random_assignments
from clipvisionalign.retrieval.audit.new_inputs import make_captions, mirrored_images
from clipvisionalign.retrieval.ties import as_numeric_array

IMAGES = 60
RNG = np.random.default_rng(0)
PROJECTION = RNG.standard_normal((64, 32))


def random_image(number: int) -> np.ndarray:
    """A made-up image: what stands on it is told by its numbers."""
    return np.random.default_rng(number).standard_normal(64)


GALLERY = [random_image(number) for number in range(IMAGES)]
CAPTIONS = [f"caption {turn} of picture {number}" for number in range(IMAGES) for turn in range(5)]
OWNERS = np.arange(5 * IMAGES) // 5


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)


def letters(caption: str) -> np.ndarray:
    """A poor but honest caption vector: from its letters alone."""
    return np.bincount([ord(letter) % 32 for letter in caption], minlength=32) + 0.01 * np.arange(32)


class Honest:
    """Knows which words belong to which image because it learned so: by the words, not by the place."""

    def encode_images(self, images):
        return unit(np.stack([image @ PROJECTION for image in images]))

    def encode_captions(self, captions):
        vectors = []
        for caption in captions:
            number = int(caption.split()[-1]) if caption.split()[-1].isdigit() else -1
            known = random_image(number) @ PROJECTION if number >= 0 else np.ones(32)
            vectors.append(unit(known) + 0.02 * unit(letters(caption)))
        return unit(np.stack(vectors))


class Untrained(Honest):
    def encode_captions(self, captions):
        return unit(np.stack([letters(caption) for caption in captions]))


class HonestScorer:
    """Answers `score` only, every pair alike."""

    def score(self, images, captions):
        return Honest().encode_images(images) @ Honest().encode_captions(captions).T


class AttendsToTrueImage:
    """The seed's kind: each caption's tokens attend to the image at its own place in the batch, and are then scored
    against all images of the batch. "Recall" of nearly 1 with random weights."""

    def score(self, images, captions):
        image_vectors = np.stack([image @ PROJECTION for image in images])
        texts = np.stack([letters(caption) for caption in captions])
        caption_image_vectors = np.repeat(image_vectors, len(captions) // len(images), axis=0)
        fused = unit(texts) + unit(caption_image_vectors)  # fails where N and M are unrelated
        return unit(image_vectors) @ unit(fused).T


class RemembersImages:
    """The same leak behind the two encode calls: captions attend to the images that were encoded last."""

    def encode_images(self, images):
        self.image_vectors = unit(np.stack([image @ PROJECTION for image in images]))
        return self.image_vectors

    def encode_captions(self, captions):
        image_indices = np.arange(len(captions)) * len(self.image_vectors) // max(len(captions), 1)
        texts = unit(np.stack([letters(caption) for caption in captions]))
        return unit(texts + self.image_vectors[image_indices])


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


class ScoresByPosition(Honest):
    """Scores pairs by their places alone: what a loader that deals pairs in order invites."""

    def score(self, images, captions):
        image_indices = np.arange(len(captions)) * len(images) // len(captions)
        return -np.abs(np.arange(len(images))[:, None] - image_indices[None, :]).astype(float)


def run(model, **options):
    return audit(model, GALLERY, CAPTIONS, OWNERS, **options)


def failed(report):
    return {check.name for check in report.checks if not check.passed}


@pytest.mark.parametrize("model", [Honest(), Untrained(), HonestScorer()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("seed", range(5))
def test_honest_models_pass(model, seed):
    assert failed(run(model, seed=seed)) == set()


def test_seeds_kind_of_cross_attention_fails():
    """It "finds" nearly everything in a batch of 8 without having learned anything, and the audit says so."""
    model = AttendsToTrueImage()
    eight = evaluate(model, GALLERY[:8], CAPTIONS[:40], OWNERS[:40], resamples=0)
    assert eight.metrics.image_to_text["recall_at_1"].value > 0.9
    names = failed(run(model))
    assert {"alone (score)", "shuffled partners (score)", "blank captions (score)", "rectangular (score)"} <= names


def test_leak_through_state_fails():
    model = RemembersImages()
    names = failed(run(model))
    assert "alone, other images before (vectors)" in names
    assert "shuffled partners (vectors)" in names
    assert "blank captions (vectors)" in names


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (BatchNormInTraining(), "alone (vectors)"),
        (ScoreDependsOnGallery(), "alone (score)"),
        (ScoresByPosition(), "shuffled partners (score)"),
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


@pytest.mark.slow
@pytest.mark.parametrize("design", ["self", "sparse", "late", "cross"])
def test_the_four_designs_pass(design, tiny_runs, scenes_folder):
    from clipvisionalign import load_aligner, read_captioned_images

    part = read_captioned_images(scenes_folder).split("train")
    report = audit(load_aligner(tiny_runs[design]), part.images, part.captions, part.caption_image, sample=24)
    assert failed(report) == set()


@pytest.mark.slow
@pytest.mark.parametrize("design", ["self", "late", "cross"])
def test_a_tower_left_in_training_mode_fails(design, tiny_runs, scenes_folder, monkeypatch):
    """The project's own model with its batch norm and dropout switched on while it encodes."""
    from clipvisionalign import load_aligner, read_captioned_images

    for module in ("encoding", "pair_scorer"):
        monkeypatch.setattr(f"clipvisionalign.models.{module}.eval_mode", lambda model: contextlib.nullcontext())
    part = read_captioned_images(scenes_folder).split("train")
    model = load_aligner(tiny_runs[design]).train()
    assert "alone (vectors)" in failed(audit(model, part.images, part.captions, part.caption_image, sample=24))


# --- twelve leaks, and honest models of eight kinds (the thousand are in benchmarks/audit.py) --------------------------

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
_SPEC = importlib.util.spec_from_file_location("audit_benchmark", BENCHMARKS / "audit.py")
benchmark = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = benchmark  # for its dataclasses
_SPEC.loader.exec_module(benchmark)

CAUGHT = {
    "by place": {"new captions (score)", "shuffled partners (score)", "blank captions (score)", "alone (score)"},
    "by memory of text": {"new captions (vectors)"},
    "by batch statistics": {"alone (vectors)"},
    "by order of asking": {"new captions (vectors)", "alone, other images before (vectors)"},
    "by cache of vectors": {"new captions (score)"},
    "by number of candidates": {"new captions (score)", "alone (score)"},
    "by object": {"new captions (score)"},
    "by length of lists": {"new captions (score)", "shuffled partners (score)"},
    "by calls counted": {"new captions (vectors)", "alone (vectors)"},
    "by score only": {"new captions (score)"},
    "by vectors only": {"new captions (vectors)"},
    "some captions": {"new captions (vectors)"},
}


@pytest.mark.parametrize("name", benchmark.LEAKS)
def test_a_leak_that_was_evaluated_before_fails(name):
    """Each by the checks that are meant for it, though the model may have kept what it answered of true partners."""
    rsum, report = benchmark.audited_leak(name, sample=24)
    assert rsum > {"by batch statistics": 0, "some captions": 200}.get(name, 595)
    assert set(benchmark.failed(report)) >= CAUGHT[name]
    if name == "by batch statistics":
        assert "its vectors depend on what else is in the batch" in meanings(report)["alone (vectors)"]


def test_what_leaks_in_one_way_of_answering_is_honest_in_the_other():
    for name, way in (("by score only", "score"), ("by vectors only", "vectors")):
        assert benchmark.failed(benchmark.audited_leak(name, sample=24)[1]) == [f"new captions ({way})"]


@pytest.mark.slow
def test_a_hundred_honest_models_pass():
    outcomes = [
        (kind, seed, report if isinstance(report, Exception) else benchmark.failed(report))
        for kind, seed, report in benchmark.audited_honest(104)
    ]
    assert [each for each in outcomes if each[2]] == []


def test_an_honest_model_fails_as_often_as_is_said():
    """Tables of random scores, few images and uneven captions: p is what it says it is, neither less nor more."""
    rng, several, level = np.random.default_rng(0), 400, 0.04
    model = SimpleNamespace(score=lambda images, captions: rng.standard_normal((len(images), len(captions))))
    failures = 0
    for _ in range(several):
        groups = [["a"] * number for number in rng.integers(1, 6, 10)]
        dealt = _assign_and_score(ModelScores(model).score_by_pairs, list(range(10)), groups, True, rng)
        failures += not _check_chance_level([dealt], "", level, rng).passed
    assert 4 <= failures <= several * level + 3 * np.sqrt(several * level)


@pytest.mark.slow
@pytest.mark.parametrize("values", [2, 5, 1000])
def test_the_chance_level_of_a_small_gallery_is_that_of_its_dealings(values):
    """23 images, each dealt several captions and one, of a model with few different scores or many: an honest model is
    below a level no more often than that level, and about as often where its scores differ. Ties are against it: where
    they are many, recalls have few values, and it is below less often."""
    rng, several = np.random.default_rng(values), 300
    scores: dict[tuple[int, str], float] = {}

    def score(images, captions):
        """The same score for the same pair, whatever is asked beside it."""
        fresh = rng.integers(values, size=(len(images), len(captions))).astype(float)
        pairs = [[(image, caption) for caption in captions] for image in images]
        return np.array([[scores.setdefault(pair, value) for pair, value in zip(*row, strict=True)]
                         for row in zip(pairs, fresh, strict=True)])  # fmt: skip

    ask = ModelScores(SimpleNamespace(score=score)).score_by_pairs
    groups = [[f"{image} {number}" for number in range(1 + image % 4)] for image in range(23)]
    below = np.zeros(2)
    for _ in range(several):
        scores.clear()
        dealt = [
            _assign_and_score(ask, list(range(23)), part, False, rng) for part in (groups, [[g[0]] for g in groups])
        ]
        # What was dealt has no part in who is found: the table of hits is that of any other dealing.
        below += [not _check_chance_level(dealt, "", level, rng).passed for level in (0.01, 0.04)]
    expected = several * np.array([0.01, 0.04])
    assert (below <= expected + 3 * np.sqrt(expected)).all()
    assert values < 1000 or below[1] >= expected[1] / 4


def test_a_model_of_vectors_finds_the_same_whatever_is_dealt(folders, scenes_folder):
    """So that the test against other dealings is exact: an untouched model with random weights, whose images lie close
    together, where rounding would show first."""
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.models.io import load_aligner

    ask = ModelScores(load_aligner(folders("clip"), "cpu")).score_by_vectors
    rows = read_captioned_images(scenes_folder).rows[:23]
    images, groups = [row.image for row in rows], [list(row.captions) for row in rows]
    tables = [_assign_and_score(ask, images, groups, False, np.random.default_rng(seed)).hits for seed in range(3)]
    assert np.array_equal(tables[0], tables[1])
    assert np.array_equal(tables[0], tables[2])


def test_every_dealing_is_as_likely_and_gives_nobody_its_own():
    from collections import Counter

    rng = np.random.default_rng(0)
    for apart, number in ((True, 9), (False, 24)):
        drawn = Counter(map(tuple, _random_assignments(rng, 9600, 4, apart).tolist()))
        assert len(drawn) == number
        assert np.abs(np.array(list(drawn.values())) - 9600 / number).max() < 5 * np.sqrt(9600 / number)
        if apart:
            assert all(group != image for dealing in drawn for image, group in enumerate(dealing))


# --- words -----------------------------------------------------------------------------------------------------------


def meanings(report):
    return {check.name: check.meaning for check in report.checks}


def test_the_words_name_what_was_seen_and_the_tolerance():
    check_meanings = meanings(run(Honest()))
    assert re.fullmatch(
        r"with captions dealt to wrong images, recall at \d+ \((image to text|text to image)\) is 0\.\d{3} where chance is "
        r"0\.\d{3}: within chance \(p = [\d.]+; only below 0\.00017 is too much for chance\)",
        check_meanings["shuffled partners (vectors)"],
    )
    assert re.fullmatch(
        r"a pair's score, alone or in any batch and order, stays the same: a score changes by at most [\d.e-]+, within "
        r"the tolerance of 0\.\d+ \(1 % of the scores' spread\)",
        check_meanings["alone (vectors)"],
    )
    report = run(AttendsToTrueImage())
    check_meanings = meanings(report)["blank captions (score)"]
    assert "is 1.000 where chance is 0." in check_meanings
    assert "far above chance (p = 4.1e-05; below 0.00017 is too much for chance): the model uses" in check_meanings


@pytest.mark.parametrize("given", ["bfloat16", "widened", "unit"])
def test_rounding_of_the_models_own_format_is_no_leak(given):
    data, model = benchmark.world(0), benchmark.BFloat16(0)
    model.given = given
    report = data.ask(audit, model)
    assert report.passed
    assert "(rounding in bfloat16)" in meanings(report)["alone (vectors)"]


def test_as_much_noise_in_another_format_is_more_than_its_rounding():
    data, model = benchmark.world(0), benchmark.BFloat16(0)

    def noisy(vectors):
        model.calls += 1
        noise = np.random.default_rng(model.calls).uniform(-1, 1, vectors.shape)
        return unit(vectors * (1 + 2.0**-7 * noise)).astype(np.float32)

    model.rounded = noisy
    meaning = meanings(data.ask(audit, model))["alone (vectors)"]
    assert "above the tolerance" in meaning
    assert "(1 % of the scores' spread)" in meaning


def test_the_format_in_which_vectors_were_computed_shows():
    import torch

    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 32)))
    for given in (torch.bfloat16, torch.float16, torch.float32):
        name = str(given).rpartition(".")[2]
        for output in (vectors.to(given), vectors.to(given).double(), vectors.to(given).float()):
            assert _narrowest_vector_format(as_numeric_array(output))[0] == name
    assert _narrowest_vector_format(as_numeric_array(vectors))[0] == "float64"
    for largest in range(20, 128):
        integers = torch.from_numpy(np.random.default_rng(largest).integers(-largest, largest + 1, (2, 16)))
        scaled = torch.nn.functional.normalize(integers.float(), dim=-1)
        assert _narrowest_vector_format(as_numeric_array(scaled))[0] == "float32"
    for given, name in ((vectors.bfloat16(), "bfloat16"), (vectors.float(), "float32")):
        scaled = torch.nn.functional.normalize(given.float(), dim=-1)
        assert _narrowest_vector_format(as_numeric_array(scaled))[0] == name


def test_int8_ranges_of_a_batch_fail_for_what_they_are():
    data = benchmark.world(0)
    report = data.ask(audit, benchmark.Int8(0))
    assert failed(report) <= {"alone (vectors)", "rectangular (vectors)"}
    meaning = meanings(report)["alone (vectors)"]
    assert re.search(
        r"a score changes by at most 0\.00\d+, above the tolerance of 0\.00\d+ \(1 % of the scores'", meaning
    )
    assert "its vectors depend on what else is in the batch" in meaning
    assert "int8 ranges" in meaning


def test_an_image_with_most_of_the_captions_that_stands_first_is_no_leak():
    """With every caption the same, one image is the first for all of them, and it may have a third of the captions."""
    model = Untrained()
    first = int(np.argmax(model.encode_images(GALLERY) @ model.encode_captions(["a picture"])[0]))
    counts = np.where(np.arange(IMAGES) == first, 30, 1)
    captions = [f"caption {index} of picture {number}" for number in range(IMAGES) for index in range(counts[number])]
    report = audit(model, GALLERY, captions, np.repeat(np.arange(IMAGES), counts), sample=IMAGES)
    assert failed(report) == set()


# --- what is asked, and in which order -------------------------------------------------------------------------------


def test_an_image_without_a_caption_of_its_own_has_those_of_its_identity():
    """Not an error of the audit's own that is told as the model's."""
    identity = np.arange(IMAGES)
    identity[:10] = identity[10:20]
    owners = np.where(OWNERS < 5, OWNERS + 10, OWNERS)
    report = audit(Untrained(), GALLERY, CAPTIONS, owners, identity=identity)
    assert failed(report) == set()


class Recorder(Honest):
    def __init__(self):
        self.asked = []

    def score(self, images, captions):
        self.asked.append((images, captions))
        return Honest().encode_images(images) @ Honest().encode_captions(captions).T


def test_wrong_partners_with_new_texts_and_new_images_are_asked_first():
    model = Recorder()
    assert run(model).passed
    known = {image.tobytes() for image in GALLERY}
    for (images, captions), each in zip(model.asked[:2], (5, 1), strict=True):
        assert len(captions) == each * len(images) == each * 48
        assert not set(captions) & set(CAPTIONS)
        assert len(set(captions)) == len(captions)
        assert not {image.tobytes() for image in images} & known
    # Then wrong partners with texts that may be known, and only after those the true ones.
    images, captions = model.asked[2]
    numbers = [next(n for n in range(IMAGES) if GALLERY[n] is image) for image in images]
    assert all(CAPTIONS.index(caption) // 5 != numbers[index // 5] for index, caption in enumerate(captions))


def test_a_leak_in_the_first_answers_only_needs_a_fresh_model():
    class OnlyAtFirst(Honest):
        def __init__(self):
            self.calls = 0

        def score(self, images, captions):
            self.calls += 1
            return (ScoresByPosition() if self.calls == 1 else Recorder()).score(images, captions)

    model = OnlyAtFirst()
    evaluate(SimpleNamespace(score=model.score), GALLERY, CAPTIONS, OWNERS, resamples=0)
    assert run(model).passed
    assert failed(run(model, model_factory=OnlyAtFirst)) == {"new captions (score)"}


def test_a_model_that_looks_images_up_is_asked_of_those_that_it_has():
    known = {image.tobytes(): number for number, image in enumerate(GALLERY)}

    class LookupModel(Honest):
        def encode_images(self, images):
            return super().encode_images([GALLERY[known[image.tobytes()]] for image in images])

    report = run(LookupModel())
    assert report.passed
    assert "with new captions dealt to the data's own images" in meanings(report)["new captions (vectors)"]
    assert "with new captions dealt to mirrored images" in meanings(run(Honest()))["new captions (vectors)"]


def test_images_are_mirrored_in_the_form_in_which_they_came(tmp_path):
    import io

    import torch
    from PIL import Image

    from clipvisionalign.images import open_image

    pixels = np.zeros((8, 32, 3), np.uint8)
    pixels[:, :16] = 255
    opened = Image.fromarray(pixels)
    opened.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    opened.save(buffer, "PNG")
    given = [tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue(), opened]
    with mirrored_images([*given, 7, "no file", b"no picture"]) as made:
        for before, after in zip(given, made, strict=False):
            assert isinstance(after, type(before))
            decoded = np.asarray(open_image(after), dtype=int)
            assert decoded[:, :12].max() < 30
            assert decoded[:, 20:].min() > 225
        assert made[4:] == [7, "no file", b"no picture"]
        files = [Path(made[0]), Path(made[1])]
    assert not any(file.exists() for file in files)
    assert (tmp_path / "a.png").exists()
    with mirrored_images([np.arange(3), torch.arange(3)]) as made:
        assert [row.tolist() for row in made] == [[2, 1, 0]] * 2
        assert isinstance(made[1], torch.Tensor)
    with mirrored_images(["no file", 7]) as made:
        assert made is None


@pytest.mark.parametrize("captions", [CAPTIONS, ["a dog"] * 9, ["dog"], [""], ["class 1", "class 2"]], ids=len)
def test_new_captions_are_new_and_all_different(captions):
    made = make_captions(captions, 50, np.random.default_rng(0))
    assert len(set(made)) == 50
    assert not set(made) & set(captions)


def test_a_total_leak_is_far_above_chance_in_the_smallest_audit():
    """A model that knows each partner by its place: with fewer images p cannot fall below what is allowed for."""

    class Leak:
        def encode_images(self, images):
            self.vectors = np.eye(64)[: len(images)]
            return self.vectors

        def encode_captions(self, captions):
            each = max(1, len(captions) // len(self.vectors))
            return self.vectors[(np.arange(len(captions)) // each).clip(max=len(self.vectors) - 1)]

    for seed in range(4):
        rng = np.random.default_rng(seed)
        images = [rng.integers(0, 255, (32, 32, 3), dtype=np.uint8) for _ in range(MIN_SAMPLE)]
        captions = [f"{seed} red dogs and {n} cats" for n in range(MIN_SAMPLE)]
        report = audit(Leak(), images, captions, np.arange(MIN_SAMPLE), seed=seed)
        (shuffled,) = [check for check in report.checks if check.name.startswith("shuffled partners")]
        assert not shuffled.passed
        assert not any("within chance" in check.meaning and "p = 0.000" in check.meaning for check in report.checks)
