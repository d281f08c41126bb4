"""What is interrupted goes on as if nothing had happened, whatever else is asked for: settings in pairs.

Each run is done twice, undisturbed and cut off, on the same data; tensors, steps and figures have to be the same.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipvisionalign import read_captioned_images
from clipvisionalign.data.captioned import DataError
from clipvisionalign.training import frozen_features, run_folder, trainer, trainer_setup
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.fine_tuning import LoraConfig
from clipvisionalign.training.train import resume, train
from clipvisionalign.training.validation import DevGallery


class CutOffError(Exception):
    """Stands for a kill: nothing after it is done."""


def silent(line: str) -> None:
    """Says nothing."""


def cut_off(config: RunConfig, monkeypatch, what: str = "forward_backward", before: int = 4, owner=None) -> None:
    """A run that ends as by a kill before the call number `before` of something."""
    if owner is None:
        owner = next(each for each in (run_folder, trainer, trainer_setup) if hasattr(each, what))
    real, calls = getattr(owner, what), 0

    def counted(*arguments, **more):
        nonlocal calls
        calls += 1
        if calls == before:
            raise CutOffError
        return real(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(owner, what, counted)
        with pytest.raises(CutOffError):
            train(config, silent)


def undisturbed(config: RunConfig) -> None:
    """A run that goes through, without the checkpoint of each step that the one beside it resumes from."""
    train(replace(config, checkpoint_minutes=10.0), silent)


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "model.safetensors")


def results(run: str | Path) -> dict:
    recorded = json.loads((Path(run) / "results.json").read_text())
    return {name: recorded[name] for name in ("rsum", "steps", "steps_skipped", "images_left_out", "best_epoch")}


def assert_same(run: str | Path, other: str | Path) -> None:
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]
    assert results(run) == results(other)


@pytest.fixture(scope="module")
def settings(tiny_settings):
    """Settings of a tiny run into a folder of this module's."""
    return tiny_settings("self", epochs=2, train_images=48)


@pytest.fixture(scope="module")
def late(settings) -> RunConfig:
    """A finished run of the late interaction, all of whose weights were trained: no published ones are left in it."""
    config = settings("late", "late", freeze="none", epochs=1)
    undisturbed(config)
    return config


COMBINED = {
    "the fusion alone": {"design": "cross", "freeze": "all"},
    "a frozen image tower": {"design": "late", "freeze": "image"},
    "a frozen text tower": {"design": "late", "freeze": "text"},
    "both frozen": {"design": "cross", "freeze": "both"},
    "frozen layers": {"design": "late", "freeze": "none", "freeze_layers": ["text_tower.*", "image_head.*"]},
    "adapters": {"design": "late", "freeze": "image", "peft": "lora", "lora": LoraConfig(rank=2)},
    "chunks": {"design": "late", "freeze": "image", "chunk": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINED)
def test_what_started_from_another_run_and_was_cut_off_keeps_its_frozen_weights(name, settings, late, monkeypatch):
    more = COMBINED[name] | {"init": late.out, "epochs": 1, "batch": 8}
    config = settings(f"whole {name}", **more)
    undisturbed(config)
    stopped = replace(config, out=f"{config.out} stopped")
    cut_off(stopped, monkeypatch)
    resume(stopped.out, silent)
    assert_same(stopped.out, config.out)
    # What was frozen is what it came from, bit for bit.
    before, after = weights(late.out), weights(stopped.out)
    prefixes = {"all": tuple(before), "image": ("image_tower.",), "text": ("text_tower.",),
                "both": ("image_tower.", "text_tower."), "none": ("text_tower.", "image_head.")}[config.freeze]  # fmt: skip
    frozen = [own for own in before if own.startswith(prefixes) and own != "late.weight"]
    assert len(frozen) > 5
    assert not [own for own in frozen if not torch.equal(before[own], after[own])]


@pytest.mark.slow
def test_cut_off_at_the_end_of_an_epoch_the_averaged_batch_norms_are_those_that_were_learned(settings, monkeypatch):
    config = settings("batch norms", freeze="none")
    undisturbed(config)
    stopped = replace(config, out=f"{config.out} stopped")
    # After the last step of the first epoch, before its dev figures.
    cut_off(stopped, monkeypatch, "measure", 1, DevGallery)
    resume(stopped.out, silent)
    assert_same(stopped.out, config.out)
    means = [tensor for name, tensor in weights(stopped.out).items() if name.endswith("running_mean")]
    assert means
    assert any(bool(mean.abs().max() > 0) for mean in means)


@pytest.fixture
def own_scenes(tmp_path, scenes_folder) -> Path:
    """A copy of the drawn scenes that a test may damage."""
    return Path(shutil.copytree(scenes_folder, tmp_path / "scenes"))


def training_images(folder: Path) -> list[Path]:
    return [row.image for row in read_captioned_images(folder).split("train").first_by_hash(48).rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{"freeze": "image"}, {"freeze": "image", "cache": "off"}, {"chunk": 5, "cache": "off"}]
)
def test_a_truncated_image_is_left_out_before_and_after_a_stop(own_scenes, settings, tmp_path, monkeypatch, more):
    image = training_images(own_scenes)[5]
    image.write_bytes(image.read_bytes()[:-200])
    config = settings("", data=str(own_scenes), out=str(tmp_path / "whole"), **more)
    undisturbed(config)
    stopped = replace(config, out=str(tmp_path / "stopped"))
    cut_off(stopped, monkeypatch)
    resume(stopped.out, silent)
    assert_same(stopped.out, config.out)
    # It is missed in every epoch, decoded anew or kept as features.
    assert results(config.out)["images_left_out"] == 2
    assert results(config.out)["steps"] == 6


def test_an_image_of_equal_size_is_another_image(own_scenes, settings, tmp_path, monkeypatch):
    config = settings("", data=str(own_scenes), out=str(tmp_path / "run"))
    cut_off(config, monkeypatch)
    first = training_images(own_scenes)[0]
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 255
    about = first.stat()
    first.write_bytes(content)
    os.utime(first, ns=(about.st_atime_ns, about.st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"not the train data that .* was begun with: images differ"):
        resume(config.out, silent)


@pytest.mark.slow
def test_a_run_is_resumed_in_the_layout_that_its_data_was_read_in(own_scenes, settings, tmp_path, monkeypatch):
    """Another layout's file that came to lie beside the data since changes nothing of an unfinished run."""
    whole, stopped = (settings("", data=str(own_scenes), out=str(tmp_path / name)) for name in ("whole", "stopped"))
    train(whole, silent)
    cut_off(stopped, monkeypatch)
    rows = read_captioned_images(own_scenes)
    listed = [{"filename": row.name, "split": row.split, "sentences": ["another"]} for row in rows]
    (own_scenes / "dataset.json").write_text(json.dumps({"images": listed}))
    assert read_captioned_images(own_scenes).layout != rows.layout
    resume(stopped.out, silent)
    assert_same(stopped.out, whole.out)
    # So is a finished one compared with its data.
    resume(whole.out, silent)


@pytest.mark.slow
def test_a_run_goes_on_from_another_directory(own_scenes, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings("", data="scenes", out="whole", cache="cache")
    undisturbed(config)
    stopped = replace(config, out="stopped")
    cut_off(stopped, monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume(tmp_path / "stopped", silent)
    monkeypatch.chdir(tmp_path)
    assert_same("stopped", "whole")
    assert not (tmp_path / "elsewhere" / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("begun_with_room", [True, False])
def test_what_a_run_keeps_on_disk_is_decided_once(settings, tmp_path, monkeypatch, begun_with_room):
    """Features have views of their own: a run that began with them goes on with them, and one without them without."""
    more = {"augment": "flip+crop", "views": 2, "cache": str(tmp_path / "cache"), "out": str(tmp_path / "whole")}
    config = settings("", freeze="both", **more)

    def room(there: bool):
        monkeypatch.setattr(frozen_features, "has_free_space", lambda *_: there)

    room(begun_with_room)
    undisturbed(config)
    stopped = replace(config, out=str(tmp_path / "stopped"))
    cut_off(stopped, monkeypatch)
    room(not begun_with_room)
    resume(stopped.out, silent)
    assert_same(stopped.out, config.out)
    if begun_with_room:
        again = replace(config, out=str(tmp_path / "again"))
        room(True)
        cut_off(again, monkeypatch)
        room(False)
        for kind, what in (("captions", "caption"), ("features", "image")):
            shutil.rmtree(tmp_path / "cache" / kind)
            message = rf"no room for .* MiB of {what} features, which this run was begun with: make room there"
            with pytest.raises(OSError, match=message):
                resume(again.out, silent)


def test_a_checkpoint_of_an_earlier_version_is_refused_in_words(settings, tmp_path, monkeypatch):
    config = settings("", out=str(tmp_path / "run"))
    cut_off(config, monkeypatch)
    path = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
    state = torch.load(path, weights_only=True)
    del state["opened"]
    torch.save(state, path)
    with pytest.raises(DataError, match="of an earlier version, with another order of images: train again"):
        resume(config.out, silent)


def test_a_run_none_of_whose_checkpoints_reads_back_is_left_as_it_is(settings, tmp_path, monkeypatch):
    config = settings("", out=str(tmp_path / "run"))
    cut_off(config, monkeypatch, before=5)
    checkpoints = list((tmp_path / "run" / "checkpoints").iterdir())
    kept = {path: path.read_bytes() for path in checkpoints}
    for path in checkpoints:
        path.write_bytes(b"")
    with pytest.raises(OSError, match="none of its checkpoints reads back"):
        resume(config.out, silent)
    assert (tmp_path / "run" / "model.safetensors").is_file()
    # Where they come back, so does the run; records that a pulled plug took are not made of zeros.
    for path, content in kept.items():
        path.write_bytes(content)
    records = tmp_path / "run" / "metrics.jsonl"
    records.write_text(records.read_text().splitlines(keepends=True)[0])
    resume(config.out, silent)
    assert all(json.loads(line)["step"] for line in records.read_text().splitlines())


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "batch", "chunk", "steps"), [(48, 128, 32, 1), (48, 4096, 5, 1), (33, 32, 0, 2), (3, 2, 1, 1)]
)
def test_a_run_takes_the_steps_that_it_planned(settings, tmp_path, images, batch, chunk, steps):
    config = settings("", out=str(tmp_path / "run"), train_images=images, batch=batch, chunk=chunk)
    undisturbed(config)
    recorded = results(config.out)
    assert (recorded["steps"], recorded["steps_skipped"], recorded["images_left_out"]) == (2 * steps, 0, 0)


@pytest.mark.parametrize(("asked", "more", "steps"), [(2, {}, 2), (50, {}, 6), (50, {"steps": 4}, 4)])
def test_a_profile_ends_where_the_training_would(settings, tmp_path, asked, more, steps):
    outcome = train(settings("", out=str(tmp_path / "profile"), profile=asked, **more), silent)
    assert outcome["steps"] == steps
    assert not (tmp_path / "profile").exists()


@pytest.mark.slow
def test_steps_and_chunks_of_unreadable_images_are_counted_and_the_schedule_ends(
    own_scenes, settings, tmp_path, monkeypatch
):
    for image in training_images(own_scenes)[:48:2]:
        image.write_bytes(image.read_bytes()[:-200])
    more = {"data": str(own_scenes), "cache": "off", "batch": 4, "seed": 3, "epochs": 1}
    for name, chunk in (("whole", 0), ("chunks", 1)):
        said = []
        config = settings("", out=str(tmp_path / name), **more, chunk=chunk)
        train(replace(config, checkpoint_minutes=10.0), said.append)
        recorded = results(config.out)
        assert recorded["steps"] + recorded["steps_skipped"] == 12
        assert recorded["steps_skipped"] > 0
        # Each unreadable image, and the readable ones that had no other beside them.
        assert recorded["images_left_out"] >= 24
        assert any(line.endswith("none: too few of its images could be read") for line in said)
        stopped = replace(config, out=f"{config.out} stopped")
        cut_off(stopped, monkeypatch, before=9)
        resume(stopped.out, silent)
        assert_same(stopped.out, config.out)
    for image in training_images(own_scenes):
        image.write_bytes(image.read_bytes()[:500])
    with pytest.raises(DataError, match="11 of 11 steps were none"):
        train(settings("", out=str(tmp_path / "none"), **more), silent)


def test_a_temperature_at_its_limit_comes_back():
    from clipvisionalign.models.late_interaction import MAX_LOG_SCALE, LateConfig, LateInteraction

    late = LateInteraction(LateConfig(width=4), 4, 4)
    with torch.no_grad():
        late.log_scale.fill_(9.0)

    class Model:
        """As far as the limit is concerned."""

        from clipvisionalign.models.aligner import Aligner

        clamp_temperatures = Aligner.clamp_temperatures
        log_scale = torch.nn.Parameter(torch.tensor([4.9]))
        max_log_scale = None

    model = Model()
    model.late = late
    optimizer = torch.optim.SGD([model.log_scale, late.log_scale], lr=1e-3)
    for direction in (-1.0, 1.0):
        for _ in range(3):
            optimizer.zero_grad()
            (direction * (model.log_scale.exp().clamp(max=100.0).sum() + late.scale())).backward()
            optimizer.step()
            model.clamp_temperatures()
        log_scales = [model.log_scale.item(), late.log_scale.item()]
        assert all(value == pytest.approx(MAX_LOG_SCALE) for value in log_scales) == (direction < 0)
        assert max(log_scales) <= MAX_LOG_SCALE + 1e-6
    assert float(late.scale()) < 99
