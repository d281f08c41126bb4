"""The files of a stream: which of a folder are shards, of which split, and their samples in order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.splits import SPLIT_ALIASES
from clipvisionalign.data.streams.huggingface import is_saved_dataset
from clipvisionalign.data.streams.parquet import read_parquet
from clipvisionalign.data.streams.samples import IMAGE_EXTENSIONS, Sample
from clipvisionalign.data.streams.webdataset import index_shard, open_tar

#: Written beside shards: how many samples each of them holds.
SHARD_INDEX_FILE = "shards.json"


def read_shard(path: Path, start: int = 0) -> Iterator[Sample]:
    """The samples of a tar or Parquet file in their order.

    Args:
        path: The file.
        start: First sample, from 0; those before it are not decoded.

    Yields:
        The samples, invalid ones too.

    Raises:
        DataError: The file is not whole.
    """
    if path.suffix == ".parquet":
        yield from read_parquet(path, start)
        return
    with open_tar(path) as tar:
        for sample in islice(index_shard(tar).samples, start, None):
            yield sample.read(tar, path.name)


def count_samples(path: Path) -> int:
    """Number of samples of a file: of a tar file by its headers, of a Parquet file its rows.

    Args:
        path: The file.

    Returns:
        The number, invalid samples included.

    Raises:
        DataError: The file is not whole.
    """
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(path).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a whole Parquet file: {error}") from None
    with open_tar(path) as tar:
        return len(index_shard(tar).samples)


def split_in_name(path: Path) -> str:
    """The split in the name of a file.

    Args:
        path: The file.

    Returns:
        "train", "dev" or "test"; "" where its name contains none.

    >>> split_in_name(Path("flickr-train-000.tar")), split_in_name(Path("flickr-000.tar"))
    ('train', '')
    """
    words = re.split(r"[^a-z]+", path.name.partition(".")[0].lower())
    return next((SPLIT_ALIASES[word] for word in words if word in SPLIT_ALIASES), "")


def _tar_files(folder: Path) -> list[Path]:
    """The tar files of a folder, without what macOS puts beside them."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def is_pattern(source: Path) -> bool:
    """Whether shards are named themselves: one tar file, or several tar or Parquet files by a pattern.

    Args:
        source: A path or a pattern such as train-{000..009}.tar.

    Returns:
        Whether they are; what is on disk does not count.
    """
    return source.suffix == ".tar" or (source.suffix == ".parquet" and "{" in source.name)


def is_shards(source: Path) -> bool:
    """Whether a source is a stream.

    Args:
        source: A path or a pattern.

    Returns:
        Whether it is a pattern, a folder of `save_to_disk`, or a folder of tar files whose names contain splits and
        that hold
        samples: images, each with a .json or .txt.
    """
    if is_pattern(source) and not source.is_dir():
        return True
    if not source.is_dir():
        return False
    if is_saved_dataset(source):
        return True
    return any(split_in_name(path) and _holds_samples(path) for path in _tar_files(source))


def shards_in_folder(source: Path) -> list[Path]:
    """The tar files of a folder that are shards by their names and hold samples.

    Args:
        source: A folder.

    Returns:
        Their paths, sorted; none of a file.
    """
    return (
        [path for path in _tar_files(source) if split_in_name(path) and _holds_samples(path)] if source.is_dir() else []
    )


def has_tar_files(source: Path) -> bool:
    """Whether a folder has tar files: shards, if nothing else is recognised there.

    Args:
        source: A folder.

    Returns:
        Whether it has any.
    """
    return source.is_dir() and bool(_tar_files(source))


def _holds_samples(path: Path) -> bool:
    """Whether an archive holds images with captions, and not images alone."""
    try:
        with open_tar(path) as tar:
            samples = index_shard(tar).samples
    except DataError:
        # Reported when it is read.
        return True
    kinds = ({member.extension for member in sample.members} for sample in samples)
    return any(kind & IMAGE_EXTENSIONS and kind & {"json", "txt"} for kind in kinds)


def expand_pattern(pattern: str) -> list[Path]:
    """The files of a pattern.

    Args:
        pattern: Such as `train-{000..009}.tar`.

    Returns:
        Their paths, which need not exist.
    """
    import webdataset

    return [Path(name) for name in webdataset.shardlists.expand_urls(pattern)]


def files_by_split(source: Path) -> dict[str, list[Path]]:
    """The files of each split: of those that are named, or of a folder's tar files.

    Args:
        source: A pattern or a folder.

    Returns:
        Files by split; all are of "train" where no name contains a split.

    Raises:
        DataError: A file is not there, or some files of a folder are of no split by their names.
    """
    named = is_pattern(source) and not source.is_dir()
    files = expand_pattern(str(source)) if named else _tar_files(source)
    missing = [path for path in files if not path.is_file()]
    if not files or missing:
        message = f"no such shard: {missing[0]} ({len(missing)} missing)" if missing else "no .tar files in it"
        raise DataError(f"{source}: {message}")
    split_by_path = {path: split_in_name(path) for path in files}
    unlabelled = [path for path in files if not split_by_path[path]]
    if named or len(unlabelled) == len(files):
        split_by_path = {path: split or "train" for path, split in split_by_path.items()}
    elif unlabelled:
        raise DataError(
            f"{source}: {len(unlabelled)} of {len(files)} .tar files are of no split by their names, such as "
            f"{unlabelled[0].name}; name those to train on by a pattern, such as {source}/NAME-{{000..009}}.tar"
        )
    by_split: dict[str, list[Path]] = {}
    for path, split in split_by_path.items():
        by_split.setdefault(split, []).append(path)
    return by_split


def sibling_files(source: Path, split: str) -> list[Path]:
    """The files of another split, beside shards that are named.

    Args:
        source: The pattern of the shards.
        split: The split that is wanted.

    Returns:
        Files in their folder whose names contain it, sorted.
    """
    kind = "*.parquet" if source.suffix == ".parquet" else "*.tar"
    return [path for path in sorted(source.parent.glob(kind)) if split_in_name(path) == split]
