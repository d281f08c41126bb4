"""Groups in which every two are linked, so that none chains through unlike members (complete linkage).

Source: T. Sørensen, "A method of establishing groups of equal amplitude in plant sociology" (1948).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

#: Members of a group at most: what more would be linked becomes a further group.
MAX_GROUP = 1000
#: Members of a component up to which all of its pairs are looked up at once.
_SMALL_COMPONENT = 64

#: Whether pairs (E, 2) are linked, (E,) bool.
LinkFunction = Callable[[np.ndarray], np.ndarray]


def complete_link_groups(pairs: np.ndarray, closeness: np.ndarray, is_linked: LinkFunction) -> list[list[int]]:
    """Groups of two and more, in each of which every two members are linked.

    The closest pairs are joined first; two groups are joined where all pairs between them are linked.

    Args:
        pairs: Linked pairs, (E, 2) numbers.
        closeness: How close those are, (E,).
        is_linked: Whether other pairs are linked; asked of pairs within connected components alone.

    Returns:
        The groups, members in order; none is in two groups.

    >>> links = {(0, 1), (1, 2)}
    >>> def is_linked(pairs):
    ...     return np.array([tuple(pair) in links for pair in pairs.tolist()])
    >>> complete_link_groups(np.array([[0, 1], [1, 2]]), np.array([0.9, 0.8]), is_linked)
    [[0, 1]]
    """
    if not len(pairs):
        return []
    numbers, nodes = np.unique(pairs, return_inverse=True)
    nodes = nodes.reshape(-1, 2)
    graph = coo_array((np.ones(len(nodes), dtype=bool), (nodes[:, 0], nodes[:, 1])), shape=(len(numbers),) * 2)
    count, labels = connected_components(graph, directed=False)
    _look_up_small_components(numbers, labels, count, is_linked)
    group_of = {int(number): [int(number)] for number in numbers}
    for first, second in pairs[np.argsort(-closeness, kind="stable")].tolist():
        left, right = group_of[first], group_of[second]
        if left is right or len(left) + len(right) > MAX_GROUP:
            continue
        if bool(is_linked(_between(left, right)).all()):
            joined = left + right
            group_of.update(dict.fromkeys(joined, joined))
    unique = {id(group): group for group in group_of.values() if len(group) > 1}
    return sorted(sorted(group) for group in unique.values())


def count_links_between(pairs: np.ndarray, groups: Sequence[Sequence[int]]) -> int:
    """The number of linked pairs whose two are not in one group.

    Args:
        pairs: (E, 2) numbers.
        groups: Groups of numbers.

    Returns:
        The number.
    """
    group_of = {member: number for number, group in enumerate(groups) for member in group}
    return sum(group_of.get(first, -1) != group_of.get(second, -2) for first, second in pairs.tolist())


def _look_up_small_components(numbers: np.ndarray, labels: np.ndarray, count: int, is_linked: LinkFunction) -> None:
    """Ask for all pairs of small components together: what answers may work on many at once."""
    sizes = np.bincount(labels, minlength=count)
    order = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)])
    wanted = []
    for component in np.flatnonzero((sizes > 2) & (sizes <= _SMALL_COMPONENT)).tolist():
        members = numbers[order[starts[component] : starts[component + 1]]]
        first, second = np.triu_indices(len(members), 1)
        wanted.append(np.stack([members[first], members[second]], axis=1))
    if wanted:
        is_linked(np.concatenate(wanted))


def _between(left: Sequence[int], right: Sequence[int]) -> np.ndarray:
    pairs = np.stack(np.meshgrid(left, right, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.sort(pairs, axis=1)
