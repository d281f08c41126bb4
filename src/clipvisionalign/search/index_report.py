"""What an update of an index did: counts of files and rows, and the problems of its sources."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.images import ExcludedFiles
from clipvisionalign.search.broken_files import BrokenFiles
from clipvisionalign.search.collection import Collection
from clipvisionalign.search.diff import Changes
from clipvisionalign.search.metadata import Metadata
from clipvisionalign.search.storage import FileListing, decode_path, printable
from clipvisionalign.search.text_tower import TextTowerReport

logger = logging.getLogger(__name__)


@dataclass
class IndexReport:
    """Counts of an update. `files` is the sum of the counts from `encoded` to `broken`.

    Attributes:
        there: Rows of images in the index.
        files: Files of the listing.
        encoded: Files that were encoded.
        unchanged: Files whose rows were kept.
        moved: Files that were recognised by their content under another path.
        other_names: Other names of files that are counted already.
        dead_links: Links without a target.
        not_taken: Files that are not images.
        broken: Files that could not be read or decoded, and are listed.
        missing_decoders: How many of them need a package that is not installed, by format.
        dropped: Rows that were deleted.
        kept: Rows whose files exist and could not be read.
        captions: Rows of captions in the index.
        unlisted: Folders that could not be listed, with the reason.
        data_set: Rows of a data set's files, read and left out.
        metadata: Rows of the metadata table, how many match an image, and each that does not.
        camera: Images whose headers were read, by what cameras wrote there: values, none, or something damaged; and
            how many of these were filled in without being encoded.
        text_tower: What became of the text tower beside the index.
        patches: Of an index that keeps them: images with patches ("stored"), those among them that were indexed before
            ("added"), and images whose file cannot be read for them now ("unreadable").
    """

    there: int = 0
    files: int = 0
    encoded: int = 0
    unchanged: int = 0
    moved: int = 0
    other_names: int = 0
    dead_links: int = 0
    not_taken: ExcludedFiles = field(default_factory=ExcludedFiles)
    broken: int = 0
    missing_decoders: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    kept: int = 0
    captions: int = 0
    unlisted: dict[str, str] = field(default_factory=dict)
    data_set: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    camera: dict[str, int] = field(default_factory=dict)
    text_tower: TextTowerReport = field(default_factory=TextTowerReport)
    patches: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON.

        Returns:
            Its fields.
        """
        return asdict(self) | {"not_taken": self.not_taken.to_dict()}

    def summary(self) -> str:
        """How the files of the listing add up.

        Returns:
            One line.
        """
        parts = [(self.encoded, "encoded"), (self.unchanged, "unchanged"), (self.moved, "moved")]
        optional_counts = [
            (self.broken, "could not be read or decoded"), (self.other_names, "are other names of these"),
            (self.dead_links, "are links that lead nowhere"),
            (self.not_taken.total, "are not taken for images"),
        ]  # fmt: skip
        terms = [f"{count:,} {label}" for count, label in [*parts, *(each for each in optional_counts if each[0])]]
        return f"{self.files:,} files = {' + '.join(terms)}"


def new_report(listing: FileListing, changes: Changes) -> IndexReport:
    """The report of an update before anything is encoded.

    Args:
        listing: The files of the source.
        changes: Their difference from the index.

    Returns:
        A report with the counts of the listing.
    """
    return IndexReport(
        files=listing.total, unchanged=changes.unchanged, moved=changes.moved, other_names=len(listing.other_names),
        dead_links=len(listing.dead_links), not_taken=listing.not_taken,
        unlisted={decode_path(folder): reason for folder, reason in listing.unlisted.items()},
    )  # fmt: skip


def report_sources(report: IndexReport, collection: Collection, broken: BrokenFiles) -> None:
    """Add the rows of a data set and of a metadata table to a report.

    Args:
        report: The report; `data_set` and `metadata` are set where there are any.
        collection: The images, their data set and metadata.
        broken: Files that could not be read or decoded.
    """
    if collection.data is not None and collection.data.rows_in_files:
        report.data_set = _data_report(collection, collection.data, broken)
    if collection.metadata is not None and collection.metadata.rows:
        report.metadata = _metadata_report(collection.metadata)


def _data_report(collection: Collection, data: CaptionedImages, broken: BrokenFiles) -> dict[str, int]:
    """Rows of a data set's files; as in `check`, those of images that cannot be read or decoded are left out."""
    unread = sum(rows for raw, rows in collection.row_counts.items() if raw in broken)
    left_out = sum(problem.rows for problem in data.problems) + unread
    return {"rows": data.rows_in_files, "read": sum(row.row_count for row in data) - unread, "left_out": left_out}


def _metadata_report(metadata: Metadata) -> dict[str, Any]:
    left_out = [str(problem) for problem in metadata.left_out]
    return {"rows": metadata.rows, "matched": metadata.matched, "listed": len(left_out), "left_out": left_out}


def log_problems(collection: Collection) -> None:
    """Log folders that could not be listed, rows that are left out, and cells that are read otherwise than written.

    Args:
        collection: The images, their data set and metadata.
    """
    unlisted = collection.listing.unlisted
    log_first("cannot be listed", [f"{decode_path(folder)}: {reason}" for folder, reason in unlisted.items()])
    if collection.data is not None:
        left_out = [problem for problem in collection.data.problems if problem.effect == "left out"]
        log_first("data set", left_out)
    metadata = collection.metadata
    if metadata is None or not metadata.rows:
        return
    logger.info(
        f"metadata: {metadata.rows:,} rows = {metadata.matched:,} of an image + {len(metadata.left_out):,} left out"
    )
    for effect in ("left out", "mended", "warning"):
        log_first("metadata", [problem for problem in metadata.problems if problem.effect == effect])


def log_first(prefix: str, items: Sequence[Any], *, limit: int = 5) -> None:
    """Log the first of several items, a line for each, and the number of the others.

    Args:
        prefix: Of each line.
        items: What is logged.
        limit: Number of items that are logged.
    """
    for item in items[:limit]:
        logger.info(f"{prefix}: {printable(str(item))}")
    if len(items) > limit:
        logger.info(f"{prefix}: and {len(items) - limit:,} more")
