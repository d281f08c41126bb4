"""Training batches from a stream: data that is never in memory as a whole.

- A stream resumes at any step: what has been used is read past without being decoded, so that the rest comes exactly
  once after a kill, as long as processes and workers are as many as before.
- An invalid sample is counted and skipped; more than `BAD_SHARE` of them stop the training with the first one's name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from clipvisionalign.batch import Batch, CutCaptions, Look, Tokenize, decode_pixels, group_by_length, seeded
from clipvisionalign.data.batches import ALL, Share, own_size, steps_in_epoch
from clipvisionalign.data.captioned import DataError, Identity, hashed, text_number
from clipvisionalign.data.loading import loaded
from clipvisionalign.data.streams.samples import Sample
from clipvisionalign.data.streams.sources import Saved, Shards

#: Share of samples that may be bad; a set of a few samples may have a few.
BAD_SHARE, BAD_FEW = 0.01, 10


class StreamedBatches(IterableDataset[Batch]):
    """Batches from a stream; the counterpart of `CaptionedBatches`, with the same calls."""

    def __init__(
        self, stream: Shards | Saved, tokenize: Tokenize, pad: int, look: Look | None, identity: Identity = "auto"
    ) -> None:
        self.identity = identity
        self.stream, self.tokenize, self.pad, self.look = stream, tokenize, pad, look
        self.tokenise_seconds = 0.0
        #: An epoch as it is being read: batch size, epoch, seed, steps to read past, share.
        self.reading: tuple[int, int, int, int, Share] = (1, 0, 0, 0, ALL)
        self.captions_per_image = 1.0
        #: How many of the captions that have passed the text tower's limit has cut.
        self.cut = CutCaptions()
        self.tally = Tally()

    def __len__(self) -> int:
        return self.stream.count

    def steps(self, batch: int, processes: int = 1) -> int:
        """Steps in an epoch."""
        return steps_in_epoch(self.stream.count, batch, processes)

    def chunks(self, batch: int, step: int, chunk: int, processes: int = 1) -> int:
        """0: a step comes whole, once."""
        return 0

    def epoch(
        self, batch: int, epoch: int, seed: int, workers: int = 0, start: int = 0, share: Share = ALL, chunk: int = 0
    ) -> Iterator[Batch]:
        """This process's batches of one epoch, from step `start` on, whole whatever `chunk` says."""
        self.reading = (batch, epoch, seed, start, share)
        for found in loaded(self, workers):
            self.tally.add(found, self.stream.source)
            self.cut += found.cut or CutCaptions()
            self.captions_per_image = len(found.caption_image) / max(1, len(found))
            yield found

    def counted(self) -> dict[str, Any]:
        """What has been counted so far, to go on counting with `count_on`."""
        return {"cut": asdict(self.cut), "tally": asdict(self.tally), "captions_per_image": self.captions_per_image}

    def count_on(self, counted: Sequence[dict[str, Any]]) -> None:
        """Go on from what was counted before: by one reader, or by several together."""
        for each in counted:
            self.cut += CutCaptions(**each["cut"])
            self.tally += Tally(**each["tally"])
            self.captions_per_image = each["captions_per_image"]

    def __iter__(self) -> Iterator[Batch]:
        batch, epoch, seed, start, share = self.reading
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # The loader asks its workers in turn, from the first one on: that one makes the first step that is wanted.
        worker = (worker + start) % workers
        count, steps = self.stream.count, self.steps(batch, share[1])
        sizes = [own_size(count, steps, step, share) for step in range(worker, steps, workers)]
        # The readers' stretches lie one behind the other: process by process, worker by worker.
        first = 0
        for step in range(steps):
            each, more = divmod(own_size(count, steps, step), share[1])
            # Those of the processes before this one, and those that earlier workers of this one read.
            first += share[0] * each + min(share[0], more)
            first += each + (share[0] < more) if step % workers < worker else 0
        samples = self.stream.read(epoch, seed, first, first + sum(sizes))
        done = len(range(worker, start, workers))
        # Read past without decoding: the order is that of the undisturbed epoch.
        for _ in islice(samples, sum(sizes[:done])):
            pass
        for size in sizes[done:]:
            yield self._batch(list(islice(samples, size)), seed)

    def _batch(self, samples: list[Sample], seed: int) -> Batch:
        skipped = [f"{sample.name}: {sample.bad}" for sample in samples if sample.bad]
        complaints = [str(problem) for sample in samples for problem in sample.complaints]
        samples = [sample for sample in samples if not sample.bad]
        begin, pixels = time.perf_counter(), None
        numbers = [
            hashed(sample.name if self.identity == "none" else sample.identity or sample.name) for sample in samples
        ]
        if self.look is not None:
            with seeded(seed + (numbers[0] if numbers else 0)):
                pixels, good, failed = decode_pixels([sample.image for sample in samples], self.look)
            there = set(good)
            bad = [sample.name for place, sample in enumerate(samples) if place not in there]
            skipped += [f"{self.stream.source}, {name}: {why}" for name, why in zip(bad, failed, strict=True)]
            samples, numbers = [samples[i] for i in good], [numbers[i] for i in good]
        decoded = time.perf_counter()
        tokens = self.tokenize([caption for sample in samples for caption in sample.captions]) if samples else []
        tokenised = time.perf_counter()
        owners = torch.tensor([b for b, sample in enumerate(samples) for _ in sample.captions], dtype=torch.long)
        identity = torch.tensor(numbers, dtype=torch.long)
        seconds = {"decode": decoded - begin, "tokenise": tokenised - decoded}
        groups = group_by_length(tokens, self.pad)
        names = [sample.name for sample in samples]
        cut = CutCaptions.of(tokens)
        batch = Batch(identity, pixels, groups, owners, identity, None, names, skipped, seconds, cut=cut)
        batch.complaints = complaints
        if self.identity != "caption":
            return batch
        # Of a stream no more is known than what is in a step: texts that are true of its own images.
        captions = [text_number(caption) for sample in samples for caption in sample.captions]
        texts = torch.tensor(captions, dtype=torch.long)
        return replace(batch, caption_text=texts, true_texts=torch.stack([identity[owners], texts], dim=1))


def too_many_bad(bad: int, count: int) -> bool:
    """Whether `bad` of `count` samples, or steps, are more than a training goes on with."""
    return bad > max(BAD_FEW, BAD_SHARE * count)


@dataclass
class Tally:
    """Counts samples and bad ones; too many stop the training. complaints: how often a part of a good one was left out
    or mended, and the first of them."""

    good: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)
    complaints: int = 0
    first: list[str] = field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.good + other.good, self.bad + other.bad, (self.reasons + other.reasons)[:1],
            self.complaints + other.complaints, (self.first + other.first)[:1],
        )  # fmt: skip

    def add(self, batch: Batch, source: str) -> None:
        self.good += len(batch)
        self.bad += len(batch.skipped)
        self.reasons += batch.skipped[: 1 if not self.reasons else 0]
        self.complaints += len(batch.complaints)
        self.first += batch.complaints[: 1 if not self.first else 0]
        if too_many_bad(self.bad, self.good + self.bad):
            raise DataError(
                f"{source}: {self.bad:,} of {self.good + self.bad:,} samples are bad, more than "
                f"{100 * BAD_SHARE:g} %; the first one: {self.reasons[0]}"
            )
