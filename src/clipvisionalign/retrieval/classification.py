"""Zero-shot classification: the class whose captions fit an image best, among all classes.

The vector of a class is the mean of the unit vectors of its captions, one for each template, at unit length again. An
image is assigned to the class with the highest cosine. A model that ranks a whole gallery by `score` (late interaction)
is measured by the mean of the scores of a class's captions.

Source: Radford et al., "CLIP", arXiv:2103.00020, section 3.1.4 (prompt ensembling in the embedding space).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clipvisionalign.argument_checks import check_lists
from clipvisionalign.data.caption_templates import (
    DEFAULT_TEMPLATE,
    SIGLIP_TEMPLATE,
    check_templates,
    fill_template,
)
from clipvisionalign.retrieval.evaluate import score_table
from clipvisionalign.retrieval.label_ranks import (
    LabelRanks,
    check_labels,
    label_ranks_of_scores,
    label_ranks_of_vectors,
    mean_template_scores,
)
from clipvisionalign.retrieval.metrics import MIN_IMAGES, RESAMPLES, MetricEstimate, percentile_interval
from clipvisionalign.retrieval.protocols import RetrievalModel, can_encode, can_score
from clipvisionalign.retrieval.ties import NumericArray, as_vectors

#: By what classes are compared: a model's vectors, or its scores of pairs; "auto" as it ranks a gallery.
ClassifyBy = Literal["auto", "vectors", "score"]

#: An image counts as right for top-k if its class is among the first k; top-5 only if there are more classes.
TOP_K = (1, 5)

#: Captions that are encoded together.
_CAPTIONS_AT_ONCE = 20_000


@dataclass(frozen=True)
class ClassAccuracy:
    """The figures of one class.

    Attributes:
        name: The name of the class.
        images: Number of its images.
        correct: Number of them that are assigned to it.
        confused_with: The other class to which most of them are assigned; None where all are correct.
        confused: Number of these.
    """

    name: str
    images: int
    correct: int
    confused_with: str | None = None
    confused: int = 0


@dataclass(frozen=True)
class Classification:
    """Accuracies of zero-shot classification, shares from 0 to 1, with 95% intervals by a bootstrap over images.

    Attributes:
        class_names: C names, all of them candidates for every image.
        top: The share of images whose class is among the first k, by k.
        mean_per_class: The mean over classes of the share of their images that are assigned to them.
        label_ranks: Ranks of the true classes and predictions, from which the figures are computed.
    """

    class_names: tuple[str, ...]
    top: dict[int, MetricEstimate]
    mean_per_class: MetricEstimate
    label_ranks: LabelRanks

    @property
    def chance(self) -> dict[str, float]:
        """The same figures for classes in random order."""
        classes = len(self.class_names)
        return {f"top_{k}": k / classes for k in self.top} | {"mean_per_class": 1 / classes}

    @property
    def largest_class(self) -> float:
        """The share of images in the largest class: the top-1 accuracy of a model that always answers that class."""
        return float(np.bincount(self.label_ranks.labels).max() / len(self.label_ranks.labels))

    def per_class(self) -> list[ClassAccuracy]:
        """The figures of each class, in the order of `class_names`; a class without images has none right or wrong."""
        labels, predictions = self.label_ranks.labels, self.label_ranks.predictions
        rows = []
        order = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[order], np.arange(len(self.class_names) + 1))
        for number, name in enumerate(self.class_names):
            predicted = predictions[order[bounds[number] : bounds[number + 1]]]
            wrong = predicted[predicted != number]
            if not len(wrong):
                rows.append(ClassAccuracy(name, len(predicted), len(predicted)))
                continue
            others, counts = np.unique(wrong, return_counts=True)
            most = int(counts.argmax())
            rows.append(
                ClassAccuracy(
                    name, len(predicted), len(predicted) - len(wrong), self.class_names[others[most]], int(counts[most])
                )
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The figures under the keys that `classify --json` prints."""
        return {
            "images": len(self.label_ranks.labels),
            "classes": len(self.class_names),
            **{f"top_{k}": estimate.to_dict() for k, estimate in self.top.items()},
            "mean_per_class": self.mean_per_class.to_dict(),
            "chance": self.chance,
            "largest_class": self.largest_class,
            "per_class": [vars(row) for row in self.per_class()],
        }


def classify(
    model: RetrievalModel,
    images: Sequence[Any],
    labels: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = (),
    by: ClassifyBy = "auto",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Classification:
    """Measure zero-shot classification of images into classes.

    Args:
        model: An object with `encode_images` and `encode_captions`, or with `score`.
        images: N images, in any form that the model takes.
        labels: (N,) number of each image's class, from 0.
        class_names: C names of classes, such as "golden retriever".
        templates: T templates with one `{}` each; by default the model's own (`default_template`).
        by: "vectors" or "score"; "auto" for the one by which the model ranks a whole gallery.
        resamples: Number of bootstrap resamples; 0 computes no intervals.
        seed: Seed of the bootstrap.

    Returns:
        The accuracies, and the ranks behind them.

    Raises:
        TypeError: The model lacks the interface, or one string or image is given where a list is required.
        ValueError: Labels, names or templates do not fit, or the model's outputs do not.

    >>> class PerfectModel:
    ...     encode_images = encode_captions = staticmethod(lambda items: np.eye(2)[: len(items)])
    >>> classify(PerfectModel(), ["1.jpg", "2.jpg"], [0, 1], ["dog", "cat"]).top[1].value
    1.0
    """
    check_lists(images, class_names)
    check_labels(labels, len(images), len(class_names))
    _check_names(class_names)
    chosen = list(templates) or [default_template(model)]
    check_templates(chosen)
    measured: Any = model
    if _by_score(model, by):
        captions = [fill_template(template, name) for name in class_names for template in chosen]
        table = mean_template_scores(score_table(measured, images, captions), len(chosen))
        ranks = label_ranks_of_scores(table, labels)
    else:
        vectors = _class_vectors(measured, class_names, chosen)
        ranks = label_ranks_of_vectors(measured.encode_images(images), vectors, labels)
    return classification_of_ranks(ranks, class_names, resamples, seed)


def zero_shot_classifier(
    model: RetrievalModel, class_names: Sequence[str], templates: Sequence[str] = ()
) -> np.ndarray:
    """The vectors of classes: the mean of the unit vectors of each class's captions, at unit length again.

    Args:
        model: An object with `encode_captions`.
        class_names: C names of classes.
        templates: T templates with one `{}` each; by default the model's own (`default_template`).

    Returns:
        (C, D) unit vectors, float32 for a model that gives float32.

    Raises:
        TypeError: The model encodes no captions, or one string is given where a list is required.
        ValueError: Names or templates do not fit, or vectors are not finite.
    """
    check_lists(captions=class_names)
    if not can_encode(model):
        raise TypeError(f"{type(model).__name__} answers no encode_captions: it has no vectors of classes")
    chosen = list(templates) or [default_template(model)]
    check_templates(chosen)
    return _class_vectors(model, class_names, chosen).values


def default_template(model: object) -> str:
    """Return the template that a model's publisher uses.

    Args:
        model: A model; SigLIP's have a `logit_bias`.

    Returns:
        SigLIP's template for a model with a bias of its logits, else CLIP's.
    """
    return SIGLIP_TEMPLATE if getattr(model, "logit_bias", None) is not None else DEFAULT_TEMPLATE


def classification_of_ranks(
    label_ranks: LabelRanks, class_names: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> Classification:
    """The accuracies of given ranks.

    Args:
        label_ranks: Ranks of the true classes among all classes.
        class_names: C names of classes.
        resamples: Number of bootstrap resamples; 0 computes no intervals.
        seed: Seed of the bootstrap.

    Returns:
        The accuracies.
    """
    ks = _ks(len(class_names))
    cells, counts = _resampled_cells([label_ranks.labels, _outcomes(label_ranks.ranks, ks)], resamples, seed)
    images = len(label_ranks.labels)
    top = {
        k: percentile_interval(counts @ (cells[1] <= number) / images, images, (0.0, 1.0))
        for number, k in enumerate(ks)
    }
    mean = _mean_per_class(cells[0], cells[1] == 0, counts, (0.0, 1.0))
    return Classification(tuple(class_names), top, mean, label_ranks)


def accuracy_gain(
    results: Classification, baseline: Classification, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, MetricEstimate]:
    """The gain in accuracy from one model to another on the same images, with a paired bootstrap over images.

    Args:
        results: The classification to compare.
        baseline: The classification of the same images that it is compared with.
        resamples: Number of bootstrap resamples; 0 computes no intervals.
        seed: Seed of the bootstrap.

    Returns:
        The differences "top_1", "top_5" (if it is there) and "mean_per_class", from -1 to 1, with their intervals.

    Raises:
        ValueError: The two are of other images or classes.
    """
    labels, ks = results.label_ranks.labels, _ks(len(results.class_names))
    if results.class_names != baseline.class_names or not np.array_equal(labels, baseline.label_ranks.labels):
        raise ValueError(
            "the two classifications are not of the same images and classes: there is no paired difference"
        )
    outcomes = [_outcomes(each.label_ranks.ranks, ks) for each in (results, baseline)]
    cells, counts = _resampled_cells([labels, *outcomes], resamples, seed)
    images = len(labels)
    gains = {}
    for number, k in enumerate(ks):
        change = (cells[1] <= number).astype(np.float64) - (cells[2] <= number)
        gains[f"top_{k}"] = percentile_interval(counts @ change / images, images, (-1.0, 1.0))
    change = (cells[1] == 0).astype(np.float64) - (cells[2] == 0)
    return gains | {"mean_per_class": _mean_per_class(cells[0], change, counts, (-1.0, 1.0))}


def _check_names(class_names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in class_names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"a class should have a name, not {name!r}")
        if name in seen:
            raise ValueError(f"two classes are called '{name}': no model could decide between them")
        seen.add(name)


def _by_score(model: object, by: str) -> bool:
    if by not in ("auto", "vectors", "score"):
        raise ValueError(f"--by {by}: it is one of auto, vectors, score")
    wanted = by == "score" or (
        by == "auto" and (bool(getattr(model, "scores_all_pairs", False)) or not can_encode(model))
    )
    if wanted and not can_score(model):
        raise TypeError(f"{type(model).__name__} answers neither encode_images and encode_captions, nor score")
    if not wanted and not can_encode(model):
        raise TypeError(f"{type(model).__name__} answers no encode_images and encode_captions: it has no vectors")
    return wanted


def _class_vectors(model: Any, class_names: Sequence[str], templates: Sequence[str]) -> NumericArray:
    """`zero_shot_classifier`, with the format in which the model gives its vectors."""
    parts, vectors = [], None
    step = max(1, _CAPTIONS_AT_ONCE // len(templates))
    for start in range(0, len(class_names), step):
        names = class_names[start : start + step]
        captions = [fill_template(template, name) for name in names for template in templates]
        vectors = as_vectors(model.encode_captions(captions), "caption")
        if len(vectors.values) != len(captions):
            raise ValueError(f"{len(captions)} captions should have as many vectors, not {len(vectors.values)}")
        unit = vectors.values.astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        mean = unit.reshape(len(names), len(templates), -1).mean(axis=1)
        parts.append((mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(vectors.values.dtype))
    assert vectors is not None
    return NumericArray(np.concatenate(parts), vectors.dtype_name, vectors.rounding)


def _ks(classes: int) -> list[int]:
    return [k for k in TOP_K if k == 1 or k < classes]


def _outcomes(ranks: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """(N,) 0 for a class within the first of `ks`, 1 within the second, and so on."""
    return np.searchsorted(np.array(ks), ranks)


def _resampled_cells(columns: Sequence[np.ndarray], resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images counted by what they have in common: cells (columns, U), and how many images each has (1 + resamples, U).

    A resample of N images is a draw of how many are in each cell: the same as images drawn one by one, in less memory.
    """
    cells, counts = np.unique(np.stack(columns), axis=1, return_counts=True)
    images = len(columns[0])
    drawn = [counts[None, :]]
    if resamples and images >= MIN_IMAGES:
        drawn.append(np.random.default_rng(seed).multinomial(images, counts / images, size=resamples))
    return cells, np.concatenate(drawn).astype(np.float64)


def _mean_per_class(
    labels: np.ndarray, values: np.ndarray, counts: np.ndarray, bounds: tuple[float, float]
) -> MetricEstimate:
    """The mean over classes of the mean of their images, with its interval.

    Each image weighs 1 / (C n), n of its class, in every resample. Means of the images that are drawn of each class
    would vary too little: of a class of one image, a resample draws none or has its mean as it is.

    Args:
        labels: (U,) the class of each cell.
        values: (U,) what each image of a cell counts.
        counts: (1 + R, U) images of each cell, on the data and in each resample.
        bounds: Lowest and highest value of the figure.
    """
    _, classes = np.unique(labels, return_inverse=True)
    weights = 1.0 / np.bincount(classes, weights=counts[0])[classes]
    totals = counts @ weights
    # So many images of equal weight would vary as much; all of them, where classes are of one size.
    equal_images = int(totals[0] ** 2 / (counts[0] @ weights**2) + 1e-6)
    return percentile_interval(counts @ (weights * values) / totals, equal_images, bounds)
