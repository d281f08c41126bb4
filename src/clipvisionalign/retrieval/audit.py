"""Is the figure real: does the model see what it must not, do the splits overlap?

A model that conditions a caption on its true image scores itself, and its recall means nothing. Such a model shows in
what it answers when the true image is not at hand, is not at the same place, or is not the true one: that is what the
checks ask. They need nothing of a model but its answers, so a stranger's model can be put to the test as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clipvisionalign.lists import check_lists
from clipvisionalign.retrieval.evaluate import can_encode
from clipvisionalign.retrieval.metrics import RECALL_AT, chance_recall
from clipvisionalign.retrieval.ranks import PartnerRanks, Partners, ranks_of_scores, ranks_of_vectors
from clipvisionalign.retrieval.ties import as_array

#: Vectors and scores may differ by this share of their spread for the order in which a machine adds up.
TOLERANCE = 1e-2

#: Images in the checks that score a sample pair by pair or encode it anew several times.
SAMPLE = 48

#: One-sided normal quantile of 1 in 10,000, by which a recall may exceed chance before it counts as above.
QUANTILE = 3.72


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


class _Answers:
    """Asks a model for a table of scores, whichever way it answers; a table of another form is told as an error."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encodes = can_encode(model)
        self.scores = hasattr(model, "score")
        if not (self.encodes or self.scores):
            name = type(model).__name__
            raise TypeError(f"{name} answers neither encode_images and encode_captions, nor score: nothing to audit")

    def ways(self) -> list[tuple[str, Callable[..., np.ndarray], Callable[..., PartnerRanks]]]:
        """Every way in which the model answers, each asked on its own: for a table of scores, and for ranks."""
        ways: list[tuple[str, Callable[..., np.ndarray], Callable[..., PartnerRanks]]] = []
        if self.encodes:
            ways.append(("vectors", self.by_vectors, self.ranks_by_vectors))
        if self.scores:
            ways.append(("score", self.by_score, self.ranks_by_score))
        return ways

    def by_vectors(self, images: Sequence[Any], captions: Sequence[str]) -> np.ndarray:
        left = as_array(self.model.encode_images(images))
        right = as_array(self.model.encode_captions(captions))
        return _table(left.astype(np.float64) @ right.astype(np.float64).T, images, captions)

    def by_score(self, images: Sequence[Any], captions: Sequence[str]) -> np.ndarray:
        return _table(as_array(self.model.score(images, captions)).astype(np.float64), images, captions)

    def ranks_by_vectors(self, images: Sequence[Any], captions: Sequence[str], owners: np.ndarray) -> PartnerRanks:
        partners = Partners.of(owners, len(images))
        return ranks_of_vectors(self.model.encode_images(images), self.model.encode_captions(captions), partners)

    def ranks_by_score(self, images: Sequence[Any], captions: Sequence[str], owners: np.ndarray) -> PartnerRanks:
        return ranks_of_scores(self.model.score(images, captions), Partners.of(owners, len(images)))


def _table(scores: np.ndarray, images: Sequence[Any], captions: Sequence[str]) -> np.ndarray:
    if scores.shape != (len(images), len(captions)):
        raise ValueError(f"gave {scores.shape} for {len(images)} images and {len(captions)} captions")
    if not np.isfinite(scores).all():
        raise ValueError("gave scores that are not finite")
    return scores


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
) -> AuditReport:
    """Put a model to the test: alone, rectangular, shuffled partners, blank captions, splits apart.

    model: answers `encode_images` and `encode_captions`, or `score`, or both, in which case both are tested.
    images (N): whatever the model takes; captions (M); caption_image: (M,) each caption's image.
    identity: (N,) or None, caption_group: (M,) or None, as in `retrieval_metrics`.
    split_overlap: pictures found in two splits (`data.check` finds them), None where there is one split only, in which
    case that check is left out. sample: images in the checks, drawn with `seed`.
    Raises TypeError for a model that answers neither way and for one image or one string where a list belongs,
    ValueError for too small a sample.
    """
    check_lists(images, captions)
    answers = _Answers(model)
    partners = Partners.of(caption_image, len(images), identity, caption_group)
    rng = np.random.default_rng(seed)
    apart = _apart(partners, rng)
    chosen = np.sort(rng.choice(apart, size=min(sample, len(apart)), replace=False))
    if len(chosen) < 8:
        told = "" if len(apart) == len(images) else f" of {len(images)} among which no two have a caption in common"
        raise ValueError(f"an audit needs at least 8 images, not {len(chosen)}{told}")
    by_image = [np.flatnonzero(partners.caption_image == image) for image in chosen]
    by_image = [own for own in by_image if len(own)]
    some_images = [images[image] for image in chosen]
    some_captions = [captions[int(own[0])] for own in by_image]
    own_captions = [[captions[int(c)] for c in own] for own in by_image]
    checks = []
    for way, ask, rank in answers.ways():
        checks.append(_told(_alone, way, ask, some_images, some_captions, rng))
        checks.append(_told(_rectangular, way, ask, some_images, some_captions))
        checks.append(_told(_shuffled, way, rank, some_images, own_captions, rng))
        checks.append(_told(_blank, way, rank, some_images, own_captions))
    if answers.encodes:
        checks.insert(1, _told(_caption_after_others, "vectors", model, some_images, some_captions))
    if split_overlap is not None:
        count = len(split_overlap)
        told = (
            f"{count} pictures stand in two splits, such as {split_overlap[0]}" if count else "no picture in two splits"
        )
        checks.append(Check("splits apart", not count, float(count), told))
    return AuditReport(checks)


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


def _told(check: Callable[..., Check], way: str, *arguments: Any) -> Check:
    """Run a check; a model that cannot answer what it asks has failed it, and the reason is told."""
    try:
        found = check(*arguments)
    except Exception as error:
        name = check.__name__.strip("_").replace("_", " ")
        return Check(f"{name} ({way})", False, float("nan"), f"the model could not answer: {error}")
    return Check(f"{found.name} ({way})", found.passed, found.figure, found.meaning)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, as a share of the scores' own spread."""
    spread = max(float(np.std(a)), float(np.std(b)), 1e-6 * float(np.abs(a).max(initial=0.0)), 1e-12)
    return float(np.abs(a - b).max(initial=0.0)) / spread


def _same(name: str, difference: float, what: str) -> Check:
    passed = bool(difference <= TOLERANCE)
    told = "stays the same" if passed else f"changes by {difference:.2g} times the scores' spread"
    return Check(name, passed, difference, f"{what} {told}")


def _alone(ask: Callable[..., np.ndarray], images: list[Any], captions: list[str], rng: np.random.Generator) -> Check:
    """Scores of pairs: all together, in another order, and each alone."""
    together = ask(images, captions)
    rows, columns = rng.permutation(len(images)), rng.permutation(len(captions))
    shuffled = ask([images[i] for i in rows], [captions[c] for c in columns])
    worst = _difference(together[np.ix_(rows, columns)], shuffled)
    spread = max(float(np.std(together)), 1e-12)
    for i, c in zip(rows[:8], columns[:8], strict=False):
        for image, caption in ((i, c), (i, i % len(captions))):
            alone = ask([images[image]], [captions[caption]])[0, 0]
            worst = max(worst, abs(float(alone - together[image, caption])) / spread)
    return _same("alone", worst, "a pair's score, alone or in any batch and order,")


def _caption_after_others(model: Any, images: list[Any], captions: list[str]) -> Check:
    """Caption vectors: after their own images were encoded, and after quite other ones were."""
    model.encode_images(images)
    after_own = as_array(model.encode_captions(captions))
    model.encode_images(images[::-1][: max(1, len(images) // 2)])
    after_others = as_array(model.encode_captions(captions))
    if after_own.shape != after_others.shape:
        raise ValueError(f"caption vectors {after_own.shape} and {after_others.shape}, depending on the images before")
    return _same("alone, other images before", _difference(after_own, after_others), "a caption's vector")


def _rectangular(ask: Callable[..., np.ndarray], images: list[Any], captions: list[str]) -> Check:
    """Fewer images than captions, and more: the same scores as in the square case."""
    together = ask(images, captions)
    few = max(2, len(images) // 3)
    tall, wide = ask(images, captions[:few]), ask(images[-few:], captions)
    worst = max(_difference(together[:, :few], tall), _difference(together[-few:], wide))
    return _same("rectangular", worst, "a score among N images and M captions, N and M unrelated,")


def _recalls_above_chance(ranks: PartnerRanks) -> tuple[float, float, float]:
    """The recall that exceeds chance most: (recall, chance, by how many standard deviations)."""
    images, captions = len(ranks.image_to_text), len(ranks.text_to_image)
    own = (ranks.image_to_text > 0).sum(axis=1)
    worst = (0.0, 0.0, -np.inf)
    for k in RECALL_AT:
        forth = (float((ranks.image_to_text[:, 0] <= k).mean()), float(chance_recall(own, captions, k).mean()), images)
        # Captions of one image are found together or not at all in a model that leaks: count images, not captions.
        back = (float((ranks.text_to_image[:, 0] <= k).mean()), min(1.0, k / images), images)
        for recall, chance, queries in (forth, back):
            deviation = max(np.sqrt(chance * (1 - chance) / queries), 0.5 / queries)
            worst = max(worst, (recall, chance, (recall - chance) / deviation), key=lambda found: found[2])
    return worst


def _at_chance(name: str, ranks: PartnerRanks, what: str) -> Check:
    recall, chance, deviations = _recalls_above_chance(ranks)
    passed = bool(deviations <= QUANTILE)
    told = "at chance or below" if passed else "far above chance: the model knows the answer from somewhere else"
    return Check(name, passed, recall, f"{what}, recall is {recall:.3f} where chance is {chance:.3f}: {told}")


def _flat(own_captions: list[list[str]]) -> tuple[list[str], np.ndarray]:
    owners = np.repeat(np.arange(len(own_captions)), [len(own) for own in own_captions])
    return [caption for own in own_captions for caption in own], owners


def _shuffled(
    rank: Callable[..., PartnerRanks], images: list[Any], own_captions: list[list[str]], rng: np.random.Generator
) -> Check:
    """Give every image the captions of another, as if they were its own, and ask anew."""
    count = len(images)
    dealt = (np.arange(count) + rng.integers(1, count)) % count
    order = rng.permutation(count)
    captions, owners = _flat([own_captions[dealt[image]] for image in order])
    ranks = rank([images[image] for image in order], captions, owners)
    return _at_chance("shuffled partners", ranks, "with captions dealt to wrong images")


def _blank(rank: Callable[..., PartnerRanks], images: list[Any], own_captions: list[list[str]]) -> Check:
    """Give every image the same words."""
    captions, owners = _flat([["a picture"] * len(own) for own in own_captions])
    return _at_chance("blank captions", rank(images, captions, owners), "with every caption the same")
