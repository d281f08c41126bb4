"""`ImageEntry`, one image of a `CaptionTable` as its rows are read, and the split of images that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.split_file import SPLIT_FILE
from clipvisionalign.data.splits import HASH_RULE, connected_groups, grouping_keys, hash_split, key_priority


@dataclass
class ImageEntry:
    """An image as far as it is known: its names in the files, its captions, and the sources of its split.

    Args:
        name: The name that the data set has it under, of no other image.
        image: Its file, or its bytes.
        location: File and line of the first row that names it.
        name_as_written: Its name in that row.
        names: All names that rows have for it.
        captions: Its captions, in the order of the rows.
        row_count: Number of rows that captions were read from.
        attributes: By "split", "identity" and "group": the value, and its location.
    """

    name: str
    image: Path | bytes
    location: str
    name_as_written: str
    names: set[str] = field(default_factory=set)
    captions: list[str] = field(default_factory=list)
    row_count: int = 0
    attributes: dict[str, tuple[str, str]] = field(default_factory=dict)

    def get(self, attribute: str) -> str | None:
        """Return an attribute.

        Args:
            attribute: "split", "identity" or "group".

        Returns:
            Its value; None where no row has one.
        """
        return self.attributes.get(attribute, (None, ""))[0]

    def set_attribute(self, attribute: str, value: str, location: str, source: Path) -> None:
        """Set an attribute, which has one value in all rows.

        Args:
            attribute: "split", "identity" or "group".
            value: Its value.
            location: File and line of it.
            source: The data set, for the message.

        Raises:
            DataError: Another row has another value.
        """
        previous = self.attributes.setdefault(attribute, (value, location))
        if previous[0] != value:
            raise DataError(
                f"{source}: {self.name} has the {attribute} '{value}' by {location}, and "
                f"'{previous[0]}' by {previous[1]}: "
                f"an image has one {attribute}"
            )


def split_by_group(entries: Sequence[ImageEntry], split_rule: int, by_class: bool) -> None:
    """Set the split of images that have none: that of others of their group, or one by a hash.

    A group whose images are in two splits has none; its other images get "", with the reason.

    Args:
        entries: All images of the data set, which are changed.
        split_rule: Number of the rule; before `HASH_RULE` a hash of the name decides for each image alone.
        by_class: Whether identities are classes, which are divided between the splits and form no groups.
    """
    if split_rule < HASH_RULE:
        for entry in entries:
            entry.attributes["split"] = (hash_split(entry.name_as_written), "a hash of its name")
        return
    # A class is shared out between the splits; whoever is shown is not.
    keys = [
        grouping_keys(each.name, each.image, each.get("group"), None if by_class else each.get("identity"))
        for each in entries
    ]
    members: dict[int, list[int]] = {}
    for index, group in enumerate(connected_groups(keys)):
        members.setdefault(group, []).append(index)
    for indices in members.values():
        recorded_splits = {split for index in indices if (split := entries[index].get("split"))}
        # Of the strongest kind that anything here has: what is added with it moves nothing.
        strongest = min((key for index in indices for key in keys[index]), key=key_priority)
        split_and_source = (next(iter(recorded_splits)) if recorded_splits else hash_split(strongest), "its group")
        if len(recorded_splits) > 1:
            split_and_source = (
                "",
                f"others of its group stand in {' and '.join(sorted(recorded_splits))} by {SPLIT_FILE}",
            )
        for index in indices:
            entries[index].attributes.setdefault("split", split_and_source)
