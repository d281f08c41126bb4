"""A filter as SQL: sqlglot parses its tokens, and every node of an allowed type is rewritten.

What sqlglot sees are keywords and numbered operands (`t0 = t1`), so that nothing that a user typed is parsed as SQL. A
node is written by its type, and refused where that is none of those known here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import sqlglot.errors
from sqlglot import exp
from sqlglot.parser import Parser
from sqlglot.tokens import Token as SqlToken
from sqlglot.tokens import TokenType

from clipvisionalign.search.filters.dates import DateInterval, parse_date
from clipvisionalign.search.filters.errors import FilterError, error_at
from clipvisionalign.search.filters.lexer import Token, tokenize

#: Columns of 32-bit numbers; others have 64 bits.
_INT32_COLUMNS = ("width", "height")
_MAX_FLOAT = sys.float_info.max
#: Mean radius of the earth in metres (IUGG).
EARTH_RADIUS = 6_371_008.8
#: Metres of a unit of distance.
_UNITS = {"km": 1000.0, "mi": 1609.344, "m": 1.0}
#: The columns that `near` compares, in degrees.
_COORDINATES = ("latitude", "longitude")

_TOKEN_TYPES = {
    "and": TokenType.AND, "or": TokenType.OR, "not": TokenType.NOT, "in": TokenType.IN, "like": TokenType.LIKE,
    "between": TokenType.BETWEEN, "is": TokenType.IS, "null": TokenType.NULL, "(": TokenType.L_PAREN,
    ")": TokenType.R_PAREN, ",": TokenType.COMMA, "=": TokenType.EQ, "!=": TokenType.NEQ, "<>": TokenType.NEQ,
    "<": TokenType.LT, "<=": TokenType.LTE, ">": TokenType.GT, ">=": TokenType.GTE,
}  # fmt: skip
_SIGNS: dict[type[exp.Expr], str] = {
    exp.EQ: "=", exp.NEQ: "!=", exp.LT: "<", exp.LTE: "<=", exp.GT: ">", exp.GTE: ">="
}  # fmt: skip


@dataclass(frozen=True)
class _Leaf:
    """A condition, and the columns whose missing values leave it undecided."""

    sql: str
    columns: tuple[str, ...] = ()


def rewrite(text: str, columns: Mapping[str, str]) -> str:
    """The condition of a filter in SQL.

    Args:
        text: The filter.
        columns: The columns, and what each holds: "text", "integer", "number" or "date".

    Returns:
        The condition.

    Raises:
        FilterError: The text is no filter, or a value does not fit its column.

    >>> rewrite("a = 1 or not b = 2", {"a": "integer", "b": "integer"})
    '(`a` = 1 OR (NOT (`b` = 2) OR `b` IS NULL))'
    """
    writer = _Writer(text, columns, tokenize(text, columns))
    return writer.condition(writer.parse(), False)


class _Writer:
    """Writes the nodes of one filter."""

    def __init__(self, text: str, columns: Mapping[str, str], tokens: Sequence[Token]) -> None:
        self.text, self.columns, self.tokens = text, columns, tokens

    def parse(self) -> exp.Expr:
        """The tree of the tokens. Raises FilterError for one that sqlglot does not take."""
        sql_tokens = []
        for number, token in enumerate(self.tokens):
            sign = token.text if token.kind == "sign" else token.kind
            type_ = _TOKEN_TYPES.get(sign, TokenType.VAR)
            word = f"t{number}" if type_ is TokenType.VAR else sign
            sql_tokens.append(SqlToken(type_, word, 1, token.start + 1, token.start, token.start))
        try:
            (tree,) = Parser(error_level=sqlglot.errors.ErrorLevel.IMMEDIATE).parse(sql_tokens, self.text)
        except (sqlglot.errors.SqlglotError, ValueError, RecursionError):
            raise self.error(self.tokens[0], "this is no condition") from None
        if tree is None:
            raise self.error(self.tokens[0], "this is no condition")
        return tree

    def error(self, token: Token, message: str) -> FilterError:
        """The error at a token."""
        return error_at(self.text, token.start, message, self.columns)

    def condition(self, node: exp.Expr, negated: bool) -> str:
        """A node as SQL that is true or not, and never undecided in a way that matters.

        `not` is moved inwards to the comparisons (De Morgan). A comparison that is not negated may be undecided, which
        no row fulfils; a negated one counts a missing value as fulfilled.
        """
        kind = type(node)
        if kind is exp.Paren:
            return self.condition(node.this, negated)
        if kind is exp.Not:
            return self.condition(node.this, not negated)
        if kind in (exp.And, exp.Or):
            is_or = (kind is exp.Or) != negated
            # One level for a chain of any length: the database limits how deep a condition is.
            parts = [self.condition(part, negated) for part in node.flatten(unnest=False)]
            return f"({' OR '.join(parts)})" if is_or else " AND ".join(parts)
        if kind is exp.Is:
            column = _quoted(self.column(node).text)
            return f"{column} IS {'NOT ' if negated else ''}NULL"
        leaf = self.leaf(node)
        # sqlglot has `a not like b` as one node.
        if (not negated) == (not node.args.get("negate")):
            return leaf.sql
        return f"(NOT ({leaf.sql}){''.join(f' OR {_quoted(column)} IS NULL' for column in leaf.columns)})"

    def leaf(self, node: exp.Expr) -> _Leaf:
        """A comparison as SQL."""
        if type(node) is exp.Anonymous:
            return self.near(node)
        column = self.column(node)
        if type(node) in _SIGNS:
            sql = self.comparison(column, _SIGNS[type(node)], self.token(node.expression))
        elif type(node) is exp.Like:
            sql = self.like(column, self.token(node.expression))
        elif type(node) is exp.Between:
            low = self.comparison(column, ">=", self.token(node.args["low"]))
            sql = f"({low} AND {self.comparison(column, '<=', self.token(node.args['high']))})"
        elif type(node) is exp.In and node.expressions:
            sql = f"({' OR '.join(self.comparison(column, '=', self.token(each)) for each in node.expressions)})"
        else:
            raise self.error(column, "this is no comparison")
        return _Leaf(sql, (column.text,))

    def column(self, node: exp.Expr) -> Token:
        """The column of a comparison."""
        token = self.token(node.this)
        if token.kind != "name":
            raise self.error(token, "expected a column")
        return token

    def token(self, node: exp.Expr | str | None) -> Token:
        """The operand that a node stands for."""
        name = node.name if isinstance(node, (exp.Column, exp.Identifier)) else str(node)
        if not name.startswith("t") or not name[1:].isdecimal() or int(name[1:]) >= len(self.tokens):
            raise self.error(self.tokens[0], "this is no condition")
        return self.tokens[int(name[1:])]

    def comparison(self, column: Token, sign: str, value: Token) -> str:
        """A comparison of a column with one value."""
        kind, name = self.columns[column.text], _quoted(column.text)
        if kind == "date":
            return _time_sql(name, sign, self.date(value), lambda time: f"timestamp '{time.isoformat(' ')}'")
        if kind == "text":
            return self.text_comparison(name, column, sign, value)
        if value.kind != "number":
            raise self.error(value, f"'{column.text} {sign}' wants a number")
        return _number_sql(column.text, sign, Decimal(value.text))

    def text_comparison(self, name: str, column: Token, sign: str, value: Token) -> str:
        """A column of texts compared with a text, a number as it is written, or a calendar date."""
        if value.kind == "date":
            interval = self.date(value)
            if interval.parts > 3:
                raise self.error(value, f"'{column.text}' holds texts: quote a time as it stands there")
            length = len("2023-05") if interval.parts == 2 else len("2023-05-01")
            return _time_sql(name, sign, interval, lambda time: f"'{time.isoformat()[:length]}'")
        if value.kind == "number" and sign not in ("=", "!="):
            raise self.error(value, f"'{column.text} {sign}' wants a \"text\"")
        return f"{name} {sign} {_literal(value.text)}"

    def date(self, value: Token) -> DateInterval:
        """The interval of a value."""
        try:
            return parse_date(value.text)
        except ValueError as error:
            raise self.error(value, str(error)) from None

    def like(self, column: Token, value: Token) -> str:
        """A column of texts compared with a pattern."""
        kind = self.columns[column.text]
        if kind != "text":
            wanted = "a date or an interval: = < <= > >= between" if kind == "date" else "a number"
            raise self.error(value, f"'like' is for texts; '{column.text}' wants {wanted}")
        if value.kind != "text":
            raise self.error(value, f"'{column.text} like' wants a \"text\"")
        pattern = value.text.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_").replace("*", "%")
        return f"{_quoted(column.text)} LIKE {_literal(pattern)}"

    def near(self, node: exp.Expr) -> _Leaf:
        """The great-circle distance of an image from a point, by the haversine formula."""
        function = self.token(node.this)
        if function.kind != "near" or len(node.expressions) != 3:
            raise self.error(function, "expected near(latitude, longitude, distance)")
        if any(self.columns.get(name) not in ("number", "integer") for name in _COORDINATES):
            raise self.error(function, "no image of this index has a latitude and a longitude")
        tokens = [self.token(each) for each in node.expressions]
        latitude, longitude = float(tokens[0].text), float(tokens[1].text)
        for token, value, largest in zip(tokens, (latitude, longitude), (90, 180), strict=False):
            if abs(value) > largest:
                raise self.error(token, f"expected degrees from -{largest} to {largest}")
        unit = tokens[2].text.lower().lstrip("0123456789.").strip()
        metres = float(tokens[2].text[: -len(unit)]) * _UNITS[unit]
        names = [_quoted(name) for name in _COORDINATES]
        # Half of the angle between two points is at most a right one.
        limit = math.sin(min(metres / EARTH_RADIUS / 2, math.pi / 2)) ** 2
        half_squares = [
            f"power(sin(radians(CAST({name} AS DOUBLE) - CAST({value!r} AS DOUBLE)) / 2), 2)"
            for name, value in zip(names, (latitude, longitude), strict=True)
        ]
        scale = f"cos(radians(CAST({names[0]} AS DOUBLE))) * {math.cos(math.radians(latitude))!r}"
        haversine = f"{half_squares[0]} + {scale} * {half_squares[1]}"
        return _Leaf(f"{haversine} <= {limit!r}", _COORDINATES)


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _time_sql(name: str, sign: str, interval: DateInterval, literal: Callable[[datetime], str]) -> str:
    """A comparison with an interval: `=` is within, `<` before, `>` after."""
    from_start = f"{name} >= {literal(interval.start)}"
    before_start = f"{name} < {literal(interval.start)}"
    # Nothing comes after the last interval.
    until_end = f"{name} < {literal(interval.end)}" if interval.end else f"{name} IS NOT NULL"
    after_end = f"{name} >= {literal(interval.end)}" if interval.end else "FALSE"
    return {
        "=": f"({from_start} AND {until_end})", "!=": f"({before_start} OR {after_end})", "<": before_start,
        "<=": until_end, ">": after_end, ">=": from_start,
    }[sign]  # fmt: skip


def _number_sql(column: str, sign: str, number: Decimal) -> str:
    """A comparison of numbers that the database takes, whatever numbers the column holds.

    It refuses a literal that the column's type cannot hold: a fraction or a large number beside whole ones. These are
    compared as floating point, in which all that a column of 32 bits holds is exact.
    """
    largest = Decimal(2) ** (31 if column in _INT32_COLUMNS else 63)
    if number == number.to_integral_value() and -largest < number < largest:
        return f"{_quoted(column)} {sign} {int(number)}"
    floating = max(-_MAX_FLOAT, min(_MAX_FLOAT, float(number)))
    return f"CAST({_quoted(column)} AS DOUBLE) {sign} {floating!r}"
