"""Filters on the metadata of an image, such as `taken >= 2023-05 and not camera like "Canon*"`.

A filter is comparisons, joined by `and`, `or`, `not` and parentheses. `lexer.py` reads it into tokens and refuses
whatever stands at a wrong position; sqlglot parses the tokens, in which columns and values are numbers only;
`rewrite.py` writes each allowed node as SQL of its own. No part of a filter reaches the database as it was typed.

- A missing value fulfils no comparison, `!=` included; `not` of a comparison is fulfilled by all that does not fulfil
  it, missing values included. SQL's third truth value does not exist.
- A column of texts is compared with a number as that is written, so that `zip = 00501` finds it. In `like` a * stands
  for anything.
- A date is the interval that it names: `taken = 2023-05` is any time in that month.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from clipvisionalign.search.filters.errors import FilterError

if TYPE_CHECKING:
    from clipvisionalign.search.metadata import ColumnType

__all__ = ["FILTER_COLUMNS", "MAX_FILTER_LENGTH", "FilterError", "filter_sql"]

#: Characters of a filter at most.
MAX_FILTER_LENGTH = 500
#: Columns that a filter may name besides an index's metadata, and what they hold.
FILTER_COLUMNS: dict[str, ColumnType] = {
    "path": "text", "width": "integer", "height": "integer", "size": "integer", "id": "integer",
}  # fmt: skip


def filter_sql(text: str, columns: Mapping[str, str | bool]) -> str:
    """The condition of a filter in SQL, rewritten from its parsed form.

    Args:
        text: The filter.
        columns: For each column that may be compared what it holds: "text", "integer", "number" or "date"; or whether
            it holds numbers.

    Returns:
        The condition, as LanceDB and Lance take it.

    Raises:
        FilterError: The text is no filter, or compares an unknown column; one line with the position.
        ModuleNotFoundError: sqlglot is not installed.

    >>> filter_sql('width >= 32 and path like "test/*"', {"width": True, "path": False})
    "`width` >= 32 AND `path` LIKE 'test/%'"
    >>> filter_sql('not camera in ("A", "B")', {"camera": "text"})
    "(NOT ((`camera` = 'A' OR `camera` = 'B')) OR `camera` IS NULL)"
    """
    if len(text) > MAX_FILTER_LENGTH:
        raise FilterError(f"a filter of {len(text):,} characters; at most {MAX_FILTER_LENGTH}")
    try:
        # sqlglot takes a noticeable time to import: without a filter it is not needed.
        from clipvisionalign.search.filters.rewrite import rewrite
    except ModuleNotFoundError as error:
        hint = f'a filter needs {error.name}: pip install "clipvisionalign[search]"'
        raise ModuleNotFoundError(hint, name=error.name) from None

    return rewrite(text, {name: _column_type(kind) for name, kind in columns.items()})


def _column_type(kind: str | bool) -> str:
    return kind if isinstance(kind, str) else "number" if kind else "text"
