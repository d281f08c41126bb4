"""Adapters beside the layers of pretrained towers: each takes part, and merged they change nothing."""

from __future__ import annotations

import pytest
import torch
from pretrained_models import CAPTIONS, make_pretrained
from test_pretrained import TOLERANCE, drawn_images

from clipvisionalign.batch import group_by_length
from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.training.fine_tuning import LoraConfig, add_lora, layer_indices, merge_lora

#: Projections apart (transformers), packed (open_clip's own), fused (timm's), pooled by attention.
FAMILIES = (
    "clip",
    "siglip",
    "naflex",
    "chinese_clip",
    "vision_text",
    "oc_vit",
    "oc_resnet",
    "oc_timm",
    "oc_cnn",
    "oc_hf",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_takes_part_and_merges(tmp_path, family):
    folder = make_pretrained(family, tmp_path / family)
    images, captions = drawn_images(3), list(CAPTIONS)
    aligner = Aligner(AlignerConfig(pretrained=str(folder))).eval()
    names = set(aligner.state_dict())
    before = aligner.encode_captions(captions), aligner.encode_images(images)
    add_lora(aligner, LoraConfig("both"))
    adapters = {name: parameter for name, parameter in aligner.named_parameters() if "lora_" in name}
    assert len(adapters) >= 20
    # A new adapter changes nothing.
    torch.testing.assert_close(aligner.encode_captions(captions), before[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(aligner.encode_images(images), before[1], atol=TOLERANCE, rtol=0)
    loss = _vectors(aligner, captions) @ _vectors(aligner, images).T
    loss.square().sum().backward()
    assert [name for name, parameter in adapters.items() if parameter.grad is None] == []
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted = aligner.encode_captions(captions), aligner.encode_images(images)
    assert all((one - other).abs().max() > 100 * TOLERANCE for one, other in zip(adapted, before, strict=True))
    merged = merge_lora(aligner)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(merged.encode_captions(captions), adapted[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(merged.encode_images(images), adapted[1], atol=TOLERANCE, rtol=0)
    # The model that is trained on keeps its adapters.
    torch.testing.assert_close(aligner.encode_captions(captions), adapted[0], atol=TOLERANCE, rtol=0)


def _vectors(aligner: Aligner, items: list) -> torch.Tensor:
    if isinstance(items[0], str):
        groups = group_by_length(aligner.text_tower.tokenize(items), aligner.text_tower.pad)
        return torch.cat([aligner.embed_caption_group(group).vectors for group in groups])
    pixels = torch.stack([aligner.image_tower.image_transform.transform()(image) for image in items])
    return aligner.embed_image_features(aligner.image_tower(pixels)).vectors


@pytest.mark.parametrize(
    ("family", "pattern"),
    [("oc_resnet", "image_tower.backbone.layer*"), ("oc_vit", "image_tower.backbone.*attn.out_proj*")],
)
def test_frozen_layers_have_no_adapters(tmp_path, family, pattern):
    aligner = Aligner(AlignerConfig(pretrained=str(make_pretrained(family, tmp_path / family))))
    add_lora(aligner, LoraConfig("both"), [pattern])
    adapted = [name for name, _ in aligner.named_parameters() if "lora_" in name]
    inner = pattern.removeprefix("image_tower.backbone.").strip("*").split(".")[0]
    assert adapted
    assert not [name for name in adapted if name.startswith("image_tower.backbone.") and f".{inner}" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_its_depth(tmp_path, family):
    aligner = Aligner(AlignerConfig(pretrained=str(make_pretrained(family, tmp_path / family))))
    depths = layer_indices(aligner)
    names = {name for name, _ in aligner.named_parameters() if name.startswith(("image_tower.", "text_tower."))}
    assert set(depths) == names
    text = {depth for name, (depth, _) in depths.items() if name.startswith("text_tower.")}
    assert len(text) >= 3
