"""Captions and images that a model has not been given before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from clipvisionalign.images import ImageError, open_image

#: Pixels on a side that are enough for a mirrored image.
MIRRORED_SIZE = 512


def make_captions(captions: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Captions that differ from each other and from all given ones.

    Each is the first half of one caption and the second half of another, of 1,000 captions at most; where that is one
    of them, words of these captions are appended until it is new. Words with other characters than letters are not
    appended.

    Args:
        captions: M captions, at least one.
        count: Number of captions to make.
        rng: Source of randomness; it is advanced.

    Returns:
        The new captions.

    >>> make_captions(["a black dog", "the cat sleeps"], 2, np.random.default_rng(0))
    ['the black dog', 'the black dog black']
    """
    existing = {str(caption) for caption in captions}
    word_lists = [str(captions[int(index)]).split() for index in rng.permutation(len(captions))[:1000]]
    # Numbers are left out: to some models they are not words, but places in a table.
    vocabulary = sorted({word for caption in word_lists for word in caption if word.isalpha()}) or ["and"]
    new_captions: list[str] = []
    while len(new_captions) < count:
        first = int(rng.integers(len(word_lists)))
        second = (first + 1 + int(rng.integers(max(1, len(word_lists) - 1)))) % len(word_lists)
        half, rest = (
            word_lists[first][: len(word_lists[first]) // 2],
            word_lists[second][len(word_lists[second]) // 2 :],
        )
        caption = " ".join(half + rest)
        while caption in existing:
            caption = f"{caption} {vocabulary[int(rng.integers(len(vocabulary)))]}".strip()
        existing.add(caption)
        new_captions.append(caption)
    return new_captions


@contextmanager
def mirrored_images(images: Sequence[Any]) -> Iterator[list[Any] | None]:
    """The images mirrored left to right, each in the form in which it is given.

    A context manager: files are written, with at most 512 pixels on a side, to a temporary folder that is removed at
    the end of the block.

    Args:
        images: Arrays and tensors whose last axis is the width, Pillow images, paths, or bytes of files.

    Yields:
        The mirrored images, an image of another form or that cannot be decoded as it is; None if all are so.
    """
    with tempfile.TemporaryDirectory() as folder:
        flipped = [_mirror(image, Path(folder) / f"{index}.jpg") for index, image in enumerate(images)]
        if all(image is None for image in flipped):
            yield None
        else:
            yield [image if new is None else new for new, image in zip(flipped, images, strict=True)]


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
        opened = open_image(image if isinstance(image, (bytes, str)) else Path(image), MIRRORED_SIZE)
        ImageOps.mirror(opened).save(file, quality=95)
    except (ImageError, OSError):
        return None
    if isinstance(image, bytes):
        return file.read_bytes()
    return str(file) if isinstance(image, str) else file
