"""The training split of a stream, read in an order that depends on the seed and the epoch alone.

Every sample comes exactly once: the shards of an epoch, one behind the other in a new random order, are one long row
of samples, and each reader (a worker of a process) has a stretch of it, as long as the steps that it makes need. A
stretch may begin and end within a shard: however few and uneven the shards are, every process makes the same steps.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.streams.files import (
    SHARD_INDEX_FILE,
    count_samples,
    files_by_split,
    read_shard,
    split_in_name,
)
from clipvisionalign.data.streams.huggingface import SampleColumns, is_saved_dataset, load_saved_dataset
from clipvisionalign.data.streams.samples import Sample

#: Samples among which a stream's next one is drawn.
SHUFFLE_BUFFER = 1000


class SampleStream(Protocol):
    """Where samples come from."""

    source: str
    count: int

    def fingerprint(self) -> str:
        """A hash of what is in it."""

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order in which they lie."""

    def read(self, epoch: int, seed: int, first: int, last: int) -> Iterator[Sample]:
        """The samples from place `first` to before `last` of an epoch's row, mixed among themselves."""


@dataclass
class ShardStream:
    """Tar files in WebDataset's form, or Parquet files. paths: their files; sizes: samples in each."""

    source: str
    paths: list[Path]
    sizes: list[int]

    @property
    def count(self) -> int:
        """The number of samples."""
        return sum(self.sizes)

    def fingerprint(self) -> str:
        """A hash of names and sizes on disk."""
        files = [(path.name, path.stat().st_size, size) for path, size in zip(self.paths, self.sizes, strict=True)]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    def read(self, epoch: int, seed: int, first: int, last: int) -> Iterator[Sample]:
        """See `SampleStream`; webdataset or pyarrow reads the files.

        Raises DataError where a shard holds more or fewer samples than its index has.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self.paths)).tolist()
        rng = random.Random(f"{seed} {epoch} {first}")
        yield from shuffle_buffered(self._read_range(order, first, last), rng)

    def samples(self) -> Iterator[Sample]:
        """See `SampleStream`."""
        return self._read_range(range(len(self.paths)), 0, self.count)

    def _read_range(self, order: Sequence[int], first: int, last: int) -> Iterator[Sample]:
        """The samples of a stretch in the order of the files, shard by shard."""
        begin = 0
        for shard in order:
            path, size = self.paths[shard], self.sizes[shard]
            sample_range = range(max(first - begin, 0), min(last - begin, size))
            begin += size
            if not sample_range:
                continue
            samples = read_shard(path, sample_range.start)
            read = 0
            for sample in islice(samples, len(sample_range)):
                read += 1
                yield sample.for_split(split_in_name(path) or "train")
            beyond = sample_range.stop == size and next(samples, None) is not None
            if read < len(sample_range) or beyond:
                actual = "more" if beyond else f"{sample_range.start + read:,}"
                index = path.with_name(SHARD_INDEX_FILE)
                hint = f"; remove {index}, which lists it" if index.is_file() else ""
                raise DataError(f"{path}: holds {actual} samples where {size:,} were counted{hint}")


def shuffle_buffered(samples: Iterator[Sample], rng: random.Random) -> Iterator[Sample]:
    """The same samples in another order, drawn among `SHUFFLE_BUFFER` of them at a time."""
    buffer: list[Sample] = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) > SHUFFLE_BUFFER:
            index = rng.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def open_shards(pattern: str) -> ShardStream:
    """Shards by a pattern such as `data/train-{000000..000099}.tar` (or .parquet), or a folder that holds train-*.tar.

    Their samples are counted once, and the counts kept beside them where that is allowed. Raises DataError.
    """
    files = files_by_split(Path(pattern))
    if "train" not in files and Path(pattern).is_dir():
        raise DataError(f"{pattern}: no .tar files of 'train' in it; there are {', '.join(sorted(files))}")
    # Shards that are named are trained on, whatever their names contain.
    paths = (
        files["train"] if Path(pattern).is_dir() else [path for split_paths in files.values() for path in split_paths]
    )
    sizes: dict[Path, int] = {}
    for folder in {path.parent for path in paths}:
        sizes |= {folder / name: size for name, size in _read_shard_index(folder / SHARD_INDEX_FILE).items()}
    for path in paths:
        if path not in sizes:
            sizes[path] = count_samples(path)
    return ShardStream(pattern, paths, [sizes[path] for path in paths])


def _read_shard_index(index: Path) -> dict[str, int]:
    """How many samples each shard holds, as was written beside them. Raises DataError where it is no such file."""
    if not index.is_file():
        return {}
    try:
        counts = json.loads(index.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise DataError(f"{index}: cannot be read: {error}; remove it, and the samples are counted") from None
    if not isinstance(counts, dict) or not all(isinstance(size, int) and size >= 0 for size in counts.values()):
        raise DataError(f"{index}: not a number of samples for each shard; remove it, and the samples are counted")
    return counts


@dataclass
class SavedDatasetStream:
    """A Hugging Face data set in a folder that `save_to_disk` wrote. rows: the data set itself."""

    source: str
    rows: Any

    def __post_init__(self) -> None:
        self.columns = SampleColumns.detect(self.rows.features, self.source)
        self.rows = self.columns.without_decoding(self.rows)

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.rows)

    def fingerprint(self) -> str:
        """The data set's own."""
        return str(self.rows._fingerprint)

    def read(self, epoch: int, seed: int, first: int, last: int) -> Iterator[Sample]:
        """See `SampleStream`; rows are read from where they lie, in any order."""
        for index in np.random.default_rng([seed, epoch]).permutation(self.count)[first:last].tolist():
            yield self.sample(index)

    def samples(self) -> Iterator[Sample]:
        """See `SampleStream`."""
        return map(self.sample, range(self.count))

    def sample(self, index: int) -> Sample:
        """One row."""
        return self.columns.to_sample(self.rows[index], f"row {index}").for_split("train")


def open_stream(source: str) -> ShardStream | SavedDatasetStream:
    """The training split of a stream. Raises DataError."""
    path = Path(source)
    if path.is_dir() and is_saved_dataset(path):
        splits = load_saved_dataset(path)
        if "train" not in splits:
            raise DataError(f"{source}: no split 'train'; there are {', '.join(splits)}")
        return SavedDatasetStream(source, splits["train"])
    return open_shards(source)
