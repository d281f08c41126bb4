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
    """A stream of samples that can be read in a new order each epoch.

    Attributes:
        source: Its path or pattern.
        count: Number of samples.
    """

    source: str
    count: int

    def fingerprint(self) -> str:
        """A hash of what the stream holds.

        Returns:
            The hash.
        """

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order in which they are stored.

        Returns:
            The samples.
        """

    def read(self, epoch: int, seed: int, first: int, last: int) -> Iterator[Sample]:
        """A part of an epoch, whose order depends on seed and epoch alone.

        Args:
            epoch: Number of the epoch.
            seed: Seed of the order.
            first: First sample of the part, from 0.
            last: The one after its last.

        Returns:
            The samples of the part; within it they may be shuffled once more.
        """


@dataclass
class ShardStream:
    """Tar files in WebDataset's form, or Parquet files.

    Attributes:
        source: Their pattern or folder.
        paths: The files.
        sizes: Number of samples in each.
    """

    source: str
    paths: list[Path]
    sizes: list[int]

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(self.sizes)

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes on disk and numbers of samples.

        Returns:
            16 hex digits.
        """
        files = [(path.name, path.stat().st_size, size) for path, size in zip(self.paths, self.sizes, strict=True)]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]

    def read(self, epoch: int, seed: int, first: int, last: int) -> Iterator[Sample]:
        """A part of an epoch: the shards in random order, its samples shuffled among themselves.

        Args:
            epoch: Number of the epoch.
            seed: Seed of the order.
            first: First sample of the part, from 0.
            last: The one after its last.

        Yields:
            The samples of the part.

        Raises:
            DataError: A shard holds more or fewer samples than were counted.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self.paths)).tolist()
        rng = random.Random(f"{seed} {epoch} {first}")
        yield from shuffle_buffered(self._read_range(order, first, last), rng)

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order in which they are stored.

        Returns:
            The samples.
        """
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
    """Shuffle samples, `SHUFFLE_BUFFER` of them at a time.

    Args:
        samples: The samples.
        rng: Source of randomness; it is advanced.

    Yields:
        The same samples, each once.
    """
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
    """Open shards for training; their samples are counted where shards.json beside them does not list them.

    Args:
        pattern: Such as `data/train-{000000..000099}.tar` (or .parquet), or a folder that holds train-*.tar. Shards
            that are named are trained on, whatever their names contain.

    Returns:
        The stream.

    Raises:
        DataError: A shard is missing or not whole, a folder has none of "train", or shards.json is damaged.
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
    """A Hugging Face data set in a folder that `save_to_disk` wrote.

    Attributes:
        source: The folder.
        rows: The data set of `datasets`; its images are not decoded.
    """

    source: str
    rows: Any

    def __post_init__(self) -> None:
        self.columns = SampleColumns.detect(self.rows.features, self.source)
        self.rows = self.columns.without_decoding(self.rows)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def fingerprint(self) -> str:
        """The fingerprint of the data set, which `datasets` computes.

        Returns:
            The fingerprint.
        """
        return str(self.rows._fingerprint)

    def read(self, epoch: int, seed: int, first: int, last: int) -> Iterator[Sample]:
        """A part of an epoch; rows are read in any order.

        Args:
            epoch: Number of the epoch.
            seed: Seed of the order.
            first: First sample of the part, from 0.
            last: The one after its last.

        Yields:
            The samples of the part.
        """
        for index in np.random.default_rng([seed, epoch]).permutation(self.count)[first:last].tolist():
            yield self.sample(index)

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order in which they are stored.

        Returns:
            The samples.
        """
        return map(self.sample, range(self.count))

    def sample(self, index: int) -> Sample:
        """One row as a sample.

        Args:
            index: Number of the row, from 0.

        Returns:
            The sample; invalid where its own split is not "train".
        """
        return self.columns.to_sample(self.rows[index], f"row {index}").for_split("train")


def open_stream(source: str) -> ShardStream | SavedDatasetStream:
    """Open the training split of a stream.

    Args:
        source: A pattern, a folder of tar files, or one of `save_to_disk`.

    Returns:
        The stream.

    Raises:
        DataError: It has no split "train", or cannot be read.
    """
    path = Path(source)
    if path.is_dir() and is_saved_dataset(path):
        splits = load_saved_dataset(path)
        if "train" not in splits:
            raise DataError(f"{source}: no split 'train'; there are {', '.join(splits)}")
        return SavedDatasetStream(source, splits["train"])
    return open_shards(source)
