"""What counts as a tie: equal to the definition, written out in plain Python, in every format and at every scale."""

from __future__ import annotations

from fractions import Fraction
from math import isqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from clipvisionalign.retrieval import audit, evaluate, ranks_of_scores, ranks_of_vectors, retrieval_metrics
from clipvisionalign.retrieval.metrics import chance_recall
from clipvisionalign.retrieval.minimal_pairs import score_minimal_pairs
from clipvisionalign.retrieval.ranks import Positives, WorkerShard
from clipvisionalign.retrieval.rerank import rerank
from clipvisionalign.retrieval.ties import as_numeric_array, tie_thresholds

FORMATS = {
    "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64
}  # fmt: skip
#: The share of its size by which a number of each format counts as rounded.
ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 8 * 2.0**-23, "float64": 8 * 2.0**-52}


def exact(values: torch.Tensor) -> list[list[Fraction]]:
    return [[Fraction(float(value)) for value in row] for row in values.double().tolist()]


def product(x: list[Fraction], y: list[Fraction]) -> Fraction:
    return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))


def length(x: list[Fraction]) -> Fraction:
    square = product(x, x)
    # 2**-100 of itself is exact enough.
    shift = 4 ** (120 - (square.numerator.bit_length() - square.denominator.bit_length()) // 2 if square else 0)
    return Fraction(isqrt(int(square * shift * shift)), shift)


class Undecided(Exception):
    """A gap so near to what rounding can do that float64 may put it on either side."""


def within(gap: Fraction, reach: Fraction, fuzz: float = 1e-6) -> bool:
    if gap and reach and abs(gap / reach - 1) < Fraction(fuzz):
        raise Undecided
    return gap <= reach


def before_by_vectors(x, positive, negative, rounding: float) -> bool:
    """Whether a stranger stands before a partner: it scores higher, or the two are equal up to rounding."""
    sizes = length(x) * (length(positive) + length(negative))
    gap = product(x, positive) - product(x, negative)
    # The product in float64: anywhere up to once what the bound says is decided by how a machine adds up.
    bound = Fraction(2 * (len(x) + 2)) * Fraction(2) ** -53 * sizes
    if gap and bound / 3 < gap < 2 * bound:
        raise Undecided
    distance = length([a - b for a, b in zip(positive, negative, strict=True)])
    return gap <= bound or within(distance, Fraction(rounding) * max(length(positive), length(negative)))


def before_by_scores(positive: float, negative: float, rounding: float) -> bool:
    if negative == -np.inf:
        return False
    a, b = Fraction(positive), Fraction(negative)
    return b >= a or a - b <= Fraction(rounding) * max(abs(a), abs(b))


def ranks_by_definition(queries: int, gallery: int, own, before) -> list[list[int]]:
    """own(q, c): whether candidate c belongs to q; before(q, p, c): whether stranger c stands before partner p."""
    ranks = []
    for q in range(queries):
        negatives = [c for c in range(gallery) if not own(q, c)]
        counts = sorted(sum(before(q, p, c) for c in negatives) for p in range(gallery) if own(q, p))
        ranks.append([count + position for position, count in enumerate(counts, 1)])
    return ranks


def shown(ranks: np.ndarray) -> list[list[int]]:
    return [[rank for rank in row if rank] for row in ranks.tolist()]


def next_up(values: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(values, torch.full_like(values, float("inf")))


@st.composite
def galleries(draw, width: int = 4):
    """Few different vectors, so that ties are many, a digit off here and there; in a format and at a scale."""
    name = draw(st.sampled_from(list(FORMATS)))
    images = draw(st.integers(1, 6))
    extra = draw(st.lists(st.integers(0, images - 1), max_size=8))
    owners = np.array(draw(st.permutations([*range(images), *extra])))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    identity = rng.integers(0, 3, images) if draw(st.booleans()) else None
    # float16 ends at 65,504 and at 6e-5, below which it has fewer digits.
    scale = 10.0 ** draw(st.integers(-12, 12)) if name != "float16" else 10.0 ** draw(st.integers(-2, 3))
    width = draw(st.integers(1, width))
    pool = rng.standard_normal((draw(st.integers(1, 4)), width)) * rng.choice([1.0, 1.0, 0.0], (1, width))
    tables = []
    for rows in (images, len(owners)):
        table = torch.from_numpy(scale * pool[rng.integers(0, len(pool), rows)]).to(FORMATS[name])
        off = torch.from_numpy(rng.random(table.shape) < 0.3) & (table != 0)
        tables.append(torch.where(off, next_up(table), table))
    return name, *tables, owners, identity, rng


@settings(max_examples=120, deadline=None)
@given(galleries(), st.integers(1, 3), st.integers(1, 7))
def test_ranks_of_vectors_are_those_of_the_definition(gallery, workers, block_width):
    name, a, b, owners, identity, _ = gallery
    group = np.arange(len(a)) if identity is None else identity
    x, y = exact(a), exact(b)
    try:
        i2t = ranks_by_definition(
            len(a), len(b), lambda i, c: group[i] == group[owners[c]],
            lambda i, p, c: before_by_vectors(x[i], y[p], y[c], ROUNDING[name]),
        )  # fmt: skip
        t2i = ranks_by_definition(
            len(b), len(a), lambda c, i: group[i] == group[owners[c]],
            lambda c, p, i: before_by_vectors(y[c], x[p], x[i], ROUNDING[name]),
        )  # fmt: skip
    except Undecided:
        assume(False)
    positives = Positives.of(owners, len(a), identity)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipvisionalign.retrieval.ranks.CAPTIONS_PER_BLOCK", block_width)
        patch.setattr("clipvisionalign.retrieval.ranks.SCORES_PER_BLOCK", 2 * block_width)
        counts: list[np.ndarray] = []
        for number in range(workers):
            ranks_of_vectors(a, b, positives, WorkerShard(number, workers, lambda own: (counts.append(own), own)[1]))
        sums = iter([sum(counts[::2]), sum(counts[1::2])])
        actual = ranks_of_vectors(a, b, positives, WorkerShard(0, workers, lambda own: next(sums)))
    assert shown(actual.image_to_text) == i2t
    assert shown(actual.text_to_image) == t2i


@settings(max_examples=150, deadline=None)
@given(galleries(), st.booleans(), st.sampled_from(["none", "-inf", "low", "masked"]))
def test_ranks_of_scores_are_those_of_the_definition_masks_included(gallery, shifted, fill):
    name, a, b, owners, identity, rng = gallery
    group = np.arange(len(a)) if identity is None else identity
    own = group[:, None] == group[owners][None, :]
    scores = a.double() @ b.double().T + (a.double().abs().max() * b.double().abs().max() if shifted else 0)
    scores = scores / max(float(scores.abs().max()), 1e-300) * 10.0 ** int(rng.integers(-3, 4))
    scores = scores.to(FORMATS[name])
    masked = torch.from_numpy((rng.random(own.shape) < 0.3) & ~own) if fill != "none" else torch.zeros(own.shape).bool()
    low = -np.inf if fill == "-inf" else -6e4 if name == "float16" else -1e9
    filled = torch.where(masked, torch.tensor(low, dtype=scores.dtype), scores)
    asked = np.ma.MaskedArray(scores.double().numpy(), masked.numpy()) if fill == "masked" else filled
    table, rounding = filled.double().numpy(), ROUNDING["float64" if fill == "masked" else name]
    if fill == "masked":
        table = np.where(masked.numpy(), -np.inf, table)
    actual = ranks_of_scores(asked, Positives.of(owners, len(a), identity))
    for ranks, of, mine in ((actual.image_to_text, table, own), (actual.text_to_image, table.T, own.T)):
        assert shown(ranks) == ranks_by_definition(
            *of.shape, lambda q, c, mine=mine: mine[q, c],
            lambda q, p, c, of=of: before_by_scores(of[q, p], of[q, c], rounding),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scale"),
    # float16 has no numbers of the two outer scales.
    [
        (name, scale)
        for name in FORMATS
        for scale in (1e-12, 1e-3, 1.0, 1e12)
        if name != "float16" or 1e-3 <= scale <= 1
    ],
)
def test_perfect_vectors_find_everything_at_every_scale(name, scale):
    vectors = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    vectors = (scale * torch.nn.functional.normalize(vectors, dim=1)).to(FORMATS[name])
    metrics = retrieval_metrics(vectors, vectors.repeat_interleave(2, 0), np.arange(80) // 2, resamples=0)
    assert metrics.rsum.value == 600


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block", [(1 << 22, 4096), (1000, 17), (64, 3)])
@pytest.mark.parametrize("noise", [False, True])
def test_a_constant_model_finds_nothing_in_any_format_and_block(name, block, noise, monkeypatch):
    """Neither where its captions differ by the last digit of the format."""
    monkeypatch.setattr("clipvisionalign.retrieval.ranks.SCORES_PER_BLOCK", block[0])
    monkeypatch.setattr("clipvisionalign.retrieval.ranks.CAPTIONS_PER_BLOCK", block[1])
    generator = torch.Generator().manual_seed(0)
    for width in (1, 3, 96):
        one = torch.randn(width, generator=generator, dtype=torch.float64)
        a, b = (one.to(FORMATS[name]).expand(rows, -1).clone() for rows in (30, 90))
        if noise:
            a, b = (torch.where(torch.rand(t.shape, generator=generator) < 0.5, next_up(t), t) for t in (a, b))
        owners = np.arange(90) // 3
        metrics = retrieval_metrics(a, b, owners, resamples=0)
        assert (metrics.ranks.image_to_text[:, 0] == 88).all()
        assert (metrics.ranks.text_to_image[:, 0] == 30).all()
        # As a table of scores, in the same format.
        scores = torch.full((30, 90), 0.3, dtype=FORMATS[name])
        if noise:
            scores = torch.where(torch.rand(scores.shape, generator=generator) < 0.5, next_up(scores), scores)
        table = ranks_of_scores(scores, Positives.of(owners, 30))
        assert (table.image_to_text[:, 0] == 88).all()
        assert (table.text_to_image[:, 0] == 30).all()


def test_a_collapsed_model_of_many_captions_takes_the_quick_way_to_the_same_ranks():
    """Where most vectors are alike, distances come from products: exactly those that are too far stand apart."""
    rng = np.random.default_rng(0)
    one = rng.standard_normal(16)
    b = np.repeat(one[None], 900, 0).astype(np.float32)
    b = np.where(rng.random(b.shape) < 0.5, np.nextafter(b, np.float32(9)), b)
    b[::9] = (b[::9] * (1 - 1e-5)).astype(np.float32)
    a = np.repeat(one[None], 300, 0).astype(np.float32)
    owners = np.arange(900) // 3
    ranks = ranks_of_vectors(a, b, Positives.of(owners, 300))
    apart = np.arange(900) % 9 == 0
    for image in range(300):
        own = owners == image
        counts = sorted((~own & (apart | ~apart[p]) & (~apart | apart[p])).sum() if not apart[p] else (~own).sum()
                        for p in np.flatnonzero(own))  # fmt: skip
        assert ranks.image_to_text[image].tolist() == [count + position for position, count in enumerate(counts, 1)]


def test_nothing_that_another_pair_holds_decides_a_tie():
    """A fill of -1e9, one huge score elsewhere, a pair ahead by 1e-5 at 1,000 in float64."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((20, 20)) + 1000
    scores[np.arange(20), np.arange(20)] = scores.max(axis=1) + 1e-5
    positives = Positives.of(np.arange(20), 20)
    assert (ranks_of_scores(scores, positives).image_to_text == 1).all()
    for fill in (-1e9, -1e30, -np.inf):
        sparse = np.where(rng.random((20, 20)) < 0.5, fill, scores)
        sparse[np.arange(20), np.arange(20)] = np.diag(scores)
        assert (ranks_of_scores(sparse, positives).image_to_text == 1).all()
    model = SimpleNamespace(score=lambda images, captions: scores[np.array(images)])
    assert evaluate(model, list(range(20)), ["a"] * 20, np.arange(20)).metrics.image_to_text["recall_at_1"].value == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.__setitem__((3, 4), np.nan), "NaN and inf for nothing"),
        (lambda s: s.__setitem__((3, 4), np.inf), "NaN and inf for nothing"),
        (lambda s: s.__setitem__((3, 3), -np.inf), "image 3 with its caption 3"),
    ],
)
def test_scores_that_are_none_are_named(change, message):
    scores = np.random.default_rng(0).standard_normal((6, 6))
    change(scores)
    with pytest.raises(ValueError, match=message):
        ranks_of_scores(scores, Positives.of(np.arange(6), 6))


def test_float16_that_ran_over_says_so():
    vectors = np.full((4, 4), np.inf, dtype=np.float16)
    with pytest.raises(ValueError, match=r"image vectors.*number 0.*float16 ends at 65,504"):
        retrieval_metrics(vectors, vectors, np.arange(4))


@given(st.floats(-1e30, 1e30, allow_subnormal=False), st.sampled_from(list(ROUNDING.values())))
@example(4.4383258346162977e-308, 2.0**-10)
def test_the_lowest_score_that_ties_is_the_lowest(score, rounding):
    lowest = tie_thresholds(np.array([score]), rounding)[0]

    def ties(b: float) -> bool:
        return abs(Fraction(score) - Fraction(b)) <= Fraction(rounding) * max(abs(Fraction(score)), abs(Fraction(b)))

    assert ties(lowest)
    assert not ties(np.nextafter(lowest, -np.inf))


def test_tensors_gradients_and_lists_are_taken_in_their_format():
    vectors = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    vectors = torch.nn.functional.normalize(vectors, dim=1).requires_grad_()
    for given_as in (vectors, vectors.to(torch.bfloat16), list(vectors), [v.detach().numpy() for v in vectors],
                     vectors.tolist(), vectors.detach().to_sparse()):  # fmt: skip
        assert retrieval_metrics(given_as, given_as, np.arange(12), resamples=0).rsum.value == 600
    mixed = as_numeric_array([vectors[0].to(torch.bfloat16), vectors[1]])
    assert (mixed.dtype_name, mixed.rounding, mixed.values.dtype) == ("bfloat16", 2.0**-7, np.float32)
    with pytest.raises(ValueError, match=r"entry 1 has the shape \(3,\)"):
        as_numeric_array([np.ones(2), np.ones(3)])
    with pytest.raises(ValueError, match="real numbers"):
        as_numeric_array(np.ones(2, complex))


@pytest.mark.parametrize("name", FORMATS)
def test_re_ranking_and_its_candidates_know_the_same_ties(name):
    """All alike, by vectors and by score: a partner stands behind every stranger, among the candidates and in them."""
    a, b = torch.ones(10, 4, dtype=FORMATS[name]), torch.ones(30, 4, dtype=FORMATS[name])
    b = torch.where(torch.rand(b.shape, generator=torch.Generator().manual_seed(0)) < 0.5, next_up(b), b)
    positives = Positives.of(np.arange(30) // 3, 10)
    noise = np.random.default_rng(0).integers(0, 2, 300).astype(bool)

    def score(images: np.ndarray, captions: np.ndarray) -> torch.Tensor:
        same = torch.full((len(images),), -0.7, dtype=FORMATS[name])
        return torch.where(torch.from_numpy(noise[: len(images)]), next_up(same), same)

    for candidates in (5, 29, 30):
        dual, after = rerank(a, b, positives, score, candidates)
        for ranks in (dual, after):
            assert (ranks.image_to_text == [28, 29, 30]).all()
            assert (ranks.text_to_image[:, 0] == 10).all()


def test_minimal_pairs_tie_pair_by_pair():
    """One pair of huge scores does not make the others ties; vectors of one format off by a digit are a tie."""
    scores = np.array([1e9, 0.5, 0.25, 2e9, 0.4, 0.25])
    model = SimpleNamespace(score_pairs=lambda *_: scores)
    assert score_minimal_pairs(model, ["i"] * 3, ["t"] * 3, ["f"] * 3).tolist() == [0.0, 1.0, 0.5]
    vectors = torch.randn(4, 8, dtype=torch.float64).to(torch.bfloat16)
    model = SimpleNamespace(encode_images=lambda _: vectors,
                            encode_captions=lambda _: torch.cat([vectors, next_up(vectors)]))  # fmt: skip
    assert score_minimal_pairs(model, ["i"] * 4, ["t"] * 4, ["f"] * 4).tolist() == [0.5] * 4


def test_one_string_or_one_image_is_no_list():
    vectors = np.eye(9)
    model = SimpleNamespace(encode_images=lambda i: vectors[: len(i)], encode_captions=lambda c: vectors[: len(c)])
    with pytest.raises(TypeError, match=r"not the one string 'nine dogs': write \['nine dogs'\]"):
        evaluate(model, ["a"] * 9, "nine dogs", np.arange(9))
    with pytest.raises(TypeError, match=r"not the one image 'nine\.jpeg'"):
        evaluate(model, "nine.jpeg", ["a"] * 9, np.arange(9))
    with pytest.raises(TypeError, match="not the one string"):
        audit(model, ["a"] * 9, "nine dogs", np.arange(9))
    with pytest.raises(TypeError, match="not the one string"):
        score_minimal_pairs(model, ["a"] * 9, "nine dogs", ["b"] * 9)
    with pytest.raises(ValueError, match="8 captions, but caption_image has 9"):
        evaluate(model, ["a"] * 9, ["a"] * 8, np.arange(9))


# --- chance, and intervals that were not computed --------------------------------------------------------------------


@pytest.mark.parametrize("identities", [False, True])
def test_chance_is_what_random_rankings_show(identities):
    """Uneven numbers of captions, images that share an identity: 600 random models."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(9), [1, 2, 5, 1, 1, 7, 1, 3, 2])
    identity = np.array([0, 1, 1, 2, 3, 3, 3, 4, 5]) if identities else None
    positives = Positives.of(owners, 9, identity)
    several = []
    for _ in range(600):
        ranks = ranks_of_scores(rng.standard_normal((9, len(owners))), positives)
        several.append([(getattr(ranks, way)[:, 0] <= k).mean() for way in WAYS for k in (1, 5, 10)])
    chance = retrieval_metrics(np.eye(9), np.eye(9)[owners], owners, identity, 0).chance
    expected = np.array([chance[way][f"recall_at_{k}"] for way in WAYS for k in (1, 5, 10)])
    error = np.std(several, axis=0) / np.sqrt(600)
    assert (np.abs(np.mean(several, axis=0) - expected) <= 4 * error + 1e-12).all()
    assert chance["rsum"] == pytest.approx(100 * expected.sum())


WAYS = ("image_to_text", "text_to_image")


def test_chance_by_hand():
    # 8 images with a caption each: 1/8, 5/8, 8/8, both ways: 350; 1,000 with 5 captions each: all but 3.2.
    eight = retrieval_metrics(np.eye(8), np.eye(8), np.arange(8), resamples=0)
    assert eight.to_dict()["chance"]["rsum"] == pytest.approx(2 * 100 * (1 / 8 + 5 / 8 + 1))
    assert chance_recall(np.array([5]), 5000, 1)[0] == pytest.approx(0.001)
    assert chance_recall(np.array([2, 3]), 4, 2).tolist() == pytest.approx([1 - 1 / 6, 1.0])


def test_an_interval_that_was_not_computed_is_none():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((12, 4))
    none = retrieval_metrics(vectors, vectors, np.arange(12), resamples=0).to_dict()
    for figure in (none["rsum"], *none["image_to_text"].values(), *none["text_to_image"].values()):
        assert figure["low"] is None
        assert figure["high"] is None
    # Nothing else can be drawn from one image: no interval either.
    assert retrieval_metrics(vectors[:1], vectors[:1], [0]).rsum.low is None
    some = retrieval_metrics(vectors, rng.standard_normal((12, 4)), np.arange(12)).rsum
    assert some.low < some.value < some.high


@pytest.mark.parametrize("format", [">f2", ">f4", ">f8"])
def test_numbers_of_another_machines_byte_order_are_the_same_numbers(format):
    vectors = np.random.default_rng(0).normal(size=(8, 6)).astype(format)
    own = vectors.astype(vectors.dtype.newbyteorder("="))
    assert (
        retrieval_metrics(vectors, vectors, np.arange(8)).to_dict()
        == retrieval_metrics(own, own, np.arange(8)).to_dict()
    )


@pytest.mark.parametrize("wrong", ["abc", np.ones(32), np.ones((2, 3, 4))])
def test_what_is_no_table_of_vectors_is_told_as_such(wrong):
    with pytest.raises((ValueError, TypeError), match=r"number, width|real numbers"):
        retrieval_metrics(wrong, wrong, np.arange(3))


def test_nested_captions_are_told_apart_from_a_list():
    from clipvisionalign.argument_checks import check_lists

    with pytest.raises(TypeError, match="caption_image"):
        check_lists(captions=[["a dog", "a cat"], ["a bird"]])
