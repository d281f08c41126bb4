"""What an image is recognised by, and which images are equal or nearly equal.

Two images are the same if their bytes are, and nearly the same if a 256-bit gradient hash differs in at most
`NEAR_BITS` bits and their 16 x 16 thumbnails by at most `NEAR_COLOUR` of the full range on average, and by at most
`NEAR_CELL` anywhere: two drawings on a plain ground are alike almost everywhere, and differ where it matters.

Source of the gradient hash: N. Krawetz, "Kind of Like That" (2013), known as dHash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipvisionalign.images import open_image
from clipvisionalign.progress import progress

NEAR_BITS = 16
NEAR_COLOUR = 0.02
NEAR_CELL = 0.12
_HASH_SIDE = 16


@dataclass(frozen=True)
class ImageFingerprint:
    """What an image is recognised by.

    Attributes:
        digest: SHA-256 of its bytes, as hexadecimal.
        gradient_hash: (4,) uint64, a gradient hash of 256 bits.
        thumbnail: (768,) uint8, 16 x 16 pixels of three channels.
    """

    digest: str
    gradient_hash: np.ndarray
    thumbnail: np.ndarray


def fingerprint_image(image: Path | str | bytes) -> ImageFingerprint:
    """Decode an image and compute what it is recognised by.

    Args:
        image: A path, or the bytes of a file.

    Returns:
        Its fingerprint.

    Raises:
        ImageError: It cannot be decoded.
    """
    from PIL import Image

    decoded = open_image(image)
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    side = _HASH_SIDE
    grey = np.asarray(decoded.convert("L").resize((side + 1, side), Image.Resampling.BOX), dtype=np.int16)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    thumbnail = np.asarray(decoded.resize((side, side), Image.Resampling.BOX), dtype=np.uint8).ravel()
    return ImageFingerprint(hashlib.sha256(content).hexdigest(), np.packbits(bits).view(np.uint64), thumbnail)


def near_pairs(
    left: Sequence[ImageFingerprint], right: Sequence[ImageFingerprint], show_progress: bool = False,
    title: str = "comparing images across splits",
) -> list[tuple[int, int, bool]]:  # fmt: skip
    """Pairs of images that are equal or nearly equal.

    Args:
        left: Fingerprints of some images.
        right: Fingerprints of others, or of the same.
        show_progress: Whether a live line is shown on standard error.
        title: Its title.

    Returns:
        Position on the left, position on the right, and whether the bytes are equal.
    """
    if not left or not right:
        return []
    hashes = np.stack([fingerprint.gradient_hash for fingerprint in right])
    pairs = []
    for i, fingerprint in enumerate(progress(left, title, len(left), show_progress)):
        bits = np.bitwise_count(hashes ^ fingerprint.gradient_hash).sum(axis=1)
        for j in np.flatnonzero(bits <= NEAR_BITS).tolist():
            same = fingerprint.digest == right[j].digest
            cells = (
                np.abs(fingerprint.thumbnail.astype(np.int16) - right[j].thumbnail).reshape(-1, 3).mean(axis=1) / 255
            )
            if same or (cells.mean() <= NEAR_COLOUR and cells.max() <= NEAR_CELL):
                pairs.append((i, j, same))
    return pairs


def near_duplicates(fingerprints: Sequence[ImageFingerprint], show_progress: bool = False) -> list[tuple[int, int]]:
    """Pairs of images that are equal or nearly equal, each once.

    Args:
        fingerprints: Of the images.
        show_progress: Whether a live line is shown on standard error.

    Returns:
        Positions i < j.
    """
    pairs = near_pairs(fingerprints, fingerprints, show_progress, "comparing images")
    return [(i, j) for i, j, _ in pairs if i < j]
