"""Faults of a data set, row by row.

The quick part opens each image as far as its header; the full part decodes every image and compares them across
splits (`image_fingerprints.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.data.captioned import SPLITS, CaptionedImage, CaptionedImages, Problem, normalize_caption
from clipvisionalign.data.image_fingerprints import ImageFingerprint, fingerprint_image, near_pairs
from clipvisionalign.data.split_file import write_splits_command
from clipvisionalign.data.splits import MIN_DEV_IMAGES, MIN_TRAIN_IMAGES
from clipvisionalign.images import ExcludedFiles, ImageError, image_files, open_header
from clipvisionalign.progress import progress


@dataclass
class CheckReport:
    """The faults of a data set, and how many images and captions can be used.

    Attributes:
        source: The data set.
        layout: Name of its layout.
        images: Images that can be used.
        captions: Their captions.
        splits: Such images by split.
        problems: The faults, what is left out first.
        equal_captions: By split, and for "all", what `count_shared_captions` counts.
        rows: Rows "in_files", "read" and "left_out", which add up; None where they are not known.
        notes: What was ignored that is no row.
        fingerprints: Of each image that can be used; empty where images were not decoded.
    """

    source: str
    layout: str
    images: int
    captions: int
    splits: dict[str, int]
    problems: list[Problem]
    equal_captions: dict[str, dict[str, int]] = field(default_factory=dict)
    rows: dict[str, int] | None = None
    notes: list[str] = field(default_factory=list)
    fingerprints: list[ImageFingerprint] = field(default_factory=list, repr=False)

    @property
    def usable(self) -> bool:
        """Whether nothing had to be left out."""
        return not any(problem.effect == "left out" for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it.

        Returns:
            Its fields but the fingerprints, "summary" (problems by kind) and "usable".
        """
        summary = dict(Counter(problem.kind for problem in self.problems))
        values = asdict(replace(self, fingerprints=[]))
        del values["fingerprints"]
        return {**values, "summary": summary, "usable": self.usable}


def check(data: CaptionedImages, full: bool = True, show_progress: bool = False) -> tuple[CaptionedImages, CheckReport]:
    """List the faults of a data set.

    Args:
        data: The data set.
        full: Whether every image is decoded and compared across splits; else only headers are read.
        show_progress: Whether a live line is shown on standard error.

    Returns:
        The data set without the images that cannot be used, and the report.
    """
    check_row: Callable[[CaptionedImage], Problem | ImageFingerprint | None] = (
        _decode_and_fingerprint if full else _check_header
    )
    results = _map_rows(check_row, data.rows, show_progress)
    problems = list(data.problems)
    problems += [result for result in results if isinstance(result, Problem)]
    usable_indices = [index for index, result in enumerate(results) if not isinstance(result, Problem)]
    rows = [data.rows[index] for index in usable_indices]
    fingerprints = [
        fingerprint for index in usable_indices if isinstance(fingerprint := results[index], ImageFingerprint)
    ]
    # A class is in every split; an image is of one class.
    problems += images_in_two_classes(rows, fingerprints) if data.class_names else identities_across_splits(rows)
    if full:
        problems += problems_across_splits(rows, fingerprints, show_progress)
    usable = replace(data, rows=rows, problems=problems)
    report = CheckReport(
        str(data.source), data.layout, len(rows), len(usable.captions), usable.split_sizes(), sorted_problems(problems),
        count_shared_captions(rows), _row_counts(data, rows, problems), data.notes, fingerprints,
    )  # fmt: skip
    return usable, report


def _row_counts(
    data: CaptionedImages, rows: Sequence[CaptionedImage], problems: Sequence[Problem]
) -> dict[str, int] | None:
    """Rows of the files: all of them, those of the images that are left, and those that problems leave out."""
    if not data.rows_in_files:
        return None
    read, left_out = sum(row.row_count for row in rows), sum(problem.rows for problem in problems)
    return {"in_files": data.rows_in_files, "read": read, "left_out": left_out}


def identities_across_splits(rows: Sequence[CaptionedImage]) -> list[Problem]:
    """Identities that are in two splits: images of them are measured that others were trained on.

    Args:
        rows: The images.

    Returns:
        A warning for each.
    """
    splits: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.identity is not None:
            splits.setdefault(row.identity, {}).setdefault(row.split, row.name)
    return [
        Problem(
            "identity in two splits", next(iter(names.values())),
            f"the identity '{identity}' is shown by " + ", ".join(f"{name} ({split})" for split, name in names.items()),
            "warning",
        )
        for identity, names in splits.items() if len(names) > 1
    ]  # fmt: skip


def images_in_two_classes(rows: Sequence[CaptionedImage], fingerprints: Sequence[ImageFingerprint]) -> list[Problem]:
    """List images whose bytes lie in two class folders.

    Args:
        rows: The images.
        fingerprints: What they are recognised by; empty where they were not decoded.

    Returns:
        A warning for each image after the first; none where images were not decoded.
    """
    first_by_digest: dict[str, CaptionedImage] = {}
    problems = []
    for row, fingerprint in zip(rows if fingerprints else (), fingerprints, strict=True):
        first = first_by_digest.setdefault(fingerprint.digest, row)
        if first.identity != row.identity:
            message = f"{first.name} is the same image: it is in the classes '{first.identity}' and '{row.identity}'"
            problems.append(Problem("image in two classes", row.name, message, "warning"))
    return problems


def empty_splits(data: CaptionedImages) -> list[Problem]:
    """Splits that have too few images to train or to measure, and how to get others.

    Args:
        data: The data set.

    Returns:
        One warning, or none.
    """
    sizes = data.split_sizes()
    least = {"train": MIN_TRAIN_IMAGES, "dev": MIN_DEV_IMAGES, "test": 1}
    missing = [split for split in SPLITS if sizes.get(split, 0) < least[split]]
    if not missing:
        return []
    sizes_text = ", ".join(f"{split} {sizes.get(split, 0):,}" for split in SPLITS)
    hint = (
        "its own splits are as they are"
        if data.official_splits
        else f"a hash decides, and left them so: {write_splits_command(data.source)} shares the images out"
    )
    message = (
        f"too few images in {' and '.join(missing)} ({sizes_text}): 'train' needs two images each in train and "
        f"dev; {hint}"
    )
    return [Problem("empty split", str(data.source), message, "warning")]


def count_shared_captions(rows: Sequence[CaptionedImage]) -> dict[str, dict[str, int]]:
    """Count captions that are equal, word by word, to one of another image (or identity).

    Args:
        rows: The images.

    Returns:
        By split, and for "all", the number of different "texts", of "captions" with such a text, and of their "images".
    """
    by_split: dict[str, dict[str, list[tuple[str, str]]]] = {"all": {}}
    for row in rows:
        owner = f"image {row.name}" if row.identity is None else f"identity {row.identity}"
        for caption in row.captions:
            text = normalize_caption(caption)
            for split in ("all", row.split):
                by_split.setdefault(split, {}).setdefault(text, []).append((owner, row.name))
    counts = {}
    for split, texts in by_split.items():
        shared = [several for several in texts.values() if len({owner for owner, _ in several}) > 1]
        images = {name for several in shared for _, name in several}
        counts[split] = {"texts": len(shared), "captions": sum(map(len, shared)), "images": len(images)}
    return counts


def sorted_problems(problems: Sequence[Problem]) -> list[Problem]:
    """Sort problems: what is left out first, then mended, then warnings; by kind within.

    Args:
        problems: The problems.

    Returns:
        A new list.
    """
    order = {"left out": 0, "mended": 1, "warning": 2}
    return sorted(problems, key=lambda problem: (order[problem.effect], problem.kind))


def _map_rows(
    check_row: Callable[[CaptionedImage], Problem | ImageFingerprint | None],
    rows: Sequence[CaptionedImage],
    show_progress: bool,
) -> list[Problem | ImageFingerprint | None]:
    """`check_row` at every row, on some threads, since Pillow decodes and disks read without holding Python's lock."""
    with ThreadPoolExecutor() as pool:
        return list(progress(pool.map(check_row, rows), "checking images", len(rows), show_progress))


def _check_header(row: CaptionedImage) -> Problem | None:
    try:
        open_header(row.image).close()
    except ImageError as error:
        return _unusable_problem(row, error)
    return None


def _decode_and_fingerprint(row: CaptionedImage) -> Problem | ImageFingerprint:
    try:
        return fingerprint_image(row.image)
    except ImageError as error:
        return _unusable_problem(row, error)


def _unusable_problem(row: CaptionedImage, error: ImageError) -> Problem:
    """An image that cannot be used, and with it the rows that it was read from."""
    return Problem(error.kind, row.location or row.name, str(error), rows=row.row_count)


def unused_files(data: CaptionedImages) -> list[str]:
    """The files below a data set's folder of which nothing is used.

    Args:
        data: The data set.

    Returns:
        Sentences on images that no row names, and on other files by ending; none for a single file or a stream.
    """
    if not data.source.is_dir() or data.layout == "stream":
        return []
    excluded = ExcludedFiles()
    used = {_file_id(row.image) for row in data if not isinstance(row.image, bytes)}
    unused = [path for path in image_files(data.source, excluded) if _file_id(path) not in used]
    lines = [f"other files: {line}" for line in excluded.lines()]
    if unused:
        first = unused[0].relative_to(data.source).as_posix()
        lines.insert(0, f"{count_noun(len(unused), 'image file')} of which no row is read, such as {first}")
    return lines


def _file_id(path: Path) -> tuple[int, int] | str:
    """The system's key of a file, the same under all of its names."""
    try:
        stat_result = path.stat()
    except (OSError, ValueError):
        return str(path)
    return (stat_result.st_dev, stat_result.st_ino) if stat_result.st_ino else str(path.resolve())


def problems_across_splits(
    rows: Sequence[CaptionedImage], fingerprints: Sequence[ImageFingerprint], show_progress: bool = False
) -> list[Problem]:
    """Equal or nearly equal images in two splits, which affect every measurement.

    Args:
        rows: The images.
        fingerprints: Of the same images.
        show_progress: Whether a live line is shown on standard error.

    Returns:
        A warning for each pair.
    """
    by_split: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_split.setdefault(row.split, []).append(index)
    splits = sorted(by_split, key=lambda split: len(by_split[split]))
    problems = []
    for position, small in enumerate(splits):
        for large in splits[position + 1 :]:
            pairs = near_pairs(
                [fingerprints[i] for i in by_split[small]], [fingerprints[i] for i in by_split[large]], show_progress
            )
            for i, j, same in pairs:
                first_row, second_row = rows[by_split[small][i]], rows[by_split[large][j]]
                kind = "same image in two splits" if same else "nearly the same image in two splits"
                message = f"{first_row.name} ({first_row.split}) and {second_row.name} ({second_row.split})"
                problems.append(Problem(kind, first_row.name, message, "warning"))
    return problems
