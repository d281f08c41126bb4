"""Training data that is never in memory as a whole: WebDataset shards, Parquet files, Hugging Face data sets, streamed.

- What a sample is, and how it is read, `formats/shards.py` says.
- An epoch's order depends on the seed and the epoch alone. Every sample comes exactly once: the shards of an epoch, one
  behind the other in an order drawn anew, are one long row of samples, and each reader (a worker of a process) has a
  stretch of it, as long as the steps that it makes need. A stretch may begin and end within a shard: however few and
  uneven the shards are, every process makes the same steps.
- A stream goes on at any step: what has been used is read past without being decoded, so that the rest comes exactly
  once after a kill, as long as processes and workers are as many as before.
- A bad sample is counted and skipped; more than `BAD_SHARE` of them stop the training with the first one's name.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from clipvisionalign.batch import Batch, CutCaptions, Look, Tokenize, decode_pixels, group_by_length, seeded
from clipvisionalign.data.batches import ALL, Share, own_size, steps_in_epoch
from clipvisionalign.data.captioned import CaptionedImages, DataError, Identity, hashed, text_number
from clipvisionalign.data.formats.shards import (
    INDEX,
    Columns,
    Sample,
    files_by_split,
    is_saved,
    open_saved,
    read_shard,
    samples_in,
    split_of,
)
from clipvisionalign.data.loading import loaded
from clipvisionalign.files import written_aside

#: Share of samples that may be bad; a set of a few samples may have a few.
BAD_SHARE, BAD_FEW = 0.01, 10

#: Samples among which a stream's next one is drawn.
SHUFFLE = 1000


class Stream(Protocol):
    """Where samples come from."""

    source: str
    count: int

    def fingerprint(self) -> str:
        """A hash of what is in it."""

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order in which they lie."""

    def read(self, epoch: int, seed: int, first: int, last: int) -> Iterator[Sample]:
        """The samples from place `first` to before `last` of an epoch's row, mixed among themselves."""


# --- shards: WebDataset's, or Parquet files ---------------------------------------------------------------------------


@dataclass
class Shards:
    """Tar files in WebDataset's form, or Parquet files. paths: their files; sizes: samples in each."""

    source: str
    paths: list[Path]
    sizes: list[int]

    @property
    def count(self) -> int:
        return sum(self.sizes)

    def fingerprint(self) -> str:
        """A hash of names and sizes on disk."""
        told = [(path.name, path.stat().st_size, size) for path, size in zip(self.paths, self.sizes, strict=True)]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:16]

    def read(self, epoch: int, seed: int, first: int, last: int) -> Iterator[Sample]:
        """See `Stream`; webdataset or pyarrow reads the files. Raises DataError where a shard holds more or fewer
        samples than its index says."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self.paths)).tolist()
        rng = random.Random(f"{seed} {epoch} {first}")
        yield from mixed(self._stretch(order, first, last), rng)

    def samples(self) -> Iterator[Sample]:
        """See `Stream`."""
        return self._stretch(range(len(self.paths)), 0, self.count)

    def _stretch(self, order: Sequence[int], first: int, last: int) -> Iterator[Sample]:
        """The samples of a stretch in the order of the files, shard by shard."""
        begin = 0
        for number in order:
            path, size = self.paths[number], self.sizes[number]
            some = range(max(first - begin, 0), min(last - begin, size))
            begin += size
            if not some:
                continue
            found = read_shard(path, some.start)
            read = 0
            for sample in islice(found, len(some)):
                read += 1
                yield sample.of_split(split_of(path) or "train")
            beyond = some.stop == size and next(found, None) is not None
            if read < len(some) or beyond:
                told = "more" if beyond else f"{some.start + read:,}"
                index = path.with_name(INDEX)
                out = f"; remove {index}, which says so" if index.is_file() else ""
                raise DataError(f"{path}: holds {told} samples where {size:,} were counted{out}")


def mixed(samples: Iterator[Sample], rng: random.Random) -> Iterator[Sample]:
    """The same samples in another order, drawn among `SHUFFLE` of them at a time."""
    waiting: list[Sample] = []
    for sample in samples:
        waiting.append(sample)
        if len(waiting) > SHUFFLE:
            place = rng.randrange(len(waiting))
            waiting[place], waiting[-1] = waiting[-1], waiting[place]
            yield waiting.pop()
    rng.shuffle(waiting)
    yield from waiting


def open_shards(pattern: str) -> Shards:
    """Shards by a pattern such as `data/train-{000000..000099}.tar` (or .parquet), or a folder that holds train-*.tar.

    Their samples are counted once, and the counts kept beside them where that is allowed. Raises DataError.
    """
    found = files_by_split(Path(pattern))
    if "train" not in found and Path(pattern).is_dir():
        raise DataError(f"{pattern}: no .tar files of 'train' in it; there are {', '.join(sorted(found))}")
    # Whoever names shards trains on them, whatever their names tell.
    paths = found["train"] if Path(pattern).is_dir() else [path for some in found.values() for path in some]
    sizes: dict[Path, int] = {}
    for folder in {path.parent for path in paths}:
        sizes |= {folder / name: size for name, size in _counts(folder / INDEX).items()}
    for path in paths:
        if path not in sizes:
            sizes[path] = samples_in(path)
    return Shards(pattern, paths, [sizes[path] for path in paths])


def _counts(index: Path) -> dict[str, int]:
    """How many samples each shard holds, as was written beside them. Raises DataError where it is no such file."""
    if not index.is_file():
        return {}
    try:
        found = json.loads(index.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"{index}: cannot be read: {error}; remove it, and the samples are counted") from None
    if not isinstance(found, dict) or not all(isinstance(size, int) and size >= 0 for size in found.values()):
        raise DataError(f"{index}: not a number of samples for each shard; remove it, and the samples are counted")
    return found


def write_shards(
    data: CaptionedImages, out: str | Path, per_shard: int = 1000, shown: bool = False
) -> dict[str, list[Path]]:
    """Write a data set as WebDataset shards, OUT/SPLIT-000000.tar and so on, with their index; the files by split.

    Raises FileExistsError where there are shards already, ValueError for no image in a shard; a picture that cannot be
    read raises OSError.
    """
    import webdataset

    from clipvisionalign.progress import progress

    folder = Path(out)
    if per_shard < 1:
        raise ValueError(f"--per-shard should be at least 1, not {per_shard}")
    if list(folder.glob("*.tar")):
        raise FileExistsError(f"{folder}: holds shards already; give another folder")
    if not len(data):
        raise DataError(f"{data.source}: no image is left to be written")
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    written: dict[str, list[Path]] = {}
    for split, count in sorted(data.split_sizes().items()):
        rows = data.split(split).rows
        if split == "train":
            # Shards are dealt out whole: neighbours in a file should not be neighbours in the data.
            rows = [rows[i] for i in np.random.default_rng(0).permutation(count)]
        starts = range(0, count, per_shard)
        for number, start in enumerate(progress(starts, f"writing shards: {split}", count, shown, per_shard)):
            path = folder / f"{split}-{number:06d}.tar"
            some = rows[start : start + per_shard]
            with webdataset.TarWriter(str(path), encoder=False) as tar:
                for place, row in enumerate(some, start):
                    image = row.image if isinstance(row.image, bytes) else row.image.read_bytes()
                    about = {"captions": list(row.captions), "name": row.name, "identity": row.identity}
                    kind = "png" if image.startswith(b"\x89PNG") else "jpg"
                    tar.write({"__key__": f"{place:09d}", kind: image, "json": json.dumps(about).encode()})
            sizes[path.name] = len(some)
            written.setdefault(split, []).append(path)
    with written_aside(folder / INDEX) as aside:
        aside.write_text(json.dumps(sizes, indent=1) + "\n")
    return written


# --- Hugging Face data sets ------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """A Hugging Face data set in a folder that `save_to_disk` wrote. rows: the data set itself."""

    source: str
    rows: Any

    def __post_init__(self) -> None:
        self.columns = Columns.of(self.rows.features, self.source)
        self.rows = self.columns.encoded(self.rows)

    @property
    def count(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """The data set's own."""
        return str(self.rows._fingerprint)

    def read(self, epoch: int, seed: int, first: int, last: int) -> Iterator[Sample]:
        """See `Stream`; rows are read from where they lie, in any order."""
        for place in np.random.default_rng([seed, epoch]).permutation(self.count)[first:last].tolist():
            yield self.sample(place)

    def samples(self) -> Iterator[Sample]:
        """See `Stream`."""
        return map(self.sample, range(self.count))

    def sample(self, place: int) -> Sample:
        """One row."""
        return self.columns.sample(self.rows[place], f"row {place}").of_split("train")


# --- either of them --------------------------------------------------------------------------------------------------


def open_stream(source: str) -> Shards | Saved:
    """The training split of a stream. Raises DataError."""
    path = Path(source)
    if path.is_dir() and is_saved(path):
        splits = open_saved(path)
        if "train" not in splits:
            raise DataError(f"{source}: no split 'train'; there are {', '.join(splits)}")
        return Saved(source, splits["train"])
    return open_shards(source)


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
