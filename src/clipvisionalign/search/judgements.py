"""Queries judged by hand, of which all relevant images are known: an index calibrated on its own collection."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.search.calibrate import calibrate_judged
from clipvisionalign.search.calibration import Calibration
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.tables import vector_column
from clipvisionalign.search.terms import parse_term


@dataclass(frozen=True)
class Judgement:
    """A query with all images of an index that are relevant to it.

    Attributes:
        query: Its terms, as they are typed.
        relevant: Numbers or paths of the images; none where nothing fits.
        line: Where it stands, for messages; "" for nowhere.
    """

    query: tuple[str, ...]
    relevant: tuple[int | str, ...]
    line: str = ""


def read_judgements(file: str | Path) -> list[Judgement]:
    """Read judged queries from a file of JSON lines.

    Each is an object: "query", one term or a list of terms, and "relevant", a list of the numbers or paths of ALL
    relevant images of the index.

    Args:
        file: The file.

    Returns:
        The judgements, in the order of the file.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line cannot be read; the message names it.
    """
    judgements = []
    for number, text in enumerate(Path(file).read_text(encoding="utf-8-sig").split("\n"), 1):
        if not text.strip():
            continue
        line = f"{file}, line {number}"
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{line}: no JSON: {error}") from None
        judgements.append(parse_judgement(fields, line))
    if not judgements:
        raise ValueError(f"{file}: no judged query in it")
    return judgements


def parse_judgement(fields: Any, line: str = "") -> Judgement:
    """A judgement by its fields.

    Args:
        fields: A dictionary with "query" and "relevant".
        line: Where it stands.

    Returns:
        The judgement.

    Raises:
        ValueError: A field is missing or of another type.

    >>> parse_judgement({"query": "a dog", "relevant": [3, "a/b.jpg"]})
    Judgement(query=('a dog',), relevant=(3, 'a/b.jpg'), line='')
    """
    before = f"{line}: " if line else ""
    if not isinstance(fields, dict) or not {"query", "relevant"} <= set(fields):
        raise ValueError(
            f'{before}a judged query has "query" and "relevant", such as {{"query": "a dog", "relevant": [3]}}'
        )
    query = [fields["query"]] if isinstance(fields["query"], str) else fields["query"]
    relevant = fields["relevant"]
    if not isinstance(query, list) or not query or not all(isinstance(term, str) for term in query):
        raise ValueError(f'{before}"query" is a text or a list of texts')
    if not isinstance(relevant, list) or not all(type(each) in (int, str) for each in relevant):
        raise ValueError(f'{before}"relevant" is a list of numbers or paths of images, empty where nothing fits')
    return Judgement(tuple(query), tuple(dict.fromkeys(relevant)), line)


def calibrate_index(searcher: Searcher, judgements: Sequence[Judgement], judged: str = "judged queries") -> Calibration:
    """Calibrate an index on judged queries: the mean share of a query's relevant images is promised.

    The unit is a query with all that is relevant to it, and not a hit that was confirmed: what a search missed is known
    only where it was looked for.

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
    rows = searcher.table.read(["id", "path", "vector"])
    position_of: dict[int | str, int] = {}
    for position, (image_id, path) in enumerate(zip(rows["id"].to_pylist(), rows["path"].to_pylist(), strict=True)):
        position_of[image_id] = position_of[path] = position
    relevant = [[_position(position_of, each, judgement) for each in judgement.relevant] for judgement in judgements]
    images = vector_column(rows)
    vectors = [searcher.encode([parse_term(term) for term in judgement.query]) for judgement in judgements]
    return calibrate_judged(
        images, vectors, [list(dict.fromkeys(each)) for each in relevant], searcher.manifest.aligner, judged
    )  # fmt: skip


def _position(position_of: dict[int | str, int], image: int | str, judgement: Judgement) -> int:
    if image not in position_of:
        line = f"{judgement.line}: " if judgement.line else ""
        raise ValueError(f"{line}the index has no image {image!r}; give its number or its path below the folder")
    return position_of[image]
