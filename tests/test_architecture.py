"""Bounds on the size of files and functions in src/."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "clipvisionalign"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80


def sources() -> Iterator[tuple[str, str]]:
    """Every file of the package: path within it, and its text."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")


def function_lengths(text: str) -> dict[str, int]:
    """Lines of each function from its `def` to its end, without decorators."""
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {f"{node.name}, line {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}


def test_no_file_is_longer_than_its_bound():
    longest = [
        f"{name}: {lines} lines" for name, text in sources() if (lines := len(text.splitlines())) > MAX_FILE_LINES
    ]
    assert not longest, "\n".join(longest)


def test_no_function_is_longer_than_its_bound():
    longest = [
        f"{name}: {function}: {lines} lines"
        for name, text in sources()
        for function, lines in function_lengths(text).items()
        if lines > MAX_FUNCTION_LINES
    ]
    assert not longest, "\n".join(longest)


def test_lengths_are_counted_to_the_last_line():
    text = "@decorator\ndef outer():\n    def inner():\n        return 1\n\n    return inner\n"
    assert function_lengths(text) == {"outer, line 2": 5, "inner, line 3": 2}
