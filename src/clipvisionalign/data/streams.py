"""Training data that is never in memory as a whole: WebDataset shards, Parquet files, Hugging Face data sets, streamed.

- A sample is one picture with its captions. In a shard: `KEY.jpg` (or .png, .webp) with `KEY.json` (`{"captions":
  [...]}`, also `caption` or `text`) or `KEY.txt`, a caption a line. In Parquet files and Hugging Face data sets: a
  column of images and one of captions, strings or lists.
- An epoch's order depends on the seed and the epoch alone. Every sample comes exactly once: shards, or stretches of a
  data set, are dealt out over processes and their workers.
- A stream goes on at any step: what has been used is read past without being decoded, so that the rest comes exactly
  once after a kill, as long as processes and workers are as many as before.
- A bad sample is counted and skipped; more than `BAD_SHARE` of them stop the training with the first one's name.
"""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipvisionalign.batch import Batch, CutCaptions, Look, Tokenize, decode_pixels, group_by_length, seeded
from clipvisionalign.data.batches import ALL, Share
from clipvisionalign.data.captioned import (
    CaptionedImage,
    CaptionedImages,
    DataError,
    Identity,
    hashed,
    text_number,
)

#: Share of samples that may be bad; a set of a few samples may have a few.
BAD_SHARE, BAD_FEW = 0.01, 10

#: Samples among which a stream's next one is drawn.
SHUFFLE = 1000

#: Written beside shards: how many samples each of them holds.
INDEX = "shards.json"
PICTURES = ("jpg", "jpeg", "png", "webp", "ppm", "gif", "bmp")
NAME = "__name__"
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

    def parts(self, epoch: int, seed: int, among: int) -> list[int]:
        """How many samples each of `among` readers gets."""

    def read(self, epoch: int, seed: int, number: int, among: int) -> Iterator[Sample]:
        """The samples of reader `number`, in their order."""


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

    def _dealt(self, epoch: int, seed: int, number: int, among: int) -> list[int]:
        order = np.random.default_rng([seed, epoch]).permutation(len(self.paths))
        return order[number::among].tolist()

    def parts(self, epoch: int, seed: int, among: int) -> list[int]:
        """See `Stream`."""
        return [sum(self.sizes[i] for i in self._dealt(epoch, seed, number, among)) for number in range(among)]

    def read(self, epoch: int, seed: int, number: int, among: int) -> Iterator[Sample]:
        """See `Stream`; webdataset or Hugging Face's datasets reads the files."""
        paths = [str(self.paths[i]) for i in self._dealt(epoch, seed, number, among)]
        if not paths:
            return
        if paths[0].endswith(".parquet"):
            yield from _read_parquet(paths, np.random.default_rng([seed, epoch, number]).integers(1 << 31).item())
            return
        import webdataset

        found = webdataset.WebDataset(
            paths, shardshuffle=False, nodesplitter=None, workersplitter=None, empty_check=False
        )
        mixed = found.shuffle(SHUFFLE, rng=random.Random(f"{seed} {epoch} {number}"))
        yield from map(_sample_of_shard, mixed)


def _read_parquet(paths: list[str], seed: int) -> Iterator[Sample]:
    import datasets

    parts, columns = [], None
    for path in paths:
        rows: Any = datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
        columns = columns or Columns.of(rows, path)
        name = Path(path).name
        # Its file and number make a row's name, before the rows are mixed.
        named = {"function": lambda row, place, name=name: {NAME: f"{name}, row {place}"}, "with_indices": True}
        parts.append(columns.encoded(rows).map(**named))
    assert columns is not None
    for row in datasets.concatenate_datasets(parts).shuffle(seed=seed, buffer_size=SHUFFLE):
        yield columns.sample(row, row[NAME])


def _sample_of_shard(raw: dict[str, Any]) -> Sample:
    name = str(raw["__key__"])
    picture = next((raw[kind] for kind in raw if kind.lower() in PICTURES), None)
    captions: tuple[str, ...] = ()
    identity = ""
    try:
        if "json" in raw:
            about = json.loads(raw["json"])
            captions = _captions_of(about)
            identity = str(about.get("identity") or "") if isinstance(about, dict) else ""
        elif "txt" in raw:
            captions = _texts(raw["txt"].decode("utf-8").splitlines())
    except (ValueError, UnicodeDecodeError) as error:
        return Sample(name, b"", (), f"{raw.get('__url__', '')}, {name}: its captions cannot be read: {error}")
    if picture is None or not captions:
        told = "no picture" if picture is None else "no caption"
        return Sample(name, b"", (), f"{raw.get('__url__', '')}, {name}: {told}")
    return Sample(name, picture, captions, identity=identity)


def _captions_of(about: Any) -> tuple[str, ...]:
    """Captions under any of their usual names: a string, a list, or a list of records."""
    if isinstance(about, dict):
        about = next((about[name] for name in CAPTION_NAMES if about.get(name)), [])
    return _texts([about] if isinstance(about, str) else about)


def _texts(captions: Sequence[Any]) -> tuple[str, ...]:
    plain = (c.get("raw") or c.get("caption") or c.get("text") or "" if isinstance(c, dict) else c for c in captions)
    return tuple(text for text in (" ".join(str(caption).split()) for caption in plain) if text)


def open_shards(pattern: str) -> Shards:
    """Shards by a pattern such as `data/train-{000000..000099}.tar` (or .parquet), or a folder that holds train-*.tar.

    Their samples are counted once, and the counts kept beside them where that is allowed. Raises DataError.
    """
    import webdataset

    source = Path(pattern)
    if source.is_dir():
        paths = sorted(source.glob("train-*.tar")) or sorted(source.glob("*.tar"))
    else:
        paths = [Path(name) for name in webdataset.shardlists.expand_urls(pattern)]
    missing = [path for path in paths if not path.is_file()]
    if not paths or missing:
        told = f"no such shard: {missing[0]} ({len(missing)} missing)" if missing else "no .tar files in it"
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
    return len(dict.fromkeys(Path(name).parent / Path(name).name.partition(".")[0] for name in names))


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
    source: str

    @classmethod
    def of(cls, rows: Any, source: str) -> Columns:
        """Found by kind and by name. Raises DataError where there are none."""
        import datasets

        # A stream may not know its columns before it is read.
        features = rows.features or rows._resolve_features().features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        named = [name for name in ("image", "img", "picture") if name in features]
        image = next(iter([*images, *named]), "")
        captions = next((name for name in CAPTION_NAMES if name in features), "")
        if not image or not captions:
            raise DataError(f"{source}: no column of images and captions in {list(features)}")
        return cls(image, captions, source)

    def encoded(self, rows: Any) -> Any:
        """The same rows with pictures as they are encoded, not decoded already."""
        import datasets

        known = rows.features or {}
        return rows.cast_column(self.image, datasets.Image(decode=False)) if known else rows

    def sample(self, row: dict[str, Any], name: str) -> Sample:
        """One row as a sample."""
        picture, captions = row[self.image], _captions_of(row[self.captions])
        if isinstance(picture, dict):
            picture = picture["bytes"] if picture.get("bytes") else Path(picture["path"]).read_bytes()
        if not picture or not captions:
            return Sample(name, b"", (), f"{self.source}, {name}: no {'picture' if not picture else 'caption'}")
        return Sample(name, picture, captions)


@dataclass
class Saved:
    """A Hugging Face data set in a folder that `save_to_disk` wrote. rows: the data set itself."""

    source: str
    rows: Any

    def __post_init__(self) -> None:
        self.columns = Columns.of(self.rows, self.source)
        self.rows = self.columns.encoded(self.rows)

    @property
    def count(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """The data set's own."""
        return str(self.rows._fingerprint)

    def parts(self, epoch: int, seed: int, among: int) -> list[int]:
        """See `Stream`."""
        return [len(range(self.count)[number::among]) for number in range(among)]

    def read(self, epoch: int, seed: int, number: int, among: int) -> Iterator[Sample]:
        """See `Stream`; rows are read from where they lie, in any order."""
        for place in np.random.default_rng([seed, epoch]).permutation(self.count)[number::among].tolist():
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
        files = sorted(folder.glob(f"{split}-*.tar"))
        shards = Shards(source, files, [_samples_in(file) for file in files])
        samples = [sample for number in range(len(files)) for sample in shards.read(0, 0, number, len(files))]
    good = [sample for sample in samples if not sample.bad]
    if not good:
        raise DataError(f"{source}: no split '{split}' beside the training split; give it with --dev_data DATA")
    good.sort(key=lambda sample: sample.name)
    rows = [CaptionedImage(s.name, s.image, s.captions, split, s.identity or None) for s in good]
    return CaptionedImages(rows, Path(source), "stream")


class StreamedBatches(IterableDataset[Batch]):
    """Batches from a stream; the counterpart of `CaptionedBatches`, with the same calls."""

    #: A stream cannot be asked for the same batch again.
    replays = False

    def __init__(
        self, stream: Shards | Saved, tokenize: Tokenize, pad: int, look: Look | None, identity: Identity = "auto"
    ) -> None:
        self.identity = identity
        self.stream, self.tokenize, self.pad, self.look = stream, tokenize, pad, look
        self.tokenise_seconds = 0.0
        #: An epoch as it is being read: batch size of this process, epoch, seed, batches to read past, share.
        self.reading: tuple[int, int, int, int, Share] = (1, 0, 0, 0, ALL)
        self.captions_per_image = 1.0
        #: How many of the captions that have passed the text tower's limit has cut.
        self.cut = CutCaptions()
        self.tally = _Tally()

    def __len__(self) -> int:
        return self.stream.count

    def steps(self, batch: int) -> int:
        """Steps in an epoch: the last images that do not fill a batch wait for the next one."""
        return max(1, self.stream.count // batch)

    def epoch(
        self, batch: int, epoch: int, seed: int, workers: int = 0, start: int = 0, share: Share = ALL, chunk: int = 0
    ) -> Iterator[Batch]:
        """This process's batches of one epoch, from number `start` on, whole whatever `chunk` says; the last ones may
        be smaller."""
        own = len(range(batch)[share[0] :: share[1]])
        self.reading = (own, epoch, seed, start, share)
        generator = torch.Generator().manual_seed(0)
        for found in DataLoader(self, batch_size=None, num_workers=workers, generator=generator):
            self.tally.add(found, self.stream.source)
            self.cut += found.cut or CutCaptions()
            self.captions_per_image = len(found.caption_image) / max(1, len(found))
            yield found

    def __iter__(self) -> Iterator[Batch]:
        size, epoch, seed, start, share = self.reading
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        among = share[1] * workers
        parts = self.stream.parts(epoch, seed, among)
        own = [-(-parts[share[0] * workers + number] // size) for number in range(workers)]
        taken, turn = read_by(own, start)
        # The loader asks its workers from the first one on: that one has to be whose turn it is.
        worker = (worker + turn) % workers
        past = taken[worker]
        samples = self.stream.read(epoch, seed, share[0] * workers + worker, among)
        # Read past without decoding: the order is that of the undisturbed epoch.
        for _ in islice(samples, past * size):
            pass
        while some := list(islice(samples, size)):
            yield self._batch(some, seed)

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
            skipped += [f"{self.stream.source}, {reason}" for reason in failed]
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


def read_by(batches: Sequence[int], start: int) -> tuple[list[int], int]:
    """How many batches each worker has made when `start` have been taken, and whose turn it is: they take turns, and
    who has none left is passed over (as PyTorch's DataLoader does)."""
    taken, turn = [0] * len(batches), 0
    for _ in range(min(start, sum(batches))):
        while taken[turn] >= batches[turn]:
            turn = (turn + 1) % len(batches)
        taken[turn] += 1
        turn = (turn + 1) % len(batches)
    return taken, turn


@dataclass
class _Tally:
    """Counts samples and bad ones; too many stop the training."""

    good: int = 0
    bad: int = 0
    reasons: list[str] = field(default_factory=list)

    def add(self, batch: Batch, source: str) -> None:
        self.good += len(batch)
        self.bad += len(batch.skipped)
        self.reasons += batch.skipped[: 1 if not self.reasons else 0]
        if self.bad > max(BAD_FEW, BAD_SHARE * (self.good + self.bad)):
            raise DataError(
                f"{source}: {self.bad:,} of {self.good + self.bad:,} samples are bad, more than "
                f"{100 * BAD_SHARE:g} %; the first one: {self.reasons[0]}"
            )
