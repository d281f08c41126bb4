"""Commands that take a run read its data as it was read in training, and say what is otherwise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.hashes import dataset_hashes
from clipvisionalign.data.run_data import differences_from_run, read_data_of_run
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.settings import config_from_dict
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.data_checks import check_data_unchanged

IMAGES = 150


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "run"
    Aligner(tiny_model("self")).save(folder)
    return folder


@pytest.fixture
def run(model, tmp_path):
    """A run on images with a text beside each, beside which a JSON of Karpathy's splits has come to lie."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(data / f"{number:03}.png")
        (data / f"{number:03}.txt").write_text(f"image number {number}\n")
    about = record(data)
    entries = [
        {
            "filename": f"{number:03}.png",
            "split": "train" if number < 7 else "val",
            "sentences": [{"raw": f"n {number}"}],
        }
        for number in range(IMAGES)
    ]
    (data / "dataset_x.json").write_text(json.dumps({"images": entries}))
    assert read_captioned_images(data).layout == "karpathy"
    folder = Path(shutil.copytree(model, tmp_path / "run"))
    (folder / "data.json").write_text(json.dumps(about))
    return folder


def record(data: Path, **more):
    """What data.json holds of a run on a data set."""
    dataset = read_captioned_images(data)
    as_read = {split: dataset_hashes(dataset.split(split), split == "dev") for split in ("train", "dev")}
    read = {
        "source": str(data),
        "layout": dataset.layout,
        "split_rule": dataset.split_rule,
        "identity": "auto",
        "group": "",
    }
    return {**read, "as_read": as_read, "dev": {"images": len(dataset.split("dev"))}, **more}


@pytest.mark.slow
def test_every_command_reads_a_run_s_data_as_the_run_did(run, tmp_path, capsys, monkeypatch):
    count = json.loads((run / "data.json").read_text())["dev"]["images"]
    data = read_data_of_run(run, split="dev")
    assert (data.layout, len(data.split("dev"))) == ("texts", count)
    assert not differences_from_run(run, data, "dev")
    for command, *options in (["evaluate"], ["audit"], ["encode", "--out", str(tmp_path / "vectors.npy")]):
        assert main([command, str(run), *options, "--json"]) in (0, 1)
        captured = capsys.readouterr()
        assert captured.out, captured.err
        output = json.loads(captured.out)
        assert "differs_from_run" not in output
        if command != "audit":
            assert output["images"] == count
        assert main(
            [command, str(run), *options, "--layout", "karpathy", "--json", *["--overwrite"][: len(options)]]
        ) in (
            0,
            1,
        )
        captured = capsys.readouterr()
        difference = json.loads(captured.out)["differs_from_run"]
        assert "is read as 'karpathy'; the run was trained on it as 'texts'" in difference
        assert "dev has other captions, partners, images" in difference
        assert "note: " in captured.err
    main(["check", str(tmp_path / "data"), "--tokens", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["splits"]["dev"] == count


def test_8_bits_are_measured_on_the_dev_split_that_the_run_had(run, monkeypatch, tmp_path):
    from clipvisionalign.export import quantization

    measured = []
    monkeypatch.setattr(quantization, "OnnxAligner", lambda folder, int8: None)
    monkeypatch.setattr(quantization, "_evaluate_export", lambda model, dev: measured.append(dev) or 1 / 0)
    names = {row.name for row in read_data_of_run(run, split="dev").split("dev")}
    elsewhere = Path(shutil.copytree(tmp_path / "data", tmp_path / "elsewhere"))
    (elsewhere / "dataset_x.json").unlink()
    about = json.loads((run / "data.json").read_text())
    for data, dev_source in (("", ""), (tmp_path / "data", ""), ("", str(elsewhere))):
        (run / "data.json").write_text(json.dumps(about | {"dev_source": dev_source}))
        with pytest.raises(ZeroDivisionError):
            quantization.int8_loss(tmp_path, run, data)
        assert measured[-1].source == (Path(dev_source) if dev_source else tmp_path / "data")
        assert {row.name for row in measured[-1]} == names
    (run / "data.json").write_text(json.dumps(about | {"source": str(tmp_path / "gone")}))
    assert "no such file or folder" in quantization.int8_loss(tmp_path, run, "")["not measured"]


def test_an_index_has_the_splits_that_the_run_had(run, tmp_path, monkeypatch):
    lance = pytest.importorskip("lancedb", reason="no LanceDB: pip install 'clipvisionalign[search]'")
    from clipvisionalign.search.indexer import build_index

    build_index(run, tmp_path / "data", tmp_path / "index", captions=True)
    rows = lance.connect(tmp_path / "index").open_table("pictures").to_arrow().to_pylist()
    dev = {Path(row["path"]).name for row in rows if row["split"] == "dev"}
    assert dev == {Path(row.image).name for row in read_data_of_run(run, split="dev").split("dev")}


def test_a_copy_elsewhere_is_read_as_the_run_s_own_and_what_differs_is_said(run, tmp_path):
    copy = Path(shutil.copytree(tmp_path / "data", tmp_path / "copy"))
    run_data = read_data_of_run(run, copy, split="dev")
    assert run_data.layout == "texts"
    assert [row.name for row in run_data] == [row.name for row in read_data_of_run(run)]
    assert differences_from_run(run, run_data, "dev") == [
        f"{copy} is read as 'texts', as the run's data was; by itself it is taken for 'karpathy'"
    ]
    (copy / "dataset_x.json").unlink()
    assert not differences_from_run(run, run_data, "dev")
    difference = differences_from_run(run, run_data.with_identity("none"), "dev")
    assert difference == ["captions belong to images by 'none'; in the run's training by 'auto'"]
    name = run_data.split("dev").rows[0].name
    for data in (copy, tmp_path / "data"):
        (data / name).with_suffix(".txt").write_text("another caption\n")
    (difference,) = differences_from_run(run, read_data_of_run(run, copy, split="dev"), "dev")
    assert difference == f"{copy} is not the run's own data set, {tmp_path / 'data'}: dev has other captions"
    (difference,) = differences_from_run(run, read_data_of_run(run, split="dev"), "dev")
    assert difference == f"{tmp_path / 'data'} is no longer what it was in training: dev has other captions"
    assert not differences_from_run(run, read_data_of_run(run, split="train"), "train")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_an_image_that_is_another_one_of_the_same_size_is_told(tiny_runs, scenes_folder, tmp_path, split):
    """As every BMP of one shape is; of whichever split, where the data lies or elsewhere."""
    run, copy = tiny_runs["self"], Path(shutil.copytree(scenes_folder, tmp_path / "copy"))
    config = replace(config_from_dict(RunConfig, yaml.safe_load((run / "config.yaml").read_text())), data=str(copy))
    assert not differences_from_run(run, read_data_of_run(run, copy), split)
    check_data_unchanged(run, config, pytest.fail)
    image = read_data_of_run(run, copy).split(split).rows[0].image
    image.write_bytes(bytes(reversed(image.read_bytes())))
    (difference,) = differences_from_run(run, read_data_of_run(run, copy), split)
    assert f"{split} has other images" in difference
    if split == "test":
        # No run is of it.
        check_data_unchanged(run, config, pytest.fail)
        return
    with pytest.raises(DataError, match=f"{split} has other images"):
        check_data_unchanged(run, config, pytest.fail)


def test_a_moved_copy_stands_in_the_splits_that_its_groups_had_in_training(model, tmp_path):
    """Without them images that were trained on would be measured as dev's; a data set without the column has none."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [f"{number:03}.png,image number {number},p{number // 3}" for number in range(60)]
    for number in range(60):
        Image.new("L", (8, 8), number).save(data / f"{number:03}.png")
    (data / "captions.csv").write_text("\n".join(["image,caption,patient", *rows]))
    run = Path(shutil.copytree(model, tmp_path / "run"))
    read = read_captioned_images(data, group="patient")
    (run / "data.json").write_text(json.dumps(record(data, group="patient", as_read={})))
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    for layout in ("auto", read.layout):
        moved = read_data_of_run(run, copy, layout)
        assert [(row.name, row.split) for row in moved] == [(row.name, row.split) for row in read]
        assert [row.split for row in moved] != [row.split for row in read_captioned_images(copy, layout)]
    (copy / "captions.csv").write_text("\n".join(row.rpartition(",")[0] for row in ["image,caption,patient", *rows]))
    assert [row.split for row in read_data_of_run(run, copy)] == [row.split for row in read_captioned_images(copy)]


@pytest.mark.parametrize("splits", [("train", "dev"), ("train", "dev", "test")])
def test_what_a_run_read_is_kept_of_the_splits_that_are_there(tmp_path, splits):
    """A data set without a test split is trained on as before."""
    from clipvisionalign.data.captioned import CaptionedImage, CaptionedImages
    from clipvisionalign.training.data import hashes_as_read

    (tmp_path / "1.jpg").write_bytes(b"its size counts")
    rows = [CaptionedImage(split, tmp_path / "1.jpg", ("a dog",), split) for split in splits]
    data = CaptionedImages(rows, tmp_path)
    assert list(hashes_as_read(data, data)) == list(splits)
