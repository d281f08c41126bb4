"""Two halves of a dev gallery: what is selected with one is measured on the other.

A checkpoint, or the weights of a pair's parts, chosen among many by the figures that are then reported gives the
design with more to choose from an advantage that it has not earned. Cross-fitting takes it away: half 0 chooses, the
queries of half 1 are measured over the whole gallery, and the other way round; the ranks of both are the figures.

- Choosing looks at a half's own images with its own captions only. No pair's score is then part of both a choice and
  what it is measured on; with the whole gallery on the choosing side, a wrong pair between the halves would be.
- Images of one identity, and images that share a caption word by word, are in one half.

Source: Stone, "Cross-validatory choice and assessment of statistical predictions", JRSS B 36 (1974); Cawley and Talbot,
"On over-fitting in model selection", JMLR 11 (2010), for what choosing on the measured data does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages, normalize_caption
from clipvisionalign.data.splits import connected_groups
from clipvisionalign.retrieval.ranks import PositiveRanks, Positives

#: A half by hash has at least this share of the images; else the groups are dealt out by size.
MIN_HALF_SHARE = 0.25


@dataclass(frozen=True)
class GallerySubset:
    """Some images of a gallery with all of their captions.

    Attributes:
        images: (n,) their numbers in the whole gallery.
        captions: (m,) numbers of their captions in the whole gallery.
        positives: Which captions belong to which images among them.
    """

    images: np.ndarray
    captions: np.ndarray
    positives: Positives

    @classmethod
    def of(cls, chosen: np.ndarray, positives: Positives) -> GallerySubset:
        """A part of a gallery.

        Args:
            chosen: (N,) bool, which images are in it.
            positives: Which captions belong to which images in the whole gallery.

        Returns:
            The part.

        Raises:
            ValueError: It is empty.
        """
        images = np.flatnonzero(chosen)
        captions = np.flatnonzero(chosen[positives.caption_image])
        owners = np.searchsorted(images, positives.caption_image[captions])
        identity = None if positives.identity is None else positives.identity[images]
        text = None if positives.caption_group is None else positives.caption_group[captions]
        return cls(images, captions, Positives.of(owners, len(images), identity, text))


def positives_of(data: CaptionedImages) -> Positives:
    """Which captions belong to which images in a data set, by its `identity`.

    Args:
        data: The data set.

    Returns:
        The positives.
    """
    return Positives.of(data.caption_image, len(data), data.image_identity, data.shared_text_ids)


@dataclass(frozen=True)
class DevHalves:
    """The halves of a gallery.

    Attributes:
        image_half: (N,) 0 or 1.
        caption_half: (M,) 0 or 1.
        positives: Which captions belong to which images in the whole gallery.
        grouped_by: What two images have in common that are kept in one half.
    """

    image_half: np.ndarray
    caption_half: np.ndarray
    positives: Positives
    grouped_by: str

    @cached_property
    def parts(self) -> tuple[GallerySubset, GallerySubset]:
        """Each half as a gallery of its own."""
        first, second = (GallerySubset.of(self.image_half == half, self.positives) for half in (0, 1))
        return first, second

    def combine(self, chosen_by_0: PositiveRanks, chosen_by_1: PositiveRanks) -> PositiveRanks:
        """Cross-fitted ranks over the whole gallery: each half's queries as the choice of the other half ranks them.

        Args:
            chosen_by_0: Ranks of the whole gallery by what half 0 chose.
            chosen_by_1: Ranks of the whole gallery by what half 1 chose.

        Returns:
            Ranks of the whole gallery.
        """
        image_in_0, caption_in_0 = self.image_half[:, None] == 0, self.caption_half[:, None] == 0
        return PositiveRanks(
            np.where(image_in_0, chosen_by_1.image_to_text, chosen_by_0.image_to_text),
            np.where(caption_in_0, chosen_by_1.text_to_image, chosen_by_0.text_to_image),
        )

    def to_dict(self) -> dict[str, object]:
        """The halves as results.json records them.

        Returns:
            "images" and "captions" in each half, and "in_one_half".
        """
        return {
            "images": np.bincount(self.image_half, minlength=2).tolist(),
            "captions": np.bincount(self.caption_half, minlength=2).tolist(),
            "in_one_half": self.grouped_by,
        }


def split_halves(data: CaptionedImages) -> DevHalves | None:
    """Split a data set into halves, for cross-fitting.

    A hash of an image's name (of its identity, where it has one) decides, so that adding images moves no other, unless
    they share a caption with it. Where a half by hash would have less than a quarter of the images, groups are assigned
    by size instead. Each half has at least two images of different identities: with fewer nothing can be chosen.

    Args:
        data: The data set.

    Returns:
        The halves; None where there is too little to be halved.
    """
    keys = [f"identity {row.identity}" if row.identity is not None else f"image {row.name}" for row in data.rows]
    texts = [[normalize_caption(caption) for caption in row.parts or row.captions] for row in data.rows]
    positives = positives_of(data)
    none: list[list[str]] = [[]] * len(data)
    attempts = {"images of one identity or with a caption in common": texts, "images of one identity": none}
    for grouped_by, shared in attempts.items():
        groups = _groups(keys, shared)
        assignments = (
            (_by_hash(groups, keys), MIN_HALF_SHARE * len(keys)),
            (_by_size(groups), 0),
            (_by_size(groups, min_groups=2), 0),
        )
        for half, least in assignments:
            several = all(len({keys[index] for index in np.flatnonzero(half == number)}) >= 2 for number in (0, 1))
            if several and min(np.bincount(half)) >= least:
                return DevHalves(half, half[positives.caption_image], positives, grouped_by)
    return None


def _groups(keys: list[str], texts: list[list[str]]) -> np.ndarray:
    """(N,) the group of each image: those joined by equal keys or texts, over any number of others."""
    shared = [
        [("key", key), *(("text", text) for text in own_texts)] for key, own_texts in zip(keys, texts, strict=True)
    ]
    return np.unique(connected_groups(shared), return_inverse=True)[1]


def _by_hash(groups: np.ndarray, keys: list[str]) -> np.ndarray:
    """(N,) 0 or 1, one number a group, by the smallest hash of its images."""
    digests: dict[int, bytes] = {}
    for group, key in zip(groups.tolist(), keys, strict=True):
        digest = hashlib.sha256(f"half of {key}".encode("utf-8", "surrogatepass")).digest()
        digests[group] = min(digests.get(group, digest), digest)
    # The last byte: the smallest digest of a large group begins with small ones.
    return np.array([digests[group][-1] & 1 for group in range(len(digests))])[groups]


def _by_size(groups: np.ndarray, min_groups: int = 0) -> np.ndarray:
    """(N,) 0 or 1, one number a group: the largest first, each to the half that has fewer images.

    min_groups: groups that both halves get, however large one of them is.
    """
    sizes = np.bincount(groups)
    of_group, image_counts, group_counts = np.zeros(len(sizes), dtype=np.int64), [0, 0], [0, 0]
    order = np.argsort(-sizes, kind="stable").tolist()
    for position, group in enumerate(order):
        half = int(image_counts[1] < image_counts[0])
        if len(order) - position <= max(0, min_groups - group_counts[1 - half]):
            # The last ones are needed by the other half.
            half = 1 - half
        of_group[group] = half
        image_counts[half] += int(sizes[group])
        group_counts[half] += 1
    return of_group[groups]
