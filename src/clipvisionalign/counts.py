"""Counts with their nouns, for messages."""

from __future__ import annotations


def plural(noun: str) -> str:
    """More than one of a thing.

    Args:
        noun: In the singular.

    Returns:
        It in the plural.
    """
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


def count_noun(count: int, noun: str) -> str:
    """A number with its noun.

    Args:
        count: The number.
        noun: In the singular.

    Returns:
        Both, in the plural where the number is not 1.

    >>> count_noun(1, "query"), count_noun(2000, "query"), count_noun(1, "training image")
    ('1 query', '2,000 queries', '1 training image')
    """
    return f"{count:,} {noun if count == 1 else plural(noun)}"
