"""The transform of an image tower: size, crop, normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from clipvisionalign.images.decoding import ImageSource, open_image


@dataclass(frozen=True)
class ImageTransform:
    """What an image tower takes: `size` x `size` pixels, each channel (value - mean) / std.

    The whole image is squeezed into the square, so that nothing that a caption may describe is cropped away.

    Attributes:
        size: Pixels on a side.
        mean: Mean of red, green and blue, as shares of 1.
        std: Standard deviation of the same.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def transform(self, augment: bool = False, flip: float = 0.0) -> Callable[[Image.Image], Any]:
        """A function from an RGB image to the tower's pixels.

        Args:
            augment: Whether images are cropped (at least half of the area) and recoloured at random; not for an
                evaluation.
            flip: Share of images that are mirrored; not for an evaluation.

        Returns:
            A function from a Pillow image to a uint8 tensor (3, size, size), which `normalize` scales.
        """
        from torchvision.transforms import v2

        bicubic = v2.InterpolationMode.BICUBIC
        steps: list[Any] = []
        if augment:
            # Cropped by Pillow, which reads the crop alone, then recoloured as bytes: four times less to move.
            steps.append(v2.RandomResizedCrop(self.size, scale=(0.5, 1.0), interpolation=bicubic, antialias=True))
        else:
            steps.append(v2.Resize((self.size, self.size), interpolation=bicubic, antialias=True))
        if flip:
            steps.append(v2.RandomHorizontalFlip(p=flip))
        steps.append(v2.PILToTensor())
        if augment:
            steps.append(v2.ColorJitter(0.2, 0.2, 0.2))
        return v2.Compose(steps)

    def image_loader(self, augment: bool = False, flip: float = 0.0) -> Callable[[ImageSource], Any]:
        """`transform` after opening the image.

        Args:
            augment: As in `transform`.
            flip: As in `transform`.

        Returns:
            A function from a path, bytes or a Pillow image to the tower's pixels, which raises ImageError.
        """
        # A crop is enlarged, for which an embedded thumbnail is too coarse. No closure: it is sent to workers that are
        # not forked.
        return partial(_load_image, self.transform(augment, flip), self.decoded_size, not augment)

    @property
    def decoded_size(self) -> int:
        """Pixels that are required of an image's shorter side, 0 for all that it has, see `open_image`."""
        return self.size

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of what `transform` returns for one image."""
        return 3, self.size, self.size

    def random_pixels(self, count: int) -> Any:
        """Random images, for timing and dry runs.

        Args:
            count: Number B of images.

        Returns:
            (B, *input_shape) uint8, drawn from PyTorch's global generator.
        """
        import torch

        return torch.randint(256, (count, *self.input_shape), dtype=torch.uint8)

    def normalize(self, pixels: Any) -> Any:
        """Scale pixels to what the tower's backbone takes.

        Args:
            pixels: (B, 3, S, S) uint8; any other dtype is taken as scaled and returned as it is.

        Returns:
            (B, 3, S, S) float32 on the same device.
        """
        import torch

        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) * 255 for v in (self.mean, self.std))
        # In place: a batch is as large as a layer of the tower.
        return (pixels - mean).div_(std)


def _load_image(transform: Callable[[Image.Image], Any], size: int, embedded: bool, image: ImageSource) -> Any:
    """An image, opened and transformed; `size` and `embedded` as in `open_image`."""
    return transform(open_image(image, size, embedded=embedded))
