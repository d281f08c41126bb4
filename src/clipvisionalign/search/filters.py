"""Filters on the metadata of an image, such as `width > 1000 and path like "2024/*"`.

A filter is comparisons joined by `and`; each is a column, one of = != < <= > >= like, and a number or a quoted text. In
`like` a * stands for anything. Columns are those of the index, its metadata's among them; a column of texts is compared
with a number as that is written, so that `zip = 00501` finds it. No filter is handed to the database as it is: every
comparison is rewritten.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping
from decimal import Decimal

#: Characters of a filter at most.
MAX_FILTER_LENGTH = 500
#: Columns that a filter may name besides an index's metadata, and whether they hold numbers.
FILTER_COLUMNS = {"path": False, "width": True, "height": True, "size": True, "id": True}
#: An index's own columns of 32-bit numbers.
_INT32_COLUMNS = ("width", "height")
_MAX_FLOAT = sys.float_info.max

_COMPARISON = re.compile(
    r"""\s*(?P<column>[^\s=!<>"'`]+)\s*(?P<sign>=|!=|<=|>=|<|>|\blike\b)\s*
    (?:(?P<number>-?[0-9]+(?:\.[0-9]+)?)|"(?P<double>[^"]*)"|'(?P<single>[^']*)')\s*""",
    re.VERBOSE | re.IGNORECASE,
)


class FilterError(ValueError):
    """A filter with a syntax error: the message has the position and the expected syntax."""


def filter_sql(text: str, columns: Mapping[str, bool]) -> str:
    """The condition of a filter in SQL, rewritten from its parsed form.

    Args:
        text: Comparisons joined by `and`; "" for none.
        columns: For each column that may be compared, whether it holds numbers.

    Returns:
        The condition; "" for an empty filter.

    Raises:
        FilterError: The text is no filter, or compares an unknown column.

    >>> filter_sql('width >= 32 and path like "test/*"', {"width": True, "path": False})
    "`width` >= 32 AND `path` LIKE 'test/%'"
    """
    if len(text) > MAX_FILTER_LENGTH:
        raise FilterError(f"a filter of {len(text):,} characters; at most {MAX_FILTER_LENGTH}")
    parts = []
    position = 0
    while True:
        match = _COMPARISON.match(text, position)
        if not match:
            raise FilterError(
                f"filter '{text[position : position + 60]}': not understood; write COLUMN = VALUE, with = != "
                "< <= > >= like, "
                f'a number or a "text", joined by and; columns: {", ".join(columns)}'
            )
        parts.append(_comparison_sql(match, columns))
        position = match.end()
        if position == len(text):
            return " AND ".join(parts)
        conjunction = re.compile(r"and\b", re.IGNORECASE).match(text, position)
        if not conjunction:
            raise FilterError(f"filter '{text[position : position + 60]}': comparisons are joined by 'and' only")
        position = conjunction.end()


def _comparison_sql(match: re.Match[str], columns: Mapping[str, bool]) -> str:
    column, sign = unicodedata.normalize("NFC", match["column"].lower()), match["sign"].upper()
    if column not in columns:
        raise FilterError(f"filter: no column '{column}'; there are {', '.join(columns)}")
    if match["number"] is not None:
        number = match["number"]
        if sign == "LIKE" or not (columns[column] or sign in ("=", "!=")):
            raise FilterError(f"filter: '{column} {match['sign']}' wants a \"text\"")
        if not columns[column]:
            return f"`{column}` {sign} '{number}'"
        return _number_sql(column, sign, Decimal(number))
    if columns[column]:
        raise FilterError(f"filter: '{column} {match['sign']}' wants a number")
    value = match["double"] if match["double"] is not None else match["single"]
    if sign == "LIKE":
        value = value.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_").replace("*", "%")
    return f"`{column}` {sign} '{value.replace(chr(39), chr(39) * 2)}'"


def _number_sql(column: str, sign: str, number: Decimal) -> str:
    """A comparison of numbers that the database takes, whatever numbers the column holds.

    It refuses a literal that the column's type cannot hold: a fraction or a large number beside whole ones. These are
    compared as floating point, in which all that a column of 32 bits holds is exact.
    """
    largest = Decimal(2) ** (31 if column in _INT32_COLUMNS else 63)
    if number == number.to_integral_value() and -largest < number < largest:
        return f"`{column}` {sign} {int(number)}"
    floating = max(-_MAX_FLOAT, min(_MAX_FLOAT, float(number)))
    return f"CAST(`{column}` AS DOUBLE) {sign} {floating!r}"
