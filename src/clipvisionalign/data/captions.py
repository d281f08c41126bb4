"""A cell's captions, whatever form a table, a JSON file or a shard gives them."""

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
NO_TEXT = frozenset({"none", "null", "nan", "n/a"})


def caption_texts(value: Any) -> tuple[list[str], list[str]]:
    """The captions that a cell holds, and for each part of it that is none why.

    A text, bytes, a list of them (also written as JSON, Python or NumPy writes it), or records that hold one under a
    usual name. What is written like a list, a record or bytes is never a caption itself. White
    space is one blank; an empty text is none.

    >>> caption_texts('["a dog", null]')
    (['a dog'], ['no caption'])
    >>> caption_texts({"raw": "a dog", "tokens": ["a", "dog"]})
    (['a dog'], [])
    >>> caption_texts(17)
    ([], ['int where a text belongs: 17'])
    """
    texts: list[str] = []
    wrong: list[str] = []
    _collect(value, texts, wrong, 0)
    return texts, wrong


def _collect(value: Any, texts: list[str], wrong: list[str], depth: int) -> None:
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = decode(bytes(value)).text
    if hasattr(value, "tolist") and not isinstance(value, (str, Mapping, Sequence)):
        value = value.tolist()
    if value is None or (isinstance(value, float) and value != value):
        wrong.append("no caption")
    elif isinstance(value, str):
        try:
            inner = written_value(value) if depth < 3 else None
        except ValueError as error:
            wrong.append(str(error))
            return
        if inner is not None:
            _collect(inner, texts, wrong, depth + 1)
            return
        text = " ".join(value.split())
        if text:
            texts.append(text)
        else:
            wrong.append("no caption")
    elif isinstance(value, Mapping):
        _collect_record(value, texts, wrong, depth)
    elif isinstance(value, Sequence) and depth < 3:
        if not value:
            wrong.append("no caption")
        for each in value:
            _collect(each, texts, wrong, depth + 1)
    else:
        wrong.append(f"{type(value).__name__} where a text belongs: {str(value)[:40]}")


def _collect_record(value: Mapping[Any, Any], texts: list[str], wrong: list[str], depth: int) -> None:
    """A record's caption, under the first usual name that holds something; else its tokens."""
    name = next((name for name in ("raw", *CAPTION_NAMES) if value.get(name)), None)
    if name is not None and depth < 3:
        _collect(value[name], texts, wrong, depth + 1)
        return
    tokens = value.get("tokens")
    if isinstance(tokens, (list, tuple)) and all(isinstance(token, str) for token in tokens):
        tokens = " ".join(tokens)
    if isinstance(tokens, (str, bytes)) and depth < 3:
        _collect(tokens, texts, wrong, 3)
        return
    wrong.append("no caption" if name is None else "records within records")


#: What a text that writes a value down begins and ends with.
_WRITTEN = re.compile(r"(\[.*\]|\(.*\)|\{.*\}|(?:np\.|numpy\.)?array\(.*\)|[bB]'.*'|[bB]\".*\")", re.DOTALL)

#: What no caption begins with: a list of texts or of records, whole or cut off.
_LIST_OF_TEXTS = re.compile(r"""(?:(?:np\.|numpy\.)?array\()?\[\s*(?:['"]|\{\s*['"])""")

_TOKEN = re.compile(
    r"""\s*(?:(?P<text>[bBrRuU]{0,2}(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+"))|(?P<dtype>,\s*dtype\s*=\s*['"<>\w.]+)"""
    r"""|(?P<name>[A-Za-z_][\w.]*)|(?P<number>[-+]?\d[\d.]*(?:[eE][-+]?\d+)?)|(?P<open>[\[({])|(?P<close>[\])}])"""
    r"""|(?P<mark>[,:]))\s*""",
    re.DOTALL,
)
_NAMES = {
    **dict.fromkeys(("none", "null", "nan", "nat", "na", "<na>"), "None"), "true": "True", "false": "False",
    **dict.fromkeys(("array", "np.array", "numpy.array"), ""),
}  # fmt: skip


def written_value(text: str) -> Sequence[Any] | Mapping[Any, Any] | bytes | None:
    """The list, record or bytes that a text writes down: in JSON, as Python does, or as NumPy does, without commas.
    None for other text. Raises ValueError for the beginning of a list of texts that cannot be read.

    >>> written_value("['a dog' 'a cat']"), written_value("[a dog]"), written_value("array(['a dog'], dtype=object)")
    (['a dog', 'a cat'], None, ['a dog'])
    """
    text = text.strip()
    if _WRITTEN.fullmatch(text):
        for read in (json.loads, _literal):
            try:
                found = read(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                continue
            if isinstance(found, (set, frozenset)):
                found = sorted(found, key=str)
            if isinstance(found, (list, tuple, dict, bytes)):
                return found
    if _LIST_OF_TEXTS.match(text):
        raise ValueError(f"a list that cannot be read: {text[:60]}")
    return None


def _literal(text: str) -> Any:
    """A value as Python or NumPy writes it. Raises ValueError, SyntaxError for other text.

    Python joins texts that stand side by side, and NumPy writes a list so: a comma is put between them.
    """
    parts: list[str] = []
    place, ended = 0, False
    while place < len(text):
        token = _TOKEN.match(text, place)
        if token is None or token.lastgroup is None:
            raise ValueError("no value")
        place, kind, piece = token.end(), token.lastgroup, token[token.lastgroup]
        if kind == "dtype":
            continue
        if kind == "name":
            piece = _NAMES.get(piece.lower(), "?")
        if kind == "text":
            # A line may end within a text.
            piece = piece.replace("\n", "\\n").replace("\r", "\\r")
        if ended and kind not in ("close", "mark"):
            parts.append(",")
        parts.append(piece)
        ended = kind in ("text", "number", "close") or (kind == "name" and bool(piece))
    return ast.literal_eval("".join(parts))
