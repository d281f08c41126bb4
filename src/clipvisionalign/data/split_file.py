"""The file of splits beside a data set without splits of its own."""

from __future__ import annotations

from pathlib import Path

#: The file beside a data set that assigns images to splits.
SPLIT_FILE = "splits.csv"


def split_file_path(source: Path) -> Path:
    """The file of splits of a data set.

    Args:
        source: The data set, a folder or a file.

    Returns:
        Where readings of the data set look for it, whether it is there or not.
    """
    return (source if source.is_dir() else source.parent) / SPLIT_FILE


def write_splits_command(source: Path) -> str:
    """The command that writes a data set's file of splits.

    Args:
        source: The data set.

    Returns:
        The command in single quotes.
    """
    return f"'clipvisionalign check {source} --write-splits {split_file_path(source)}'"
