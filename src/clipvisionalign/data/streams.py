"""Training data that is never in memory as a whole: WebDataset shards, Parquet files, Hugging Face data sets, streamed.

- A sample is one picture with its captions. In a shard: `KEY.jpg` (or .png, .webp) with `KEY.json` (`{"captions":
  [...]}`, also `caption` or `text`) or `KEY.txt`, a caption a line. In Parquet files and Hugging Face data sets: a
  column of images and one of captions, strings or lists.
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
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipvisionalign.batch import Batch, CutCaptions, Look, Tokenize, decode_pixels, group_by_length, seeded
from clipvisionalign.data.batches import ALL, Share, own_size, steps_in_epoch
from clipvisionalign.data.captioned import (
    CaptionedImage,
    CaptionedImages,
    DataError,
    Identity,
    Problem,
    hashed,
    text_number,
)
from clipvisionalign.data.formats.tables import IDENTITY_COLUMNS

#: Share of samples that may be bad; a set of a few samples may have a few.
BAD_SHARE, BAD_FEW = 0.01, 10

#: Samples among which a stream's next one is drawn.
SHUFFLE = 1000

#: Rows of a Parquet file that are in memory at a time.
PARQUET_ROWS = 64

#: Written beside shards: how many samples each of them holds.
INDEX = "shards.json"
#: Names of files that webdataset passes over.
META = re.compile(r"__[^/]*__($|/)")
PICTURES = ("jpg", "jpeg", "png", "webp", "ppm", "gif", "bmp")
CAPTION_NAMES = ("captions", "caption", "sentences", "text", "raw")


@dataclass(frozen=True)
class Sample:
    """One picture, encoded, with its captions. bad: what is wrong with it; identity: of what it shows, if known."""

    name: str
    image: bytes
    captions: tuple[str, ...]
    bad: str = ""
    identity: str = ""


class Stream(Protocol):
    """Where samples come from."""

    source: str
    count: int

    def fingerprint(self) -> str:
        """A hash of what is in it."""

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

    def _stretch(self, order: Sequence[int], first: int, last: int) -> Iterator[Sample]:
        """The samples of a stretch in the order of the files, shard by shard."""
        begin = 0
        for number in order:
            path, size = self.paths[number], self.sizes[number]
            some = range(max(first - begin, 0), min(last - begin, size))
            begin += size
            if not some:
                continue
            found = _read_shard(path, some.start)
            read = 0
            for sample in islice(found, len(some)):
                read += 1
                yield sample
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


def _read_shard(path: Path, start: int) -> Iterator[Sample]:
    """The samples of a file in their order, from number `start` on."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, start)
        return
    import webdataset

    found = webdataset.WebDataset(
        str(path), shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
    )
    yield from map(_sample_of_shard, islice(found, start, None))


def _read_parquet(path: Path, start: int) -> Iterator[Sample]:
    """Rows of a Parquet file from number `start` on; groups of rows before that are not read."""
    import datasets
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = Columns.of(datasets.Features.from_arrow_schema(file.schema_arrow), str(path))
        begin = 0
        for number in range(file.num_row_groups):
            size = file.metadata.row_group(number).num_rows
            place, begin = begin, begin + size
            if begin <= start:
                continue
            for rows in file.iter_batches(PARQUET_ROWS, row_groups=[number], columns=columns.names):
                for row in rows.to_pylist():
                    if place >= start:
                        yield columns.sample(row, f"{path.name}, row {place}")
                    place += 1


def _sample_of_shard(raw: dict[str, Any]) -> Sample:
    # Keys may begin anew in every shard: the shard's name tells them apart.
    shard = Path(str(raw.get("__url__", ""))).name
    name = f"{shard}, {raw['__key__']}"
    picture = next((raw[kind] for kind in raw if kind.lower() in PICTURES), None)
    captions: tuple[str, ...] = ()
    identity, wrong = "", ""
    try:
        if "json" in raw:
            about = json.loads(raw["json"])
            captions = _captions_of(about)
            identity = _identity_of(about.get("identity")) if isinstance(about, dict) else ""
        if not captions and "txt" in raw:
            captions = _texts(raw["txt"].decode("utf-8").split("\n"))
    except (ValueError, UnicodeDecodeError) as error:
        wrong = f"its captions cannot be read: {error}"
    if not wrong and (picture is None or not captions):
        wrong = "no picture" if picture is None else "no caption"
    if wrong:
        return Sample(name, b"", (), f"{name}: {wrong}")
    assert picture is not None
    return Sample(name, picture, captions, identity=identity)


def _identity_of(value: Any) -> str:
    """What a sample gives as its identity, 0 too, as text; nothing for nothing."""
    return "" if value is None or value == "" else str(value)


def _captions_of(about: Any) -> tuple[str, ...]:
    """Captions under any of their usual names: a string, a list, or a list of records. Raises ValueError for what is
    none of these."""
    if isinstance(about, dict):
        about = next((about[name] for name in CAPTION_NAMES if about.get(name)), None)
    if about is None:
        return ()
    if isinstance(about, str):
        return _texts([about])
    if not isinstance(about, (list, tuple)):
        raise ValueError(f"{type(about).__name__} where a text or a list of texts belongs")
    return _texts(about)


def _texts(captions: Sequence[Any]) -> tuple[str, ...]:
    """Texts, or records that hold one, without those that are empty. Raises ValueError for anything else."""
    found = []
    for caption in captions:
        text = caption
        if isinstance(caption, dict):
            text = next((caption[name] for name in ("raw", "caption", "text") if caption.get(name)), None)
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"{type(text).__name__} where a text belongs")
        found.append(" ".join(text.split()))
    return tuple(text for text in found if text)


#: Names of splits within the names of files.
SPLIT_NAMES = {
    "train": "train", "training": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev",
    "test": "test", "testing": "test",
}  # fmt: skip


def split_of(path: Path) -> str:
    """The split that a file's name tells: "flickr-train-000.tar" is of "train"; "" where it tells none."""
    words = re.split(r"[^a-z]+", path.name.partition(".")[0].lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


def _of_split(folder: Path, split: str, suffix: str = ".tar") -> list[Path]:
    """The files of a split; for "train" all files, where no name tells a split. Raises DataError where some names do,
    and others do not."""
    files = sorted(folder.glob(f"*{suffix}"))
    told = {path: split_of(path) for path in files}
    strange = [path for path in files if not told[path]]
    if split == "train" and len(strange) == len(files):
        return files
    if split == "train" and strange:
        raise DataError(
            f"{folder}: {len(strange)} of {len(files)} {suffix} files are of no split by their names, such as "
            f"{strange[0].name}; name those to train on by a pattern, such as {folder}/NAME-{{000..009}}{suffix}"
        )
    return [path for path in files if told[path] == split]


def open_shards(pattern: str) -> Shards:
    """Shards by a pattern such as `data/train-{000000..000099}.tar` (or .parquet), or a folder that holds train-*.tar.

    Their samples are counted once, and the counts kept beside them where that is allowed. Raises DataError.
    """
    import webdataset

    source = Path(pattern)
    if source.is_dir():
        paths = _of_split(source, "train")
    else:
        paths = [Path(name) for name in webdataset.shardlists.expand_urls(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if not paths or missing:
        told = f"no such shard: {missing[0]} ({len(missing)} missing)" if missing else "no .tar files of 'train' in it"
        raise DataError(f"{pattern}: {told}")
    sizes: dict[Path, int] = {}
    for folder in {path.parent for path in paths}:
        if (folder / INDEX).is_file():
            known = json.loads((folder / INDEX).read_text())
            sizes |= {folder / name: size for name, size in known.items()}
    for path in paths:
        if path not in sizes:
            sizes[path] = _samples_in(path)
    return Shards(pattern, paths, [sizes[path] for path in paths])


def _samples_in(path: Path) -> int:
    """Samples of a tar file, by its headers, or rows of a Parquet file. Raises DataError where it is none."""
    from webdataset.tariterators import base_plus_ext

    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a whole Parquet file: {error}") from None
    try:
        with tarfile.open(path) as tar:
            names = [member.name for member in tar if member.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole tar file: {error}") from None
    # As webdataset groups them: neighbours of one name but for what follows its first point.
    keys = [key for key, _ in map(base_plus_ext, filter(lambda name: not META.match(name), names)) if key is not None]
    return sum(before != key for before, key in pairwise([None, *keys]))


def write_shards(
    data: CaptionedImages, out: str | Path, per_shard: int = 1000, shown: bool = False
) -> dict[str, list[Path]]:
    """Write a data set as WebDataset shards, OUT/SPLIT-000000.tar and so on, with their index; the files by split.

    Raises FileExistsError where there are shards already; a picture that cannot be read raises OSError.
    """
    import webdataset

    from clipvisionalign.progress import progress

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if list(folder.glob("*.tar")):
        raise FileExistsError(f"{folder}: holds shards already; give another folder")
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
    (folder / INDEX).write_text(json.dumps(sizes, indent=1) + "\n")
    return written


# --- Hugging Face data sets ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Where a data set of `datasets` has its pictures and captions."""

    image: str
    captions: str
    identity: str
    source: str

    @classmethod
    def of(cls, features: Any, source: str) -> Columns:
        """Found by kind and by name. Raises DataError where there are none."""
        import datasets

        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        named = [name for name in ("image", "img", "picture") if name in features]
        image = next(iter([*images, *named]), "")
        captions = next((name for name in CAPTION_NAMES if name in features), "")
        if not image or not captions:
            raise DataError(f"{source}: no column of images and captions in {list(features)}")
        return cls(image, captions, next((name for name in IDENTITY_COLUMNS if name in features), ""), source)

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        return [name for name in (self.image, self.captions, self.identity) if name]

    def encoded(self, rows: Any) -> Any:
        """The same rows with pictures as they are encoded, not decoded already."""
        import datasets

        known = rows.features or {}
        return rows.cast_column(self.image, datasets.Image(decode=False)) if known else rows

    def sample(self, row: dict[str, Any], name: str) -> Sample:
        """One row as a sample."""
        try:
            picture, captions = row[self.image], _captions_of(row[self.captions])
            if isinstance(picture, dict):
                picture = picture.get("bytes") or picture.get("path")
            if isinstance(picture, str):
                # Beside the file that names it, unless it says where.
                beside = Path(self.source)
                picture = ((beside if beside.is_dir() else beside.parent) / picture).read_bytes()
        except (ValueError, OSError) as error:
            return Sample(name, b"", (), f"{self.source}, {name}: {error}")
        if not picture or not captions:
            return Sample(name, b"", (), f"{self.source}, {name}: no {'picture' if not picture else 'caption'}")
        return Sample(name, picture, captions, identity=_identity_of(row.get(self.identity)))


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

    def sample(self, place: int) -> Sample:
        """One row."""
        return self.columns.sample(self.rows[place], f"row {place}")


def open_saved(folder: str | Path) -> dict[str, Saved]:
    """The splits of a folder that `datasets.save_to_disk` wrote, by this project's names. Raises DataError."""
    import datasets

    found = datasets.load_from_disk(str(folder))
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    names = {"validation": "dev", "val": "dev"}
    return {names.get(name, name): Saved(str(folder), rows) for name, rows in splits.items()}


# --- either of them --------------------------------------------------------------------------------------------------


def is_stream(source: str) -> bool:
    """Whether a data set is read as a stream: shards by a pattern or in a folder, or a saved Hugging Face data set."""
    path = Path(source)
    if path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
        return saved or any(path.glob("*.tar"))
    # One Parquet file is a table like any other, and has its splits within.
    return source.endswith(".tar") or (source.endswith(".parquet") and "{" in source)


def open_stream(source: str) -> Shards | Saved:
    """The training split of what `is_stream` recognises. Raises DataError."""
    path = Path(source)
    if path.is_dir() and not any(path.glob("*.tar")):
        splits = open_saved(path)
        if "train" not in splits:
            raise DataError(f"{source}: no split 'train'; there are {', '.join(splits)}")
        return splits["train"]
    return open_shards(source)


def stream_split(source: str, split: str) -> CaptionedImages:
    """A small split of a stream, in memory, as `CaptionedImages`. Raises DataError where there is none."""
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and not any(path.glob("*.tar")):
        splits = open_saved(path)
        samples = [splits[split].sample(place) for place in range(splits[split].count)] if split in splits else []
    else:
        files = _of_split(folder, split, ".parquet" if source.endswith(".parquet") else ".tar")
        samples = [sample for file in files for sample in _read_shard(file, 0)]
    good = [sample for sample in samples if not sample.bad]
    problems = [Problem("bad sample", source, sample.bad) for sample in samples if sample.bad]
    if not good:
        raise DataError(f"{source}: no split '{split}' beside the training split; give it with --dev_data DATA")
    good.sort(key=lambda sample: sample.name)
    rows = [CaptionedImage(s.name, s.image, s.captions, split, s.identity or None) for s in good]
    return CaptionedImages(rows, Path(source), "stream", problems=problems)


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
        self.tally = _Tally()

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
        generator = torch.Generator().manual_seed(0)
        for found in DataLoader(self, batch_size=None, num_workers=workers, generator=generator):
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
            self.tally += _Tally(**each["tally"])
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
        skipped = [sample.bad for sample in samples if sample.bad]
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
class _Tally:
    """Counts samples and bad ones; too many stop the training."""

    good: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)

    def __add__(self, other: _Tally) -> _Tally:
        return _Tally(self.good + other.good, self.bad + other.bad, (self.reasons + other.reasons)[:1])

    def add(self, batch: Batch, source: str) -> None:
        self.good += len(batch)
        self.bad += len(batch.skipped)
        self.reasons += batch.skipped[: 1 if not self.reasons else 0]
        if too_many_bad(self.bad, self.good + self.bad):
            raise DataError(
                f"{source}: {self.bad:,} of {self.good + self.bad:,} samples are bad, more than "
                f"{100 * BAD_SHARE:g} %; the first one: {self.reasons[0]}"
            )
