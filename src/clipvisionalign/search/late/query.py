"""A query's encoded terms as the files of late interaction are ranked by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipvisionalign.search.late.ranking import LateQuery, LateTerm

if TYPE_CHECKING:
    from clipvisionalign.models.aligner import Aligner
    from clipvisionalign.models.pair_scorer import EncodedCaption


def late_query(aligner: Aligner, captions: Sequence[EncodedCaption], weights: Sequence[float]) -> LateQuery:
    """The query of some terms.

    Args:
        aligner: A model of the design late, which encoded them.
        captions: The T terms.
        weights: The T weights of the terms.

    Returns:
        The query.
    """
    assert aligner.late is not None
    terms = [
        LateTerm(
            caption.vector.cpu().numpy(), caption.token_vectors.cpu().numpy(), caption.token_weights.cpu().numpy(),
            weight,
        )
        for caption, weight in zip(captions, weights, strict=True)
    ]  # fmt: skip
    return LateQuery(terms, aligner.scale().item(), aligner.late.scale().item() * aligner.late.weight.item())
