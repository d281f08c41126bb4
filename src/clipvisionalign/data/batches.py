"""From rows to batches: decode, augment, tokenise, deal.

- A picture is decoded once per step and serves all of its captions.
- Captions are tokenised once, before the first step.
- What is drawn at random depends on the seed, the epoch and the place in the epoch, not on the number of workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clipvisionalign.batch import Batch, Tokenize, Transform, decode_pixels, group_by_length, seeded
from clipvisionalign.data.captioned import CaptionedImages


class CaptionedBatches(Dataset[Batch]):
    """Makes the batch of any list of images; `epochs` deals an epoch's lists and yields their batches.

    tokenize: captions to token lists; pad: the tokenizer's padding token.
    transform: RGB picture to tensor, or None if the pictures' features are on disk and no picture is to be opened.
    """

    def __init__(self, data: CaptionedImages, tokenize: Tokenize, pad: int, transform: Transform | None) -> None:
        self.rows = data.rows
        self.pad = pad
        self.transform = transform
        tokens = tokenize(data.captions)
        ends = np.cumsum([len(row.captions) for row in data.rows])
        self.tokens = [tokens[end - len(row.captions) : end] for row, end in zip(data.rows, ends, strict=True)]
        identity = data.image_identity
        self.identity = torch.from_numpy(identity if identity is not None else np.arange(len(data)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, dealt: tuple[int, Sequence[int]]) -> Batch:
        """The batch of the images dealt: (random seed of this batch, places of the images)."""
        seed, places = dealt
        pixels, skipped = None, list[str]()
        if self.transform is not None:
            with seeded(seed):
                pixels, good, skipped = decode_pixels([self.rows[i].image for i in places], self.transform)
            places = [places[i] for i in good]
        index = torch.tensor(places, dtype=torch.long)
        tokens = [caption for i in places for caption in self.tokens[i]]
        owners = torch.tensor([b for b, i in enumerate(places) for _ in self.tokens[i]], dtype=torch.long)
        identity = self.identity[index]
        partners = identity[:, None] == identity[owners][None, :]
        return Batch(index, pixels, group_by_length(tokens, self.pad), partners, owners, skipped)

    def steps(self, batch: int) -> int:
        """Steps in an epoch: the last images that do not fill a batch wait for the next deal."""
        return max(1, len(self.rows) // batch)

    def epoch(self, batch: int, epoch: int, seed: int, workers: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from number `start` on: every image at most once, dealt anew each epoch."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.rows))
        size = min(batch, len(order))
        dealt = [
            (int(np.random.default_rng([seed, epoch, step]).integers(1 << 62)), order[step * size : (step + 1) * size])
            for step in range(start, self.steps(batch))
        ]
        lists = [(number, places.tolist()) for number, places in dealt]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            # The loader draws its workers' seeds from a generator of its own, so that beginning anew draws none.
            own = torch.Generator().manual_seed(0)
            loader = DataLoader(self, batch_size=None, sampler=lists, num_workers=workers, generator=own)
            yield from loader
