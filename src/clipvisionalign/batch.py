"""`Batch`: the tensors that pass from the data to the models, and how captions and images become tensors.

The lowest layer: `data/` makes batches and `models/` takes them, without importing each other.

- Captions go through the text tower in groups of about equal length, each padded to its own longest only.
- Positives are determined by identity, and by text where equal captions belong to the same images, so that no caption
  of an image (or of its identity) is ever taken for a negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.images import ImageError, ImageSource

# Also imported from here, as before they had a module of their own.
from clipvisionalign.truncation import TokenizedCaptions as TokenizedCaptions
from clipvisionalign.truncation import TruncationStats as TruncationStats

Tokenize = Callable[[Sequence[str]], Sequence[list[int]]]
#: A function from an image to the tensor that a tower sees (`ImageTransform.image_loader`); raises ImageError.
ImageLoader = Callable[[ImageSource], Tensor]

#: Captions that go through the text tower together; more makes no matrix product faster, and pads more.
GROUP_SIZE = 160

#: Tokens that take as long as one more group does, whose weights are read once more: measured on CLIP's text tower of
#: base size and on two cores (24).
GROUP_OVERHEAD = 32


@dataclass
class TokenGroup:
    """Captions of about equal length.

    Attributes:
        ids: (b, T) token ids.
        mask: (b, T) 1 on tokens, 0 on padding.
        rows: (b,) positions of the captions among the M of a batch.
    """

    ids: Tensor
    mask: Tensor
    rows: Tensor


@dataclass
class Batch:
    """B images with their M captions.

    Attributes:
        image_index: (B,) positions of the images in the data set.
        pixels: (B, 3, S, S), or None where the images' features are on disk.
        captions: The M captions in groups of about equal length.
        caption_image: (M,) position of each caption's own image in B.
        identity: (B,) decides which captions belong to an image: those of all images of the same identity.
        caption_index: (M,) positions of the captions in the data set; None in a stream.
        names: Names of the images, for messages.
        skipped: Images that could not be decoded and are not in the batch, with the reason.
        seconds: Time that making the batch took, by kind of work.
        caption_text_id: (M,) numbers of the captions' words, where captions that are equal word by word belong to the
            same images; else None.
        identity_texts: (K, 2) with it, (identity, caption_text_id) of everything that is true of the images'
            identities.
        truncation: How many of a stream's captions were cut; None where that is known of the whole data set.
        warnings: What of a stream's samples was left out or mended, though they are in the batch.
    """

    image_index: Tensor
    pixels: Tensor | None
    captions: list[TokenGroup]
    caption_image: Tensor
    identity: Tensor
    caption_index: Tensor | None = None
    names: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    caption_text_id: Tensor | None = None
    identity_texts: Tensor | None = None
    truncation: TruncationStats | None = None
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def caption_identity(self) -> Tensor:
        """(M,) for each caption the identity of its image."""
        return self.identity[self.caption_image]

    @property
    def positives(self) -> Tensor:
        """(B, M) bool, true where the caption belongs to the image; see `positive_mask`."""
        return positive_mask(self.identity, self.caption_identity, self.caption_text_id, self.identity_texts)

    @property
    def order(self) -> Tensor:
        """(M,) the captions' places in the order in which the groups hold them."""
        return torch.cat([group.rows for group in self.captions])

    def to(self, device: torch.device) -> Batch:
        """The batch on another device.

        Args:
            device: The device.

        Returns:
            A batch whose pixels, captions, positions and identities are there; `image_index` and `caption_index` stay.
        """
        groups = [TokenGroup(g.ids.to(device), g.mask.to(device), g.rows.to(device)) for g in self.captions]
        pixels = None if self.pixels is None else self.pixels.to(device, non_blocking=True)
        owners, identity = self.caption_image.to(device), self.identity.to(device)
        text_ids, pairs = (
            None if tensor is None else tensor.to(device) for tensor in (self.caption_text_id, self.identity_texts)
        )
        return replace(
            self, pixels=pixels, captions=groups, caption_image=owners, identity=identity, caption_text_id=text_ids,
            identity_texts=pairs,
        )  # fmt: skip

    def without_pixels(self) -> Batch:
        """The batch without pixels.

        Returns:
            A batch that shares everything else.
        """
        return replace(self, pixels=None)

    def chunks(self, count: int, pad: int) -> list[Batch]:
        """The same images and captions in smaller batches.

        Args:
            count: Number of batches of about one size; at most as many as images.
            pad: Id of the padding token: each chunk groups and pads its own captions.

        Returns:
            The batches; positions within each are its own, and identities keep their numbers.
        """
        count = min(count, len(self))
        bounds = [len(self) * i // count for i in range(count + 1)]
        tokens: dict[int, list[int]] = {}
        for group in self.captions:
            lengths = group.mask.sum(dim=1).tolist()
            for ids, length, row in zip(group.ids.tolist(), lengths, group.rows.tolist(), strict=True):
                tokens[row] = ids[:length]
        batches = []
        for first, last in pairwise(bounds):
            image_slice = slice(first, last)
            caption_rows = (
                ((self.caption_image >= image_slice.start) & (self.caption_image < image_slice.stop))
                .nonzero()
                .flatten()
            )
            pixels = None if self.pixels is None else self.pixels[image_slice]
            groups = group_by_length([tokens[row] for row in caption_rows.tolist()], pad)
            skipped = self.skipped if not first else []
            owners, names = self.caption_image[caption_rows] - first, self.names[image_slice]
            caption_index = None if self.caption_index is None else self.caption_index[caption_rows]
            identity = self.identity[image_slice]
            text_ids = None if self.caption_text_id is None else self.caption_text_id[caption_rows]
            pairs = self.identity_texts
            if pairs is not None:
                pairs = pairs[torch.isin(pairs[:, 0], identity)]
            batches.append(
                Batch(
                    self.image_index[image_slice],
                    pixels,
                    groups,
                    owners,
                    identity,
                    caption_index,
                    names,
                    skipped,
                    caption_text_id=text_ids,
                    identity_texts=pairs,
                )
            )
        return batches

    def as_single_group(self, pad: int) -> Batch:
        """The same batch, all captions padded to the longest: for models that need one call on every process.

        Args:
            pad: Id of the padding token.

        Returns:
            A batch with one group.
        """
        width = max(group.ids.shape[1] for group in self.captions)
        ids, masks = (
            torch.cat([nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill) for tensor in tensors])
            for tensors, fill in (([g.ids for g in self.captions], pad), ([g.mask for g in self.captions], 0))
        )
        return replace(self, captions=[TokenGroup(ids, masks, self.order)])


def positive_mask(
    identity: Tensor,
    caption_identity: Tensor,
    caption_text_id: Tensor | None = None,
    identity_texts: Tensor | None = None,
) -> Tensor:
    """Which captions belong to which images.

    A caption belongs to every image of its own image's identity. With the last two arguments it also belongs to every
    image of an identity that its text is true of: a relation between texts and images, so that two images that share a
    caption do not share their other captions.

    Args:
        identity: (B,) identity of each image.
        caption_identity: (M,) identity of each caption's own image.
        caption_text_id: (M,) equal numbers for equal captions, or None.
        identity_texts: (K, 2) pairs of an identity and a text that is true of it, or None.

    Returns:
        (B, M) bool.

    >>> positive_mask(torch.tensor([0, 1]), torch.tensor([0, 0, 1]))
    tensor([[ True,  True, False],
            [False, False,  True]])
    """
    if caption_text_id is None or identity_texts is None:
        return identity[:, None] == caption_identity[None, :]
    identities, row = identity.unique(return_inverse=True)
    texts, column = caption_text_id.unique(return_inverse=True)
    mask = torch.zeros(len(identities), len(texts), dtype=torch.bool, device=identity.device)
    mask[_pair_positions(identities, texts, identity_texts)] = True
    return mask[row][:, column]


def are_positives(
    identity: Tensor,
    caption_identity: Tensor,
    caption_text_id: Tensor | None = None,
    identity_texts: Tensor | None = None,
) -> Tensor:
    """`positive_mask` for Q pairs: whether each caption belongs to its image.

    Args:
        identity: (Q,) identity of each image.
        caption_identity: (Q,) identity of each caption's own image.
        caption_text_id: (Q,) equal numbers for equal captions, or None.
        identity_texts: (K, 2) pairs of an identity and a text that is true of it, or None.

    Returns:
        (Q,) bool.
    """
    if caption_text_id is None or identity_texts is None:
        return identity == caption_identity
    identities, row = identity.unique(return_inverse=True)
    texts, column = caption_text_id.unique(return_inverse=True)
    left, right = _pair_positions(identities, texts, identity_texts)
    return torch.isin(row * len(texts) + column, left * len(texts) + right)


def _pair_positions(identities: Tensor, texts: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs (K, 2) as places in two sorted rows of numbers; those that are in both rows only."""
    if not len(identities) or not len(texts):
        return pairs.new_empty(0), pairs.new_empty(0)
    positions = [
        torch.searchsorted(sorted_values, values.contiguous()).clamp(max=len(sorted_values) - 1)
        for sorted_values, values in ((identities, pairs[:, 0]), (texts, pairs[:, 1]))
    ]
    inside = (identities[positions[0]] == pairs[:, 0]) & (texts[positions[1]] == pairs[:, 1])
    return positions[0][inside], positions[1][inside]


def group_by_length(tokens: Sequence[Sequence[int]], pad: int, size: int = GROUP_SIZE) -> list[TokenGroup]:
    """Sort token lists by length and pad each group of at most `size` to its own longest.

    Groups end where the fewest tokens are computed, padding and what a group itself costs (`GROUP_OVERHEAD`) counted
    with them, so that one long caption pads no short ones.

    Args:
        tokens: (M,) token ids of each caption.
        pad: Id of the padding token.
        size: Captions in a group at most.

    Returns:
        Groups, shortest captions first; each caption is in one of them.

    >>> [group.rows.tolist() for group in group_by_length([[1] * 40, [1, 2], [1]], pad=0)]
    [[2, 1], [0]]
    """
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    groups = []
    ends = _cheapest_ends([len(tokens[row]) for row in order])
    parts = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    arrays = [np.array(part, dtype=np.int64) for part in parts]
    for rows in (rows for array in arrays for rows in np.array_split(array, -(-len(array) // size))):
        width = max(len(tokens[row]) for row in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for position, row in enumerate(rows):
            ids[position, : len(tokens[row])] = torch.tensor(tokens[row])
            mask[position, : len(tokens[row])] = 1
        groups.append(TokenGroup(ids, mask, torch.from_numpy(rows)))
    return groups


def _cheapest_ends(lengths: Sequence[int]) -> list[int]:
    """Where groups of captions end.

    lengths: (M,) numbers of tokens, ascending. Returns the end of each group, the last one M; captions of one length
    are never divided. Among all divisions the one of the least cost, by dynamic programming over distinct lengths.
    """
    ends = [0, *(end for end in range(1, len(lengths) + 1) if end == len(lengths) or lengths[end] != lengths[end - 1])]
    costs, starts = [0.0], [0]
    for last, end in enumerate(ends[1:], 1):
        width = lengths[end - 1]
        options = [costs[first] + (end - ends[first]) * width for first in range(last)]
        first = min(range(last), key=options.__getitem__)
        costs.append(options[first] + GROUP_OVERHEAD)
        starts.append(first)
    chosen, last = [], len(ends) - 1
    while last:
        chosen.append(ends[last])
        last = starts[last]
    return chosen[::-1]


def decode_pixels(images: Sequence[ImageSource], load_image: ImageLoader) -> tuple[Tensor, list[int], list[str]]:
    """Decode and transform images; those that cannot be decoded are left out.

    Args:
        images: n images.
        load_image: From an image to a tensor; raises ImageError.

    Returns:
        Pixels of those that were decoded (k, ...), their positions in `images`, and the reason of each other one.
    """
    pixels, positions, failures = [], [], []
    for position, image in enumerate(images):
        try:
            pixels.append(load_image(image))
            positions.append(position)
        except ImageError as error:
            failures.append(str(error))
    return (torch.stack(pixels) if pixels else torch.empty(0)), positions, failures


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw PyTorch's random numbers on the CPU from a seed of their own in a block; the former state is restored.

    Args:
        seed: The seed.

    Yields:
        Nothing.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
