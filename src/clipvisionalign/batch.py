"""`Batch`: the tensors that pass from the data to the models, and how captions and pictures become tensors.

A ground floor of its own, because the data room makes batches, the models take them, and neither knows the other.

- Captions go through the text tower in groups of about equal length, each padded to its own longest only.
- Partners are told by a table (B, M), so that no caption of an image (or of its identity) is ever taken for a negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipvisionalign.pictures import Picture, PictureError, open_picture

Tokenize = Callable[[Sequence[str]], list[list[int]]]
Transform = Callable[[Image.Image], Tensor]

#: Captions that go through the text tower together; more makes no matrix product faster, and pads more.
GROUP_SIZE = 160

#: How much longer than its shortest caption the longest of a group may be.
SLACK = 1.3


@dataclass
class TokenGroup:
    """Captions of about equal length. ids, mask: (b, T), mask 1 on tokens and 0 on padding; rows: (b,) places in M."""

    ids: Tensor
    mask: Tensor
    rows: Tensor


@dataclass
class Batch:
    """B images with their M captions.

    image_index: (B,) places of the images in the data set.
    pixels: (B, 3, S, S), or None where the images' features are on disk.
    captions: the M captions in groups of about equal length.
    partners: (B, M) bool, True where the caption belongs to the image (or to another of the same identity).
    caption_image: (M,) for each caption its own image's place in B.
    skipped: pictures that could not be decoded and are not in the batch.
    """

    image_index: Tensor
    pixels: Tensor | None
    captions: list[TokenGroup]
    partners: Tensor
    caption_image: Tensor
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image_index)

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        groups = [TokenGroup(g.ids.to(device), g.mask.to(device), g.rows.to(device)) for g in self.captions]
        pixels = None if self.pixels is None else self.pixels.to(device, non_blocking=True)
        partners, owners = self.partners.to(device), self.caption_image.to(device)
        return Batch(self.image_index, pixels, groups, partners, owners, self.skipped)


def group_by_length(tokens: Sequence[Sequence[int]], pad: int, size: int = GROUP_SIZE) -> list[TokenGroup]:
    """Sort token lists by length and pad each group of at most `size` to its own longest.

    A group ends where the next caption is much longer than its shortest, so that one long caption pads no short ones.
    """
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    cuts: list[list[int]] = []
    for row in order:
        shortest = len(tokens[cuts[-1][0]]) if cuts else 0
        if cuts and len(cuts[-1]) < size and len(tokens[row]) <= max(SLACK * shortest, shortest + 4):
            cuts[-1].append(row)
        else:
            cuts.append([row])
    groups = []
    for rows in (np.array(cut, dtype=np.int64) for cut in cuts):
        width = max(len(tokens[row]) for row in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for place, row in enumerate(rows):
            ids[place, : len(tokens[row])] = torch.tensor(tokens[row])
            mask[place, : len(tokens[row])] = 1
        groups.append(TokenGroup(ids, mask, torch.from_numpy(rows)))
    return groups


def decode_pixels(images: Sequence[Picture], transform: Transform) -> tuple[Tensor, list[int], list[str]]:
    """Decode and transform pictures: pixels (n, 3, S, S), the places that could be, and why the rest could not."""
    pixels, good, failures = [], [], []
    for place, image in enumerate(images):
        try:
            pixels.append(transform(open_picture(image)))
            good.append(place)
        except PictureError as error:
            failures.append(str(error))
    return (torch.stack(pixels) if pixels else torch.empty(0)), good, failures


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers on the CPU from a seed of their own for a while; afterwards they go on as if untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
