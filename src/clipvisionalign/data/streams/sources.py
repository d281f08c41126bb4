"""The training split of a stream, read in an order that depends on the seed and the epoch alone.

Every sample comes exactly once: the shards of an epoch, one behind the other in an order drawn anew, are one long row
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
from clipvisionalign.data.streams.files import INDEX, files_by_split, read_shard, samples_in, split_of
from clipvisionalign.data.streams.huggingface import Columns, is_saved, open_saved
from clipvisionalign.data.streams.samples import Sample

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


def open_stream(source: str) -> Shards | Saved:
    """The training split of a stream. Raises DataError."""
    path = Path(source)
    if path.is_dir() and is_saved(path):
        splits = open_saved(path)
        if "train" not in splits:
            raise DataError(f"{source}: no split 'train'; there are {', '.join(splits)}")
        return Saved(source, splits["train"])
    return open_shards(source)
