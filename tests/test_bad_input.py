"""Whatever is wrong is told in one clear error, or as one listed row: the thing, the place, the way out."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipvisionalign.cli import main
from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.images import ImageError, open_image


def jpeg(size=(64, 48), mode="RGB", **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], len(Image.new(mode, (1, 1)).getbands())))
    image = Image.fromarray(noise.astype(np.uint8).squeeze(), mode if mode == "L" else None).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be huge and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def png(colour=(10, 20, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(file, "PNG")
    return file.getvalue()


BAD_IMAGES = {
    "zero bytes": (b"", "unreadable image", "empty"),
    "truncated JPEG": (jpeg()[: len(jpeg()) // 2], "truncated image", "truncated"),
    "truncated PNG": (png()[:70], "truncated image", "truncated"),
    "header only": (jpeg()[:20], "unreadable image", "not an image"),
    "text": (b"this is no picture", "unreadable image", "not an image"),
    "30,000 x 30,000 PNG header": (png_header(30_000, 30_000), "enormous image", "900000000 pixels"),
    "12,000 x 12,000 PNG header": (png_header(12_000, 12_000), "enormous image", "12,000 x 12,000"),
    "HTML of an error page": (b"<html>404</html>", "unreadable image", "not an image"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_is_one_listed_row(tmp_path, name):
    content, kind, message = BAD_IMAGES[name]
    (tmp_path / "bad.jpg").write_bytes(content)
    (tmp_path / "good.jpg").write_bytes(jpeg())
    (tmp_path / "metadata.csv").write_text("file_name,caption\nbad.jpg,a picture\ngood.jpg,a picture\n")
    kept, report = check(read_captioned_images(tmp_path))
    assert [row.name for row in kept] == ["good.jpg"]
    assert [(problem.kind, problem.place) for problem in report.problems] == [(kind, "bad.jpg")]
    assert message in report.problems[0].message
    assert not report.usable


def test_missing_image_and_folder_in_its_place(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "good.jpg").write_bytes(jpeg())
    rows = "gone.jpg,a picture\nfolder.jpg,a picture\ngood.jpg,a picture\n"
    (tmp_path / "metadata.csv").write_text(f"file_name,caption\n{rows}")
    for full in (False, True):
        kept, report = check(read_captioned_images(tmp_path), full=full)
        assert [row.name for row in kept] == ["good.jpg"]
        assert {problem.kind for problem in report.problems} == {"missing image"}


def test_odd_but_good_images_are_opened_right(tmp_path):
    red = Image.new("RGB", (8, 4), (200, 0, 0))
    deep = Image.fromarray(np.full((4, 8), 32768, dtype=np.uint16))
    clear = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    turned = Image.new("RGB", (8, 4), (0, 0, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    cases = {
        "cmyk.jpg": (red.convert("CMYK"), {}, (8, 4), (200, 0, 0)),
        "deep.png": (deep, {}, (8, 4), (128, 128, 128)),
        "deep.tif": (deep, {}, (8, 4), (128, 128, 128)),
        "float.tif": (Image.fromarray(np.full((4, 8), 0.5, dtype=np.float32)), {}, (8, 4), (128, 128, 128)),
        "clear.png": (clear, {}, (8, 4), (255, 255, 255)),
        "palette.png": (red.convert("P"), {}, (8, 4), (200, 0, 0)),
        "bit.png": (Image.new("1", (8, 4), 1), {}, (8, 4), (255, 255, 255)),
        "grey.jpg": (Image.new("L", (8, 4), 77), {}, (8, 4), (77, 77, 77)),
        "moving.gif": (red, {"save_all": True, "append_images": [turned, clear.convert("RGB")]}, (8, 4), (200, 0, 0)),
        "turned.jpg": (turned, {"exif": exif}, (4, 8), (0, 0, 200)),
    }
    for name, (image, options, size, colour) in cases.items():
        image.save(tmp_path / name, **options)
        opened = open_image(tmp_path / name)
        assert (opened.mode, opened.size) == ("RGB", size), name
        assert np.allclose(np.asarray(opened).reshape(-1, 3).mean(axis=0), colour, atol=6), name


def test_image_bytes_and_broken_bytes():
    assert open_image(jpeg()).size == (64, 48)
    with pytest.raises(ImageError, match="no bytes"):
        open_image(b"")


def test_bad_rows_are_listed_each_with_its_place(tmp_path):
    (tmp_path / "good.jpg").write_bytes(jpeg())
    rows = [
        "image,caption",
        "good.jpg,a dog",
        "good.jpg,",
        "good.jpg,a dog",
        "no comma",
        ",a caption of nothing",
        "good.jpg,na\ufffdve",
    ]
    (tmp_path / "captions.txt").write_text("\n".join(rows), encoding="utf-8")
    data = read_captioned_images(tmp_path, "flickr8k")
    assert [(problem.kind, problem.place.split()[-1], problem.effect) for problem in data.problems] == [
        ("empty caption", "3", "left out"),
        ("duplicate row", "4", "warning"),
        ("wrong columns", "5", "left out"),
        ("no image name", "6", "left out"),
        ("broken encoding", "7", "warning"),
    ]
    assert data.captions == ["a dog", "a dog", "na\ufffdve"]


def test_latin_1_text_is_read_and_said(tmp_path):
    (tmp_path / "good.jpg").write_bytes(jpeg())
    (tmp_path / "metadata.csv").write_bytes("file_name,caption\ngood.jpg,un café à Paris\n".encode("latin-1"))
    data = read_captioned_images(tmp_path)
    assert data.captions == ["un café à Paris"]
    assert [(problem.kind, problem.effect) for problem in data.problems] == [("broken encoding", "mended")]
    assert "line 2" in data.problems[0].place


def test_same_and_nearly_same_image_in_two_splits(tmp_path):
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(
        (200, 160), Image.Resampling.BICUBIC
    )
    other = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize(
        (200, 160), Image.Resampling.BICUBIC
    )
    plain.save(tmp_path / "train.png")
    plain.save(tmp_path / "dev_same.png")
    plain.resize((150, 120)).save(tmp_path / "dev_near.jpg", quality=60)
    other.save(tmp_path / "dev_other.png")
    plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "dev_mirror.png")
    names = sorted(path.name for path in tmp_path.iterdir())
    rows = "".join(f"{name},a picture,{name.split('.')[0].split('_')[0]}\n" for name in names)
    (tmp_path / "metadata.csv").write_text(f"file_name,caption,split\n{rows}")
    kept, report = check(read_captioned_images(tmp_path))
    problems = {(problem.kind, problem.place) for problem in report.problems}
    # The row of the smaller split is named.
    assert {kind for kind, _ in problems} == {"same image in two splits", "nearly the same image in two splits"}
    messages = " ".join(problem.message for problem in report.problems)
    assert "dev_same.png" in messages
    assert "dev_near.jpg" in messages
    assert "dev_other.png" not in messages
    assert "dev_mirror.png" not in messages
    assert len(kept) == 5


@pytest.mark.slow
def test_drawn_scenes_are_no_near_duplicates(scenes_folder, tmp_path):
    """Scenes on one plain ground are alike nearly everywhere; the demo's own hold some that differ in one shape only.

    A third of the demo's, all of them with WHOLE_DEMO."""
    from clipvisionalign.data.scene_dataset import write_scenes
    from clipvisionalign.study.plan_file import read_plan

    plan = read_plan("demo")
    how, share = plan.drawing, 1 if os.environ.get("WHOLE_DEMO") else 3
    splits = {name: count // share for name, count in how.splits.items()}
    demo = write_scenes(tmp_path / "demo", sum(splits.values()), how.seed, how.pixels, how.plain, splits)
    for folder in (scenes_folder, demo):
        _, report = check(read_captioned_images(folder))
        assert report.problems == []


# --- errors of whole data sets, of settings and of run folders: one line each, exit status 1 or 2 --------------------


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


BAD_DATA = {
    "missing folder": (lambda at: at / "nowhere", "no such file or folder"),
    "empty folder": (lambda at: at, "none of the supported dataset layouts"),
    "folder of pictures without words": (
        lambda at: Image.new("RGB", (4, 4)).save(at / "a.png") or at,
        "none of the supported",
    ),
    "wrong column": (lambda at: write(at / "table.csv", "image,words\na.jpg,a dog\n"), "its columns are: image, words"),
    "no image column": (lambda at: write(at / "table.csv", "foto,caption\na.jpg,a dog\n"), "no image column"),
    "no captions": (lambda at: write(at / "table.csv", "image,caption\na.jpg,\n"), "no image with a caption"),
    "header only": (lambda at: write(at / "table.csv", "image,caption\n"), "no image with a caption"),
    "broken JSON": (lambda at: write(at / "dataset_x.json", '{"images": ['), "line 1: not valid JSON"),
    "JSON of another kind": (
        lambda at: write(at / "dataset_x.json", '{"pictures": []}'),
        "expected a list under 'images'",
    ),
    "broken JSONL": (lambda at: write(at / "table.jsonl", "{not json}\n"), "not valid JSON"),
    "no Parquet": (lambda at: write(at / "table.parquet", "no parquet"), "not a Parquet file"),
    "unknown split names": (
        lambda at: write(at / "t.csv", "image,caption,split\na.jpg,a dog,blue\n"),
        "its split is called",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_set_is_one_clear_error(tmp_path, name, capsys):
    make, message = BAD_DATA[name]
    source = make(tmp_path)
    with pytest.raises(DataError, match=r"\w") as error:
        read_captioned_images(source)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert main(["check", str(source)]) == 1
    stderr = capsys.readouterr().err.strip()
    assert stderr.startswith("clipvisionalign: error: ")
    assert "Traceback" not in stderr


BAD_SETTINGS = {
    "no data": ([], "no data set given"),
    "unknown backbone": (["--model.image_tower.name", "resnet5000"], "timm has no backbone 'resnet5000'"),
    "no weights of the backbone": (
        ["--model.image_tower.name", "resnet50", "--model.image_tower.weights", "/nowhere/w.pt"],
        "no pretrained weights of 'resnet50' in '/nowhere/w.pt'",
    ),
    "unknown text tower": (
        ["--model.text_tower.name", "no-such-encoder"],
        "no pretrained weights of 'no-such-encoder'",
    ),
    "window of one": (["--model.design", "sparse", "--model.text_tower.window", "1"], "needs 2 tokens or more"),
    "batch of one": (["--batch", "1"], "--batch should be at least 2"),
    "no epochs": (["--epochs", "0"], "--epochs should be at least 1"),
    "warm-up of everything": (["--warmup", "1.5"], "--warmup should be from 0 to below 1"),
    "unknown device": (["--device", "warp9"], "--device warp9: not to be had"),
    "unknown layout": (["--layout", "flikr"], "unknown layout 'flikr'"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_setting_is_one_clear_error(tmp_path, scenes_folder, name, capsys):
    flags, message = BAD_SETTINGS[name]
    data = [] if name == "no data" else [str(scenes_folder)]
    assert main(["train", *data, "--out", str(tmp_path / "run"), "--cache", "off", *flags]) == 1
    stderr = capsys.readouterr().err
    assert message in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("flags", [["--model.design", "dense"], ["--precision", "int3"], ["--no_such_flag", "1"]])
def test_wrong_words_on_the_command_line(scenes_folder, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", str(scenes_folder), *flags])
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


def test_run_folder_is_not_overwritten_unasked(tmp_path, scenes_folder, tiny_model):
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train

    config = RunConfig(data=str(scenes_folder), out=str(tmp_path / "run"), model=tiny_model())
    write(tmp_path / "run" / "thesis.txt", "three years of work")
    with pytest.raises(FileExistsError, match="is there already"):
        train(config)
    with pytest.raises(FileExistsError, match="holds something that is no run"):
        train(replace(config, overwrite=True))
    assert (tmp_path / "run" / "thesis.txt").is_file()


def test_an_empty_split_is_named_with_those_that_are_there(tmp_path, tiny_runs, capsys):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    write(tmp_path / "metadata.csv", "file_name,caption,split\na.jpg,a picture,train\n")
    assert main(["evaluate", str(tiny_runs["self"]), "--data", str(tmp_path), "--split", "dev"]) == 1
    assert "the split 'dev' is empty; this data set has: train (1 image)" in capsys.readouterr().err


def test_what_is_no_run_folder_is_said(tmp_path, tiny_runs, capsys):
    import shutil

    assert main(["evaluate", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "it lacks config.yaml, model.safetensors, text_tower" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(tiny_runs["self"], broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:5000])
    assert main(["evaluate", str(broken)]) == 1
    assert "not this aligner's weights" in capsys.readouterr().err
    shutil.copy(tiny_runs["cross"] / "model.safetensors", broken)
    assert main(["evaluate", str(broken)]) == 1
    assert "not this aligner's weights" in capsys.readouterr().err
    (broken / "config.yaml").write_text("model: {width: wide}\n")
    assert main(["evaluate", str(broken)]) == 1
    assert "no settings of an aligner" in capsys.readouterr().err


def test_a_pickle_is_never_run(tmp_path):
    """A weights file that would run code when unpickled is refused, and its code does not run."""
    import pickle

    from clipvisionalign.models.weight_files import read_tensors

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(Exception, match=r"(?i)weights"):
        read_tensors(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def test_rerank_without_a_fusion_is_refused(tiny_runs, capsys):
    assert main(["evaluate", str(tiny_runs["self"]), "--candidates", "8"]) == 1
    assert "has nothing to re-rank with" in capsys.readouterr().err


def test_scenes_do_not_overwrite(tmp_path, capsys):
    write(tmp_path / "keep.txt", "mine")
    assert main(["scenes", str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["scenes", str(tmp_path / "new"), "--images", "0"]) == 1


def test_check_as_json(scenes_folder, capsys):
    assert main(["check", str(scenes_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["usable"]
    assert (report["images"], report["captions"], report["problems"]) == (120, 600, [])
