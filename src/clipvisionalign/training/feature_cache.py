"""Outputs of a frozen image tower on disk, under a fingerprint of images, weights and transform.

A frozen tower gives the same features for the same image, epoch after epoch and run after run: they are computed
once. So that a frozen tower still sees some variety, several views of each image are kept: as it is, mirrored, and
cropped at random.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.batch import ImageLoader, decode_pixels, group_by_length, seeded
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.hashes import dataset_hashes
from clipvisionalign.files import atomic_write, remove_abandoned, user_cache_folder
from clipvisionalign.images import ImageTransform
from clipvisionalign.models.aligner import AnyImageTower, AnyTextTower
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower
from clipvisionalign.models.pretrained import PretrainedImageTower, PretrainedTextTower
from clipvisionalign.models.text_tower import CaptionFeatures
from clipvisionalign.progress import progress

#: Raised when what is kept, or how, changes: older caches are then rebuilt.
CACHE_FORMAT = 2


@dataclass(frozen=True)
class View:
    """One way of looking at every image: cropped at random with this seed, mirrored."""

    crop: bool = False
    flip: bool = False
    seed: int = 0

    def transform(self, image_transform: ImageTransform) -> ImageLoader:
        """The function from an image to this view's tensor."""
        return image_transform.image_loader(augment=self.crop, flip=float(self.flip))


def augmentation_views(augment: str, count: int) -> list[View]:
    """The views kept for a kind of augmentation: "none" has one; "crop" never mirrors, "flip+crop" mirrors every other.

    Mirroring makes captions with "left" and "right" untrue: leave it to data in which it does not matter.
    """
    if augment == "none":
        return [View()]
    flips = augment == "flip+crop"
    return [
        View(crop=index >= (2 if flips else 1), flip=flips and index % 2 == 1, seed=index) for index in range(count)
    ]


def cache_folder(setting: str = "auto") -> Path:
    """Where features are kept: the folder given, or $CLIPVISIONALIGN_CACHE, or the user's cache folder."""
    return user_cache_folder() if setting == "auto" else Path(setting)


def tower_fingerprint(tower: AnyImageTower | AnyTextTower) -> str:
    """A hash of the tower's weights and of the input that it wants."""
    input_spec = (
        tower.image_transform if isinstance(tower, ImageTower | PretrainedImageTower) else (tower.config, tower.pooling)
    )
    digest = hashlib.sha256(repr((tower.config.name, input_spec)).encode())
    if isinstance(tower, PretrainedImageTower):
        digest.update(f"pooled patches: {tower.pools_patches}".encode())
    elif isinstance(tower, PretrainedTextTower):
        digest.update(f"window {tower.window}, {tower.max_positions} positions".encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class ImageFeatureCache:
    """Features of N images in V views. pooled: (N, V, C), patches: (N, V, P, C), float16, on disk.

    failures: places of the images that could not be decoded, with the reason.
    """

    folder: Path
    pooled: np.ndarray
    patches: np.ndarray
    failures: dict[int, str]
    rows: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> None:
        """Take images at other places from now on: for a data set from which some images were left out.

        Args:
            rows: (n,) places among the cached images; image i is the one at `rows[i]`.
        """
        self.rows = rows

    @property
    def views(self) -> int:
        """The number of cached views of each image."""
        return self.pooled.shape[1]

    def __call__(self, index: Tensor, view: Tensor, device: torch.device) -> ImageFeatures:
        """The features of images `index` (B,), each in its view (B,): pooled (B, C) and patches (B, P, C), float32."""
        rows = index.numpy() if self.rows is None else self.rows[index.numpy()]
        selection = (rows, view.numpy())
        pooled = torch.from_numpy(self.pooled[selection].astype(np.float32))
        patches = torch.from_numpy(self.patches[selection].astype(np.float32))
        return ImageFeatures(pooled.to(device), patches.to(device))


def image_features_size(images: int, views: int, tower: AnyImageTower) -> int:
    """Bytes that the features of `images` take."""
    return images * views * (tower.width + tower.num_patches * tower.patch_width) * 2


def has_free_space(folder: Path, required_bytes: int) -> bool:
    """Whether the disk that `folder` is or will be on has `required_bytes` bytes, and a tenth, to spare."""
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    return shutil.disk_usage(existing).free > required_bytes * 1.1


class DiskFullError(OSError):
    """A disk that has no room for what is to be kept on it."""


def allocate_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """An array of zeros on disk, its room taken: a disk that is full by then would end the process, without a word,
    where the array is written to. Raises DiskFullError."""
    try:
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(error.errno, error.strerror, str(path)) from None
    return array


def open_image_features(
    root: Path, data: CaptionedImages, tower: AnyImageTower, views: Sequence[View], dtype: torch.dtype, what: str
) -> ImageFeatureCache:
    """The cached features of `data`, computed first where they are not there yet.

    dtype: that of the tower. what: named in the progress shown while computing.
    """
    folder = _features_folder(root, data, tower, views, dtype)
    if not (folder / "about.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        try:
            with atomic_write(folder, sync=False, unique_name=True) as aside:
                aside.mkdir()
                _compute(aside, data, tower, views, dtype, what)
                if (folder / "about.json").is_file():
                    raise FileExistsError(f"{folder}: is there")
        except OSError:
            # Another process that computed the same was quicker.
            if not (folder / "about.json").is_file():
                raise
    metadata = json.loads((folder / "about.json").read_text())
    failures = {int(index): reason for index, reason in metadata["failures"].items()}
    pooled, patches = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pooled", "patches"))
    return ImageFeatureCache(folder, pooled, patches, failures)


def _features_folder(
    root: Path, data: CaptionedImages, tower: AnyImageTower, views: Sequence[View], dtype: torch.dtype
) -> Path:
    key = repr((CACHE_FORMAT, dataset_hashes(data), tower_fingerprint(tower), tuple(views), str(dtype)))
    return root / "features" / hashlib.sha256(key.encode()).hexdigest()[:20]


def image_features_exist(
    root: Path, data: CaptionedImages, tower: AnyImageTower, views: Sequence[View], dtype: torch.dtype
) -> bool:
    """Whether `open_image_features` would find them on disk, and need no space."""
    return (_features_folder(root, data, tower, views, dtype) / "about.json").is_file()


@dataclass
class CaptionFeatureCache:
    """What a text tower gives for M captions.

    pooled: (M, W), float32; tokens: those of all captions one after the other (T, W), float16, on disk, where they are
    asked for; ends: (M,), where each caption's tokens end.
    """

    pooled: Tensor
    tokens: np.ndarray | None = None
    ends: np.ndarray | None = None

    def __call__(self, index: Tensor, device: torch.device) -> CaptionFeatures:
        """Captions `index` (b,): pooled (b, W), tokens (b, T, W) or None, and their mask (b, T), float32."""
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
    """What the text tower gives for all captions of `data`; computed first where it is not there yet.

    tokens: not only the pooled vectors, but those of every token.
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
    """Whether `open_caption_features` would find them on disk, and need no space."""
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


@torch.inference_mode()
def _compute(
    folder: Path, data: CaptionedImages, tower: AnyImageTower, views: Sequence[View], dtype: torch.dtype, what: str
) -> None:
    """Write the features of all images, in all views, into an empty folder."""
    device = next(tower.parameters()).device
    count, size = len(data), image_features_size(len(data), len(views), tower)
    shapes = {
        "pooled": (count, len(views), tower.width),
        "patches": (count, len(views), tower.num_patches, tower.patch_width),
    }
    arrays = {name: allocate_array(folder / f"{name}.npy", np.float16, shape) for name, shape in shapes.items()}
    failures: dict[int, str] = {}
    tower.eval()
    title = f"{what}: image tower, {len(views)} view{'s'[: len(views) > 1]}, {size / 2**30:.1f} GiB, images"

    def transform_views(index: int) -> tuple[list[Tensor], list[str]]:
        pixels = []
        for view in views:
            # An image's crops depend on its place and the view, not on which thread came first.
            with seeded(view.seed * 1_000_003 + index):
                tensor, good, failed = decode_pixels([data.rows[index].image], view.transform(tower.image_transform))
            if not good:
                return [], failed
            pixels.append(tensor[0])
        return pixels, []

    def transform_all(indices: list[int]) -> list[tuple[list[Tensor], list[str]]]:
        return [transform_views(index) for index in indices]

    with ThreadPoolExecutor(1) as ahead:
        chunks = [list(range(start, min(start + 16, count))) for start in range(0, count, 16)]
        # One thread decodes the next chunk while the tower works on this one.
        waiting = ahead.submit(transform_all, chunks[0])
        for number, chunk in enumerate(progress(chunks, title, count, units_per_item=len)):
            transformed = waiting.result()
            if number + 1 < len(chunks):
                waiting = ahead.submit(transform_all, chunks[number + 1])
            good = [row for row, (pixels, _) in zip(chunk, transformed, strict=True) if pixels]
            failures |= {p: failed[0] for p, (_, failed) in zip(chunk, transformed, strict=True) if failed}
            if not good:
                continue
            stacked = torch.stack([tensor for pixels, _ in transformed for tensor in pixels])
            stacked = stacked.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                features = tower(stacked)
            for name, tensor in zip(("pooled", "patches"), features, strict=True):
                values = tensor.float().cpu().numpy().astype(np.float16)
                arrays[name][good] = values.reshape(len(good), len(views), *values.shape[1:])
    for array in arrays.values():
        array.flush()
    metadata = {"what": what, "source": str(data.source), "images": count, "views": len(views), "failures": failures}
    (folder / "about.json").write_text(json.dumps(metadata))
