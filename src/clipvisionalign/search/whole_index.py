"""A query over all images of an index by pair scores of the late interaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from clipvisionalign.counts import count_noun
from clipvisionalign.search.filters import FILTER_COLUMNS, filter_sql
from clipvisionalign.search.hits import HIT_COLUMNS, Hit, to_hits
from clipvisionalign.search.late import late_query
from clipvisionalign.search.queries import EncodedQuery, SearchQuery

if TYPE_CHECKING:
    from clipvisionalign.search.encoder import QueryEncoder
    from clipvisionalign.search.metadata import ColumnType


def asked_where(query: SearchQuery, metadata: Mapping[str, ColumnType]) -> str:
    """The filter of a query in SQL.

    Args:
        query: The query.
        metadata: The metadata columns of the index.

    Returns:
        The condition, "" for none.

    Raises:
        FilterError: The filter cannot be parsed, or names a column that is not there.
    """
    return filter_sql(query.where, FILTER_COLUMNS | dict(metadata)) if query.where.strip() else ""


def rank_whole_index(
    encoder: QueryEncoder, reader: Any, query: SearchQuery, encoded: EncodedQuery, where: str,
    metadata: Mapping[str, ColumnType],
) -> tuple[list[Hit], str]:  # fmt: skip
    """The images of the greatest pair scores among all of an index.

    Args:
        encoder: That of the index.
        reader: The index's, not in shards.
        query: The query.
        encoded: The same, encoded, its terms as pair scores take them.
        where: Its filter in SQL.
        metadata: The metadata columns of the index.

    Returns:
        The hits, best first, each with its pair score; and a note on images that could not be among them, "" where
        there are none.

    Raises:
        ValueError: The index is in shards, or the model's pair scores are not of its late interaction alone.
        InvalidIndexError: The index has no files for it.
    """
    late_reader = getattr(reader, "late", None)
    if late_reader is None:
        raise ValueError("an index in shards is not ranked as a whole by late interaction: leave late out")
    asked = late_query(encoder, encoded.captions, [term.weight for term in query.terms])
    if asked is None:
        raise ValueError(
            f"a whole index is ranked by the design late; this model's is {encoder.design}: --rerank orders the first "
            "hits by its pair scores"
        )
    ids, scores, others = late_reader.nearest(asked, query.count, where)
    columns = dict.fromkeys(("vector", *HIT_COLUMNS, *metadata))
    rows = {row["id"]: row for row in reader.table.rows(ids, list(columns))} if ids else {}
    # A row may be gone since the files were read.
    ranked = [(rows[number], score) for number, score in zip(ids, scores, strict=True) if number in rows]
    for row, _ in ranked:
        row["_distance"] = 1.0 - float(np.asarray(row["vector"], dtype=np.float32) @ encoded.vector)
    hits = [
        replace(hit, pair_score=round(score, 5))
        for hit, (_, score) in zip(to_hits([row for row, _ in ranked], metadata), ranked, strict=True)
    ]
    note = ""
    if others:
        note = (
            f"{count_noun(others, 'image')} of the index cannot be ranked by late interaction: without patches, or "
            "newer than its files, which 'clipvisionalign index' brings up to date"
        )
    return hits, note
