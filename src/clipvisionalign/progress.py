"""A live line with an ETA for whatever may take more than two seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], what: str, total: int, shown: bool = True) -> Iterator[T]:
    """Go through `items` with a live line on standard error; silent where that is no terminal, or not `shown`."""
    if not shown:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, what, total, transient=True, console=console, disable=not console.is_terminal)
