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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipvisionalign.batch import ImageLoader, decode_pixels, seeded
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.hashes import dataset_hashes
from clipvisionalign.files import atomic_write, remove_abandoned, user_cache_folder
from clipvisionalign.images import ImageTransform
from clipvisionalign.models.aligner import AnyImageTower, AnyTextTower
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower
from clipvisionalign.models.pretrained import PretrainedImageTower, PretrainedTextTower
from clipvisionalign.progress import progress

#: Raised when what is kept, or how, changes: older caches are then rebuilt.
CACHE_FORMAT = 2


@dataclass(frozen=True)
class View:
    """One way in which every image is transformed.

    Attributes:
        crop: Whether it is cropped at random.
        flip: Whether it is mirrored.
        seed: Seed of the crops.
    """

    crop: bool = False
    flip: bool = False
    seed: int = 0

    def transform(self, image_transform: ImageTransform) -> ImageLoader:
        """The function from an image to this view's tensor.

        Args:
            image_transform: The tower's transform.

        Returns:
            The function.
        """
        return image_transform.image_loader(augment=self.crop, flip=float(self.flip))


def augmentation_views(augment: str, count: int) -> list[View]:
    """The views kept for a kind of augmentation: "none" has one; "crop" never mirrors, "flip+crop" mirrors every other.

    Mirroring makes captions with "left" and "right" untrue: leave it to data in which it does not matter.

    Args:
        augment: "none", "crop" or "flip+crop".
        count: V, number of views; "none" has one whatever it is.

    Returns:
        The views; the first is neither cropped nor mirrored.
    """
    if augment == "none":
        return [View()]
    flips = augment == "flip+crop"
    return [
        View(crop=index >= (2 if flips else 1), flip=flips and index % 2 == 1, seed=index) for index in range(count)
    ]


def cache_folder(setting: str = "auto") -> Path:
    """Where features are kept.

    Args:
        setting: A folder; "auto" for $CLIPVISIONALIGN_CACHE, or the user's cache folder.

    Returns:
        The folder, which need not exist.
    """
    return user_cache_folder() if setting == "auto" else Path(setting)


def tower_fingerprint(tower: AnyImageTower | AnyTextTower) -> str:
    """A hash of the tower's weights and of the input that it wants.

    Args:
        tower: A tower.

    Returns:
        16 hexadecimal digits.
    """
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
    """Features of N images in V views.

    Attributes:
        folder: Where they are.
        pooled: (N, V, C) float16, on disk.
        patches: (N, V, P, C) float16, on disk.
        failures: Reasons, by the number of each image that could not be decoded.
        rows: (n,) numbers of the images that are taken, see `select`; None for all.
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
        """The features of some images, each in one view.

        Args:
            index: (B,) numbers of the images.
            view: (B,) numbers of their views.
            device: Where the features go.

        Returns:
            Pooled (B, C) and patches (B, P, C), float32.
        """
        rows = index.numpy() if self.rows is None else self.rows[index.numpy()]
        selection = (rows, view.numpy())
        pooled = torch.from_numpy(self.pooled[selection].astype(np.float32))
        patches = torch.from_numpy(self.patches[selection].astype(np.float32))
        return ImageFeatures(pooled.to(device), patches.to(device))


def image_features_size(images: int, views: int, tower: AnyImageTower) -> int:
    """The space that features take on disk.

    Args:
        images: Number N of images.
        views: Number V of views.
        tower: The image tower.

    Returns:
        Bytes.
    """
    return images * views * (tower.width + tower.num_patches * tower.patch_width) * 2


def has_free_space(folder: Path, required_bytes: int) -> bool:
    """Whether a disk has so much space, and a tenth, to spare.

    Args:
        folder: A folder on that disk, which need not exist yet.
        required_bytes: Bytes.

    Returns:
        Whether it has.
    """
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    return shutil.disk_usage(existing).free > required_bytes * 1.1


class DiskFullError(OSError):
    """A disk that has no room for what is to be kept on it."""


def allocate_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """An array of zeros on disk, its room taken.

    A disk that is full by then would end the process, without a word, where the array is written to.

    Args:
        path: The .npy file.
        dtype: Of the array.
        shape: Of the array.

    Returns:
        The array, to be written to.

    Raises:
        DiskFullError: The disk has no room for it.
    """
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
    """The cached features of a data set, computed first where they are not there yet.

    Args:
        root: The cache folder.
        data: N images.
        tower: The image tower.
        views: V views.
        dtype: Of the tower.
        what: Named in the progress shown while computing.

    Returns:
        The features.

    Raises:
        OSError: They cannot be written.
        FileExistsError: Another process wrote them at the same time, and they cannot be read.
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
    """Whether `open_image_features` would find them on disk, and need no space.

    Args:
        root: The cache folder.
        data: N images.
        tower: The image tower.
        views: V views.
        dtype: Of the tower.

    Returns:
        Whether it would.
    """
    return (_features_folder(root, data, tower, views, dtype) / "about.json").is_file()


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
