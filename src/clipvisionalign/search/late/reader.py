"""Ranking a whole index by late interaction, with the rows of its tables as they are now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from clipvisionalign.search.late.files import LATE, RECORD_FILE, LateFiles
from clipvisionalign.search.late.ranking import LateQuery, rank_images, score_images
from clipvisionalign.search.storage import InvalidIndexError, Storage
from clipvisionalign.search.table_reader import TableReader
from clipvisionalign.search.tables import content_checksums


@dataclass
class _Snapshot:
    """The files, and the table of images at one version.

    Attributes:
        stamp: Identity of the record's file.
        version: Of the table.
        files: The files.
        alive: Which positions are images of the table, (N,).
        others: Images of the table that the files do not have.
    """

    stamp: tuple[int, int]
    version: int
    files: LateFiles
    alive: np.ndarray
    others: int


class LateReader:
    """The files of an index, in step with its table.

    Args:
        index: The storage of the index.
        table: Reads its images.
    """

    def __init__(self, index: Storage, table: TableReader) -> None:
        self.index, self.table = index, table
        self._snapshot: _Snapshot | None = None
        self._lock = Lock()

    @property
    def is_there(self) -> bool:
        """Whether the index has such files."""
        return LATE.read(self.index) is not None

    def nearest(self, query: LateQuery, count: int, where: str = "") -> tuple[list[int], list[float], int]:
        """The images of the greatest pair scores.

        Args:
            query: The query.
            count: Number of images at most.
            where: A condition in SQL, "" for none.

        Returns:
            Numbers of images, best first; their scores; and how many images of the index have no patches here.

        Raises:
            InvalidIndexError: The index has no such files.
        """
        snapshot = self._current_snapshot()
        allowed = snapshot.alive
        if where:
            ids = np.asarray(self.table.read(["id"], where)["id"].to_numpy(), dtype=np.int64)
            positions = snapshot.files.positions_of(ids)
            allowed = np.zeros(len(snapshot.alive), dtype=bool)
            allowed[positions[positions >= 0]] = True
            allowed &= snapshot.alive
        positions, scores = rank_images(snapshot.files, query, count, None if allowed.all() else allowed)
        return snapshot.files.ids[positions].tolist(), scores.tolist(), snapshot.others

    def scorer(self, ids: Sequence[int], query: LateQuery) -> Callable[[Sequence[int]], np.ndarray] | None:
        """What scores some images by their patches, without reading a table.

        Args:
            ids: Numbers of images.
            query: The query.

        Returns:
            From some of these numbers to their pair scores; None where the index has no such files, or they lack one of
            the images.
        """
        if LATE.stamp(self.index) is None:
            return None
        try:
            snapshot = self._current_snapshot()
        except InvalidIndexError:
            return None
        positions = snapshot.files.positions_of(np.asarray(ids, dtype=np.int64))
        if not len(positions) or (positions < 0).any() or not snapshot.alive[positions].all():
            return None
        position_of = dict(zip(ids, positions.tolist(), strict=True))
        return lambda some: score_images(
            snapshot.files, query, np.array([position_of[number] for number in some], dtype=np.int64)
        )

    def _current_snapshot(self) -> _Snapshot:
        stamp = LATE.stamp(self.index)
        if stamp is None:
            raise InvalidIndexError(
                f"{self.index}: has no centroids of patches: 'clipvisionalign index RUN FOLDER --out {self.index} "
                "--late' writes them, and encodes nothing again where patches are kept"
            )
        key = stamp, self.table.version
        with self._lock:
            snapshot = self._snapshot
            if snapshot is None or (snapshot.stamp, snapshot.version) != key:
                snapshot = self._snapshot = self._open(*key, former=snapshot)
            return snapshot

    def _open(self, stamp: tuple[int, int], version: int, former: _Snapshot | None) -> _Snapshot:
        files = former.files if former is not None and former.stamp == stamp else self._open_files()
        rows = self.table.read(["id", "hash"])
        ids = np.asarray(rows["id"].to_numpy(), dtype=np.int64)
        positions = files.positions_of(ids)
        same = positions >= 0
        same[same] = files.contents[positions[same]] == content_checksums(rows["hash"])[same]
        alive = np.zeros(len(files.ids), dtype=bool)
        alive[positions[same]] = True
        return _Snapshot(stamp, version, files, alive, int((~same).sum()))

    def _open_files(self) -> LateFiles:
        files = LATE.open(self.index, LateFiles)
        if files is None:
            raise InvalidIndexError(
                f"{self.index}/{RECORD_FILE}: it or files that it names are not whole: 'clipvisionalign index' writes "
                "them again"
            )
        return files
