"""Queries, and their vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clipvisionalign.search.calibration import check_level
from clipvisionalign.search.encoder import QueryEncoder, as_array
from clipvisionalign.search.rerank_margin import MARGIN_DEPTH
from clipvisionalign.search.terms import Term, combine_terms
from clipvisionalign.search.time_limit import check_seconds

if TYPE_CHECKING:
    from clipvisionalign.export.onnx_text import CaptionTokens
    from clipvisionalign.models.pair_scorer import EncodedCaption

#: Results where no number is given, and what stands for no number and for all that are promised.
DEFAULT_COUNT, NO_COUNT, ALL_PROMISED = 10, -1, 2**31
#: Hits of a promise that are read first: how many there will be is not known.
FIRST_DEPTH = 64


@dataclass(frozen=True)
class SearchQuery:
    """What is searched for, and how.

    Attributes:
        terms: Words and images, unwanted ones included.
        count: Number of results; by default 10, with a promise all that it needs.
        where: A filter (`filters.py`), "" for none.
        rerank: Number of first results that are ordered by pair scores, 0 for none; for terms of words alone.
        captions: Search for captions and not for images; without filter and re-ranking.
        promise: Probability that what is meant is among the results, which are then as many as it needs, up to `count`;
            0 for none. For terms of words, in an index that is calibrated.
        within: Seconds within which first results whose order is unsure are ordered by pair scores (`time_limit.py`),
            `rerank` of them at most; 0 for none. For terms of words alone.
        vector: The query's vector, (D,), where it is known already, such as that of an image of the index.
        late: Rank all images of the index by pair scores of the late interaction (`late/`), and not only the nearest
            vectors; for terms of words alone, with or without a filter.
    """

    terms: Sequence[Term] = ()
    count: int = NO_COUNT
    where: str = ""
    rerank: int = 0
    captions: bool = False
    promise: float = 0.0
    vector: np.ndarray | None = field(default=None, compare=False)
    within: float = field(default=0.0, kw_only=True)
    late: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Resolve the number of results that was not given."""
        if self.count == NO_COUNT:
            object.__setattr__(self, "count", ALL_PROMISED if self.promise else DEFAULT_COUNT)

    @property
    def depth(self) -> int:
        """Number of nearest images that are read first; with a promise more may be needed."""
        return max(FIRST_DEPTH if self.promise else self.count, self.rerank_depth)

    @property
    def rerank_depth(self) -> int:
        """Number of first results that are ordered by pair scores at most."""
        return self.rerank or (MARGIN_DEPTH if self.within else 0)

    @property
    def encodes_pairs(self) -> bool:
        """Whether its words are encoded for pair scores at once, as they are needed in any case."""
        return self.late or (bool(self.rerank) and not self.within)

    def check(self) -> None:
        """Check what can be known without an index.

        Raises:
            ValueError: The count is below 1, or that of hits to re-rank below 0; there is nothing to search for; the
                terms cannot be re-ranked; or the promise is no probability or not for words.
        """
        if self.count < 1:
            raise ValueError(f"at least 1 image can be found, not {self.count}")
        if self.rerank < 0:
            raise ValueError(f"at least 0 hits can be re-ranked, not {self.rerank}")
        if self.vector is None:
            # Unit vectors: whether those of the model cancel each other is not known yet.
            combine_terms(self.terms, np.eye(len(self.terms), dtype=np.float32))
        if self.within:
            check_seconds(self.within)
        if self.late and (self.rerank_depth or self.captions or self.promise):
            raise ValueError(
                "late ranks all images by pair scores: it goes without rerank, within, captions and promise"
            )
        if (self.late or self.rerank_depth) and (not self.terms or any(term.is_image for term in self.terms)):
            what = "late ranks images by words" if self.late else "re-ranking compares words with images"
            raise ValueError(f"{what}: give words only")
        if self.captions and (self.where.strip() or self.rerank_depth):
            raise ValueError("captions are found without a filter and without re-ranking")
        if self.promise:
            check_level(self.promise)
            if self.captions or not self.terms or any(term.is_image for term in self.terms):
                raise ValueError(
                    "a promise is for words: leave it out where images are searched for by an image, or captions"
                )


class EncodedQuery(NamedTuple):
    """A query as it is searched with.

    Attributes:
        vector: (D,) unit length, float32.
        captions: Its terms as pair scores take them; empty without re-ranking, and where its time decides
            whether they are encoded.
    """

    vector: np.ndarray
    captions: list[EncodedCaption] | list[CaptionTokens]


def encode_queries(encoder: QueryEncoder, queries: Sequence[SearchQuery]) -> list[EncodedQuery | ValueError]:
    """Encode queries together: a query is encoded once, for its vector and its pair scores alike.

    Words take the index's text tower, without PyTorch; images, and words to re-rank by where that tower gives no
    tokens, take the aligner.

    Args:
        encoder: That of the index.
        queries: Any number.

    Returns:
        For each query its vector and captions, or its error: nothing to search for, an image that cannot be opened, or
        a design without pair scores.
    """
    errors = {position: error for position, query in enumerate(queries) if (error := _query_error(encoder, query))}
    # Queries with a vector need their words for re-ranking only.
    # Once: patches that an update adds meanwhile are for the next queries.
    in_pairs = {position for position, query in enumerate(queries) if _encodes_pairs(encoder, query)} - errors.keys()
    texts = _distinct_texts(
        query for position, query in enumerate(queries)
        if query.vector is None and position not in in_pairs and position not in errors
    )  # fmt: skip
    pair_texts = _distinct_texts(queries[position] for position in sorted(in_pairs))
    vectors = dict(zip(texts, encoder.encode_words(texts), strict=True)) if texts else {}
    captions: dict[str, Any] = dict(zip(pair_texts, encoder.encode_for_pairs(pair_texts), strict=True))
    vectors |= {text: as_array(caption.vector) for text, caption in captions.items() if text not in vectors}
    encoded: list[EncodedQuery | ValueError] = []
    for position, query in enumerate(queries):
        try:
            if position in errors:
                raise errors[position]
            vector = _query_vector(encoder, query, vectors)
            terms = query.terms if position in in_pairs else ()
            encoded.append(EncodedQuery(vector, [captions[str(term.content)] for term in terms]))
        except ValueError as error:
            encoded.append(error)
    return encoded


def _encodes_pairs(encoder: QueryEncoder, query: SearchQuery) -> bool:
    # A text tower that gives tokens gives them with the vector: a query with a time is encoded once by it.
    return query.encodes_pairs or bool(query.within and query.vector is None and encoder.late_scales is not None)


def _query_error(encoder: QueryEncoder, query: SearchQuery) -> ValueError | None:
    try:
        query.check()
    except ValueError as error:
        return error
    if (query.rerank_depth or query.late) and not encoder.reranks:
        return ValueError(f"the design '{encoder.design}' has nothing to re-rank with")
    return None


def _distinct_texts(queries: Iterable[SearchQuery]) -> list[str]:
    return list(dict.fromkeys(str(term.content) for query in queries for term in query.terms if not term.is_image))


def _query_vector(encoder: QueryEncoder, query: SearchQuery, text_vectors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The vector (D,) of a query. Raises ValueError for terms that cancel each other, ImageError."""
    if query.vector is not None:
        return query.vector
    text_terms = [term for term in query.terms if not term.is_image]
    image_terms = [term for term in query.terms if term.is_image]
    vectors = [text_vectors[str(term.content)] for term in text_terms]
    if image_terms:
        vectors += [*encoder.encode_images([term.content for term in image_terms])]
    return combine_terms([*text_terms, *image_terms], np.stack(vectors))
