"""Aligners for use elsewhere: ONNX equals PyTorch and ranks as the run does, and a hub's folder reads back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tolerance import assert_as_exact, in_float64, rounding

pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install 'clipvisionalign[onnx]'")
pytest.importorskip("onnxscript", reason="no onnxscript: pip install 'clipvisionalign[onnx]'")

from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from clipvisionalign.cli import main
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.data.scene_classes import write_scene_classes
from clipvisionalign.export import graphs, onnx, text_tower
from clipvisionalign.export.audits import keep_audit
from clipvisionalign.export.huggingface import model_card
from clipvisionalign.export.onnx import export_onnx
from clipvisionalign.export.onnx_aligner import OnnxAligner
from clipvisionalign.export.verification import verify_export
from clipvisionalign.images import ImageError
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.late_interaction import LateTokens, prune_tokens, prune_weights
from clipvisionalign.retrieval.evaluate import evaluate
from clipvisionalign.training.opened_classes import open_classes

DESIGNS = ("self", "sparse", "late", "cross")
CAPTIONS = [
    "a red circle",
    "",
    "four small green squares above a large ring",
    "two elephants: a dog, on grass!",
    "a " * 99,
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model, text_folder, scenes_folder):
    """A model of each design, every part of a score drawn at random; the late one with sliding windows and few tokens,
    the one with a fusion with few tokens as well."""
    folder = tmp_path_factory.mktemp("runs")
    # One layer: tracing a graph is what takes long.
    text = Path(shutil.copytree(text_folder, folder / "text"))
    shape = json.loads((text / "config.json").read_text()) | {"num_hidden_layers": 1}
    (text / "config.json").write_text(json.dumps(shape))
    made: Aligner | None = None
    for design in DESIGNS:
        former = made
        torch.manual_seed(0)
        config = tiny_model(design)
        late, fusion = replace(config.late, keep_tokens=3), replace(config.fusion, candidates=20)
        attention = "sliding" if design == "late" else "dense"
        tower = replace(config.text_tower, name=str(text), weights="random", attention=attention)
        config = replace(config, late=late, fusion=fusion, text_tower=tower)
        made = Aligner(config)
        if former is not None:
            # One image side for all.
            made.image_tower.load_state_dict(former.image_tower.state_dict())
            made.image_head.load_state_dict(former.image_head.state_dict())
        with torch.no_grad():
            made.log_scale.fill_(2.5)
            if made.late:
                made.late.token_weight.weight.normal_()
                made.late.weight.fill_(0.7)
                made.late.log_scale.fill_(1.5)
            if made.fusion:
                made.fusion.correction.weight.normal_()
                made.fusion.weight.fill_(0.3)
        made.save(folder / design)
        (folder / design / "data.json").write_text(json.dumps({"source": str(scenes_folder), "layout": "folder"}))
    return {design: folder / design for design in DESIGNS}


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
    """What `export --onnx` writes of each, and of that with a fusion in 8 bits as well."""
    folder, written = tmp_path_factory.mktemp("onnx"), graphs._export_module

    def write(module, example, path, inputs, outputs, shapes):
        # The image towers of two designs are the same, weights and all: `checked` compares both all the same.
        same = folder / "self" / path.name
        if isinstance(module, graphs.ImageExport) and module.aligner.config.design == "sparse":
            path.write_bytes(same.read_bytes())
        else:
            written(module, example, path, inputs, outputs, shapes)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(graphs, "_export_module", write)
        for design in DESIGNS:
            export_onnx(runs[design], folder / design, int8=design == "cross")
    return folder


@pytest.fixture(scope="module")
def images(scenes_folder, tmp_path_factory):
    """200 images as they come: every orientation of EXIF and of XMP, every kind of transparency, of many sizes, some larger than wanted."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    scenes = sorted((scenes_folder / "images").glob("*.png"))
    for number in range(200):
        image = Image.open(scenes[number % len(scenes)]).convert("RGB")
        image = image.resize(tuple(rng.integers(40, 300, 2).tolist()))
        kind, options, ending = number % 8, {}, "png"
        if kind in (0, 1):
            exif = Image.Exif()
            exif[274] = number // 8 % 8 + 1
            ending, options = ("jpg" if kind else "png"), {"exif": exif}
        elif kind in (2, 3, 4):
            image.putalpha(Image.fromarray(rng.integers(0, 255, image.size[::-1], dtype=np.uint8)))
            image = image if kind == 2 else image.convert("LA") if kind == 3 else image.quantize(16)
        elif kind == 5:
            options = {"transparency": image.getpixel((0, 0))}
        elif kind == 6:
            image, ending = image.convert("CMYK"), "jpg"
        elif number // 8 % 3:
            quote = "\"'"[number // 8 % 2]
            ending, options = "jpg", {"xmp": f"<a tiff:Orientation={quote}{number // 8 % 8 + 1}{quote}/>".encode()}
        image.save(folder / f"{number:03}.{ending}", **options)
    return sorted(folder.iterdir())


def ranked_by_readme(folder, paths):
    """Scores of all images and the first ten of them for each caption, by the program in an export's README, with
    onnxruntime, tokenizers, Pillow and NumPy and without this project and PyTorch."""
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    Image.open(paths[0]).convert("RGB").save(folder / "a.jpg")
    program = f"""import sys
sys.modules['torch'] = sys.modules['clipvisionalign'] = sys.modules['transformers'] = None
{code}
images = encode_images({[str(path) for path in paths]})
captions = [encode_caption(caption) for caption in {CAPTIONS}]
of_all = globals().get("fused_score", score)
json.dump({{"scores": [of_all(images, caption).tolist() for caption in captions],
            "first": [first(images, caption).tolist() for caption in captions]}}, open("found.json", "w"))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    assert done.stdout.strip() == "[0]"
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("design", DESIGNS)
def test_the_readmes_program_finds_what_the_run_finds(exported, runs, images, design):
    ranking = ranked_by_readme(exported / design, images)
    aligner = load_aligner(runs[design])
    scores = aligner.score(images, CAPTIONS).numpy().T
    np.testing.assert_allclose(ranking["scores"], scores, rtol=1e-3, atol=2e-4)
    if design == "cross":
        # The dual encoder's first candidates are put into a new order.
        cosines = aligner.encode_captions(CAPTIONS).numpy() @ aligner.encode_images(images).numpy().T
        some = np.argsort(-cosines, axis=1, kind="stable")[:, : aligner.config.fusion.candidates]
        others = np.ones_like(scores, dtype=bool)
        np.put_along_axis(others, some, False, axis=1)
        scores = np.where(others, -np.inf, scores)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    for row, (first, right) in enumerate(zip(ranking["first"], expected.tolist(), strict=True)):
        # Scores that rounding alone tells apart may stand either way.
        np.testing.assert_allclose(scores[row][first], scores[row][right], rtol=1e-4, atol=1e-5)
        assert len(set(first)) == 10
        assert len(set(first) & set(right)) >= 9


@pytest.mark.parametrize("design", DESIGNS)
def test_it_equals_pytorch_over_batches_and_lengths(exported, runs, design):
    aligner = load_aligner(runs[design], packed=False)
    # The command's own bound, over which it raises, is wide; this is what rounding allows 60 layers.
    assert verify_export(aligner, exported / design, batches=(1, 2, 5, 33), lengths=(2, 3, 20, 77)) <= rounding(
        64, steps=60
    )


def test_a_file_that_is_not_the_aligners_is_found_out(exported, runs, tmp_path):
    with pytest.raises(RuntimeError, match="differs from PyTorch's"):
        verify_export(load_aligner(runs["self"], packed=False), exported / "cross", batches=(2,), lengths=(9,))
    for part in ("late.token_weight.weight", "late.weight", "late.patch.bias", "fusion.weight", "fusion.norm.weight"):
        other = load_aligner(runs["cross"], packed=False)
        state = other.state_dict()
        other.load_state_dict(state | {part: 1.5 * state[part] + 0.1})
        with pytest.raises(RuntimeError, match="differs from PyTorch's"):
            verify_export(other, exported / "cross", batches=(3,), lengths=(9,))


def test_weights_are_pruned_in_place_as_the_late_interaction_prunes_them():
    rng = np.random.default_rng(0)
    for keep in range(8):
        # Ties too: of equal weights the first are kept.
        weights = torch.from_numpy(rng.integers(1, 4, (5, 6)).astype(np.float32)).softmax(dim=1)
        pruned_tokens = prune_tokens(LateTokens(weights[..., None], weights, weights > 0), keep) if keep else None
        expected = weights
        if pruned_tokens is not None and pruned_tokens.positions is not None:
            expected = torch.zeros_like(weights).scatter(1, pruned_tokens.positions, pruned_tokens.weights)
        torch.testing.assert_close(prune_weights(weights, keep), expected)


@pytest.mark.parametrize("design", ["self", "late"])
def test_an_export_classifies_as_its_run_does(exported, runs, tmp_path, design):
    data = str(write_scene_classes(tmp_path / "shapes", "shape", 60, size=64))
    of_run, of_export = (
        open_classes(str(model), data, "all").classify() for model in (runs[design], exported / design)
    )
    assert len(of_run.label_ranks.ranks) == 60
    # Scores that rounding alone tells apart may stand either way.
    assert np.mean(of_run.label_ranks.ranks == of_export.label_ranks.ranks) >= 0.9


def test_the_exported_aligner_answers_like_every_model(exported, runs, scenes_folder):
    other, aligner = OnnxAligner(exported / "cross"), load_aligner(runs["cross"], packed=False)
    exact = in_float64(aligner)
    paths = sorted((scenes_folder / "images").glob("*.png"))[:5]
    assert_as_exact(*(model.encode_captions(CAPTIONS) for model in (other, aligner, exact)), size=1.0)
    assert_as_exact(*(model.encode_images(paths) for model in (other, aligner, exact)), size=1.0)
    assert_as_exact(*(model.score(paths, CAPTIONS) for model in (other, aligner, exact)))
    late = OnnxAligner(exported / "late"), load_aligner(runs["late"], packed=False)
    assert_as_exact(*(model.score(paths, CAPTIONS) for model in (*late, in_float64(late[1]))))
    with pytest.raises(ValueError, match="scores no pairs"):
        OnnxAligner(exported / "self").pair_scorer(paths, CAPTIONS)


@pytest.mark.parametrize("design", ["self", "late", "cross"])
def test_none_one_equal_and_odd_ones_are_scored_as_by_the_run(exported, runs, scenes_folder, tmp_path, design):
    """No image or no caption, one, the same twice, images of other modes, a caption longer than any model reads."""
    other, aligner = OnnxAligner(exported / design), load_aligner(runs[design], packed=False)
    paths = sorted((scenes_folder / "images").glob("*.png"))[:2]
    scene = Image.open(paths[0]).convert("RGB")
    odd = [scene.convert(mode) for mode in ("L", "1", "LA", "P", "CMYK", "I", "F")]
    odd += [scene.convert("I").point(lambda grey: 257 * grey).convert("I;16"), scene.resize((1, 300))]
    for images, captions in (
        ([], CAPTIONS), (paths, []), ([], []), (paths[:1], CAPTIONS[:1]), (paths * 2, CAPTIONS[:2] * 2),
        (odd, CAPTIONS[:1]), (paths[:1], ["a dog, " * 5000, "a"]),
    ):  # fmt: skip
        scores, right = other.score(images, captions), aligner.score(images, captions).numpy()
        assert scores.shape == right.shape == (len(images), len(captions))
        np.testing.assert_allclose(scores, right, rtol=1e-3, atol=2e-4)
        assert other.encode_images(images).shape == (len(images), aligner.config.width)
        assert other.encode_captions(captions).shape == (len(captions), aligner.config.width)
    for model in (other, aligner):
        with pytest.raises(ValueError, match="no images to score" if design != "self" else "scores no pairs"):
            model.pair_scorer([], CAPTIONS)
        with pytest.raises(ImageError, match="nowhere"):
            model.score([paths[0], tmp_path / "nowhere.png"], CAPTIONS)
        with pytest.raises(TypeError, match="entry 1 is no string but NoneType"):
            model.score(paths, ["a dog", None])


def test_what_8_bits_lose_is_measured_as_the_design_ranks(exported, scenes_folder):
    other, small = OnnxAligner(exported / "cross"), OnnxAligner(exported / "cross", int8=True)
    cosines = (small.encode_captions(CAPTIONS) * other.encode_captions(CAPTIONS)).sum(axis=1)
    assert cosines.min() > 0.97
    int8_report = other.manifest["int8"]
    dev = read_captioned_images(scenes_folder).split("dev")
    right = evaluate(small, dev.images, dev.captions, dev.caption_image, candidates=20)
    assert int8_report["rsum"]["value"] == pytest.approx(right.metrics.rsum.value)
    assert right.dual is not None
    assert int8_report["rsum_change"]["value"] == pytest.approx(
        int8_report["rsum"]["value"] - int8_report["exact_rsum"]["value"]
    )
    assert (
        int8_report["rsum_change"]["low"] <= int8_report["rsum_change"]["value"] <= int8_report["rsum_change"]["high"]
    )


def test_what_cannot_be_exported_leaves_nothing(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx, "write_graphs", lambda aligner, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_onnx(runs["self"], tmp_path / "out")
    monkeypatch.setattr(text_tower, "Longformer", torch.nn.Module)
    assert main(["export", str(runs["sparse"]), "--onnx", str(tmp_path / "out")]) == 1
    assert "Longformer is not exported" in capsys.readouterr().err
    assert main(["export", str(runs["self"]), "--huggingface", str(tmp_path / "out"), "--int8"]) == 1
    assert "--int8 goes with --onnx" in capsys.readouterr().err
    assert main(["export", str(runs["self"]), "--onnx", str(tmp_path / "out"), "--data", str(tmp_path)]) == 1
    assert "--data goes with --int8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_card_tells_each_verdict_of_the_model_and_the_data_that_it_is_of(tiny_runs, scenes_folder, tmp_path, capsys):
    """An audit of other data says nothing of the dev figures, nor does one of other weights; neither is lost for it."""
    run = Path(shutil.copytree(tiny_runs["self"], tmp_path / "run"))
    for name in ("audit.json", "measured.json"):
        (run / name).unlink(missing_ok=True)
    part = read_captioned_images(scenes_folder).split("dev")
    other = replace(part, rows=part.rows[1:])
    verdicts = {passed: [{"name": "leak", "passed": passed, "meaning": f"seen {passed}"}] for passed in (True, False)}

    def keep(of, passed: bool, split: str = "dev") -> str:
        keep_audit(run, {"passed": passed, "split": split, "checks": verdicts[passed]}, of)
        return model_card(run)

    assert "Not audited." in model_card(run)
    card = keep(part, True)
    assert "Passed." in card
    for _ in range(2):
        card = keep(other, False, "test")
        assert "Passed." in card
        assert card.count("On the test split of other data than that dev split: failed (leak).") == 1
    assert "do not believe the figures above" in keep(part, False)
    assert "other data" in model_card(run)
    asked = json.loads((run / "audit.json").read_text())["asked"]
    (run / "measured.json").write_text(json.dumps({
        "asked": {**asked, "split": "dev"}, "audit": {"passed": True, "checks": verdicts[True]}
    }))  # fmt: skip
    assert "do not believe the figures above" in model_card(run)
    assert "- passed: leak: seen True" in keep(part, True)
    tensors = load_file(run / "model.safetensors")
    save_file({name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
              run / "model.safetensors")  # fmt: skip
    assert "Not audited." in model_card(run)
    (run / "audit.json").write_text(json.dumps({"passed": False, "checks": verdicts[False]}))
    assert "audit it again" in model_card(run)


def test_an_unfinished_run_is_told_wherever_it_is_used(tiny_runs, scenes_folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lancedb", reason="no LanceDB: pip install 'clipvisionalign[search]'")
    run = Path(shutil.copytree(tiny_runs["self"], tmp_path / "run"))
    index, image_folder = tmp_path / "index", tmp_path / "pictures"
    image_folder.mkdir()
    image = shutil.copy(min((scenes_folder / "images").rglob("*.png")), image_folder)
    monkeypatch.setattr("uvicorn.Server.run", lambda *given, **more: None)
    # What is told does not depend on the graphs, whose tracing takes half a minute.
    monkeypatch.setattr(onnx, "write_graphs", lambda *given: None)
    monkeypatch.setattr(onnx, "verify_export", lambda *given: 0.0)
    commands = [
        ["index", str(run), str(image_folder), "--out", str(index)], ["search", str(index), "a red circle"],
        ["serve", str(index)], ["explain", str(run), str(image), "a red circle", "--out", str(tmp_path / "e.png")],
        ["export", str(run), "--onnx", "ONNX"],
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for finished in (True, False):
        if not finished:
            (run / "results.json").unlink()
            shutil.rmtree("ONNX")
        for command in commands:
            assert main(command) == 0, command
            output = "".join(capsys.readouterr())
            assert ("is not finished" in output) != finished, command
        kept = (tmp_path / "ONNX" / "onnx.json").read_text(), (tmp_path / "ONNX" / "README.md").read_text()
        assert ["not finished" in text for text in kept] == [not finished] * 2


def test_what_8_bits_lose_is_told_of_however_few_images(tmp_path, capsys, monkeypatch):
    loss = {"value": -1.25, "low": None, "high": None}
    about = {"difference": 0.0, "int8": {"rsum_change": loss}}
    monkeypatch.setattr(onnx, "export_onnx", lambda *given: about)
    assert main(["export", "run", "--onnx", str(tmp_path), "--int8"]) == 0
    assert "8-bit towers: dev rsum -1.2 (no interval: too few images)" in capsys.readouterr().out
    loss |= {"low": -2.0, "high": 0.5}
    assert main(["export", "run", "--onnx", str(tmp_path), "--int8"]) == 0
    assert "8-bit towers: dev rsum -1.2 [-2.0, +0.5]" in capsys.readouterr().out


def test_a_folder_for_a_hub_reads_back(tiny_runs, tmp_path, capsys):
    assert main(["export", str(tiny_runs["late"]), "--huggingface", str(tmp_path / "hub")]) == 0
    captions = ["a red circle", "a blue star"]
    before, after = load_aligner(tiny_runs["late"]), load_aligner(tmp_path / "hub")
    assert (before.encode_captions(captions) == after.encode_captions(captions)).all()
    card = (tmp_path / "hub" / "README.md").read_text()
    rsum = json.loads((tiny_runs["late"] / "results.json").read_text())["rsum"]["value"]
    assert ModelCard(card).data.to_dict() == {
        "library_name": "clipvisionalign",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["image-text-retrieval", "late"],
    }
    assert f"Rsum {rsum:.1f} [" in card
    assert "## Limits" in card
    assert "Not audited." in card
    assert main(["audit", str(tiny_runs["late"]), "--split", "dev", "--sample", "12", "--json"]) in (0, 1)
    checks = json.loads((tiny_runs["late"] / "audit.json").read_text())["checks"]
    assert main(["export", str(tiny_runs["late"]), "--huggingface", str(tmp_path / "audited")]) == 0
    card = (tmp_path / "audited" / "README.md").read_text()
    assert all(each["meaning"] in card for each in checks)
    (tiny_runs["late"] / "audit.json").unlink()
    assert main(["export", str(tiny_runs["late"]), "--huggingface", str(tmp_path / "hub")]) == 1
    assert "is there already and not empty" in capsys.readouterr().err
