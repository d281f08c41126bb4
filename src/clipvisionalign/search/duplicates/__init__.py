"""Images of an index that are the same, nearly the same, or of one scene; which to keep, and what was decided."""

from clipvisionalign.search.duplicates.all_pairs import DUPLICATE_THRESHOLD, find_duplicates
from clipvisionalign.search.duplicates.finder import duplicate_report
from clipvisionalign.search.duplicates.neighbours import NEAR_COSINE
from clipvisionalign.search.duplicates.report import DuplicateGroup, DuplicateReport

__all__ = [
    "DUPLICATE_THRESHOLD",
    "NEAR_COSINE",
    "DuplicateGroup",
    "DuplicateReport",
    "duplicate_report",
    "find_duplicates",
]
