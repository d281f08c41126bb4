"""Pretrained dual encoders: their vectors, logits and preprocessing are those of the libraries that they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pretrained_models import CAPTIONS, FAMILIES, OPEN_CLIP
from torch.nn import functional as F

from clipvisionalign.explain.heatmaps import explain
from clipvisionalign.models.io import load_aligner

#: Largest difference of a vector's element, or of a logit relative to its scale.
TOLERANCE = 1e-5


class Library:
    """A folder's model as its own library opens it: unit vectors of tokens and pixels, and logits."""

    def __init__(self, folder: Path, family: str) -> None:
        self.is_open_clip, self.family = family in OPEN_CLIP, family
        if self.is_open_clip:
            import open_clip

            self.model, self.preprocess = _open_clip(folder)
            self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        else:
            import transformers

            self.model = transformers.AutoModel.from_pretrained(folder).eval()
            self.preprocess = transformers.AutoImageProcessor.from_pretrained(folder)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def text(self, captions: list[str]) -> torch.Tensor:
        """Captions -> unit vectors (M, D)."""
        if self.is_open_clip:
            return self.model.encode_text(self.tokenizer(captions), normalize=True)
        fixed = (
            {"padding": "max_length", "max_length": 64}
            if "sig" in self.family or self.family == "naflex"
            else {"padding": True}
        )
        inputs = self.tokenizer(captions, truncation=True, return_tensors="pt", **fixed)
        return F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1)

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> torch.Tensor:
        """RGB images -> unit vectors (N, D), by the library's own preprocessing."""
        if self.is_open_clip:
            return self.model.encode_image(torch.stack([self.preprocess(i) for i in images]), normalize=True)
        inputs = self.preprocess(images, return_tensors="pt")
        return F.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)


def _open_clip(folder: Path) -> tuple[Any, Any]:
    import json

    import open_clip

    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    if "hf_model_name" in config["text_cfg"]:
        # open_clip itself asks the hub for the text model's settings.
        config["text_cfg"]["hf_model_name"] = str(folder / "hf_text_config")
        config.pop("custom_text", None)
        model = open_clip.CustomTextCLIP(**config)
        open_clip.load_checkpoint(model, str(folder / "open_clip_model.safetensors"))
        preprocess = open_clip.image_transform(
            config["vision_cfg"]["image_size"], is_train=False, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28),
            interpolation="bicubic", resize_mode="shortest",
        )  # fmt: skip
        return model.eval(), preprocess
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess


def drawn_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Tall and wide images with edges and gradients."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        width, height = (int(side) for side in generator.integers(40, 260, 2))
        y, x = np.mgrid[:height, :width]
        channels = [127 + 120 * np.sin(x / generator.uniform(5, 60) + y / generator.uniform(5, 60)) for _ in range(3)]
        pixels = np.stack(channels, axis=-1).astype(np.uint8)
        pixels[height // 3 : height // 2, : width // 2] = generator.integers(0, 255, 3)
        images.append(Image.fromarray(pixels))
    return images


def captions_of_every_length() -> list[str]:
    """From one word to more than any tower reads."""
    words = " ".join(CAPTIONS).replace(",", "").split()
    return [
        " ".join((words * 6)[start : start + length])
        for start, length in enumerate((1, 2, 3, 5, 8, 13, 30, 60, 75, 90, 130))
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_as_the_library_encodes_them(folders, family):
    aligner, library = load_aligner(folders(family)), Library(folders(family), family)
    captions = [*CAPTIONS, *captions_of_every_length()]
    expected = library.text(captions)
    for count in (1, 5, len(captions)):
        vectors = aligner.encode_captions(captions[:count])
        torch.testing.assert_close(vectors, expected[:count], atol=TOLERANCE, rtol=0)
    # Alone or among longer ones, a caption's vector is the same.
    alone = torch.cat([aligner.encode_captions([caption]) for caption in captions])
    torch.testing.assert_close(alone, expected, atol=TOLERANCE, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_images_as_the_library_prepares_them(folders, family):
    aligner, library = load_aligner(folders(family)), Library(folders(family), family)
    images = drawn_images(20)
    expected = library.images(images)
    vectors = aligner.encode_images(images)
    cosines = (vectors * expected).sum(dim=1)
    assert cosines.min() >= 0.9999, cosines
    # Images differ by much more than that, so that another preprocessing would be seen.
    assert (expected @ expected.T).fill_diagonal_(-1).min() < 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_pixels_give_the_same_vectors(folders, family):
    aligner, library = load_aligner(folders(family)), Library(folders(family), family)
    images = drawn_images(33, seed=1)
    transform = aligner.image_tower.image_transform
    packed = torch.stack([transform.transform()(image) for image in images])
    for count in (1, 33):
        with torch.no_grad():
            vectors = aligner.embed_image_features(aligner.image_tower(packed[:count])).vectors
            if family in OPEN_CLIP:
                expected = library.model.encode_image(transform.normalize(packed[:count]), normalize=True)
            elif family == "naflex":
                patches, mask, grids = transform.unpack(packed[:count])
                features = library.model.get_image_features(
                    pixel_values=patches, pixel_attention_mask=mask.int(), spatial_shapes=grids
                )
                expected = F.normalize(features.pooler_output, dim=-1)
            else:
                features = library.model.get_image_features(pixel_values=transform.normalize(packed[:count]))
                expected = F.normalize(features.pooler_output, dim=-1)
        torch.testing.assert_close(vectors, expected, atol=TOLERANCE, rtol=0)
    captions = library.text(list(CAPTIONS))
    bias = 0.0 if aligner.logit_bias is None else aligner.logit_bias
    logits = vectors @ aligner.encode_captions(list(CAPTIONS)).T * aligner.scale() + bias
    scale, library_bias = library.model.logit_scale.exp(), getattr(library.model, "logit_bias", None)
    expected_logits = scale * expected @ captions.T + (0.0 if library_bias is None else library_bias)
    torch.testing.assert_close(logits, expected_logits, atol=TOLERANCE * scale.item(), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_needs_nothing_else(folders, family, tmp_path):
    aligner = load_aligner(folders(family))
    aligner.save(tmp_path / "run")
    folder = folders(family)
    moved = folder.with_name(f"{family}-away")
    folder.rename(moved)
    try:
        reopened = load_aligner(tmp_path / "run")
        captions, images = list(CAPTIONS), drawn_images(3)
        assert torch.equal(aligner.encode_captions(captions), reopened.encode_captions(captions))
        assert torch.equal(aligner.encode_images(images), reopened.encode_images(images))
        assert torch.equal(aligner.scale(), reopened.scale())
    finally:
        moved.rename(folder)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "naflex"])
def test_a_map_shows_what_carries_the_score(folders, family):
    explanation = explain(load_aligner(folders(family)), drawn_images(1)[0], CAPTIONS[0])
    assert explanation.heatmap.ndim == 2
    assert np.isfinite(explanation.heatmap).all()
    # Not all alike: of a tower that is pooled from its class token, patches count before its last block.
    assert explanation.heatmap.max() > explanation.heatmap.min()


def test_images_of_any_shape_have_no_map_of_one_grid(folders):
    with pytest.raises(ValueError, match=r"naflex: .*NaFlex"):
        explain(load_aligner(folders("naflex")), drawn_images(1)[0], CAPTIONS[0])
