"""Opening pictures safely: the ground floor that every room stands on.

A picture comes as a path, as bytes, or already opened by Pillow, and leaves as an upright RGB picture. What cannot be
opened raises `PictureError`, whose message names the picture and what is wrong with it.

- EXIF rotation is applied, so that a phone's picture stands upright.
- 16-bit and floating-point greys are scaled to 8 bits instead of being clipped to white.
- CMYK and palettes are converted, transparency is laid on white, an animation gives its first frame.
- The header's size is checked before a pixel is decoded: a 30,000 x 30,000 picture does not eat 2.7 GB first.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: Pixels in the largest picture that is decoded: 100 million, above any camera's and below a bomb's.
MAX_PIXELS = 100_000_000

#: How much more than the wanted size a JPEG is decoded at: what is then resized is hardly to be told from all of it.
MARGIN = 2

#: File endings that count as a picture when a folder is listed.
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

Picture = Path | str | bytes | Image.Image


class PictureError(ValueError):
    """A picture that cannot be used; `kind` says in which way, as `check` lists it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def describe_picture(picture: Picture) -> str:
    """What to call `picture` in a message."""
    if isinstance(picture, bytes):
        return f"<{len(picture)} bytes>"
    return str(picture) if isinstance(picture, (str, Path)) else f"<{picture.mode} picture {picture.size}>"


def open_header(picture: Path | str | bytes) -> Image.Image:
    """Open a picture as far as its header: format and size are known, no pixel is decoded yet.

    Raises PictureError: missing, empty, unreadable or enormous.
    """
    name = describe_picture(picture)
    if isinstance(picture, bytes):
        if not picture:
            raise PictureError("unreadable picture", f"{name}: no bytes at all")
        source: Any = io.BytesIO(picture)
    else:
        source = Path(picture)
        if not source.is_file():
            raise PictureError("missing picture", f"{name}: no such picture file")
        if source.stat().st_size == 0:
            raise PictureError("unreadable picture", f"{name}: the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(source)
    except Image.DecompressionBombError as error:
        raise PictureError("enormous picture", f"{name}: larger than any that is decoded: {error}") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        reason = "not a picture that Pillow can read" if isinstance(error, UnidentifiedImageError) else error
        raise PictureError("unreadable picture", f"{name}: {reason}") from None
    width, height = opened.size
    if width * height > MAX_PIXELS:
        opened.close()
        message = f"{name}: {width:,} x {height:,} pixels are more than the {MAX_PIXELS:,} that are decoded"
        raise PictureError("enormous picture", message)
    return opened


def open_picture(picture: Picture, size: int = 0) -> Image.Image:
    """Decode a picture to upright 8-bit RGB. Raises PictureError where it cannot be.

    size: pixels on a side that are wanted of it in the end; a large JPEG is then decoded at a half, a quarter or an
    eighth of its size, which takes less time, as long as `MARGIN` times what is wanted is left. 0 for all there is.
    """
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    with open_header(picture) as opened:
        try:
            if size:
                opened.draft(None, (MARGIN * size, MARGIN * size))
            return to_rgb(opened)
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            kind = "truncated picture" if "truncated" in str(error).lower() else "unreadable picture"
            raise PictureError(kind, f"{describe_picture(picture)}: {error}") from None


def to_rgb(opened: Image.Image) -> Image.Image:
    """Upright 8-bit RGB of any mode that Pillow opens."""
    upright = ImageOps.exif_transpose(opened)
    if upright.mode == "RGB":
        return upright
    if upright.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return _grey_to_rgb(np.asarray(upright, dtype=np.float32))
    if "A" in upright.getbands() or "transparency" in upright.info:
        layered = upright.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return upright.convert("RGB")


def _grey_to_rgb(grey: np.ndarray) -> Image.Image:
    """Scale a deep grey to 8 bits by the range its format has: 16 bits, 8 bits, or 0 to 1."""
    top = float(grey.max(initial=0.0))
    full = 65535.0 if top > 255 else 255.0 if top > 1 else 1.0
    return Image.fromarray(np.clip(grey / full * 255.0, 0, 255).astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class PictureInput:
    """What a picture tower wants to see: `size` x `size` pixels, each channel (value - mean) / std.

    The whole picture is squeezed into the square, so that nothing a caption may speak of is cropped away.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def transform(self, augment: bool = False, flip: float = 0.0) -> Callable[[Image.Image], Any]:
        """A function from an RGB picture to a tensor (3, size, size) of bytes, which the tower scales itself.

        `augment` crops and recolours at random, `flip` is the share mirrored. Neither belongs into an evaluation.
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

    def look(self, augment: bool = False, flip: float = 0.0) -> Callable[[Picture], Any]:
        """`transform` after opening: a function from a path, bytes or a Pillow picture; raises PictureError."""
        transform = self.transform(augment, flip)
        return lambda picture: transform(open_picture(picture, self.size))

    def scaled(self, pixels: Any) -> Any:
        """Bytes (B, 3, S, S) -> what the tower's backbone takes, float32; what is no bytes is taken as scaled."""
        import torch

        if pixels.dtype != torch.uint8:
            return pixels
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) * 255 for v in (self.mean, self.std))
        return (pixels - mean) / std
