"""Is the figure real: does the model see what it must not, do the splits overlap?

A model that conditions a caption on its true image scores itself, and its recall means nothing. Such a model shows in
what it answers when the true image is not at hand, is not at the same place, or is not the true one: that is what the
checks ask. They need nothing of a model but its answers, so a stranger's model can be put to the test as well.

- *Wrong partners first.* A model may keep what it answered (by text, by image, by object), and may have been evaluated
  before. So the first questions are captions that nobody has asked before, made of halves of the data's own, with
  mirrored images, dealt at random: no memory can answer them. True partners are shown only afterwards.
- *Chance is what other dealings find.* Images and captions are dealt to each other at random, and the recall of that
  dealing is compared with the recalls of other dealings of the same table of scores. For a model whose scores do not
  depend on the dealing they are drawn alike, whatever the model, the numbers of captions and the ties: the test is
  exact. Of several recalls the one furthest above its mean counts, in standard deviations (Westfall and Young,
  "Resampling-Based Multiple Testing", 1993, max T); over all such checks of one audit, an honest model fails with a
  probability of at most `ERROR`.
- *The same pair, the same score.* Scores of one pair may differ by what the rounding of the model's number format can
  do to them, or by a hundredth of the scores' spread, and no more.

What the audit does not see: a model that learned the data's own pairs before, which is what "splits apart" is for; one
that leaks only in lists longer than those that are asked; one that leaks only in its first answers, unless it is given
as it was before it answered anything (or `fresh` makes it so).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from clipvisionalign.images import PictureError, open_picture
from clipvisionalign.lists import check_lists
from clipvisionalign.retrieval.evaluate import can_encode
from clipvisionalign.retrieval.metrics import RECALL_AT
from clipvisionalign.retrieval.ranks import Partners
from clipvisionalign.retrieval.ties import (
    ARITHMETIC,
    NARROW,
    Alike,
    Numbers,
    lengths_of,
    lowest_tying,
    numbers_of,
    product_rounding,
    vectors_of,
)

#: A pair's scores may differ by this share of the scores' spread for the order in which a machine adds up.
TOLERANCE = 1e-2

#: Images in the checks that score a sample pair by pair or encode it anew several times.
SAMPLE = 48
#: Fewer tell nothing: a model that knows all true partners would often be within what `ERROR` allows.
LEAST = 10

#: How often an honest model may fail any of the checks against chance, all of one audit together.
ERROR = 1 / 2000

#: Dealings that are drawn to see what chance finds, and the p above which the first of them are enough.
FEW, MANY, CLEAR = 400, 24_000, 0.05

#: Captions an image that are made for the check with new ones, at most.
NEW_CAPTIONS = 8

#: Pixels on a side that are enough for a mirrored image.
MIRRORED = 512

#: What is asked for in the checks against chance, in the order of `_hits`.
RECALLS = [(way, k) for way in ("image to text", "text to image") for k in RECALL_AT]


@dataclass(frozen=True)
class Check:
    """One check: whether it passed, the figure that decided, and what that means in words."""

    name: str
    passed: bool
    figure: float
    meaning: str


@dataclass(frozen=True)
class AuditReport:
    """All checks of one model on one data set."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


class _Finding(NamedTuple):
    """A check without its name."""

    passed: bool
    figure: float
    meaning: str


# --- asking a model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """What a model answered of N images and M captions.

    scores: (N, M) float64; bar: (N, M) what another pair has to score to tie with a pair or to stand before it; format:
    the model's number format; rounding: by how much that can change a score; images, captions: the vectors, if any.
    """

    scores: np.ndarray
    bar: np.ndarray
    format: str
    rounding: float
    images: Numbers | None = None
    captions: Numbers | None = None

    def ranks(self) -> tuple[np.ndarray, np.ndarray]:
        """(N, M) twice: each pair's caption among all captions for its image, and its image among all images.

        1 is the first, ties count against the pair, and captions of one image are not left out.
        """
        images, captions = self.scores.shape
        same_image, same_caption = _alike(self.images, images), _alike(self.captions, captions)
        forth = [((self.scores >= self.bar[:, [c]]) | same_caption[c]).sum(axis=1) for c in range(captions)]
        back = [((self.scores >= self.bar[i]) | same_image[i][:, None]).sum(axis=0) for i in range(images)]
        return np.stack(forth, axis=1), np.stack(back)


def _alike(vectors: Numbers | None, number: int) -> np.ndarray:
    """Which of a table's vectors are one vector, as `ties` says (number, number); none where there are no vectors."""
    if vectors is None:
        return np.zeros((number, number), dtype=bool)
    a, b = np.indices((number, number)).reshape(2, -1)
    return Alike(vectors, lengths_of(vectors.values))(a, b).reshape(number, number)


#: ask(images, captions) -> the table of their scores
_Ask = Callable[[Sequence[Any], Sequence[str]], _Table]


class _Answers:
    """Asks a model for a table of scores, whichever way it answers; a table of another form is told as an error."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encodes = can_encode(model)
        self.scores = hasattr(model, "score")
        if not (self.encodes or self.scores):
            name = type(model).__name__
            raise TypeError(f"{name} answers neither encode_images and encode_captions, nor score: nothing to audit")

    def ways(self) -> list[tuple[str, _Ask]]:
        """Every way in which the model answers, each asked on its own."""
        ways: list[tuple[str, _Ask]] = []
        if self.encodes:
            ways.append(("vectors", self.by_vectors))
        if self.scores:
            ways.append(("score", self.by_score))
        return ways

    def by_vectors(self, images: Sequence[Any], captions: Sequence[str]) -> _Table:
        left = vectors_of(self.model.encode_images(images), "image")
        right = vectors_of(self.model.encode_captions(captions), "caption")
        table = _products(left, right)
        _check_form(table.scores, len(images), len(captions))
        return table

    def by_score(self, images: Sequence[Any], captions: Sequence[str]) -> _Table:
        numbers = numbers_of(self.model.score(images, captions))
        _check_form(numbers.values, len(images), len(captions))
        scores = numbers.values.astype(np.float64)
        name, rounding = _narrowest_format(numbers)
        largest = float(np.abs(scores).max(initial=0.0))
        return _Table(scores, lowest_tying(scores, numbers.rounding), name, 2 * rounding * largest)


def _products(images: Numbers, captions: Numbers) -> _Table:
    """The table of two tables of vectors. Raises ValueError for vectors of different widths."""
    width = images.values.shape[1]
    if width != captions.values.shape[1]:
        raise ValueError(f"image vectors are {width} wide, caption vectors {captions.values.shape[1]}")
    scores = images.values.astype(np.float64) @ captions.values.astype(np.float64).T
    sizes = np.outer(lengths_of(images.values), lengths_of(captions.values))
    exact = product_rounding(width)
    name, rounding = max((_format_of_vectors(images), _format_of_vectors(captions)), key=lambda found: found[1])
    # Either vector may be another one by the rounding of its format, and still counts as the same: `ties.Alike`.
    reach = (2 * rounding + exact) * float(sizes.max(initial=0.0))
    return _Table(scores, scores - exact * sizes, name, reach, images, captions)


def _check_form(scores: np.ndarray, images: int, captions: int) -> None:
    if scores.shape != (images, captions):
        raise ValueError(f"gave {scores.shape} for {images} images and {captions} captions")
    if not np.isfinite(scores).all():
        raise ValueError("gave scores that are not finite")


def _narrowest_format(numbers: Numbers) -> tuple[str, float]:
    """The narrowest format that holds all of the numbers exactly, and its rounding as in `numbers_of`.

    A model that computes in bfloat16 and then gives float32 has rounded as bfloat16 does.
    """
    if not numbers.format.startswith("float"):
        return numbers.format, numbers.rounding
    single = np.ascontiguousarray(numbers.values, dtype=np.float32)
    if not (single == numbers.values).all():
        return numbers.format, numbers.rounding
    if not (single.view(np.uint32) & 0xFFFF).any():
        return "bfloat16", NARROW["bfloat16"]
    with np.errstate(over="ignore"):
        half = single.astype(np.float16)
    if (half == single).all():
        return "float16", NARROW["float16"]
    return "float32", ARITHMETIC * float(np.finfo(np.float32).eps)


def _format_of_vectors(vectors: Numbers) -> tuple[str, float]:
    """`_narrowest_format`, also of vectors that were computed in bfloat16 and brought to unit length in more digits."""
    name, rounding = _narrowest_format(vectors)
    rows = [row / np.abs(row).max() for row in vectors.values[:2].astype(np.float64) if row.any()]
    if rounding >= NARROW["float16"] or vectors.values.shape[1] < 8 or not rows:
        return name, rounding
    # bfloat16 has 128 numbers between powers of 2: one of them was the largest, which tells what all were divided by.
    for row in rows:
        scaled = row * (1.0 + np.arange(128) / 128)[:, None]
        mantissa, power = np.frexp(scaled)
        rounded = np.ldexp(np.round(256 * mantissa) / 256, power)
        close = np.abs(scaled - rounded) <= 4 * float(np.finfo(np.float32).eps) * np.abs(scaled)
        # Steps of one size for large and small numbers are those of whole numbers, int8's for one.
        whole = np.abs(128 * scaled - np.round(128 * scaled)) <= 1e-4
        if whole.all(axis=1).any() or not close.all(axis=1).any():
            return name, rounding
    return "bfloat16", NARROW["bfloat16"]


# --- the audit -------------------------------------------------------------------------------------------------------


def audit(
    model: Any,
    images: Sequence[Any],
    captions: Sequence[str],
    caption_image: Any,
    identity: Any = None,
    split_overlap: Sequence[str] | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    caption_group: Any = None,
    fresh: Callable[[], Any] | None = None,
) -> AuditReport:
    """Put a model to the test: new captions, shuffled partners, blank captions, alone, rectangular, splits apart.

    model: answers `encode_images` and `encode_captions`, or `score`, or both, in which case both are tested. It may
    round as the format of its answers does, or bfloat16 where vectors were widened, and scaled, only after that.
    images (N): whatever the model takes; captions (M); caption_image: (M,) each caption's image.
    identity: (N,) or None, caption_group: (M,) or None, as in `retrieval_metrics`.
    split_overlap: pictures found in two splits (`data.check` finds them), None where there is one split only, in which
    case that check is left out. sample: images in the checks, drawn with `seed`.
    fresh: makes the model as it was before it was asked anything; each way of answering is then first put to the test
    with wrong partners in a model of its own. Without it `model` is asked, with wrong partners before true ones.
    Raises TypeError for a model that answers neither way and for one image or one string where a list belongs,
    ValueError for too small a sample.
    """
    check_lists(images, captions)
    answers = _Answers(model)
    partners = Partners.of(caption_image, len(images), identity, caption_group)
    rng = np.random.default_rng(seed)
    chosen = audited_images(partners, sample, rng)
    some_images = [images[image] for image in chosen]
    own_captions = [[captions[caption] for caption in own] for own in _captions_of(partners, chosen)]
    some_captions = [own[0] for own in own_captions]
    each = max(1, min(NEW_CAPTIONS, len(captions) // len(images)))
    ways = answers.ways()
    level = ERROR / (3 * len(ways))
    wrong = []
    for number, (way, asked) in enumerate(ways):
        ask = asked if fresh is None else _Answers(fresh()).ways()[number][1]
        wrong.append([
            _told("new captions", way, _new_captions, ask, some_images, captions, each, level, rng),
            _told("shuffled partners", way, _shuffled, ask, some_images, own_captions, level, rng),
            _told("blank captions", way, _blank, ask, some_images, level, rng),
        ])  # fmt: skip
    checks = []
    for (way, ask), asked_wrong in zip(ways, wrong, strict=True):
        together = cache(lambda ask=ask: ask(some_images, some_captions))
        checks.append(_told("alone", way, _alone, ask, together, some_images, some_captions, rng))
        if way == "vectors":
            name = "alone, other images before"
            checks.append(_told(name, way, _after_others, answers.model, some_images, some_captions))
        checks.append(_told("rectangular", way, _rectangular, ask, together, some_images, some_captions))
        checks += asked_wrong
    if split_overlap is not None:
        count = len(split_overlap)
        told = (
            f"{count} pictures stand in two splits, such as {split_overlap[0]}" if count else "no picture in two splits"
        )
        checks.append(Check("splits apart", not count, float(count), told))
    return AuditReport(checks)


def audited_images(partners: Partners, sample: int, rng: np.random.Generator) -> np.ndarray:
    """The images that an audit asks about, `sample` at most. Raises ValueError where they are too few to tell
    anything."""
    apart = _apart(partners, rng)
    chosen = np.sort(rng.choice(apart, size=min(sample, len(apart)), replace=False))
    if len(chosen) < LEAST:
        told = (
            ""
            if len(apart) == partners.images
            else f" of {partners.images} among which no two have a caption in common"
        )
        raise ValueError(f"an audit needs at least {LEAST} images, not {len(chosen)}{told}")
    return chosen


def _apart(partners: Partners, rng: np.random.Generator) -> np.ndarray:
    """Images of which no caption belongs to another of them: dealt to it, that caption would not be wrong."""
    if partners.caption_group is None:
        identity = np.arange(partners.images) if partners.identity is None else partners.identity
        return np.unique(identity, return_index=True)[1]
    pair_images, pair_captions = partners.pairs()
    groups = partners.caption_group[pair_captions]
    starts = np.searchsorted(pair_images, np.arange(partners.images + 1))
    taken = np.zeros(len(groups), dtype=bool)
    kept = []
    for image in rng.permutation(partners.images):
        own = groups[starts[image] : starts[image + 1]]
        if not taken[own].any():
            taken[own] = True
            kept.append(int(image))
    return np.array(sorted(kept))


def _captions_of(partners: Partners, images: np.ndarray) -> list[np.ndarray]:
    """The numbers of each image's captions: its own, or where it has none, those that its identity or group brings."""
    pair_images, pair_captions = partners.pairs()
    found = []
    for image in images:
        own = np.flatnonzero(partners.caption_image == image)
        first, last = np.searchsorted(pair_images, [image, image + 1])
        found.append(own if len(own) else pair_captions[first:last])
    return found


def _told(name: str, way: str, check: Callable[..., _Finding], *arguments: Any) -> Check:
    """Run a check; a model that cannot answer what it asks has failed it, and the reason is told."""
    try:
        found = check(*arguments)
    except Exception as error:
        found = _Finding(False, float("nan"), f"the model could not answer: {' '.join(str(error).split())}")
    return Check(f"{name} ({way})", *found)


# --- the same pair, the same score -----------------------------------------------------------------------------------


def _change(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max(initial=0.0))


def _same(change: float, table: _Table, what: str, reason: str) -> _Finding:
    """change: the largest of a pair's score; table: what it is held against; reason: told where it is too large."""
    spread = max(float(np.std(table.scores)), 1e-6 * float(np.abs(table.scores).max(initial=0.0)))
    tolerance, of = max(
        (TOLERANCE * spread, "1 % of the scores' spread"), (table.rounding, f"rounding in {table.format}")
    )
    passed = bool(change <= tolerance)
    told = f"{what} {'stays the same' if passed else 'does not stay the same'}: a score changes by at most {change:.2g}"
    told += f", {'within' if passed else 'above'} the tolerance of {tolerance:.2g} ({of})"
    return _Finding(passed, change, told if passed else f"{told}: {reason}")


def _alone(
    ask: _Ask, together: Callable[[], _Table], images: list[Any], captions: list[str], rng: np.random.Generator
) -> _Finding:
    """Scores of pairs: all together, in another order, and each alone."""
    scores = together().scores
    rows, columns = rng.permutation(len(images)), rng.permutation(len(captions))
    shuffled = ask([images[i] for i in rows], [captions[c] for c in columns])
    worst = _change(scores[np.ix_(rows, columns)], shuffled.scores)
    for i, c in zip(rows[:8], columns[:8], strict=False):
        for image, caption in ((i, c), (i, i % len(captions))):
            alone = ask([images[image]], [captions[caption]]).scores[0, 0]
            worst = max(worst, abs(float(alone - scores[image, caption])))
    kind = "scores" if shuffled.images is None else "vectors"
    reason = f"its {kind} depend on what else is in the batch, as with batch norm in training or int8 ranges of a batch"
    return _same(worst, together(), "a pair's score, alone or in any batch and order,", reason)


def _after_others(model: Any, images: list[Any], captions: list[str]) -> _Finding:
    """Caption vectors: after their own images were encoded, and after quite other ones; image vectors: once more."""

    def vectors(some_images: list[Any]) -> tuple[Numbers, Numbers]:
        left = vectors_of(model.encode_images(some_images), "image")
        right = vectors_of(model.encode_captions(captions), "caption")
        if len(left.values) != len(some_images) or len(right.values) != len(captions):
            told = f"{len(some_images)} images and {len(captions)} captions"
            raise ValueError(f"gave {len(left.values)} and {len(right.values)} vectors for {told}")
        return left, right

    half = max(1, len(images) // 2)
    left, right = vectors(images)
    left_again, right_again = vectors(images[::-1][:half])
    table = _products(left, right)
    worst = max(
        _change(table.scores, _products(left, right_again).scores),
        _change(table.scores[::-1][:half], _products(left_again, right).scores),
    )
    reason = "its vectors depend on what was encoded before"
    return _same(worst, table, "a caption's vector, after other images than its own, and an image's,", reason)


def _rectangular(ask: _Ask, together: Callable[[], _Table], images: list[Any], captions: list[str]) -> _Finding:
    """Fewer images than captions, and more: the same scores as in the square case."""
    scores = together().scores
    few = max(2, len(images) // 3)
    tall, wide = ask(images, captions[:few]), ask(images[-few:], captions)
    worst = max(_change(scores[:, :few], tall.scores), _change(scores[-few:], wide.scores))
    reason = "it depends on how many others are asked"
    return _same(worst, together(), "a score among N images and M captions, N and M unrelated,", reason)


# --- no more than chance ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dealt:
    """Groups of captions dealt to N images, and what every other dealing of them would have found.

    hits: (6, N, N) what group g dealt to image i adds to each of `RECALLS`; dealt: (N,) the group of each image; apart:
    whether group i is image i's own, which it is never dealt.
    """

    hits: np.ndarray
    dealt: np.ndarray
    apart: bool

    def recalls(self, dealings: np.ndarray) -> np.ndarray:
        """Dealings (R, N) -> their recalls (6, R)."""
        images = np.arange(len(self.dealt))
        parts = [
            self.hits[:, images, dealings[start : start + 4000]].sum(axis=2) for start in range(0, len(dealings), 4000)
        ]
        return np.concatenate(parts, axis=1)

    def chance(self) -> np.ndarray:
        """The mean of each recall over all dealings (6,): any group is as likely for an image as any other."""
        count = len(self.dealt)
        own = np.trace(self.hits, axis1=1, axis2=2) if self.apart else 0.0
        return (self.hits.sum(axis=(1, 2)) - own) / (count - self.apart)


def _dealings(rng: np.random.Generator, number: int, count: int, apart: bool) -> np.ndarray:
    """(number, count) orders of `count` groups, each as likely; apart: among those with none in its own place."""
    found = np.empty((0, count), dtype=np.int64)
    while len(found) < number:
        # One in e has none in its own place.
        drawn = rng.random((min(4000, 3 * number + 8 if apart else number), count)).argsort(axis=1)
        found = np.concatenate([found, drawn[(drawn != np.arange(count)).all(axis=1)] if apart else drawn])
    return found[:number]


def _deal(ask: _Ask, images: list[Any], groups: list[list[str]], apart: bool, rng: np.random.Generator) -> _Dealt:
    """Deal groups of captions to images, ask in random order as if each group were its image's, and find the hits."""
    count = len(images)
    order, dealt = rng.permutation(count), _dealings(rng, 1, count, apart)[0]
    asked = [groups[dealt[image]] for image in order]
    table = ask([images[image] for image in order], [caption for group in asked for caption in group])
    found = _hits(*table.ranks(), np.array([len(group) for group in asked]))
    hits = np.empty_like(found)
    hits[:, order[:, None], dealt[order][None, :]] = found
    return _Dealt(hits, dealt, apart)


def _hits(image_to_text: np.ndarray, text_to_image: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Ranks of all pairs (N, M) twice, M captions in groups of `sizes` -> what each group adds to recalls (6, N, G).

    An image is found if any caption of the group is; of captions each counts.
    """
    images, captions = image_to_text.shape
    starts = np.cumsum(sizes) - sizes
    forth = [np.logical_or.reduceat(image_to_text <= k, starts, axis=1) / images for k in RECALL_AT]
    back = [np.add.reduceat((text_to_image <= k).astype(np.float64), starts, axis=1) / captions for k in RECALL_AT]
    return np.stack(forth + back)


def _at_chance(several: list[_Dealt], what: str, level: float, rng: np.random.Generator) -> _Finding:
    """Whether the recalls of what was dealt are such as other dealings show.

    level: the probability with which an honest model may fail. Few dealings are drawn first: only what they leave open
    is settled by many, which does not change that probability, as it takes both to fail.
    """
    found = np.concatenate([dealt.recalls(dealt.dealt[None]) for dealt in several])
    for number in (FEW, MANY):
        drawn = [dealt.recalls(_dealings(rng, number, len(dealt.dealt), dealt.apart)) for dealt in several]
        found = np.concatenate([found, np.concatenate(drawn)], axis=1)
        spread = found.std(axis=1, keepdims=True)
        above = (found - found.mean(axis=1, keepdims=True)) / np.where(spread > 1e-12, spread, np.inf)
        highest = above.max(axis=0)
        p = float((highest >= highest[0] - 1e-9).mean())
        if p > CLEAR:
            break
    passed = bool(p > level)
    worst = int(above[:, 0].argmax())
    recall, chance = float(found[worst, 0]), float(np.concatenate([dealt.chance() for dealt in several])[worst])
    way, k = RECALLS[worst % len(RECALLS)]
    told = f"{what}, recall at {k} ({way}) is {recall:.3f} where chance is {chance:.3f}: "
    told += ("within chance" if p > CLEAR else "not far enough above chance to tell") if passed else "far above chance"
    told += f" (p = {p:.2g}; {'only ' if passed else ''}below {level:.2g} is too much for chance)"
    return _Finding(passed, recall, told if passed else f"{told}: the model knows the answer from somewhere else")


def _new_captions(
    ask: _Ask, images: list[Any], captions: Sequence[str], each: int, level: float, rng: np.random.Generator
) -> _Finding:
    """Captions that nobody has asked before, with images likewise where they can be made: as many captions an image as
    the data has, and one each."""
    made = made_captions(captions, len(images) * (each + 1), rng)
    several = [made[start : start + each] for start in range(0, len(images) * each, each)]
    single = [[caption] for caption in made[len(images) * each :]]
    with mirrored(images) as new_images:

        def dealt(groups: list[list[str]]) -> tuple[_Dealt, bool]:
            if new_images is not None:
                try:
                    return _deal(ask, new_images, groups, False, rng), True
                except Exception:
                    # A model that looks its images up has none but the data's own.
                    pass
            return _deal(ask, images, groups, False, rng), False

        found = [dealt(groups) for groups in ([several, single] if each > 1 else [single])]
    of = "mirrored images" if all(new for _, new in found) else "the data's own images"
    return _at_chance([table for table, _ in found], f"with new captions dealt to {of}", level, rng)


def _shuffled(
    ask: _Ask, images: list[Any], own_captions: list[list[str]], level: float, rng: np.random.Generator
) -> _Finding:
    """Give every image the captions of another, as if they were its own."""
    return _at_chance([_deal(ask, images, own_captions, True, rng)], "with captions dealt to wrong images", level, rng)


def _blank(ask: _Ask, images: list[Any], level: float, rng: np.random.Generator) -> _Finding:
    """Give every image the same words."""
    dealt = _deal(ask, images, [["a picture"]] * len(images), False, rng)
    return _at_chance([dealt], "with every caption the same", level, rng)


# --- what nobody has asked before ------------------------------------------------------------------------------------


def made_captions(captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions that differ from each other and from all of `captions`: the first half of one and the second
    half of another, and where that is one of them, more of their words.

    >>> made_captions(["a black dog", "the cat sleeps"], 2, np.random.default_rng(0))
    ['the black dog', 'the black dog black']
    """
    taken = {str(caption) for caption in captions}
    some = [str(captions[int(number)]).split() for number in rng.permutation(len(captions))[:1000]]
    # Numbers are left out: to some models they are not words, but places in a table.
    words = sorted({word for caption in some for word in caption if word.isalpha()}) or ["and"]
    made: list[str] = []
    while len(made) < count:
        first = int(rng.integers(len(some)))
        second = (first + 1 + int(rng.integers(max(1, len(some) - 1)))) % len(some)
        half, rest = some[first][: len(some[first]) // 2], some[second][len(some[second]) // 2 :]
        caption = " ".join(half + rest)
        while caption in taken:
            caption = f"{caption} {words[int(rng.integers(len(words)))]}".strip()
        taken.add(caption)
        made.append(caption)
    return made


@contextmanager
def mirrored(images: Sequence[Any]) -> Iterator[list[Any] | None]:
    """The images mirrored, each in the form in which it came: arrays, tensors, Pillow images, files and their bytes.

    Files lie in a temporary folder for so long. An image of another form stays as it is; None if all do.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = [_mirror(image, Path(folder) / f"{number}.jpg") for number, image in enumerate(images)]
        if all(image is None for image in made):
            yield None
        else:
            yield [image if new is None else new for new, image in zip(made, images, strict=True)]


def _mirror(image: Any, file: Path) -> Any:
    if isinstance(image, np.ndarray) and image.ndim:
        return np.ascontiguousarray(image[..., ::-1])
    if hasattr(image, "detach") and image.ndim:
        return image.flip(-1)
    if isinstance(image, Image.Image):
        return ImageOps.mirror(image)
    if not isinstance(image, (bytes, str, os.PathLike)):
        return None
    try:
        opened = open_picture(image if isinstance(image, (bytes, str)) else Path(image), MIRRORED)
        ImageOps.mirror(opened).save(file, quality=95)
    except (PictureError, OSError):
        return None
    if isinstance(image, bytes):
        return file.read_bytes()
    return str(file) if isinstance(image, str) else file
