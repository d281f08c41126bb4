"""The tokens of a filter, each allowed by what stands before it.

A table of states has, for each point of a comparison, which kinds of tokens may follow. Whatever else stands there is
refused at its position, so that comments, semicolons, sub-queries and functions never become tokens.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from clipvisionalign.search.filters.dates import DATE_FORMS
from clipvisionalign.search.filters.errors import FilterError, error_at

#: Parentheses and `not` that may stand within each other.
MAX_DEPTH = 16


@dataclass(frozen=True)
class Token:
    """One token of a filter.

    Attributes:
        kind: A keyword, a sign of punctuation, or "name", "sign", "text", "number", "date", "distance".
        text: The name of the column, the sign, or the value without its quotes.
        start: Index of its first character.
    """

    kind: str
    text: str
    start: int


@dataclass(frozen=True)
class _State:
    """What may follow at one point: the next state by the kind of a token, and what a message calls it."""

    following: Mapping[str, str]
    expected: str


_VALUES = ("text", "number", "date")
_VALUE_TEXT = 'a number, a date or a "text" in quotes'


def _then(kinds: tuple[str, ...], state: str) -> dict[str, str]:
    return dict.fromkeys(kinds, state)


_STATES = {
    "operand": _State(
        {"name": "operator", "not": "operand", "(": "operand", "near": "near"}, "a column, not, '(' or near(...)"
    ),
    "operator": _State(
        _then(("sign", "like"), "value") | {"in": "in", "between": "low", "is": "is", "not": "negated"},
        "= != < <= > >= like, in (...), between or is null",
    ),
    "negated": _State({"like": "value", "in": "in", "between": "low"}, "like, in (...) or between"),
    "value": _State(_then(_VALUES, "end"), _VALUE_TEXT),
    "low": _State(_then(_VALUES, "bounds"), _VALUE_TEXT),
    "bounds": _State({"and": "value"}, "and, with the upper bound"),
    "in": _State({"(": "member"}, "'(' and the values"),
    "member": _State(_then(_VALUES, "members"), _VALUE_TEXT),
    "members": _State({",": "member", ")": "end"}, "',' or ')'"),
    "is": _State({"null": "end", "not": "is not"}, "null or not null"),
    "is not": _State({"null": "end"}, "null"),
    "near": _State({"(": "latitude"}, "'('"),
    "latitude": _State({"number": "to longitude"}, "a latitude in degrees"),
    "to longitude": _State({",": "longitude"}, "',' and the longitude"),
    "longitude": _State({"number": "to distance"}, "a longitude in degrees"),
    "to distance": _State({",": "distance"}, "',' and the distance"),
    "distance": _State({"distance": "near end"}, "a distance with its unit: 20km, 500m or 3mi"),
    "near end": _State({")": "end"}, "')'"),
    "end": _State({"and": "operand", "or": "operand", ")": "end"}, "and, or, or the end"),
}

_BLANKS = re.compile(r"\s*")
_NAME = re.compile(r"""[^\s=!<>"'`(),;]+""")
_QUOTED_NAME = re.compile(r"`((?:[^`]|``)+)`(?!`)")
_SIGN = re.compile(r"<>|<=|>=|!=|=|<|>")
_QUOTED_TEXT = re.compile(r""""((?:[^"]|"")*)"|'((?:[^']|'')*)\'""")
_DATE = re.compile(
    r"[0-9]{4}-[0-9]{2}(?:-[0-9]{2}(?:[Tt][0-9]{2}(?::[0-9]{2}(?::[0-9]{2})?)?)?)?(?![0-9:-])"
)  # fmt: skip
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_TIME = re.compile(r"[0-9]{1,2}:[0-9]{2}")
#: What is meant for a date, whether it is one or not.
_DATE_LIKE = re.compile(r"[0-9]{4}-[0-9]|[0-9]{1,4}/[0-9]")
_DISTANCE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(km|mi|m)\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+")
_KEYWORDS = ("and", "or", "not", "in", "like", "between", "is", "null")
#: What stands behind the name of a column that is called as a keyword.
_COMPARED = re.compile(r"\s*(?:[=!<>]|like\b)", re.IGNORECASE)


def tokenize(text: str, columns: Mapping[str, str]) -> list[Token]:
    """The tokens of a filter, in an order that the parser takes.

    Args:
        text: The filter.
        columns: The columns, and what they hold.

    Returns:
        The tokens; those of the kind "name" have the name of a column.

    Raises:
        FilterError: Something stands where it must not.

    >>> [token.kind for token in tokenize("a = 1 or b in (2, 3)", {"a": "number", "b": "number"})]
    ['name', 'sign', 'number', 'or', 'name', 'in', '(', 'number', ',', 'number', ')']
    """
    tokens: list[Token] = []
    state, position = "operand", 0
    # How many `not` stand directly before what is open, for each open parenthesis.
    nested = [0]
    while True:
        position = _BLANKS.match(text, position).end()  # type: ignore[union-attr]
        if position == len(text):
            if state == "end" and len(nested) == 1:
                return tokens
            raise _expected(text, position, state, len(nested) > 1, columns)
        token, end = _next_token(text, position, state, columns)
        following = _STATES[state].following.get(token.kind)
        if following is None or (state == "end" and token.kind == ")" and len(nested) == 1):
            raise _expected(text, position, state, len(nested) > 1, columns)
        if state == "operand" and token.kind in ("not", "("):
            nested = [*nested[:-1], nested[-1] + 1] if token.kind == "not" else [*nested, 0]
            if len(nested) - 1 + sum(nested) > MAX_DEPTH:
                raise error_at(text, position, f"more than {MAX_DEPTH} parentheses and not within each other", columns)
        elif state == "end" and token.kind == ")":
            nested.pop()
        if following == "end":
            nested[-1] = 0
        tokens.append(token)
        state, position = following, end


def _expected(text: str, position: int, state: str, is_open: bool, columns: Mapping[str, str]) -> FilterError:
    """The error of a filter that continues otherwise than its state allows."""
    expected = _STATES[state].expected
    if state == "end" and is_open:
        expected = "and, or, or ')'"
    word = _WORD.match(text, position)
    hint = ""
    if state in ("value", "low", "member") and word:
        hint = f': a text is quoted, "{word[0]}"'
    elif state == "end" and _TIME.match(text, position):
        hint = f": a date with its time is quoted; it is written {DATE_FORMS}"
    elif state == "operand" and text[position : position + 1] in ('"', "'"):
        hint = ": a comparison begins with its column; one with an unusual name is quoted by ``"
    return error_at(text, position, f"expected {expected}{hint}", columns)


def _next_token(text: str, position: int, state: str, columns: Mapping[str, str]) -> tuple[Token, int]:
    """The token at a position, and where it ends; its kind is "" where there is none."""
    character = text[position]
    if character in "(),":
        return Token(character, character, position), position + 1
    if state == "operand":
        return _operand_token(text, position, columns)
    if match := _SIGN.match(text, position):
        return Token("sign", match[0], position), match.end()
    if match := _QUOTED_TEXT.match(text, position):
        value = match[0][1:-1].replace(match[0][0] * 2, match[0][0])
        if any("\ud800" <= each <= "\udfff" for each in value):
            raise error_at(text, position, "half of a pair of surrogates is no text", columns)
        return Token("text", value, position), match.end()
    if character in "\"'":
        raise error_at(text, position, f"no {character} ends this text", columns)
    kinds = {"distance": (("distance", _DISTANCE),)}.get(state, (("date", _DATE), ("number", _NUMBER)))
    if state in ("value", "low", "member") and _DATE_LIKE.match(text, position) and not _DATE.match(text, position):
        raise error_at(text, position, f"a date is written {DATE_FORMS}", columns)
    for kind, pattern in kinds:
        if match := pattern.match(text, position):
            return Token(kind, match[0], position), match.end()
    match = re.compile(r"\w+").match(text, position)
    word = match[0].lower() if match else ""
    return Token(word if word in _KEYWORDS else "", word, position), position + len(word)


def _operand_token(text: str, position: int, columns: Mapping[str, str]) -> tuple[Token, int]:
    """The token with which a comparison begins: the name of a column, `not`, or `near`.

    A keyword is the name of a column where that exists and a sign follows: nothing else begins so.

    Raises:
        FilterError: There is no such column.
    """
    quoted = _QUOTED_NAME.match(text, position)
    match = quoted or _NAME.match(text, position)
    if match is None:
        return Token("", "", position), position
    written = match[1].replace("``", "`") if quoted else match[0]
    folded = unicodedata.normalize("NFC", written.lower())
    name = next((each for each in (folded, written) if each in columns), None)
    word = written.lower()
    if word == "not" and not quoted and not (name and _COMPARED.match(text, match.end())):
        return Token("not", written, position), match.end()
    if word == "near" and not quoted and text[match.end() :].lstrip().startswith("("):
        return Token("near", written, position), match.end()
    if name is None:
        if not quoted and word[0].isdecimal():
            raise _expected(text, position, "operand", False, columns)
        if not quoted and text[match.end() :].lstrip().startswith("("):
            raise error_at(text, position, "no function but near(latitude, longitude, distance) is known", columns)
        close = difflib.get_close_matches(folded, columns, 1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise error_at(text, position, f"no column {folded[:60]!r}{hint}", columns)
    return Token("name", name, position), match.end()
