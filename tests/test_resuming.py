"""A run is resumed as what it was begun as, or refused in words: settings, dealing, data; nothing is lost on the way."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_going_on
import yaml
from forked import Forked, wait_until
from test_going_on import CutOffError, assert_same, cut_off, silent, undisturbed

from clipvisionalign import files, read_captioned_images
from clipvisionalign.data.batches import CaptionedBatches, local_batch_size, step_bounds, steps_in_epoch
from clipvisionalign.data.captioned import DataError
from clipvisionalign.files import run_lock
from clipvisionalign.training import run_folder, trainer, trainer_setup
from clipvisionalign.training.best_epoch import BestEpoch
from clipvisionalign.training.checkpoint import load_last_checkpoint
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.resume import (
    CHANGEABLE_SETTINGS,
    check_same_partition,
    check_same_settings,
    checkpoint_settings,
)
from clipvisionalign.training.run_folder import BEGUN_FILE, LOCK_FILE
from clipvisionalign.training.train import resume, train

settings = test_going_on.settings


def edit(run: str | Path, name: str, value: object) -> None:
    path = Path(run) / "config.yaml"
    config = yaml.safe_load(path.read_text())
    *groups, last = name.split(".")
    section = config
    for group in groups:
        section = section[group]
    section[last] = value
    path.write_text(yaml.safe_dump(config, sort_keys=False))


#: What is frozen, and kept on disk with a cache.
FROZEN = {
    "the image tower": {"freeze": "image", "augment": "flip+crop", "views": 2},
    "its first blocks": {"freeze": "none", "freeze_blocks": 2, "augment": "flip+crop", "views": 2},
    "both towers": {"freeze": "both"},
}  # fmt: skip


def fail_in_second_call(real):
    """What ends as by a kill before its second call."""
    calls = iter([real])

    def call(*given):
        function = next(calls, None)
        if function is None:
            raise CutOffError
        return function(*given)

    return call


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_that_are_not_named_as_free_to_change_are_compared():
    config = RunConfig()
    names = set(checkpoint_settings(config))
    assert {"batch", "seed", "loss.name", "model.text_tower.name", "freeze_layers"} <= names
    assert not names & CHANGEABLE_SETTINGS
    for name, value in checkpoint_settings(config).items():
        other = {**checkpoint_settings(config), name: "another" if not isinstance(value, list) else ["another"]}
        with pytest.raises(ValueError, match=f"config.yaml: changed since the run was begun: {name} "):
            check_same_settings({"settings": other}, config, Path("run"))
    check_same_settings(
        {"settings": checkpoint_settings(config)}, replace(config, device="cuda", workers=7, epochs=9), Path("r")
    )


def test_what_may_change_is_what_there_is_and_what_the_docs_list():
    docs = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    documented = docs[docs.index("**What may be edited**") :].split("other change is refused")[0]
    for name in CHANGEABLE_SETTINGS - {"out", "profile", "overwrite"}:
        assert f"`{name.rpartition('.')[2]}`" in documented, name


@pytest.mark.parametrize(("name", "value"), [("batch", 12), ("seed", 5), ("loss.name", "hardest"), ("batch", None)])
def test_an_edited_run_is_refused_by_the_settings_name_or_resumed(settings, monkeypatch, name, value):
    config = settings(f"edited-{name}-{value}")
    cut_off(config, monkeypatch)
    if value is None:
        edit(config.out, "checkpoint_minutes", 60.0)
        edit(config.out, "workers", 1)
        assert resume(config.out, silent)["steps"] == 6
        return
    edit(config.out, name, value)
    with pytest.raises(ValueError, match=f"changed since the run was begun: {name} {value!r}, begun with "):
        resume(config.out, silent)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("kept", "elsewhere"), ("off", "kept")])
@pytest.mark.parametrize("frozen", FROZEN)
def test_another_cache_leaves_the_results_as_they_were(settings, tmp_path, monkeypatch, frozen, before, after):
    folders = {"kept": str(tmp_path / "cache"), "elsewhere": str(tmp_path / "other"), "off": "off"}
    config = settings("", **FROZEN[frozen], out=str(tmp_path / "run"), cache=folders[before])
    whole = replace(config, out=str(tmp_path / "whole"))
    undisturbed(whole)
    cut_off(config, monkeypatch)
    edit(config.out, "cache", folders[after])
    # Once more, as the checkpoints of a resumed run are resumed from too.
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "forward_backward", fail_in_second_call(trainer.forward_backward))
        with pytest.raises(CutOffError):
            resume(config.out, silent)
    resume(config.out, silent)
    assert_same(config.out, whole.out)


@pytest.mark.parametrize("frozen", FROZEN)
def test_a_run_with_kept_features_is_not_resumed_without_them_and_the_setting_is_named(
    settings, tmp_path, monkeypatch, frozen
):
    config = settings("", **FROZEN[frozen], out=str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    cut_off(config, monkeypatch)
    edit(config.out, "cache", "off")
    with pytest.raises(ValueError, match=r"run: cache 'off', begun with a cache: .* put back a folder or 'auto'"):
        resume(config.out, silent)
    # Where nothing is kept, nothing changes.
    free = settings("", freeze="none", out=str(tmp_path / "free"), cache=str(tmp_path / "cache"))
    cut_off(free, monkeypatch)
    edit(free.out, "cache", "off")
    assert resume(free.out, silent)["steps"] == 6


# --- how an epoch is dealt -------------------------------------------------------------------------------------------


def deal_of(images: int, batch: int, processes: int, workers: int) -> dict[str, int]:
    steps = steps_in_epoch(images, batch, processes)
    return {"processes": processes, "workers": workers, "in_epoch": steps}


def test_of_a_table_every_image_comes_once_or_the_resumed_run_is_refused():
    rng, taken = random.Random(0), Counter()
    for _ in range(2000):
        images, batch = rng.randint(8, 60), rng.randint(2, 16)
        before, after = (rng.randint(1, min(4, batch)) for _ in range(2))
        then, now = deal_of(images, batch, before, 2), deal_of(images, batch, after, rng.randint(0, 4))
        step = rng.randrange(then["in_epoch"])
        try:
            check_same_partition(then | {"place": {"step_in_epoch": step}}, now, False, Path("run"))
        except ValueError as error:
            message = str(error)
            taken["refused"] += f"{then['in_epoch']} steps on {before} processes" in message
            continue
        steps = [step_bounds(images, then["in_epoch"], number) for number in range(step)]
        steps += [step_bounds(images, now["in_epoch"], number) for number in range(step, now["in_epoch"])]
        assert [index for bounds in steps for index in range(*bounds)] == list(range(images))
        taken["resumed"] += 1
    assert min(taken["refused"], taken["resumed"]) > 30


@pytest.mark.parametrize(("processes", "workers"), [(1, 3), (3, 0), (2, 2)])
def test_of_a_stream_within_an_epoch_all_readers_are_as_before(processes, workers):
    then = deal_of(42, 8, 1, 0)
    within, at_the_end = ({"place": {"step_in_epoch": step}} | then for step in (2, 0))
    now = deal_of(42, 8, processes, workers)
    with pytest.raises(ValueError, match="1 processes with 0 workers each read"):
        check_same_partition(within, now, True, Path("run"))
    check_same_partition(at_the_end, now, True, Path("run"))
    check_same_partition(within, then, True, Path("run"))
    assert sum(local_batch_size(42, 6, step) for step in range(6)) == 42


@pytest.mark.slow
@pytest.mark.parametrize("other", [2, 5])
def test_epochs_that_are_dealt_in_other_steps_are_all_gone_through(settings, monkeypatch, other):
    """As on more, or fewer, processes from an epoch's end on."""
    config = settings(f"other-{other}", epochs=3)
    cut_off(config, monkeypatch, before=4)
    state = load_last_checkpoint(Path(config.out), print)
    assert (state["place"]["step"], state["place"]["step_in_epoch"], state["in_epoch"]) == (3, 0, 3)
    sample_counts, batch = Counter(), CaptionedBatches.__getitem__

    def counted(self, dealt):
        sample_counts.update(dealt[1])
        return batch(self, dealt)

    monkeypatch.setattr(CaptionedBatches, "steps_per_epoch", lambda self, batch_size, world_size=1: other)
    monkeypatch.setattr(CaptionedBatches, "__getitem__", counted)
    rates, schedule = [], trainer_setup.build_schedule
    monkeypatch.setattr(trainer_setup, "build_schedule", lambda *given: rates.append(given) or schedule(*given))
    assert resume(config.out, silent)["steps"] == 3 + 2 * other
    assert set(sample_counts.values()) == {2}
    assert len(sample_counts) == 48
    assert rates[-1][:2] == (3 + 2 * other, 3 + 2 * other)


# --- images that cannot be read, epochs that tell nothing ------------------------------------------------------------


@pytest.mark.parametrize("cache", ["kept", "off"])
def test_images_left_out_are_counted_and_named_whether_features_are_kept_or_not(
    settings, tmp_path, scenes_folder, cache
):
    data = shutil.copytree(scenes_folder, tmp_path / "scenes")
    rows = read_captioned_images(data).split("train").first_by_hash(48).rows
    rows[3].image.write_bytes(rows[3].image.read_bytes()[:500])
    more = {"cache": str(tmp_path / "cache") if cache == "kept" else "off"}
    config = settings("left-out", data=str(data), out=str(tmp_path / "run"), **more)
    results = train(config, silent)
    assert results["images_left_out"] == 2
    if cache == "kept":
        about = json.loads((tmp_path / "run" / "data.json").read_text())
        assert [line for line in about["left_out"] if rows[3].name in line]


def test_an_epoch_whose_score_is_no_number_is_worse_than_any_other():
    for scores, best in (([np.nan, -5.0, -6.0], 2), ([np.nan, np.nan, -9.0], 3), ([1.0, np.nan, 0.5], 1)):
        best_epoch = BestEpoch()
        for epoch, score in enumerate(scores, 1):
            best_epoch.update(epoch, score, 3)
        assert best_epoch.epoch == best
    best_epoch = BestEpoch()
    for epoch in range(1, 6):
        best_epoch.update(epoch, float("nan"), 3)
    assert best_epoch.stopped


def test_a_data_set_none_of_whose_images_can_be_read_is_refused_by_the_first_one(settings, tmp_path, scenes_folder):
    data = shutil.copytree(scenes_folder, tmp_path / "scenes")
    for row in read_captioned_images(data).split("train").rows:
        row.image.write_bytes(row.image.read_bytes()[:200])
    config = settings("none", data=str(data), out=str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"0 of 48 images can be read; the first: .*png"):
        train(config, silent)


# --- killed before the first step, or while something is written -----------------------------------------------------


@pytest.mark.parametrize(
    "what", ["open_data", "build_aligner", "load_frozen_image_features", "write_json", "MetricsLogger"]
)
def test_killed_before_the_first_step_it_is_resumed_as_it_was_begun(settings, tmp_path, monkeypatch, what):
    config = settings("early", out=str(tmp_path / "run"), epochs=1)
    cut_off(config, monkeypatch, what=what, before=1)
    monkeypatch.chdir(tmp_path)
    assert resume(config.out, silent)["steps"] == 3
    assert not {BEGUN_FILE, LOCK_FILE} & {path.name for path in Path(config.out).iterdir()}


def test_what_was_killed_before_its_first_step_is_no_run_that_is_there_already(settings, tmp_path, monkeypatch):
    config = settings("early", out=str(tmp_path / "run"), epochs=1)
    cut_off(config, monkeypatch, what="load_frozen_image_features", before=1)
    assert train(replace(config, batch=24), silent)["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("what", "before"), [("_clear_run_folder", 1), ("write_json", 1), ("write_json", 2)])
def test_a_run_that_replaces_another_is_the_one_that_is_resumed(settings, tmp_path, monkeypatch, what, before):
    config = settings("replaced", out=str(tmp_path / "run"), epochs=1)
    train(config, silent)
    (tmp_path / "run" / "audit.json").touch()
    cut_off(replace(config, batch=24, overwrite=True), monkeypatch, what=what, before=before)
    assert resume(config.out, silent)["steps"] == 2
    assert not (tmp_path / "run" / "audit.json").exists()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["batch"] == 24


def test_until_it_is_replaced_a_run_stays(settings, tmp_path, monkeypatch):
    config = settings("stays", out=str(tmp_path / "run"), epochs=1)
    steps = train(config, silent)["steps"]
    cut_off(replace(config, batch=24, overwrite=True), monkeypatch, what="load_frozen_image_features", before=1)
    assert resume(config.out, silent)["steps"] == steps


@pytest.mark.parametrize("what", ["tokenizer", "config"])
def test_a_model_that_is_written_again_is_there_whole_at_every_moment(tmp_path, tiny_model, monkeypatch, what):
    from clipvisionalign.models.aligner import Aligner
    from clipvisionalign.models.io import load_aligner

    aligner = Aligner(tiny_model("self"))
    aligner.save(tmp_path)
    files = {path: path.read_bytes() for path in (tmp_path / "text_tower").iterdir()}
    part = aligner.text_tower.tokenizer if what == "tokenizer" else aligner.text_tower.encoder.config

    def cut(folder: Path) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        for path in files:
            (folder / path.name).write_bytes(b"{")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(part), "save_pretrained", lambda self, folder: cut(Path(folder)))
    with pytest.raises(KeyboardInterrupt):
        aligner.save(tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "text_tower").iterdir()} == files
    assert load_aligner(tmp_path).encode_captions(["a red circle"]).shape == (1, 32)


# --- two at a time ---------------------------------------------------------------------------------------------------


def holds(path: str) -> int:
    with run_lock(Path(path), "trains this run"):
        Path(f"{path}.held").touch()
        time.sleep(600)
    return 0


@pytest.mark.slow
def test_a_run_is_trained_by_one_process_at_a_time(settings, tmp_path, monkeypatch):
    config = settings("held", out=str(tmp_path / "run"))
    cut_off(config, monkeypatch)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    lock = tmp_path / "run" / LOCK_FILE
    assert not lock.exists()
    process = Forked(holds, str(lock), out=tmp_path / "said")
    wait_until(Path(f"{lock}.held").exists, process)
    with pytest.raises(OSError, match=rf"process {process.process.pid} on \S+ trains this run"):
        resume(config.out, silent)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    process.kill()
    assert resume(config.out, silent)["steps"] == 6


def test_of_those_that_compute_the_same_features_all_have_them(settings, tmp_path, monkeypatch):
    from clipvisionalign.training import feature_cache

    config = settings("race", out=str(tmp_path / "run"), cache=str(tmp_path / "cache"), epochs=1)
    compute, inner = feature_cache._compute, []

    def raced(folder, *more):
        compute(folder, *more)
        if not inner:
            # The other one is done first; its folder is not this process's by its name.
            inner.append(folder)
            monkeypatch.setattr(os, "getpid", lambda: 1)
            target = folder.with_name(folder.name.split(".")[0])
            target.mkdir()
            for file in folder.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            inode.append((target / "about.json").stat().st_ino)

    inode: list[int] = []
    monkeypatch.setattr(feature_cache, "_compute", raced)
    assert train(config, silent)["steps"] == 3
    kept = inner[0].with_name(inner[0].name.split(".")[0])
    assert (kept / "about.json").stat().st_ino == inode[0]
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_what_killed_processes_left_is_removed_once_it_is_nobodys(tmp_path):
    gone = Forked(abs, 0, out=tmp_path / "said")
    assert gone.wait() == 0
    dead, old = gone.process.pid, time.time() - 2 * files.ABANDONED_SECONDS
    for name, age in (
        (f"a.{dead}.part", old),
        (f"b.{os.getpid()}.part", old),
        (f"c.{dead}.part", None),
        ("d.part", old),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pooled.npy").touch()
        for path in (tmp_path / name / "pooled.npy", tmp_path / name):
            if age:
                os.utime(path, (age, age))
    files.remove_abandoned(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.part")) == sorted(
        [f"b.{os.getpid()}.part", f"c.{dead}.part", "d.part"]
    )


# --- no room, numbers out of range -----------------------------------------------------------------------------------


def test_what_is_kept_on_disk_has_its_room_before_it_is_written(tmp_path):
    from clipvisionalign.training.feature_cache import allocate_array

    array = allocate_array(tmp_path / "a.npy", np.float16, (1000, 100))
    about = (tmp_path / "a.npy").stat()
    assert about.st_blocks * 512 >= about.st_size >= 200_000
    assert not array.any()
    array[3] = 1
    array.flush()
    assert np.load(tmp_path / "a.npy")[3].all()


@pytest.mark.parametrize("freeze", ["image", "both"])
def test_a_disk_that_fills_meanwhile_is_no_end_of_a_run(settings, tmp_path, monkeypatch, freeze):

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    said: list[str] = []
    more = {"cache": str(tmp_path / "cache"), "epochs": 1, "freeze": freeze}
    assert train(settings("full", out=str(tmp_path / "run"), **more), said.append)["steps"] == 3
    assert [line for line in said if "no room for" in line]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_lr", -1.0), ("image_lr", float("nan")), ("head_lr", 1e6), ("weight_decay", -1.0), ("layer_decay", -1.0),
        ("layer_decay", 0.0), ("loss.smoothing", 2.0), ("loss.beta", -1.0), ("loss.margin", float("inf")),
        ("loss.bias", float("nan")), ("fusion_weight", -1.0), ("workers", -1), ("seed", -1), ("ema", float("nan")),
        ("model.dropout", 1.0), ("model.temperature", 0.0), ("lora.rank", 0), ("checkpoint_minutes", float("nan")),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_before_anything_is_written(settings, tmp_path, name, value):
    config = settings("ranges", out=str(tmp_path / "run"))
    *groups, last = name.split(".")
    section = config
    for group in groups:
        section = getattr(section, group)
    setattr(section, last, value)
    with pytest.raises(ValueError, match=rf"^--{name} should be .*, not {value}$"):
        train(config, silent)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cache", ["kept", "off"])
def test_a_profile_of_images_none_of_which_can_be_read_says_so(settings, tmp_path, scenes_folder, cache):
    data = shutil.copytree(scenes_folder, tmp_path / "scenes")
    for row in read_captioned_images(data).split("train").rows:
        row.image.write_bytes(row.image.read_bytes()[:200])
    kept = str(tmp_path / "cache") if cache == "kept" else "off"
    config = settings("profile", data=str(data), out=str(tmp_path / "run"), cache=kept, profile=3)
    with pytest.raises(DataError, match=r"none of 3 steps could be taken|0 of 48 images can be read"):
        train(config, silent)


def test_a_model_of_a_half_that_was_not_kept_is_told_where_the_figures_are(settings, tmp_path, monkeypatch):
    from clipvisionalign.training.validation import DevMetrics

    scores = iter([[3.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
    monkeypatch.setattr(DevMetrics, "scores", lambda self, best_by: next(scores))

    def keep(out, save, epoch, before, best) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "save_chosen_models", keep)
    chosen = train(settings("halves", out=str(tmp_path / "run")), silent)["chosen"]
    assert chosen["in_sample_epoch"]["of_halves"] == [0, 1]
    assert "but the epoch of half 0 and 1 is all of dev's" in chosen["figures"]
    assert "in-sample as far as that goes" in chosen["figures"]


def test_features_are_kept_where_this_system_keeps_caches(monkeypatch, tmp_path):
    from clipvisionalign.training import feature_cache

    monkeypatch.delenv("CLIPVISIONALIGN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert feature_cache.cache_folder() == tmp_path / "clipvisionalign"
    monkeypatch.setenv("CLIPVISIONALIGN_CACHE", str(tmp_path / "own"))
    assert feature_cache.cache_folder() == tmp_path / "own"
    assert feature_cache.cache_folder("given") == Path("given")
