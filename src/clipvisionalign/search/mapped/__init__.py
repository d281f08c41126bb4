"""The memory-mapped approximate index: lists of vectors around centroids in files beside the LanceDB tables.

The table of images stays the one source of truth. The files record of which version of it and of which rows they are,
and are written again, or brought up to date by the difference, where it has another (`build.py`). Whoever searches maps
them (`files.py`), so that processes share their pages, and answers with the rows of the table as it is: rows that are
gone are left out before the search, and rows that the files lack are compared exactly (`reader.py`).

Lists, and no graph of neighbours: the vectors of captions lie away from those of all images, and their nearest images
in several regions, of which the search of a graph comes to a part (docs/results.md has both measured).

Sources: Jegou, Douze and Schmid, "Product quantization for nearest neighbor search", TPAMI 2011, for inverted lists;
Kusupati et al., "Matryoshka representation learning", arXiv:2205.13147 (vectors of which the first numbers alone can be
compared).
"""

from clipvisionalign.search.mapped.build import build_mapped, remove_mapped
from clipvisionalign.search.mapped.codes import CODES, VectorSettings, check_code, check_settings
from clipvisionalign.search.mapped.files import MAPPED_KIND, can_map, read_record, read_settings
from clipvisionalign.search.mapped.reader import MappedReader

__all__ = [
    "CODES",
    "MAPPED_KIND",
    "MappedReader",
    "VectorSettings",
    "build_mapped",
    "can_map",
    "check_code",
    "check_settings",
    "read_record",
    "read_settings",
    "remove_mapped",
]
