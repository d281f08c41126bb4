"""Captions that are equal word by word but belong to different images: counted, told, and partners where wanted."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_retrieval import brute_force_ranks
from torch.nn import functional as F

from clipvisionalign.cli import main
from clipvisionalign.data.batches import CaptionedBatches
from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages, normalize_caption
from clipvisionalign.data.check import count_shared_captions as counted
from clipvisionalign.data.foils import make_minimal_pairs
from clipvisionalign.retrieval import audit, evaluate, ranks_of_scores, ranks_of_vectors, retrieval_metrics
from clipvisionalign.retrieval.equal_captions import count_equal_captions
from clipvisionalign.retrieval.ranks import Positives
from clipvisionalign.retrieval.rerank import rerank
from clipvisionalign.training.contrastive import LOSSES, DualEncoderLoss, LossConfig
from clipvisionalign.training.gathered_batch import GatheredBatch

TEXTS = ("a dog runs", "a cat sleeps", "two dogs", "a red ball", "the sea")


def table(captions: list[tuple[str, ...]], identity: str = "caption", of: tuple = ()) -> CaptionedImages:
    """One image a tuple of captions, each with an image of its number; of: what identity each shows."""
    rows = [CaptionedImage(f"{n}.png", bytes([n]), own, "dev", of[n] if of else None) for n, own in enumerate(captions)]
    return CaptionedImages(rows).with_identity(identity)


@st.composite
def tables(draw) -> CaptionedImages:
    """Images with captions out of few texts, perhaps with identities."""
    count = draw(st.integers(2, 7))
    captions = [tuple(draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3))) for _ in range(count)]
    of = tuple(draw(st.sampled_from(["x", "y", None])) for _ in range(count)) if draw(st.booleans()) else ()
    return table(captions, draw(st.sampled_from(["auto", "caption", "none"])), of)


def true_pairs(data: CaptionedImages) -> np.ndarray:
    """(N, M), from the definition: who owns a caption; what identities have its text; whose identity is one of them."""
    rows = data.rows
    owner = [row.name if data.identity == "none" else row.identity or row.name for row in rows]
    flat = [(n, caption) for n, row in enumerate(rows) for caption in row.captions]
    positive = np.zeros((len(rows), len(flat)), dtype=bool)
    for i in range(len(rows)):
        for m, (own, text) in enumerate(flat):
            having = {owner[own]}
            if data.identity == "caption":
                having |= {owner[n] for n, other in flat if other == text}
            positive[i, m] = owner[i] in having
    return positive


def positives_of(data: CaptionedImages) -> Positives:
    return Positives.of(data.caption_image, len(data), data.image_identity, data.shared_text_ids)


# --- what is equal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("A dog runs .", "a dog  runs", True), ("Caf\u00e9!", "cafe\u0301", True), ("STRASSE", "stra\u00dfe", True),
        ("a\tdog\u00a0runs\u2026", "A DOG RUNS", True), ("a dog, runs", "a dog runs", False), ("...", "!!!", False),
        ("two dogs", "two dog", False), ("...", " ...", True),
    ],
)  # fmt: skip
def test_equal_word_by_word(one, other, equal):
    assert (normalize_caption(one) == normalize_caption(other)) is equal


@given(st.text(max_size=20), st.sampled_from(["", " ", ".", " .", "!  "]))
def test_the_rule_is_its_own_fixed_point(text, end):
    normalized = normalize_caption(text)
    assert normalize_caption(normalized) == normalized
    if normalized.strip(".!?,;: "):
        assert normalize_caption(f"  {text.replace(' ', '  ')}{end}") == normalized


# --- who belongs to whom: one relation everywhere ----------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(tables())
def test_figures_and_losses_share_the_relation(data):
    expected = true_pairs(data)
    positives = positives_of(data)
    images, captions = positives.pairs()
    positive = np.zeros_like(expected)
    positive[images, captions] = True
    assert (positive == expected).all()
    assert len(images) == expected.sum()
    grid = np.indices(expected.shape)
    assert (positives.contains(*grid) == expected).all()

    batches = CaptionedBatches(data, lambda some: [[1] for _ in some], 0, None)
    batch = batches[(0, list(range(len(data))))]
    assert (batch.positives.numpy() == expected).all()
    # A batch of some images, in chunks: still what is true in the whole data set.
    some = list(range(len(data)))[::-2]
    part = batches[(0, some)]
    inside = np.concatenate([np.flatnonzero(data.caption_image == image) for image in some])
    assert (part.positives.numpy() == expected[np.ix_(some, inside)]).all()
    chunks = batch.chunks(2, 0)
    gallery = GatheredBatch(
        torch.zeros(len(data), 1), torch.zeros(expected.shape[1], 1),
        torch.cat([chunk.identity for chunk in chunks]), torch.cat([chunk.caption_identity for chunk in chunks]),
        caption_text=None if batch.caption_text_id is None else torch.cat([chunk.caption_text_id for chunk in chunks]),
        true_texts=None if batch.identity_texts is None else torch.cat([chunk.identity_texts for chunk in chunks]),
    )  # fmt: skip
    assert (gallery.positive_mask().numpy() == expected).all()
    assert gallery.count_positives() == expected.sum()
    assert (gallery.positive_mask(slice(1, None), slice(0, 2)).numpy() == expected[1:, :2]).all()
    rows, columns = (torch.from_numpy(index.ravel()) for index in grid)
    assert (gallery.are_positives(rows, columns).numpy() == expected.ravel()).all()


@settings(max_examples=100, deadline=None)
@given(tables(), st.integers(0, 2**16), st.integers(1, 4))
def test_ranks_are_those_of_the_definition(data, seed, candidates):
    expected = true_pairs(data)
    rng = np.random.default_rng(seed)
    left, right = (rng.integers(-2, 3, (count, 2)).astype(np.float32) for count in expected.shape)
    scores = left.astype(np.float64) @ right.T.astype(np.float64)
    positives = positives_of(data)
    i2t, t2i = brute_force_ranks(scores, expected), brute_force_ranks(scores.T, expected.T)
    for ranks in (
        ranks_of_vectors(left, right, positives), ranks_of_scores(scores.astype(np.float32), positives),
        rerank(left, right, positives, lambda i, m: scores[i, m], expected.size)[1],
    ):  # fmt: skip
        assert [[r for r in row if r] for row in ranks.image_to_text.tolist()] == i2t
        assert [[r for r in row if r] for row in ranks.text_to_image.tolist()] == t2i
    # Shallow re-ranking by the same scores changes nothing either, where nothing ties.
    apart = rng.permutation(expected.size).reshape(expected.shape).astype(np.float32)
    dual, after = rerank(
        apart, np.eye(expected.shape[1], dtype=np.float32), positives, lambda i, m: apart[i, m], candidates
    )
    assert (dual.image_to_text == after.image_to_text).all()


def test_sharing_a_caption_is_no_equivalence():
    """1 and 2 share a caption, 2 and 3 another one: 1 and 3 have nothing in common."""
    data = table([("a dog runs", "one"), ("A dog runs.", "the sea"), ("The sea", "three")])
    assert true_pairs(table([("a", "b"), ("a", "c"), ("c", "d")])).astype(int).tolist() == [
        [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]
    ]  # fmt: skip
    positive = np.zeros((3, 6), dtype=int)
    positive[positives_of(data).pairs()] = 1
    assert positive.tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]


# --- ten classes of ten images -----------------------------------------------------------------------------------------


class Perfect:
    """A model that knows each image's class, and nothing else."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def encode_images(self, images):
        return torch.eye(self.classes)[[image[0] // 10 for image in images]]

    def encode_captions(self, captions):
        return torch.eye(self.classes)[[int(re.sub(r"\D", "", caption) or 0) for caption in captions]]


def test_a_perfect_model_of_ten_classes_has_all_of_rsum():
    captions = [(f"{'A' if n % 2 else 'a'} photo of class {n // 10}{'.' * (n % 3)}",) for n in range(100)]
    for identity, rsum, best in (("auto", 200.0, 260.0), ("caption", 600.0, 600.0)):
        data = table(captions, identity)
        evaluation = evaluate(
            Perfect(10), data.images, data.captions, data.caption_image, data.image_identity, resamples=0,
            caption_group=data.shared_text_ids,
        )  # fmt: skip
        assert evaluation.metrics.rsum.value == pytest.approx(rsum)
        equal_captions = evaluation.to_dict()["equal_captions"]
        assert equal_captions["best_rsum"] == pytest.approx(best)
        assert equal_captions["cost"] == pytest.approx(600 - best)
        if identity == "auto":
            assert (equal_captions["texts"], equal_captions["captions"], equal_captions["images"]) == (10, 100, 100)
            assert counted(data.rows)["dev"] == {"texts": 10, "captions": 100, "images": 100}


@settings(max_examples=60, deadline=None)
@given(tables(), st.integers(0, 2**16))
def test_no_model_that_scores_equal_captions_alike_exceeds_the_bound(data, seed):
    """Tables of scores that favour what is true, equal captions with equal columns."""
    data = replace(data, identity="auto")
    positives, expected = positives_of(data), true_pairs(data)
    texts, column = np.unique(data.caption_text_ids, return_inverse=True)
    bound = count_equal_captions(data.caption_text_ids, positives)
    rng = np.random.default_rng(seed)
    true = np.zeros((len(data), len(texts)))
    for image, caption in np.argwhere(expected):
        true[image, column[caption]] = 1

    def rsum(scores: np.ndarray) -> float:
        ranks = ranks_of_scores(scores[:, column].astype(np.float32), positives)
        return 100 * sum(
            (way[:, 0] <= k).mean() for way in (ranks.image_to_text, ranks.text_to_image) for k in (1, 5, 10)
        )

    for _ in range(5):
        assert rsum(10 * true + rng.random(true.shape)) <= bound.best_rsum + 1e-6


def test_the_bound_is_reached():
    """Where no image has a caption twice: images in one order in every column, and each one's rarest text first."""
    data = table([("x", "y"), ("x",), ("x", "z"), ("y", "z"), ("w",)], "auto")
    positives = positives_of(data)
    bound = count_equal_captions(data.caption_text_ids, positives).best_rsum
    texts, column = np.unique(data.caption_text_ids, return_inverse=True)
    best = 0.0
    for order in permutations(range(len(data))):
        scores = np.zeros((len(data), len(texts)))
        for image, caption in zip(*positives.pairs(), strict=True):
            rarest = (data.caption_text_ids == data.caption_text_ids[caption]).sum()
            scores[image, column[caption]] = 100 + 10 * order[image] - rarest
        metrics = retrieval_metrics(scores, np.eye(len(texts))[column], data.caption_image, resamples=0)
        best = max(best, metrics.rsum.value)
    assert best == pytest.approx(bound)
    # Text to image at 1: one of three for x, of two for y and z, and w; image to text at 1: only w's.
    assert bound == pytest.approx(100 * (4 / 8 + 1 / 5 + 1 + 1 + 1 + 1))


# --- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_equal_captions_are_never_negatives_of_each_others_images(name):
    data = table([("a dog runs", "one"), ("A dog runs .", "the sea"), ("The sea", "three"), ("four",)])
    batch = CaptionedBatches(data, lambda some: [[1] for _ in some], 0, None)[(0, [0, 1, 2, 3])]
    images, captions = len(data), len(data.captions)
    loss = DualEncoderLoss(LossConfig(name))
    torch.manual_seed(0)
    cosines = F.normalize(torch.randn(images, captions), dim=-1).requires_grad_()
    # The identity's columns make the vectors' products the cosines themselves.
    gallery = GatheredBatch(
        torch.eye(images), cosines.T, batch.identity, batch.caption_identity, caption_text=batch.caption_text_id,
        true_texts=batch.identity_texts,
    )  # fmt: skip
    (slope,) = torch.autograd.grad(sum(loss.chunks(gallery, torch.tensor(10.0))), cosines)
    true = torch.from_numpy(true_pairs(table([("d", "1"), ("d", "s"), ("s", "3"), ("4",)])))
    assert (slope[true] <= 0).all()
    assert (slope[~true] >= 0).all()
    assert (slope[~true] > 0).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", LOSSES)
def test_an_image_without_any_negative_has_a_gradient(name, smoothing):
    """Two classes in a small batch: it happens that all images are of one."""
    torch.manual_seed(0)
    for positives in (torch.ones(2, 3, dtype=torch.bool), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()):
        images = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
        captions = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        loss = DualEncoderLoss(LossConfig(name, smoothing=smoothing))
        scale = torch.tensor(3.0, dtype=torch.float64)
        value = loss(F.normalize(images, dim=1), F.normalize(captions, dim=1), positives, scale)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(images.grad).all()
        assert torch.isfinite(captions.grad).all()


def test_a_streams_steps_know_what_their_captions_say(tmp_path):
    pytest.importorskip("webdataset")
    from clipvisionalign.data.streams.in_memory import read_stream_split
    from clipvisionalign.data.streams.loader import StreamedBatches
    from clipvisionalign.data.streams.sources import open_stream
    from clipvisionalign.data.streams.writing import write_shards

    rows = [
        CaptionedImage(f"{n}.png", b"\x89PNG", (f"a photo of class {n % 3}", f"number {n}"), split, of)
        for split, several in (("train", 6), ("dev", 4))
        for n in range(several)
        for of in [str(n // 2) if split == "dev" else None]
    ]
    write_shards(CaptionedImages(rows), tmp_path)
    batches = StreamedBatches(open_stream(str(tmp_path)), lambda some: [[1] for _ in some], 0, None, "caption")
    (batch,) = batches.epoch(6, 1, 0)
    assert batch.positives.sum(dim=1).tolist() == [3] * 6
    plain = StreamedBatches(open_stream(str(tmp_path)), lambda some: [[1] for _ in some], 0, None)
    assert next(iter(plain.epoch(6, 1, 0))).positives.sum(dim=1).tolist() == [2] * 6
    # Identities of a stream's dev split come along as well.
    assert read_stream_split(str(tmp_path), "dev").image_identity.tolist() == [0, 0, 1, 1]


# --- audit, minimal pairs ----------------------------------------------------------------------------------------------


def test_an_audit_deals_no_caption_that_is_true_all_the_same():
    data = table([(f"a photo of class {n // 10}", f"class {n // 10}") for n in range(100)])
    arguments = (data.images, data.captions, data.caption_image, data.image_identity)
    report = audit(Perfect(10), *arguments, caption_group=data.shared_text_ids)
    assert report.passed, [check for check in report.checks if not check.passed]
    few = table([(f"a photo of class {n // 10}",) for n in range(70)])
    with pytest.raises(ValueError, match="not 7 of 70 among which no two have a caption in common"):
        audit(Perfect(7), few.images, few.captions, few.caption_image, caption_group=few.shared_text_ids)


def test_a_foil_that_is_true_of_the_image_is_none():
    captions = [("A black dog chases a white cat .", "a white dog chases a black cat"), ("two dogs",)]
    kinds = {pair.kind for pair in make_minimal_pairs(table(captions, "none"))}
    assert "relation" not in kinds or "attribute" not in kinds
    assert all(
        normalize_caption(pair.foil) not in {normalize_caption(text) for text in captions[pair.image[0]]}
        for pair in make_minimal_pairs(table(captions, "none"))
    )


# --- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Images of ten colours, each with the caption of its colour alone; eight or more of each."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("classes")
    colours = ["red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "small", "large"]
    rows = []
    for n in range(48):
        split = "dev" if n % 2 else "train"
        Image.new("RGB", (64, 64), (5 * n, (37 * n) % 256, (91 * n) % 256)).save(folder / f"{n}.png")
        rows.append([f"{n}.png", f"a {colours[n // 2 % 10]} circle", split])
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption", "split"], *rows])
    return folder


def test_a_run_records_its_identity_and_the_commands_follow(classes, tmp_path, tiny_model, capsys):
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train

    assert main(["check", str(classes), "--quick"]) == 0
    stdout = capsys.readouterr().out
    assert "24  captions of dev that are equal, word by word, to one of another image (10 texts of 24 images)" in stdout
    assert main(["check", str(classes), "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal_captions"]["dev"] == {"texts": 10, "captions": 24, "images": 24}
    config = RunConfig(
        data=str(classes), out=str(tmp_path / "run"), identity="caption", model=tiny_model("self"), epochs=1, batch=12,
        augment="none", precision="float32", cache=str(tmp_path / "cache"), trackers="",
    )  # fmt: skip
    results = train(config, say=lambda line: None)
    assert results["equal_captions"]["cost"] == 0
    assert json.loads((tmp_path / "run" / "data.json").read_text())["identity"] == "caption"
    # Finished, and of the same data by the same identity: nothing is refused, nothing is trained again.
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rsum"]["value"] == pytest.approx(results["rsum"]["value"])
    assert main(["evaluate", str(tmp_path / "run"), "--identity", "auto"]) == 0
    stdout = capsys.readouterr().out.replace("\n", " ")
    assert "24 captions are equal, word by word, to one of another image (10 texts of 24 images)" in stdout
    assert "'--identity caption'" in stdout
    assert main(["audit", str(tmp_path / "run")]) in (0, 1)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--identity", "colour"]) == 1
    assert "auto, caption, none" in capsys.readouterr().err


def test_a_plan_has_one_identity_for_all(tmp_path):
    from clipvisionalign.study.config import trials_of
    from clipvisionalign.study.plan_file import read_plan

    plan = tmp_path / "plan.yaml"
    plan.write_text("data: somewhere\nidentity: caption\nvariants: [self, late]\n")
    assert {trial.config.identity for trial in trials_of(read_plan(plan), tmp_path)} == {"caption"}
    plan.write_text("data: somewhere\nvariants: {self: {settings: {identity: caption}}}\n")
    with pytest.raises(ValueError, match=r"variants\.self\.settings\.identity: is the study's own"):
        read_plan(plan)
