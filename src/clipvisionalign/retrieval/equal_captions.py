"""Equal captions of different images, and their possible effect on the figures.

A model scores equal captions alike with any image, so that an image's caption ties with all its equals, and ties count
against the model; and of the images that have the caption only one can come first. No model that reads the words alone
can do better than `best_rsum`, however well it sees.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.metrics import RECALL_AT
from clipvisionalign.retrieval.ranks import Positives

#: The highest rsum that there is.
MAX_RSUM = 200.0 * len(RECALL_AT)


@dataclass(frozen=True)
class EqualCaptions:
    """Captions that are equal to one of another image, whose positives they are not.

    Attributes:
        texts: Number of different texts that several images (or identities) have.
        captions: Number of captions that have one of these texts.
        images: Number of images that have such a caption.
        best_rsum: The highest rsum of any model that scores equal captions alike, 0 to 600.
    """

    texts: int
    captions: int
    images: int
    best_rsum: float

    @property
    def cost(self) -> float:
        """How much of the rsum they can cost."""
        return MAX_RSUM - self.best_rsum

    def to_dict(self) -> dict[str, Any]:
        """The counts, the highest rsum, and what that is short of."""
        return {**asdict(self), "cost": self.cost}


def describe_equal_captions(captions: str, texts: str, images: str, best_rsum: str, cost: str, way_out: str) -> str:
    """The sentence about equal captions, without a full stop.

    Args:
        captions: Their number with its noun, such as "12 captions".
        texts: The number of their different texts, likewise.
        images: The number of images that have one, likewise.
        best_rsum: The highest rsum that they leave, as it is printed.
        cost: What that is short of 600, as it is printed.
        way_out: The setting or flag that makes such images each other's positives.

    Returns:
        The sentence.
    """
    return (
        f"{captions} are equal, word by word, to one of another image ({texts} of {images}): no model that scores "
        f"equal captions alike exceeds rsum {best_rsum}, {cost} below the highest there is; {way_out} makes such "
        "images each other's partners"
    )


def count_equal_captions(caption_text: Any, positives: Positives) -> EqualCaptions:
    """Count equal captions of different images, and find the highest rsum that they leave.

    Args:
        caption_text: (M,) equal numbers for captions that are equal.
        positives: Which captions belong to which images; if it has groups of captions, equal captions are positives
            already and nothing is counted.

    Returns:
        The counts.

    Raises:
        ValueError: There is another number of captions.

    >>> count_equal_captions([7, 7, 8], Positives.of([0, 1, 2], 3)).captions
    2
    """
    text_ids = np.unique(np.asarray(caption_text), return_inverse=True)[1]
    if text_ids.shape != positives.caption_image.shape:
        raise ValueError(f"caption_text should be {positives.caption_image.shape}, not {text_ids.shape}")
    if positives.caption_group is not None:
        # Positives already: equal captions have the same images.
        return EqualCaptions(0, 0, 0, MAX_RSUM)
    images = np.arange(positives.images) if positives.identity is None else positives.identity
    owner = images[positives.caption_image]
    pairs, counts = np.unique(np.stack([text_ids, owner]), axis=1, return_counts=True)
    # A text with more than one owner (an image, or an identity) is one that ties.
    shared = np.bincount(pairs[0]) > 1
    is_shared = shared[text_ids]
    return EqualCaptions(
        int(shared.sum()),
        int(is_shared.sum()),
        len(np.unique(positives.caption_image[is_shared])),
        _best_rsum(pairs[0], pairs[1], counts, images),
    )


def _best_rsum(text: np.ndarray, owner: np.ndarray, counts: np.ndarray, images: np.ndarray) -> float:
    """The sum of the highest recalls both ways.

    text, owner: (P,) every text with an owner that has it, in the order of the texts; counts: (P,) how many captions
    that are; images: (N,) each image's owner.

    Text to image: of a text's owners the one with most of its captions comes first, and so on. Image to text: an image
    finds the text best that fewest captions of others have, behind all of those.
    """
    order = np.lexsort((-counts, text))
    sizes = np.bincount(text)
    rank = np.empty(len(text), dtype=np.int64)
    rank[order] = np.arange(len(text)) - np.repeat(np.cumsum(sizes) - sizes, sizes) + 1
    of_others = np.bincount(text, weights=counts)[text] - counts
    nearest = np.full(int(images.max()) + 1, np.inf)
    np.minimum.at(nearest, owner, 1 + of_others)
    total = 0.0
    for k in RECALL_AT:
        total += counts[rank <= k].sum() / counts.sum() + (nearest[images] <= k).mean()
    return float(100.0 * total)
