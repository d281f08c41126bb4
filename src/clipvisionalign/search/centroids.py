"""Centroids of vectors by k-means on the unit sphere, and the nearest one of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from clipvisionalign.progress import progress

#: Vectors of a sample for each centroid, and steps of k-means, enough for lists (more changes no recall measured).
SAMPLE_PER_CENTROID, STEPS = 32, 6
#: Cosines that are in memory at a time.
_COSINES = 2**25


def centroid_count(vectors: int) -> int:
    """How many centroids vectors have: the power of two below four times the square root of their number.

    Args:
        vectors: R.

    Returns:
        K, at least 1.

    >>> centroid_count(4_900_000), centroid_count(49_000), centroid_count(3)
    (8192, 512, 1)
    """
    return max(1, min(2 ** int(math.log2(4 * math.sqrt(max(1, vectors)))), vectors // 2))


@torch.no_grad()
def find_centroids(sample: np.ndarray, count: int, what: str, seed: int = 0) -> np.ndarray:
    """Centroids of unit vectors: Lloyd's steps by cosines, each mean brought back to unit length.

    Args:
        sample: (S, E) float32, unit length.
        count: K, at most S.
        what: What the vectors are, for the line of progress.
        seed: Of the vectors that it begins with.

    Returns:
        (K, E) float32, unit length.
    """
    vectors = torch.from_numpy(sample)
    generator = torch.Generator().manual_seed(seed)
    centroids = vectors[torch.randperm(len(vectors), generator=generator)[:count]].clone()
    for _ in progress(range(STEPS), f"clustering {what}", STEPS):
        nearest = _nearest(vectors, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, vectors)
        lengths = sums.norm(dim=1, keepdim=True)
        # One that nothing is nearest to begins at another vector.
        others = vectors[torch.randint(len(vectors), (count,), generator=generator)]
        centroids = torch.where(lengths > 0, sums / lengths.clamp(min=1e-12), others)
    return centroids.numpy()


@torch.no_grad()
def nearest_centroids(
    count: int, read: Callable[[int, int], np.ndarray], centroids: np.ndarray, what: str
) -> Iterator[tuple[int, np.ndarray]]:
    """The nearest centroid of each vector, a block at a time.

    Args:
        count: R.
        read: From the first and the last position of a block to its vectors, (B, E) float32.
        centroids: (K, E).
        what: What the vectors are, for the line of progress.

    Yields:
        The first position of a block, and the nearest centroids of its vectors, (B,) int32.
    """
    size = max(1, _COSINES // len(centroids))
    table = torch.from_numpy(centroids)
    for start in progress(range(0, count, size), f"lists of {what}", count, units_per_item=size):
        block = torch.from_numpy(read(start, min(start + size, count)))
        yield start, _nearest(block, table).to(torch.int32).numpy()


def _nearest(vectors: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    size = max(1, _COSINES // len(centroids))
    return torch.cat([(block @ centroids.T).argmax(dim=1) for block in vectors.split(size)])
