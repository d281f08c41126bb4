"""A query's encoded terms as late interaction scores images by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipvisionalign.search.encoder import as_array
from clipvisionalign.search.late.ranking import LateQuery, LateTerm

if TYPE_CHECKING:
    from clipvisionalign.export.onnx_text import CaptionTokens
    from clipvisionalign.models.pair_scorer import EncodedCaption
    from clipvisionalign.search.encoder import QueryEncoder


def late_query(
    encoder: QueryEncoder, captions: Sequence[EncodedCaption | CaptionTokens], weights: Sequence[float]
) -> LateQuery | None:
    """The query of some terms.

    Args:
        encoder: That of the index, which encoded them.
        captions: The T terms.
        weights: The T weights of the terms.

    Returns:
        The query; None where the model's pair scores are not of its late interaction alone.
    """
    scales = encoder.late_scales or encoder.aligner.late_scales
    if scales is None:
        return None
    terms = [
        LateTerm(as_array(caption.vector), as_array(caption.token_vectors), as_array(caption.token_weights), weight)
        for caption, weight in zip(captions, weights, strict=True)
    ]
    return LateQuery(terms, *scales)
