"""What the routes of one service share: its indexes, and the batchers of their queries."""

import threading
import time
from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException, UploadFile

from clipvisionalign.images import open_image
from clipvisionalign.search.browse import Browser
from clipvisionalign.search.facets import FacetCounts
from clipvisionalign.search.filters import FILTER_COLUMNS
from clipvisionalign.search.index_reader import IndexReader
from clipvisionalign.search.judgement_store import JudgementStore
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.searcher import Hits, Searcher
from clipvisionalign.search.server.batching import Batcher
from clipvisionalign.search.server.duplicate_job import DuplicateJob
from clipvisionalign.search.server.limits import Limits
from clipvisionalign.search.server.metrics import Metrics
from clipvisionalign.search.sharded_reader import ShardedReader
from clipvisionalign.search.terms import Term


class SearchService:
    """Indexes that are served side by side.

    Args:
        searchers: One for each index.
        limits: What a request may ask for.
        read_only: Whether judged queries and decisions on duplicates are refused.

    Attributes:
        batchers: One for each index.
        browsers: One for each index.
        facets: One for each index.
        judgements: One for each index.
        duplicates: One for each index.
        metrics: Counts and times of requests.
        model_lock: Held while images are encoded or pairs are scored: a model uses all cores, so two calls at a time
            would only take turns.
    """

    def __init__(self, searchers: Sequence[Searcher], limits: Limits, read_only: bool = False) -> None:
        self.searchers, self.limits, self.read_only = searchers, limits, read_only
        self.batchers = [Batcher(searcher.search_batch) for searcher in searchers]
        self.browsers = [Browser(searcher.table) for searcher in searchers]
        self.facets = [FacetCounts(searcher.table) for searcher in searchers]
        self.judgements = [JudgementStore(searcher) for searcher in searchers]
        self.duplicates = [DuplicateJob(searcher, keep=not read_only) for searcher in searchers]
        self.metrics = Metrics(self.encoder_counts)
        self.model_lock = threading.Lock()

    def encoder_counts(self) -> tuple[int, int]:
        """How many texts were encoded, in how many calls of the text encoder."""
        return sum(batcher.texts for batcher in self.batchers), sum(batcher.calls for batcher in self.batchers)

    def stores_judgements(self, index: int) -> bool:
        """Whether judged queries are stored in an index.

        Args:
            index: The number of the index.

        Returns:
            Whether they are: the service may write, and so it can.
        """
        return not self.read_only and self.judgements[index].is_writable

    def stores_decisions(self, index: int) -> bool:
        """Whether decisions that images are no duplicates are stored in an index.

        Args:
            index: The number of the index.

        Returns:
            Whether they are: the service may write, and so it can.
        """
        return not self.read_only and self.duplicates[index].is_writable

    def search(self, query: SearchQuery, index: int) -> Hits:
        """The hits of a query, by `Searcher.search_batch`.

        Queries of words are searched for together with those of other requests. Those that are re-ranked, or that have
        images, would delay these: they take turns at the model.

        Args:
            query: The query.
            index: The number of the index.

        Returns:
            Its hits, best first.

        Raises:
            TimeoutError: The hits were not found in time.
            Exception: What the searcher raises of the query.
        """
        if query.rerank_depth or query.late or any(term.is_image for term in query.terms):
            start = time.perf_counter()
            with self.model_lock:
                waited = (time.perf_counter() - start,) if query.within else ()
                return self.searchers[index].search_one(query, *waited)
        if query.vector is not None:
            return self.searchers[index].search_one(query)
        hits: Hits = self.batchers[index](query).result(self.limits.seconds)
        return hits

    def read_upload(self, upload: UploadFile) -> Term:
        """An image that is sent in, as a term.

        Args:
            upload: The file of the form.

        Returns:
            The term.

        Raises:
            HTTPException: 413 for a file of too many bytes.
            ImageError: The file is not an image.
        """
        data = upload.file.read(self.limits.upload_bytes + 1)
        if len(data) > self.limits.upload_bytes:
            raise HTTPException(413, f"at most {self.limits.upload_bytes:,} bytes")
        return Term(open_image(data, 512), is_image=True)

    def close(self) -> None:
        """End the threads: of the batchers after what is waiting, of duplicates at once."""
        for job in self.duplicates:
            job.close()
        for batcher in self.batchers:
            batcher.close()


def index_info(searcher: Searcher) -> dict[str, Any]:
    """The fields of an index in /health.

    Args:
        searcher: The open index.

    Returns:
        Values by name.
    """
    shards = {"shards": searcher.reader.states()} if isinstance(searcher.reader, ShardedReader) else {}
    return {
        "pictures": searcher.table.count_rows(),
        "folder": searcher.manifest.folder,
        "kind": searcher.manifest.kind,
        "recall": searcher.manifest.recall,
        "design": searcher.encoder.design,
        "reranks": searcher.encoder.reranks,
        "late": isinstance(searcher.reader, IndexReader) and searcher.reader.late.is_there,
        "captions": 0 if searcher.caption_table is None else searcher.caption_table.count_rows(),
        "filters": [*FILTER_COLUMNS, *searcher.metadata],
        **shards,
    }
