"""timm's backbones at sizes other than their own: built, or refused by name in one line.

One of each way in which they take an image; `benchmarks/towers.py` goes through all of timm's families.
"""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from tolerance import assert_same, in_float64

from clipvisionalign.models.aligner import Aligner, AlignerConfig
from clipvisionalign.models.image_tower import ImageTower, ImageTowerConfig
from clipvisionalign.models.text_tower import TextTowerConfig

#: Backbones, a size that is not their own, and the patches that they then have.
SIZED = {
    "beit_base_patch16_224": (160, 100),
    "cait_xxs24_224": (160, 100),
    "convnext_atto": (160, 25),
    "davit_tiny": (160, 25),
    "deit_tiny_patch16_224": (160, 100),
    "efficientformerv2_s0": (160, 25),
    "efficientvit_b0": (160, 25),
    "efficientvit_m0": (160, 9),
    "fastvit_t8": (160, 25),
    "hiera_tiny_224": (160, 25),
    "sam2_hiera_tiny": (160, 25),
    "samvit_base_patch16_224": (160, 100),
    "swin_tiny_patch4_window7_224": (160, 25),
    "test_coatnet": (192, 36),
    "test_mambaout": (192, 36),
    "test_resnet": (192, 36),
    "test_vit": (192, 144),
    "test_vit_relpos": (192, 144),
    "tiny_vit_5m_224": (160, 25),
    "volo_d1_224": (160, 101),
}

#: Backbones that cannot be had at a size (0 for their own), and the words that tell why.
REFUSED = {
    "crossvit_tiny_240": (0, "is no image tower: it gives its features in several tensors"),
    "eca_halonext26ts": (160, "does not take 160 x 160 pixels; its own size is 256"),
    "efficientformer_l1": (160, "does not take 160 x 160 pixels; its own size is 224"),
    "efficientvim_m1": (0, "is no image tower: it gives its features in several tensors"),
    "mobilenetv5_300m_enc": (0, "is no image tower"),
}


@pytest.mark.parametrize("name", SIZED)
def test_a_backbone_is_built_at_the_size_asked_for(name):
    """Without memory for its weights, as the shapes are all that is asked for."""
    size, patches = SIZED[name]
    with torch.device("meta"):
        tower = ImageTower(ImageTowerConfig(name, weights="random", size=size))
        features = tower(torch.zeros(2, 3, size, size))
    assert tower.image_transform.size == size
    assert features.pooled.shape == (2, tower.width)
    assert features.patches.shape == (2, patches, tower.patch_width)
    assert tower.num_patches == patches


@pytest.mark.parametrize("name", REFUSED)
def test_a_backbone_is_refused_by_name(name):
    size, why = REFUSED[name]
    with torch.device("meta"), pytest.raises(ValueError, match=f"{name}: {why}") as error:
        ImageTower(ImageTowerConfig(name, weights="random", size=size))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["test_vit", "test_vit_relpos", "test_coatnet", "test_resnet", "fastvit_t8"])
def test_weights_are_resampled_for_another_size_as_timm_does(tmp_path, name):
    rival = timm.create_model(name, pretrained=False)
    save_file(rival.state_dict(), tmp_path / "model.safetensors")
    tower = ImageTower(ImageTowerConfig(name, weights=str(tmp_path), size=96)).eval()
    overlay = {"file": str(tmp_path / "model.safetensors"), "custom_load": False, "source": None}
    sized = {"img_size": 96} if name.startswith("test_vit") or "coat" in name else {}
    rival = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **sized).eval()
    pixels = torch.randn(2, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    exact = in_float64(tower)
    with torch.inference_mode():
        expected = rival.forward_head(rival.forward_features(pixels), pre_logits=True)
        assert_same(tower(pixels).pooled, expected, exact(pixels.double()).pooled)


def test_weights_that_cannot_be_resampled_say_so(tmp_path):
    save_file(timm.create_model("levit_128s").state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"attention_biases has another shape at 96 x 96 pixels.*size out"):
        ImageTower(ImageTowerConfig("levit_128s", weights=str(tmp_path), size=96))


def test_patches_may_be_narrower_than_the_pooled_vector(text_folder):
    """MobileNet v3 widens its features after they are pooled."""
    image = ImageTowerConfig("mobilenetv3_small_050", weights="random", size=64)
    aligner = Aligner(AlignerConfig(image_tower=image, text_tower=TextTowerConfig(str(text_folder)), width=32)).eval()
    assert (aligner.image_tower.width, aligner.image_tower.patch_width) == (1024, 288)
    with torch.inference_mode():
        states = aligner.embed_image_features(aligner.image_tower(torch.randn(2, 3, 64, 64)))
    assert (states.vectors.shape, states.patches.shape) == ((2, 32), (2, 4, 32))
