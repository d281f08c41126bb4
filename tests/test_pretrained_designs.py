"""The four designs on a pretrained dual encoder: before a step they rank as it does by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretrained_models import CAPTIONS, make_pretrained
from test_pretrained import TOLERANCE, drawn_images

from clipvisionalign.models.aligner import Aligner, AlignerConfig, TowerOutputCache
from clipvisionalign.models.causal_attention import causal_attention
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.positions import stretch_positions
from clipvisionalign.models.text_tower import TextTowerConfig
from clipvisionalign.training.feature_cache import tower_fingerprint

LONG = [" ".join(CAPTIONS * repeat) for repeat in (1, 2, 5)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A small CLIP."""
    return make_pretrained("clip", tmp_path_factory.mktemp("models") / "clip")


def sparse(clip: Path, window: int, positions: str = "own") -> Aligner:
    """The sliding-window variant."""
    text = TextTowerConfig(window=window)
    return Aligner(AlignerConfig("sparse", text_tower=text, pretrained=str(clip), positions=positions)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "family", ["clip", "siglip", "naflex", "chinese_clip", "oc_vit", "oc_resnet", "oc_cnn", "oc_hf"]
)
@pytest.mark.parametrize("design", ["self", "late", "cross"])
def test_before_a_step_a_design_ranks_as_the_model_itself(tmp_path, family, design):
    folder = make_pretrained(family, tmp_path / family)
    # One caption longer than a tower reads: two would be one, and their order nobody's.
    images, captions = drawn_images(12), [*CAPTIONS, LONG[2]]
    alone = Aligner(AlignerConfig(pretrained=str(folder))).eval()
    aligner = Aligner(AlignerConfig(design, pretrained=str(folder))).eval()
    assert torch.equal(alone.encode_images(images), aligner.encode_images(images))
    assert torch.equal(alone.encode_captions(captions), aligner.encode_captions(captions))
    expected, scores = alone.score(images, captions), aligner.score(images, captions)
    for axis in (0, 1):
        assert torch.equal(expected.argsort(stable=True, dim=axis), scores.argsort(stable=True, dim=axis))


def test_a_late_interaction_starts_from_the_models_own_projections(clip):
    aligner = Aligner(AlignerConfig("late", late=replace(AlignerConfig().late, width=24), pretrained=str(clip))).eval()
    assert aligner.late is not None
    images, captions = drawn_images(3), list(CAPTIONS)
    pairs = aligner.pair_scorer(images, captions)
    # At the full width nothing is lost: the end-of-text token's cosine with a patch is that of the caption's vector.
    patches = torch.nn.functional.normalize(next(aligner.image_chunks(images)).patches, dim=-1)  # type: ignore[arg-type]
    expected = patches @ aligner.encode_captions(captions).T
    last = torch.stack([caption.token_vectors[-1] for caption in pairs.captions])
    torch.testing.assert_close(pairs.images.patches @ last.T, expected, atol=TOLERANCE, rtol=0)
    assert expected.std() > 0.01


@pytest.mark.parametrize("window", [76, 200])
def test_a_window_over_the_whole_caption_is_dense_attention(clip, window):
    captions = [*CAPTIONS, *LONG]
    dense = Aligner(AlignerConfig(pretrained=str(clip))).eval()
    vectors = sparse(clip, window).encode_captions(captions)
    torch.testing.assert_close(vectors, dense.encode_captions(captions), atol=TOLERANCE, rtol=0)
    assert (sparse(clip, 2).encode_captions(captions) - vectors).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 65, 130, 200])
@pytest.mark.parametrize("window", [1, 3, 16, 64, 150])
def test_causal_windows_are_attention_under_a_mask(length, window):
    torch.manual_seed(length + window)
    q, k, v = (torch.randn(3, 2, length, 8, requires_grad=True) for _ in range(3))
    pooled = torch.randint(length, (3,))
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = ((j <= i) & (i - j <= window))[None] | ((j <= i)[None] & (i[None] == pooled[:, None, None]))
    expected = ((q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask[:, None], -torch.inf)).softmax(-1) @ v
    result = causal_attention(q, k, v, window, pooled)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)
    weight = torch.randn_like(result)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (result, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["stretched", "repeated"])
def test_longer_captions_are_read_and_short_ones_stay_as_they_are(clip, positions):
    own = Aligner(AlignerConfig(pretrained=str(clip))).eval()
    longer = Aligner(AlignerConfig(pretrained=str(clip), positions=positions)).eval()
    assert longer.text_tower.max_tokens == {"stretched": 248, "repeated": 4096}[positions]
    limit = {"stretched": 20, "repeated": 77}[positions]
    captions = [c for c in [*CAPTIONS, *LONG] if len(longer.text_tower.tokenize([c])[0]) <= limit]
    assert len(captions) >= 5
    assert torch.equal(own.encode_captions(captions), longer.encode_captions(captions))
    # Two captions that differ behind the 77th token are one to the model, and two to this one.
    words = LONG[2].split()
    starts = [" ".join(words[:number]) for number in range(1, len(words) + 1)]
    start = next(text for text in starts if len(longer.text_tower.tokenize([text])[0]) > 90)
    ends = [f"{start} {end}" for end in ("a dog", "a red house")]
    assert torch.equal(*own.encode_captions(ends))
    assert (longer.encode_captions(ends)[0] - longer.encode_captions(ends)[1]).abs().max() > 100 * TOLERANCE


def test_stretched_positions_keep_the_first_20_and_pass_through_all_others():
    learned = torch.randn(77, 8)
    stretched = stretch_positions(learned)
    assert stretched.shape == (248, 8)
    assert torch.equal(stretched[:20], learned[:20])
    assert torch.equal(stretched[20::4], learned[20:])
    torch.testing.assert_close(stretched[22], (learned[20] + learned[21]) / 2)


def test_windows_and_positions_survive_saving(clip, tmp_path):
    aligner = sparse(clip, 3, "stretched")
    aligner.save(tmp_path / "run")
    captions = [*CAPTIONS, *LONG]
    reopened = load_aligner(tmp_path / "run", packed=False)
    assert reopened.text_tower.max_tokens == 248
    torch.testing.assert_close(
        reopened.encode_captions(captions), aligner.encode_captions(captions), atol=TOLERANCE, rtol=0
    )


def test_a_tower_without_windows_is_refused_by_name(tmp_path):
    folder = make_pretrained("siglip", tmp_path / "siglip")
    with pytest.raises(ValueError, match=r"siglip.*sliding windows"):
        Aligner(AlignerConfig("sparse", pretrained=str(folder)))
    with pytest.raises(ValueError, match=r"siglip.*positions"):
        Aligner(AlignerConfig(pretrained=str(folder), positions="stretched"))


def test_outputs_of_other_towers_are_not_used_again(clip, tmp_path):
    """What is kept of a tower is known by all that it depends on: its window, its positions, what becomes of patches."""
    towers = {
        "self": Aligner(AlignerConfig(pretrained=str(clip))),
        "late": Aligner(AlignerConfig("late", pretrained=str(clip))),
        "window 2": sparse(clip, 2), "window 3": sparse(clip, 3), "stretched": sparse(clip, 2, "stretched"),
    }  # fmt: skip
    images = {name: tower_fingerprint(aligner.image_tower) for name, aligner in towers.items()}
    assert images["self"] == images["window 2"] != images["late"]
    captions = {name: tower_fingerprint(aligner.text_tower) for name, aligner in towers.items()}
    assert captions["self"] == captions["late"]
    assert len(set(captions.values())) == 4


@pytest.mark.parametrize("family", ["siglip", "clip"])
def test_remembered_captions_score_pairs_as_fresh_ones(tmp_path, family):
    """Padding that a vector depends on is no word of its caption, whether its tower runs or its outputs are kept."""
    aligner = Aligner(AlignerConfig("late", pretrained=str(make_pretrained(family, tmp_path / family)))).eval()
    assert aligner.late is not None
    aligner.late.weight.fill_(1.0)
    images, captions = [tmp_path / f"{n}.png" for n in range(4)], list(CAPTIONS)
    for path, image in zip(images, drawn_images(4), strict=True):
        image.save(path)
    fresh = aligner.score(images, captions)
    aligner.tower_cache = TowerOutputCache()
    for _ in range(2):
        torch.testing.assert_close(aligner.score(images, captions), fresh, atol=1e-4, rtol=1e-5)


def test_the_temperature_of_clip_learns_from_its_limit_on(clip):
    aligner = Aligner(AlignerConfig(pretrained=str(clip)))
    assert aligner.log_scale.item() == pytest.approx(4.6052)
    aligner.scale().backward()
    assert aligner.log_scale.grad is not None
    assert aligner.log_scale.grad.item() == pytest.approx(aligner.scale().item())
