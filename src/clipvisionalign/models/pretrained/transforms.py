"""The preprocessing that a model's own file asks for, as an `ImageTransform`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from clipvisionalign.images import ImageTransform
from clipvisionalign.json_io import read_json

#: Mean and standard deviation of CLIP's training images (openai/CLIP, clip.py).
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

#: Files that describe how images are prepared, of which one is enough.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

#: Names of Pillow's filters by their numbers, as processors record them.
_FILTERS: dict[Any, str] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class PretrainedTransform(ImageTransform):
    """An image as a pretrained dual encoder was trained to take it; size, mean and std are those of `ImageTransform`.

    Args:
        resize: pixels of the image's shorter side before a square is cropped from its middle; 0 to squeeze the whole
            image into the square.
        interpolation: Pillow's filter.
        rounds_half_to_even: where half a pixel is left over beside the crop, its place is rounded to the even one, as
            by torchvision and open_clip; else down, as by transformers.
    """

    resize: int = 0
    interpolation: str = "bicubic"
    rounds_half_to_even: bool = False

    def transform(self, augment: bool = False, flip: float = 0.0) -> Callable[[Image.Image], Any]:
        """The function from an RGB image to pixels, see `ImageTransform.transform`.

        Args:
            augment: whether images are cropped at random.
            flip: share of images that are mirrored.

        Returns:
            A function from a Pillow image to (3, size, size) bytes.
        """
        from torchvision.transforms import v2

        if augment:
            return super().transform(augment, flip)
        filter_mode = v2.InterpolationMode(self.interpolation)
        steps: list[Any] = []
        if self.resize:
            steps.append(_ResizeAndCrop(self.resize, self.size, self.interpolation, self.rounds_half_to_even))
        else:
            steps.append(v2.Resize((self.size, self.size), interpolation=filter_mode, antialias=True))
        if flip:
            steps.append(v2.RandomHorizontalFlip(p=flip))
        return v2.Compose([*steps, v2.PILToTensor()])

    @property
    def decoded_size(self) -> int:
        """0: a JPEG decoded at less than its size would differ from what the model's library takes."""
        return 0


@dataclass(frozen=True)
class _ResizeAndCrop:
    """Resize the shorter side of a Pillow image, and take a square from the middle."""

    resize: int
    size: int
    interpolation: str
    rounds_half_to_even: bool

    def __call__(self, image: Image.Image) -> Image.Image:
        short, long = sorted(image.size)
        # The longer side is rounded down, by torchvision and by transformers.
        target = int(self.resize * long / short)
        new_size = (self.resize, target) if image.width <= image.height else (target, self.resize)
        resized = image.resize(new_size, Image.Resampling[self.interpolation.upper()])
        left, top = (self._margin(side) for side in resized.size)
        return resized.crop((left, top, left + self.size, top + self.size))

    def _margin(self, side: int) -> int:
        """Pixels left out in front of the crop; below 0, black ones are added."""
        if self.rounds_half_to_even and side > self.size:
            return round((side - self.size) / 2)
        return (side - self.size) // 2 if side >= self.size else -((self.size - side) // 2)


@dataclass(frozen=True)
class PatchTransform(ImageTransform):
    """An image of any shape as a sequence of patches (NaFlex: Tschannen et al., "SigLIP 2", arXiv:2502.14786).

    The image is resized, keeping its shape as far as whole patches allow, to at most `max_patches` patches. Mean and
    std are those of `ImageTransform`.

    Args:
        patch: pixels on a side of a patch.
        max_patches: P, patches of an image at most.
        interpolation: Pillow's filter.
    """

    patch: int = 16
    max_patches: int = 256
    interpolation: str = "bilinear"

    @property
    def decoded_size(self) -> int:
        """0: a JPEG decoded at less than its size would differ from what the model's library takes."""
        return 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(1 + P, 3 patch^2): row 0 holds the rows and columns of the grid in its first two bytes."""
        return 1 + self.max_patches, 3 * self.patch**2

    def random_pixels(self, count: int) -> Any:
        """Random images of a square grid.

        Args:
            count: B.

        Returns:
            (B, 1 + P, 3 patch^2) bytes.
        """
        pixels = super().random_pixels(count)
        pixels[:, 0, :2] = math.isqrt(self.max_patches)
        return pixels

    def transform(self, augment: bool = False, flip: float = 0.0) -> Callable[[Image.Image], Any]:
        """The function from an RGB image to its patches.

        Args:
            augment: not supported.
            flip: share of images that are mirrored.

        Returns:
            A function from a Pillow image to (1 + P, 3 patch^2) bytes, see `input_shape`.

        Raises:
            ValueError: `augment` is true: images would be cropped to squares.
        """
        if augment:
            raise ValueError("--augment crop: images of any shape are not cropped to squares; use none or flip")
        return partial(self._patches, flip=flip)

    def _patches(self, image: Image.Image, flip: float) -> Any:
        import numpy as np
        import torch

        if flip and torch.rand(()).item() < flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        rows, columns = self.grid(image.height, image.width)
        resized = image.resize((columns * self.patch, rows * self.patch), Image.Resampling[self.interpolation.upper()])
        grid = np.asarray(resized).reshape(rows, self.patch, columns, self.patch, 3).swapaxes(1, 2)
        packed = torch.zeros(self.input_shape, dtype=torch.uint8)
        packed[0, :2] = torch.tensor([rows, columns])
        packed[1 : 1 + rows * columns] = torch.from_numpy(grid.reshape(rows * columns, -1).copy())
        return packed

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image: the largest scale at which they are at most `max_patches`.

        Args:
            height: pixels.
            width: pixels.

        Returns:
            Rows and columns.

        >>> PatchTransform(patch=16, max_patches=256).grid(480, 640)
        (14, 18)
        """

        def at_scale(scale: float) -> tuple[int, int]:
            return tuple(max(1, math.ceil(scale * side / self.patch)) for side in (height, width))  # type: ignore[return-value]

        low, high = 1e-6, 100.0
        # transformers' own search ends at this width, which decides the grid of some images.
        while high - low >= 1e-5:
            middle = (low + high) / 2
            if math.prod(at_scale(middle)) <= self.max_patches:
                low = middle
            else:
                high = middle
        return at_scale(low)

    def unpack(self, packed: Any) -> tuple[Any, Any, Any]:
        """Unpack images as `transform` returns them.

        Args:
            packed: (B, 1 + P, 3 patch^2) bytes; other numbers are taken as scaled, over the whole of a square grid.

        Returns:
            Normalised patches (B, P, 3 patch^2), mask (B, P), and grids (B, 2).
        """
        import torch

        if packed.dtype != torch.uint8:
            # What is no bytes is taken as scaled, over the whole of a square grid.
            side = math.isqrt(self.max_patches)
            grids = torch.full((len(packed), 2), side, device=packed.device)
            patches = packed[:, 1:]
        else:
            grids = packed[:, 0, :2].long()
            mean, std = (
                torch.tensor(v, device=packed.device).repeat(self.patch**2) * 255 for v in (self.mean, self.std)
            )
            patches = (packed[:, 1:] - mean) / std
        mask = torch.arange(self.max_patches, device=packed.device) < grids.prod(dim=1, keepdim=True)
        # Padding is 0 after normalisation, as in training.
        return patches.masked_fill(~mask[..., None], 0.0), mask, grids


def processor_settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings in a folder of transformers' layout.

    Args:
        folder: The folder.

    Returns:
        Names and values.

    Raises:
        ValueError: There are none.
    """
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            settings = read_json(folder / name, "get the publisher's")
            settings = settings.get("image_processor", settings) if isinstance(settings, dict) else None
            if not isinstance(settings, dict):
                raise ValueError(f"{folder / name}: holds no settings of an image processor; get the publisher's file")
            return settings
    raise ValueError(
        f"{folder}: no preprocessor_config.json, so how the model takes images is not known; copy the publisher's there"
    )


def transform_from_processor(settings: dict[str, Any], source: object, default_size: int) -> PretrainedTransform:
    """The transform that an image processor's settings describe.

    Args:
        settings: of preprocessor_config.json.
        source: for messages.
        default_size: pixels that the vision model takes, where the settings have none.

    Returns:
        The transform.

    Raises:
        ValueError: They describe no square of normalised pixels.
    """
    kind = settings.get("image_processor_type", settings.get("feature_extractor_type", ""))
    crops = settings.get("do_center_crop", "CLIP" in kind)
    size = _sides(settings.get("size", default_size), crops, source)
    crop = settings.get("crop_size", default_size) if crops else None
    if crop is None:
        target, resize = size[0], 0
        if size[1] == "shortest":
            raise ValueError(f"{source}: images are resized, not cropped: they stay of any shape, which no tower takes")
    else:
        target = _sides(crop, False, source)[0]
        resize = size[0]
        if size[1] != "shortest":
            resize = 0
            if size[0] != target:
                raise ValueError(f"{source}: images are squeezed to {size[0]} and cropped to {target}: not supported")
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255.0
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.get("do_normalize", True):
        mean, std = settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD)
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) != 3:
            raise ValueError(f"{source}: {name} of its image processor has {len(values)} values, and a colour has 3")
    resample = settings.get("resample", 3)
    if resample not in _FILTERS:
        raise ValueError(f"{source}: resample {resample} of its image processor is no filter of Pillow (0 to 5)")
    if target != default_size:
        raise ValueError(
            f"{source}: its image processor gives {target} x {target} pixels, and its vision model takes "
            f"{default_size} x {default_size}; get both files from one and the same model"
        )
    return PretrainedTransform(target, _scaled(mean, scale), _scaled(std, scale), resize, _FILTERS[resample])


def _scaled(values: Sequence[float], scale: float) -> tuple[float, float, float]:
    red, green, blue = (value / scale for value in values)
    return red, green, blue


def _sides(size: Any, crops: bool, source: object) -> tuple[int, str]:
    """A processor's size as pixels, and whether they are of the "shortest" side or of a "square"."""
    if isinstance(size, int):
        # One number, in files of older releases: of the side that is cropped afterwards, or of both.
        return size, "shortest" if crops else "square"
    if "shortest_edge" in size:
        return int(size["shortest_edge"]), "shortest"
    if "height" not in size or size["height"] != size["width"]:
        raise ValueError(f"{source}: images of {size} pixels: only squares are supported")
    return int(size["height"]), "square"
