"""Vectors of any model: measured over the whole gallery, and audited without the model.

Images without a caption are distractors: a caption has to find its image among them as well, and nobody asks for their
captions. Recalls by images are therefore over the images that have captions, recalls by captions over all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clipvisionalign.data.captioned import DataError, text_id
from clipvisionalign.retrieval.audit import AuditReport, Check
from clipvisionalign.retrieval.equal_captions import count_equal_captions
from clipvisionalign.retrieval.evaluate import Evaluation
from clipvisionalign.retrieval.metrics import RESAMPLES, metrics_of_ranks
from clipvisionalign.retrieval.ranks import PositiveRanks, Positives, ranks_of_vectors
from clipvisionalign.retrieval.ties import NumericArray, VectorEquality, vector_norms

VectorKind = Literal["image", "caption"]

#: The share of vectors that may be equal to another one's before they count as not distinct.
MAX_EQUAL_SHARE = 0.5


@dataclass(frozen=True)
class VectorGallery:
    """Vectors of N images and M captions, in their original dtype.

    Attributes:
        images: (N, D).
        captions: (M, D).
        caption_image: (M,) index of each caption's image.
        identity: (N,) images of one identity are positives of each other's captions; None if each is its own.
        texts: The M captions, or None.

    Raises:
        DataError: Shapes do not fit, or an index is out of range.
    """

    images: NumericArray
    captions: NumericArray
    caption_image: np.ndarray
    identity: np.ndarray | None = None
    texts: list[str] | None = None

    def __post_init__(self) -> None:
        count, width = self.images.values.shape
        if self.captions.values.shape[1] != width:
            raise DataError(f"image vectors are {width} wide, caption vectors {self.captions.values.shape[1]}")
        if self.caption_image.ndim != 1 or self.caption_image.dtype.kind not in "iu":
            raise DataError(f"partners should be whole numbers, one a caption, not {self.caption_image.dtype}")
        if len(self.caption_image) != len(self.captions.values):
            counts = f"{len(self.captions.values):,} caption vectors, and partners of {len(self.caption_image):,}"
            raise DataError(f"{counts}: each caption has one image")
        outside = np.flatnonzero((self.caption_image < 0) | (self.caption_image >= count))
        if len(outside):
            message = f"caption {outside[0]} is of image {self.caption_image[outside[0]]}"
            raise DataError(f"{message}, and there are {count:,} image vectors, counted from 0")
        for what, values, expected in (
            ("identities", self.identity, count),
            ("texts", self.texts, len(self.caption_image)),
        ):
            if values is not None and len(values) != expected:
                raise DataError(f"{len(values):,} {what} for {expected:,} vectors")

    def with_identity(self, identity: str) -> VectorGallery:
        """The gallery with captions that belong to images by `--identity`.

        Args:
            identity: "none" takes each image alone; "auto" and "caption" keep the identities that are given.

        Returns:
            The gallery; the vectors are shared, not copied.

        Raises:
            DataError: "caption" where there are no texts to compare.
        """
        if identity == "none":
            return replace(self, identity=None)
        if identity == "caption" and self.texts is None:
            raise DataError("--identity caption compares captions' texts, and none are given beside the vectors")
        return self

    def with_distractors(self, vectors: NumericArray) -> VectorGallery:
        """The gallery with more images at its end, which no caption is of.

        Args:
            vectors: (K, D) of these images.

        Returns:
            The gallery, its image vectors copied; each distractor has an identity of its own where there are
            identities.

        Raises:
            DataError: The widths differ.
        """
        if vectors.values.shape[1] != self.images.values.shape[1]:
            message = f"distractors are {vectors.values.shape[1]} wide, the images {self.images.values.shape[1]}"
            raise DataError(message)
        coarsest = max((self.images, vectors), key=lambda each: each.rounding)
        values = np.concatenate([self.images.values, vectors.values])
        identity = self.identity
        if identity is not None:
            more = [f"distractor {number}" for number in range(len(vectors.values))]
            identity = np.array([*map(str, identity), *more], dtype=object)
        return replace(self, images=NumericArray(values, coarsest.dtype_name, coarsest.rounding), identity=identity)


def evaluate_vectors(
    gallery: VectorGallery, identity: str = "auto", resamples: int = RESAMPLES, seed: int = 0
) -> Evaluation:
    """Measure vectors as `evaluate` measures a model.

    Images without a caption are distractors: no figure is of them, and captions have to be told from them.

    Args:
        gallery: The vectors of images and captions.
        identity: Which captions belong to which images: "auto", "caption" or "none".
        resamples: Number of bootstrap resamples; 0 computes no intervals.
        seed: Seed of the bootstrap.

    Returns:
        The figures of both directions.

    Raises:
        DataError: "caption" where the gallery has no texts.
        ValueError: Vectors are not finite.

    >>> from clipvisionalign.retrieval.ties import as_numeric_array
    >>> vectors = as_numeric_array(np.eye(3, dtype=np.float32))
    >>> gallery = VectorGallery(vectors, vectors, np.arange(3))
    >>> evaluate_vectors(gallery).to_dict()["rsum"]["value"]
    600.0
    """
    gallery = gallery.with_identity(identity)
    count = len(gallery.images.values)
    numbers = None if gallery.texts is None else [text_id(text) for text in gallery.texts]
    group = np.array(numbers) if identity == "caption" else None
    positives = Positives.of(gallery.caption_image, count, gallery.identity, group, distractors=True)
    queried = np.unique(positives.pairs()[0])
    ranks = ranks_of_vectors(gallery.images, gallery.captions, positives)
    ranks = PositiveRanks(ranks.image_to_text[queried], ranks.text_to_image, count - len(queried))
    # From here on images are those that are asked for.
    owners = np.searchsorted(queried, gallery.caption_image)
    queried_identity = None if gallery.identity is None else gallery.identity[queried]
    among = Positives.of(owners, len(queried), queried_identity, group, distractors=True)
    equal_counts = None if numbers is None else count_equal_captions(numbers, among)
    return Evaluation(metrics_of_ranks(ranks, owners, resamples, seed, among.identity), equal_captions=equal_counts)


def audit_vectors(gallery: VectorGallery) -> AuditReport:
    """Checks of vectors alone: they are finite and distinct, and no caption's vector is a copy of its image's.

    Whether a model used forbidden information while it computed them can be checked only with the model (`audit`).

    Args:
        gallery: The vectors of images and captions.

    Returns:
        The checks with their results.
    """
    captions = gallery.captions
    if gallery.texts is not None:
        # Captions of one text should have one vector.
        rows = np.sort(np.unique(np.array(gallery.texts, dtype=object).astype(str), return_index=True)[1])
        captions = replace(captions, values=captions.values[rows])
    checks = [
        _check_vectors_differ(gallery.images, "image"),
        _check_vectors_differ(captions, "caption"),
        _check_captions_differ_from_images(gallery),
    ]
    if gallery.texts is not None:
        checks.append(_check_equal_captions(gallery, gallery.texts))
    checks += [_check_vector_norms(gallery.images, "image"), _check_vector_norms(gallery.captions, "caption")]
    return AuditReport(checks)


def _equal_vector_groups(vectors: NumericArray) -> np.ndarray:
    """For each vector the number of one that it is equal to up to the rounding of its format (N,): its neighbour in the
    order of a few of its directions, as far as they are equal."""
    equality = VectorEquality(vectors, vector_norms(vectors.values))
    order = np.lexsort(equality.sketch.T[::-1])
    same = np.zeros(len(order), dtype=bool)
    if len(order) > 1:
        same[1:] = equality(order[:-1], order[1:])
    groups = np.empty(len(order), dtype=np.int64)
    groups[order] = np.cumsum(~same)
    return groups


def _check_vectors_differ(vectors: NumericArray, kind: VectorKind) -> Check:
    sizes = np.bincount(_equal_vector_groups(vectors))
    equal = int(sizes[sizes > 1].sum())
    share = equal / len(vectors.values)
    message = f"{equal:,} of {len(vectors.values):,} {kind} vectors are equal to another one in {vectors.dtype_name}"
    passed = share <= MAX_EQUAL_SHARE or len(vectors.values) < 2
    if sizes.max() == len(vectors.values) > 1:
        message = f"all {len(vectors.values):,} {kind} vectors are one vector in {vectors.dtype_name}"
    return Check(f"{kind} vectors apart", passed, share, message if passed else f"{message}: they do not distinguish")


def _check_captions_differ_from_images(gallery: VectorGallery) -> Check:
    """Captions whose vector is their image's: what no encoder of texts gives."""
    image_vectors = gallery.images.values[gallery.caption_image].astype(np.float64)
    distance = np.linalg.norm(gallery.captions.values - image_vectors, axis=1)
    tolerance = max(gallery.images.rounding, gallery.captions.rounding) * np.linalg.norm(image_vectors, axis=1)
    equal = int((distance <= tolerance).sum())
    message = f"{equal:,} of {len(image_vectors):,} caption vectors are their image's own vector"
    # A zero vector is no image's own: it counts as equal to others.
    reason = ": a caption's vector has to depend on the caption alone"
    return Check(
        "captions without their images", not equal, equal / len(image_vectors), message + (reason if equal else "")
    )


def _check_equal_captions(gallery: VectorGallery, texts: Sequence[str]) -> Check:
    """Captions of one text have one vector, whosever image they are of."""
    first_index: dict[str, int] = {}
    pairs = [
        (earlier, number)
        for number, text in enumerate(texts)
        if (earlier := first_index.setdefault(text, number)) != number
    ]
    if not pairs:
        return Check("equal captions alike", True, 0.0, "no two captions have one text")
    a, b = np.array(pairs).T
    differ = int((~VectorEquality(gallery.captions, vector_norms(gallery.captions.values))(a, b)).sum())
    message = f"{differ:,} of {len(pairs):,} captions have another vector than one of the same text"
    # In another batch the last digits of a narrow format may differ.
    share = differ / len(pairs)
    left = gallery.captions.values[a].astype(np.float64)
    change = np.linalg.norm(left - gallery.captions.values[b], axis=1)
    far = int((change > 0.01 * np.linalg.norm(left, axis=1)).sum())
    reason = ": a caption's vector has to depend on the caption alone" if far else ""
    return Check("equal captions alike", not far, share, message + reason)


def _check_vector_norms(vectors: NumericArray, kind: VectorKind) -> Check:
    lengths = vector_norms(vectors.values)
    low, high = float(lengths.min()), float(lengths.max())
    zeros = int((lengths == 0).sum())
    message = f"{kind} vectors are {low:.4g} to {high:.4g} long, in {vectors.dtype_name}"
    if zeros:
        message += f"; {zeros:,} are zero"
    elif high > 1.01 * low:
        message += "; they are ranked by dot products, to which the length counts: divide by it for cosines"
    return Check(f"{kind} vectors' lengths", not zeros, high, message)
