"""From rows to batches: decode, augment, tokenise, deal.

- A picture is decoded once per step and serves all of its captions.
- Captions are tokenised once, before the first step.
- What is drawn at random depends on the seed, the epoch and the place in the epoch, not on the number of workers.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from clipvisionalign.batch import Batch, CutCaptions, Look, Tokenize, decode_pixels, group_by_length, seeded
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.loading import loaded

#: A list of images to make a batch of: the seed of what is drawn at random, and the images' places.
Dealt = tuple[int, list[int]]

#: Which part of each batch is this process's: its place, and how many there are.
Share = tuple[int, int]
ALL: Share = (0, 1)


def steps_in_epoch(images: int, batch: int, processes: int = 1) -> int:
    """In how many steps an epoch of `images` is dealt: of `batch` images at most, and as even as can be.

    A step of which a process has no image, or of one image alone, teaches nothing: where the last few images would be
    that, the steps before take them along.

    >>> steps_in_epoch(100, 32), steps_in_epoch(96, 32), steps_in_epoch(33, 32), steps_in_epoch(3, 2)
    (4, 3, 2, 1)
    """
    return max(1, min(-(-images // batch), images // max(2, processes)))


def step_bounds(images: int, steps: int, step: int) -> tuple[int, int]:
    """Where a step begins and ends among the images of an epoch, each of which is in exactly one step.

    >>> [step_bounds(10, 3, step) for step in range(3)]
    [(0, 3), (3, 6), (6, 10)]
    """
    return images * step // steps, images * (step + 1) // steps


def own_size(images: int, steps: int, step: int, share: Share = ALL) -> int:
    """How many images of a step are one process's."""
    first, last = step_bounds(images, steps, step)
    return len(range(last - first)[share[0] :: share[1]])


def chunks_of(images: int, steps: int, step: int, chunk: int, processes: int = 1) -> int:
    """In how many chunks of about `chunk` images every process takes a step: the same for all, none of them empty."""
    most, least = (own_size(images, steps, step, (number, processes)) for number in (0, processes - 1))
    return max(1, min(-(-most // chunk), least))


class CaptionedBatches(Dataset[Batch]):
    """Makes the batch of any list of images; `epoch` deals an epoch's lists and yields their batches.

    tokenize: captions to token lists; pad: the tokenizer's padding token.
    look: picture to tensor, or None if the pictures' features are on disk and no picture is to be opened.
    """

    def __init__(self, data: CaptionedImages, tokenize: Tokenize, pad: int, look: Look | None) -> None:
        self.rows = data.rows
        self.pad = pad
        self.look = look
        start = time.perf_counter()
        tokens = tokenize(data.captions)
        #: Seconds that tokenising took, once for the whole run.
        self.tokenise_seconds = time.perf_counter() - start
        #: How many captions the text tower's limit cuts.
        self.cut = CutCaptions.of(tokens)
        ends = np.cumsum([len(row.captions) for row in data.rows])
        self.ends = ends
        self.tokens = [tokens[end - len(row.captions) : end] for row, end in zip(data.rows, ends, strict=True)]
        identity = data.image_identity
        self.identity = torch.from_numpy(identity if identity is not None else np.arange(len(data)))
        texts = data.caption_group
        self.texts = None if texts is None else torch.from_numpy(texts)
        #: Pairs of an identity and a text that is true of it, sorted, of the whole data set (K, 2).
        self.true_texts = torch.empty(0, 2, dtype=torch.long)
        if self.texts is not None:
            owners = self.identity[torch.from_numpy(data.caption_image)]
            self.true_texts = torch.stack([owners, self.texts], dim=1).unique(dim=0)

    def __len__(self) -> int:
        return len(self.rows)

    def counted(self) -> dict[str, Any]:
        """Nothing: what is counted of a stream as it passes is known here from the start."""
        return {}

    def __getitem__(self, dealt: Dealt) -> Batch:
        """The batch of the images dealt: (random seed of this batch, places of the images)."""
        seed, places = dealt
        pixels, skipped = None, list[str]()
        start = time.perf_counter()
        if self.look is not None:
            with seeded(seed):
                pixels, good, skipped = decode_pixels([self.rows[i].image for i in places], self.look)
            places = [places[i] for i in good]
        decoded = time.perf_counter()
        index = torch.tensor(places, dtype=torch.long)
        tokens = [caption for i in places for caption in self.tokens[i]]
        owners = torch.tensor([b for b, i in enumerate(places) for _ in self.tokens[i]], dtype=torch.long)
        groups = group_by_length(tokens, self.pad)
        seconds = {"decode": decoded - start, "collate": time.perf_counter() - decoded}
        names = [self.rows[i].name for i in places[:5]]
        own = [range(self.ends[i] - len(self.tokens[i]), self.ends[i]) for i in places]
        captions = torch.tensor([number for some in own for number in some], dtype=torch.long)
        identity = self.identity[index]
        batch = Batch(index, pixels, groups, owners, identity, captions, names, skipped, seconds)
        if self.texts is None:
            return batch
        # The pairs are sorted by identity: each has a stretch of its own.
        owners, some = self.true_texts[:, 0].contiguous(), identity.unique()
        bounds = (torch.searchsorted(owners, some, right=right).tolist() for right in (False, True))
        true = [self.true_texts[first:last] for first, last in zip(*bounds, strict=True)]
        return replace(batch, caption_text=self.texts[captions], true_texts=torch.cat([self.true_texts[:0], *true]))

    def steps(self, batch: int, processes: int = 1) -> int:
        """Steps in an epoch."""
        return steps_in_epoch(len(self.rows), batch, processes)

    def chunks(self, batch: int, step: int, chunk: int, processes: int = 1) -> int:
        """In how many chunks a step of an epoch comes, twice; 0 for whole. See `deal`."""
        return chunk and chunks_of(len(self.rows), self.steps(batch, processes), step, chunk, processes)

    def deal(
        self, batch: int, epoch: int, seed: int, start: int = 0, chunk: int = 0, share: Share = ALL
    ) -> list[Dealt]:
        """The lists of one epoch, from step `start` on: every image exactly once, dealt anew each epoch.

        chunk: images of a list, about; the lists of a step come one after the other, and then once more, for a gradient
        cache that needs them twice. 0 for one list a step. share: this process's place among how many.
        """
        count = len(self.rows)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        steps = self.steps(batch, share[1])
        found: list[Dealt] = []
        for step in range(start, steps):
            number = int(np.random.default_rng([seed, epoch, step, *share[:1]]).integers(1 << 62))
            places = order[slice(*step_bounds(count, steps, step))][share[0] :: share[1]].tolist()
            if not chunk:
                found.append((number, places))
                continue
            parts = self.chunks(batch, step, chunk, share[1])
            cuts = [len(places) * part // parts for part in range(parts + 1)]
            lists = [(number + first, places[first:last]) for first, last in pairwise(cuts)]
            found += lists + lists
        return found

    def load(self, dealt: list[Dealt], workers: int = 0) -> Iterator[Batch]:
        """The batches of lists, in their order."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield from loaded(self, workers, dealt)

    def epoch(
        self, batch: int, epoch: int, seed: int, workers: int = 0, start: int = 0, share: Share = ALL, chunk: int = 0
    ) -> Iterator[Batch]:
        """The batches of one epoch, from number `start` on; with `chunk` each one's chunks, twice. See `deal`."""
        return self.load(self.deal(batch, epoch, seed, start, chunk, share), workers)

    @property
    def captions_per_image(self) -> float:
        """Mean."""
        return sum(map(len, self.tokens)) / max(1, len(self.tokens))
