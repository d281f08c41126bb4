"""A run knows again what it was trained on, wherever it comes from; and its own data, however it was read."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipvisionalign import read_captioned_images
from clipvisionalign.cli import main
from clipvisionalign.data.captioned import CaptionedImage
from clipvisionalign.data.run_data import read_data_of_run
from clipvisionalign.data.streams.writing import write_shards
from clipvisionalign.data.training_images import TRAINED_ON_FILE, TrainedOnImages
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.train import train


def figures(capsys, *arguments: str, status: int | None = 0) -> dict:
    exit_status = main([*arguments, "--json"])
    assert status in (None, exit_status)
    return json.loads(capsys.readouterr().out)


def image(seed: int, kind: str = "PNG", **more) -> bytes:
    """Blobs of colour: an image like no other, that survives being saved again."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(out, kind, **more)
    return out.getvalue()


def rows(*images: bytes | Path) -> list[CaptionedImage]:
    return [CaptionedImage(f"g{number}", each, ("words",), "test") for number, each in enumerate(images)]


def test_images_are_known_again_by_their_bytes_and_nearly(tmp_path):
    (tmp_path / "a.png").write_bytes(image(1))
    (tmp_path / "cut.png").write_bytes(image(9)[:300])
    images = [("a", tmp_path / "a.png"), ("line\nend", image(2)), ("c", image(3)), ("cut", tmp_path / "cut.png")]
    images += [("gone", tmp_path / "gone.png"), ("no UTF-8 \udcff", image(4))]
    for _ in range(2):
        kept = TrainedOnImages.from_images(images, len(images))
        kept.save(tmp_path / TRAINED_ON_FILE)
        before = (tmp_path / TRAINED_ON_FILE).read_bytes()
    assert (tmp_path / TRAINED_ON_FILE).read_bytes() == before
    kept = TrainedOnImages.load(tmp_path / TRAINED_ON_FILE)
    # What cannot be decoded was not trained on.
    assert kept.names == ["a", "line\nend", "c", "no UTF-8 \udcff"]
    (tmp_path / "copy.png").write_bytes(image(2))
    gallery = rows(image(7), tmp_path / "copy.png", image(3, "JPEG", quality=85), image(4), image(1, "WEBP"), b"none")
    matches = [(match.image, match.trained_on, match.same) for match in kept.matches(gallery)]
    assert matches == [
        ("g1", "line\nend", True), ("g3", "no UTF-8 \udcff", True), ("g2", "c", False), ("g4", "a", False),
    ]  # fmt: skip
    assert not kept.matches(rows(image(7), image(8)))


def test_of_very_many_images_the_bytes_alone_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("clipvisionalign.data.training_images.MAX_PERCEPTUAL", 2)
    images = [(str(seed), image(seed)) for seed in range(3)]
    TrainedOnImages.from_images(images, 3).save(tmp_path / TRAINED_ON_FILE)
    kept = TrainedOnImages.load(tmp_path / TRAINED_ON_FILE)
    assert (len(kept.digests), kept.fingerprints) == (3, [])
    matches = kept.matches(rows(image(2), image(1, "JPEG", quality=85)))
    assert [(match.image, match.trained_on, match.same) for match in matches] == [("g0", "2", True)]
    TrainedOnImages.from_images([], 0).save(tmp_path / TRAINED_ON_FILE)
    assert TrainedOnImages.load(tmp_path / TRAINED_ON_FILE).matches(rows(image(1))) == []


@pytest.mark.slow
def test_a_gallery_of_another_data_set_with_training_images_is_told(tiny_runs, scenes_folder, tmp_path, capsys):
    run, data = str(tiny_runs["self"]), read_captioned_images(scenes_folder)
    # Another layout, other names, other captions; two images as they are, one saved again.
    own = data.split("train").rows[:3]
    for number in range(12):
        content = image(100 + number)
        if number < 2:
            content = own[number].image.read_bytes()
        elif number == 2:
            out = io.BytesIO()
            Image.open(own[number].image).convert("RGB").save(out, "PNG", optimize=True)
            content = out.getvalue()
        (tmp_path / f"photo-{number}.png").write_bytes(content)
    lines = ["file_name,caption,split", *(f"photo-{number}.png,words {number},test" for number in range(12))]
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    options = ["--data", str(tmp_path), "--split", "test"]
    output = figures(capsys, "evaluate", run, *options)
    same = [f"photo-{number}.png" for number in range(2)]
    assert output["trained_on"].startswith(
        "the run was trained on 2 of these 12 images and nearly the same as 1 others of them: "
    )
    trained_on = output["trained_on_images"]
    assert (trained_on["images"], trained_on["same"], trained_on["nearly"]) == (12, 2, 1)
    assert [match["image"] for match in trained_on["first"]] == [*same, "photo-2.png"]
    assert [match["trained_on"] for match in trained_on["first"]] == [row.name for row in own]
    assert main(["evaluate", run, *options]) == 0
    printed = capsys.readouterr().out
    assert f"photo-0.png is {own[0].name} of the training images" in printed
    assert f"photo-2.png is nearly {own[2].name} of the training images" in printed
    output = figures(capsys, "audit", run, *options, "--sample", "12", status=1)
    check = next(check for check in output["checks"] if check["name"] == "gallery not trained on")
    assert (check["passed"], check["figure"]) == (False, 3.0)
    assert output["trained_on_images"]["same"] == 2
    # Of its own dev split it has seen nothing.
    output = figures(capsys, "audit", run, "--sample", "12")
    assert next(check for check in output["checks"] if check["name"] == "gallery not trained on")["passed"]


@pytest.fixture(scope="module")
def settings(scenes_folder, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    return RunConfig(
        model=tiny_model(), epochs=1, batch=16, augment="none", steps=2, precision="float32", workers=0, trackers="",
        cache=str(folder / "cache"),
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_on_shards_is_evaluated_and_audited_as_its_own_line_says(tmp_path, scenes_folder, settings, capsys):
    write_shards(read_captioned_images(scenes_folder), tmp_path / "shards", per_shard=30)
    run = str(tmp_path / "run")
    train(replace(settings, data=str(tmp_path / "shards"), out=run), say=lambda line: None)
    output = figures(capsys, "audit", run, "--sample", "12", status=None)
    assert {"new captions", "gallery not trained on"} <= {check["name"].split(" (")[0] for check in output["checks"]}
    assert next(check for check in output["checks"] if check["name"] == "gallery not trained on")["passed"]
    dev = figures(capsys, "evaluate", run)
    own = json.loads((tmp_path / "run" / "results.json").read_text())
    assert dev["rsum"] == own["chosen"]["model_in_sample"]["rsum"]
    assert "in_sample" not in dev, "one epoch: nothing was chosen"
    assert "trained_on" not in dev
    trained = figures(capsys, "evaluate", run, "--split", "train")
    assert trained["trained_on"].startswith("the run was trained on these images")
    # The images that the shards were written from are known too, and the shards to a run on those.
    there = figures(capsys, "evaluate", run, "--split", "train", "--data", str(scenes_folder))
    assert there["trained_on_images"]["same"] == there["images"] == trained["images"]


def test_shards_by_a_pattern_and_a_dev_split_from_elsewhere(tmp_path, scenes_folder, settings, capsys, monkeypatch):
    write_shards(read_captioned_images(scenes_folder), tmp_path / "shards", per_shard=30)
    shutil.copytree(scenes_folder, tmp_path / "elsewhere")
    (tmp_path / "shards" / "dev-000000.tar").unlink()
    monkeypatch.chdir(tmp_path)
    config = replace(
        settings, data="shards/train-{000000..000001}.tar", dev_data="elsewhere", out="run", layout="stream"
    )
    train(config, say=lambda line: None)
    monkeypatch.chdir(scenes_folder)
    run = str(tmp_path / "run")
    dev = figures(capsys, "evaluate", run)
    assert (dev["images"], dev["data"]) == (15, str(tmp_path / "elsewhere"))
    assert figures(capsys, "evaluate", run, "--split", "train")["images"] == 60
    # As a run from before had it.
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    del about["dev_source"]
    (tmp_path / "run" / "data.json").write_text(json.dumps(about))
    (tmp_path / "run" / TRAINED_ON_FILE).unlink()
    assert figures(capsys, "evaluate", run)["rsum"] == dev["rsum"]
    assert "trained_on" in figures(capsys, "evaluate", run, "--split", "train")


def test_a_run_is_measured_by_the_layout_that_it_was_trained_in(tmp_path, scenes_folder):
    """A run from before, of a folder that was taken for shards, and is not any longer."""
    folder = shutil.copytree(scenes_folder, tmp_path / "data")
    write_shards(read_captioned_images(scenes_folder), tmp_path / "shards", per_shard=200)
    for number, path in enumerate(sorted((tmp_path / "shards").glob("train-*.tar"))):
        shutil.copy(path, folder / f"{number}.tar")
    shutil.copy(next((tmp_path / "shards").glob("dev-*.tar")), tmp_path / "dev.tar")
    assert read_captioned_images(folder).layout == "folder"
    (tmp_path / "run").mkdir()
    for layout in ("stream", "folder", "a layout of a later version"):
        (tmp_path / "run" / "data.json").write_text(json.dumps({"source": str(folder), "layout": layout}))
        dataset = read_data_of_run(tmp_path / "run", split="train")
        assert dataset.layout == (layout if layout == "stream" else "folder")
        assert len(dataset.split("train")) == 94
    assert read_data_of_run(tmp_path / "run", layout="folder").layout == "folder"
