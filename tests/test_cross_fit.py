"""What is chosen on dev is measured on images that did not choose it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipvisionalign import load_aligner, read_captioned_images
from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages
from clipvisionalign.data.hashes import dataset_hashes
from clipvisionalign.retrieval import evaluate
from clipvisionalign.retrieval.metrics import metrics_of_ranks
from clipvisionalign.retrieval.ranks import PositiveRanks
from clipvisionalign.study.aggregate import selection_note
from clipvisionalign.training import train as training
from clipvisionalign.training import trainer
from clipvisionalign.training.best_epoch import HALF_MODELS, BestEpoch, prune_models, save_chosen_models
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.contrastive import DualEncoderLoss, LossConfig
from clipvisionalign.training.cross_fit import combine_halves, cross_fit
from clipvisionalign.training.dev_scores import DevScores
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.halves import split_halves
from clipvisionalign.training.pair_weights import PairWeights
from clipvisionalign.training.selection_notes import in_sample_note, init_selection_note
from clipvisionalign.training.state import TrainProgress, TrainState
from clipvisionalign.training.validation import DevGallery, DevMetrics, fixed_batches


def images(rows: list[tuple[str, tuple[str, ...], str | None]]) -> CaptionedImages:
    return CaptionedImages([CaptionedImage(name, b"", captions, "dev", identity) for name, captions, identity in rows])


rows_of = st.lists(
    st.tuples(
        st.lists(st.sampled_from([*"abcdefghijklmnopqrstuvwxyz"]), min_size=1, max_size=2).map(tuple),
        st.sampled_from([None, None, None, *"123456789"]),
    ),
    min_size=1,
    max_size=40,
).map(lambda rows: [(f"{number}.jpg", *row) for number, row in enumerate(rows)])


@given(rows_of)
@example([(f"{index}.jpg", ("a",), None if index < 3 else "1") for index in range(6)])
@settings(max_examples=60, deadline=None)
def test_what_belongs_together_is_in_one_half_and_each_half_can_choose(rows):
    data = images(rows)
    halves = split_halves(data)
    keys = [identity or name for name, _, identity in rows]
    if halves is None:
        # Fewer than two identities for each half, or one that cannot be taken apart.
        assert len(set(keys)) < 4
        return
    assert (halves.caption_half == halves.image_half[data.caption_image]).all()
    for first in range(len(rows)):
        for second in range(first):
            same_identity = keys[first] == keys[second]
            shared = set(rows[first][1]) & set(rows[second][1]) and "caption" in halves.grouped_by
            if same_identity or shared:
                assert halves.image_half[first] == halves.image_half[second]
    for number, part in enumerate(halves.parts):
        assert len({keys[index] for index in part.images}) >= 2
        assert (halves.image_half[part.images] == number).all()
        assert (part.images[part.positives.caption_image] == data.caption_image[part.captions]).all()


def test_adding_images_moves_no_other():
    rows = [(f"{number}.jpg", (f"a caption of {number}",), None) for number in range(400)]
    few, many = split_halves(images(rows[:300])), split_halves(images(rows))
    assert (many.image_half[:300] == few.image_half).all()
    assert 120 < few.image_half.sum() < 180


def test_too_few_images_or_one_identity_are_not_halved():
    assert split_halves(images([(str(number), (str(number),), None) for number in range(3)])) is None
    assert split_halves(images([(str(number), (str(number),), "one") for number in range(9)])) is None
    # Four are, though all share a caption: then identities alone are kept together.
    halves = split_halves(images([(str(number), ("the same",), None) for number in range(4)]))
    assert sorted(halves.image_half) == [0, 0, 1, 1]
    assert "caption" not in halves.grouped_by


def test_each_half_is_ranked_by_what_the_other_chose():
    halves = split_halves(images([(str(number), (f"{number} a", f"{number} b"), None) for number in range(30)]))
    zeros, ones = (
        PositiveRanks(np.full((30, 2), value), np.full((60, 1), value)) for value in (10, 11)
    )  # ranks by what half 0 and half 1 chose
    ranks = halves.combine(zeros, ones)
    assert (ranks.image_to_text == np.where(halves.image_half == 0, 11, 10)[:, None]).all()
    assert (ranks.text_to_image == np.where(halves.caption_half == 0, 11, 10)[:, None]).all()


@pytest.mark.parametrize(
    "how", ["same epochs", "other epochs", "last epoch", "through another", "other images", "old", "one epoch"]
)
def test_a_run_says_what_the_run_that_it_starts_from_was_chosen_by(how, tmp_path):
    data = images([(str(number), (f"caption {number}",), None) for number in range(8)])
    other = images([(str(number), (f"another {number}",), None) for number in range(8)])
    dev = {"contents": dataset_hashes(other if how == "other images" else data)}
    (tmp_path / "data.json").write_text(json.dumps({"dev": dev}))
    chosen = {"by": "halves", "epoch_by": "rsum", "epoch": {"model": 2, "halves": [2, 2]}}
    chosen |= {"epoch": {"model": 2, "halves": [1, 2]}} if how == "other epochs" else {}
    chosen |= {"epoch_by": "last epoch", "epoch": {"model": 2, "halves": [1, 2]}} if how == "last epoch" else {}
    chosen |= {"with_init": "it starts from another"} if how == "through another" else {}
    if how == "one epoch":
        (tmp_path / "metrics.jsonl").write_text(
            '{"step": 1, "loss": 1.0}\n{"step": 5, "dev_loss": 1.0, "dev": {"images": 8}}\n'
        )
    results = {"rsum": {"value": 300.0}} | ({} if how == "old" else {"chosen": chosen})
    (tmp_path / "results.json").write_text(json.dumps(results))
    message = init_selection_note(tmp_path, data)
    assert (message is not None) == (how in ("other epochs", "through another", "old"))
    note = in_sample_note(tmp_path, data)
    assert (note is None) == (how in ("other images", "last epoch", "one epoch"))
    # The cross-fitted figure is of the images that the run was measured on, and of no others.
    assert ("300.0" in (note or "")) == (how in ("same epochs", "other epochs", "through another"))


# --- noise gives no advantage ----------------------------------------------------------------------------------------


class PlantedPairs:
    """The pairs of a model whose late score, or whose fusion's correction too, is nothing but noise."""

    def __init__(self, model: Planted, rng: np.random.Generator, count: int, captions: int) -> None:
        shared = rng.standard_normal((count, 24))
        owners = np.repeat(np.arange(count), captions)
        vectors = [shared + rng.standard_normal(shared.shape), shared[owners] + rng.standard_normal((len(owners), 24))]
        unit = [torch.from_numpy(v / np.linalg.norm(v, axis=1, keepdims=True)).float() for v in vectors]
        self.model, (self.image_vectors, self.caption_vectors) = model, unit
        self.noise = 2.0 * rng.standard_normal((2, count, len(owners))).astype(np.float32)

    def score_matrix(self) -> torch.Tensor:
        dual = 20 * self.image_vectors @ self.caption_vectors.T
        return dual + self.model.aligner.late.weight * torch.from_numpy(self.noise[0])

    def components(self, i: np.ndarray, c: np.ndarray) -> np.ndarray:
        dual = 20 * (self.image_vectors.numpy()[i] * self.caption_vectors.numpy()[c]).sum(axis=1)
        return np.stack([dual, self.noise[0][i, c], self.noise[1][i, c]], axis=1)


class Planted:
    """What `DevScores` asks of a model."""

    def __init__(self, rng: np.random.Generator, count: int, captions: int, fusion: bool) -> None:
        part = SimpleNamespace(weight=torch.ones(()))
        own = SimpleNamespace(weight=torch.zeros(())) if fusion else None
        self.aligner = SimpleNamespace(late=part, fusion=own, scale=lambda: torch.tensor(20.0))
        self.pairs = PlantedPairs(self, rng, count, captions)

    def pair_scorer(self, *_) -> PlantedPairs:
        return self.pairs


@pytest.mark.slow
@pytest.mark.parametrize(("fusion", "draws"), [(False, 60), (True, 12)])
def test_choosing_among_noise_gives_no_advantage_where_it_is_measured(fusion, draws):
    """Chosen and measured on the same images, noise gains in every draw; cross-fitted, it gains nothing on average."""
    count = 60
    data = images([(f"{number}.jpg", (f"{number} a", f"{number} b"), None) for number in range(count)])
    halves, in_sample, fitted = split_halves(data), [], []
    for seed in range(draws):
        model = Planted(np.random.default_rng(seed), count, 2, fusion)
        scores = DevScores(model, data, 8 if fusion else 0)
        _, choices = cross_fit(lambda _, scores=scores: scores, [BestEpoch(epoch=1) for _ in range(3)], halves)
        crossed = combine_halves(halves, choices[1].ranking, choices[2].ranking)
        owners = scores.positives.caption_image
        own, chosen_on_all, fair = (
            metrics_of_ranks(ranked.ranks, owners, resamples=0).rsum.value
            for ranked in (scores.rank(PairWeights()), choices[0].ranking, crossed)
        )
        in_sample.append(chosen_on_all - own)
        fitted.append(fair - own)
    error = np.std(fitted, ddof=1) / np.sqrt(draws)
    assert min(in_sample) >= 0
    assert np.mean(in_sample) > 1
    assert np.mean(fitted) < 2 * error
    assert np.mean(fitted) < np.mean(in_sample) / 4


# --- the epoch -------------------------------------------------------------------------------------------------------


def test_each_gallery_has_its_own_patience():
    best = BestEpoch()
    for epoch, score in enumerate([3.0, float("nan"), 2.0, 9.0], 1):
        best.update(epoch, score, patience=2)
    # Epoch 4 came after its patience was at an end.
    assert (best.epoch, best.score, best.stopped) == (1, 3.0, True)
    last = BestEpoch()
    for epoch in (1, 2, 3):
        last.update(epoch, -epoch, patience=1, always=True)
    assert (last.epoch, last.stopped) == (3, False)


@given(st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=1, max_size=8), st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None)
def test_models_that_a_half_chose_are_there_wherever_a_run_is_cut_off(tmp_path_factory, scores, seed):
    """Cut off between any two writings, and gone on from the checkpoint, each chosen epoch has its own model."""
    out = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(seed)

    def save(epoch: int):
        def write(folder: Path) -> None:
            (folder / "text_tower").mkdir(exist_ok=True)
            (folder / "config.yaml").write_text("model")
            (folder / "model.safetensors").write_text(str(epoch))

        return write

    checkpoint, epoch = [BestEpoch() for _ in range(3)], 1
    while epoch <= len(scores):
        best = [BestEpoch(**vars(each)) for each in checkpoint]
        before = best[0].epoch
        for each, score in zip(best, scores[epoch - 1], strict=True):
            each.update(epoch, score, patience=9)
        save_chosen_models(out, save(epoch), epoch, before, best)
        if rng.random() < 0.3:
            # Killed before the checkpoint: the epoch is done once more.
            continue
        checkpoint, epoch = best, epoch + 1
        if rng.random() < 0.7:
            prune_models(out, checkpoint)
    prune_models(out, checkpoint)
    assert (out / "model.safetensors").read_text() == str(checkpoint[0].epoch)
    extra = {each.epoch for each in checkpoint[1:]} - {checkpoint[0].epoch}
    assert len(extra) <= 2
    kept = {
        int(folder.name[-4:]): (folder / "model.safetensors").read_text() for folder in (out / HALF_MODELS).glob("*")
    }
    assert kept == {number: str(number) for number in extra}


def comparable(run: Path) -> dict:
    results = json.loads((run / "results.json").read_text())
    without_times = {key: value for key, value in results.items() if key not in ("run", "training_seconds")}
    for block in (without_times, without_times["chosen"]["model_in_sample"]):
        for rerank_result in block.get("depths", []):
            rerank_result.pop("ms_per_query")
    return without_times


@pytest.mark.slow
@pytest.mark.parametrize(("design", "best_by", "cut"), [("late", "rsum", 3), ("cross", "loss", 6), ("self", "loss", 5)])
def test_halves_that_choose_other_epochs_are_measured_with_those_and_after_a_stop_too(
    design, best_by, cut, tmp_path, scenes_folder, tiny_model, monkeypatch
):
    def planted(self: DevMetrics, asked: str) -> list[float]:
        assert asked == best_by
        epoch = next(number for number, loss in enumerate(losses, 1) if loss == self.loss)
        return [-float(abs(epoch - best)) for best in (1, 2, 3)]

    losses: list[float] = []
    original = DevGallery.measure

    def measured(self: DevGallery, aligner):
        metrics = original(self, aligner)
        if metrics.loss not in losses:
            losses.append(metrics.loss)
        return metrics

    monkeypatch.setattr(DevGallery, "measure", measured)
    monkeypatch.setattr(DevMetrics, "scores", planted)

    def config(name: str) -> RunConfig:
        return RunConfig(
            data=str(scenes_folder), out=str(tmp_path / name), model=tiny_model(design), epochs=3, batch=32, best_by=best_by,
            augment="none", precision="float32", cache=str(tmp_path / "cache"), trackers="", checkpoint_minutes=0.0,
        )  # fmt: skip

    said: list[str] = []
    training.train(config("whole"), said.append)
    results = comparable(tmp_path / "whole")
    assert results["chosen"]["epoch"] == {"model": 1, "halves": [2, 3]}
    assert results["chosen"]["epoch_by"] == best_by
    assert results["best_epoch"] == 1
    assert ("weights" in results["chosen"]) == (design != "self")
    assert not (tmp_path / "whole" / HALF_MODELS).exists()
    # The run's own model can be checked against a recorded figure.
    dev = read_captioned_images(scenes_folder).split("dev")
    candidates = 5 if design == "cross" else 0
    own = evaluate(load_aligner(tmp_path / "whole"), dev.images, dev.captions, dev.caption_image, candidates=candidates)
    assert own.to_dict()["rsum"] == results["chosen"]["model_in_sample"]["rsum"]
    # A gain is that of the same, cross-fitted ranks.
    if design == "cross":
        gain = results["reranked"]["rsum"]["value"] - results["dual"]["rsum"]["value"]
        assert results["gain"]["value"] == pytest.approx(gain, abs=1e-6)

    # A kill at a step, and one more after an epoch's models are written and before its checkpoint is.
    taken = 0
    forward_backward = trainer.forward_backward

    def stops(*arguments):
        nonlocal taken
        taken += 1
        if taken == cut:
            raise KeyboardInterrupt
        return forward_backward(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "forward_backward", stops)
        with pytest.raises(KeyboardInterrupt):
            training.train(config("cut"), said.append)
    saved = TrainState.save

    def no_checkpoint(self, *arguments):
        if self_epoch(arguments) > 1 and (tmp_path / "cut" / HALF_MODELS).exists():
            raise KeyboardInterrupt
        saved(self, *arguments)

    def self_epoch(arguments) -> int:
        return arguments[2]["place"]["epoch"]

    with monkeypatch.context() as patched:
        patched.setattr(TrainState, "save", no_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            training.resume(tmp_path / "cut", said.append)
    training.resume(tmp_path / "cut", said.append)
    assert comparable(tmp_path / "cut") == results
    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- the loss on dev -------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 25))
@settings(max_examples=40, deadline=None)
def test_dev_batches_are_of_one_size_and_hold_every_image(count, size):
    indices = np.arange(100, 100 + count)
    batches = fixed_batches(indices, size)
    assert batches.shape == (-(-count // min(size, count)), min(size, count))
    assert set(batches.ravel()) == set(indices)
    assert all(len(set(batch)) == len(batch) for batch in batches.tolist())
    assert (batches == fixed_batches(indices, size)).all()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "hardest"])
def test_dev_loss_and_accuracy_are_the_trainings_own(loss, tiny_runs, scenes_folder):
    aligner = load_aligner(tiny_runs["self"])
    data = read_captioned_images(scenes_folder).split("dev")
    loss_of = DualEncoderLoss(LossConfig(loss, bias=-3.0))
    gallery = DevGallery(data, None, loss_of, 5, Distributed(torch.device("cpu")))
    metrics = gallery.measure(aligner)
    vectors, captions = aligner.encode_images(data.images), aligner.encode_captions(data.captions)
    losses, right = [], []
    for batch in fixed_batches(np.arange(len(data)), 5):
        columns = np.flatnonzero(np.isin(data.caption_image, batch))
        owners = torch.from_numpy(data.caption_image[columns])
        positives = torch.from_numpy(batch)[:, None] == owners[None, :]
        losses.append(loss_of(vectors[batch], captions[columns], positives, aligner.scale()).item())
        first = (vectors[batch] @ captions[columns].T).argmax(dim=0)
        right += (torch.from_numpy(batch)[first] == owners).tolist()
    assert metrics.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics.accuracy == pytest.approx(np.mean(right))
    assert metrics.scores("loss")[0] == -metrics.loss
    again = evaluate(aligner, data.images, data.captions, data.caption_image, resamples=0)
    assert metrics.scores("rsum")[0] == again.metrics.rsum.value
    # A half's own figures are those of a gallery that is that half.
    for part, rsum in zip(gallery.halves.parts, metrics.half_rsum, strict=True):
        some = [data.images[index] for index in part.images]
        texts = [data.captions[index] for index in part.captions]
        own = evaluate(aligner, some, texts, part.positives.caption_image, resamples=0)
        assert own.metrics.rsum.value == rsum


# --- around it -------------------------------------------------------------------------------------------------------


def test_a_dev_split_too_small_to_be_halved_is_said_to_be_in_sample(tmp_path, scenes_folder, tiny_model):
    from clipvisionalign.data.scene_dataset import write_scenes

    few = write_scenes(tmp_path / "few", 24, seed=2, size=64)
    assert 2 <= len(read_captioned_images(few).split("dev")) < 4
    said: list[str] = []
    config = RunConfig(
        data=str(scenes_folder), dev_data=str(few), out=str(tmp_path / "run"), model=tiny_model("late"), epochs=1, batch=32,
        augment="none", precision="float32", cache=str(tmp_path / "cache"), trackers="",
    )  # fmt: skip
    results = training.train(config, said.append)
    assert any("too few to be halved" in line for line in said)
    assert results["chosen"]["by"] == "all of dev"
    assert "in-sample" in results["chosen"]["figures"]
    assert results["rsum"] == results["chosen"]["model_in_sample"]["rsum"]
    # The epoch's line has the figures that small scripts print.
    (line,) = [line for line in said if line.startswith("epoch 1/1")]
    for label in ("dev loss", "accuracy", "R@5", "rsum"):
        assert label in line.partition("|")[2]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["dev_loss"] > 0
    assert 0 <= records[-1]["dev_accuracy"] <= 1
    assert records[-1]["dev_halves"] is None


def test_a_checkpoint_from_before_dev_was_halved_is_gone_on_with():
    where = TrainProgress.of({"step": 9, "epoch": 3, "best": 250.0, "best_epoch": 2}, "rsum")
    assert (where.best_epoch, where.best, len(where.chosen)) == (2, 250.0, 1)
    blank = np.zeros((1, 1))
    figures = DevMetrics(
        SimpleNamespace(rsum=SimpleNamespace(value=240.0)), 1.0, 0.5, [1.0, 2.0], [1.0, 1.0], blank, blank
    )
    where.update_best(figures, RunConfig())
    assert [each.epoch for each in where.chosen] == [2, 3, 3]


def test_foils_are_scored_by_weights_that_their_image_did_not_choose(tiny_runs, scenes_folder):
    from clipvisionalign.data.foils import make_minimal_pairs
    from clipvisionalign.study.foils import HalfWeights, foil_accuracy
    from clipvisionalign.training.pair_weights import get_pair_weights, set_pair_weights

    part = read_captioned_images(scenes_folder).split("dev")
    pairs = make_minimal_pairs(part, 20)
    aligner = load_aligner(tiny_runs["late"])
    torch.manual_seed(0)
    torch.nn.init.normal_(aligner.late.token.weight, std=3.0)
    own = get_pair_weights(aligner)
    chosen = {"by": "halves", "weights": {"late": {"model": own.late, "halves": [0.0, 50.0]}}}
    halves = HalfWeights.of(part, chosen)
    outcomes_by_kind = foil_accuracy(aligner, pairs, halves)
    assert get_pair_weights(aligner) == own
    alone = []
    for weights in halves.weights:
        set_pair_weights(aligner, weights)
        alone.append(foil_accuracy(aligner, pairs))
    assert alone[0] != alone[1]
    for kind, outcomes in outcomes_by_kind.items():
        of_kind = [pair for pair in pairs if pair.kind == kind]
        expected = [alone[1 - halves.half[pair.image]][kind][index] for index, pair in enumerate(of_kind)]
        assert outcomes == expected


def test_figures_of_dev_by_which_nothing_was_chosen_are_told_so():
    """A run of one epoch, unless weights of its pairs' parts were chosen, or the epoch that it starts from."""

    def cell(name: str, epochs: int, **more: Any) -> Any:
        chosen = {"by": "halves", "epoch_by": "rsum", **more}
        return SimpleNamespace(variant=name, measurements={"chosen": chosen, "curves": {"step": list(range(epochs))}})

    assert "nothing was chosen on the dev split" in selection_note([cell("self", 1), cell("late", 1)], "dev")
    for several in (
        cell("late", 2),
        cell("late", 1, weights={}),
        cell("late", 1, with_init="it starts"),
        cell("late", 0),
    ):
        assert selection_note([several], "dev").startswith("cross-fitted")
        assert selection_note([cell("self", 1), several], "dev").endswith("of self nothing was chosen")
