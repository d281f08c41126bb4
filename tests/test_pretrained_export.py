"""A pretrained model, tuned or as it is, written back in its library's layout, as ONNX, and for the hub."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from pretrained_models import CAPTIONS, FAMILIES, OPEN_CLIP
from safetensors.torch import load_file, save_file
from test_pretrained import Library, captions_of_every_length, drawn_images
from tokenizers import Tokenizer
from torch.nn import functional as F

from clipvisionalign.cli import main
from clipvisionalign.export.huggingface import export_huggingface
from clipvisionalign.export.library_layouts import export_library_layout
from clipvisionalign.export.onnx import export_onnx
from clipvisionalign.export.onnx_aligner import OnnxAligner
from clipvisionalign.export.onnx_text import OnnxTextTower
from clipvisionalign.export.onnx_tokenizer import write_tokenizer
from clipvisionalign.export.text_tower import write_text_tower
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.caption_tokenizer import open_tokenizer
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.pretrained import save_dual_encoder
from clipvisionalign.models.text_tower import TextTowerConfig
from clipvisionalign.training.fine_tuning import LoraConfig, add_lora, merge_lora

TOLERANCE = 1e-5


def layout_of_family(family):
    return "open_clip" if family in OPEN_CLIP else "transformers"


def tuned(folder: Path, out: Path, **settings) -> Aligner:
    """A run folder whose every weight has moved from those of the pretrained model."""
    aligner = Aligner(AlignerConfig(pretrained=str(folder), **settings))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        for module in aligner.modules():
            # Padding has no gradient, and transformers sets its row to zero.
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0
    aligner.clamp_temperatures()
    aligner.save(out)
    return load_aligner(out, "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_model_is_the_same_in_its_library(folders, tmp_path, family):
    run = tuned(folders(family), tmp_path / "run")
    export_library_layout(tmp_path / "run", tmp_path / "out", layout_of_family(family))
    library, reopened = Library(tmp_path / "out", family), load_aligner(tmp_path / "out", "cpu")
    captions, images = [*CAPTIONS, *captions_of_every_length()], drawn_images(5)
    before = load_aligner(folders(family), "cpu").encode_captions(captions)
    vectors, image_vectors = run.encode_captions(captions), run.encode_images(images)
    assert (vectors - before).abs().max() > 100 * TOLERANCE
    for other in (library.text(captions), reopened.encode_captions(captions)):
        torch.testing.assert_close(other, vectors, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(reopened.encode_images(images), image_vectors, atol=TOLERANCE, rtol=0)
    assert (library.images(images) * image_vectors).sum(dim=1).min() > 0.9999
    torch.testing.assert_close(library.model.logit_scale.exp().squeeze(), run.scale(), atol=1e-3, rtol=1e-6)
    if run.logit_bias is not None:
        torch.testing.assert_close(library.model.logit_bias.reshape(1), run.logit_bias, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["clip", "oc_vit"])
def test_a_pretrained_model_goes_there_and_back_unchanged(folders, tmp_path, family):
    export_library_layout(folders(family), tmp_path / "out", layout_of_family(family))
    expected, actual = (load_aligner(folder, "cpu", packed=False) for folder in (folders(family), tmp_path / "out"))
    assert expected.state_dict().keys() == actual.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(actual.state_dict()[name], tensor, atol=1e-6, rtol=0)


def test_a_model_is_saved_again_over_itself(folders, tmp_path):
    aligner = load_aligner(folders("oc_hf"), "cpu", packed=False)
    for _ in range(2):
        aligner.save(tmp_path / "run")
    assert (tmp_path / "run" / "pretrained" / "hf_text_config" / "config.json").is_file()


@pytest.mark.slow
def test_adapters_are_merged(folders, tmp_path):
    aligner = Aligner(AlignerConfig(pretrained=str(folders("clip"))))
    plain = aligner.encode_captions(list(CAPTIONS))
    add_lora(aligner, LoraConfig(towers="both", rank=2))
    with torch.no_grad():
        for name, parameter in aligner.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    merged = merge_lora(aligner).eval()
    merged.save(tmp_path / "run")
    export_library_layout(tmp_path / "run", tmp_path / "out", "transformers")
    library, captions, images = Library(tmp_path / "out", "clip"), list(CAPTIONS), drawn_images(3)
    expected = merged.encode_captions(captions)
    assert (expected - plain).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(library.text(captions), expected, atol=TOLERANCE, rtol=0)
    transform = merged.image_tower.image_transform
    pixels = transform.normalize(torch.stack([transform.transform()(image) for image in images]))
    with torch.no_grad():
        vectors = F.normalize(library.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    torch.testing.assert_close(vectors, merged.encode_images(images), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_a_publisher_s_half_precision_does_not_round_what_was_tuned(folders, tmp_path):
    half = Path(shutil.copytree(folders("clip"), tmp_path / "half"))
    weights = {name: tensor.half() for name, tensor in load_file(half / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(settings | {"dtype": "float16"}))
    run = tuned(half, tmp_path / "run")
    export_library_layout(tmp_path / "run", tmp_path / "out", "transformers")
    library = Library(tmp_path / "out", "clip")
    assert library.model.dtype == torch.float32
    torch.testing.assert_close(
        library.text(list(CAPTIONS)), run.encode_captions(list(CAPTIONS)), atol=TOLERANCE, rtol=0
    )


@pytest.mark.slow
def test_captions_are_cut_where_the_run_cuts_them(folders, tmp_path):
    run = tuned(folders("clip"), tmp_path / "run", text_tower=TextTowerConfig(max_tokens=9))
    export_library_layout(tmp_path / "run", tmp_path / "out", "transformers")
    captions = captions_of_every_length()
    torch.testing.assert_close(
        Library(tmp_path / "out", "clip").text(captions), run.encode_captions(captions), atol=TOLERANCE, rtol=0
    )
    tuned(folders("siglip2"), tmp_path / "padded", text_tower=TextTowerConfig(max_tokens=9))
    with pytest.raises(ValueError, match="cut after 9 tokens"):
        export_library_layout(tmp_path / "padded", tmp_path / "no", "transformers")


@pytest.mark.slow
def test_positions_for_longer_captions_are_kept(folders, tmp_path):
    run = tuned(folders("clip"), tmp_path / "run", positions="stretched")
    export_library_layout(tmp_path / "run", tmp_path / "out", "transformers")
    captions = captions_of_every_length()
    assert max(len(ids) for ids in run.text_tower.tokenize(captions)) > 77
    torch.testing.assert_close(
        Library(tmp_path / "out", "clip").text(captions), run.encode_captions(captions), atol=TOLERANCE, rtol=0
    )


def refused(capsys, *arguments):
    """The one line with which a call is refused."""
    # What a library wrote while the model was made.
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.slow
def test_what_a_layout_has_no_place_for_is_refused_in_one_line(folders, tmp_path, capsys, tiny_model):
    for design in ("late", "cross"):
        tuned(folders("clip"), tmp_path / design, design=design)
        line = refused(capsys, "export", tmp_path / design, "--transformers", tmp_path / "out")
        assert f"no place for the design '{design}'" in line
        assert "--huggingface or --onnx" in line
    assert "use --open-clip" in refused(capsys, "export", folders("oc_vit"), "--transformers", tmp_path / "out")
    assert "use --transformers" in refused(capsys, "export", folders("clip"), "--open-clip", tmp_path / "out")
    torch.manual_seed(0)
    Aligner(tiny_model("self")).save(tmp_path / "own")
    assert "towers and heads of its own" in refused(
        capsys, "export", tmp_path / "own", "--transformers", tmp_path / "out"
    )
    # Heads of another kind than the model's own.
    aligner = Aligner(AlignerConfig(pretrained=str(folders("clip"))))
    state = {name: tensor for name, tensor in aligner.state_dict().items() if name != "max_log_scale"}
    with pytest.raises(
        ValueError, match=r"CLIPModel has no place for 1 tensors of this model, such as text_projection.bias"
    ):
        save_dual_encoder(state | {"text_head.bias": torch.zeros(24)}, folders("clip"), tmp_path)
    with pytest.raises(
        ValueError, match=r"text_projection.weight is \(48, 32\) in this model, and \(24, 32\) in CLIPModel"
    ):
        save_dual_encoder(state | {"text_head.weight": torch.zeros(48, 32)}, folders("clip"), tmp_path)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_nothing_half_written_stays(folders, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    assert "not empty" in refused(capsys, "export", folders("clip"), "--transformers", tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes.txt"]

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("clipvisionalign.export.library_layouts.save_dual_encoder", fail)
    assert "no space left" in refused(capsys, "export", folders("clip"), "--transformers", tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


def test_the_command_writes_what_the_function_does_and_records_the_model_it_started_from(folders, tmp_path, capsys):
    named = Path(shutil.copytree(folders("clip"), tmp_path / "named"))
    settings = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps(settings | {"_name_or_path": "openai/clip-vit-base-patch32"}))
    tuned(named, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--transformers", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "as transformers reads them" in captured.out
    assert captured.err == ""
    assert json.loads((tmp_path / "out" / "config.json").read_text())["_name_or_path"] == "openai/clip-vit-base-patch32"
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "out").glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "naflex"])
def test_as_onnx_it_encodes_as_it_does_and_so_does_the_program_in_its_readme(folders, tmp_path, family):
    aligner, folder = load_aligner(folders(family), "cpu"), tmp_path / "onnx"
    manifest = export_onnx(folders(family), folder)
    assert manifest["difference"] < 1e-4
    exported, captions, images = OnnxAligner(folder), [*CAPTIONS, *captions_of_every_length()], drawn_images(6)
    np.testing.assert_allclose(exported.encode_captions(captions), aligner.encode_captions(captions), atol=1e-4)
    image_vectors = aligner.encode_images(images)
    np.testing.assert_allclose(exported.encode_images(images), image_vectors, atol=1e-4)
    if family not in ("clip", "siglip", "siglip2"):
        return
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace('["a.jpg"]', str([str(tmp_path / f"{number}.png") for number in range(len(images))]))
    code += "\nnp.save('images.npy', images['vectors'])"
    code += f"\nnp.save('captions.npy', np.concatenate([encode_caption(c)['vectors'] for c in {list(CAPTIONS)}]))"
    code = f"import sys\nsys.modules.update(dict.fromkeys(('torch', 'clipvisionalign', 'transformers')))\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    np.testing.assert_allclose(np.load(folder / "images.npy"), image_vectors, atol=1e-4)
    np.testing.assert_allclose(np.load(folder / "captions.npy"), aligner.encode_captions(list(CAPTIONS)), atol=1e-4)


def test_what_has_no_form_in_onnx_is_refused_by_name(folders, tmp_path, capsys):
    assert "NaFlex" in refused(capsys, "export", folders("naflex"), "--onnx", tmp_path / "onnx")
    tower = SimpleNamespace(tokenizer=object(), config=SimpleNamespace(name="someone/clip"))
    with pytest.raises(ValueError, match="SentencePiece"):
        write_tokenizer(tower, tmp_path)
    assert not (tmp_path / "onnx").exists()


def test_siglip_s_captions_have_the_same_tokens_in_tokenizer_json(folders, tmp_path):
    tower = load_aligner(folders("siglip"), "cpu").text_tower
    write_tokenizer(tower, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    characters = "abcdefghijklmnopqrstuvwxyz      ABC!?.,_-'\"\t\n\u00e9\u00df\u0130\u03a3\u039f\u03c2\ufb01\u2460\u3000\u00a0\x1c\x85\u65e5\u200b\u2581"
    generator = random.Random(0)
    captions = [*CAPTIONS, "", " ", "\u039f\u0394\u039f\u03a3 \u03a3", "a  dog, running!"]
    captions += ["".join(generator.choices(characters, k=generator.randrange(30))) for _ in range(3000)]
    expected = tower.tokenizer(captions, add_special_tokens=True)["input_ids"]
    different = [
        caption for caption, ids in zip(captions, expected, strict=True) if tokenizer.encode(caption).ids != ids
    ]
    assert different == []


@pytest.mark.slow
def test_a_tuned_pair_scorer_as_onnx(folders, tmp_path):
    run = tuned(folders("siglip2"), tmp_path / "run", design="cross")
    export_onnx(tmp_path / "run", tmp_path / "onnx")
    images, captions = drawn_images(3), list(CAPTIONS)
    np.testing.assert_allclose(
        OnnxAligner(tmp_path / "onnx").score(images, captions), run.score(images, captions), rtol=1e-3, atol=1e-3
    )


def test_a_card_names_the_model_it_started_from_and_what_that_was_trained_on(folders, tmp_path):
    named = Path(shutil.copytree(folders("clip"), tmp_path / "named"))
    settings = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(
        json.dumps(settings | {"_name_or_path": "OFA-Sys/chinese-clip-vit-base-patch16"})
    )
    run = tuned(named, tmp_path / "run")
    estimate = {"value": 0.5, "low": None, "high": None}
    figures = {direction: {"recall_at_1": estimate} for direction in ("image_to_text", "text_to_image")}
    (tmp_path / "run" / "results.json").write_text(json.dumps({**figures, "rsum": estimate}))
    split = {"images": 2, "captions": 2, "fingerprint": "0", "contents": {}}
    data = {"layout": "folder", "train": split, "dev": split, "left_out": [], "source": "x"}
    (tmp_path / "run" / "data.json").write_text(json.dumps(data))
    origin = {"kind": "hub", "name": "x", "licence": "apache-2.0", "files": []}
    (tmp_path / "run" / "weights.json").write_text(json.dumps({"image_tower": origin, "text_tower": origin}))
    export_huggingface(tmp_path / "run", tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md", ignore_metadata_errors=False)
    assert card.data.base_model == "OFA-Sys/chinese-clip-vit-base-patch16"
    assert card.data.license == "apache-2.0"
    assert "Wukong" in card.content
    assert "COCO captions: inside" in card.content
    assert str(tmp_path) not in card.content
    reopened = load_aligner(tmp_path / "out", "cpu")
    assert torch.equal(reopened.encode_captions(list(CAPTIONS)), run.encode_captions(list(CAPTIONS)))


@pytest.mark.slow
def test_figures_and_audits_tell_what_a_model_was_pretrained_on(folders, tmp_path, scenes_folder, capsys):
    named = Path(shutil.copytree(folders("clip"), tmp_path / "named"))
    settings = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps(settings | {"_name_or_path": "clip-italian/clip-italian"}))
    main(["evaluate", str(named), "--data", str(scenes_folder)])
    assert "pretraining: made from clip-italian/clip-italian" in capsys.readouterr().out
    # No check, and no verdict: what it was trained on is told, and the checks are those of any model.
    main(["audit", str(named), "--data", str(scenes_folder), "--sample", "12", "--json"])
    results = json.loads(capsys.readouterr().out)
    assert results["pretraining"]["coco"] == "inside"
    assert not any("pretrain" in check["name"] for check in results["checks"])
    main(["evaluate", str(folders("clip")), "--data", str(scenes_folder), "--json"])
    assert json.loads(capsys.readouterr().out)["pretraining"]["known"] is False


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip2", "oc_vit", "oc_hf"])
def test_tokens_are_counted_without_the_model(folders, tmp_path, family):
    aligner, captions = tuned(folders(family), tmp_path / "run"), [*CAPTIONS, *captions_of_every_length()]
    expected = aligner.text_tower.tokenize(captions)
    folder = Path(shutil.copytree(folders(family), tmp_path / "small"))
    for file in folder.iterdir():
        if file.suffix in (".safetensors", ".bin"):
            file.unlink()
    for model in (tmp_path / "run", folder):
        tokenizer = open_tokenizer(model)
        counted = tokenizer.tokenize(captions)
        assert list(counted) == list(expected)
        assert counted.num_truncated == expected.num_truncated
        assert tokenizer.max_tokens == aligner.text_tower.max_tokens
    assert open_tokenizer(folder, 6).max_tokens == 6


def test_vectors_are_written_and_measured(folders, tmp_path, scenes_folder, capsys):
    assert (
        main(["encode", str(folders("siglip2")), "--data", str(scenes_folder), "--out", str(tmp_path / "v.parquet")])
        == 0
    )
    capsys.readouterr()
    main(["evaluate", str(folders("siglip2")), "--data", str(scenes_folder), "--json"])
    expected = json.loads(capsys.readouterr().out)
    main(["evaluate", "--vectors", str(tmp_path / "v.parquet"), "--json"])
    assert json.loads(capsys.readouterr().out)["rsum"]["value"] == pytest.approx(expected["rsum"]["value"])
    assert main(["check", str(scenes_folder), "--tokens", str(folders("siglip2"))]) == 0
    assert "token" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_tower_of_an_index_encodes_as_it_does(folders, tmp_path, family):
    aligner = load_aligner(folders(family), "cpu", packed=False)
    manifest = write_text_tower(aligner, "fingerprint", tmp_path / "text")
    assert manifest["difference"] < 1e-4
    captions = [*CAPTIONS, *captions_of_every_length(), "it\u2019s a dog &amp; a cat"]
    exported = OnnxTextTower(tmp_path / "text")
    np.testing.assert_allclose(exported.encode_captions(captions), aligner.encode_captions(captions), atol=1e-4)
