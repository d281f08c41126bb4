"""The audit: all checks of one model on one data set, those with mismatched pairs first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from clipvisionalign.argument_checks import check_lists
from clipvisionalign.retrieval.audit.answers import ModelScores, ScoreQuery
from clipvisionalign.retrieval.audit.chance import check_blank_captions, check_new_captions, check_shuffled_pairs
from clipvisionalign.retrieval.audit.report import AuditReport, Check, Finding
from clipvisionalign.retrieval.audit.stable_scores import (
    check_batch_independence,
    check_gallery_size_independence,
    check_history_independence,
)
from clipvisionalign.retrieval.protocols import RetrievalModel
from clipvisionalign.retrieval.ranks import Positives

#: Images in the checks that score a sample pair by pair or encode it several times.
SAMPLE = 48

#: Fewer tell nothing: a model that knows all positives would often be within what `FALSE_ALARM_RATE` allows.
MIN_SAMPLE = 10

#: How often an honest model may fail any of the checks against chance, all of one audit together.
FALSE_ALARM_RATE = 1 / 2000

#: Captions an image that are made for the check with new ones, at most.
MAX_NEW_CAPTIONS = 8


def audit(
    model: RetrievalModel,
    images: Sequence[Any],
    captions: Sequence[str],
    caption_image: Any,
    identity: Any = None,
    split_overlap: Sequence[str] | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    caption_group: Any = None,
    model_factory: Callable[[], RetrievalModel] | None = None,
) -> AuditReport:
    """Check that a model uses nothing but an image and a caption to score them.

    The checks: new captions, shuffled partners, blank captions, items alone and in batches, rectangular galleries, and
    splits without common images. A model that raises an error has failed the check, with the reason. An honest model
    fails one of the checks against chance with a probability of at most `FALSE_ALARM_RATE`.

    Args:
        model: An object with `encode_images` and `encode_captions`, with `score`, or with both, in which case both are
            checked. Rounding in the dtype of its outputs is tolerated, and that of bfloat16 where vectors were widened,
            and scaled, only afterwards.
        images: N images, in any form that the model takes.
        captions: M captions.
        caption_image: (M,) index of each caption's image.
        identity: (N,) as in `retrieval_metrics`, or None.
        split_overlap: Images that are in two splits (`data.check` lists them); None if there is one split only, in
            which case that check is omitted.
        sample: Number of images in the checks, drawn with `seed`.
        seed: Seed of the sample and of the shuffles.
        caption_group: (M,) as in `retrieval_metrics`, or None.
        model_factory: Returns the model in its initial state; each interface is then first given mismatched pairs, in a
            model of its own. Without it, `model` is given mismatched pairs before true ones.

    Returns:
        The checks with their results; `passed` is true if none failed.

    Raises:
        TypeError: The model has neither interface, or one image or one string is given where a list is required.
        ValueError: The sample is too small, or indices are out of range.

    >>> class Blind:
    ...     score = staticmethod(lambda images, captions: np.zeros((len(images), len(captions))))
    >>> audit(Blind(), [f"{i}.jpg" for i in range(12)], [f"caption {i}" for i in range(12)], range(12)).passed
    True
    """
    check_lists(images, captions)
    scorer = ModelScores(model)
    positives = Positives.of(caption_image, len(images), identity, caption_group)
    rng = np.random.default_rng(seed)
    chosen = audited_images(positives, sample, rng)
    sampled = _Sample(
        [images[image] for image in chosen],
        [[captions[caption] for caption in own] for own in _captions_of(positives, chosen)],
        captions,
        max(1, min(MAX_NEW_CAPTIONS, len(captions) // len(images))),
    )
    interfaces = scorer.interfaces()
    level = FALSE_ALARM_RATE / (3 * len(interfaces))
    # Mismatched pairs first, in all interfaces: what is asked later shows the model true ones.
    mismatched = []
    for number, (interface, ask_model) in enumerate(interfaces):
        ask = ask_model if model_factory is None else ModelScores(model_factory()).interfaces()[number][1]
        mismatched.append(_mismatched_checks(interface, ask, sampled, level, rng))
    checks = []
    for (interface, ask), mismatched_checks in zip(interfaces, mismatched, strict=True):
        checks += _stability_checks(interface, ask, scorer, sampled, rng) + mismatched_checks
    if split_overlap is not None:
        checks.append(_overlap_check(split_overlap))
    return AuditReport(checks)


@dataclass(frozen=True)
class _Sample:
    """The images that an audit asks about.

    Attributes:
        images: (S,) whatever the model takes.
        own_captions: (S,) the captions of each image.
        captions: (M,) all captions of the data set, from which new ones are made.
        new_per_image: How many new captions are made for an image.
    """

    images: list[Any]
    own_captions: list[list[str]]
    captions: Sequence[str]
    new_per_image: int

    @property
    def first_captions(self) -> list[str]:
        """(S,) one caption of each image."""
        return [captions[0] for captions in self.own_captions]


def _mismatched_checks(
    interface: str, ask: ScoreQuery, sample: _Sample, level: float, rng: np.random.Generator
) -> list[Check]:
    """The checks against chance: images with captions that are not theirs."""
    new = sample.images, sample.captions, sample.new_per_image, level, rng
    shuffled = sample.images, sample.own_captions, level, rng
    return [
        _run_check("new captions", interface, check_new_captions, ask, *new),
        _run_check("shuffled partners", interface, check_shuffled_pairs, ask, *shuffled),
        _run_check("blank captions", interface, check_blank_captions, ask, sample.images, level, rng),
    ]


def _stability_checks(
    interface: str, ask: ScoreQuery, scorer: ModelScores, sample: _Sample, rng: np.random.Generator
) -> list[Check]:
    """The checks that a pair's score is the same, whatever is asked beside it and before it."""
    images, captions = sample.images, sample.first_captions
    score_together = cache(lambda: ask(images, captions))
    checks = [_run_check("alone", interface, check_batch_independence, ask, score_together, images, captions, rng)]
    if interface == "vectors":
        name = "alone, other images before"
        checks.append(_run_check(name, interface, check_history_independence, scorer.model, images, captions))
    rectangular = ask, score_together, images, captions
    checks.append(_run_check("rectangular", interface, check_gallery_size_independence, *rectangular))
    return checks


def _overlap_check(split_overlap: Sequence[str]) -> Check:
    count = len(split_overlap)
    message = f"{count} images stand in two splits, such as {split_overlap[0]}" if count else "no image in two splits"
    return Check("splits apart", not count, float(count), message)


def audited_images(positives: Positives, sample: int, rng: np.random.Generator) -> np.ndarray:
    """The images that an audit asks about: a random sample in which no two have a caption in common.

    Args:
        positives: Which captions belong to which images.
        sample: Number of images at most.
        rng: Source of randomness; it is advanced.

    Returns:
        (S,) image numbers, sorted.

    Raises:
        ValueError: There are fewer than `MIN_SAMPLE` such images, which decide nothing.
    """
    candidates = _apart(positives, rng)
    chosen = np.sort(rng.choice(candidates, size=min(sample, len(candidates)), replace=False))
    if len(chosen) < MIN_SAMPLE:
        detail = (
            ""
            if len(candidates) == positives.images
            else f" of {positives.images} among which no two have a caption in common"
        )
        raise ValueError(f"an audit needs at least {MIN_SAMPLE} images, not {len(chosen)}{detail}")
    return chosen


def _apart(positives: Positives, rng: np.random.Generator) -> np.ndarray:
    """Images of which no caption belongs to another of them: dealt to it, that caption would not be wrong."""
    if positives.caption_group is None:
        identity = np.arange(positives.images) if positives.identity is None else positives.identity
        return np.unique(identity, return_index=True)[1]
    pair_images, pair_captions = positives.pairs()
    groups = positives.caption_group[pair_captions]
    starts = np.searchsorted(pair_images, np.arange(positives.images + 1))
    used_groups = np.zeros(len(groups), dtype=bool)
    selected = []
    for image in rng.permutation(positives.images):
        image_groups = groups[starts[image] : starts[image + 1]]
        if not used_groups[image_groups].any():
            used_groups[image_groups] = True
            selected.append(int(image))
    return np.array(sorted(selected))


def _captions_of(positives: Positives, images: np.ndarray) -> list[np.ndarray]:
    """The numbers of each image's captions: its own, or where it has none, those that its identity or group brings."""
    pair_images, pair_captions = positives.pairs()
    caption_lists = []
    for image in images:
        caption_indices = np.flatnonzero(positives.caption_image == image)
        first, last = np.searchsorted(pair_images, [image, image + 1])
        caption_lists.append(caption_indices if len(caption_indices) else pair_captions[first:last])
    return caption_lists


def _run_check(name: str, way: str, check: Callable[..., Finding], *arguments: Any) -> Check:
    """Run a check; a model that cannot answer what it asks has failed it, with the reason."""
    try:
        finding = check(*arguments)
    except Exception as error:
        finding = Finding(False, float("nan"), f"the model could not answer: {' '.join(str(error).split())}")
    return Check(f"{name} ({way})", *finding)
