"""From rows to batches: decoding, augmentation, tokenisation, and the division of an epoch into steps.

- An image is decoded once per step and serves all of its captions.
- Captions are tokenised once, before the first step; joined texts, which are others in each epoch, in each step.
- What is drawn at random depends on the seed, the epoch and the place in the epoch, not on the number of workers.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from clipvisionalign.batch import Batch, ImageLoader, Tokenize, TruncationStats, decode_pixels, group_by_length, seeded
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.joined_captions import training_text
from clipvisionalign.data.loader import iterate_dataset

#: A list of images to make a batch of: the seed of what is drawn at random, and the images' places.
SeededIndices = tuple[int, list[int]]

#: Which part of each batch is this process's: its place, and how many there are.
ProcessRank = tuple[int, int]
SINGLE_PROCESS: ProcessRank = (0, 1)


def steps_in_epoch(images: int, batch_size: int, world_size: int = 1) -> int:
    """The number of steps in an epoch, of about equal size and at most `batch_size` images.

    A step in which a process has no image, or that has one image alone, would train nothing: where the last images
    would be such a step, the steps before take them, and may then be larger than `batch_size`.

    Args:
        images: Number of images.
        batch_size: Images in a step, over all processes.
        world_size: Number of processes.

    Returns:
        At least 1.

    >>> steps_in_epoch(100, 32), steps_in_epoch(96, 32), steps_in_epoch(33, 32), steps_in_epoch(3, 2)
    (4, 3, 2, 1)
    """
    return max(1, min(-(-images // batch_size), images // max(2, world_size)))


def step_bounds(images: int, steps: int, step: int) -> tuple[int, int]:
    """Where a step begins and ends among the images of an epoch, each of which is in exactly one step.

    Args:
        images: Number of images.
        steps: Number of steps.
        step: Number of the step, from 0.

    Returns:
        The first image, and the one after the last.

    >>> [step_bounds(10, 3, step) for step in range(3)]
    [(0, 3), (3, 6), (6, 10)]
    """
    return images * step // steps, images * (step + 1) // steps


def local_batch_size(images: int, steps: int, step: int, process_rank: ProcessRank = SINGLE_PROCESS) -> int:
    """Number of images of a step that are one process's.

    Args:
        images: Number of images in the epoch.
        steps: Number of steps in the epoch.
        step: Number of the step, from 0.
        process_rank: Number of the process, from 0, and number of processes.

    Returns:
        The number of images.
    """
    first, last = step_bounds(images, steps, step)
    return len(range(last - first)[process_rank[0] :: process_rank[1]])


def count_chunks(images: int, steps: int, step: int, chunk_size: int, world_size: int = 1) -> int:
    """Number of chunks in which every process takes a step: the same for all processes, and no chunk is empty.

    Args:
        images: Number of images in the epoch.
        steps: Number of steps in the epoch.
        step: Number of the step, from 0.
        chunk_size: Images of a chunk, about.
        world_size: Number of processes.

    Returns:
        At least 1.
    """
    most, least = (local_batch_size(images, steps, step, (rank, world_size)) for rank in (0, world_size - 1))
    return max(1, min(-(-most // chunk_size), least))


class CaptionedBatches(Dataset[Batch]):
    """Makes the batch of any list of images of a data set in memory; `epoch` yields the batches of an epoch.

    Captions are tokenised once, when it is made; joined ones as they come.

    Args:
        data: The data set.
        tokenize: From captions to token ids.
        pad: Id of the padding token.
        load_image: From an image to a tensor; None if features of the images are on disk and none is opened.
        joined_seed: Seed by which captions of an image are joined to one text, another one in each epoch; None for
            each caption as it is.
    """

    def __init__(
        self, data: CaptionedImages, tokenize: Tokenize, pad: int, load_image: ImageLoader | None,
        joined_seed: int | None = None,
    ) -> None:  # fmt: skip
        self.rows = data.rows
        self.pad = pad
        self.load_image = load_image
        self.tokenize, self.joined_seed, self.joined_epoch = tokenize, joined_seed, 1
        start = time.perf_counter()
        joined = joined_seed is not None
        tokens = tokenize([self._joined_text(index) for index in range(len(data))] if joined else data.captions)
        #: Seconds that tokenising took, once for the whole run; of joined texts those of the first epoch.
        self.tokenise_seconds = time.perf_counter() - start
        #: How many captions the text tower's limit cuts; of joined texts those of the first epoch.
        self.truncation = TruncationStats.from_tokens(tokens)
        ends = np.cumsum([len(row.captions) for row in data.rows])
        self.ends = ends
        per_row = () if joined else zip(data.rows, ends, strict=True)
        #: Of each image the tokens of its captions; of none where they are joined.
        self.tokens = [tokens[end - len(row.captions) : end] for row, end in per_row]
        identity = data.image_identity
        self.identity = torch.from_numpy(identity if identity is not None else np.arange(len(data)))
        text_ids = data.shared_text_ids
        self.caption_text_ids = None if text_ids is None else torch.from_numpy(text_ids)
        #: Pairs of an identity and a text that is true of it, sorted, of the whole data set (K, 2).
        self.identity_texts = torch.empty(0, 2, dtype=torch.long)
        if self.caption_text_ids is not None:
            owners = self.identity[torch.from_numpy(data.caption_image)]
            self.identity_texts = torch.stack([owners, self.caption_text_ids], dim=1).unique(dim=0)

    def _joined_text(self, index: int) -> str:
        """The text of an image in the epoch of these batches."""
        assert self.joined_seed is not None
        row = self.rows[index]
        return training_text(row.captions, self.joined_seed, self.joined_epoch, row.name)

    def __len__(self) -> int:
        return len(self.rows)

    def counters(self) -> dict[str, Any]:
        """The counts that a checkpoint keeps.

        Returns:
            Nothing: a stream counts as it is read, a data set in memory is counted from the start.
        """
        return {}

    def __getitem__(self, batch_indices: SeededIndices) -> Batch:
        """The batch of the images dealt: (random seed of this batch, places of the images)."""
        seed, indices = batch_indices
        pixels, skipped = None, list[str]()
        start = time.perf_counter()
        if self.load_image is not None:
            with seeded(seed):
                pixels, decoded_positions, skipped = decode_pixels(
                    [self.rows[i].image for i in indices], self.load_image
                )
            indices = [indices[i] for i in decoded_positions]
        decoded = time.perf_counter()
        index = torch.tensor(indices, dtype=torch.long)
        names = [self.rows[i].name for i in indices[:5]]
        seconds = {"decode": decoded - start}
        captions = None
        if self.joined_seed is None:
            tokens = [caption for i in indices for caption in self.tokens[i]]
            owners = torch.tensor([b for b, i in enumerate(indices) for _ in self.tokens[i]], dtype=torch.long)
            caption_ranges = [range(self.ends[i] - len(self.tokens[i]), self.ends[i]) for i in indices]
            captions = torch.tensor(
                [caption_row for caption_range in caption_ranges for caption_row in caption_range], dtype=torch.long
            )
        else:
            tokens = list(self.tokenize([self._joined_text(i) for i in indices])) if indices else []
            owners = torch.arange(len(indices))
            seconds["tokenise"] = time.perf_counter() - decoded
        groups = group_by_length(tokens, self.pad)
        seconds["collate"] = time.perf_counter() - start - sum(seconds.values())
        identity = self.identity[index]
        batch = Batch(index, pixels, groups, owners, identity, captions, names, skipped, seconds)
        if self.caption_text_ids is None or captions is None:
            return batch
        # The pairs are sorted by identity: each has a stretch of its own.
        owners, caption_range = self.identity_texts[:, 0].contiguous(), identity.unique()
        bounds = (torch.searchsorted(owners, caption_range, right=right).tolist() for right in (False, True))
        pairs = [self.identity_texts[first:last] for first, last in zip(*bounds, strict=True)]
        return replace(
            batch,
            caption_text_id=self.caption_text_ids[captions],
            identity_texts=torch.cat([self.identity_texts[:0], *pairs]),
        )

    def steps_per_epoch(self, batch_size: int, world_size: int = 1) -> int:
        """Number of steps in an epoch.

        Args:
            batch_size: Images in a step, over all processes.
            world_size: Number of processes.

        Returns:
            See `steps_in_epoch`.
        """
        return steps_in_epoch(len(self.rows), batch_size, world_size)

    def num_chunks(self, batch_size: int, step: int, chunk_size: int, world_size: int = 1) -> int:
        """Number of chunks in which a step of an epoch comes, twice.

        Args:
            batch_size: Images in a step, over all processes.
            step: Number of the step, from 0.
            chunk_size: Images of a chunk, about; 0 for undivided steps.
            world_size: Number of processes.

        Returns:
            The number; 0 for an undivided step.
        """
        return chunk_size and count_chunks(
            len(self.rows), self.steps_per_epoch(batch_size, world_size), step, chunk_size, world_size
        )

    def plan_epoch(
        self,
        batch_size: int,
        epoch: int,
        seed: int,
        start: int = 0,
        chunk_size: int = 0,
        process_rank: ProcessRank = SINGLE_PROCESS,
    ) -> list[SeededIndices]:
        """The lists of images of one epoch: every image exactly once, shuffled each epoch.

        Args:
            batch_size: Images in a step, over all processes.
            epoch: Number of the epoch, which the order depends on.
            seed: Seed, which the order depends on.
            start: First step, from 0; the steps before it are left out.
            chunk_size: Images of a list, about; the lists of a step come one after the other, and then once more, for
                gradient caching. 0 for one list a step.
            process_rank: Number of the process, from 0, and number of processes.

        Returns:
            For each list the seed of what is drawn at random in it, and the numbers of its images.
        """
        count = len(self.rows)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        steps = self.steps_per_epoch(batch_size, process_rank[1])
        plan: list[SeededIndices] = []
        for step in range(start, steps):
            batch_seed = int(np.random.default_rng([seed, epoch, step, *process_rank[:1]]).integers(1 << 62))
            indices = order[slice(*step_bounds(count, steps, step))][process_rank[0] :: process_rank[1]].tolist()
            if not chunk_size:
                plan.append((batch_seed, indices))
                continue
            chunk_count = self.num_chunks(batch_size, step, chunk_size, process_rank[1])
            bounds = [len(indices) * i // chunk_count for i in range(chunk_count + 1)]
            lists = [(batch_seed + first, indices[first:last]) for first, last in pairwise(bounds)]
            plan += lists + lists
        return plan

    def load(self, plan: list[SeededIndices], workers: int = 0) -> Iterator[Batch]:
        """The batches of lists of images.

        Args:
            plan: The lists, as `plan_epoch` returns them.
            workers: Number of worker processes; 0 for none.

        Yields:
            A batch for each list, in their order.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield from iterate_dataset(self, workers, plan)

    def epoch(
        self,
        batch_size: int,
        epoch: int,
        seed: int,
        workers: int = 0,
        start: int = 0,
        process_rank: ProcessRank = SINGLE_PROCESS,
        chunk_size: int = 0,
    ) -> Iterator[Batch]:
        """The batches of one epoch; with `chunk_size` each one's chunks, twice.

        Args:
            batch_size: Images in a step, over all processes.
            epoch: Number of the epoch.
            seed: Seed of the order, and of what is drawn at random.
            workers: Number of worker processes; 0 for none.
            start: First step, from 0.
            process_rank: Number of the process, from 0, and number of processes.
            chunk_size: As in `plan_epoch`.

        Returns:
            The batches of this process, made as they are asked for.
        """
        of_epoch = copy.copy(self)
        of_epoch.joined_epoch = epoch
        return of_epoch.load(self.plan_epoch(batch_size, epoch, seed, start, chunk_size, process_rank), workers)

    @property
    def captions_per_image(self) -> float:
        """Mean number of texts per image."""
        if self.joined_seed is not None:
            return 1.0
        return sum(map(len, self.tokens)) / max(1, len(self.tokens))
