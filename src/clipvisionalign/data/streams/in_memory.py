"""A stream, or one split of it, as `CaptionedImages` in memory."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipvisionalign.data.captioned import SPLITS, CaptionedImage, CaptionedImages, DataError, Problem
from clipvisionalign.data.streams.files import SHARD_INDEX_FILE, files_by_split, is_pattern, read_shard, sibling_files
from clipvisionalign.data.streams.huggingface import SampleColumns, is_saved_dataset, load_saved_dataset
from clipvisionalign.data.streams.parquet import parquet_columns
from clipvisionalign.data.streams.samples import Sample, invalid_sample
from clipvisionalign.data.streams.webdataset import index_shard, open_tar
from clipvisionalign.images import name_exclusion_reason, walk_files

#: What `datasets.save_to_disk` writes, below its folder.
_SAVED_FILES = re.compile(r"(^|/)([^/]*\.arrow|(dataset_info|state|dataset_dict)\.json)$")


def read_stream(source: Path, group: str = "", split_rule: int = 0) -> CaptionedImages:
    """All splits of a stream, in memory, with their images.

    Args:
        source: A pattern, a folder of tar files, or one of `save_to_disk`.
        group: Not used: a stream has no columns to group by.
        split_rule: Not used: its files decide.

    Returns:
        The images with their captions; invalid samples are problems.

    Raises:
        DataError: It takes more than half of the memory, or no sample can be used.
    """
    if source.is_dir() and is_saved_dataset(source):
        splits = load_saved_dataset(source)
        columns_by_split = {
            split: SampleColumns.detect(dataset.features, str(source)) for split, dataset in splits.items()
        }
        samples = [
            (split, columns.to_sample(row, f"{split}, row {index}"))
            for split, columns in columns_by_split.items()
            for index, row in enumerate(columns.without_decoding(splits[split]))
        ]
        return _to_captioned_images(
            source, samples, [], [note for split in columns_by_split for note in columns_by_split[split].notes(split)]
        )
    files = files_by_split(source)
    _check_total_size(source, [path for dataset in files.values() for path in dataset])
    samples = [(split, sample) for split, dataset in files.items() for path in dataset for sample in read_shard(path)]
    return _to_captioned_images(source, samples, [path for dataset in files.values() for path in dataset])


def _check_total_size(source: Path, files: Sequence[Path]) -> None:
    """Raises DataError where files are more than may be in memory."""
    size, memory = sum(path.stat().st_size for path in files), _memory()
    if size > memory / 2:
        raise DataError(
            f"{source}: {size / 2**30:.1f} GiB, more than half of this machine's memory ({memory / 2**30:.1f} "
            "GiB); name "
            "some of the files by a pattern, such as NAME-{000..009}.tar"
        )


def _memory() -> int:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 40


def read_stream_split(source: str | Path, split: str) -> CaptionedImages:
    """One split of a stream, in memory.

    Args:
        source: A pattern, a folder of tar files, or one of `save_to_disk`.
        split: "train", "dev" or "test"; beside named shards it is searched in their folder.

    Returns:
        The images with their captions, sorted by name.

    Raises:
        DataError: There is no such split, it takes more than half of the memory, or no sample can be used.
    """
    path = Path(source)
    files: list[Path] = []
    if path.is_dir() and is_saved_dataset(path):
        rows = load_saved_dataset(path).get(split)
        samples = []
        if rows is not None:
            columns = SampleColumns.detect(rows.features, str(source))
            samples = [
                columns.to_sample(row, f"row {index}") for index, row in enumerate(columns.without_decoding(rows))
            ]
    else:
        named = is_pattern(path) and not path.is_dir()
        files = files_by_split(path).get(split, []) if not named or split == "train" else sibling_files(path, split)
        _check_total_size(path, files)
        samples = [sample for file in files for sample in read_shard(file)]
    if not samples:
        raise DataError(f"{source}: no split '{split}' beside the training split; give it with --dev_data DATA")
    data = _to_captioned_images(path, [(split, sample) for sample in samples], files)
    data.rows.sort(key=lambda row: row.name)
    return data


def _to_captioned_images(
    source: Path, samples: Sequence[tuple[str, Sample]], files: Sequence[Path], notes: Sequence[str] = ()
) -> CaptionedImages:
    """Samples as `CaptionedImages`: each a row, or a problem. Raises DataError where no row is left."""
    rows: list[CaptionedImage] = []
    problems: list[Problem] = []
    for split, raw in samples:
        sample = raw.for_split(split)
        if not sample.error and split not in SPLITS:
            sample = invalid_sample(sample.name, f"its split is called '{split}'; the splits are {', '.join(SPLITS)}")
        if sample.error:
            problems.append(Problem("bad sample", sample.name, sample.error, rows=1))
            continue
        # The sample is used, without a part of it.
        problems += [replace(problem, effect="mended" if problem.effect == "left out" else problem.effect)
                     for problem in sample.warnings]  # fmt: skip
        rows.append(
            CaptionedImage(sample.name, sample.image, sample.captions, split, sample.identity or None, sample.name, 1)
        )
    notes = [*notes, *(note for path in files for note in _unread_notes(path))]
    notes += _other_files_notes(source, files) if source.is_dir() else []
    if not rows:
        first = f"; the first of {len(problems)}: {problems[0]}" if problems else ""
        raise DataError(f"{source}: none of {len(samples):,} samples can be used{first}")
    return CaptionedImages(rows, source, "stream", problems=problems, rows_in_files=len(samples), notes=notes)


def _unread_notes(path: Path) -> list[str]:
    """The note on what is not read of a file: files of a shard that are of no sample, images of one that has another
    one, columns of Parquet."""
    if path.suffix == ".parquet":
        return parquet_columns(path).notes(path.name)
    with open_tar(path) as tar:
        index = index_shard(tar)
    groups = (
        (index.skipped_files, "files are of no sample by their names"),
        (index.unused_images, "images are not read, since their sample has another one"),
    )
    return [f"{path.name}: {len(names):,} {what}, such as {names[0]}" for names, what in groups if names]


def _other_files_notes(source: Path, read: Sequence[Path]) -> list[str]:
    """The note on the files of a stream's folder that are neither its shards nor written with them."""
    known_names = {path.name for path in read} | {SHARD_INDEX_FILE}
    others: Counter[str] = Counter()
    unlisted: dict[bytes, str] = {}
    first = ""
    for raw, _ in walk_files(source, unlisted):
        name = os.fsdecode(raw)
        if name in known_names or _SAVED_FILES.search(name) or any(map(name_exclusion_reason, Path(name).parts)):
            continue
        first = first or name
        others[Path(name).suffix.lower() or "no ending"] += 1
    kinds = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(5))
    notes = (
        [f"{others.total():,} files beside those of the stream are not read, such as {first}: {kinds}"] if first else []
    )
    return notes + [f"{os.fsdecode(raw)}: this folder cannot be listed: {reason}" for raw, reason in unlisted.items()]
