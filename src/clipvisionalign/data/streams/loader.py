"""Training batches from a stream, which is never in memory as a whole.

- A stream resumes at any step: what has been used is read past without being decoded, so that the rest comes exactly
  once after a kill, as long as processes and workers are as many as before.
- An invalid sample is counted and skipped; more than `MAX_BAD_SHARE` of them stop the training with the first one's
  name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from clipvisionalign.batch import Batch, ImageLoader, Tokenize, TruncationStats, decode_pixels, group_by_length, seeded
from clipvisionalign.data.batches import SINGLE_PROCESS, ProcessRank, local_batch_size, steps_in_epoch
from clipvisionalign.data.captioned import DataError, IdentityMode, hash_text, text_id
from clipvisionalign.data.loader import iterate_dataset
from clipvisionalign.data.streams.samples import Sample
from clipvisionalign.data.streams.sources import SavedDatasetStream, ShardStream

#: Share of samples that may be bad; a set of a few samples may have a few.
MAX_BAD_SHARE, ALLOWED_BAD_SAMPLES = 0.01, 10


class StreamedBatches(IterableDataset[Batch]):
    """Batches from a stream; the counterpart of `CaptionedBatches`, with the same calls."""

    def __init__(
        self,
        stream: ShardStream | SavedDatasetStream,
        tokenize: Tokenize,
        pad: int,
        load_image: ImageLoader | None,
        identity: IdentityMode = "auto",
    ) -> None:
        self.identity = identity
        self.stream, self.tokenize, self.pad, self.load_image = stream, tokenize, pad, load_image
        self.tokenise_seconds = 0.0
        #: An epoch as it is being read: batch size, epoch, seed, steps to read past, share.
        self.epoch_arguments: tuple[int, int, int, int, ProcessRank] = (1, 0, 0, 0, SINGLE_PROCESS)
        self.captions_per_image = 1.0
        #: How many of the captions that have passed the text tower's limit has cut.
        self.truncation = TruncationStats()
        self.sample_counts = SampleCounts()

    def __len__(self) -> int:
        return self.stream.count

    def steps_per_epoch(self, batch_size: int, world_size: int = 1) -> int:
        """Steps in an epoch."""
        return steps_in_epoch(self.stream.count, batch_size, world_size)

    def num_chunks(self, batch_size: int, step: int, chunk_size: int, world_size: int = 1) -> int:
        """0: a step comes whole, once."""
        return 0

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
        """This process's batches of one epoch, from step `start` on, whole for any `chunk_size`."""
        self.epoch_arguments = (batch_size, epoch, seed, start, process_rank)
        for loaded_batch in iterate_dataset(self, workers):
            self.sample_counts.add(loaded_batch, self.stream.source)
            self.truncation += loaded_batch.truncation or TruncationStats()
            self.captions_per_image = len(loaded_batch.caption_image) / max(1, len(loaded_batch))
            yield loaded_batch

    def counters(self) -> dict[str, Any]:
        """What has been counted so far, for `restore_counters`."""
        return {
            "cut": asdict(self.truncation),
            "tally": asdict(self.sample_counts),
            "captions_per_image": self.captions_per_image,
        }

    def restore_counters(self, counters: Sequence[dict[str, Any]]) -> None:
        """Continue from earlier counts: of one reader, or of several together."""
        for counter in counters:
            self.truncation += TruncationStats(**counter["cut"])
            self.sample_counts += SampleCounts(**counter["tally"])
            self.captions_per_image = counter["captions_per_image"]

    def __iter__(self) -> Iterator[Batch]:
        batch_size, epoch, seed, start, process_rank = self.epoch_arguments
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # The loader asks its workers in turn, from the first one on: that one makes the first step that is wanted.
        worker = (worker + start) % workers
        count, steps = self.stream.count, self.steps_per_epoch(batch_size, process_rank[1])
        sizes = [local_batch_size(count, steps, step, process_rank) for step in range(worker, steps, workers)]
        # The readers' stretches lie one behind the other: process by process, worker by worker.
        first = 0
        for step in range(steps):
            base, remainder = divmod(local_batch_size(count, steps, step), process_rank[1])
            # Those of the processes before this one, and those that earlier workers of this one read.
            first += process_rank[0] * base + min(process_rank[0], remainder)
            first += base + (process_rank[0] < remainder) if step % workers < worker else 0
        samples = self.stream.read(epoch, seed, first, first + sum(sizes))
        done = len(range(worker, start, workers))
        # Read past without decoding: the order is that of the undisturbed epoch.
        for _ in islice(samples, sum(sizes[:done])):
            pass
        for size in sizes[done:]:
            yield self._make_batch(list(islice(samples, size)), seed)

    def _make_batch(self, samples: list[Sample], seed: int) -> Batch:
        skipped = [f"{sample.name}: {sample.error}" for sample in samples if sample.error]
        warnings = [str(problem) for sample in samples for problem in sample.warnings]
        samples = [sample for sample in samples if not sample.error]
        begin, pixels = time.perf_counter(), None
        identity_ids = [
            hash_text(sample.name if self.identity == "none" else sample.identity or sample.name) for sample in samples
        ]
        if self.load_image is not None:
            with seeded(seed + (identity_ids[0] if identity_ids else 0)):
                pixels, decoded_positions, failed = decode_pixels([sample.image for sample in samples], self.load_image)
            decoded_set = set(decoded_positions)
            bad = [sample.name for position, sample in enumerate(samples) if position not in decoded_set]
            skipped += [f"{self.stream.source}, {name}: {why}" for name, why in zip(bad, failed, strict=True)]
            samples, identity_ids = (
                [samples[i] for i in decoded_positions],
                [identity_ids[i] for i in decoded_positions],
            )
        decoded = time.perf_counter()
        tokens = self.tokenize([caption for sample in samples for caption in sample.captions]) if samples else []
        tokenised = time.perf_counter()
        owners = torch.tensor([b for b, sample in enumerate(samples) for _ in sample.captions], dtype=torch.long)
        identity = torch.tensor(identity_ids, dtype=torch.long)
        seconds = {"decode": decoded - begin, "tokenise": tokenised - decoded}
        groups = group_by_length(tokens, self.pad)
        names = [sample.name for sample in samples]
        truncation = TruncationStats.from_tokens(tokens)
        batch = Batch(identity, pixels, groups, owners, identity, None, names, skipped, seconds, truncation=truncation)
        batch.warnings = warnings
        if self.identity != "caption":
            return batch
        # Of a stream only one step is available: texts that are true of its own images.
        captions = [text_id(caption) for sample in samples for caption in sample.captions]
        text_ids = torch.tensor(captions, dtype=torch.long)
        return replace(batch, caption_text_id=text_ids, identity_texts=torch.stack([identity[owners], text_ids], dim=1))


def too_many_bad(bad: int, count: int) -> bool:
    """Whether `bad` of `count` samples, or steps, are too many for a training to continue."""
    return bad > max(ALLOWED_BAD_SAMPLES, MAX_BAD_SHARE * count)


@dataclass
class SampleCounts:
    """Counts samples and bad ones; too many stop the training.

    complaints: how often a part of a good one was left out or mended, and the first of them.
    """

    good: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)
    complaints: int = 0
    first: list[str] = field(default_factory=list)

    def __add__(self, other: SampleCounts) -> SampleCounts:
        return SampleCounts(
            self.good + other.good, self.bad + other.bad, (self.reasons + other.reasons)[:1],
            self.complaints + other.complaints, (self.first + other.first)[:1],
        )  # fmt: skip

    def add(self, batch: Batch, source: str) -> None:
        """Add a batch's counts. Raises DataError where too many of the samples of `source` are bad."""
        self.good += len(batch)
        self.bad += len(batch.skipped)
        self.reasons += batch.skipped[: 1 if not self.reasons else 0]
        self.complaints += len(batch.warnings)
        self.first += batch.warnings[: 1 if not self.first else 0]
        if too_many_bad(self.bad, self.good + self.bad):
            raise DataError(
                f"{source}: {self.bad:,} of {self.good + self.bad:,} samples are bad, more than "
                f"{100 * MAX_BAD_SHARE:g} %; the first one: {self.reasons[0]}"
            )
