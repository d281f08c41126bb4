"""A griffe extension: the examples of a docstring, lines that begin with `>>>`, are shown as code."""

from __future__ import annotations

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Fences paragraphs of examples, which Markdown would take for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is None or ">>>" not in obj.docstring.value:
            return
        lines: list[str] = []
        inside = False
        for line in obj.docstring.value.splitlines():
            if not inside and line.lstrip().startswith(">>>"):
                lines += ["", "```pycon"]
                inside = True
            elif inside and not line.strip():
                lines.append("```")
                inside = False
            lines.append(line.strip() if inside and line.lstrip().startswith(">>>") else line)
        obj.docstring.value = "\n".join([*lines, *(["```"] if inside else [])])
