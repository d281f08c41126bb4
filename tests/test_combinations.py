"""Settings in combination: every two values of any two settings stand together in at least one tiny run of one process,
and in one of two.

A row of the array is refused in words before its first step, on every process, or

- the run that is cut off at a random step and resumed ends as the undisturbed one, tensor by tensor, bit for bit: on
  two processes too, since a sum of two numbers has no order;
- every readable sample of the training split is in a step once an epoch, on one process or the other, and what is not
  readable is counted;
- it takes the steps that it planned;
- what is frozen is, bit for bit, what it came from;
- `load_aligner` gives the dev figures that the run recorded;
- two processes find the gradients of one.

`make test` runs some rows, drawn anew each day; `make test-all` runs all of them (COMBINATIONS=all).
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from combined import (
    AXES,
    BATCH,
    EPOCHS,
    REFUSED,
    TRAIN,
    Given,
    array,
    comparable_results,
    in_two,
    is_frozen,
    keeps_image_features,
    refused,
    resume_in,
    some_rows,
    watched_run,
)
from safetensors.torch import load_file
from tolerance import unit_roundoff

from clipvisionalign import read_captioned_images
from clipvisionalign.data.batches import steps_in_epoch
from clipvisionalign.data.formats import is_stream
from clipvisionalign.data.joined_captions import with_captions
from clipvisionalign.data.streams.in_memory import read_stream_split
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.retrieval import evaluate
from clipvisionalign.training.build import seed_everything
from clipvisionalign.training.config import RunConfig


def test_the_array_holds_every_pair_of_values_in_one_process_and_in_two():
    # What is refused whatever the other settings are, and no more.
    always = {("design", f"'{design}'", "freeze", "'all'") for design in ("self", "sparse", "late")}
    always |= {("freeze", f"'{what}'", "peft", "'lora'") for what in ("both", "all")}
    always |= {("design", "'sparse'", "init", "'late'"), ("init", "''", "freeze", "'all'")}
    always |= {("identity", "'caption'", "captions", "'joined'")}
    in_two = {("freeze", f"'{what}'", "tower", "'test_resnet'") for what in ("text", "none")}
    for processes, refusals in ((["one"], always), (["ddp", "fsdp2"], always | in_two)):
        axes = AXES | {"processes": processes}
        rows = [row for row in array() if row["processes"] in processes]
        runs = [row for row in rows if not refused(row)]
        absent = set()
        for a, b in combinations(axes, 2):
            pairs = {(repr(row[a]), repr(row[b])) for row in runs}
            absent |= {(a, x, b, y) for x in map(repr, axes[a]) for y in map(repr, axes[b]) if (x, y) not in pairs}
        assert absent == refusals
        # A row for each of them, and for what is refused of three values together.
        assert len(rows) - len(runs) == len(absent) + 2 * (processes == ["one"])
        assert len(runs) < 30
    assert {refused(row) for row in array()} == {"", *REFUSED}


def rows_to_run() -> list[tuple[int, dict[str, Any]]]:
    wanted = os.environ.get("COMBINATIONS", "3")
    # Two processes take twice as long.
    return list(enumerate(array())) if wanted == "all" else some_rows(int(wanted), int(wanted) // 3)


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_model) -> Given:
    return Given(tmp_path_factory.mktemp("combined"), tiny_model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "row"), rows_to_run(), ids=lambda value: str(value) if isinstance(value, int) else value["processes"]
)
def test_a_combination_loses_nothing_or_is_refused(number, row, given, tmp_path):
    config, processes = given.config(row, number, tmp_path / "whole"), 1 if row["processes"] == "one" else 2
    planned = EPOCHS * steps_in_epoch(TRAIN, BATCH, processes)
    # Cut off at a random step, to be gone on with.
    stopped = {"config": asdict(replace(config, out=str(tmp_path / "stopped")))}
    stopped["before"] = random.Random(number).randint(2, planned)
    if processes == 1:
        refusal, watched = watched_run(config)
        if not refusal:
            watched_run(replace(config, out=str(tmp_path / "stopped")), stopped["before"])
    elif refused(row):
        ((refusal, watched),) = in_two([{"config": asdict(config)}], tmp_path)
    else:
        first = {"config": asdict(first_step(config)), "gradients": str(tmp_path / "two")}
        *_, (refusal, watched) = in_two([first, stopped, {"config": asdict(config)}], tmp_path)
    if refusal or refused(row):
        assert refused(row), f"{row}: {refusal}"
        assert refused(row) in refusal
        assert not (tmp_path / "whole" / "metrics.jsonl").exists()
        return
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    dropped = row["truncated"] and not is_stream(config.data) and row["cache"] == "kept" and keeps_image_features(row)
    # Every sample in every epoch; one that cannot be read in none.
    readable = TRAIN - row["truncated"]
    assert len(watched.sample_counts) == readable, row
    assert set(watched.sample_counts.values()) == {EPOCHS}, row
    assert results["images_left_out"] == (EPOCHS if row["truncated"] else 0), row
    assert results["steps"] + results["steps_skipped"] == watched.calls
    assert watched.calls == (EPOCHS * steps_in_epoch(readable, BATCH, processes) if dropped else planned)
    assert not (tmp_path / "stopped" / "results.json").exists()
    resume_in(row, str(tmp_path / "stopped"), tmp_path)
    uninterrupted, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert [name for name in uninterrupted if not torch.equal(uninterrupted[name], again[name])] == [], row
    after = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert comparable_results(after) == comparable_results(results), row
    # Frozen is frozen.
    came_from = beginning(config)
    kept = [name for name in came_from if is_frozen(name, row) and name in uninterrupted]
    assert kept or row["freeze"] in ("text", "none")
    assert [name for name in kept if not torch.equal(came_from[name], uninterrupted[name])] == [], row
    # And the run folder is what its figures are of.
    dev = (
        read_stream_split(config.data, "dev")
        if is_stream(config.data)
        else read_captioned_images(config.data).split("dev")
    )
    dev = with_captions(dev.with_identity(config.identity), config.captions)
    evaluation = evaluate(
        load_aligner(tmp_path / "whole"), dev.images, dev.captions, dev.caption_image, dev.image_identity,
        5 if row["design"] == "cross" else 0, caption_group=dev.shared_text_ids,
    )  # fmt: skip
    recorded = results["chosen"]["model_in_sample"]["rsum"]["value"]
    assert evaluation.metrics.rsum.value == pytest.approx(recorded, abs=1e-9), row
    if processes == 2:
        alone = replace(first_step(config), out=str(tmp_path / "alone"), shard=False)
        assert_same_gradients(lambda file: watched_run(alone, gradients=file), tmp_path, row)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def beginning(config: RunConfig) -> dict[str, torch.Tensor]:
    """The weights that a run begins with."""
    if config.init:
        return load_file(Path(config.init) / "model.safetensors")
    seed_everything(config.seed)
    return Aligner(config.model).state_dict()


def first_step(config: RunConfig) -> RunConfig:
    """The same settings with nothing that differs between one process and two: all images in the first step, which of a
    stream are others otherwise, no dropout and no views, which each process draws for itself, nor a fusion, whose
    negatives are a process's own; in float32, since with the hardest negative a coarser rounding chooses another."""
    model, text = config.model, config.model.text_tower
    still = replace(
        model, dropout=0.0, text_tower=replace(text, dropout=0.0), fusion=replace(model.fusion, dropout=0.0)
    )
    return replace(
        config, out=f"{config.out}-first", model=still, batch=TRAIN, augment="none", precision="float32",
        fusion_weight=0.0,
    )  # fmt: skip


def assert_same_gradients(run_alone: Callable[[str], Any], folder: Path, row: dict[str, Any]) -> None:
    """Each of two ways to one gradient is off by at most sqrt(u) of its norm where all that differs is rounding, see
    `tolerance.py`, and so they are from one another by at most twice that."""
    run_alone(str(folder / "one"))
    one, two = (torch.load(folder / name, weights_only=True) for name in ("one", "two"))
    assert set(one) <= set(two)
    norm = torch.cat([gradient.flatten() for gradient in one.values()]).norm() if one else torch.zeros(())
    if row["freeze"] == "all" and row["loss"] != "sigmoid":
        # The fusion alone is trained, with negatives of a process's own: there is nothing to compare.
        assert float(norm) == 0
        return
    zero = torch.zeros(())
    worst = max(float((one.get(name, zero) - gradient).norm() / norm) for name, gradient in two.items())
    assert worst <= 2 * unit_roundoff(torch.float32) ** 0.5, row
