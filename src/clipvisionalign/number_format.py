"""Numbers with a few significant digits."""

from __future__ import annotations

from collections.abc import Sequence

from clipvisionalign.counts import count_noun


def significant_format(value: float, digits: int = 3) -> str:
    """The format of a number with so many significant digits: never 1.01e+03 for a large one.

    Args:
        value: The number.
        digits: Significant digits.

    Returns:
        A format specification.

    >>> tuple(format(value, significant_format(value)) for value in (0.01234, 1012.3, 99.96))
    ('0.0123', '1,012', '100')
    """
    return ",.0f" if abs(value) >= 10 ** (digits - 1) else f".{digits}g"


def decimal_format(value: float) -> str:
    """The format of a figure with one decimal: never "-0.0", and more digits for what would else be shown as zero.

    Args:
        value: The figure.

    Returns:
        A format specification.

    >>> [format(value, decimal_format(value)) for value in (12.34, -0.04, 0.04, -1e-12)]
    ['12.3', '-0.04', '0.04', '0.0']
    """
    return ".1g" if 1e-6 < abs(value) < 0.05 else "z.1f"


def p_value_format(p: float, level: float) -> str:
    """The format of a p value: two significant digits, or as many as show on which side of a level it is.

    Args:
        p: The value.
        level: The level.

    Returns:
        A format specification.

    >>> format(0.0123, p_value_format(0.0123, 0.05)), format(0.04996, p_value_format(0.04996, 0.05))
    ('0.012', '0.04996')
    """
    forms = (f".{digits}g" for digits in range(2, 17))
    return next((form for form in forms if (float(format(p, form)) < level) == (p < level)), ".17g")


def word_range(span: Sequence[int]) -> str:
    """From how many words to how many.

    Args:
        span: Lowest and highest number.

    Returns:
        A phrase.

    >>> word_range([4, 9]), word_range([1, 1])
    ('4 to 9 words', '1 word')
    """
    low, high = span
    return f"{low} to {high} words" if low != high else count_noun(high, "word")
