"""The captions of a cell of a table, a JSON file or a shard, in any form."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clipvisionalign.data.text_files import decode

#: Names under which captions stand, in a record or as a column.
CAPTION_NAMES = (
    "captions", "caption", "sentences", "sentence", "texts", "text", "descriptions", "description", "comments",
    "comment", "raw", "title",
)  # fmt: skip

#: Words that a program wrote where it had no caption.
MISSING_VALUES = frozenset({"none", "null", "nan", "n/a"})


def parse_captions(value: Any) -> tuple[list[str], list[str]]:
    """The captions that a cell holds, and the reason for each part of it that is none.

    A text, bytes, a list of them (also as JSON, Python or NumPy write it), or records that hold one under a usual name.
    What is written like a list, a record or bytes is never a caption itself. Any white space is one blank.

    Args:
        value: The cell, of any type.

    Returns:
        The captions in their order, and the reasons; an empty cell has one reason.

    >>> parse_captions('["a dog", null]')
    (['a dog'], ['no caption'])
    >>> parse_captions({"raw": "a dog", "tokens": ["a", "dog"]})
    (['a dog'], [])
    >>> parse_captions(17)
    ([], ['int where a text belongs: 17'])
    """
    texts: list[str] = []
    failures: list[str] = []
    _collect(value, texts, failures, 0)
    return texts, failures


def _collect(value: Any, texts: list[str], failures: list[str], depth: int) -> None:
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = decode(bytes(value)).text
    if hasattr(value, "tolist") and not isinstance(value, (str, Mapping, Sequence)):
        value = value.tolist()
    if value is None or (isinstance(value, float) and value != value):
        failures.append("no caption")
    elif isinstance(value, str):
        try:
            inner = parse_literal(value) if depth < 3 else None
        except ValueError as error:
            failures.append(str(error))
            return
        if inner is not None:
            _collect(inner, texts, failures, depth + 1)
            return
        text = " ".join(value.split())
        if text:
            texts.append(text)
        else:
            failures.append("no caption")
    elif isinstance(value, Mapping):
        _collect_record(value, texts, failures, depth)
    elif isinstance(value, Sequence) and depth < 3:
        if not value:
            failures.append("no caption")
        for each in value:
            _collect(each, texts, failures, depth + 1)
    else:
        failures.append(f"{type(value).__name__} where a text belongs: {str(value)[:40]}")


def _collect_record(value: Mapping[Any, Any], texts: list[str], failures: list[str], depth: int) -> None:
    """A record's caption, under the first usual name that holds something; else its tokens."""
    name = next((name for name in ("raw", *CAPTION_NAMES) if value.get(name)), None)
    if name is not None and depth < 3:
        _collect(value[name], texts, failures, depth + 1)
        return
    tokens = value.get("tokens")
    if isinstance(tokens, (list, tuple)) and all(isinstance(token, str) for token in tokens):
        tokens = " ".join(tokens)
    if isinstance(tokens, (str, bytes)) and depth < 3:
        _collect(tokens, texts, failures, 3)
        return
    failures.append("no caption" if name is None else "records within records")


#: What a text that writes a value down begins and ends with.
_LITERAL_FORM = re.compile(r"(\[.*\]|\(.*\)|\{.*\}|(?:np\.|numpy\.)?array\(.*\)|[bB]'.*'|[bB]\".*\")", re.DOTALL)

#: What no caption begins with: a list of texts or of records, whole or cut off.
_LIST_OF_TEXTS = re.compile(r"""(?:(?:np\.|numpy\.)?array\()?\[\s*(?:['"]|\{\s*['"])""")

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>[bBrRuU]{0,2}(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"))|(?P<dtype>,\s*dtype\s*=\s*['"<>\w.]+)"""
    r"""|(?P<name>[A-Za-z_][\w.]*)|(?P<number>[-+]?\d[\d.]*(?:[eE][-+]?\d+)?)|(?P<open>[\[({])|(?P<close>[\])}])"""
    r"""|(?P<mark>[,:]))\s*""",
    re.DOTALL,
)
_LITERAL_NAMES = {
    **dict.fromkeys(("none", "null", "nan", "nat", "na", "<na>"), "None"), "true": "True", "false": "False",
    **dict.fromkeys(("array", "np.array", "numpy.array"), ""),
}  # fmt: skip


def parse_literal(text: str) -> Sequence[Any] | Mapping[Any, Any] | bytes | None:
    """The value that a text writes down: in JSON, as Python does, or as NumPy does, without commas.

    Nothing is evaluated but literals.

    Args:
        text: The text.

    Returns:
        A list, tuple, dict or bytes, a set as a sorted list; None for any other text.

    Raises:
        ValueError: It begins like a list of texts and cannot be parsed.

    >>> parse_literal("['a dog' 'a cat']"), parse_literal("[a dog]"), parse_literal("array(['a dog'], dtype=object)")
    (['a dog', 'a cat'], None, ['a dog'])
    """
    text = text.strip()
    if _LITERAL_FORM.fullmatch(text):
        for parse in (json.loads, _parse_python_literal):
            try:
                value = parse(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
            if isinstance(value, (set, frozenset)):
                value = sorted(value, key=str)
            if isinstance(value, (list, tuple, dict, bytes)):
                return value
    if _LIST_OF_TEXTS.match(text):
        raise ValueError(f"a list that cannot be read: {text[:60]}")
    return None


def _parse_python_literal(text: str) -> Any:
    """A value as Python or NumPy writes it. Raises ValueError, SyntaxError for other text.

    Python joins texts that stand side by side, and NumPy writes a list so: a comma is put between them.
    """
    pieces: list[str] = []
    position, ended = 0, False
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None or token.lastgroup is None:
            raise ValueError("no value")
        position, kind, piece = token.end(), token.lastgroup, token[token.lastgroup]
        if kind == "dtype":
            continue
        if kind == "name":
            piece = _LITERAL_NAMES.get(piece.lower(), "?")
        if kind == "text":
            # A line may end within a text.
            piece = piece.replace("\n", "\\n").replace("\r", "\\r")
        if ended and kind not in ("close", "mark"):
            pieces.append(",")
        pieces.append(piece)
        ended = kind in ("text", "number", "close") or (kind == "name" and bool(piece))
    return ast.literal_eval("".join(pieces))
