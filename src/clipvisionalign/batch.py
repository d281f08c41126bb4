"""`Batch`: the tensors that pass from the data to the models, and how captions and pictures become tensors.

A ground floor of its own, because the data room makes batches, the models take them, and neither knows the other.

- Captions go through the text tower in groups of about equal length, each padded to its own longest only.
- Partners are told by identities, and by texts where equal captions belong to the same images, so that no caption of
  an image (or of its identity) is ever taken for a negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.images import Picture, PictureError


class Tokens(list[list[int]]):
    """The tokens of captions, a list each, cut where a caption has too many. lost: (M,) how many were cut off."""

    def __init__(self, ids: Sequence[list[int]], lost: Sequence[int] = ()) -> None:
        super().__init__(ids)
        self.lost = list(lost) or [0] * len(self)


@dataclass(frozen=True)
class CutCaptions:
    """How many of so many captions were cut, how many tokens that cost them all, and how many the longest had."""

    captions: int = 0
    cut: int = 0
    tokens_lost: int = 0
    longest: int = 0

    @classmethod
    def of(cls, tokens: Sequence[list[int]]) -> CutCaptions:
        """Count. Lists of which nothing more is known were not cut."""
        lost = tokens.lost if isinstance(tokens, Tokens) else [0] * len(tokens)
        longest = max((len(ids) + more for ids, more in zip(tokens, lost, strict=True)), default=0)
        return cls(len(tokens), sum(map(bool, lost)), sum(lost), longest)

    def __add__(self, other: CutCaptions) -> CutCaptions:
        return CutCaptions(
            self.captions + other.captions, self.cut + other.cut, self.tokens_lost + other.tokens_lost,
            max(self.longest, other.longest),
        )  # fmt: skip

    def to_dict(self) -> dict[str, float]:
        """The counts, and the share of captions that were cut."""
        return {**asdict(self), "share": self.cut / max(1, self.captions)}

    def told(self, split: str, max_tokens: int) -> str:
        """One line."""
        return (
            f"{split}: {self.cut:,} of {self.captions:,} captions ({100 * self.cut / max(1, self.captions):.1f} %) are "
            f"longer than {max_tokens} tokens and cut; the longest has {self.longest:,}, {self.tokens_lost:,} tokens "
            "are lost"
        )


Tokenize = Callable[[Sequence[str]], Sequence[list[int]]]
#: A function from a picture to the tensor that a tower sees (`PictureInput.look`); raises PictureError.
Look = Callable[[Picture], Tensor]

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
    caption_image: (M,) for each caption its own image's place in B.
    caption_index: (M,) places of the captions in the data set, None in a stream.
    identity: (B,) what tells which captions belong to an image: those of all images of the same identity.
    names: what the images are called, for messages.
    skipped: pictures that could not be decoded and are not in the batch.
    seconds: what making the batch took, by kind of work.
    caption_text: (M,) numbers of the captions' words, where captions that are equal word by word belong to the same
        images; else None.
    true_texts: (K, 2) with it, (identity, caption_text) of everything that is true of the images' identities.
    cut: how many of a stream's captions were cut; None where that is known of the whole data set.
    complaints: what of a stream's samples was left out or mended, though they are in the batch.
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
    caption_text: Tensor | None = None
    true_texts: Tensor | None = None
    cut: CutCaptions | None = None
    complaints: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def caption_identity(self) -> Tensor:
        """(M,) for each caption the identity of its image."""
        return self.identity[self.caption_image]

    @property
    def partners(self) -> Tensor:
        """(B, M) bool, true where the caption belongs to the image; see `partner_table`."""
        return partner_table(self.identity, self.caption_identity, self.caption_text, self.true_texts)

    @property
    def order(self) -> Tensor:
        """(M,) the captions' places in the order in which the groups hold them."""
        return torch.cat([group.rows for group in self.captions])

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        groups = [TokenGroup(g.ids.to(device), g.mask.to(device), g.rows.to(device)) for g in self.captions]
        pixels = None if self.pixels is None else self.pixels.to(device, non_blocking=True)
        owners, identity = self.caption_image.to(device), self.identity.to(device)
        texts, true = (None if part is None else part.to(device) for part in (self.caption_text, self.true_texts))
        return replace(
            self, pixels=pixels, captions=groups, caption_image=owners, identity=identity, caption_text=texts,
            true_texts=true,
        )  # fmt: skip

    def without_pixels(self) -> Batch:
        """All but the pictures themselves."""
        return replace(self, pixels=None)

    def chunks(self, count: int, pad: int) -> list[Batch]:
        """The same images and captions in `count` batches of about one size; as many as images at most."""
        count = min(count, len(self))
        bounds = [len(self) * number // count for number in range(count + 1)]
        tokens: dict[int, list[int]] = {}
        for group in self.captions:
            lengths = group.mask.sum(dim=1).tolist()
            for ids, length, row in zip(group.ids.tolist(), lengths, group.rows.tolist(), strict=True):
                tokens[row] = ids[:length]
        parts = []
        for first, last in pairwise(bounds):
            some = slice(first, last)
            own = ((self.caption_image >= some.start) & (self.caption_image < some.stop)).nonzero().flatten()
            pixels = None if self.pixels is None else self.pixels[some]
            groups = group_by_length([tokens[row] for row in own.tolist()], pad)
            skipped = self.skipped if not first else []
            owners, names = self.caption_image[own] - first, self.names[some]
            index = None if self.caption_index is None else self.caption_index[own]
            identity = self.identity[some]
            text = None if self.caption_text is None else self.caption_text[own]
            true = self.true_texts
            if true is not None:
                true = true[torch.isin(true[:, 0], identity)]
            parts.append(
                Batch(
                    self.image_index[some], pixels, groups, owners, identity, index, names, skipped, caption_text=text,
                    true_texts=true,
                )
            )  # fmt: skip
        return parts

    def in_one_group(self, pad: int) -> Batch:
        """The same batch, its captions padded to the longest of all: for models that need one call on every process."""
        width = max(group.ids.shape[1] for group in self.captions)
        ids, masks = (
            torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])
            for parts, fill in (([g.ids for g in self.captions], pad), ([g.mask for g in self.captions], 0))
        )
        return replace(self, captions=[TokenGroup(ids, masks, self.order)])


def partner_table(
    identity: Tensor, caption_identity: Tensor, caption_text: Tensor | None = None, true_texts: Tensor | None = None
) -> Tensor:
    """Which captions belong to which images: bool (B, M).

    identity: (B,) of images; caption_identity: (M,) of the captions' own images. A caption belongs to every image of
    its own image's identity. With caption_text (M,) and true_texts (K, 2), pairs of an identity and a text that is true
    of it, a caption belongs to every image of an identity that its text is true of: a relation between texts and
    images, so that two images that share a caption do not share their others.
    """
    if caption_text is None or true_texts is None:
        return identity[:, None] == caption_identity[None, :]
    identities, row = identity.unique(return_inverse=True)
    texts, column = caption_text.unique(return_inverse=True)
    found = torch.zeros(len(identities), len(texts), dtype=torch.bool, device=identity.device)
    found[_numbered(identities, texts, true_texts)] = True
    return found[row][:, column]


def are_partners(
    identity: Tensor, caption_identity: Tensor, caption_text: Tensor | None = None, true_texts: Tensor | None = None
) -> Tensor:
    """`partner_table` for pairs: identity (Q,) of images and what is known of a caption each, (Q,) -> bool (Q,)."""
    if caption_text is None or true_texts is None:
        return identity == caption_identity
    identities, row = identity.unique(return_inverse=True)
    texts, column = caption_text.unique(return_inverse=True)
    left, right = _numbered(identities, texts, true_texts)
    return torch.isin(row * len(texts) + column, left * len(texts) + right)


def _numbered(identities: Tensor, texts: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs (K, 2) as places in two sorted rows of numbers; those that are in both rows only."""
    if not len(identities) or not len(texts):
        return pairs.new_empty(0), pairs.new_empty(0)
    places = [
        torch.searchsorted(known, own.contiguous()).clamp(max=len(known) - 1)
        for known, own in ((identities, pairs[:, 0]), (texts, pairs[:, 1]))
    ]
    inside = (identities[places[0]] == pairs[:, 0]) & (texts[places[1]] == pairs[:, 1])
    return places[0][inside], places[1][inside]


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


def decode_pixels(images: Sequence[Picture], look: Look) -> tuple[Tensor, list[int], list[str]]:
    """Decode and transform pictures: pixels (n, 3, S, S), the places that could be, and why the rest could not."""
    pixels, good, failures = [], [], []
    for place, image in enumerate(images):
        try:
            pixels.append(look(image))
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
