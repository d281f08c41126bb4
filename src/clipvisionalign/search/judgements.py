"""Queries judged by hand, of which all relevant images are known: an index calibrated on its own collection."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.data.text_files import decode, split_lines
from clipvisionalign.search.calibrate import calibrate_judged
from clipvisionalign.search.calibration import Calibration
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.tables import vector_column
from clipvisionalign.search.terms import parse_term

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """A query with all images of an index that are relevant to it.

    Attributes:
        query: Its terms, as they are typed.
        relevant: Numbers or paths of the images; none where nothing fits.
        line: Where it stands, for messages; "" for nowhere.
        time: When the search page stored it, ISO 8601; "" for one that was written by hand.
        withdrawn: Whether it only takes a former judgement of its query back.
        contents: Of one that the search page stored, the hash of each relevant image, by which a moved one is
            recognised; none of earlier ones, which name images by their paths alone.
    """

    query: tuple[str, ...]
    relevant: tuple[int | str, ...]
    line: str = ""
    time: str = ""
    withdrawn: bool = False
    contents: tuple[str, ...] = ()


def read_judgements(file: str | Path) -> list[Judgement]:
    """Read judged queries from a file of JSON lines.

    Each is an object: "query", one term or a list of terms, and "relevant", a list of the numbers or paths of ALL
    relevant images of the index. Of those that the search page stored, which have a "time", the last of a query counts.
    A file that is not UTF-8 is read as `data/text_files.py` reads texts, with a note.

    Args:
        file: The file.

    Returns:
        The judgements, in the order of the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line cannot be read; the message names it.
    """
    content = decode(Path(file).read_bytes())
    if content.repair:
        logger.info(f"note: {file}, line {content.line}: {content.repair}")
    judgements = parse_judgements(content.text, str(file))
    if not judgements:
        raise ValueError(f"{file}: no judged query in it")
    return judgements


def parse_judgements(text: str, file: str = "") -> list[Judgement]:
    """The judgements of a text of JSON lines, without those that a later one of the search page replaces.

    Lines that were written by hand are replaced as well.

    Args:
        text: The text.
        file: Its file, for messages.

    Returns:
        The judgements, in order.

    Raises:
        ValueError: A line cannot be read; the message names it.

    >>> lines = ['{"query": "a dog", "relevant": [3], "time": "1"}', '{"query": "a dog", "relevant": [4], "time": "2"}']
    >>> [judgement.relevant for judgement in parse_judgements("\\n".join(lines))]
    [(4,)]
    """
    judgements = []
    for number, line_text in enumerate(split_lines(text), 1):
        if not line_text.strip():
            continue
        line = f"{file}, line {number}"
        try:
            fields = json.loads(line_text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{line}: no JSON: {error}") from None
        judgements.append(parse_judgement(fields, line))
    last_stored = {each.query: position for position, each in enumerate(judgements) if each.time}
    return [
        each
        for position, each in enumerate(judgements)
        if position >= last_stored.get(each.query, -1) and not each.withdrawn
    ]


def parse_judgement(fields: Any, line: str = "") -> Judgement:
    """A judgement by its fields.

    Args:
        fields: A dictionary with "query" and "relevant"; with a "time" too, "relevant" may be None, which takes the
            former judgement back.
        line: Where it stands.

    Returns:
        The judgement.

    Raises:
        ValueError: A field is missing or of another type.

    >>> parse_judgement({"query": "a dog", "relevant": [3, "a/b.jpg"]})
    Judgement(query=('a dog',), relevant=(3, 'a/b.jpg'), line='', time='', withdrawn=False, contents=())
    """
    before = f"{line}: " if line else ""
    if not isinstance(fields, dict) or not {"query", "relevant"} <= set(fields):
        raise ValueError(
            f'{before}a judged query has "query" and "relevant", such as {{"query": "a dog", "relevant": [3]}}'
        )
    query = [fields["query"]] if isinstance(fields["query"], str) else fields["query"]
    relevant, time = fields["relevant"], fields.get("time", "")
    if not isinstance(time, str):
        raise ValueError(f'{before}"time" is a text, such as "2024-05-01T12:30:00+00:00"')
    withdrawn = bool(time) and relevant is None
    relevant = [] if withdrawn else relevant
    if not isinstance(query, list) or not query or not all(isinstance(term, str) for term in query):
        raise ValueError(f'{before}"query" is a text or a list of texts')
    if not isinstance(relevant, list) or not all(type(each) in (int, str) for each in relevant):
        raise ValueError(f'{before}"relevant" is a list of numbers or paths of images, empty where nothing fits')
    contents = fields.get("contents", []) if time else []
    if not isinstance(contents, list) or (contents and len(contents) != len(relevant)):
        raise ValueError(f'{before}"contents" has the hash of each relevant image')
    return Judgement(tuple(query), tuple(dict.fromkeys(relevant)), line, time, withdrawn, tuple(map(str, contents)))


def calibrate_index(searcher: Searcher, judgements: Sequence[Judgement], judged: str = "judged queries") -> Calibration:
    """Calibrate an index on judged queries: the mean share of a query's relevant images is promised.

    The unit is a query with all that is relevant to it, and not a hit that was confirmed: what a search missed is known
    only where it was looked for. Images that were in the index when the search page stored a judgement, and are gone,
    are left out, with a note.

    Args:
        searcher: The open index.
        judgements: The queries.
        judged: Where they are from.

    Returns:
        The calibration.

    Raises:
        UncalibratedError: Fewer than 50 queries have a relevant image.
        ValueError: A query cannot be read, one is judged twice, or the index has no such image.
    """
    duplicates = {each.query for each in judgements if sum(other.query == each.query for other in judgements) > 1}
    if duplicates:
        raise ValueError(f"'{' + '.join(min(duplicates))}' is judged more than once: a query counts once")
    rows = searcher.table.read(["id", "path", "hash", "vector"])
    position_of: dict[int | str, int] = {}
    for position, (image_id, path) in enumerate(zip(rows["id"].to_pylist(), rows["path"].to_pylist(), strict=True)):
        position_of[image_id] = position_of[path] = position
    contents = dict(zip(rows["path"].to_pylist(), rows["hash"].to_pylist(), strict=True))
    path_of = {content: path for path, content in contents.items()}
    judgements = [_by_content(judgement, contents, path_of) for judgement in judgements]
    gone = [
        each for judgement in judgements if judgement.time for each in judgement.relevant if each not in position_of
    ]
    if gone:
        logger.info(f"note: {_gone_note(gone)}")
    relevant = [_positions(position_of, judgement) for judgement in judgements]
    images = vector_column(rows)
    vectors = [searcher.encode([parse_term(term) for term in judgement.query]) for judgement in judgements]
    return calibrate_judged(
        images, vectors, [list(dict.fromkeys(each)) for each in relevant], searcher.manifest.aligner, judged
    )  # fmt: skip


def _by_content(judgement: Judgement, contents: Mapping[str, str], path_of: Mapping[str, str]) -> Judgement:
    """A judgement with the paths that its images have now, by the hash of each path of the index and a path of each."""
    if len(judgement.contents) != len(judgement.relevant):
        return judgement
    relevant = [
        former if contents.get(str(former)) == content else path_of.get(content, f"{former} (as it was judged)")
        for former, content in zip(judgement.relevant, judgement.contents, strict=True)
    ]
    return replace(judgement, relevant=tuple(dict.fromkeys(relevant)))


def _positions(position_of: dict[int | str, int], judgement: Judgement) -> list[int]:
    """Rows of the relevant images of a judgement; what the search page stored may be gone since."""
    if not judgement.time and (unknown := [each for each in judgement.relevant if each not in position_of]):
        line = f"{judgement.line}: " if judgement.line else ""
        raise ValueError(f"{line}the index has no image {unknown[0]!r}; give its number or its path below the folder")
    return [position_of[each] for each in judgement.relevant if each in position_of]


def _gone_note(gone: Sequence[int | str]) -> str:
    more = ", ..." if len(gone) > 3 else ""
    names = ", ".join(map(str, gone[:3]))
    return (
        f"{count_noun(len(gone), 'image')} of judged queries are no longer in the index and are left out: {names}{more}"
    )
