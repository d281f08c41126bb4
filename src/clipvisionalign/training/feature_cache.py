"""A frozen picture tower's outputs, kept on disk under a fingerprint of pictures, weights and transform.

A frozen tower gives the same features for the same picture, epoch after epoch and run after run: they are computed
once. So that a frozen tower still sees some variety, several views of each picture are kept: as it is, mirrored, and
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
from platformdirs import user_cache_path
from torch import Tensor, nn

from clipvisionalign.batch import Look, decode_pixels, group_by_length, seeded
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.fingerprint import data_contents
from clipvisionalign.files import remove_abandoned, written_aside
from clipvisionalign.images import PictureInput
from clipvisionalign.models.image_tower import ImageFeatures, ImageTower
from clipvisionalign.models.text_tower import CaptionFeatures, TextTower
from clipvisionalign.progress import progress

#: Raised when what is kept, or how, changes: older caches are then made anew.
FORMAT = 2


@dataclass(frozen=True)
class View:
    """One way of looking at every picture: cropped at random with this seed, mirrored."""

    crop: bool = False
    flip: bool = False
    seed: int = 0

    def look(self, picture_input: PictureInput) -> Look:
        """The function from a picture to this view's tensor."""
        return picture_input.look(augment=self.crop, flip=float(self.flip))


def views_of(augment: str, count: int) -> list[View]:
    """The views kept for a kind of augmentation: "none" has one; "crop" never mirrors, "flip+crop" mirrors every other.

    Mirroring makes captions with "left" and "right" untrue: leave it to data in which it does not matter.
    """
    if augment == "none":
        return [View()]
    flips = augment == "flip+crop"
    return [
        View(crop=number >= (2 if flips else 1), flip=flips and number % 2 == 1, seed=number) for number in range(count)
    ]


def cache_folder(setting: str = "auto") -> Path:
    """Where features are kept: the folder given, or $CLIPVISIONALIGN_CACHE, or the user's cache folder."""
    if setting != "auto":
        return Path(setting)
    own = os.environ.get("CLIPVISIONALIGN_CACHE")
    return Path(own) if own else user_cache_path("clipvisionalign", appauthor=False)


def tower_fingerprint(tower: ImageTower | TextTower) -> str:
    """A hash of the tower's weights and of the input that it wants."""
    told = tower.input if isinstance(tower, ImageTower) else (tower.config, tower.pooling)
    digest = hashlib.sha256(repr((tower.config.name, told)).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class FeatureCache:
    """Features of N images in V views. pooled: (N, V, C), patches: (N, V, P, C), float16, on disk.

    failures: places of the images that could not be decoded, with the reason.
    """

    folder: Path
    pooled: np.ndarray
    patches: np.ndarray
    failures: dict[int, str]
    places: np.ndarray | None = None

    def keep(self, places: np.ndarray) -> None:
        """From now on image i is the one at `places[i]`: for a data set from which some images were left out."""
        self.places = places

    @property
    def views(self) -> int:
        return self.pooled.shape[1]

    def __call__(self, index: Tensor, view: Tensor, device: torch.device) -> ImageFeatures:
        """The features of images `index` (B,), each in its view (B,): pooled (B, C) and patches (B, P, C), float32."""
        rows = index.numpy() if self.places is None else self.places[index.numpy()]
        where = (rows, view.numpy())
        pooled = torch.from_numpy(self.pooled[where].astype(np.float32))
        patches = torch.from_numpy(self.patches[where].astype(np.float32))
        return ImageFeatures(pooled.to(device), patches.to(device))


def size_on_disk(images: int, views: int, tower: ImageTower) -> int:
    """Bytes that the features of `images` take."""
    return images * views * (tower.width + tower.patches * tower.patch_width) * 2


def room_for(folder: Path, wanted: int) -> bool:
    """Whether the disk that `folder` is or will be on has `wanted` bytes, and a tenth, to spare."""
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    return shutil.disk_usage(there).free > wanted * 1.1


class NoRoomError(OSError):
    """A disk that has no room for what is to be kept on it."""


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """An array of zeros on disk, its room taken: a disk that is full by then would end the process, without a word,
    where the array is written to. Raises NoRoomError."""
    try:
        found = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise NoRoomError(error.errno, error.strerror, str(path)) from None
    return found


def open_features(
    root: Path, data: CaptionedImages, tower: ImageTower, views: Sequence[View], dtype: torch.dtype, what: str
) -> FeatureCache:
    """The cached features of `data`, computed first where they are not there yet.

    dtype: the number format that the tower runs in. what: named in the progress shown while computing.
    """
    folder = _features_folder(root, data, tower, views, dtype)
    if not (folder / "about.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder.parent)
        try:
            with written_aside(folder, sync=False, own=True) as aside:
                aside.mkdir()
                _compute(aside, data, tower, views, dtype, what)
                if (folder / "about.json").is_file():
                    raise FileExistsError(f"{folder}: is there")
        except OSError:
            # Another process that computed the same was quicker.
            if not (folder / "about.json").is_file():
                raise
    about = json.loads((folder / "about.json").read_text())
    failures = {int(place): reason for place, reason in about["failures"].items()}
    pooled, patches = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("pooled", "patches"))
    return FeatureCache(folder, pooled, patches, failures)


def _features_folder(
    root: Path, data: CaptionedImages, tower: ImageTower, views: Sequence[View], dtype: torch.dtype
) -> Path:
    key = repr((FORMAT, data_contents(data), tower_fingerprint(tower), tuple(views), str(dtype)))
    return root / "features" / hashlib.sha256(key.encode()).hexdigest()[:20]


def features_are_there(
    root: Path, data: CaptionedImages, tower: ImageTower, views: Sequence[View], dtype: torch.dtype
) -> bool:
    """Whether `open_features` would find them on disk, and need no room."""
    return (_features_folder(root, data, tower, views, dtype) / "about.json").is_file()


@dataclass
class CaptionCache:
    """What a text tower gives for M captions. pooled: (M, W), float32; tokens: those of all captions one after the
    other (T, W), float16, on disk, where they are asked for; ends: (M,), where each caption's tokens end."""

    pooled: Tensor
    tokens: np.ndarray | None = None
    ends: np.ndarray | None = None

    def __call__(self, index: Tensor, device: torch.device) -> CaptionFeatures:
        """Captions `index` (b,): pooled (b, W), tokens (b, T, W) or None, and their mask (b, T), float32."""
        pooled = self.pooled[index].to(device)
        if self.tokens is None or self.ends is None:
            return CaptionFeatures(pooled, None, torch.ones(len(index), 1, dtype=torch.long, device=device))
        starts = np.concatenate([[0], self.ends[:-1]])
        each = [
            torch.from_numpy(self.tokens[starts[row] : self.ends[row]].astype(np.float32)) for row in index.tolist()
        ]
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(some), dtype=torch.long) for some in each], batch_first=True)
        return CaptionFeatures(pooled, nn.utils.rnn.pad_sequence(each, batch_first=True).to(device), mask.to(device))


def open_captions(root: Path, data: CaptionedImages, tower: TextTower, tokens: bool = False) -> CaptionCache:
    """What the text tower gives for all captions of `data`; computed first where it is not there yet.

    tokens: not only the pooled vectors, but those of every token.
    """
    files = _captions_files(root, data, tower, tokens)
    path = files[0]
    if not all(file.is_file() for file in files):
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as written:
            remove_abandoned(path.parent)
            asides = [written.enter_context(written_aside(file, sync=False, own=True)) for file in files]
            _encode_captions(data.captions, tower, asides)
    pooled = torch.from_numpy(np.load(path))
    return CaptionCache(pooled, *(np.load(file, mmap_mode="r") for file in files[1:]))


def _captions_files(root: Path, data: CaptionedImages, tower: TextTower, tokens: bool) -> list[Path]:
    """Where the pooled vectors are; with `tokens` also those of all tokens, and each caption's end."""
    key = repr((FORMAT, data.fingerprint(), tower_fingerprint(tower)))
    name = hashlib.sha256(key.encode()).hexdigest()[:20]
    path = root / "captions" / f"{name}.npy"
    return [path, *(path.with_name(f"{name}-{part}.npy") for part in ("tokens", "ends") if tokens)]


def captions_are_there(root: Path, data: CaptionedImages, tower: TextTower, tokens: bool = False) -> bool:
    """Whether `open_captions` would find them on disk, and need no room."""
    return all(file.is_file() for file in _captions_files(root, data, tower, tokens))


@torch.inference_mode()
def _encode_captions(captions: list[str], tower: TextTower, files: list[Path]) -> None:
    """Write pooled vectors (M, W); where there are three `files` also all tokens (T, W) and each caption's end (M,)."""
    read, tokens = tower.tokenize(captions), len(files) > 1
    ends = np.cumsum([len(caption) for caption in read])
    pooled = new_array(files[0], np.float32, (len(captions), tower.width))
    # They may be more than memory holds.
    flat = new_array(files[1], np.float16, (int(ends[-1]), tower.width)) if tokens else None
    device = next(tower.parameters()).device
    groups = group_by_length(read, tower.pad)
    training = tower.training
    tower.eval()
    for group in progress(groups, "text tower, captions", len(captions), count=lambda group: len(group.rows)):
        found = tower(group.ids.to(device), group.mask.to(device), want_tokens=tokens)
        pooled[group.rows.numpy()] = found.pooled.float().cpu().numpy()
        if flat is not None:
            for place, row in enumerate(group.rows.tolist()):
                own = len(read[row])
                flat[ends[row] - own : ends[row]] = found.tokens[place, :own].float().cpu().numpy()
    tower.train(training)
    for array in (pooled, flat):
        if array is not None:
            array.flush()
    if tokens:
        with files[2].open("wb") as out:
            np.save(out, ends)


@torch.inference_mode()
def _compute(
    folder: Path, data: CaptionedImages, tower: ImageTower, views: Sequence[View], dtype: torch.dtype, what: str
) -> None:
    """Write the features of all images, in all views, into an empty folder."""
    device = next(tower.parameters()).device
    count, wanted = len(data), size_on_disk(len(data), len(views), tower)
    shapes = {
        "pooled": (count, len(views), tower.width),
        "patches": (count, len(views), tower.patches, tower.patch_width),
    }
    kept = {name: new_array(folder / f"{name}.npy", np.float16, shape) for name, shape in shapes.items()}
    failures: dict[int, str] = {}
    tower.eval()
    title = f"{what}: picture tower, {len(views)} view{'s'[: len(views) > 1]}, {wanted / 2**30:.1f} GiB, pictures"

    def look(place: int) -> tuple[list[Tensor], list[str]]:
        pixels = []
        for view in views:
            # A picture's crops depend on its place and the view, not on which thread came first.
            with seeded(view.seed * 1_000_003 + place):
                tensor, good, failed = decode_pixels([data.rows[place].image], view.look(tower.input))
            if not good:
                return [], failed
            pixels.append(tensor[0])
        return pixels, []

    def look_at_all(places: list[int]) -> list[tuple[list[Tensor], list[str]]]:
        return [look(place) for place in places]

    with ThreadPoolExecutor(1) as ahead:
        chunks = [list(range(start, min(start + 16, count))) for start in range(0, count, 16)]
        # One thread decodes the next chunk while the tower works on this one.
        waiting = ahead.submit(look_at_all, chunks[0])
        for number, chunk in enumerate(progress(chunks, title, count, count=len)):
            looked = waiting.result()
            if number + 1 < len(chunks):
                waiting = ahead.submit(look_at_all, chunks[number + 1])
            good = [place for place, (pixels, _) in zip(chunk, looked, strict=True) if pixels]
            failures |= {p: failed[0] for p, (_, failed) in zip(chunk, looked, strict=True) if failed}
            if not good:
                continue
            stacked = torch.stack([tensor for pixels, _ in looked for tensor in pixels])
            stacked = stacked.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                features = tower(stacked)
            for name, tensor in zip(("pooled", "patches"), features, strict=True):
                values = tensor.float().cpu().numpy().astype(np.float16)
                kept[name][good] = values.reshape(len(good), len(views), *values.shape[1:])
    for array in kept.values():
        array.flush()
    about = {"what": what, "source": str(data.source), "images": count, "views": len(views), "failures": failures}
    (folder / "about.json").write_text(json.dumps(about))
