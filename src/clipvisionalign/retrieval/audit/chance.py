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

from clipvisionalign.retrieval.audit.answers import ScoreQuery
from clipvisionalign.retrieval.audit.new_inputs import make_captions, mirrored_images
from clipvisionalign.retrieval.audit.report import Finding
from clipvisionalign.retrieval.metrics import RECALL_AT

#: Dealings that are drawn to see what chance finds, and the p above which the first of them are enough.
FIRST_DRAWS, MAX_DRAWS, EARLY_STOP_P = 400, 24_000, 0.05

#: What is asked for in the checks against chance, in the order of `_recall_hits`.
RECALLS = [(way, k) for way in ("image to text", "text to image") for k in RECALL_AT]


@dataclass(frozen=True)
class _Assignment:
    """Groups of captions dealt to N images, and what every other dealing of them would have found.

    hits: (6, N, N) what group g dealt to image i adds to each of `RECALLS`; assigned: (N,) the group of each image;
    excludes_own:
    whether group i is image i's own, which it is never dealt.
    """

    hits: np.ndarray
    assigned: np.ndarray
    excludes_own: bool

    def recalls(self, assignments: np.ndarray) -> np.ndarray:
        """Dealings (R, N) -> their recalls (6, R)."""
        images = np.arange(len(self.assigned))
        parts = [
            self.hits[:, images, assignments[start : start + 4000]].sum(axis=2)
            for start in range(0, len(assignments), 4000)
        ]
        return np.concatenate(parts, axis=1)

    def chance(self) -> np.ndarray:
        """The mean of each recall over all dealings (6,): any group is as likely for an image as any other."""
        count = len(self.assigned)
        own_hits = np.trace(self.hits, axis1=1, axis2=2) if self.excludes_own else 0.0
        return (self.hits.sum(axis=(1, 2)) - own_hits) / (count - self.excludes_own)


def _random_assignments(rng: np.random.Generator, draws: int, groups: int, excludes_own: bool) -> np.ndarray:
    """(number, count) orders of `groups` groups, each as likely.

    excludes_own: among those with none in its own place.
    """
    assignments = np.empty((0, groups), dtype=np.int64)
    while len(assignments) < draws:
        # One in e has none in its own place.
        orders = rng.random((min(4000, 3 * draws + 8 if excludes_own else draws), groups)).argsort(axis=1)
        assignments = np.concatenate(
            [assignments, orders[(orders != np.arange(groups)).all(axis=1)] if excludes_own else orders]
        )
    return assignments[:draws]


def _assign_and_score(
    ask: ScoreQuery, images: list[Any], groups: list[list[str]], excludes_own: bool, rng: np.random.Generator
) -> _Assignment:
    """Deal groups of captions to images, ask in random order as if each group were its image's, and find the hits."""
    count = len(images)
    order, assigned = rng.permutation(count), _random_assignments(rng, 1, count, excludes_own)[0]
    ordered_groups = [groups[assigned[image]] for image in order]
    table = ask([images[image] for image in order], [caption for group in ordered_groups for caption in group])
    ordered_hits = _recall_hits(*table.ranks(), np.array([len(group) for group in ordered_groups]))
    hits = np.empty_like(ordered_hits)
    hits[:, order[:, None], assigned[order][None, :]] = ordered_hits
    return _Assignment(hits, assigned, excludes_own)


def _recall_hits(image_to_text: np.ndarray, text_to_image: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Ranks of all pairs (N, M) twice, M captions in groups of `sizes` -> what each group adds to recalls (6, N, G).

    An image is found if any caption of the group is; of captions each counts.
    """
    images, captions = image_to_text.shape
    starts = np.cumsum(sizes) - sizes
    i2t_hits = [np.logical_or.reduceat(image_to_text <= k, starts, axis=1) / images for k in RECALL_AT]
    t2i_hits = [np.add.reduceat((text_to_image <= k).astype(np.float64), starts, axis=1) / captions for k in RECALL_AT]
    return np.stack(i2t_hits + t2i_hits)


def _check_chance_level(assignments: list[_Assignment], what: str, level: float, rng: np.random.Generator) -> Finding:
    """Whether the recalls of what was dealt are such as other dealings show.

    level: the probability with which an honest model may fail. Few dealings are drawn first: only what they leave open
    is settled by many, which does not change that probability, as it takes both to fail.
    """
    recalls = np.concatenate([assignment.recalls(assignment.assigned[None]) for assignment in assignments])
    for draws in (FIRST_DRAWS, MAX_DRAWS):
        random_recalls = [
            assignment.recalls(_random_assignments(rng, draws, len(assignment.assigned), assignment.excludes_own))
            for assignment in assignments
        ]
        recalls = np.concatenate([recalls, np.concatenate(random_recalls)], axis=1)
        spread = recalls.std(axis=1, keepdims=True)
        above = (recalls - recalls.mean(axis=1, keepdims=True)) / np.where(spread > 1e-12, spread, np.inf)
        highest = above.max(axis=0)
        p = float((highest >= highest[0] - 1e-9).mean())
        if p > EARLY_STOP_P:
            break
    passed = bool(p > level)
    worst = int(above[:, 0].argmax())
    recall, chance = (
        float(recalls[worst, 0]),
        float(np.concatenate([assignment.chance() for assignment in assignments])[worst]),
    )
    direction, k = RECALLS[worst % len(RECALLS)]
    message = f"{what}, recall at {k} ({direction}) is {recall:.3f} where chance is {chance:.3f}: "
    message += (
        ("within chance" if p > EARLY_STOP_P else "not far enough above chance to decide")
        if passed
        else "far above chance"
    )
    message += f" (p = {p:.2g}; {'only ' if passed else ''}below {level:.2g} is too much for chance)"
    return Finding(passed, recall, message if passed else f"{message}: the model uses other information than the pair")


def check_new_captions(
    ask: ScoreQuery,
    images: list[Any],
    captions: Sequence[str],
    captions_per_image: int,
    level: float,
    rng: np.random.Generator,
) -> Finding:
    """Whether recall is at chance with captions that the model has not seen, and mirrored images.

    Captions are assigned at random: as many to an image as the data has, and one each. Where images cannot be mirrored,
    or the model rejects mirrored ones, it is given the data's own.

    Args:
        ask: Returns the model's scores of images with captions.
        images: N images.
        captions: M captions of the data set, from which new ones are made.
        captions_per_image: How many new captions an image is assigned.
        level: Probability with which an honest model may fail.
        rng: Source of randomness; it is advanced.

    Returns:
        The finding; its figure is the recall that is furthest above chance.
    """
    new_captions = make_captions(captions, len(images) * (captions_per_image + 1), rng)
    grouped = [
        new_captions[start : start + captions_per_image]
        for start in range(0, len(images) * captions_per_image, captions_per_image)
    ]
    single = [[caption] for caption in new_captions[len(images) * captions_per_image :]]
    with mirrored_images(images) as new_images:

        def assign(groups: list[list[str]]) -> tuple[_Assignment, bool]:
            if new_images is not None:
                try:
                    return _assign_and_score(ask, new_images, groups, False, rng), True
                except Exception:
                    # A model that looks its images up has none but the data's own.
                    pass
            return _assign_and_score(ask, images, groups, False, rng), False

        assignments = [assign(groups) for groups in ([grouped, single] if captions_per_image > 1 else [single])]
    image_source = "mirrored images" if all(new for _, new in assignments) else "the data's own images"
    return _check_chance_level(
        [table for table, _ in assignments], f"with new captions dealt to {image_source}", level, rng
    )


def check_shuffled_pairs(
    ask: ScoreQuery, images: list[Any], own_captions: list[list[str]], level: float, rng: np.random.Generator
) -> Finding:
    """Whether recall is at chance when every image is given the captions of another, as if they were its own.

    Args:
        ask: Returns the model's scores of images with captions.
        images: N images.
        own_captions: (N,) the captions of each.
        level: Probability with which an honest model may fail.
        rng: Source of randomness; it is advanced.

    Returns:
        The finding; its figure is the recall that is furthest above chance.

    Source: Westfall and Young, "Resampling-Based Multiple Testing" (1993), max T.
    """
    return _check_chance_level(
        [_assign_and_score(ask, images, own_captions, True, rng)], "with captions dealt to wrong images", level, rng
    )


def check_blank_captions(ask: ScoreQuery, images: list[Any], level: float, rng: np.random.Generator) -> Finding:
    """Whether recall is at chance when every image is given the same words.

    Args:
        ask: Returns the model's scores of images with captions.
        images: N images.
        level: Probability with which an honest model may fail.
        rng: Source of randomness; it is advanced.

    Returns:
        The finding; its figure is the recall that is furthest above chance.
    """
    assignment = _assign_and_score(ask, images, [["a picture"]] * len(images), False, rng)
    return _check_chance_level([assignment], "with every caption the same", level, rng)
