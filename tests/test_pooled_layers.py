"""The last layer run for the pooled token alone: the same vectors, gradients and graphs, less work."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from pretrained_models import CAPTIONS, FAMILIES, make_pretrained
from torch.utils.flop_counter import FlopCounterMode

from clipvisionalign.batch import group_by_length
from clipvisionalign.models.io import load_aligner

#: Families whose text, and whose images, need of the last layer one token alone.
TEXT = {
    "clip", "chinese_clip", "siglip", "siglip2", "naflex", "vision_text", "oc_vit", "oc_quickgelu", "oc_resnet",
    "oc_timm", "oc_cnn",
}  # fmt: skip
IMAGES = {"clip", "chinese_clip", "oc_vit", "oc_quickgelu", "oc_siglip", "oc_hf"}


@pytest.fixture(scope="module")
def aligners(tmp_path_factory):
    made = {}

    def of(family):
        if family not in made:
            made[family] = load_aligner(make_pretrained(family, tmp_path_factory.mktemp("models") / family))
        return made[family]

    return of


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def assert_same_gradients(model, first, second):
    """first, second: calls whose sums have the same gradients in all parameters."""
    gradients = []
    for call in (first, second):
        model.zero_grad()
        call().square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        there = gradients[1].get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(there, gradient, atol=1e-5 * max(1.0, gradient.abs().max().item()), rtol=1e-4)
    assert gradients[1].keys() <= gradients[0].keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_pooled_alone_are_those_pooled_among_all_tokens(aligners, family):
    tower = copy.deepcopy(aligners(family).text_tower).eval()
    captions = [*CAPTIONS, " ".join(["a dog on the grass"] * 30)]
    for group in group_by_length(tower.tokenize(captions), tower.pad):
        with torch.no_grad():
            pooled, _ = tower.encode(group.ids, group.mask)
            torch.testing.assert_close(tower.encode_pooled(group.ids, group.mask), pooled, atol=2e-6, rtol=1e-5)
            assert tower(group.ids, group.mask, want_tokens=False).tokens is None
            all_tokens = flops(lambda group=group: tower.encode(group.ids, group.mask))
            one = flops(lambda group=group: tower.encode_pooled(group.ids, group.mask))
            assert one < all_tokens if family in TEXT else one == all_tokens
        assert_same_gradients(
            tower,
            lambda group=group: tower.encode(group.ids, group.mask)[0],
            lambda group=group: tower.encode_pooled(group.ids, group.mask),
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_images_pooled_alone_are_those_pooled_among_all_patches(aligners, family):
    tower = copy.deepcopy(aligners(family).image_tower).eval()
    for count in (1, 4):
        pixels = tower.image_transform.random_pixels(count)
        assert not tower.pools_patches
        with torch.no_grad():
            alone = tower(pixels)
            assert alone.patches.shape[:2] == (count, 0) == (count, tower.patch_count)
            one = flops(lambda pixels=pixels: tower(pixels))
            tower.pools_patches = True
            among = tower(pixels)
            assert among.patches.shape[1] == tower.num_patches == tower.patch_count
            torch.testing.assert_close(alone.pooled, among.pooled, atol=2e-6, rtol=1e-5)
            tower.pools_patches = False
            if family != "naflex":
                every = flops(lambda pixels=pixels: tower.pool(tower.feature_map(pixels)))
                assert one < every if family in IMAGES else one == every
        if family != "naflex" and count == 4:
            assert_same_gradients(
                tower,
                lambda pixels=pixels: tower.pool(tower.feature_map(pixels)),
                lambda pixels=pixels: tower(pixels).pooled,
            )


@pytest.mark.parametrize("family", ["clip", "siglip", "oc_vit"])
def test_a_copy_of_a_model_pools_alone_as_well(aligners, family):
    aligner = aligners(family)
    expected = aligner.encode_captions(list(CAPTIONS))
    for other in (copy.deepcopy(aligner), pickle.loads(pickle.dumps(aligner))):
        assert torch.equal(other.encode_captions(list(CAPTIONS)), expected)


def test_a_sliding_window_keeps_its_own_attention(aligners):
    """The end-of-text token still attends to all, the tokens before it to their window: not what a dense layer gives."""
    tower = copy.deepcopy(aligners("clip").text_tower).eval()
    group = group_by_length(tower.tokenize([CAPTIONS[2]]), tower.pad)[0]
    with torch.no_grad():
        dense = tower.encode_pooled(group.ids, group.mask)
        tower.use_window(1)
        windowed = tower.encode_pooled(group.ids, group.mask)
        assert torch.equal(windowed, tower.encode(group.ids, group.mask)[0])
        assert (windowed - dense).abs().max() > 1e-3
