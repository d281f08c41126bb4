"""Which columns of a table hold images, captions, splits and identities, by their usual names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.captions import CAPTION_NAMES

#: The columns' usual names, the first that is there counts.
IMAGE_COLUMNS = ("image", "file_name", "filename", "image_path", "path", "filepath", "image_name", "img", "file")

CAPTION_COLUMNS = CAPTION_NAMES

SPLIT_COLUMNS = ("split", "partition", "set")

IDENTITY_COLUMNS = ("identity", "person_id", "pid")

#: Columns that hold a caption each, such as caption_1 to caption_5.
_NUMBERED = re.compile(r"(captions?|sentences?|texts?|descriptions?|comments?)[ _.-]?\d+")


def find_column(names: Iterable[str], candidates: Iterable[str]) -> str | None:
    """The first candidate that is among the names, ignoring case.

    Args:
        names: Names of the columns of a table.
        candidates: Names to look for, in order of preference.

    Returns:
        The name as the table has it; None if there is none.

    >>> find_column(["Image", "Text"], ["file_name", "image"])
    'Image'
    """
    folded: dict[str, str] = {}
    for name in names:
        folded.setdefault(str(name).strip().lower(), name)
    return next((folded[candidate] for candidate in candidates if candidate in folded), None)


def caption_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The columns that hold captions: the first of the usual names, and numbered ones.

    Args:
        names: Names of the columns of a table.

    Returns:
        Their names.

    >>> caption_columns(["image", "caption_0", "caption_1", "url"])
    ('caption_0', 'caption_1')
    """
    names = list(names)
    first = find_column(names, CAPTION_COLUMNS)
    numbered = [name for name in names if _NUMBERED.fullmatch(str(name).strip().lower()) and name != first]
    return tuple([first] if first else []) + tuple(numbered)


@dataclass(frozen=True)
class TableColumns:
    """Which columns of a table hold what.

    Attributes:
        images: Columns that may name or hold images, in order of preference.
        captions: Columns each of which holds captions.
        split: Column of splits; "" for none.
        identity: Column of identities; "" for none.
        group: Column whose values are kept within one split; "" for none.
    """

    images: tuple[str, ...]
    captions: tuple[str, ...]
    split: str = ""
    identity: str = ""
    group: str = ""

    @classmethod
    def detect(cls, names: Sequence[str], path: Path, group: str = "") -> TableColumns:
        """Detect columns by their usual names.

        Args:
            names: Names of the columns.
            path: The table, for messages.
            group: Column whose values are kept within one split; "" for none.

        Returns:
            The columns.

        Raises:
            DataError: There is no column of images, of captions, or of that group; the message names the columns that
                are there.

        >>> TableColumns.detect(["Image", "caption_1", "caption_2"], Path("a.csv")).captions
        ('caption_1', 'caption_2')
        """
        folded = {str(name).strip().lower(): name for name in reversed(names)}
        images = tuple(folded[each] for each in IMAGE_COLUMNS if each in folded)
        captions = caption_columns(names)
        for kind, matches, expected in (
            ("image", images, IMAGE_COLUMNS),
            ("caption", captions, CAPTION_COLUMNS),
        ):
            if not matches:
                available = ", ".join(str(name) for name in names if str(name))
                raise DataError(
                    f"{path}: no {kind} column (one of: {', '.join(expected)}); its columns are: {available}"
                )
        if group and group not in names:
            raise DataError(f"{path}: no column '{group}' to group by; its columns are: {', '.join(map(str, names))}")
        return cls(
            images, captions, find_column(names, SPLIT_COLUMNS) or "",
            find_column(names, IDENTITY_COLUMNS) or "", group,
        )  # fmt: skip

    @property
    def used(self) -> tuple[str, ...]:
        """The columns that something is read from, each once."""
        columns = (*self.images, *self.captions, self.split, self.identity, self.group)
        return tuple(dict.fromkeys(name for name in columns if name))

    def unused(self, names: Iterable[str]) -> list[str]:
        """The columns that nothing is read from.

        Args:
            names: Names of the table's columns.

        Returns:
            Those of them.
        """
        return [str(name) for name in names if name not in self.used and str(name)]
