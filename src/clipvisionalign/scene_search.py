"""Recall of a search: queries drawn from scene graphs, with all correct answers given.

A query asks for two things, such as "a green star and a red ring". The rule: a scene of the gallery is drawn at random,
then two of its groups, each described by its shape and colour; no pair is drawn twice. An image is right
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
TOP_K = 5
NUM_QUERIES = 50


@dataclass(frozen=True)
class SceneQuery:
    """A query with its answer.

    Attributes:
        text: What is asked for.
        relevant: Names of all images that hold it.
    """

    text: str
    relevant: frozenset[str]

    @property
    def cutoff(self) -> int:
        """How many of the first answers are looked at."""
        return min(TOP_K, len(self.relevant))


def _colour_and_shape(group: Group) -> tuple[str, str]:
    return group.colour, group.shape


def _phrase(kind: tuple[str, str]) -> str:
    colour, shape = kind
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"


def draw_queries(scenes: Mapping[str, Scene], count: int = NUM_QUERIES, seed: int = 0) -> list[SceneQuery]:
    """Draw queries about a gallery of scenes, all different.

    Args:
        scenes: The scenes, by name.
        count: Number of queries.
        seed: Seed of the draws.

    Returns:
        The queries.

    Raises:
        ValueError: There are too few pairs in the gallery.
    """
    rng = random.Random(seed)
    names = sorted(scenes)
    kinds_by_image = {name: {_colour_and_shape(group) for group in scenes[name].groups} for name in names}
    phrases: dict[frozenset[tuple[str, str]], str] = {}
    for _ in range(100 * count):
        if len(phrases) == count:
            break
        first, second = rng.sample([_colour_and_shape(group) for group in scenes[rng.choice(names)].groups], 2)
        phrases.setdefault(frozenset((first, second)), f"{_phrase(first)} and {_phrase(second)}")
    if len(phrases) < count:
        raise ValueError(f"{len(scenes)} scenes hold no {count} different pairs of things")
    return [
        SceneQuery(text, frozenset(n for n in names if kinds <= kinds_by_image[n])) for kinds, text in phrases.items()
    ]


def search_quality(
    queries: Sequence[SceneQuery], gallery: int, search: Callable[[str, int], Sequence[str]]
) -> dict[str, Any]:
    """The mean share of relevant images among the first ones of a search, with chance beside it.

    Args:
        queries: The queries.
        gallery: How many images are searched.
        search: From words and a number to the names of as many images.

    Returns:
        Shares in percent, and each query's own.
    """
    per_query, shares, relevant_counts = [], [], []
    for query in queries:
        retrieved = list(search(query.text, query.cutoff))[: query.cutoff]
        hits = sum(name in query.relevant for name in retrieved)
        share = 100 * hits / query.cutoff
        shares.append(share)
        relevant_counts.append(len(query.relevant))
        per_query.append(
            {"query": query.text, "right_in_gallery": len(query.relevant), "asked": query.cutoff, "share": share}
        )
    return {
        "queries": len(queries),
        "gallery": gallery,
        "first": TOP_K,
        "share": sum(shares) / len(shares),
        "chance": 100 * sum(relevant_counts) / len(relevant_counts) / gallery,
        "each": per_query,
    }
