"""A stream, or one split of it, as `CaptionedImages` in memory."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipvisionalign.data.captioned import SPLITS, CaptionedImage, CaptionedImages, DataError, Problem
from clipvisionalign.data.streams.files import INDEX, files_beside, files_by_split, is_pattern, read_shard
from clipvisionalign.data.streams.huggingface import Columns, is_saved, open_saved
from clipvisionalign.data.streams.parquet import _parquet_columns
from clipvisionalign.data.streams.samples import Sample, bad_sample
from clipvisionalign.data.streams.webdataset import _opened, index_of
from clipvisionalign.images import files_below, not_for_images

#: What `datasets.save_to_disk` writes, below its folder.
_SAVED = re.compile(r"(^|/)([^/]*\.arrow|(dataset_info|state|dataset_dict)\.json)$")


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
