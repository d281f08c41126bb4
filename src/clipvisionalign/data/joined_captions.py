"""Long texts: captions of one image, joined in an order that is drawn by a hash.

A gallery has, of an image with K different captions, a text of one of them, one of two, and so on up to one of all K;
nothing but the captions themselves decides which, so that it is the same for every model, seed and machine. In training
an image has one text in an epoch, of any number of its captions, by the run's seed, the epoch and the image's name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from clipvisionalign.data.captioned import (
    FINAL_PUNCTUATION,
    CaptionedImages,
    CaptionMode,
    hash_text,
    normalize_caption,
)

logger = logging.getLogger(__name__)


def join_captions(captions: Sequence[str]) -> str:
    """Captions as one text, a sentence each.

    Args:
        captions: One caption or more.

    Returns:
        The text; one caption alone is returned as it is.

    >>> join_captions(["A dog runs", "Two dogs ."])
    'A dog runs. Two dogs .'
    """
    *first, last = captions
    sentences = [text if text.rstrip().endswith(tuple(FINAL_PUNCTUATION)) else f"{text.rstrip()}." for text in first]
    return " ".join([*(text.strip() for text in sentences), last.strip() if first else last])


def distinct_captions(captions: Sequence[str]) -> list[str]:
    """Captions without those that are equal, word by word, to one before.

    Args:
        captions: Of one image.

    Returns:
        The others, in their order.
    """
    different: dict[str, str] = {}
    for caption in captions:
        different.setdefault(normalize_caption(caption), caption)
    return list(different.values())


def _drawn(captions: Sequence[str], count: int, key: str) -> str:
    """A text of some of the captions, in an order of their own: both by a hash."""
    order = sorted(range(len(captions)), key=lambda index: (hash_text(f"{key}\0{index}"), index))
    return join_captions([captions[index] for index in order[:count]])


def training_text(captions: Sequence[str], seed: int, epoch: int, name: str) -> str:
    """The text that an image has in one epoch: any number of its captions, each as likely, in random order.

    Args:
        captions: Those of the image.
        seed: Of the run.
        epoch: Number of the epoch.
        name: Of the image.

    Returns:
        The text, the same wherever and however often it is asked for; no caption is in it twice.

    Raises:
        ValueError: There is no caption.

    >>> texts = {training_text(["a dog", "two dogs"], 0, epoch, "1.jpg") for epoch in range(1, 40)}
    >>> sorted(texts)
    ['a dog', 'a dog. two dogs', 'two dogs', 'two dogs. a dog']
    """
    different = distinct_captions(captions)
    if not different:
        raise ValueError(f"{name}: an image without captions has no text")
    key = f"{seed}\0{epoch}\0{name}"
    return _drawn(different, 1 + hash_text(key) % len(different), key)


def gallery_texts(captions: Sequence[str]) -> tuple[str, ...]:
    """The texts of an image in a gallery: one of each number of its captions, from one to all.

    Args:
        captions: Those of the image.

    Returns:
        As many texts as it has different captions, by their number of captions.

    >>> [text.count("dog") for text in gallery_texts(["a dog", "two dogs", "a dog"])]
    [1, 2]
    """
    different = distinct_captions(captions)
    key = "\0".join(captions)
    return tuple(_drawn(different, count, f"{count}\0{key}") for count in range(1, len(different) + 1))


def with_captions(data: CaptionedImages, mode: CaptionMode) -> CaptionedImages:
    """A data set with its captions as they are, or joined as in a gallery.

    Args:
        data: The data set, in either form.
        mode: "each" or "joined".

    Returns:
        The data set in that form; joining can be undone.

    Raises:
        ValueError: They are to be joined, and equal captions belong to the same images (`identity` is "caption").

    >>> from clipvisionalign.data.captioned import CaptionedImage
    >>> data = CaptionedImages([CaptionedImage("1.jpg", b"", ("a dog", "two dogs"), "dev")])
    >>> joined = with_captions(data, "joined")
    >>> len(joined.captions), with_captions(joined, "each").captions
    (2, ['a dog', 'two dogs'])
    """
    if mode == "joined" and data.identity == "caption":
        raise ValueError(IDENTITY_REFUSED)
    if data.caption_mode == mode:
        return data
    if mode == "each":
        rows = [replace(row, captions=row.parts, parts=()) for row in data.rows]
    else:
        rows = [replace(row, captions=gallery_texts(row.captions), parts=row.captions) for row in data.rows]
    return replace(data, rows=rows, caption_mode=mode)


#: Why two settings cannot be together.
IDENTITY_REFUSED = (
    "--captions joined with --identity caption: that one compares captions word by word, and a joined text is true of "
    "another image only if all of its captions are; give --identity auto, or --captions each to a command that has it"
)


def log_single_captions(parts: Mapping[str, CaptionedImages]) -> None:
    """Log how many images have one caption, or several that are equal, so that nothing is joined.

    Args:
        parts: Images by the name of their split, their captions as they are.
    """
    for name, part in parts.items():
        single = sum(len(distinct_captions(row.captions)) == 1 for row in part.rows)
        if single == len(part):
            logger.info(f"no effect of --captions joined on {name}: no image has two different captions")
        elif single:
            logger.info(f"{name}: {single:,} of {len(part):,} images have one caption, and no other text")
