"""Aligners for use elsewhere: ONNX equals PyTorch, and a hub's folder reads back."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from tolerance import assert_as_exact, in_float64, rounding

pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install 'clipvisionalign[onnx]'")
pytest.importorskip("onnxscript", reason="no onnxscript: pip install 'clipvisionalign[onnx]'")

from clipvisionalign.cli import main
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.models.aligner import load_aligner
from clipvisionalign.retrieval import retrieval_metrics
from clipvisionalign.search.export import CAPTIONS, FUSION, IMAGES, OnnxAligner, checked, export_onnx, session


@pytest.fixture(scope="module")
def exported(tiny_runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "cross"
    export_onnx(tiny_runs["cross"], folder, int8=True)
    return folder


@pytest.fixture(scope="module")
def aligner(tiny_runs):
    return load_aligner(tiny_runs["cross"], packed=False)


def test_it_equals_pytorch_over_batches_and_lengths(exported, aligner):
    lengths = (2, 3, 20, 77)
    # The command's own bound, over which it raises, is wide; this is what rounding allows 30 layers.
    assert checked(aligner, exported, batches=(1, 2, 5, 33), lengths=lengths) <= rounding(64, steps=30)


def test_a_file_that_is_not_the_aligners_is_found_out(exported, tiny_runs):
    with pytest.raises(RuntimeError, match="differ from PyTorch's"):
        checked(load_aligner(tiny_runs["self"], packed=False), exported, batches=(2,), lengths=(9,))


def test_the_fusion_gives_the_same_corrections(exported, aligner, scenes_folder):
    paths = sorted((scenes_folder / "images").glob("*.png"))[:3]
    captions = ["a red circle", "two blue stars", "a ring"]
    pairs = aligner.pair_scorer(paths, captions)
    index = np.arange(3)
    expected = pairs.parts(index, index)[:, 2]
    exact = in_float64(aligner).pair_scorer(paths, captions).parts(index, index)[:, 2]
    look = aligner.image_tower.input.look()
    import torch

    pixels = aligner.image_tower.input.scaled(torch.stack([look(path) for path in paths])).numpy()
    patches = session(exported / IMAGES).run(["patches"], {"pixels": pixels})[0]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in aligner.text_tower.tokenize(captions)], batch_first=True,
        padding_value=aligner.text_tower.pad,
    ).numpy()  # fmt: skip
    mask = (ids != aligner.text_tower.pad).astype(np.int64)
    tokens = session(exported / CAPTIONS).run(["tokens"], {"ids": ids, "mask": mask})[0]
    found = session(exported / FUSION).run(["corrections"], {"patches": patches, "tokens": tokens, "mask": mask})[0]
    assert_as_exact(found, expected, exact)


def test_the_exported_aligner_answers_like_every_model(exported, aligner, scenes_folder):
    other = OnnxAligner(exported)
    captions = ["a red circle", "four small green squares above a large ring", ""] * 3
    exact = in_float64(aligner)
    words = (model.encode_captions(captions) for model in (other, aligner, exact))
    assert_as_exact(*words, size=1.0)
    paths = sorted((scenes_folder / "images").glob("*.png"))[:5]
    assert_as_exact(*(model.encode_images(paths) for model in (other, aligner, exact)), size=1.0)
    small = OnnxAligner(exported, int8=True)
    cosines = (small.encode_captions(captions) * other.encode_captions(captions)).sum(axis=1)
    assert cosines.min() > 0.97
    # What 8 bits lose was measured on the run's own dev split.
    told = other.about["int8"]
    dev = read_captioned_images(scenes_folder).split("dev")
    right = retrieval_metrics(small.encode_images(dev.images), small.encode_captions(dev.captions), dev.caption_image)
    assert told["rsum"]["value"] == pytest.approx(right.rsum.value)
    assert told["rsum_change"]["value"] == pytest.approx(told["rsum"]["value"] - told["exact_rsum"]["value"])
    assert told["rsum_change"]["low"] <= told["rsum_change"]["value"] <= told["rsum_change"]["high"]


def test_its_readme_works_as_it_stands(exported, scenes_folder):
    """With onnxruntime, tokenizers, Pillow and NumPy, and without this project."""
    from PIL import Image

    code = (exported / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    Image.open(next((scenes_folder / "images").glob("*.png"))).save(exported / "a.jpg")
    told = "import sys\nsys.modules['torch'] = sys.modules['clipvisionalign'] = None\n" + code + "\nprint(scores.shape)"
    done = subprocess.run([sys.executable, "-c", told], cwd=exported, capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 2)", done.stderr[-800:]


def test_windows_are_refused_with_a_word(tiny_runs, tmp_path, capsys):
    assert main(["export", str(tiny_runs["sparse"]), "--onnx", str(tmp_path / "out")]) == 1
    assert "sliding windows are not exported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_for_a_hub_reads_back(tiny_runs, tmp_path, capsys):
    assert main(["export", str(tiny_runs["late"]), "--huggingface", str(tmp_path / "hub")]) == 0
    captions = ["a red circle", "a blue star"]
    before, after = load_aligner(tiny_runs["late"]), load_aligner(tmp_path / "hub")
    assert (before.encode_captions(captions) == after.encode_captions(captions)).all()
    card = (tmp_path / "hub" / "README.md").read_text()
    rsum = json.loads((tiny_runs["late"] / "results.json").read_text())["rsum"]["value"]
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
