"""Late interaction against its definition: padding, pruning, blocks, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_rounds_to, assert_same, in_float64
from torch import Tensor
from torch.nn import functional as F

from clipvisionalign.models.late_interaction import (
    LateConfig,
    LateInteraction,
    LateTokens,
    maxsim,
    maxsim_pairs,
    prune_tokens,
)


def captions_of(lengths: list[int], width: int = 6, seed: int = 0) -> LateTokens:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    vectors = F.normalize(torch.randn(*mask.shape, width, generator=generator), dim=-1)
    weights = torch.randn(mask.shape, generator=generator).masked_fill(~mask, -torch.inf).softmax(-1)
    return LateTokens(vectors, weights, mask)


def patches_of(images: int, patches: int, width: int = 6, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(images, patches, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def double_loop(patches: Tensor, captions: LateTokens) -> Tensor:
    """The definition, pair by pair, in float64, padding left out before anything is computed."""
    scores = torch.zeros(len(patches), len(captions.weights), dtype=torch.float64)
    for n, image in enumerate(patches.double()):
        for m, real in enumerate(captions.mask):
            for token, weight in zip(
                captions.vectors[m][real].double(), captions.weights[m][real].double(), strict=True
            ):
                scores[n, m] += weight * max(float(token @ patch) for patch in image)
    return scores


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), images=st.integers(1, 4), patches=st.integers(1, 6),
    seed=st.integers(0, 99), block=st.sampled_from([1, 40, 1 << 24]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_scores_are_the_double_loop(lengths, images, patches, seed, block):
    left, right = patches_of(images, patches, seed=seed), captions_of(lengths, seed=seed + 1)
    expected = double_loop(left, right)
    # A mean, whose weights sum to 1, of products of unit vectors six wide.
    assert_rounds_to(maxsim(left, right, block), expected, terms=7 + 6, size=1.0, steps=2)
    index = torch.tensor([images - 1, 0]), torch.tensor([len(lengths) - 1, 0])
    pairs = maxsim_pairs(left[index[0]], right.select(index[1]))
    assert_rounds_to(pairs, expected[index], terms=7 + 6, size=1.0, steps=2)


def test_padding_adds_nothing_whatever_it_holds():
    torch.manual_seed(0)
    late = LateInteraction(LateConfig(width=8), 10, 12).eval()
    torch.nn.init.normal_(late.token_weight.weight)
    tokens, patch_features = torch.randn(3, 5, 10), torch.randn(4, 9, 12)
    patches, exact = late.project_patches(patch_features), in_float64(late)
    plain = maxsim(patches, late.project_tokens(tokens, torch.ones(3, 5)))
    exact = maxsim(
        exact.project_patches(patch_features.double()), exact.project_tokens(tokens.double(), torch.ones(3, 5))
    )
    padded = torch.cat([tokens, 100 * torch.randn(3, 6, 10)], dim=1)
    mask = torch.cat([torch.ones(3, 5), torch.zeros(3, 6)], dim=1)
    assert_same(maxsim(patches, late.project_tokens(padded, mask)), plain, exact, size=1.0)


def test_gradients_do_not_depend_on_the_blocks():
    torch.manual_seed(0)
    late = LateInteraction(LateConfig(width=8), 10, 12)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5, 2])[:, None]
    tokens, patches = torch.randn(5, 6, 10), torch.randn(4, 9, 12)

    def gradients(late, block: int) -> list[Tensor]:
        dtype = late.token.weight.dtype
        scores = maxsim(late.project_patches(patches.to(dtype)), late.project_tokens(tokens.to(dtype), mask), block)
        (scores * torch.arange(20.0).view(4, 5)).sum().backward()
        grads = [parameter.grad.clone() for parameter in late.parameters() if parameter.grad is not None]
        late.zero_grad()
        return grads

    exact = gradients(in_float64(late), 1 << 24)
    assert len(exact) == 6
    # All are sums over the same scores: what one of them adds up to by chance is no measure of its terms.
    size = float(max(each.abs().max() for each in exact))
    for ours, theirs, right in zip(gradients(late, 1), gradients(late, 1 << 24), exact, strict=True):
        assert_same(ours, theirs, right, size)


def test_pruning_keeps_the_heaviest_and_all_is_no_pruning():
    some = captions_of([6, 4, 1])
    fewer = prune_tokens(some, 2)
    for row in range(3):
        kept = min(2, int(some.mask[row].sum()))
        heaviest = set(some.weights[row].topk(kept).indices.tolist())
        kept_positions = {
            position
            for position in range(6)
            for slot in range(2)
            if fewer.mask[row, slot] and torch.equal(some.vectors[row, position], fewer.vectors[row, slot])
        }
        assert kept_positions == heaviest
        assert int(fewer.mask[row].sum()) == kept
    torch.testing.assert_close(fewer.weights.sum(1), torch.ones(3))
    assert prune_tokens(some, 6) is some
    late = LateInteraction(LateConfig(width=8, keep_tokens=3), 10, 12)
    tokens, mask = torch.randn(2, 7, 10), torch.ones(2, 7)
    assert late.eval().project_tokens(tokens, mask).weights.shape == (2, 3)
    assert late.train().project_tokens(tokens, mask).weights.shape == (2, 7)


def test_an_aligners_table_is_its_pairs_and_prunes(tiny_model):
    import numpy as np
    from PIL import Image

    from clipvisionalign.models.aligner import Aligner

    torch.manual_seed(0)
    aligner = Aligner(tiny_model("late")).eval()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
    captions = ["a red circle", "two small blue squares left of a large green star", "a dog", "a", "three rings"]
    pairs = aligner.pair_scorer(images, captions, batch=2)
    grid = np.indices((4, 5)).reshape(2, -1)
    exact = in_float64(aligner).pair_scorer(images, captions).score_matrix().flatten()
    assert_same(pairs.score_matrix().flatten(), pairs(*grid), exact)
    parts = pairs.components(*grid)
    assert np.abs(parts[:, 1]).max() > 0
    aligner.late.config.keep_tokens = 2
    few = aligner.pair_scorer(images, captions)
    assert max(len(caption.token_vectors) for caption in few.captions) == 2
    assert np.abs(few.score_matrix().flatten() - pairs.score_matrix().flatten()).max() > 1e-4


def test_a_fusion_projects_each_image_once(tiny_model, monkeypatch):
    """1,000 pairs, 8 images: 8 projections, all of them while encoding."""
    import numpy as np
    from PIL import Image

    from clipvisionalign.models.aligner import Aligner

    torch.manual_seed(0)
    aligner = Aligner(tiny_model("cross")).eval()
    projected = []
    plain = aligner.fusion.project_patches
    monkeypatch.setattr(
        aligner.fusion, "project_patches", lambda patches: projected.append(len(patches)) or plain(patches)
    )
    images = [Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in range(0, 240, 30)]
    pairs = aligner.pair_scorer(images, ["a red circle", "a dog"])
    rng = np.random.default_rng(0)
    pairs(rng.integers(8, size=1000), rng.integers(2, size=1000))
    assert sum(projected) == pairs.projection_count == 8
    with pytest.raises(ValueError, match="not a whole table"):
        pairs.score_matrix()
