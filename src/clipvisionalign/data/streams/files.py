"""The files of a stream: which of a folder are shards, of which split, and their samples in order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.splits import SPLIT_WORDS
from clipvisionalign.data.streams.huggingface import is_saved
from clipvisionalign.data.streams.parquet import _read_parquet
from clipvisionalign.data.streams.samples import IMAGE_ENDINGS, Sample
from clipvisionalign.data.streams.webdataset import _opened, index_of

#: Written beside shards: how many samples each of them holds.
INDEX = "shards.json"


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
