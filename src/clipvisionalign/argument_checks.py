"""Checks of arguments: a single caption or image where a list is required is a TypeError."""

from __future__ import annotations

import os
from typing import Any


def check_lists(images: Any = (), captions: Any = ()) -> None:
    """Check that a list of images or captions is no single one.

    Args:
        images: Images, such as paths.
        captions: Strings.

    Raises:
        TypeError: `images` is one image (a path, bytes, a Pillow image), or `captions` one string.

    >>> check_lists(captions="a dog")
    Traceback (most recent call last):
    TypeError: captions: a list of strings belongs here, not the one string 'a dog': write ['a dog']
    """
    if isinstance(captions, (str, bytes)):
        shortened = repr(captions) if len(captions) <= 60 else f"{captions[:57]!r}..."
        raise TypeError(
            f"captions: a list of strings belongs here, not the one string {shortened}: write [{shortened}]"
        )
    if isinstance(images, (str, bytes, bytearray, os.PathLike)) or hasattr(images, "getbands"):
        shortened = f"'{os.fspath(images)}'" if isinstance(images, (str, os.PathLike)) else type(images).__name__
        raise TypeError(f"images: a list of images belongs here, not the one image {shortened}: write [image]")
    for index, caption in enumerate(captions if isinstance(captions, (list, tuple)) else ()):
        if isinstance(caption, (list, tuple)):
            raise TypeError(
                f"captions: entry {index} is a list: give all captions in one list, and by caption_image which image "
                "each belongs to"
            )


def check_strings(captions: Any) -> None:
    """Check that captions are a list of strings.

    Args:
        captions: The captions.

    Raises:
        TypeError: It is one string, or holds something that is none.
    """
    check_lists(captions=captions)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise TypeError(f"captions: entry {index} is no string but {type(caption).__name__}: one string a caption")
