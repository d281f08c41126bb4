"""The audit: all checks of one model on one data set, those with wrong partners first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from clipvisionalign.lists import check_lists
from clipvisionalign.retrieval.audit.answers import _Answers
from clipvisionalign.retrieval.audit.chance import _blank, _new_captions, _shuffled
from clipvisionalign.retrieval.audit.report import AuditReport, Check, _Finding
from clipvisionalign.retrieval.audit.stable_scores import _after_others, _alone, _rectangular
from clipvisionalign.retrieval.protocols import RetrievalModel
from clipvisionalign.retrieval.ranks import Partners

#: Images in the checks that score a sample pair by pair or encode it anew several times.
SAMPLE = 48

#: Fewer tell nothing: a model that knows all true partners would often be within what `ERROR` allows.
LEAST = 10

#: How often an honest model may fail any of the checks against chance, all of one audit together.
ERROR = 1 / 2000

#: Captions an image that are made for the check with new ones, at most.
NEW_CAPTIONS = 8


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
    fresh: Callable[[], RetrievalModel] | None = None,
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
