"""Tiny runs with settings in combination: an array in which every two values of any two settings stand together, and
how a row of it is run, by one process or by two, watched, cut off, or killed."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import several

from clipvisionalign import read_captioned_images
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.scene_dataset import write_scenes
from clipvisionalign.data.streams.writing import write_shards
from clipvisionalign.settings import config_from_dict
from clipvisionalign.training import run_folder, trainer
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.contrastive import LossConfig
from clipvisionalign.training.fine_tuning import LoraConfig
from clipvisionalign.training.sharding import full_tensor
from clipvisionalign.training.state import TrainState
from clipvisionalign.training.train import resume, train
from clipvisionalign.training.validation import DevGallery

TRAIN, DEV, BATCH, EPOCHS = 22, 12, 8, 2

AXES: dict[str, list[Any]] = {
    "design": ["self", "sparse", "late", "cross"],
    "init": ["", "late"],
    "freeze": ["image", "text", "both", "none", "all"],
    "freeze_layers": [[], ["text_tower.encoder.encoder.layer.0.*"]],
    "freeze_blocks": [0, 2],
    "peft": ["none", "lora"],
    "loss": ["softmax", "sigmoid", "hardest", "hard_weighted"],
    "chunk": [0, 3],
    "precision": ["float32", "bfloat16"],
    "ema": [0.0, 0.9],
    "workers": [0, 2],
    "data": ["table", "shards", "parquet", "saved"],
    "identity": ["auto", "caption", "none"],
    "captions": ["each", "joined"],
    "truncated": [False, True],
    "cache": ["kept", "off"],
    "best_by": ["rsum", "loss"],
    # One with batch norms, and one without.
    "tower": ["test_resnet", "test_vit"],
    # One process, two that replicate the model, two that shard it.
    "processes": ["one", "ddp", "fsdp2"],
}

#: What may be refused, by a word of the refusal.
REFUSED = (
    "--captions joined with --identity caption",
    "--freeze all trains the fusion alone",
    "--peft lora trains adapters in a tower, and --freeze",
    "other towers than this run's",
    "--freeze all would keep image_head, text_head, late as drawn at random",
    "batch norms, whose statistics 2 processes would each gather",
    "batch norms, whose statistics would be those of a chunk",
)


def refused(row: dict[str, Any]) -> str:
    """By which of the above a row is refused; "" for one that is to run."""
    if row["captions"] == "joined" and row["identity"] == "caption":
        return REFUSED[0]
    if row["freeze"] == "all" and row["design"] != "cross":
        return REFUSED[1]
    if row["peft"] == "lora" and row["freeze"] in ("all", "both"):
        return REFUSED[2]
    # A sliding text tower has other positions than the run's that it would start from.
    if row["init"] and row["design"] == "sparse":
        return REFUSED[3]
    if row["freeze"] == "all" and not row["init"]:
        return REFUSED[4]
    if row["freeze"] in ("text", "none") and row["tower"] == "test_resnet":
        return REFUSED[5] if row["processes"] != "one" else REFUSED[6] if row["chunk"] else ""
    return ""


Pair = tuple[tuple[str, int], tuple[str, int]]


def pairs_of(row: dict[str, int]) -> set[Pair]:
    return {((a, row[a]), (b, row[b])) for a, b in combinations(AXES, 2)}


def valued(row: dict[str, int]) -> dict[str, Any]:
    return {name: AXES[name][index] for name, index in row.items()}


@cache
def array() -> list[dict[str, Any]]:
    """Rows in which every pair of values stands that can be run, in one process and once more in two: greedily, of some
    random rows that hold a missing pair the one that adds most. Then a row for each pair that cannot."""
    rng = random.Random(0)
    names = list(AXES)
    rows, impossible = [], []
    for processes in ([0], [1, 2]):
        indices = {name: list(range(len(AXES[name]))) for name in names} | {"processes": processes}
        simplest = {name: some[0] for name, some in indices.items()}
        missing = {((a, i), (b, j)) for a, b in combinations(names, 2) for i in indices[a] for j in indices[b]}
        while missing:
            first = rng.choice(sorted(missing))
            drawn = ({name: rng.choice(indices[name]) for name in names} | dict(first) for _ in range(400))
            candidates = [row for row in drawn if not refused(valued(row))][:60]
            if candidates:
                best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
                missing -= pairs_of(best)
                rows.append(valued(best))
            else:
                missing.discard(first)
                impossible.append(valued(simplest | dict(first)))
    # These are of three values in one process.
    norms = {"freeze": "none", "tower": "test_resnet", "chunk": 3}
    alone = {"freeze": "all", "design": "cross", "init": ""}
    first = valued(dict.fromkeys(names, 0))
    return [*rows, *impossible, first | norms, first | alone]


def some_rows(count: int, of_two: int) -> list[tuple[int, dict[str, Any]]]:
    """So many rows that are to run, with their numbers, `of_two` of them with two processes; others each day."""
    rows = [(number, row) for number, row in enumerate(array()) if not refused(row)]
    rng = random.Random(os.environ.get("COMBINATIONS_SEED") or time.strftime("%Y-%m-%d"))
    alone, two = ([row for row in rows if (row[1]["processes"] == "one") == kind] for kind in (True, False))
    return sorted(rng.sample(alone, count - of_two) + rng.sample(two, of_two), key=lambda row: row[0])


# --- what a row trains on --------------------------------------------------------------------------------------------


def write_sources(folder: Path) -> dict[tuple[str, bool], str]:
    """The same drawn scenes in four forms, whole and with one training image cut short."""
    sources = {}
    for truncated in (False, True):
        base = folder / f"scenes-{truncated}"
        write_scenes(base, TRAIN + DEV, seed=4, size=32, plain=True, splits={"train": TRAIN, "dev": DEV})
        data = read_captioned_images(base)
        if truncated:
            image = data.split("train").rows[7].image
            image.write_bytes(image.read_bytes()[:-60])
        sources["table", truncated] = str(base)
        sources["shards", truncated] = str(folder / f"shards-{truncated}")
        write_shards(data, sources["shards", truncated], per_shard=5)
        tables = {split: rows_of(data.split(split)) for split in ("train", "dev")}
        sources["parquet", truncated] = write_parquet(folder / f"parquet-{truncated}", tables)
        sources["saved", truncated] = write_saved(folder / f"saved-{truncated}", tables)
    return sources


def rows_of(data) -> dict[str, list]:
    return {
        "image": [{"bytes": row.image.read_bytes(), "path": None} for row in data],
        "captions": [list(row.captions) for row in data],
    }


def write_parquet(folder: Path, tables: dict[str, dict[str, list]]) -> str:
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    table = pyarrow.table(tables["train"])
    for number, (start, count) in enumerate(((0, 9), (9, 4), (13, 9))):
        pyarrow.parquet.write_table(table.slice(start, count), folder / f"train-{number}.parquet")
    pyarrow.parquet.write_table(pyarrow.table(tables["dev"]), folder / "dev-0.parquet")
    return str(folder / "train-{0..2}.parquet")


def write_saved(folder: Path, tables: dict[str, dict[str, list]]) -> str:
    import datasets

    splits = {"train": "train", "dev": "validation"}
    split_datasets = {
        splits[name]: datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        for name, rows in tables.items()
    }
    datasets.DatasetDict(split_datasets).save_to_disk(str(folder))
    return str(folder)


class Given:
    """What rows are made from: the sources, a model of each design, and a finished run of each image tower."""

    def __init__(self, folder: Path, tiny_model: Any) -> None:
        self.folder, self.tiny_model = folder, tiny_model
        self.sources = write_sources(folder)

    def model(self, design: str, tower: str) -> Any:
        model = self.tiny_model(design)
        return replace(model, image_tower=replace(model.image_tower, name=tower, size=32))

    @cache  # noqa: B019
    def base(self, tower: str) -> str:
        """A run of the late interaction, all of whose weights were trained."""
        out = str(self.folder / f"base-{tower}")
        config = RunConfig(
            data=self.sources["table", False], out=out, model=self.model("late", tower), epochs=1, batch=BATCH,
            freeze="none", augment="none", precision="float32", trackers="", workers=0, cache="off",
        )  # fmt: skip
        train(config, lambda line: None)
        return out

    def config(self, row: dict[str, Any], number: int, out: Path) -> RunConfig:
        """The settings of a row."""
        return RunConfig(
            data=self.sources[row["data"], row["truncated"]], out=str(out), model=self.model(row["design"], row["tower"]),
            epochs=EPOCHS, batch=BATCH, init=self.base(row["tower"]) if row["init"] else "", freeze=row["freeze"],
            freeze_layers=row["freeze_layers"], freeze_blocks=row["freeze_blocks"], peft=row["peft"], lora=LoraConfig(rank=2),
            loss=LossConfig(row["loss"], bias=-2.0), chunk=row["chunk"], precision=row["precision"], ema=row["ema"],
            workers=row["workers"], identity=row["identity"], captions=row["captions"], best_by=row["best_by"],
            cache=str(out.parent / "cache") if row["cache"] == "kept" else "off", augment="crop", views=2, trackers="",
            checkpoint_minutes=0.0, seed=number, patience=9, device="cpu", shard=row["processes"] == "fsdp2",
        )  # fmt: skip


# --- a run, watched --------------------------------------------------------------------------------------------------


class CutOffError(Exception):
    """Stands for a kill."""


class Watched:
    """`forward_backward`, watched: which samples come, a cut-off before a step, the gradients of the first step."""

    def __init__(self, before: int = 0, gradients: str = "") -> None:
        self.before, self.calls, self.sample_counts, self.gradients = before, 0, Counter(), gradients
        self.real = trainer.forward_backward

    def __call__(self, step, stream, config, lookup, chunks):
        self.calls += 1
        if self.calls == self.before:
            raise CutOffError
        figures = self.real(step, self._watched(stream, 2 if chunks else 1), config, lookup, chunks)
        if self.gradients:
            named = step.towers.named_parameters()
            gradients = {name: full_tensor(p.grad).clone() for name, p in named if p.grad is not None}
            if step.distributed.is_main:
                torch.save(gradients, self.gradients)
            raise CutOffError
        return figures

    def _watched(self, stream, times):
        while True:
            batch = next(stream)
            # Of a stream truncation is counted as it passes.
            streamed = batch.truncation is not None
            for sample in batch.names if streamed else batch.image_index.tolist():
                self.sample_counts[str(sample)] += 1 / times
            yield batch


def watched_run(config: RunConfig, before: int = 0, gradients: str = "") -> tuple[str, Watched]:
    """Train with these settings; what the run was refused with, and what was seen of it.

    before: cut off before this step, from 1; gradients: the file that takes those of the first step, then cut off.
    """
    watched = Watched(before, gradients)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "forward_backward", watched)
        try:
            train(config, lambda line: None)
            assert not before
            assert not gradients
        except CutOffError:
            pass
        except (ValueError, DataError) as error:
            return str(error), watched
    return "", watched


def watched_runs(runs: list[dict[str, Any]], output_prefix: str) -> None:
    """Work of each of several processes: these runs one after the other, and what was seen of them into a file."""
    records = []
    for given in runs:
        config = config_from_dict(RunConfig, given["config"])
        refusal, watched = watched_run(config, given.get("before", 0), given.get("gradients", ""))
        records.append([refusal, watched.calls, dict(watched.sample_counts)])
    Path(f"{output_prefix}.{os.environ['RANK']}").write_text(json.dumps(records))
    leave()


def go_on(run: str) -> None:
    """Work of each of several processes: `resume`."""
    resume(run, lambda line: None)
    leave()


def leave() -> None:
    """Out of the process group, where there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def in_two(runs: list[dict[str, Any]], folder: Path) -> list[tuple[str, Watched]]:
    """Runs in two processes; of each, what `watched_run` tells, of both processes together."""
    several(2, watched_runs, runs, str(folder / "told"), out=folder / "said")
    first, second = (json.loads((folder / f"told.{rank}").read_text()) for rank in (0, 1))
    outcomes = []
    for (refusal, calls, counts), (other, other_calls, other_counts) in zip(first, second, strict=True):
        # Neither is left waiting for the other.
        assert (refusal, calls) == (other, other_calls)
        watched = Watched()
        watched.calls, watched.sample_counts = calls, Counter(counts)
        for sample, times in other_counts.items():
            watched.sample_counts[sample] += times
        outcomes.append((refusal, watched))
    return outcomes


def resume_in(row: dict[str, Any], run: str, folder: Path) -> None:
    """Go on with a row's run, in as many processes as it has."""
    if row["processes"] == "one":
        resume(run, lambda line: None)
    else:
        several(2, go_on, run, out=folder / "resumed")


def comparable_results(results: dict[str, Any]) -> dict[str, Any]:
    """Of results.json, what has to be the same after a stop: all but times."""
    summary = {name: results[name] for name in ("rsum", "steps", "steps_skipped", "images_left_out", "best_epoch")}
    own = {name: value for name, value in results["chosen"]["model_in_sample"].items() if name != "depths"}
    return {**summary, "chosen": {**results["chosen"], "model_in_sample": own}}


def keeps_image_features(row: dict[str, Any]) -> bool:
    """Whether outputs of the image tower, or of its first blocks, are kept on disk where that is not off."""
    return row["freeze"] in ("image", "both", "all") or row["freeze_blocks"] > 0


def is_frozen(name: str, row: dict[str, Any]) -> bool:
    if name == "late.weight" or (name.startswith("text_tower.") and row["peft"] == "lora"):
        return False
    if row["freeze"] == "all":
        return not name.startswith("fusion.")
    # Of a transformer: what comes before its blocks, and two of these.
    early = (
        "patch_embed|pos_embed|cls_token|reg_token|blocks.0.|blocks.1."
        if row["tower"] == "test_vit"
        else ("conv1|bn1|layer1|layer2")
    )
    if row["freeze_blocks"] and name.startswith(tuple(f"image_tower.backbone.{part}" for part in early.split("|"))):
        return True
    frozen = {"image": ("image_tower.",), "text": ("text_tower.",), "both": ("image_tower.", "text_tower."),
              "none": ()}[row["freeze"]]  # fmt: skip
    return name.startswith(frozen) or (
        bool(row["freeze_layers"]) and name.startswith("text_tower.encoder.encoder.layer.0.")
    )


# --- a run, killed ---------------------------------------------------------------------------------------------------


def killable(config: dict[str, Any], marks: str) -> None:
    """Work of a process that is killed: begin the run, or go on with it as far as it came, and write each phase that
    begins, with its time, into the file `marks`."""
    # Its loader's workers are killed with it.
    os.setpgrp()
    settings = config_from_dict(RunConfig, config)
    is_main = os.environ.get("RANK", "0") == "0"

    def mark(phase: str) -> None:
        if is_main:
            with Path(marks).open("a") as out:
                out.write(f"{time.monotonic()} {phase}\n")

    def marked(owner: Any, name: str, phase: str, then: str = "") -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **others: Any) -> Any:
            mark(phase)
            result = real(*arguments, **others)
            if then:
                mark(then)
            return result

        setattr(owner, name, call)

    marked(trainer, "forward_backward", "training")
    marked(TrainState, "save", "saving a checkpoint", "training")
    marked(DevGallery, "measure", "measuring an epoch", "training")
    marked(trainer, "save_models", "saving a model", "training")
    marked(trainer, "evaluate_run", "measuring the saved model")
    marked(run_folder, "remove_unfinished_files", "tidying up")
    mark("starting")
    if (Path(settings.out) / "config.yaml").is_file():
        resume(settings.out, lambda line: None)
    else:
        train(settings, lambda line: None)
    mark("ended")
    leave()
