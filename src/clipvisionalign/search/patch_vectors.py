"""From a model's patches to those that an index stores, and from these to what pairs are scored with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from clipvisionalign.models.heads import ImageEmbeddings
from clipvisionalign.models.pair_scorer import EncodedImages
from clipvisionalign.search.patches import PatchSettings, pack_patches, pool_patches

if TYPE_CHECKING:
    from clipvisionalign.models.aligner import Aligner


def patch_settings(aligner: Aligner, pool: int = 1) -> PatchSettings:
    """How an index stores the patches of a model.

    Args:
        aligner: The model.
        pool: Patches that are stored as one, on average.

    Returns:
        The settings.

    Raises:
        ValueError: Its design has nothing to re-rank with, or `pool` is below 1.
    """
    if pool < 1:
        raise ValueError(f"--patches should be at least 1, not {pool}")
    if aligner.late is None:
        raise ValueError(
            f"--patches: the design {aligner.config.design} has nothing to re-rank with; late and cross have"
        )
    if aligner.fusion is None:
        return PatchSettings("late", aligner.late.config.width, pool)
    return PatchSettings("common", aligner.width, pool)


@torch.no_grad()
def stored_patches(aligner: Aligner, embeddings: ImageEmbeddings, settings: PatchSettings) -> list[np.ndarray]:
    """The patches of some images as an index stores them, before they are rounded to 8 bits.

    Args:
        aligner: The model, in evaluation mode.
        embeddings: The B images in the common space.
        settings: How they are stored.

    Returns:
        For each image (P, E) float32.
    """
    assert aligner.late is not None
    assert embeddings.patches is not None
    in_late_space = settings.space == "late"
    patches = aligner.late.project_patches(embeddings.patches) if in_late_space else embeddings.patches
    return [pool_patches(each, settings.pool) for each in patches.float().cpu().numpy()]


def packed_patches(aligner: Aligner, embeddings: ImageEmbeddings, settings: PatchSettings) -> list[bytes]:
    """`stored_patches` as bytes.

    Args:
        aligner: The model, in evaluation mode.
        embeddings: The B images in the common space.
        settings: How they are stored.

    Returns:
        For each image what `patches.pack_patches` gives.
    """
    return [pack_patches(each) for each in stored_patches(aligner, embeddings, settings)]


@torch.no_grad()
def encode_stored(
    aligner: Aligner, vectors: np.ndarray, patches: Sequence[np.ndarray], settings: PatchSettings
) -> EncodedImages:
    """Images as pairs are scored with them, from what an index holds of them.

    Args:
        aligner: The model, in evaluation mode.
        vectors: (N, D) unit length.
        patches: For each image (P, E), P alike for all.
        settings: How they are stored.

    Returns:
        The N images, on the model's device.
    """
    stacked = torch.from_numpy(np.stack(patches)).to(aligner.device)
    own = torch.from_numpy(np.asarray(vectors, dtype=np.float32)).to(aligner.device)
    if settings.space == "common":
        return aligner.project_images_for_pairs(ImageEmbeddings(own, stacked))
    # The mean of unit vectors, and one of 8 bits, is shorter.
    return EncodedImages(own, F.normalize(stacked, dim=-1), None)
