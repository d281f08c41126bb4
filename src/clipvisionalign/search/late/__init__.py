"""Late interaction over a whole index: centroids of patches first, then the patches of the best images.

The table of patches (`search/patches.py`) is the source; the files of this package are rebuilt from it where they
differ.

Sources: Santhanam et al., "PLAID", arXiv:2205.09707, for centroids first; Lee et al., "XTR", arXiv:2304.01982, and
Scheerer et al., "WARP", arXiv:2501.17788, for what a token counts where its best patch is in no list that was read.
"""

from clipvisionalign.search.late.files import LateFiles, LateRecord, read_late_record, remove_late
from clipvisionalign.search.late.query import late_query
from clipvisionalign.search.late.ranking import LateQuery, LateTerm, rank_images, score_images, score_patches
from clipvisionalign.search.late.reader import LateReader

__all__ = [
    "LateFiles",
    "LateQuery",
    "LateReader",
    "LateRecord",
    "LateTerm",
    "late_query",
    "rank_images",
    "read_late_record",
    "remove_late",
    "score_images",
    "score_patches",
]
