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
from clipvisionalign.data.joined_captions import training_text
from clipvisionalign.data.loader import iterate_dataset
from clipvisionalign.data.streams.samples import Sample
from clipvisionalign.data.streams.sources import SavedDatasetStream, ShardStream

#: Share of samples that may be bad; a set of a few samples may have a few.
MAX_BAD_SHARE, ALLOWED_BAD_SAMPLES = 0.01, 10


class StreamedBatches(IterableDataset[Batch]):
    """Batches from a stream; the counterpart of `CaptionedBatches`, with the same calls.

    Args:
        stream: The stream.
        tokenize: From captions to token ids.
        pad: Id of the padding token.
        load_image: From an image to a tensor; None if no image is opened.
        identity: Which captions belong to which images, see `IdentityMode`; equal captions are known within a step
            only.
        joined_seed: Seed by which captions of an image are joined to one text, another one in each epoch; None for
            each caption as it is.
    """

    def __init__(
        self,
        stream: ShardStream | SavedDatasetStream,
        tokenize: Tokenize,
        pad: int,
        load_image: ImageLoader | None,
        identity: IdentityMode = "auto",
        joined_seed: int | None = None,
    ) -> None:
        self.identity, self.joined_seed = identity, joined_seed
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
        """Number of steps in an epoch.

        Args:
            batch_size: Images in a step, over all processes.
            world_size: Number of processes.

        Returns:
            See `steps_in_epoch`; invalid samples are counted as images.
        """
        return steps_in_epoch(self.stream.count, batch_size, world_size)

    def num_chunks(self, batch_size: int, step: int, chunk_size: int, world_size: int = 1) -> int:
        """Number of chunks in which a step comes; a stream's comes undivided, once.

        Args:
            batch_size: Not used.
            step: Not used.
            chunk_size: Not used.
            world_size: Not used.

        Returns:
            0.
        """
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
        """This process's batches of one epoch, undivided for any `chunk_size`.

        Args:
            batch_size: Images in a step, over all processes.
            epoch: Number of the epoch.
            seed: Seed of the order, and of what is drawn at random.
            workers: Number of worker processes; 0 for none.
            start: First step, from 0; samples before it are passed over without being decoded.
            process_rank: Number of the process, from 0, and number of processes.
            chunk_size: Not used.

        Yields:
            The batches.

        Raises:
            DataError: Too many samples are invalid, or a shard holds another number of samples than was counted.
        """
        self.epoch_arguments = (batch_size, epoch, seed, start, process_rank)
        for loaded_batch in iterate_dataset(self, workers):
            self.sample_counts.add(loaded_batch, self.stream.source)
            self.truncation += loaded_batch.truncation or TruncationStats()
            self.captions_per_image = len(loaded_batch.caption_image) / max(1, len(loaded_batch))
            yield loaded_batch

    def counters(self) -> dict[str, Any]:
        """The counts so far, for a checkpoint.

        Returns:
            What `restore_counters` takes.
        """
        return {
            "cut": asdict(self.truncation),
            "tally": asdict(self.sample_counts),
            "captions_per_image": self.captions_per_image,
        }

    def restore_counters(self, counters: Sequence[dict[str, Any]]) -> None:
        """Continue from earlier counts.

        Args:
            counters: Those of one reader, or of several, which are added up.
        """
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
            yield self._make_batch([self._joined(sample, epoch) for sample in islice(samples, size)], seed)

    def _joined(self, sample: Sample, epoch: int) -> Sample:
        """The sample with the text that it has in an epoch, where captions are joined; else as it is."""
        if self.joined_seed is None or sample.error:
            return sample
        text = training_text(sample.captions, self.joined_seed, epoch, sample.name)
        return replace(sample, captions=(text,))

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
    """Whether invalid samples, or steps, are too many for a training to continue.

    Args:
        bad: Number of those that are invalid.
        count: Number of all.

    Returns:
        Whether they are more than `ALLOWED_BAD_SAMPLES`, and more than the share `MAX_BAD_SHARE`.

    >>> too_many_bad(10, 20), too_many_bad(11, 20), too_many_bad(11, 2000)
    (False, True, False)
    """
    return bad > max(ALLOWED_BAD_SAMPLES, MAX_BAD_SHARE * count)


@dataclass
class SampleCounts:
    """Counts of samples, and of invalid ones.

    Attributes:
        good: Number of samples that were used.
        bad: Number of those that were not.
        reasons: The first reason, if any.
        complaints: How often a part of a used sample was left out or mended.
        first: The first such message, if any.
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
        """Add the counts of a batch.

        Args:
            batch: The batch.
            source: The stream, for the message.

        Raises:
            DataError: Too many samples are invalid; the message has the first one.
        """
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
