"""Samples of a stream: WebDataset shards, Parquet files, and folders that Hugging Face's `save_to_disk` wrote.

- A sample is one image with its captions. In a shard its members have one name before their endings: `KEY.jpg` (or
  .png, .webp, ...) with `KEY.json` (`{"captions": [...]}`, also `caption`, `text`, ...) or `KEY.txt`, a caption a line.
  Captions in the .json count before the .txt, and a .json without any hides none. Parquet files and saved data sets
  have a column of images and one of captions.
- A shard is read by its headers first: members of a sample need not be neighbours, and a point within a key is part of
  it where two images would else become one (`x.1.jpg`, `x.2.jpg`). A name that comes again begins another sample.
- Every sample is read, or is bad and says why; what of a sample was left out all the same stands in its `complaints`.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import SPLITS, CaptionedImage, CaptionedImages, DataError, Problem
from clipvisionalign.data.captions import CAPTION_NAMES, caption_texts
from clipvisionalign.data.formats.tables import IDENTITY_COLUMNS, SPLIT_COLUMNS, caption_columns, column_named
from clipvisionalign.data.splits import SPLIT_WORDS, split_word
from clipvisionalign.data.text_files import decode, split_lines
from clipvisionalign.images import PictureError, files_below, not_for_images, open_header

#: Rows of a Parquet file that are in memory at a time.
PARQUET_ROWS = 64

#: Written beside shards: how many samples each of them holds.
INDEX = "shards.json"

#: What `datasets.save_to_disk` writes, below its folder.
_SAVED = re.compile(r"(^|/)([^/]*\.arrow|(dataset_info|state|dataset_dict)\.json)$")

#: Names of files that webdataset passes over.
META = re.compile(r"__[^/]*__($|/)")

#: Endings of images in a shard; a sample without any of them is asked for an image by its members' content.
IMAGE_ENDINGS = frozenset({
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jp2", "j2k",
    "jxl", "mpo", "ppm", "pgm", "pbm", "pnm", "tga", "qoi",
})  # fmt: skip

#: Under these names a .json tells captions though a .txt is there; the others may be anything about the image.
OWN_CAPTIONS = ("captions", "caption", "sentences", "raw", "text")


@dataclass(frozen=True)
class Sample:
    """One image, encoded, with its captions.

    name: its file and its key or row. bad: what is wrong with it, "" for nothing. identity: of what it shows, if known.
    split: the one that it says it is of, if it does. complaints: what was left out of a sample that is used.
    """

    name: str
    image: bytes
    captions: tuple[str, ...]
    bad: str = ""
    identity: str = ""
    split: str = ""
    complaints: tuple[Problem, ...] = ()

    def of_split(self, split: str) -> Sample:
        """The same sample, bad where it says that it is of another split than the file that it is in."""
        if self.bad or self.split in ("", split):
            return self
        return bad_sample(self.name, f"says that its split is '{self.split}', in a file of '{split}'")


def bad_sample(name: str, reason: str) -> Sample:
    """A sample that cannot be used."""
    return Sample(name, b"", (), reason)


# --- what a sample says -----------------------------------------------------------------------------------------------


@dataclass
class _Told:
    """What is known of a sample beside its image."""

    place: str
    captions: list[str] = field(default_factory=list)
    wrong: list[Problem] = field(default_factory=list)
    identity: str = ""
    split: str = ""

    def complain(self, kind: str, message: str, effect: str = "left out") -> None:
        """Take note of something that is wrong, once."""
        problem = Problem(kind, self.place, message, effect)
        if problem not in self.wrong:
            self.wrong.append(problem)

    def add(self, value: Any, where: str = "") -> None:
        """Captions in any form; what of them is none is told with `where` it stands."""
        texts, wrong = caption_texts(value)
        self.captions += map(_encodable, texts)
        for reason in wrong:
            self.complain("empty caption", f"{where}{reason}")

    def add_named(self, record: Mapping[str, Any], names: Iterable[str]) -> None:
        """The captions under the first of `names`, whatever its case, that has any, unless there are some already."""
        for name in _present(record, names):
            if not self.captions and record[name]:
                self.add(record[name], f".json, {name}: ")

    def pass_over(self, values: Mapping[str, Any]) -> None:
        """Take note of captions, by the place where each stands, that are none of those that are read."""
        for where, value in values.items():
            others = [text for text in caption_texts(value)[0] if _encodable(text) not in self.captions]
            if others:
                message = f"{where}: {len(others)} captions beside those that are read, such as {others[0][:40]!r}"
                self.complain("captions not read", message, "warning")

    def describe(self, about: Mapping[str, Any]) -> None:
        """Take identity and split from a record."""
        for column, names in (("identity", IDENTITY_COLUMNS), ("split", SPLIT_COLUMNS)):
            name = column_named(about, names)
            value = None if name is None else about[name]
            if value is None or value == "" or value != value:
                continue
            if isinstance(value, (dict, list, tuple, bytes)):
                self.complain(f"odd {column}", f"{name}: {type(value).__name__} where a text or a number belongs")
                continue
            setattr(self, column, str(value).strip())
        # Other words under such names are about something else: the file's own name tells the split.
        self.split = split if (split := split_word(self.split)) in SPLITS else ""

    def sample(self, image: bytes | None) -> Sample:
        """The sample with its image; bad without an image or a caption."""
        if image and self.captions:
            captions = tuple(self.captions)
            return Sample(self.place, image, captions, "", self.identity, self.split, tuple(self.wrong))
        missing = "no caption" if image else "no image"
        return bad_sample(self.place, "; ".join(dict.fromkeys([missing, *(problem.message for problem in self.wrong)])))


def _encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _told_by(name: str, parts: Mapping[str, bytes]) -> _Told:
    """Captions, identity and split of a sample by its members' endings."""
    told = _Told(name)
    about: Any = None
    if "json" in parts:
        try:
            about = json.loads(decode(parts["json"]).text)
        except (ValueError, RecursionError) as error:
            told.complain("broken row", f".json cannot be read: {error}")
    record = about if isinstance(about, dict) else {}
    told.describe(record)
    if about is not None and not isinstance(about, dict):
        told.add(about, ".json: ")
    told.add_named(record, OWN_CAPTIONS)
    text = parts.get("txt", next((parts[ending] for ending in parts if ending.endswith(".txt")), None))
    if not told.captions and text is not None:
        decoded = decode(text)
        if decoded.mended:
            told.complain("broken encoding", f".txt: {decoded.mended}", "mended")
        told.add([line for line in split_lines(decoded.text) if line.strip()] or None, ".txt: ")
    told.add_named(record, [name for name in CAPTION_NAMES if name not in OWN_CAPTIONS])
    told.pass_over({f".json, {name}": record[name] for name in _present(record, OWN_CAPTIONS)})
    if text is not None:
        told.pass_over({".txt": [line for line in split_lines(decode(text).text) if line.strip()]})
    return told


def _present(record: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names that a record has, whatever their case."""
    return list(filter(None, (column_named(record, [name]) for name in names)))


def _sample(name: str, parts: Mapping[str, bytes]) -> Sample:
    """A sample of a shard by its members' endings."""
    image = next((parts[ending] for ending in parts if ending.rpartition(".")[2] in IMAGE_ENDINGS), None)
    if image is None:
        others = (content for ending, content in parts.items() if ending not in ("json", "txt"))
        image = next(filter(_is_image, others), None)
    return _told_by(name, parts).sample(image)


def _is_image(content: bytes) -> bool:
    try:
        open_header(content).close()
    except PictureError:
        return False
    return True


# --- shards -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A file within a shard. name: without "./"; ending: what follows its last point, in lower case."""

    name: str
    about: tarfile.TarInfo

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def ending(self) -> str:
        return self.name.rpartition(".")[2].lower()


@dataclass(frozen=True)
class ShardSample:
    """The members of one sample of a shard, the key before their endings."""

    key: str
    stem: str
    members: list[Member]

    def read(self, tar: tarfile.TarFile, shard: str) -> Sample:
        """The sample itself."""
        parts: dict[str, bytes] = {}
        for member in self.members:
            ending = member.name.removeprefix(f"{self.stem}.").lower() if self.stem else member.name
            try:
                file = tar.extractfile(member.about)
            except KeyError:
                # A link to what is not in the archive.
                file = None
            if file is not None:
                parts.setdefault(ending, file.read())
        return _sample(f"{shard}, {self.key}", parts)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a shard in the order in which they begin; passed_over: names of files that are of none."""

    samples: list[ShardSample]
    passed_over: list[str]

    @property
    def second_images(self) -> list[str]:
        """Names of images whose sample has another one, which is read."""
        images = ([m.name for m in sample.members if m.ending in IMAGE_ENDINGS] for sample in self.samples)
        return [name for names in images for name in names[1:]]


def index_of(tar: tarfile.TarFile) -> ShardIndex:
    """Which members make which samples, by their names alone."""
    groups: dict[tuple[str, int], list[Member]] = {}
    seen: Counter[str] = Counter()
    passed_over = []
    for about in tar:
        name = about.name.removeprefix("./")
        if about.isdir() or META.match(name):
            continue
        folder, slash, file = name.rpartition("/")
        if not (about.isreg() or about.islnk()) or file.startswith(".") or not file.partition(".")[2]:
            passed_over.append(name)
            continue
        key = f"{folder}{slash}{file.partition('.')[0]}"
        groups.setdefault((key, seen[name]), []).append(Member(name, about))
        seen[name] += 1
    samples = []
    for (key, turn), members in groups.items():
        for stem, own in _samples_of(key, members).items():
            samples.append(ShardSample(f"{stem} ({turn + 1})" if turn else stem, stem, own))
    return ShardIndex(sorted(samples, key=lambda sample: sample.members[0].about.offset), passed_over)


def _samples_of(key: str, members: Sequence[Member]) -> dict[str, list[Member]]:
    """The members that webdataset takes for one sample, `key`, by the samples that they are: one for each image that a
    caption may belong to."""
    images = dict.fromkeys(member.stem for member in members if member.ending in IMAGE_ENDINGS)
    texts = {member.stem for member in members if member.ending in ("json", "txt")}
    # A second image without a caption of its own ("x.mask.png" beside "x.jpg") is another part of its sample.
    stems = [s for s in images if s in texts or not any(s.startswith(f"{other}.") for other in images)]
    found: dict[str, list[Member]] = {stem: [] for stem in stems}
    left = []
    for member in members:
        of = [stem for stem in stems if member.name.startswith(f"{stem}.")]
        if of:
            found[max(of, key=len)].append(member)
        else:
            left.append(member)
    for member in left:
        if not stems:
            found.setdefault(key, []).append(member)
        elif len(stems) == 1 and (member.stem == key or stems[0] not in texts):
            found[stems[0]].append(member)
        else:
            # Captions whose image is not there.
            found.setdefault(member.stem, []).append(member)
    return found


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """A shard. Raises DataError where it is no whole tar file."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole tar file: {error}") from None


def read_shard(path: Path, start: int = 0) -> Iterator[Sample]:
    """The samples of a tar or Parquet file in their order, from number `start` on. Raises DataError."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, start)
        return
    with _opened(path) as tar:
        for sample in islice(index_of(tar).samples, start, None):
            yield sample.read(tar, path.name)


def samples_in(path: Path) -> int:
    """Samples of a tar file, by its headers, or rows of a Parquet file. Raises DataError where it is none."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a whole Parquet file: {error}") from None
    with _opened(path) as tar:
        return len(index_of(tar).samples)


def _read_parquet(path: Path, start: int) -> Iterator[Sample]:
    """Rows of a Parquet file from number `start` on; groups of rows before that are not read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns_of(file, path)
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
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {error}") from None


def _columns_of(file: Any, path: Path) -> Columns:
    import datasets

    return Columns.of(datasets.Features.from_arrow_schema(file.schema_arrow), str(path))


def _parquet_columns(path: Path) -> Columns:
    """The columns of a Parquet file that was read before."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return _columns_of(file, path)


# --- Hugging Face data sets -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Where a data set of `datasets` has its images and captions. unused: the columns that nothing is read from."""

    image: str
    captions: tuple[str, ...]
    identity: str
    split: str
    source: str
    unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, features: Any, source: str) -> Columns:
        """Found by kind and by name. Raises DataError where there are none."""
        import datasets

        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        named = [name for name in ("image", "img", "picture") if name in features]
        image = next(iter([*images, *named]), "")
        captions = caption_columns(features)
        if not image or not captions:
            raise DataError(f"{source}: no column of images and captions in {list(features)}")
        identity, split = (column_named(features, names) or "" for names in (IDENTITY_COLUMNS, SPLIT_COLUMNS))
        used = {image, *captions, identity, split}
        return cls(image, captions, identity, split, source, tuple(name for name in features if name not in used))

    @property
    def names(self) -> list[str]:
        """The columns that are read."""
        return [name for name in (self.image, *self.captions, self.identity, self.split) if name]

    def notes(self, place: str) -> list[str]:
        """What to say of the columns that are not read."""
        return [f"{place}: columns that are not read: {', '.join(self.unused)}"] if self.unused else []

    def encoded(self, rows: Any) -> Any:
        """The same rows with images as they are encoded, not decoded already."""
        import datasets

        known = rows.features or {}
        return rows.cast_column(self.image, datasets.Image(decode=False)) if known else rows

    def sample(self, row: dict[str, Any], name: str) -> Sample:
        """One row as a sample."""
        told = _Told(name)
        cells = [row[name] for name in self.captions if row[name] not in (None, "")]
        told.add(cells[0] if len(cells) == 1 else cells)
        told.describe(row)
        image = row[self.image]
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        try:
            if isinstance(image, str) and image:
                # Beside the file that names it, unless it says where.
                beside = Path(self.source)
                image = ((beside if beside.is_dir() else beside.parent) / image).read_bytes()
        except (ValueError, OSError) as error:
            return bad_sample(name, str(error))
        return told.sample(image if isinstance(image, bytes) else None)


def is_saved(folder: Path) -> bool:
    """A folder that `datasets.save_to_disk` wrote: of a data set, or of its splits."""
    return (folder / "dataset_dict.json").is_file() or all(
        (folder / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def open_saved(folder: Path) -> dict[str, Any]:
    """The splits of a folder that `datasets.save_to_disk` wrote, by this project's names: several whose names mean one
    split are put together, in their order. Raises DataError, also where such splits do not go together."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a whole folder of save_to_disk: {error}") from None
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else {_split_saved(found): found}
    if len(splits) == 1:
        splits = _split_by_rows(*next(iter(splits.items())))
    named: dict[str, list[str]] = {}
    for name in splits:
        named.setdefault(split_word(name), []).append(name)
    together = {}
    for split, names in named.items():
        try:
            rows = [splits[name] for name in names]
            together[split] = rows[0] if len(rows) == 1 else datasets.concatenate_datasets(rows)
        except (ValueError, TypeError) as error:
            told = (
                f"{folder}: {' and '.join(names)} are all of '{split}', and their columns do not go together: {error}"
            )
            raise DataError(told) from None
    return together


def _split_saved(rows: Any) -> str:
    """The split that a data set was taken from, such as "test" of "test[:50%]"; "train" where it does not say."""
    return str(rows.split or "train").partition("[")[0]


def _split_by_rows(name: str, rows: Any) -> dict[str, Any]:
    """The splits of a data set that was saved as one: those that its rows tell, where they tell several; a row that
    tells none is of `name`. Such a data set is called after the one file that it was made from, often "test"."""
    column = column_named(rows.features, SPLIT_COLUMNS)
    places: dict[str, list[int]] = {}
    for place, value in enumerate(rows[column] if column else ()):
        told = split_word(value) if isinstance(value, str) else ""
        places.setdefault(told if told in SPLITS else name, []).append(place)
    if len(places) < 2:
        return {name: rows}
    return {split: rows.select(own) for split, own in places.items()}


# --- which files, of which split --------------------------------------------------------------------------------------


def split_of(path: Path) -> str:
    """The split that a file's name tells: "flickr-train-000.tar" is of "train"; "" where it tells none."""
    words = re.split(r"[^a-z]+", path.name.partition(".")[0].lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _tars(folder: Path) -> list[Path]:
    """The tar files of a folder, without what macOS puts beside them."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def is_pattern(source: Path) -> bool:
    """Whether shards are named themselves: one tar file, or several tar or Parquet files by a pattern."""
    return source.suffix == ".tar" or (source.suffix == ".parquet" and "{" in source.name)


def is_shards(source: Path) -> bool:
    """Shards by name or pattern, a folder of `save_to_disk`, or one of tar files whose names tell splits and which hold
    samples: images, each with a .json or .txt."""
    if is_pattern(source) and not source.is_dir():
        return True
    if not source.is_dir():
        return False
    if is_saved(source):
        return True
    return any(split_of(path) and _holds_samples(path) for path in _tars(source))


def shards_beside(source: Path) -> list[Path]:
    """The tar files of a folder that are shards by their names and hold samples."""
    return [path for path in _tars(source) if split_of(path) and _holds_samples(path)] if source.is_dir() else []


def may_be_shards(source: Path) -> bool:
    """A folder with tar files: shards, if nothing else is recognised there."""
    return source.is_dir() and bool(_tars(source))


def _holds_samples(path: Path) -> bool:
    """Whether an archive holds images with captions, and not images alone."""
    try:
        with _opened(path) as tar:
            found = index_of(tar).samples
    except DataError:
        # Told when it is read.
        return True
    kinds = ({member.ending for member in sample.members} for sample in found)
    return any(kind & IMAGE_ENDINGS and kind & {"json", "txt"} for kind in kinds)


def expanded(pattern: str) -> list[Path]:
    """The files of a pattern such as `train-{000..009}.tar`."""
    import webdataset

    return [Path(name) for name in webdataset.shardlists.expand_urls(pattern)]


def files_by_split(source: Path) -> dict[str, list[Path]]:
    """The files of each split: of those that are named, or of a folder's tar files. All are of "train" where no name
    tells a split. Raises DataError where some names do, and others do not, or where a file is not there."""
    named = is_pattern(source) and not source.is_dir()
    files = expanded(str(source)) if named else _tars(source)
    missing = [path for path in files if not path.is_file()]
    if not files or missing:
        told = f"no such shard: {missing[0]} ({len(missing)} missing)" if missing else "no .tar files in it"
        raise DataError(f"{source}: {told}")
    told_by = {path: split_of(path) for path in files}
    strange = [path for path in files if not told_by[path]]
    if named or len(strange) == len(files):
        told_by = {path: split or "train" for path, split in told_by.items()}
    elif strange:
        raise DataError(
            f"{source}: {len(strange)} of {len(files)} .tar files are of no split by their names, such as "
            f"{strange[0].name}; name those to train on by a pattern, such as {source}/NAME-{{000..009}}.tar"
        )
    found: dict[str, list[Path]] = {}
    for path, split in told_by.items():
        found.setdefault(split, []).append(path)
    return found


def files_beside(source: Path, split: str) -> list[Path]:
    """The files of another split, for shards that are named: those in their folder whose names tell it."""
    kind = "*.parquet" if source.suffix == ".parquet" else "*.tar"
    return [path for path in sorted(source.parent.glob(kind)) if split_of(path) == split]


# --- read into memory -------------------------------------------------------------------------------------------------


def read_stream(source: Path, group: str = "", split_rule: int = 0) -> CaptionedImages:
    """All splits of a stream, in memory, with their images; its files tell them, whatever decides elsewhere. Raises
    DataError where that is too much, or nothing."""
    if source.is_dir() and is_saved(source):
        splits = open_saved(source)
        rows = {split: Columns.of(some.features, str(source)) for split, some in splits.items()}
        found = [
            (split, columns.sample(row, f"{split}, row {place}"))
            for split, columns in rows.items()
            for place, row in enumerate(columns.encoded(splits[split]))
        ]
        return _in_memory(source, found, [], [note for split in rows for note in rows[split].notes(split)])
    files = files_by_split(source)
    _refuse_too_large(source, [path for some in files.values() for path in some])
    found = [(split, sample) for split, some in files.items() for path in some for sample in read_shard(path)]
    return _in_memory(source, found, [path for some in files.values() for path in some])


def _refuse_too_large(source: Path, files: Sequence[Path]) -> None:
    """Raises DataError where files are more than may be in memory."""
    size, room = sum(path.stat().st_size for path in files), _memory()
    if size > room / 2:
        raise DataError(
            f"{source}: {size / 2**30:.1f} GiB, more than half of this machine's memory ({room / 2**30:.1f} GiB); name "
            "some of the files by a pattern, such as NAME-{000..009}.tar"
        )


def _memory() -> int:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 40


def stream_split(source: str | Path, split: str) -> CaptionedImages:
    """One split of a stream, in memory. Raises DataError where there is none."""
    path = Path(source)
    files: list[Path] = []
    if path.is_dir() and is_saved(path):
        rows = open_saved(path).get(split)
        found = []
        if rows is not None:
            columns = Columns.of(rows.features, str(source))
            found = [columns.sample(row, f"row {place}") for place, row in enumerate(columns.encoded(rows))]
    else:
        named = is_pattern(path) and not path.is_dir()
        files = files_by_split(path).get(split, []) if not named or split == "train" else files_beside(path, split)
        _refuse_too_large(path, files)
        found = [sample for file in files for sample in read_shard(file)]
    if not found:
        raise DataError(f"{source}: no split '{split}' beside the training split; give it with --dev_data DATA")
    data = _in_memory(path, [(split, sample) for sample in found], files)
    data.rows.sort(key=lambda row: row.name)
    return data


def _in_memory(
    source: Path, found: Sequence[tuple[str, Sample]], files: Sequence[Path], notes: Sequence[str] = ()
) -> CaptionedImages:
    """Samples as `CaptionedImages`: each a row, or a problem. Raises DataError where no row is left."""
    rows: list[CaptionedImage] = []
    problems: list[Problem] = []
    for split, raw in found:
        sample = raw.of_split(split)
        if not sample.bad and split not in SPLITS:
            sample = bad_sample(sample.name, f"its split is called '{split}'; known are {', '.join(SPLITS)}")
        if sample.bad:
            problems.append(Problem("bad sample", sample.name, sample.bad, rows=1))
            continue
        # The sample is used, without a part of it.
        problems += [replace(each, effect="mended" if each.effect == "left out" else each.effect)
                     for each in sample.complaints]  # fmt: skip
        rows.append(
            CaptionedImage(sample.name, sample.image, sample.captions, split, sample.identity or None, sample.name, 1)
        )
    notes = [*notes, *(note for path in files for note in _passed_over(path))]
    notes += _beside(source, files) if source.is_dir() else []
    if not rows:
        first = f"; the first of {len(problems)}: {problems[0]}" if problems else ""
        raise DataError(f"{source}: none of {len(found):,} samples can be used{first}")
    return CaptionedImages(rows, source, "stream", problems=problems, rows_in_files=len(found), notes=notes)


def _passed_over(path: Path) -> list[str]:
    """What to say of what is not read of a file: files of a shard that are of no sample, images of one that has another
    one, columns of Parquet."""
    if path.suffix == ".parquet":
        return _parquet_columns(path).notes(path.name)
    with _opened(path) as tar:
        index = index_of(tar)
    told = (
        (index.passed_over, "files are of no sample by their names"),
        (index.second_images, "images are not read, since their sample has another one"),
    )
    return [f"{path.name}: {len(names):,} {what}, such as {names[0]}" for names, what in told if names]


def _beside(source: Path, read: Sequence[Path]) -> list[str]:
    """What to say of the files of a stream's folder that are neither its shards nor written with them."""
    own = {path.name for path in read} | {INDEX}
    others: Counter[str] = Counter()
    unlisted: dict[bytes, str] = {}
    first = ""
    for raw, _ in files_below(source, unlisted):
        name = os.fsdecode(raw)
        if name in own or _SAVED.search(name) or any(map(not_for_images, Path(name).parts)):
            continue
        first = first or name
        others[Path(name).suffix.lower() or "no ending"] += 1
    kinds = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(5))
    told = (
        [f"{others.total():,} files beside those of the stream are not read, such as {first}: {kinds}"] if first else []
    )
    return told + [f"{os.fsdecode(raw)}: this folder cannot be listed: {reason}" for raw, reason in unlisted.items()]
