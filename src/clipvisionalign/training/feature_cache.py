"""Outputs of a frozen image tower on disk, under a fingerprint of images, weights and transform.

A frozen tower gives the same features for the same image, epoch after epoch and run after run: they are computed
once. So that a frozen tower still sees some variety, several views of each image are kept: as it is, mirrored, and
cropped at random.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
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
from clipvisionalign.files import atomic_write, create_array, remove_abandoned, user_cache_folder
from clipvisionalign.images import ImageTransform
from clipvisionalign.models.aligner import AnyImageTower, AnyTextTower
from clipvisionalign.models.eval_mode import eval_mode
from clipvisionalign.models.image_tower import ImageTower
from clipvisionalign.models.pretrained import PretrainedImageTower, PretrainedTextTower
from clipvisionalign.progress import progress
from clipvisionalign.training.cached_features import AnyFeatureCache, EarlyFeatureCache, ImageFeatureCache

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


def tower_fingerprint(tower: AnyImageTower | AnyTextTower, blocks: int = 0) -> str:
    """A hash of the tower's weights and of the input that it wants.

    Args:
        tower: A tower.
        blocks: Number of its first blocks whose weights are meant; 0 for the whole tower.

    Returns:
        16 hexadecimal digits.
    """
    input_spec = (
        tower.image_transform if isinstance(tower, ImageTower | PretrainedImageTower) else (tower.config, tower.pooling)
    )
    digest = hashlib.sha256(repr((tower.config.name, input_spec)).encode())
    if isinstance(tower, PretrainedImageTower):
        digest.update(f"pooled patches: {tower.patch_count}".encode())
    elif isinstance(tower, PretrainedTextTower):
        digest.update(f"window {tower.window}, {tower.max_positions} positions".encode())
    weights = tower.state_dict()
    if isinstance(tower, ImageTower) and tower.config.mirrored and not blocks:
        digest.update(b"mirrored")
    if blocks:
        weights = _early_weights(_divided(tower), blocks)
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _patch_count(tower: AnyImageTower) -> int:
    """How many patches of an image the tower returns."""
    return tower.patch_count if isinstance(tower, PretrainedImageTower) else tower.num_patches


def _divided(tower: AnyImageTower | AnyTextTower) -> ImageTower:
    assert isinstance(tower, ImageTower), "no other tower has blocks that are frozen alone"
    return tower


def _early_weights(tower: ImageTower, blocks: int) -> dict[str, Tensor]:
    """All tensors that outputs of the first blocks depend on."""
    parts = tower.parts()
    own = {f"of its own {name}": buffer for name, buffer in tower.backbone.named_buffers(recurse=False)}
    weights = own | {f"{number}": parameter for number, parameter in enumerate(parts.stem_parameters)}
    for number, module in enumerate(parts.early_modules(blocks)):
        weights |= {f"part {number}.{name}": tensor for name, tensor in module.state_dict().items()}
    return {f"{blocks} blocks, {name}": tensor for name, tensor in weights.items()}


def _feature_shapes(tower: AnyImageTower, blocks: int) -> dict[str, tuple[int, ...]]:
    """The arrays of a cache, by name the shape for an image in a view."""
    if not blocks:
        return {"pooled": (tower.width,), "patches": (_patch_count(tower), tower.patch_width)}
    divided = _divided(tower)
    size = divided.image_transform.size
    device = next(divided.parameters()).device
    with torch.no_grad(), eval_mode(divided), torch.autocast(device.type, enabled=False):
        features = divided.early_features(torch.zeros(1, 3, size, size, device=device), blocks).features
    return {"early": _as_stored(features).shape[1:]}


def _as_half(tensor: Tensor, what: str) -> np.ndarray:
    """In half precision. Raises ValueError for what that cannot hold."""
    with np.errstate(over="ignore"):
        values = tensor.float().cpu().numpy().astype(np.float16)
    if not np.isfinite(values).all():
        limit = float(np.finfo(np.float16).max)
        raise ValueError(
            f"outputs of the {what} are not finite or above {limit:,.0f}, the largest number that "
            "is kept on disk: give --cache off"
        )
    return values


def _as_stored(features: Tensor) -> Tensor:
    """Maps with their channels last, in which order the next layer reads them."""
    return features.permute(0, 2, 3, 1) if features.ndim == 4 else features


def image_features_size(images: int, views: int, tower: AnyImageTower, blocks: int = 0) -> int:
    """The space that features take on disk.

    Args:
        images: Number N of images.
        views: Number V of views.
        tower: The image tower.
        blocks: Number of its first blocks whose outputs are kept; 0 for those of the whole tower.

    Returns:
        Bytes.
    """
    return images * views * sum(map(math.prod, _feature_shapes(tower, blocks).values())) * 2


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
        array: np.memmap = create_array(path, dtype, shape)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(error.errno, error.strerror, str(path)) from None
    return array


def open_image_features(
    root: Path, data: CaptionedImages, tower: AnyImageTower, views: Sequence[View], dtype: torch.dtype, what: str,
    blocks: int = 0,
) -> AnyFeatureCache:  # fmt: skip
    """The cached features of a data set, computed first where they are not there yet.

    Args:
        root: The cache folder.
        data: N images.
        tower: The image tower.
        views: V views.
        dtype: Of the tower.
        what: Named in the progress shown while computing.
        blocks: Number of the tower's first blocks whose outputs are kept; 0 for those of the whole tower.

    Returns:
        The features.

    Raises:
        OSError: They cannot be written.
        FileExistsError: Another process wrote them at the same time, and they cannot be read.
    """
    folder = _features_folder(root, data, tower, views, dtype, blocks)
    if not (folder / "about.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        try:
            with atomic_write(folder, sync=False, unique_name=True) as aside:
                aside.mkdir()
                _compute(aside, data, tower, views, dtype, what, blocks)
                if (folder / "about.json").is_file():
                    raise FileExistsError(f"{folder}: is there")
        except OSError:
            # Another process that computed the same was quicker.
            if not (folder / "about.json").is_file():
                raise
    metadata = json.loads((folder / "about.json").read_text())
    failures = {int(index): reason for index, reason in metadata["failures"].items()}
    if blocks:
        return EarlyFeatureCache(folder, np.load(folder / "early.npy", mmap_mode="r"), blocks, failures)
    pooled, patches = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pooled", "patches"))
    return ImageFeatureCache(folder, pooled, patches, failures)


def _features_folder(
    root: Path, data: CaptionedImages, tower: AnyImageTower, views: Sequence[View], dtype: torch.dtype, blocks: int
) -> Path:
    key = repr((CACHE_FORMAT, dataset_hashes(data), tower_fingerprint(tower, blocks), tuple(views), str(dtype)))
    return root / "features" / hashlib.sha256(key.encode()).hexdigest()[:20]


def image_features_exist(
    root: Path, data: CaptionedImages, tower: AnyImageTower, views: Sequence[View], dtype: torch.dtype, blocks: int = 0
) -> bool:
    """Whether `open_image_features` would find them on disk, and need no space.

    Args:
        root: The cache folder.
        data: N images.
        tower: The image tower.
        views: V views.
        dtype: Of the tower.
        blocks: As of `open_image_features`.

    Returns:
        Whether it would.
    """
    return (_features_folder(root, data, tower, views, dtype, blocks) / "about.json").is_file()


@torch.inference_mode()
def _compute(
    folder: Path, data: CaptionedImages, tower: AnyImageTower, views: Sequence[View], dtype: torch.dtype, what: str,
    blocks: int,
) -> None:  # fmt: skip
    """Write the features of all images, in all views, into an empty folder."""
    device = next(tower.parameters()).device
    tower.eval()
    count, shapes = len(data), _feature_shapes(tower, blocks)
    size = image_features_size(len(data), len(views), tower, blocks)
    arrays = {
        name: allocate_array(folder / f"{name}.npy", np.float16, (count, len(views), *shape))
        for name, shape in shapes.items()
    }
    failures: dict[int, str] = {}
    part = f"{blocks} blocks of the image tower" if blocks else "image tower"
    title = f"{what}: {part}, {len(views)} view{'s'[: len(views) > 1]}, {size / 2**30:.1f} GiB, images"

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
                features = (
                    [_as_stored(_divided(tower).early_features(stacked, blocks).features)] if blocks else tower(stacked)
                )
            for name, tensor in zip(shapes, features, strict=True):
                values = _as_half(tensor, part)
                arrays[name][good] = values.reshape(len(good), len(views), *values.shape[1:])
    for array in arrays.values():
        array.flush()
    metadata = {"what": what, "source": str(data.source), "images": count, "views": len(views), "failures": failures}
    (folder / "about.json").write_text(json.dumps(metadata))
