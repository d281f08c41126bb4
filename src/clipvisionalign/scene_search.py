"""Does a search find what was asked for? Queries drawn from scene graphs, so that every right answer is known.

A query asks for two things, such as "a green star and a red ring". The rule: a scene of the gallery is drawn at random,
then two of its groups, each said by its shape and colour; a pair that was drawn before is drawn anew. An image is right
if it holds both, wherever, and however often and large. Of `n` right images in the gallery the first min(5, n) that a
search gives are looked at, and the share of right ones among them is averaged over the queries. By chance that share is
the mean of n over the gallery.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipvisionalign.data.scenes import Group, Scene

#: How many of the first answers are looked at, where so many are right.
FIRST = 5
QUERIES = 50


@dataclass(frozen=True)
class SceneQuery:
    """What is asked for, and the names of all images that hold it."""

    words: str
    right: frozenset[str]

    @property
    def asked(self) -> int:
        """How many of the first answers are looked at."""
        return min(FIRST, len(self.right))


def _kind(group: Group) -> tuple[str, str]:
    return group.colour, group.shape


def _said(kind: tuple[str, str]) -> str:
    colour, shape = kind
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def draw_queries(scenes: Mapping[str, Scene], count: int = QUERIES, seed: int = 0) -> list[SceneQuery]:
    """`count` queries about a gallery of scenes by name, all different. Raises ValueError for too few pairs in it."""
    rng = random.Random(seed)
    names = sorted(scenes)
    held = {name: {_kind(group) for group in scenes[name].groups} for name in names}
    drawn: dict[frozenset[tuple[str, str]], str] = {}
    for _ in range(100 * count):
        if len(drawn) == count:
            break
        first, second = rng.sample([_kind(group) for group in scenes[rng.choice(names)].groups], 2)
        drawn.setdefault(frozenset((first, second)), f"{_said(first)} and {_said(second)}")
    if len(drawn) < count:
        raise ValueError(f"{len(scenes)} scenes hold no {count} different pairs of things")
    return [SceneQuery(words, frozenset(n for n in names if kinds <= held[n])) for kinds, words in drawn.items()]


def search_quality(
    queries: Sequence[SceneQuery], gallery: int, find: Callable[[str, int], Sequence[str]]
) -> dict[str, Any]:
    """The mean share of right images among the first ones that `find(words, count)` names, in percent, chance beside
    it, and each query's own. gallery: how many images are searched."""
    each, shares, rights = [], [], []
    for query in queries:
        found = list(find(query.words, query.asked))[: query.asked]
        hits = sum(name in query.right for name in found)
        share = 100 * hits / query.asked
        shares.append(share)
        rights.append(len(query.right))
        each.append({"query": query.words, "right_in_gallery": len(query.right), "asked": query.asked, "share": share})
    return {
        "queries": len(queries),
        "gallery": gallery,
        "first": FIRST,
        "share": sum(shares) / len(shares),
        "chance": 100 * sum(rights) / len(rights) / gallery,
        "each": each,
    }
