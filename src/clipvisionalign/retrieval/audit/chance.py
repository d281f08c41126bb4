"""Checks against chance: new captions, shuffled partners, blank captions.

Images and captions are dealt to each other at random, and the recall of that dealing is compared with the recalls of
other dealings of the same table of scores. For a model whose scores do not depend on the dealing they are drawn alike,
whatever the model, the numbers of captions and the ties: the test is exact. Of several recalls the one furthest above
its mean counts, in standard deviations (Westfall and Young, "Resampling-Based Multiple Testing", 1993, max T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.audit.answers import _Ask
from clipvisionalign.retrieval.audit.new_inputs import made_captions, mirrored
from clipvisionalign.retrieval.audit.report import _Finding
from clipvisionalign.retrieval.metrics import RECALL_AT

#: Dealings that are drawn to see what chance finds, and the p above which the first of them are enough.
FEW, MANY, CLEAR = 400, 24_000, 0.05

#: What is asked for in the checks against chance, in the order of `_hits`.
RECALLS = [(way, k) for way in ("image to text", "text to image") for k in RECALL_AT]


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
