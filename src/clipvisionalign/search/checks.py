"""Checks of a query before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from clipvisionalign.models.run_names import resolve_run
from clipvisionalign.search.calibration_files import read_calibration
from clipvisionalign.search.filters import FILTER_COLUMNS, filter_sql
from clipvisionalign.search.manifest import read_whole_manifest
from clipvisionalign.search.promise import require_calibration
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.sharded_reader import open_index_reader
from clipvisionalign.search.storage import as_storage
from clipvisionalign.search.tables import metadata_columns
from clipvisionalign.search.text_tower import read_text_manifest

#: Designs whose pairs have no score of their own.
DUAL_DESIGNS = ("self", "sparse")


def check_query(index: str | Path, query: SearchQuery, run: str | Path = "") -> None:
    """Check a query before a model is loaded.

    Args:
        index: Path or URL of an index.
        query: The query.
        run: Where the aligner is, if it was moved.

    Raises:
        InvalidIndexError: There is no index.
        FilterError: The filter cannot be read.
        ImageError: An image of the query cannot be opened.
        UncalibratedError: A promise is asked for that the index is not calibrated for.
        ValueError: There is nothing to search for, the index has no captions, or the design cannot re-rank.
    """
    manifest = read_whole_manifest(index)
    query.check()
    images = [term.content for term in query.terms if term.is_image]
    if images:
        from clipvisionalign.images import open_image

        for image in images:
            open_image(image)
    if query.where.strip():
        filter_sql(query.where, FILTER_COLUMNS | metadata_columns(open_index_reader(index).table))
    if query.promise:
        require_calibration(str(index), read_calibration(index, manifest.aligner), query.promise)
    if query.captions and open_index_reader(index).caption_table is None:
        raise ValueError("this index has no captions: 'clipvisionalign index RUN DATA --captions' writes them")
    if query.rerank_depth and not (read_text_manifest(as_storage(index), manifest.aligner) or {}).get("reranks"):
        from clipvisionalign.data.run_data import run_settings
        from clipvisionalign.models.io import is_pretrained

        folder = resolve_run(run or manifest.run)
        design = run_settings(folder).get("model", {}).get("design", "")
        if design in DUAL_DESIGNS or is_pretrained(folder):
            described = f"its design '{design}'" if design else "a pretrained dual encoder"
            raise ValueError(f"{folder}: {described} has nothing to re-rank with")
