"""Tables of figures that fit the terminal's width."""

from __future__ import annotations


def print_by_width(title: str, labels: tuple[str, list[str]], columns: list[tuple[str, list[str]]]) -> None:
    """Print columns of figures beside their labels, in as many tables as it takes to break no cell.

    Args:
        title: What stands above the first table.
        labels: Header and cells of the first column of every table.
        columns: Header and cells of every other column; a header is broken between its words.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def width(header: str, cells: list[str]) -> int:
        # A space on both sides, and a line.
        return max(map(len, [*header.split(" "), *cells])) + 3

    console = Console()
    tables: list[list[tuple[str, list[str]]]] = [[]]
    for column in columns:
        used = 1 + width(*labels) + sum(width(*each) for each in [*tables[-1], column])
        if tables[-1] and used > console.width:
            tables.append([])
        tables[-1].append(column)
    for number, group in enumerate(tables):
        table = Table(title=None if number else Text(title), title_justify="left")
        table.add_column(labels[0])
        for header, _ in group:
            table.add_column(Text(header), justify="right")
        for row in zip(labels[1], *(cells for _, cells in group), strict=True):
            table.add_row(*row)
        console.print(table)
