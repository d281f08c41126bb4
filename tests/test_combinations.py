"""Settings in combination: every two values of any two settings stand together in at least one tiny run.

A row of the array is refused in words before its first step, or

- the run that is cut off at a random step and resumed ends as the undisturbed one, tensor by tensor;
- every readable sample of the training split is in a step once an epoch, and what is not readable is counted;
- it takes the steps that it planned;
- what is frozen is, bit for bit, what it came from;
- `load_aligner` gives the dev figures that the run recorded.

`make test` runs some rows, drawn anew each day; `make test-all` runs all of them (COMBINATIONS=all).
"""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipvisionalign import read_captioned_images
from clipvisionalign.data.batches import steps_in_epoch
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.scenes import write_scenes
from clipvisionalign.data.streams import is_stream, stream_split, write_shards
from clipvisionalign.models.aligner import load_aligner
from clipvisionalign.retrieval import evaluate
from clipvisionalign.training import train as training
from clipvisionalign.training.fine_tuning import LoraConfig
from clipvisionalign.training.losses import LossConfig
from clipvisionalign.training.train import RunConfig, resume, train

TRAIN, DEV, BATCH, EPOCHS = 22, 12, 8, 2

AXES: dict[str, list[Any]] = {
    "design": ["self", "sparse", "late", "cross"],
    "init": ["", "late"],
    "freeze": ["image", "text", "both", "none", "all"],
    "freeze_layers": [[], ["image_head.*"]],
    "peft": ["none", "lora"],
    "loss": ["softmax", "sigmoid", "hardest", "hard_weighted"],
    "chunk": [0, 3],
    "precision": ["float32", "bfloat16"],
    "ema": [0.0, 0.9],
    "workers": [0, 2],
    "data": ["table", "shards", "parquet", "saved"],
    "identity": ["auto", "caption", "none"],
    "truncated": [False, True],
    "cache": ["kept", "off"],
    "best_by": ["rsum", "loss"],
}

#: What may be refused, by a word of the refusal.
REFUSED = (
    "--freeze all trains the fusion alone",
    "--peft lora trains adapters in a tower, and --freeze",
    "--chunk with a picture tower that starts at random",
    "other towers than this run's",
)


def refused(row: dict[str, Any]) -> str:
    """By which of the above a row is refused; "" for one that is to run."""
    if row["freeze"] == "all" and row["design"] != "cross":
        return REFUSED[0]
    if row["peft"] == "lora" and row["freeze"] in ("all", "both"):
        return REFUSED[1]
    if row["chunk"] and row["freeze"] in ("text", "none"):
        return REFUSED[2]
    # A sliding text tower has other positions than the run's that it would start from.
    return REFUSED[3] if row["init"] and row["design"] == "sparse" else ""


Pair = tuple[tuple[str, int], tuple[str, int]]


def pairs_of(row: dict[str, int]) -> set[Pair]:
    return {((a, row[a]), (b, row[b])) for a, b in combinations(AXES, 2)}


def valued(row: dict[str, int]) -> dict[str, Any]:
    return {name: AXES[name][place] for name, place in row.items()}


@cache
def array() -> list[dict[str, Any]]:
    """Rows in which every pair of values stands that can be run: greedily, of some random rows that hold a missing pair
    the one that adds most. Then a row for each pair that cannot."""
    rng = random.Random(0)
    names = list(AXES)
    places = {name: range(len(AXES[name])) for name in names}
    missing = {((a, i), (b, j)) for a, b in combinations(names, 2) for i in places[a] for j in places[b]}
    rows, impossible = [], []
    while missing:
        first = rng.choice(sorted(missing))
        drawn = ({name: rng.choice(places[name]) for name in names} | dict(first) for _ in range(400))
        candidates = [row for row in drawn if not refused(valued(row))][:60]
        if not candidates:
            missing.discard(first)
            impossible.append(valued(dict.fromkeys(names, 0) | dict(first)))
            continue
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        rows.append(valued(best))
    return rows + impossible


def test_the_array_holds_every_pair_of_values():
    runs = [row for row in array() if not refused(row)]
    absent = set()
    for a, b in combinations(AXES, 2):
        found = {(repr(row[a]), repr(row[b])) for row in runs}
        absent |= {(a, x, b, y) for x in map(repr, AXES[a]) for y in map(repr, AXES[b]) if (x, y) not in found}
    # What is refused whatever the other settings are, and no more.
    designs = {("design", f"'{design}'", "freeze", "'all'") for design in ("self", "sparse", "late")}
    adapters = {("freeze", f"'{what}'", "peft", "'lora'") for what in ("both", "all")}
    chunks = {("freeze", f"'{what}'", "chunk", "3") for what in ("text", "none")}
    assert absent == designs | adapters | chunks | {("design", "'sparse'", "init", "'late'")}
    assert len(runs) < 50
    assert len(array()) - len(runs) == len(absent)


def rows_to_run() -> list[tuple[int, dict[str, Any]]]:
    rows = list(enumerate(array()))
    wanted = os.environ.get("COMBINATIONS", "3")
    if wanted == "all":
        return rows
    rows = [(number, row) for number, row in rows if not refused(row)]
    drawn = random.Random(os.environ.get("COMBINATIONS_SEED", str(datetime.date.today()))).sample(rows, int(wanted))
    return sorted(drawn, key=lambda row: row[0])


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[tuple[str, bool], str]:
    """The same drawn scenes in four forms, whole and with one training image cut short."""
    folder = tmp_path_factory.mktemp("combined")
    found = {}
    for truncated in (False, True):
        base = folder / f"scenes-{truncated}"
        write_scenes(base, TRAIN + DEV, seed=4, size=32, plain=True, splits={"train": TRAIN, "dev": DEV})
        data = read_captioned_images(base)
        if truncated:
            image = data.split("train").rows[7].image
            image.write_bytes(image.read_bytes()[:-60])
        found["table", truncated] = str(base)
        found["shards", truncated] = str(folder / f"shards-{truncated}")
        write_shards(data, found["shards", truncated], per_shard=5)
        tables = {split: rows_of(data.split(split)) for split in ("train", "dev")}
        found["parquet", truncated] = write_parquet(folder / f"parquet-{truncated}", tables)
        found["saved", truncated] = write_saved(folder / f"saved-{truncated}", tables)
    return found


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
    found = {
        splits[name]: datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        for name, rows in tables.items()
    }
    datasets.DatasetDict(found).save_to_disk(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory, sources, tiny_model) -> str:
    """A run of the late interaction, all of whose weights were trained."""
    out = str(tmp_path_factory.mktemp("base") / "late")
    model = replace(tiny_model("late"), image_tower=replace(tiny_model().image_tower, size=32))
    config = RunConfig(
        data=sources["table", False], out=out, model=model, epochs=1, batch=BATCH, freeze="none", augment="none",
        precision="float32", trackers="", workers=0, cache="off",
    )  # fmt: skip
    train(config, lambda line: None)
    return out


class CutOffError(Exception):
    """Stands for a kill."""


class Watched:
    """`take_step`, watched: which samples come, and a cut-off before a step."""

    def __init__(self, before: int = 0) -> None:
        self.before, self.calls, self.seen = before, 0, Counter()
        self.real = training.take_step

    def __call__(self, step, stream, config, knows, chunks):
        self.calls += 1
        if self.calls == self.before:
            raise CutOffError
        return self.real(step, self._watched(stream, 2 if chunks else 1), config, knows, chunks)

    def _watched(self, stream, times):
        while True:
            batch = next(stream)
            streamed = batch.caption_index is None
            for sample in batch.names if streamed else batch.image_index.tolist():
                self.seen[sample] += 1 / times
            yield batch


def run(config: RunConfig, before: int = 0) -> Watched:
    watched = Watched(before)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "take_step", watched)
        if before:
            with pytest.raises(CutOffError):
                train(config, lambda line: None)
        else:
            train(config, lambda line: None)
    return watched


def refusal_of(config: RunConfig) -> tuple[str, Watched]:
    """What the run was refused with, and what was seen of it else."""
    try:
        return "", run(config)
    except (ValueError, DataError) as error:
        return str(error), Watched()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "row"), rows_to_run(), ids=lambda value: str(value) if isinstance(value, int) else ""
)
def test_a_combination_loses_nothing_or_is_refused(number, row, sources, base, tiny_model, tmp_path):
    model = tiny_model(row["design"])
    model = replace(model, image_tower=replace(model.image_tower, size=32))
    config = RunConfig(
        data=sources[row["data"], row["truncated"]], out=str(tmp_path / "whole"), model=model, epochs=EPOCHS,
        batch=BATCH, init=base if row["init"] else "", freeze=row["freeze"], freeze_layers=row["freeze_layers"],
        peft=row["peft"], lora=LoraConfig(rank=2), loss=LossConfig(row["loss"], bias=-2.0), chunk=row["chunk"],
        precision=row["precision"], ema=row["ema"], workers=row["workers"], identity=row["identity"],
        cache=str(tmp_path / "cache") if row["cache"] == "kept" else "off", best_by=row["best_by"], augment="crop",
        views=2, trackers="", checkpoint_minutes=0.0, seed=number, patience=9,
    )  # fmt: skip
    refusal, watched = refusal_of(config)
    if refusal or refused(row):
        assert refused(row), f"{row}: {refusal}"
        assert refused(row) in refusal
        assert not (tmp_path / "whole" / "metrics.jsonl").exists()
        return
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    planned = EPOCHS * steps_in_epoch(TRAIN, BATCH)
    dropped = row["truncated"] and not is_stream(config.data) and row["cache"] == "kept" and frozen_tower(row)
    # Every sample in every epoch; one that cannot be read in none.
    readable = TRAIN - row["truncated"]
    assert len(watched.seen) == readable, row
    assert set(watched.seen.values()) == {EPOCHS}, row
    assert results["images_left_out"] == (EPOCHS if row["truncated"] and not dropped else 0), row
    assert results["steps"] + results["steps_skipped"] == watched.calls
    assert watched.calls == (EPOCHS * steps_in_epoch(readable, BATCH) if dropped else planned)
    # Cut off at a random step, and gone on with.
    stopped = replace(config, out=str(tmp_path / "stopped"))
    run(stopped, before=random.Random(number).randint(2, watched.calls))
    resume(stopped.out, lambda line: None)
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert [name for name in whole if not torch.equal(whole[name], again[name])] == [], row
    after = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert told(after) == told(results), row
    # Frozen is frozen.
    if row["init"]:
        came_from = load_file(Path(base) / "model.safetensors")
        kept = [name for name in came_from if is_frozen(name, row) and name in whole]
        assert kept or row["freeze"] in ("text", "none")
        assert [name for name in kept if not torch.equal(came_from[name], whole[name])] == [], row
    # And the run folder is what its figures are of.
    dev = (
        stream_split(config.data, "dev") if is_stream(config.data) else read_captioned_images(config.data).split("dev")
    )
    dev = dev.with_identity(config.identity)
    found = evaluate(
        load_aligner(tmp_path / "whole"), dev.images, dev.captions, dev.caption_image, dev.image_identity,
        5 if row["design"] == "cross" else 0, caption_group=dev.caption_group,
    )  # fmt: skip
    recorded = results["chosen"]["model_in_sample"]["rsum"]["value"]
    assert found.metrics.rsum.value == pytest.approx(recorded, abs=1e-9), row
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def told(results: dict[str, Any]) -> dict[str, Any]:
    """Of results.json, what has to be the same after a stop: all but times."""
    found = {name: results[name] for name in ("rsum", "steps", "steps_skipped", "images_left_out", "best_epoch")}
    own = {name: value for name, value in results["chosen"]["model_in_sample"].items() if name != "depths"}
    return {**found, "chosen": {**results["chosen"], "model_in_sample": own}}


def frozen_tower(row: dict[str, Any]) -> bool:
    return row["freeze"] in ("image", "both", "all")


def is_frozen(name: str, row: dict[str, Any]) -> bool:
    if name == "late.weight" or (name.startswith("text_tower.") and row["peft"] == "lora"):
        return False
    frozen = {"image": ("image_tower.",), "text": ("text_tower.",), "both": ("image_tower.", "text_tower."),
              "none": (), "all": ("",)}[row["freeze"]]  # fmt: skip
    return name.startswith(frozen) or (bool(row["freeze_layers"]) and name.startswith("image_head."))
