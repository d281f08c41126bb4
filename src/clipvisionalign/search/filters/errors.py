"""The error of a filter: one line with the position, what was expected there, and the columns."""

from __future__ import annotations

from collections.abc import Iterable

#: Characters of the filter that a message repeats from the position on.
_EXCERPT_LENGTH = 40
#: Columns that a message lists.
_MAX_COLUMNS = 40


class FilterError(ValueError):
    """A filter that is refused: the message has the position and what was expected there."""


def error_at(text: str, position: int, message: str, columns: Iterable[str]) -> FilterError:
    """The error at a position of a filter.

    Args:
        text: The filter.
        position: Index of the character at which it is wrong; the filter's length for its end.
        message: What is wrong, or was expected.
        columns: The columns that there are.

    Returns:
        The error.

    >>> str(error_at("width > x", 8, "expected a number", ["width"]))
    "filter, character 9, at 'x': expected a number; columns: width"
    """
    excerpt = text[position : position + _EXCERPT_LENGTH]
    location = f"character {position + 1}, at {excerpt!r}" if excerpt.strip() else "at its end"
    names = list(columns)
    more = f" and {len(names) - _MAX_COLUMNS:,} more" if len(names) > _MAX_COLUMNS else ""
    return FilterError(f"filter, {location}: {message}; columns: {', '.join(names[:_MAX_COLUMNS])}{more}")
