"""Queries that are judged on the search page: a file of the index to which judgements are appended, and nothing else.

A judgement of a query that is judged already has to name the one that it replaces, so that of two people who judge it
at once neither overwrites what the other has found. All of them stay in the file; the last of a query counts.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from clipvisionalign.data.text_files import decode
from clipvisionalign.search.calibration import CALIBRATION_FILE, units_needed
from clipvisionalign.search.judgements import Judgement, parse_judgements
from clipvisionalign.search.storage import as_storage
from clipvisionalign.search.terms import parse_term

if TYPE_CHECKING:
    from clipvisionalign.search.searcher import Searcher

#: The file of an index, and the lock that is held while it is written.
JUDGEMENTS_FILE, LOCK_FILE = "judgements.jsonl", "judgements.lock"
#: Judgements of the file at most, those that are replaced included.
MAX_JUDGEMENTS = 10_000
#: Promises that judged queries can be calibrated for.
JUDGED_LEVELS = (0.9, 0.95)
#: Seconds after which another process that writes is no longer waited for.
LOCK_SECONDS = 10.0


class JudgedMeanwhileError(ValueError):
    """A query that someone else has judged since its judgement was read.

    Args:
        message: For the user.
        current: The judgement that counts now; None where it was withdrawn.

    Attributes:
        current: Likewise.
    """

    def __init__(self, message: str, current: Judgement | None) -> None:
        super().__init__(message)
        self.current = current


class JudgementStore:
    """The judged queries of an index.

    Args:
        searcher: The open index.
    """

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher

    @property
    def is_writable(self) -> bool:
        """Whether judgements can be stored: in a folder of this machine that may be written to."""
        storage = as_storage(self.searcher.index)
        return storage.is_local and os.access(storage.folder, os.W_OK)

    def read(self) -> list[Judgement]:
        """The judgements that count.

        Returns:
            One for each judged query, in order of their times.

        Raises:
            ValueError: The file cannot be read: it is no UTF-8, or a line is no judgement.
        """
        return parse_judgements(self._text(), JUDGEMENTS_FILE)

    def _text(self) -> str:
        storage = as_storage(self.searcher.index)
        if not storage.is_local or not (storage.folder / JUDGEMENTS_FILE).is_file():
            return ""
        content = decode((storage.folder / JUDGEMENTS_FILE).read_bytes())
        if content.repair:
            # Appending to what was guessed would write the guess down.
            raise ValueError(f"{JUDGEMENTS_FILE}, line {content.line}: {content.repair}; save it as UTF-8")
        return content.text

    def add(
        self, query: Sequence[str], relevant: Sequence[str] | None, replaces: str = "", searched: Sequence[str] = ()
    ) -> Judgement:
        """Store a judgement.

        Args:
            query: The terms of the query, as they are typed.
            relevant: Paths of all images that hold what is meant; None takes the former judgement back.
            replaces: `time` of the judgement that it replaces; "" where the query is not judged yet.
            searched: Other words by which relevant images were looked for; they are kept beside it.

        Returns:
            The judgement.

        Raises:
            JudgedMeanwhileError: The query's judgement is another than the one that is to be replaced.
            ValueError: The query cannot be searched for, the index has no such image, or there are too many judgements.
            TimeoutError: Another process writes for too long.
            OSError: The file cannot be written.
        """
        terms = tuple(text.strip() for text in query)
        self.searcher.encode([parse_term(text) for text in terms])
        paths = None if relevant is None else list(dict.fromkeys(relevant))
        hashes = self._hashes(paths or ())
        storage = as_storage(self.searcher.index)
        with FileLock(storage.folder / LOCK_FILE, timeout=LOCK_SECONDS):
            text = self._text()
            current = next((each for each in parse_judgements(text, JUDGEMENTS_FILE) if each.query == terms), None)
            if (current.time if current else "") != replaces:
                raise JudgedMeanwhileError(f"'{' + '.join(terms)}' has been judged meanwhile", current)
            if text.count("\n") >= MAX_JUDGEMENTS:
                raise ValueError(
                    f"{JUDGEMENTS_FILE}: {MAX_JUDGEMENTS:,} lines at most; move it elsewhere to begin another"
                )
            time = datetime.now(UTC).isoformat(timespec="microseconds")
            fields: dict[str, Any] = {"query": list(terms), "relevant": paths, "time": time}
            fields |= {"contents": [hashes[path] for path in paths]} if paths else {}
            fields |= {"searched": list(searched)} if searched else {}
            before = text if not text or text.endswith("\n") else f"{text}\n"
            storage.write(JUDGEMENTS_FILE, f"{before}{json.dumps(fields, ensure_ascii=False)}\n")
        return Judgement(terms, tuple(paths or ()), time=time, withdrawn=paths is None)

    def _hashes(self, paths: Sequence[str]) -> dict[str, str]:
        """The content of images by their paths. Raises ValueError for one that the index does not have."""
        if not paths:
            return {}
        rows = self.searcher.table.read(("path", "hash"))
        hashes = dict(zip(rows["path"].to_pylist(), rows["hash"].to_pylist(), strict=True))
        if unknown := next((path for path in paths if path not in hashes), None):
            raise ValueError(f"the index has no image {unknown!r}")
        return hashes

    def summary(self) -> dict[str, Any]:
        """How far the index can be calibrated on its judged queries.

        Returns:
            "queries", the last first, each with "query", "relevant" and "time"; "judged" and "with_images", numbers of
            queries; "levels", each with "level" and "needed", the number of queries with an image; "command", which
            calibrates; and "calibrated_on" of the calibration that there is, "" for none.

        Raises:
            ValueError: The file cannot be read.
        """
        judgements = self.read()
        storage = as_storage(self.searcher.index)
        replaced = " --overwrite" if storage.read(CALIBRATION_FILE) is not None else ""
        index, file = shlex.quote(storage.location), shlex.quote(f"{storage.location}/{JUDGEMENTS_FILE}")
        return {
            "queries": [judgement_fields(each) for each in reversed(judgements)],
            "judged": len(judgements),
            "with_images": sum(bool(each.relevant) for each in judgements),
            "levels": [{"level": level, "needed": units_needed(level)} for level in JUDGED_LEVELS],
            "command": f"clipvisionalign calibrate {index} --judged {file}{replaced}",
            "calibrated_on": self.searcher.assessor.calibrated_on,
        }


def judgement_fields(judgement: Judgement) -> dict[str, Any]:
    """A judgement as JSON.

    Args:
        judgement: The judgement.

    Returns:
        "query", "relevant" and "time".
    """
    return {"query": list(judgement.query), "relevant": list(judgement.relevant), "time": judgement.time}
