"""Images that are seen as they are and mirrored: the same figures wherever they are measured, kept features or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import test_going_on
import torch
from test_going_on import undisturbed

from clipvisionalign import Aligner, load_aligner, read_captioned_images
from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig
from clipvisionalign.retrieval.evaluate import evaluate
from clipvisionalign.training.feature_cache import tower_fingerprint

settings = test_going_on.settings


def towers(name: str = "test_resnet") -> tuple[ImageTower, ImageTower]:
    """A tower, and the same one that also looks at mirrored images."""
    config = ImageTowerConfig(name, weights="random", size=32)
    plain, mirrored = (ImageTower(replace(config, mirrored=each), load_weights=False).eval() for each in (False, True))
    mirrored.load_state_dict(plain.state_dict())
    return plain, mirrored


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
@torch.no_grad()
def test_an_image_and_its_mirror_have_one_vector(name):
    plain, mirrored = towers(name)
    pixels = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    one, other = plain(pixels), plain(pixels.flip(-1))
    both = mirrored(pixels)
    assert torch.allclose(both.pooled, (one.pooled + other.pooled) / 2, atol=1e-6)
    assert torch.allclose(mirrored(pixels.flip(-1)).pooled, both.pooled, atol=1e-6)
    assert not torch.allclose(one.pooled, both.pooled, atol=1e-6)
    assert torch.equal(both.patches, one.patches)
    assert torch.equal(mirrored.train()(pixels).patches, plain.train()(pixels).patches)


def test_a_tower_that_is_trained_sees_an_image_once():
    plain, mirrored = towers()
    for tower in (plain, mirrored):
        tower.train()
        tower.backbone.eval()
    pixels = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(plain(pixels).pooled, mirrored(pixels).pooled)


def test_features_on_disk_are_of_one_way_of_looking():
    plain, mirrored = towers()
    assert tower_fingerprint(plain) != tower_fingerprint(mirrored)
    # The first blocks see an image once either way.
    assert tower_fingerprint(plain, 2) == tower_fingerprint(mirrored, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"freeze": "image"},
        {"freeze": "image", "cache": "off"},
        {"freeze": "none"},
        {"freeze": "none", "freeze_blocks": 2},
    ],
)
def test_dev_figures_of_a_run_are_those_of_its_model(more, settings, scenes_folder, tmp_path):
    """Of the last epoch, of the end, and of the model that is opened again and measured from files."""
    config = settings("mirrored", out=str(tmp_path / "run"), best_by="last", epochs=1, **more)
    image = replace(config.model.image_tower, name="test_resnet", size=32, mirrored=True)
    config = replace(config, model=replace(config.model, image_tower=image))
    undisturbed(config)
    out = Path(config.out)
    epochs = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    of_epoch = next(each["dev"] for each in reversed(epochs) if "dev" in each)
    results = json.loads((out / "results.json").read_text())
    aligner = load_aligner(out)
    assert aligner.config.image_tower.mirrored
    dev = read_captioned_images(scenes_folder).split("dev")
    whole = evaluate(aligner, dev.images, dev.captions, dev.caption_image, identity=dev.image_identity).to_dict()
    for way in ("image_to_text", "text_to_image"):
        for figure in ("mean_rank", "recall_at_1"):
            measured = whole[way][figure]["value"]
            assert of_epoch[way][figure]["value"] == pytest.approx(measured)
            assert results[way][figure]["value"] == pytest.approx(measured)


def test_an_explanation_is_of_the_score_that_search_has(tiny_model, scenes_folder):
    from clipvisionalign.explain.heatmaps import explain

    model = tiny_model()
    image_config = replace(model.image_tower, name="test_resnet", size=64, mirrored=True)
    aligner = Aligner(replace(model, image_tower=image_config)).eval()
    image = read_captioned_images(scenes_folder).images[0]
    explained = explain(aligner, image, "a red circle")
    assert explained.score == pytest.approx(float(aligner.score([image], ["a red circle"])[0, 0]), abs=1e-5)


def test_a_model_that_looks_both_ways_is_another_model(tiny_model, tmp_path):
    from clipvisionalign.search.fingerprint import aligner_fingerprint

    aligner = Aligner(tiny_model())
    aligner.save(tmp_path)
    before = aligner_fingerprint(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("mirrored: false", "mirrored: true"))
    assert load_aligner(tmp_path).config.image_tower.mirrored
    assert aligner_fingerprint(tmp_path) != before
    path.write_text(path.read_text().replace("mirrored: true", "mirrored: false"))
    assert aligner_fingerprint(tmp_path) == before


def test_an_old_model_is_not_mirrored(tiny_model, tmp_path):
    aligner = Aligner(tiny_model())
    aligner.save(tmp_path)
    path = tmp_path / "config.yaml"
    text = path.read_text()
    assert "mirrored: false" in text
    path.write_text("".join(line for line in text.splitlines(True) if "mirrored" not in line))
    assert load_aligner(tmp_path).config == aligner.config


@pytest.mark.slow
def test_an_export_sees_images_both_ways_too(settings, scenes_folder, tmp_path):
    pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install 'clipvisionalign[onnx]'")
    pytest.importorskip("onnxscript", reason="no onnxscript: pip install 'clipvisionalign[onnx]'")
    from clipvisionalign.export.onnx import export_onnx
    from clipvisionalign.export.onnx_aligner import OnnxAligner

    config = settings("exported", out=str(tmp_path / "run"), epochs=1)
    image = replace(config.model.image_tower, name="test_resnet", size=32, mirrored=True)
    undisturbed(replace(config, model=replace(config.model, image_tower=image)))
    export_onnx(config.out, tmp_path / "onnx")
    images = read_captioned_images(scenes_folder).split("dev").images[:5]
    expected = load_aligner(config.out).encode_images(images)
    assert torch.allclose(torch.as_tensor(OnnxAligner(tmp_path / "onnx").encode_images(images)), expected, atol=1e-4)
