"""What a frozen text tower gives for the captions of a data set, on disk."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.batch import group_by_length
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.files import atomic_write, remove_abandoned
from clipvisionalign.models.aligner import AnyTextTower
from clipvisionalign.models.text_tower import CaptionFeatures
from clipvisionalign.progress import progress
from clipvisionalign.training.feature_cache import CACHE_FORMAT, allocate_array, tower_fingerprint


@dataclass
class CaptionFeatureCache:
    """What a text tower gives for M captions.

    Attributes:
        pooled: (M, W) float32.
        tokens: (T, W) float16, on disk: those of all captions one after the other; None where they are not asked for.
        ends: (M,), where each caption's tokens end; None likewise.
    """

    pooled: Tensor
    tokens: np.ndarray | None = None
    ends: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """The space on disk."""
        return self.pooled.nbytes + sum(array.nbytes for array in (self.tokens, self.ends) if array is not None)

    def __call__(self, index: Tensor, device: torch.device) -> CaptionFeatures:
        """The features of some captions.

        Args:
            index: (b,) numbers of the captions.
            device: Where the features go.

        Returns:
            Pooled (b, W), tokens (b, T, W) or None, and their mask (b, T); float32.
        """
        pooled = self.pooled[index].to(device)
        if self.tokens is None or self.ends is None:
            return CaptionFeatures(pooled, None, torch.ones(len(index), 1, dtype=torch.long, device=device))
        starts = np.concatenate([[0], self.ends[:-1]])
        token_vectors = [
            torch.from_numpy(self.tokens[starts[row] : self.ends[row]].astype(np.float32)) for row in index.tolist()
        ]
        mask = nn.utils.rnn.pad_sequence(
            [torch.ones(len(vectors), dtype=torch.long) for vectors in token_vectors], batch_first=True
        )
        return CaptionFeatures(
            pooled, nn.utils.rnn.pad_sequence(token_vectors, batch_first=True).to(device), mask.to(device)
        )


def open_caption_features(
    root: Path, data: CaptionedImages, tower: AnyTextTower, tokens: bool = False
) -> CaptionFeatureCache:
    """What the text tower gives for all captions of a data set; computed first where it is not there yet.

    Args:
        root: The cache folder.
        data: M captions.
        tower: The text tower.
        tokens: Whether not only the pooled vectors are wanted, but those of every token.

    Returns:
        The features.
    """
    files = _caption_feature_files(root, data, tower, tokens)
    path = files[0]
    if not all(file.is_file() for file in files):
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as exit_stack:
            remove_abandoned(path.parent)
            asides = [exit_stack.enter_context(atomic_write(file, sync=False, unique_name=True)) for file in files]
            _encode_captions(data.captions, tower, asides)
    pooled = torch.from_numpy(np.load(path))
    return CaptionFeatureCache(pooled, *(np.load(file, mmap_mode="r") for file in files[1:]))


def _caption_feature_files(root: Path, data: CaptionedImages, tower: AnyTextTower, tokens: bool) -> list[Path]:
    """Where the pooled vectors are; with `tokens` also those of all tokens, and each caption's end."""
    key = repr((CACHE_FORMAT, data.fingerprint(), tower_fingerprint(tower)))
    name = hashlib.sha256(key.encode()).hexdigest()[:20]
    path = root / "captions" / f"{name}.npy"
    return [path, *(path.with_name(f"{name}-{part}.npy") for part in ("tokens", "ends") if tokens)]


def caption_features_exist(root: Path, data: CaptionedImages, tower: AnyTextTower, tokens: bool = False) -> bool:
    """Whether `open_caption_features` would find them on disk, and need no space.

    Args:
        root: The cache folder.
        data: M captions.
        tower: The text tower.
        tokens: Whether the vectors of every token are wanted.

    Returns:
        Whether it would.
    """
    return all(file.is_file() for file in _caption_feature_files(root, data, tower, tokens))


@torch.inference_mode()
def _encode_captions(captions: list[str], tower: AnyTextTower, files: list[Path]) -> None:
    """Write pooled vectors (M, W); where there are three `files` also all tokens (T, W) and each caption's end (M,)."""
    token_ids, tokens = tower.tokenize(captions), len(files) > 1
    ends = np.cumsum([len(caption) for caption in token_ids])
    pooled = allocate_array(files[0], np.float32, (len(captions), tower.width))
    # They may be more than memory holds.
    flat = allocate_array(files[1], np.float16, (int(ends[-1]), tower.width)) if tokens else None
    device = next(tower.parameters()).device
    groups = group_by_length(token_ids, tower.pad)
    training = tower.training
    tower.eval()
    for group in progress(groups, "text tower, captions", len(captions), units_per_item=lambda group: len(group.rows)):
        features = tower(group.ids.to(device), group.mask.to(device), want_tokens=tokens)
        pooled[group.rows.numpy()] = features.pooled.float().cpu().numpy()
        if flat is not None:
            for position, row in enumerate(group.rows.tolist()):
                length = len(token_ids[row])
                flat[ends[row] - length : ends[row]] = features.tokens[position, :length].float().cpu().numpy()
    tower.train(training)
    for array in (pooled, flat):
        if array is not None:
            array.flush()
    if tokens:
        with files[2].open("wb") as out:
            np.save(out, ends)
