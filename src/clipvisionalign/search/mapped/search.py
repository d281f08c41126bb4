"""Searching mapped files: by the lists near a query, or exactly where that costs less, among rows that may be found.

A query reads the lists in the order of their centroids' cosines, until no further one is likely to have a row among
those that are wanted: until its centroid is farther below the last of them than `reach` allows (`recall.py`). Where a
filter leaves fewer rows, the last of those that are wanted is farther down, and more lists are read by the same rule,
with a reach of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from clipvisionalign.search.mapped.files import MappedFiles, Selection

#: Rows that are compared exactly in the time of reading lists, about.
MAX_EXACT_ROWS = 4096
#: Lists that are read at first; then as many as before, until no further one is of use.
_LISTS_PER_STEP = 16
#: Rows that are compared at a time.
_ROWS_PER_PRODUCT = 65_536


def search_files(
    files: MappedFiles, vector: np.ndarray, depth: int, selection: Selection | None = None, *, is_filtered: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows of mapped files.

    A filter counts before the search: rows outside it take no part, and lists without such rows are not read.

    Args:
        files: The files, of N positions.
        vector: The query, (D,), unit length.
        depth: Number of rows at most.
        selection: Which rows may be found; None for all.
        is_filtered: Whether a filter left them; else they are those that are not deleted.

    Returns:
        Positions (M,), nearest first, and their cosines (M,), float32.
    """
    count = files.record.positions if selection is None else selection.count
    depth = min(depth, count)
    if depth <= 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    if count <= MAX_EXACT_ROWS or files.encoder.refine * depth >= count:
        return _exact(files, vector, depth, selection)
    reach = files.record.reach
    if is_filtered and files.record.filtered_reach is not None:
        reach = files.record.filtered_reach
    return by_lists(files, vector, depth, reach, selection)


def by_lists(
    files: MappedFiles, vector: np.ndarray, depth: int, reach: float, selection: Selection | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest rows of the lists that are near a query, the best of them compared by their full vectors.

    Args:
        files: The files, of N positions.
        vector: The query, (D,), unit length.
        depth: Number of rows at most.
        reach: How far it reads on, as the record has it.
        selection: Which rows may be found; None for all.

    Returns:
        As `search_files`.
    """
    encoder, cosines = files.encoder, files.centroid_cosines(vector)
    margin = reach * max(float(cosines.std()), 1e-6)
    lists = np.flatnonzero(np.diff(files.offsets) if selection is None else selection.lists)
    lists = lists[np.argsort(-cosines[lists])]
    score, wanted = encoder.scorer(vector), depth * encoder.refine
    slots, scores = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    # The last of the rows that are wanted so far, and the last of the candidates.
    last = floor = -np.inf
    start = 0
    while start < len(lists):
        # The first of them say how far the others are of use.
        step = lists[start : start + max(_LISTS_PER_STEP, start)]
        start += len(step)
        step = step[cosines[step] + margin >= last]
        if not len(step):
            break
        new_slots, new_scores = _read(files, step, score, selection, floor)
        slots, scores = np.concatenate([slots, new_slots]), np.concatenate([scores, new_scores])
        if len(scores) > wanted:
            best = _best(files, files.members[slots], scores, wanted)
            slots, scores = slots[best], scores[best]
        if len(scores) == wanted:
            floor = scores.min()
        if len(scores) >= depth:
            last = np.partition(scores, len(scores) - depth)[len(scores) - depth]
    positions = np.sort(files.members[slots].astype(np.int64))
    return _first(files, positions, _cosines(files.vectors[positions], vector), depth)


def _read(
    files: MappedFiles, lists: np.ndarray, score: Callable[[Sequence[np.ndarray]], np.ndarray],
    selection: Selection | None, floor: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The rows of lists that may be found and score `floor` or more: where they are in the lists, and their scores."""
    if selection is not None and selection.is_sparse:
        first, ends = selection.offsets[lists].tolist(), selection.offsets[lists + 1].tolist()
        slots = np.concatenate([selection.slots[begin:end] for begin, end in zip(first, ends, strict=True)])
        scores = score([files.codes[slots]])
        better = np.flatnonzero(scores >= floor)
        return slots[better].astype(np.int64), scores[better]
    begins, ends = files.offsets[lists], files.offsets[lists + 1]
    scores = score([files.codes[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)])
    better = np.flatnonzero(scores >= floor)
    # From the index of a row among those that were read to that in the lists.
    behind = np.cumsum(ends - begins)
    slots = better + (ends - behind)[np.searchsorted(behind, better, side="right")]
    if selection is not None:
        kept = selection.members[slots]
        better, slots = better[kept], slots[kept]
    return slots, scores[better]


def _best(files: MappedFiles, positions: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the greatest scores, of equal ones at the end those of the rows with the least numbers."""
    if count >= len(scores):
        return np.arange(len(scores))
    last = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, equal = np.flatnonzero(scores > last), np.flatnonzero(scores == last)
    if len(above) + len(equal) > count:
        equal = equal[np.argsort(files.ids[positions[equal]], kind="stable")[: count - len(above)]]
    return np.concatenate([above, equal])


def _cosines(rows: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Cosines by one thread: those of BLAS would wait for more, on processors that other queries have work for."""
    return np.asarray(np.einsum("nd,d->n", rows, vector))


def _exact(
    files: MappedFiles, vector: np.ndarray, depth: int, selection: Selection | None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of all rows that may be found, by all of their vectors."""
    positions = np.arange(files.record.positions) if selection is None else np.flatnonzero(selection.mask)
    scores = np.empty(len(positions), dtype=np.float32)
    for start in range(0, len(positions), _ROWS_PER_PRODUCT):
        rows = positions[start : start + _ROWS_PER_PRODUCT]
        whole = len(rows) == rows[-1] - rows[0] + 1
        block = files.vectors[rows[0] : rows[-1] + 1] if whole else files.vectors[rows]
        scores[start : start + len(rows)] = block @ vector
    return _first(files, positions, scores, depth)


def _first(files: MappedFiles, positions: np.ndarray, scores: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the greatest scores, greatest first; of equal ones those of the least numbers."""
    best = _best(files, positions, scores, depth)
    order = best[np.lexsort((files.ids[positions[best]], -scores[best]))]
    return positions[order], scores[order]
