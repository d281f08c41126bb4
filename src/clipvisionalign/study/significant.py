"""Numbers of a few significant digits, as people read them."""

from __future__ import annotations


def significant(value: float, digits: int = 3) -> str:
    """The format of a number with so many significant digits: never 1.01e+03 for a large one.

    >>> format(0.01234, significant(0.01234)), format(1012.3, significant(1012.3)), format(99.96, significant(99.96))
    ('0.0123', '1,012', '100')
    """
    return ",.0f" if abs(value) >= 10 ** (digits - 1) else f".{digits}g"
