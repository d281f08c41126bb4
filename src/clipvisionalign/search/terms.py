"""The terms of a query: their notation, and the vector of a query by the vectors of its terms.

A query is one vector: the sum of its terms by weight, with unwanted terms subtracted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from clipvisionalign.search.storage import printable

if TYPE_CHECKING:
    from clipvisionalign.images import ImageSource

#: Bounds of a weight, and its notation: no sentence begins with it.
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0
_WEIGHTED = re.compile(r"\^(\S+)\s+(.*)", re.DOTALL)
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?")
_NUMBER_LIKE = re.compile(r"[+-]?(\.?[0-9].*|inf(inity)?|nan)", re.IGNORECASE | re.DOTALL)
#: The former notation of weights; after the colon of a time, a ratio or a sentence there is no letter.
_OLD_WEIGHTED = re.compile(r"([0-9]+(?:\.[0-9]+)?):(\s*)(\D.*|)", re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A part of a query: words or an image.

    Attributes:
        content: The words, or the image.
        weight: Its factor in the sum; below zero for an unwanted term.
        is_image: Whether `content` is an image.
        note: For the user, how the notation was read; "" for nothing.
    """

    content: str | ImageSource
    weight: float = 1.0
    is_image: bool = False
    note: str = field(default="", compare=False)


def parse_term(text: str, sign: float = 1.0) -> Term:
    """Read a term of words, such as "^2 red": red, with weight 2. Without a weight it counts once.

    The former notation of a weight, "2:red", is read where a letter follows the colon, with a note.

    Args:
        text: The words, with their weight.
        sign: -1 for an unwanted term.

    Returns:
        The term.

    Raises:
        ValueError: There are no words, or the weight is not a number within its bounds.

    >>> parse_term("^2 red"), parse_term("10:30 on a clock").content
    (Term(content='red', weight=2.0, is_image=False, note=''), '10:30 on a clock')
    """
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise ValueError(f"'{printable(_shorten(text))}': words with bytes that are no UTF-8")
    weight, phrase, note = "1", text.strip(), ""
    if (match := _WEIGHTED.fullmatch(phrase + " ")) and _NUMBER_LIKE.fullmatch(match[1]):
        weight, phrase = match[1], match[2].strip()
    elif match := _OLD_WEIGHTED.fullmatch(phrase):
        if not match[3]:
            phrase = ""
        elif match[2]:
            note = f"'{_shorten(text)}' is taken as words; a weight is written '^{match[1]} {_shorten(match[3])}'"
        else:
            weight, phrase = match[1], match[3]
            note = (
                f"'{_shorten(text)}' counts {weight} times; write '^{weight} {_shorten(phrase)}', which is no sentence"
            )
    number = float(weight) if _NUMBER.fullmatch(weight) else float("nan")
    if not MIN_WEIGHT <= number <= MAX_WEIGHT:
        raise ValueError(
            f"'{_shorten(text)}': a weight is a number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}, such as '^2 red'"
        )
    if not phrase:
        raise ValueError(f"'{_shorten(text)}': a term needs words, after its weight where it has one, such as '^2 red'")
    return Term(phrase, sign * number, note=note)


def _shorten(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def combine_terms(terms: Sequence[Term], vectors: np.ndarray) -> np.ndarray:
    """The vector of a query.

    Args:
        terms: Its T terms.
        vectors: Their vectors, (T, D).

    Returns:
        The vector, (D,), unit length, float32.

    Raises:
        ValueError: A weight is not finite or too large, no term is wanted, or the terms cancel each other.
    """
    if not all(math.isfinite(term.weight) for term in terms):
        raise ValueError("a weight is a number, neither infinite nor nan")
    if not any(term.weight > 0 for term in terms):
        raise ValueError("a query needs something to look for, not only what is not wanted")
    vector = np.array([term.weight for term in terms], dtype=np.float32) @ vectors
    length = float(np.linalg.norm(vector))
    if not math.isfinite(length):
        raise ValueError("the weights are too large to be counted with")
    if length < 1e-6:
        raise ValueError("the terms take each other away: nothing is left to look for")
    return np.asarray(vector / length, dtype=np.float32)
