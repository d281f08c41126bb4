"""The loss, the batches, the cache and the loop, in the properties that make a run what it says."""

from __future__ import annotations

import json
import math
import os
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optional_parts import COMPILER, needs
from tolerance import assert_rounds_to, rounding

from clipvisionalign import load_aligner, read_captioned_images
from clipvisionalign.batch import GROUP_OVERHEAD, group_by_length, seeded
from clipvisionalign.data.batches import CaptionedBatches
from clipvisionalign.images import open_image
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.device import fastest_dtype
from clipvisionalign.retrieval import evaluate
from clipvisionalign.settings import config_from_dict
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.contrastive import contrastive_loss, sample_hard_negatives
from clipvisionalign.training.diagnostics import EpochMetrics, diagnose, mean_cosine
from clipvisionalign.training.ema import ExponentialMovingAverage
from clipvisionalign.training.feature_cache import augmentation_views, open_image_features
from clipvisionalign.training.optimizer import build_schedule
from clipvisionalign.training.train import train


def written_out_loss(logits: torch.Tensor, positives: torch.Tensor) -> float:
    """The contrastive loss as a double loop, in float64."""
    total = 0.0
    for table, own in ((logits, positives), (logits.T, positives.T)):
        rows = []
        for row, true in zip(table.double().tolist(), own.tolist(), strict=True):
            negatives = sum(math.exp(score) for score, t in zip(row, true, strict=True) if not t)
            terms = [-math.log(math.exp(s) / (math.exp(s) + negatives)) for s, t in zip(row, true, strict=True) if t]
            rows.append(sum(terms) / len(terms))
        total += sum(rows) / len(rows) / 2
    return total


def positives_of(owners: list[int], images: int) -> torch.Tensor:
    return torch.arange(images)[:, None] == torch.tensor(owners)[None, :]


@pytest.mark.parametrize("owners", [[0, 1, 2], [0, 0, 1, 2, 2, 2], [2, 1, 0, 0, 1]])
def test_loss_equals_a_double_loop(owners):
    torch.manual_seed(0)
    positives = positives_of(owners, 3)
    logits = torch.randn(positives.shape, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(logits, positives)
    assert loss.item() == pytest.approx(written_out_loss(logits.detach(), positives), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x, positives), logits)


def test_loss_of_single_captions_is_clips():
    torch.manual_seed(0)
    logits, target = torch.randn(6, 6), torch.arange(6)
    cross_entropy = torch.nn.functional.cross_entropy
    clip = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(6, dtype=torch.bool)), clip)


def test_captions_of_one_image_are_never_negatives_of_each_other():
    """Raising a score of a true pair never raises the loss, and no true pair's gradient pushes it down."""
    torch.manual_seed(0)
    positives = positives_of([0, 0, 0, 1, 1, 1, 2], 3)
    logits = torch.randn(positives.shape, requires_grad=True)
    contrastive_loss(logits, positives).backward()
    assert (logits.grad[positives] < 0).all()
    assert (logits.grad[~positives] > 0).all()


def test_hard_negatives_are_never_partners_and_prefer_the_harder():
    torch.manual_seed(0)
    positives = positives_of([0, 0, 1, 1, 2, 2, 3, 3], 4)
    logits = torch.zeros(positives.shape)
    logits[:, 7] = 3.0
    counts = torch.zeros(4, 8)
    for _ in range(400):
        drawn = sample_hard_negatives(logits, positives, 2)
        assert not positives.gather(1, drawn).any()
        assert (drawn[:, 0] != drawn[:, 1]).all()
        counts.scatter_add_(1, drawn, torch.ones(4, 2))
    assert counts[0, 7] > 1.5 * counts[0, 2:7].max()
    with pytest.raises(ValueError, match="too small"):
        sample_hard_negatives(logits, positives, 7)


def test_captions_are_padded_to_the_longest_of_their_group_only():
    rng = np.random.default_rng(0)
    tokens = [rng.integers(1, 99, length).tolist() for length in rng.integers(1, 60, 333)]
    groups = group_by_length(tokens, pad=0, size=50)
    assert torch.cat([group.rows for group in groups]).sort().values.tolist() == list(range(333))
    for group in groups:
        assert len(group.rows) <= 50
        assert group.ids.shape[1] == int(group.mask.sum(dim=1).max())
        for ids, mask, row in zip(group.ids, group.mask, group.rows.tolist(), strict=True):
            assert ids[mask.bool()].tolist() == tokens[row]
    assert sum(group.ids.numel() for group in groups) < 1.25 * sum(map(len, tokens))
    # One long caption pads no short ones.
    mixed = group_by_length([[1] * 5] * 20 + [[1] * 90], pad=0)
    assert [tuple(group.ids.shape) for group in mixed] == [(20, 5), (1, 90)]
    # More captions than a group may have are divided evenly.
    assert [len(group.rows) for group in group_by_length([[1] * 5] * 101, pad=0, size=50)] == [34, 34, 33]
    assert group_by_length([], pad=0) == []


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_no_other_division_of_captions_into_groups_computes_less(lengths):
    """Tokens with their padding, and what each group costs: beside all divisions of the sorted captions."""

    def cost(ends):
        return sum(
            (end - start) * ordered[end - 1] + GROUP_OVERHEAD for start, end in zip([0, *ends], ends, strict=False)
        )

    ordered = sorted(lengths)
    groups = group_by_length([[1] * length for length in lengths], pad=0)
    ends = np.cumsum([len(group.rows) for group in groups]).tolist()
    ends_before = range(1, len(ordered))
    every = (cost([*chosen, len(ordered)]) for n in range(len(ordered)) for chosen in combinations(ends_before, n))
    assert cost(ends) == min(every)


def tokenize(captions):
    return [[len(word) for word in caption.split()] for caption in captions]


def to_pixels(image):
    return torch.rand(1) + torch.tensor(np.asarray(open_image(image)).mean())


def test_a_batch_holds_each_image_once_with_all_of_its_captions(scenes_folder):
    data = read_captioned_images(scenes_folder).split("train")
    batches = CaptionedBatches(data, tokenize, 0, to_pixels)
    image_indices = []
    for batch in batches.epoch(16, epoch=1, seed=0):
        count = len(batch)
        assert batch.pixels.shape[0] == count
        assert 14 <= count <= 16
        assert batch.positives.shape == (count, 5 * count)
        assert batch.positives.sum(dim=1).tolist() == [5] * count
        assert batch.positives.gather(0, batch.caption_image[None, :]).all()
        for group in batch.captions:
            for ids, mask, row in zip(group.ids, group.mask, group.rows.tolist(), strict=True):
                own = data.rows[batch.image_index[batch.caption_image[row]]].captions
                assert ids[mask.bool()].tolist() in tokenize(own)
        image_indices += batch.image_index.tolist()
    assert sorted(image_indices) == list(range(len(data)))


def test_what_is_drawn_does_not_depend_on_the_number_of_workers(scenes_folder):
    data = read_captioned_images(scenes_folder).split("train")
    batches = CaptionedBatches(data, tokenize, 0, to_pixels)
    alone = [(batch.image_index, batch.pixels) for batch in batches.epoch(16, 3, seed=5, workers=0)]
    helped = [(batch.image_index, batch.pixels) for batch in batches.epoch(16, 3, seed=5, workers=2)]
    other = [batch.image_index for batch in batches.epoch(16, 4, seed=5)]
    for (a, b), (c, d) in zip(alone, helped, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert not torch.equal(alone[0][0], other[0])


def test_images_of_one_identity_share_their_captions():
    from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages

    rows = [CaptionedImage(f"{n}", b"", ("one", "two"), "train", identity=str(n // 2)) for n in range(6)]
    batches = CaptionedBatches(CaptionedImages(rows), tokenize, 0, None)
    batch = batches[(0, [0, 1, 4])]
    assert batch.positives.int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_an_image_that_cannot_be_decoded_is_left_out_of_its_batch(tmp_path):
    from test_bad_input import jpeg

    from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages

    rows = [CaptionedImage(f"{n}", jpeg()[: 500 if n == 1 else None], ("a", "b c"), "train") for n in range(3)]
    batch = CaptionedBatches(CaptionedImages(rows), tokenize, 0, to_pixels)[(0, [0, 1, 2])]
    assert batch.image_index.tolist() == [0, 2]
    assert batch.positives.shape == (2, 4)
    assert len(batch.skipped) == 1


def test_seeded_leaves_the_random_numbers_as_they_were():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with seeded(7):
        first = torch.rand(2)
    assert torch.equal(torch.rand(3), expected)
    with seeded(7):
        assert torch.equal(torch.rand(2), first)


def test_cached_features_are_the_towers_own(tmp_path, scenes_folder, tiny_model):
    torch.manual_seed(0)
    tower = Aligner(tiny_model()).image_tower.eval()
    data = read_captioned_images(scenes_folder).split("dev")
    cached = open_image_features(tmp_path, data, tower, augmentation_views("flip+crop", 3), torch.float32, "dev")
    assert cached.views == 3
    index = torch.tensor([3, 0, 5])
    plain, flipped = (cached(index, torch.full((3,), view), torch.device("cpu")) for view in (0, 1))
    with torch.no_grad():
        for view, view_features in ((False, plain), (True, flipped)):
            transform = tower.image_transform.image_loader(flip=float(view))
            expected = tower(torch.stack([transform(data.rows[i].image) for i in index]))
            # Kept in float16: ten bits of fraction.
            for ours, right in ((view_features.pooled, expected.pooled), (view_features.patches, expected.patches)):
                # Twice rounded: in float32 by a tower of some 12 layers, then to ten bits of fraction.
                assert_rounds_to(ours, right, 1, size=float(right.abs().max()) / 4, dtype=torch.float16)
    again = open_image_features(tmp_path, data, tower, augmentation_views("flip+crop", 3), torch.float32, "dev")
    assert again.folder == cached.folder
    with torch.no_grad():
        next(tower.parameters()).add_(0.1)
    other = open_image_features(tmp_path, data, tower, augmentation_views("flip+crop", 3), torch.float32, "dev")
    assert other.folder != cached.folder


def test_an_image_of_equal_size_has_features_of_its_own(tmp_path, tiny_model):
    from PIL import Image

    from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages

    def drawn(colour: str) -> CaptionedImages:
        Image.new("RGB", (64, 64), colour).save(tmp_path / "a.bmp")
        return CaptionedImages([CaptionedImage("a.bmp", tmp_path / "a.bmp", ("a caption",), "train")])

    tower = Aligner(tiny_model()).image_tower.eval()
    red = open_image_features(tmp_path, drawn("red"), tower, augmentation_views("none", 1), torch.float32, "train")
    blue = open_image_features(tmp_path, drawn("blue"), tower, augmentation_views("none", 1), torch.float32, "train")
    assert red.folder != blue.folder
    index = torch.tensor([0])
    both = [lookup(index, torch.zeros_like(index), torch.device("cpu")).pooled for lookup in (red, blue)]
    assert not torch.equal(*both)
    assert (
        open_image_features(tmp_path, drawn("red"), tower, augmentation_views("none", 1), torch.float32, "train").folder
        == red.folder
    )


def test_views_never_mirror_unless_asked():
    assert [view.flip for view in augmentation_views("none", 4)] == [False]
    assert not any(view.flip for view in augmentation_views("crop", 4))
    flips = augmentation_views("flip+crop", 4)
    assert sum(view.flip for view in flips) == 2
    assert not flips[0].crop


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", ["self", "sparse", "late", "cross"])
def test_run_folder_is_complete_and_its_figures_are_its_models(design, tiny_runs, scenes_folder):
    run = tiny_runs[design]
    names = {
        "model.safetensors",
        "config.yaml",
        "text_tower",
        "metrics.jsonl",
        "data.json",
        "environment.json",
        "weights.json",
        "results.json",
        "ranks.npz",
        "trained_on.npz",
        "records",
    }
    # Another test may have audited the run meanwhile.
    assert {path.name for path in run.iterdir()} - {"audit.json"} == names
    results = json.loads((run / "results.json").read_text())
    part = read_captioned_images(scenes_folder).split("dev")
    candidates = 5 if design == "cross" else 0
    again = evaluate(load_aligner(run), part.images, part.captions, part.caption_image, candidates=candidates)
    own = results["chosen"]["model_in_sample"]
    assert again.to_dict()["rsum"] == own["rsum"]
    if len({results["best_epoch"], *results["chosen"]["epoch"]["halves"]}) == 1 and design in ("self", "sparse"):
        # Nothing else is chosen: cross-fitted and in-sample figures are the same.
        assert results["rsum"] == own["rsum"]
    assert ("dual" in results) == ("reranked" in results) == (design == "cross")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "dev" in line]
    assert [line["epoch"] for line in epochs] == [1, 2]
    # Dev figures of the best epoch, of the dual encoder, are those that the saved model gives.
    if design != "late":
        best = max(epochs, key=lambda line: line["dev"]["rsum"]["value"])
        dual = own.get("dual", own)
        assert dual["rsum"]["value"] == pytest.approx(best["dev"]["rsum"]["value"], abs=3.0)
    about = json.loads((run / "data.json").read_text())
    assert about["dev"]["fingerprint"] == part.fingerprint()


@pytest.mark.slow
def test_a_run_is_the_same_a_second_time(tmp_path, scenes_folder, tiny_model, tiny_runs):
    config = RunConfig(
        data=str(scenes_folder), out=str(tmp_path / "again"), model=tiny_model("self"), epochs=2, batch=16,
        augment="none", precision="float32", cache=str(tmp_path / "cache"),
    )  # fmt: skip
    torch.rand(5)
    train(config, say=lambda line: None)
    first = load_aligner(tiny_runs["self"]).state_dict()
    second = load_aligner(tmp_path / "again").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_frozen_towers_stay_and_trained_ones_move(tmp_path, scenes_folder, tiny_model):
    kept = {}
    for freeze in ("image", "text", "both", "none"):
        config = RunConfig(
            data=str(scenes_folder), out=str(tmp_path / freeze), model=tiny_model(), epochs=1, batch=16, workers=0,
            augment="crop", precision="float32", cache="off", freeze=freeze,
        )  # fmt: skip
        train(config, say=lambda line: None)
        kept[freeze] = load_aligner(tmp_path / freeze).state_dict()
    from clipvisionalign.training.build import seed_everything

    seed_everything(0)
    start = Aligner(tiny_model()).state_dict()

    def moved(run: str, part: str) -> bool:
        return any(not torch.equal(kept[run][name], start[name]) for name in start if name.startswith(part))

    assert [moved(run, "image_tower") for run in kept] == [False, True, False, True]
    assert [moved(run, "text_tower") for run in kept] == [True, False, False, True]
    assert all(moved(run, "text_head") for run in kept)


def test_settings_from_yaml_and_flags_are_the_same(tmp_path, scenes_folder, tiny_runs):
    import yaml
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig, as_group=False)
    settings = parser.instantiate_classes(
        parser.parse_args(["--config", str(tiny_runs["cross"] / "config.yaml")])
    ).as_dict()
    settings.pop("config")
    written = yaml.safe_load((tiny_runs["cross"] / "config.yaml").read_text())
    from dataclasses import asdict

    assert asdict(RunConfig(**settings)) == written
    assert config_from_dict(AlignerConfig, written["model"]).design == "cross"


def test_schedule_rises_then_falls():
    rates = [build_schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=2e-3)


def test_moving_average_remembers_a_short_run():
    model, kept = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(kept.weight)
    average = ExponentialMovingAverage(model, kept, 0.99)
    for _ in range(39):
        average.update()
    assert 0.9 < average.model().weight.item() < 1


@pytest.mark.slow
def test_a_run_starts_from_another(tmp_path, scenes_folder, tiny_model, tiny_runs):
    """With learning rates of zero nothing but what the first run lacks is new."""

    def config(design: str, **more) -> RunConfig:
        return RunConfig(
            data=str(scenes_folder), out=str(tmp_path / design), model=tiny_model(design), epochs=1, batch=32, text_lr=0.0,
            head_lr=0.0, augment="none", cache=str(tmp_path / "cache"), precision="float32", **more,
        )  # fmt: skip

    said = []
    train(config("cross", init=str(tiny_runs["self"])), say=said.append)
    assert any("reinitialised: fusion, late" in line for line in said)
    first, second = (load_aligner(folder).state_dict() for folder in (tiny_runs["self"], tmp_path / "cross"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    # A fusion trained alone leaves the rest as it was, whatever the learning rate.
    alone = config("cross", init=str(tiny_runs["late"]), freeze="all", overwrite=True)
    alone.head_lr = 1e-2
    train(alone, say=said.append)
    first, second = (load_aligner(folder).state_dict() for folder in (tiny_runs["late"], tmp_path / "cross"))
    assert all(torch.equal(first[name], second[name]) for name in first if name != "late.weight")
    assert (second["fusion.correction.weight"] != 0).any()
    with pytest.raises(ValueError, match="only the design 'cross' has one"):
        train(config("late", freeze="all"), say=said.append)
    # The other way round too: what the design has no use for is left behind.
    train(config("self", init=str(tiny_runs["cross"])), say=said.append)
    assert any("reinitialised: nothing" in line for line in said)
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        train(config("late", init=str(tmp_path)), say=said.append)
    other = config("sparse", init=str(tiny_runs["self"]))
    other.model.width = 16
    with pytest.raises(ValueError, match="other towers than this run's"):
        train(other, say=said.append)


def test_training_stops_when_dev_stands_still(tmp_path, scenes_folder, tiny_model):
    """With learning rates of zero no epoch is better than the first."""
    said = []
    config = RunConfig(
        data=str(scenes_folder), out=str(tmp_path / "run"), model=tiny_model(), epochs=9, batch=32, text_lr=0.0,
        head_lr=0.0, patience=2, augment="none", cache=str(tmp_path / "cache"), precision="float32",
    )  # fmt: skip
    results = train(config, say=said.append)
    assert results["best_epoch"] == 1
    assert any("no better dev rsum for 2 epochs" in line for line in said)
    assert sum(line.startswith("epoch ") for line in said) == 3


# --- when it goes wrong ----------------------------------------------------------------------------------------------


def epochs(*rows):
    return [EpochMetrics(loss, accuracy, rsum, 128, 640) for loss, accuracy, rsum in rows]


def test_diagnosis_tells_the_three_ways_to_go_wrong():
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((50, 16))
    spread /= np.linalg.norm(spread, axis=1, keepdims=True)
    alike = np.ones((50, 16)) / 4 + 1e-3 * spread
    alike /= np.linalg.norm(alike, axis=1, keepdims=True)
    good = epochs((3.0, 0.2, 200.0), (2.0, 0.4, 250.0), (1.5, 0.5, 260.0), (1.2, 0.6, 259.0))
    assert diagnose(good, spread, spread) == []
    (diagnosis,) = diagnose(good, alike, spread)
    assert "image vector is nearly alike" in diagnosis
    guessing = good[0].chance_loss
    (diagnosis,) = diagnose(epochs((guessing, 0.008, 9.0), (guessing, 0.008, 9.0)), spread, spread)
    assert "nothing is learned" in diagnosis
    # A pretrained model begins far above guessing: while its loss falls, it learns.
    assert diagnose(epochs((13.5, 0.008, 9.0), (7.0, 0.008, 9.0)), spread, spread) == []
    (diagnosis,) = diagnose(epochs((7.0, 0.008, 9.0), (7.0, 0.008, 9.0)), spread, spread)
    assert "above what guessing gives" in diagnosis
    (diagnosis,) = diagnose(epochs((2.0, 0.4, 300.0), (1.5, 0.6, 290.0), (0.7, 0.9, 270.0)), spread, spread)
    assert "by heart" in diagnosis
    assert "epoch 1" in diagnosis
    # By loss it is the loss that tells, whatever rsum does.
    history = [
        EpochMetrics(3 - n, n / 9, 200 + n, 128, 640, dev_loss) for n, dev_loss in enumerate((2.0, 1.5, 1.6, 1.7))
    ]
    (diagnosis,) = diagnose(history, spread, spread, "loss")
    assert "dev loss has risen from 1.500 (epoch 2) to 1.700" in diagnosis
    assert diagnose(history, spread, spread) == []


def test_guessing_is_the_loss_of_equal_scores():
    positives = positives_of([n // 5 for n in range(80)], 16)
    loss = contrastive_loss(torch.zeros(16, 80), positives)
    assert EpochMetrics(0, 0, 0, 16, 80).chance_loss == pytest.approx(loss.item(), rel=rounding(80))


def test_mean_cosine_equals_the_plain_mean():
    vectors = np.random.default_rng(0).standard_normal((9, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = vectors @ vectors.T
    assert mean_cosine(vectors) == pytest.approx(table[~np.eye(9, dtype=bool)].mean())


def test_a_loss_that_is_not_finite_stops_the_run_with_its_images(tmp_path, scenes_folder, tiny_model, monkeypatch):
    from clipvisionalign.training import contrastive as losses

    monkeypatch.setattr(losses, "softmax_terms", lambda logits, *rest: logits.sum(dim=1) * float("nan"))
    config = RunConfig(
        data=str(scenes_folder), out=str(tmp_path / "run"), model=tiny_model(), batch=16, cache="off", workers=0
    )
    with pytest.raises(FloatingPointError, match=r"step 1: .*images/0"):
        train(config, say=lambda line: None)


def test_the_quick_format_is_measured_not_assumed(monkeypatch):
    from clipvisionalign.models import device

    cpu = torch.device("cpu")
    assert fastest_dtype(cpu, print, "float32") is torch.float32
    assert fastest_dtype(cpu, print, "bfloat16") is torch.bfloat16
    for bfloat16, expected in ((0.1, torch.bfloat16), (9.0, torch.float32), (0.95, torch.float32)):
        seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16}
        monkeypatch.setattr(device, "time_dtypes", lambda *_, seconds=seconds, **__: seconds)
        assert fastest_dtype(cpu, print) is expected


class Work:
    """Work whose time is set, on a clock that nothing else moves. seconds: in float32 and under bfloat16 autocast."""

    def __init__(self, clock: list[float], float32: float, bfloat16: float, first: float = 0.0) -> None:
        self.clock, self.float32, self.bfloat16, self.first = clock, float32, bfloat16, first
        self.calls: list[str] = []

    def __call__(self) -> None:
        short = "bfloat16" if torch.is_autocast_enabled("cpu") else "float32"
        self.clock[0] += getattr(self, short) + self.first * (short not in self.calls)
        self.calls.append(short)


def test_timing_the_formats_ends_once_the_answer_is_known(monkeypatch):
    from clipvisionalign.models import device

    clock = [0.0]
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])

    def timed(float32, bfloat16, first=0.0, tiny=None):
        work, small = Work(clock, float32, bfloat16, first), Work(clock, *(tiny or (0.01, 0.01)), first=first)
        before = clock[0]
        dtype = fastest_dtype(torch.device("cpu"), work, small_work=small)
        return dtype, work.calls, small.calls, clock[0] - before

    # Ten times slower: not one step of the work itself is done, and bfloat16 is tried once in small.
    dtype, calls, small, _ = timed(0.7, 16.0, tiny=(0.07, 0.7))
    assert (dtype, calls, small.count("bfloat16")) == (torch.float32, [], 1)
    # The first call makes kernels ready, which may look like slowness: a second one decides.
    dtype, calls, small, _ = timed(0.7, 0.2, tiny=(0.07, 0.03), first=1.0)
    assert dtype is torch.bfloat16
    assert calls.count("bfloat16") == 2
    # Clear after one turn; a close race runs to its end.
    assert len(timed(1.0, 0.4)[1]) == 4
    assert len(timed(1.0, 0.85)[1]) == 8
    assert timed(1.0, 0.85)[0] is torch.float32
    assert timed(1.0, 0.8)[0] is torch.bfloat16
    # Work that takes minutes is not repeated for the sake of a close race.
    dtype, calls, _, seconds = timed(30.0, 29.0)
    assert (dtype, len(calls)) == (torch.float32, 2)
    assert seconds < 60


@pytest.mark.slow
@needs(COMPILER)
def test_a_compiled_run_has_the_curve_of_a_plain_one(scenes_folder, tiny_model, tmp_path, monkeypatch):
    """The towers as graphs, forth and back; with C++ kernels for them in `make test-all`, where the compiler takes a
    minute."""
    backend, compiled = os.environ.get("COMPILE_BACKEND", "aot_eager"), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: compiled(self, backend=backend, **more))
    model = tiny_model("self")
    # Compiled dropout draws other numbers.
    model.dropout = model.text_tower.dropout = 0.0
    losses = []
    for name in ("plain", "compiled"):
        config = RunConfig(
            data=str(scenes_folder), out=str(tmp_path / name), model=model, epochs=1, batch=16, augment="none",
            precision="float32", cache=str(tmp_path / f"cache-{name}"), compile=name == "compiled", trackers="",
        )  # fmt: skip
        train(config, say=lambda line: None)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train_loss"] for line in lines if "train_loss" in line])
    # Each of the steps adds its rounding to that of the steps before it.
    assert losses[1] == pytest.approx(losses[0], abs=rounding(16 * 80, size=max(losses[0]), steps=6))
    assert load_aligner(tmp_path / "compiled").encode_captions(["a red circle"]).shape == (1, 32)
