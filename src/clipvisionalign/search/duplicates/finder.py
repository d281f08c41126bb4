"""Duplicates of an index: candidates by vectors, verified by their pixels, grouped so that every two are alike.

1. Images of one content hash are the kind "bytes".
2. Contents whose vectors are near are candidates; their pixels decide whether they are of the kind "nearly".
3. Groups are complete-link: every two images of a group are of its kind, so that none chains through unlike images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipvisionalign.images import ImageError
from clipvisionalign.progress import progress
from clipvisionalign.search.duplicate_decisions import read_all
from clipvisionalign.search.duplicates.appearance import Appearance
from clipvisionalign.search.duplicates.cache import ComparisonCache, ImageQuality, pairs_key
from clipvisionalign.search.duplicates.complete_link import complete_link_groups, count_links_between
from clipvisionalign.search.duplicates.keepers import CHOSEN_REASON, Keepers
from clipvisionalign.search.duplicates.neighbours import (
    MAX_EXACT_IMAGES,
    NEAR_COSINE,
    VectorPairs,
    pair_cosines,
    similar_pairs,
)
from clipvisionalign.search.duplicates.quality import ImageFile, choose_best, measure_quality
from clipvisionalign.search.duplicates.report import DuplicateGroup, DuplicateKind, DuplicateReport
from clipvisionalign.search.duplicates.rows import IndexRows
from clipvisionalign.search.duplicates.verification import (
    NOT_VERIFIED,
    ImageReader,
    PairVerifier,
    change_since_indexed,
    index_reader,
    read_content,
)
from clipvisionalign.search.manifest import read_manifest
from clipvisionalign.search.storage import Storage, as_storage

#: What is measured of images, None for one that cannot be read.
Qualities = Sequence[ImageQuality | None]


def duplicate_report(
    index: str | Path | Storage,
    threshold: float | None = None,
    scenes: bool = False,
    show_progress: bool = True,
    keep: bool = True,
) -> DuplicateReport:
    """Group the images of an index that are duplicates.

    Nothing is written but what was compared, into the folder `duplicates` of the index.

    Args:
        index: Path, URL or storage of an index.
        threshold: Cosine from which two images are compared by their pixels, and of one scene; None for those that are
            alike most (`similar_pairs`), and `NEAR_COSINE` for scenes.
        scenes: Whether images that are alike by their vectors alone are grouped as well, as the kind "scene".
        show_progress: Whether progress is shown on standard error.
        keep: Whether what was compared is kept beside the index; else nothing at all is written.

    Returns:
        The groups, with what was compared.

    Raises:
        ValueError: The threshold is not a cosine.
        InvalidIndexError: There is no index, or its decisions cannot be read.
    """
    storage = as_storage(index)
    manifest = read_manifest(index)
    rows = IndexRows.read(storage)
    images = Storage(manifest.folder)
    cache = ComparisonCache(storage) if keep else None
    decisions, keepers = read_all(storage)
    finder = DuplicateFinder(
        rows, images, cache, manifest.aligner, threshold, show_progress=show_progress, keepers=Keepers(keepers)
    )
    return finder.report({each.hashes for each in decisions}, scenes)


@dataclass
class DuplicateFinder:
    """Finds the duplicates among the rows of an index.

    Attributes:
        rows: The rows.
        images: Where the images are.
        cache: What was compared before; None for none.
        aligner: Fingerprint of the model.
        threshold: Cosine from which two images are compared by their pixels, and of one scene; None as for
            `duplicate_report`.
        reader: Reads a content by its position among `contents`; None for files of `images`.
        show_progress: Whether progress is shown on standard error.
        exact_up_to: Number of contents up to which the vectors of all pairs are compared.
        keepers: Images that a person has chosen to keep.

    Raises:
        ValueError: The threshold is not a cosine above 0.
    """

    rows: IndexRows
    images: Storage
    cache: ComparisonCache | None = None
    aligner: str = ""
    threshold: float | None = None
    reader: ImageReader | None = None
    show_progress: bool = True
    exact_up_to: int = MAX_EXACT_IMAGES
    keepers: Keepers = field(default_factory=Keepers)
    _changed: dict[int, str] = field(default_factory=dict, init=False)
    _seconds: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"{self.threshold}: the cosine from which images are compared is above 0 and at most 1")

    def report(self, decided: set[tuple[str, str]], scenes: bool = False) -> DuplicateReport:
        """Find the groups.

        Args:
            decided: Content hashes of pairs that are no duplicates, the smaller first.
            scenes: Whether images that are alike by their vectors alone are grouped as well.

        Returns:
            The report.
        """
        all_hashes = np.array(self.rows.columns["hash"].to_pylist(), dtype=str)
        hashes, content_of = np.unique(all_hashes, return_inverse=True)
        with self._timed("bytes"):
            groups, kept_rows = self._byte_groups(content_of.reshape(-1), len(hashes))
        with self._timed("vectors"):
            vectors = self.rows.vectors[kept_rows]
            near = self.candidate_pairs(hashes, vectors)
        with self._timed("pixels"):
            grouping = _Grouping(self, hashes.tolist(), kept_rows, vectors, near, decided)
            nearly = grouping.nearly()
        groups += nearly
        if scenes:
            with self._timed("scenes"):
                groups += grouping.scenes()
        grouping.close()
        failures = {self.rows.value("path", row): reason for row, reason in self._changed.items()}
        failures |= {
            self.rows.value("path", int(kept_rows[content])): reason for content, reason in grouping.failures.items()
        }
        return DuplicateReport(
            groups,
            len(all_hashes),
            grouping.counts,
            sorted(failures.items()),
            near.full,
            grouping.decoded,
            self._seconds,
            near.threshold,
        )

    @property
    def scene_threshold(self) -> float:
        """Cosine from which two images are of one scene."""
        return NEAR_COSINE if self.threshold is None else self.threshold

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - start

    def _byte_groups(self, content_of: np.ndarray, count: int) -> tuple[list[DuplicateGroup], np.ndarray]:
        """Groups of the kind "bytes", and the row that stands for each content."""
        order = np.argsort(content_of, kind="stable")
        starts = np.searchsorted(content_of[order], np.arange(count + 1))
        kept_rows = order[starts[:-1]].copy()
        groups = []
        several = np.flatnonzero(np.diff(starts) > 1).tolist()
        for content in progress(several, "comparing equal files", len(several), self.show_progress):
            there = [row for row in order[starts[content] : starts[content + 1]].tolist() if self.is_there(row)]
            if there:
                kept_rows[content] = there[0]
            if len(there) > 1:
                group, best = self.group("bytes", there, lambda images: [None] * len(images))
                groups.append(group)
                kept_rows[content] = there[best]
        return _largest_first(groups), kept_rows

    def is_there(self, row: int) -> bool:
        """Whether the file of a row is as it was indexed; one that is not is named in the report.

        Args:
            row: Position of the row.

        Returns:
            Whether it is.
        """
        values = [self.rows.value(name, row) for name in ("raw", "size", "mtime_ns", "hash")]
        reason = "" if self.reader else change_since_indexed(self.images, *values)
        if reason:
            self._changed[row] = reason
        return not reason

    def group(
        self, kind: DuplicateKind, rows: Sequence[int], measure: Callable[[Sequence[ImageFile]], Qualities]
    ) -> tuple[DuplicateGroup, int]:
        """Make a group of some rows.

        Args:
            kind: Its kind.
            rows: Their positions.
            measure: Measures images, see `choose_best`.

        Returns:
            The group, the image to keep first, and the position of that one among the rows.
        """
        images = [self.rows.image(row) for row in rows]
        images, chosen = self.keepers.mark(images)
        best, reason = (chosen, CHOSEN_REASON) if chosen is not None else choose_best(images, measure)
        others = sorted((each for each in range(len(rows)) if each != best), key=lambda each: images[each].path)
        order = [best, *others]
        vectors = self.rows.vectors[[rows[each] for each in order]]
        cosines = [1.0 if kind == "bytes" else float(each) for each in vectors @ vectors[0]]
        return DuplicateGroup(kind, [images[each] for each in order], [1.0, *cosines[1:]], reason), best

    def candidate_pairs(self, hashes: np.ndarray, vectors: np.ndarray) -> VectorPairs:
        """Pairs of contents whose vectors are near, of a large index from the cache.

        Args:
            hashes: Of the contents, in order.
            vectors: Of the contents, (N, D).

        Returns:
            The pairs.
        """
        key = pairs_key(hashes, self.aligner, self.threshold)
        is_large = len(hashes) > self.exact_up_to
        if self.cache is not None and is_large and (former := self.cache.read_pairs(key)) is not None:
            return former
        near = similar_pairs(vectors, self.threshold, exact_up_to=self.exact_up_to, show_progress=self.show_progress)
        if self.cache is not None and is_large:
            self.cache.write_pairs(key, near)
        return near


class _Grouping:
    """Groups of contents whose vectors are near, by their pixels or by the vectors alone."""

    def __init__(
        self, finder: DuplicateFinder, hashes: list[str], kept_rows: np.ndarray, vectors: np.ndarray, near: VectorPairs,
        decided: set[tuple[str, str]],
    ) -> None:  # fmt: skip
        self.finder, self.hashes, self.kept_rows, self.vectors = finder, hashes, kept_rows, vectors
        self.near, self.decided = near, decided
        reader = finder.reader or index_reader(
            finder.images, lambda each: finder.rows.value("raw", int(kept_rows[each])), hashes
        )
        self.verifier = PairVerifier(hashes, reader, finder.cache, finder.show_progress)
        self.qualities = {} if finder.cache is None else finder.cache.read_qualities()
        self.measured = 0
        self.counts: dict[str, int] = {}
        self.members: dict[int, int] = {}

    @property
    def failures(self) -> dict[int, str]:
        return self.verifier.failures

    @property
    def decoded(self) -> int:
        return self.verifier.decoded + self.measured

    def nearly(self) -> list[DuplicateGroup]:
        """Groups of the kind "nearly"; also counts the pairs."""
        verdicts = self._without_changed(self.verifier(self.near.pairs))
        is_decided = self._is_decided(self.near.pairs)
        nearly = (verdicts == Appearance.NEARLY) & ~is_decided
        links, cosines = self.near.pairs[nearly], self.near.cosines[nearly]
        groups = complete_link_groups(links, cosines, self._is_nearly)
        self.verifier.save()
        self.counts = {
            "candidates": len(verdicts),
            "nearly": int((verdicts == Appearance.NEARLY).sum()),
            "mirrored": int((verdicts == Appearance.MIRRORED).sum()),
            "different": int((verdicts == Appearance.DIFFERENT).sum()),
            "not_verified": int((verdicts == NOT_VERIFIED).sum()),
            "decided": int(is_decided.sum()),
            "between_groups": count_links_between(links, groups),
        }
        results = []
        for group in progress(groups, "choosing the best", len(groups), self.finder.show_progress):
            duplicates, best = self._group("nearly", group)
            results.append(duplicates)
            # The best of a group stands for it among the scenes.
            self.members.update(dict.fromkeys(group, group[best]))
        if self.measured and self.finder.cache is not None:
            self.finder.cache.write_qualities(self.finder.cache.read_qualities() | self.qualities)
        return _largest_first(results)

    def _without_changed(self, verdicts: np.ndarray) -> np.ndarray:
        """Verdicts, of which those are not verified that were kept of files which have changed since or are gone."""
        pairs = self.near.pairs[verdicts == Appearance.NEARLY]
        contents = [content for content in np.unique(pairs).tolist() if content not in self.failures]
        examined = progress(contents, "looking for changed files", len(contents), self.finder.show_progress)
        changed = [content for content in examined if not self.finder.is_there(int(self.kept_rows[content]))]
        return np.where(np.isin(self.near.pairs, changed).any(axis=1), NOT_VERIFIED, verdicts)

    def scenes(self) -> list[DuplicateGroup]:
        """Groups of the kind "scene", of images that are alone or stand for a group."""
        pairs = np.array([[self.members.get(each, each) for each in pair] for pair in self.near.pairs.tolist()])
        pairs = np.unique(np.sort(pairs.astype(np.int64).reshape(-1, 2), axis=1), axis=0)
        pairs = pairs[(pairs[:, 0] != pairs[:, 1]) & ~self._is_decided(pairs)]
        cosines = pair_cosines(self.vectors, *pairs.T)
        alike = cosines >= self.finder.scene_threshold
        pairs, cosines = pairs[alike], cosines[alike]
        groups = complete_link_groups(pairs, cosines, self._is_scene)
        shown = progress(groups, "choosing the best", len(groups), self.finder.show_progress)
        return _largest_first([self._group("scene", group)[0] for group in shown])

    def close(self) -> None:
        """Remove what was kept for the comparison."""
        self.verifier.close()

    def _group(self, kind: DuplicateKind, contents: Sequence[int]) -> tuple[DuplicateGroup, int]:
        rows = [int(self.kept_rows[content]) for content in contents]
        return self.finder.group(kind, rows, self._measure)

    def _is_nearly(self, pairs: np.ndarray) -> np.ndarray:
        return (self.verifier(pairs) == Appearance.NEARLY) & ~self._is_decided(pairs)

    def _is_scene(self, pairs: np.ndarray) -> np.ndarray:
        return (pair_cosines(self.vectors, *pairs.T) >= self.finder.scene_threshold) & ~self._is_decided(pairs)

    def _is_decided(self, pairs: np.ndarray) -> np.ndarray:
        if not self.decided:
            return np.zeros(len(pairs), dtype=bool)
        names = ((self.hashes[first], self.hashes[second]) for first, second in pairs.tolist())
        return np.array([(min(pair), max(pair)) in self.decided for pair in names], dtype=bool)

    def _measure(self, images: Sequence[ImageFile]) -> list[ImageQuality | None]:
        """Sharpness and format of images, each measured once."""
        for image in images:
            if image.hash in self.qualities:
                continue
            with suppress(ImageError):
                self.qualities[image.hash] = measure_quality(read_content(self.finder.images, image.raw, image.hash))
                self.measured += 1
        return [self.qualities.get(image.hash) for image in images]


def _largest_first(groups: Sequence[DuplicateGroup]) -> list[DuplicateGroup]:
    return sorted(groups, key=lambda group: (-len(group.images), group.images[0].path))
