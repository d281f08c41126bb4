"""Duplicates of an index that is served: grouped in a thread of its own, and kept as long as they hold."""

import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clipvisionalign.progress import ProgressStep, progress_listener
from clipvisionalign.search.duplicate_decisions import read_all
from clipvisionalign.search.duplicates import DuplicateGroup, DuplicateReport, duplicate_report
from clipvisionalign.search.duplicates.quality import ImageFile
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.storage import as_storage

#: Reports that are kept while their groups are looked through: decisions of others make new ones meanwhile.
MAX_REPORTS = 4


class ReportGoneError(LookupError):
    """A report is no longer kept, or its index has changed since."""


@dataclass(frozen=True)
class KeptReport:
    """A report, as long as it can be asked for.

    Attributes:
        name: By which it is asked for.
        report: The report.
        version: Of the table that it is of.
        has_scenes: Whether it has groups of the kind "scene".
    """

    name: str
    report: DuplicateReport
    version: int
    has_scenes: bool

    @property
    def groups(self) -> Sequence[DuplicateGroup]:
        """Its groups."""
        return self.report.groups

    @cached_property
    def not_kept(self) -> Sequence[ImageFile]:
        """Images that need not be kept."""
        return self.report.not_kept()


@dataclass(frozen=True)
class JobProgress:
    """How far the thread is.

    Attributes:
        step: What is done, such as "decoding images to compare"; "" if that is not known.
        done: How many are.
        total: Of how many; None if unknown.
        seconds: Since the thread began.
    """

    step: str
    done: int
    total: int | None
    seconds: float


class StoppedError(Exception):
    """The service ends."""


class DuplicateJob:
    """The groups of one index. Grouping may take minutes: whoever asks meanwhile is told how far it is.

    Args:
        searcher: The open index.
        keep: Whether what was compared is kept beside the index.
    """

    def __init__(self, searcher: Searcher, keep: bool = True) -> None:
        self.searcher, self.keep = searcher, keep
        self._lock = threading.Lock()
        self._reports: OrderedDict[str, KeptReport] = OrderedDict()
        self._current: tuple[Any, str] | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._with_scenes = self._stopped = False
        self._progress = JobProgress("", 0, None, 0.0)
        self._started = 0.0

    @property
    def is_writable(self) -> bool:
        """Whether decisions can be stored: the index is a folder of this machine that may be written to."""
        storage = as_storage(self.searcher.index)
        return storage.is_local and os.access(storage.folder, os.W_OK)

    def current(self, scenes: bool) -> KeptReport | JobProgress:
        """The groups as the index and its decisions are now.

        Args:
            scenes: Whether the kind "scene" is needed.

        Returns:
            The report; while it is made, how far that is.

        Raises:
            Exception: What has ended the thread: the next call begins again.
        """
        key = (int(self.searcher.table.version), read_all(self.searcher.index))
        with self._lock:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self._thread is not None:
                return self._now()
            kept = self._reports.get(self._current[1]) if self._current and self._current[0] == key else None
            if kept is not None and (kept.has_scenes or not scenes):
                return kept
            self._with_scenes = self._with_scenes or scenes
            self._started, self._progress = time.monotonic(), JobProgress("", 0, None, 0.0)
            arguments = (key, self._with_scenes)
            self._thread = threading.Thread(target=self._work, args=arguments, name="duplicates", daemon=True)
            self._thread.start()
            return self._now()

    def kept(self, name: str, if_index_changed: bool = False) -> KeptReport:
        """A report whose groups are being looked through, also if decisions were made since.

        Args:
            name: Of the report.
            if_index_changed: Whether one of the index as it was before is wanted as well.

        Returns:
            The report.

        Raises:
            ReportGoneError: It is not kept, or of an index that has changed.
        """
        with self._lock:
            kept = self._reports.get(name)
            if kept is not None:
                self._reports.move_to_end(name)
        if kept is None or (kept.version != int(self.searcher.table.version) and not if_index_changed):
            raise ReportGoneError("the index has changed since these groups were made: load them again")
        return kept

    def close(self) -> None:
        """End the thread at its next step."""
        self._stopped = True

    def _now(self) -> JobProgress:
        latest = self._progress
        return JobProgress(latest.step, latest.done, latest.total, time.monotonic() - self._started)

    def _listen(self, step: ProgressStep) -> None:
        if self._stopped:
            raise StoppedError
        self._progress = JobProgress(step.description, step.done, step.total, 0.0)

    def _work(self, key: Any, scenes: bool) -> None:
        try:
            with progress_listener(self._listen):
                report = duplicate_report(self.searcher.index, scenes=scenes, show_progress=False, keep=self.keep)
        except Exception as error:
            with self._lock:
                self._thread, self._error = None, error
            return
        with self._lock:
            kept = KeptReport(secrets.token_hex(8), report, key[0], scenes)
            self._reports[kept.name] = kept
            while len(self._reports) > MAX_REPORTS:
                self._reports.popitem(last=False)
            self._thread, self._current = None, (key, kept.name)
