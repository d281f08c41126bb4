"""What is wrong with a query, as far as it can be told without its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipvisionalign.data.of_run import settings_of
from clipvisionalign.images import open_picture
from clipvisionalign.search.filters import filter_sql
from clipvisionalign.search.index import metadata_columns, open_captions, open_table, read_about
from clipvisionalign.search.query import FILTERS, Term, combined

#: Designs whose pairs have no score of their own.
DUAL_DESIGNS = ("self", "sparse")


def check_query(
    index: str | Path, terms: Sequence[Term], count: int = 10, where: str = "", rerank: int = 0, run: str | Path = "",
    *, captions: bool = False,
) -> None:  # fmt: skip
    """Check a query before a model is loaded.

    Args:
        index: folder or URL of an index.
        terms: of the query, those that are not wanted included.
        count: how many results are wanted.
        where: a filter, "" for none.
        rerank: how many first results are re-ranked.
        run: where the aligner is, if it was moved.
        captions: whether captions are searched for, and not images.

    Raises:
        BadIndex: no index there.
        FilterError: a filter that cannot be understood.
        PictureError: an image of the query cannot be opened.
        ValueError: nothing to look for, no captions in the index, or a design that cannot re-rank.
    """
    about = read_about(index)
    if count < 1:
        raise ValueError(f"at least 1 picture can be found, not {count}")
    # Any vectors serve: whether those of the model take each other away is not known yet.
    combined(terms, np.eye(len(terms), dtype=np.float32))
    for term in terms:
        if term.is_picture:
            open_picture(term.what)
    if where.strip():
        filter_sql(where, FILTERS | metadata_columns(open_table(index)))
    if captions and open_captions(index) is None:
        raise ValueError("this index has no captions: 'clipvisionalign index RUN DATA --captions' writes them")
    if rerank:
        folder = run or about.run
        design = settings_of(folder).get("model", {}).get("design", "")
        if design in DUAL_DESIGNS:
            raise ValueError(f"{folder}: its design '{design}' has nothing to re-rank with")
        if any(term.is_picture for term in terms):
            raise ValueError("re-ranking compares words with pictures: give words only")
