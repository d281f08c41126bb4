"""What is wrong with a query, as far as it can be told without its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipvisionalign.data.run_data import run_settings
from clipvisionalign.images import open_image
from clipvisionalign.search.filters import FILTER_COLUMNS, filter_sql
from clipvisionalign.search.manifest import read_manifest
from clipvisionalign.search.tables import metadata_columns, open_caption_table, open_image_table
from clipvisionalign.search.terms import Term, combine_terms

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
        InvalidIndexError: no index there.
        FilterError: a filter that cannot be understood.
        ImageError: an image of the query cannot be opened.
        ValueError: nothing to look for, no captions in the index, or a design that cannot re-rank.
    """
    about = read_manifest(index)
    if count < 1:
        raise ValueError(f"at least 1 picture can be found, not {count}")
    # Any vectors serve: whether those of the model take each other away is not known yet.
    combine_terms(terms, np.eye(len(terms), dtype=np.float32))
    for term in terms:
        if term.is_image:
            open_image(term.content)
    if where.strip():
        filter_sql(where, FILTER_COLUMNS | metadata_columns(open_image_table(index)))
    if captions and open_caption_table(index) is None:
        raise ValueError("this index has no captions: 'clipvisionalign index RUN DATA --captions' writes them")
    if rerank:
        folder = run or about.run
        design = run_settings(folder).get("model", {}).get("design", "")
        if design in DUAL_DESIGNS:
            raise ValueError(f"{folder}: its design '{design}' has nothing to re-rank with")
        if any(term.is_image for term in terms):
            raise ValueError("re-ranking compares words with pictures: give words only")
