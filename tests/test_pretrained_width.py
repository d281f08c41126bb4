"""A common space narrower than a pretrained model's own: principal components, folded into the heads."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from pretrained_models import CAPTIONS, FAMILIES, OPEN_CLIP
from test_pretrained import drawn_images
from test_pretrained_settings import settings
from torch.nn import functional as F

from clipvisionalign import Callback, train
from clipvisionalign.cli import main
from clipvisionalign.export.library_layouts import export_library_layout
from clipvisionalign.export.onnx import export_onnx
from clipvisionalign.export.onnx_aligner import OnnxAligner
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.pretrained import principal_directions, width_of
from clipvisionalign.training.contrastive import LossConfig
from clipvisionalign.training.train import resume

#: Families with a linear layer at the end of both heads, into which a narrower space is folded.
FOLDED = ("clip", "chinese_clip", "vision_text", "oc_vit", "oc_quickgelu", "oc_timm", "oc_cnn", "oc_siglip", "oc_hf")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    """Unit vectors about a common direction, as those of a dual encoder are."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1.5, shape[-1])
    return F.normalize(torch.randn(shape, generator=generator) * scales + 0.3, dim=-1)


@pytest.mark.parametrize("width", [1, 4, 11, 16])
def test_the_principal_components_lose_less_of_the_dot_products_than_other_directions(width):
    """Of all vectors together, by Eckart and Young; the share between images and captions is what is lost of a table."""
    images, captions = unit(40, 16, seed=1), unit(120, 16, seed=2)
    directions, explained = principal_directions(images, captions, width)
    assert torch.allclose(directions @ directions.T, torch.eye(width), atol=1e-5)

    def lost(kept: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
        """Share of the squared dot products that a projection takes away."""
        table = left @ right.T
        return float(((table - (left @ kept.T) @ (right @ kept.T).T) ** 2).sum() / (table**2).sum())

    both = torch.cat([images / len(images) ** 0.5, captions / len(captions) ** 0.5])
    generator = torch.Generator().manual_seed(3)
    centred = torch.linalg.svd((both - both.mean(0)).double(), full_matrices=False).Vh[:width].float()
    others = [torch.linalg.qr(torch.randn(16, width, generator=generator))[0].T for _ in range(20)]
    for other in [centred, torch.eye(width, 16), *others]:
        assert lost(directions, both, both) <= lost(other, both, both) + 1e-6
    assert explained == pytest.approx(1 - lost(directions, images, captions), abs=1e-4)


def test_at_the_models_own_width_nothing_changes(folders):
    images, captions = drawn_images(6), list(CAPTIONS)
    alone = Aligner(AlignerConfig(pretrained=str(folders("clip")))).eval()
    same = Aligner(AlignerConfig(pretrained=str(folders("clip")), width=alone.width)).eval()
    assert torch.equal(alone.score(images, captions), same.score(images, captions))
    # Rotated by all of its principal components it ranks alike.
    directions, explained = principal_directions(alone.encode_images(images), alone.encode_captions(captions), 24)
    assert explained == pytest.approx(1.0)
    rotated = alone.encode_images(images) @ directions.T @ (alone.encode_captions(captions) @ directions.T).T
    assert torch.allclose(rotated, alone.score(images, captions), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_space_is_the_projection_of_the_models_own(family, folders, tmp_path):
    """Vectors, patches and tokens; as saved and opened again; without a layer more where there is one to fold it into."""
    images, captions = drawn_images(5), list(CAPTIONS)
    alone = Aligner(AlignerConfig(pretrained=str(folders(family)))).eval()
    width = alone.width // 3
    directions, _ = principal_directions(alone.encode_images(images), alone.encode_captions(captions), width)
    narrow = Aligner(AlignerConfig(pretrained=str(folders(family)), width=width), directions=directions).eval()
    narrow.save(tmp_path / "run")
    for aligner in (narrow, load_aligner(tmp_path / "run", "cpu")):
        for method, inputs in (("encode_images", images), ("encode_captions", captions)):
            expected = F.normalize(getattr(alone, method)(inputs) @ directions.T, dim=-1)
            assert torch.allclose(getattr(aligner, method)(inputs), expected, atol=1e-5)
    if family in FOLDED:
        assert narrow.state_dict().keys() == alone.state_dict().keys()
        assert narrow.parameter_count() < alone.parameter_count()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip", "oc_vit", "oc_hf"])
@pytest.mark.parametrize("design", ["late", "cross"])
def test_designs_on_top_rank_as_the_narrow_space_itself(family, design, folders, tmp_path):
    images, captions = drawn_images(5), list(CAPTIONS)
    config = AlignerConfig(pretrained=str(folders(family)), width=8)
    directions = torch.linalg.qr(torch.randn(Aligner(replace(config, width=None)).width, 8))[0].T
    narrow = Aligner(config, directions=directions).eval()
    aligner = Aligner(replace(config, design=design), directions=directions).eval()
    assert next(aligner.image_chunks(images)).patches.shape[-1] == 8
    expected, scores = narrow.score(images, captions), aligner.score(images, captions)
    for axis in (0, 1):
        assert torch.equal(expected.argsort(stable=True, dim=axis), scores.argsort(stable=True, dim=axis))
    if family != "oc_hf":
        # The end-of-text token of a caption is projected as the pooled vector is.
        projection = aligner.text_tower.token_projection(aligner.text_head)
        assert projection is not None
        assert len(projection[0]) == 8
    aligner.save(tmp_path / "run")
    # Cosines by the scale: their rounding is that much larger, and weights that are packed are summed otherwise.
    tolerance = 1e-5 * float(aligner.scale())
    assert torch.allclose(load_aligner(tmp_path / "run", "cpu").score(images, captions), scores, rtol=0, atol=tolerance)


def test_a_space_is_made_narrower_only(folders, tmp_path, capsys, scenes_folder):
    with pytest.raises(ValueError, match=r"--model.width 25: .* has vectors of 24 numbers"):
        Aligner(AlignerConfig(pretrained=str(folders("clip")), width=25))
    arguments = ["train", str(scenes_folder), "--model.pretrained", str(folders("clip")), "--model.width", "256"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 1
    assert "--model.width 256: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["clip", "siglip", "chinese_clip", "vision_text", "oc_vit"])
def test_a_wider_space_is_refused_by_the_config_alone(folders, family, tmp_path, capsys):
    """Before the data are read or weights are opened: neither is there."""
    model = shutil.copytree(folders(family), tmp_path / "model")
    for path in [*model.glob("*.safetensors"), *model.glob("*.bin")]:
        path.unlink()
    (tmp_path / "data").mkdir()
    arguments = ["train", str(tmp_path / "data"), "--model.pretrained", str(model), "--out", str(tmp_path / "run")]
    own = width_of(model)
    assert main([*arguments, "--model.width", str(own + 1)]) == 1
    assert f"--model.width {own + 1}: {model} has vectors of {own} numbers" in capsys.readouterr().err
    assert main([*arguments, "--model.width", str(own)]) == 1
    assert "has vectors of" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_records_what_its_space_keeps(folders, tmp_path, scenes_folder, caplog):
    """And ranks before its first step as near to the model's own as its directions allow."""
    model = {"width": 12}
    with caplog.at_level(logging.INFO, logger="clipvisionalign"):
        train(settings(scenes_folder, tmp_path / "run", folders("clip"), model=model, epochs=0, steps=0))
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["width"] == 12
    space = json.loads((run / "weights.json").read_text())["common_space"]
    assert (space["own"], space["width"]) == (24, 12)
    assert 0.5 < space["explained"] <= 1
    # No step was taken, whose loss there would be.
    assert "as it is | dev loss" in caplog.text
    assert "epoch 0/0" not in caplog.text
    assert f"{100 * space['explained']:.2f}% of their squared dot products" in caplog.text
    images, captions = drawn_images(20), [*CAPTIONS]
    table = load_aligner(folders("clip"), "cpu").score(images, captions)
    first = load_aligner(run, "cpu").score(images, captions)
    plain = Aligner(AlignerConfig(pretrained=str(folders("clip")), width=12)).eval().score(images, captions)

    def moved(scores: torch.Tensor) -> float:
        """How far ranks are from the model's own, of images for a caption and of captions for an image."""
        return sum(
            (table.argsort(axis).argsort(axis) - scores.argsort(axis).argsort(axis)).abs().sum().item()
            for axis in (0, 1)
        )

    assert moved(first) < moved(plain)


@pytest.mark.slow
def test_a_stream_brings_its_directions_as_its_images_do(folders, tmp_path, scenes_folder):
    pytest.importorskip("webdataset")
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.data.streams.writing import write_shards

    shards = tmp_path / "shards"
    write_shards(read_captioned_images(scenes_folder), shards)
    for name, data in {"folder": scenes_folder, "stream": shards}.items():
        train(settings(data, tmp_path / name, folders("clip"), model={"width": 12}, epochs=0, steps=0))
    folder, stream = (load_aligner(tmp_path / name, "cpu") for name in ("folder", "stream"))
    table, expected = (aligner.score(drawn_images(4), list(CAPTIONS)) for aligner in (stream, folder))
    assert torch.allclose(table, expected, atol=1e-3)


@pytest.mark.slow
def test_a_narrow_run_is_tuned_resumed_and_started_from(folders, tmp_path, scenes_folder):
    model = {"width": 12, "design": "late"}
    more = {"model": model, "freeze": "none", "steps": 2}
    train(settings(scenes_folder, tmp_path / "run", folders("clip"), **more))
    tuned = load_aligner(tmp_path / "run", "cpu")
    assert tuned.width == 12
    train(settings(scenes_folder, tmp_path / "next", folders("clip"), **more | {"init": str(tmp_path / "run")}))
    assert load_aligner(tmp_path / "next", "cpu").width == 12
    first, following = (json.loads((tmp_path / name / "weights.json").read_text()) for name in ("run", "next"))
    assert following["common_space"] == first["common_space"]
    wider = more | {"model": model | {"width": None}, "init": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="other towers than this run's"):
        train(settings(scenes_folder, tmp_path / "wider", folders("clip"), **wider))


@pytest.mark.slow
def test_a_narrow_run_that_is_stopped_ends_as_one_that_is_not(folders, tmp_path, scenes_folder):
    """With all that it trains beside: SigLIP's bias, layers behind its towers, a late interaction, in chunks."""

    class Stopped(Callback):
        def on_checkpoint(self, *_):
            raise KeyboardInterrupt

    more = {
        "model": {"width": 12, "design": "late"}, "freeze": "none", "loss": LossConfig("sigmoid"), "chunk": 8,
        "epochs": 2, "steps": 0, "batch": 48,
    }  # fmt: skip
    whole, stopped = (
        settings(scenes_folder, tmp_path / name, folders("siglip"), **more) for name in ("whole", "stopped")
    )
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, callbacks=[Stopped()])
    resume(tmp_path / "stopped")
    expected, state = (load_aligner(tmp_path / name, "cpu").state_dict() for name in ("whole", "stopped"))
    assert not [name for name in expected if not torch.equal(expected[name], state[name])]


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "naflex"])
def test_a_narrow_model_is_exported_where_its_layout_has_a_place_for_it(family, folders, tmp_path):
    alone = Aligner(AlignerConfig(pretrained=str(folders(family)))).eval()
    directions = torch.linalg.qr(torch.randn(alone.width, 8))[0].T
    Aligner(AlignerConfig(pretrained=str(folders(family)), width=8), directions=directions).save(tmp_path / "run")
    run = load_aligner(tmp_path / "run", "cpu")
    layout = "open_clip" if family in OPEN_CLIP else "transformers"
    images, captions = drawn_images(4), list(CAPTIONS)
    # open_clip makes the hidden layer of a text projection as wide as the common space asks.
    if family in FOLDED and family != "oc_hf":
        export_library_layout(tmp_path / "run", tmp_path / "out", layout)
        exported = load_aligner(tmp_path / "out", "cpu")
        assert exported.width == 8
        assert torch.allclose(exported.score(images, captions), run.score(images, captions), atol=1e-6)
    else:
        with pytest.raises(ValueError, match=rf"not written in {layout}'s layout: .*; use --huggingface or --onnx"):
            export_library_layout(tmp_path / "run", tmp_path / "out", layout)
        assert not (tmp_path / "out").exists()
    if family == "clip":
        export_onnx(tmp_path / "run", tmp_path / "onnx")
        scores = (
            OnnxAligner(tmp_path / "onnx").encode_images(images)
            @ OnnxAligner(tmp_path / "onnx").encode_captions(captions).T
        )
        assert np.allclose(scores, run.score(images, captions).numpy(), atol=1e-4)
