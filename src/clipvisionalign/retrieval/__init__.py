"""Exact ranks, retrieval metrics with intervals, and the audit.

Nothing here imports a model of this project: any object with `encode_images` and `encode_captions`, or `score`, can be
measured and put to the test.
"""

from clipvisionalign.retrieval.audit import AuditReport, audit
from clipvisionalign.retrieval.classification import Classification, accuracy_gain, classify, zero_shot_classifier
from clipvisionalign.retrieval.evaluate import Evaluation, evaluate
from clipvisionalign.retrieval.metrics import RetrievalMetrics, metrics_of_ranks, retrieval_metrics, rsum_gain
from clipvisionalign.retrieval.protocols import DualEncoder, PairModel, Reranker, RetrievalModel, ScoredPairs
from clipvisionalign.retrieval.ranks import PositiveRanks, ranks_of_scores, ranks_of_vectors

__all__ = [
    "AuditReport",
    "Classification",
    "DualEncoder",
    "Evaluation",
    "PairModel",
    "PositiveRanks",
    "Reranker",
    "RetrievalMetrics",
    "RetrievalModel",
    "ScoredPairs",
    "accuracy_gain",
    "audit",
    "classify",
    "evaluate",
    "metrics_of_ranks",
    "ranks_of_scores",
    "ranks_of_vectors",
    "retrieval_metrics",
    "rsum_gain",
    "zero_shot_classifier",
]
