"""A cell's captions, whatever form a table, a JSON file or a shard gives them."""

from __future__ import annotations

import ast
import json
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

    A text, bytes, a list of them (also written as JSON or as Python writes it), or records that hold one under a usual
    name. White space is one blank; an empty text is none.

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
        inner = _as_list(value) if depth < 3 else None
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
    if isinstance(tokens, Sequence) and tokens and all(isinstance(token, str) for token in tokens):
        texts.append(" ".join(tokens))
        return
    wrong.append("no caption" if name is None else "records within records")


def _as_list(text: str) -> list[Any] | None:
    """The list that a text writes down, in JSON or as Python does: of texts or records, one at least; else None."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and any(isinstance(each, (str, dict)) for each in found):
            return found
    return None
