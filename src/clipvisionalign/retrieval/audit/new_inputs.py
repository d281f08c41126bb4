"""Captions and images that no model has been asked before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clipvisionalign.images import PictureError, open_picture

#: Pixels on a side that are enough for a mirrored image.
MIRRORED = 512


def made_captions(captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """`count` captions that differ from each other and from all of `captions`: the first half of one and the second
    half of another, and where that is one of them, more of their words.

    >>> made_captions(["a black dog", "the cat sleeps"], 2, np.random.default_rng(0))
    ['the black dog', 'the black dog black']
    """
    taken = {str(caption) for caption in captions}
    some = [str(captions[int(number)]).split() for number in rng.permutation(len(captions))[:1000]]
    # Numbers are left out: to some models they are not words, but places in a table.
    words = sorted({word for caption in some for word in caption if word.isalpha()}) or ["and"]
    made: list[str] = []
    while len(made) < count:
        first = int(rng.integers(len(some)))
        second = (first + 1 + int(rng.integers(max(1, len(some) - 1)))) % len(some)
        half, rest = some[first][: len(some[first]) // 2], some[second][len(some[second]) // 2 :]
        caption = " ".join(half + rest)
        while caption in taken:
            caption = f"{caption} {words[int(rng.integers(len(words)))]}".strip()
        taken.add(caption)
        made.append(caption)
    return made


@contextmanager
def mirrored(images: Sequence[Any]) -> Iterator[list[Any] | None]:
    """The images mirrored, each in the form in which it came: arrays, tensors, Pillow images, files and their bytes.

    Files lie in a temporary folder for so long. An image of another form stays as it is; None if all do.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = [_mirror(image, Path(folder) / f"{number}.jpg") for number, image in enumerate(images)]
        if all(image is None for image in made):
            yield None
        else:
            yield [image if new is None else new for new, image in zip(made, images, strict=True)]


def _mirror(image: Any, file: Path) -> Any:
    if isinstance(image, np.ndarray) and image.ndim:
        return np.ascontiguousarray(image[..., ::-1])
    if hasattr(image, "detach") and image.ndim:
        return image.flip(-1)
    if isinstance(image, Image.Image):
        return ImageOps.mirror(image)
    if not isinstance(image, (bytes, str, os.PathLike)):
        return None
    try:
        opened = open_picture(image if isinstance(image, (bytes, str)) else Path(image), MIRRORED)
        ImageOps.mirror(opened).save(file, quality=95)
    except (PictureError, OSError):
        return None
    if isinstance(image, bytes):
        return file.read_bytes()
    return str(file) if isinstance(image, str) else file
