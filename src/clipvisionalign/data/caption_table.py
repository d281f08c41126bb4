"""`CaptionTable`, which readers fill row by row: images with their captions, and the rows that are left out."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import SPLITS, CaptionedImage, CaptionedImages, DataError, Problem
from clipvisionalign.data.captions import MISSING_VALUES, parse_captions
from clipvisionalign.data.image_entries import ImageEntry, split_by_group
from clipvisionalign.data.image_names import MissingFiles, NameResolver, ResolvedName, clean_name
from clipvisionalign.data.split_file import split_file_path
from clipvisionalign.data.splits import HASH_RULE, SPLIT_RULE, canonical_split, read_split_file
from clipvisionalign.data.text_files import decode

#: Names by which a JSON file is read that is named itself, of every layout in one JSON file.
_READABLE_JSON = re.compile(r"dataset.*|captions_.*|data_captions")
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass
class CaptionTable:
    """Gathers captions by image, as a reader of a layout finds them row by row.

    Each row of a file is one call: `add_row`, or `skip_row` for one that cannot be read. `rows` counts all of them, and
    each is read or left out by a problem.

    Args:
        source: The data set: a folder or a file.
        layout: Name of its layout.
        folders: Where images are looked for; by default in `source`, or beside it where it is a file.
        split_rule: Number of the rule for images without a split, see `data/splits.py`.
        problems: The rows that were left out or mended, and warnings.
        notes: What was ignored that is no row.
        rows: Number of rows, read or left out.
        class_names: Of class folders, the name of each by its folder; identities are these folders, as spelled.
        files_read: The files that rows were read from.
        split_lists: By a name that a list gives: the split and the list.
    """

    source: Path
    layout: str
    folders: Sequence[Path] = ()
    split_rule: int = SPLIT_RULE
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    class_names: dict[str, str] = field(default_factory=dict)
    files_read: set[Path] = field(default_factory=set)
    split_lists: dict[str, tuple[str, str]] = field(default_factory=dict)
    _entries: dict[str, ImageEntry] = field(default_factory=dict)
    _resolved: dict[tuple[str, tuple[Path, ...]], ResolvedName] = field(default_factory=dict)
    _used_names: set[str] = field(default_factory=set)
    _missing: list[tuple[ImageEntry, Sequence[Path]]] = field(default_factory=list)
    _missing_files: MissingFiles = field(default_factory=MissingFiles)
    _resolver: NameResolver = field(init=False)

    def __post_init__(self) -> None:
        self.folders = list(self.folders) or [self.source if self.source.is_dir() else self.source.parent]
        self._resolver = NameResolver(self.folders)

    def report(self, kind: str, location: str, message: str, effect: str = "left out", rows: int = 0) -> None:
        """Add a problem.

        Args:
            kind: A short name that problems of a kind share, such as "empty caption".
            location: File and line, or the image.
            message: What is wrong, as a sentence.
            effect: "left out", "mended" or "warning".
            rows: Number of rows that it leaves out.
        """
        self.problems.append(Problem(kind, location, message, effect, rows))

    def skip_row(self, kind: str, location: str, message: str) -> None:
        """Count a row that is left out, and add the problem.

        Args:
            kind: A short name that problems of a kind share.
            location: File and line.
            message: What is wrong with the row, as a sentence.
        """
        self.rows += 1
        self.report(kind, location, message, rows=1)

    def add_row(
        self, name: Any, captions: Any, location: str, *, split: Any = None, identity: Any = None, group: Any = None,
        image: bytes | None = None, folders: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        """Add a row: captions of an image.

        Args:
            name: The image's name or path, as it is written.
            captions: Its captions, in any form that `parse_captions` takes.
            location: File and line, for messages.
            split: The image's split, as it is written; empty for none.
            identity: The person or object that the image shows; empty for none.
            group: What keeps images within one split; empty for none.
            image: The image's bytes, where the row has them.
            folders: Where this image is looked for, instead of the table's folders.

        Raises:
            DataError: An earlier row has another split, identity or group of this image.
        """
        entry = self._entry(name, location, image, folders)
        if entry is None:
            return
        self.rows += 1
        for attribute, value in (
            ("split", canonical_split(split)),
            ("identity", identity if self.class_names else _attribute_text(identity)),
            ("group", _attribute_text(group)),
        ):
            if value:
                entry.set_attribute(attribute, value, location, self.source)
        texts, failures = parse_captions(captions)
        for index, reason in enumerate(failures):
            if texts:
                self.report("empty caption", location, f"{reason} among those for {entry.name}", "mended")
            else:
                # The first one stands for the row, of which nothing is left.
                self.report("empty caption", location, f"{reason} for {entry.name}", rows=int(index == 0))
        entry.row_count += bool(texts)
        for text in texts:
            self._add_caption(entry, text, location)

    def _add_caption(self, entry: ImageEntry, text: str, location: str) -> None:
        if _LONE_SURROGATES.search(text):
            text = _LONE_SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
        if "\N{REPLACEMENT CHARACTER}" in text:
            self.report("broken encoding", location, f"undecodable characters in '{text[:60]}'", "warning")
        if text.lower() in MISSING_VALUES:
            self.report("odd caption", location, f"the caption of {entry.name} is the word '{text}'", "warning")
        if text in entry.captions:
            # Kept all the same: a gallery has all of its captions, or its figures compare with nobody's.
            self.report("duplicate row", location, f"{entry.name} has the caption '{text[:60]}' already", "warning")
        entry.captions.append(text)

    def _entry(self, name: Any, location: str, image: bytes | None, folders: Sequence[Path]) -> ImageEntry | None:
        """The image that a row is about; None, and the row is left out, where it names none."""
        text = _cell_text(name) or ""
        if image is not None:
            return self._embedded_entry(text, location, image)
        if not text:
            self.skip_row("no image name", location, "the row names no image")
            return None
        cache_key = (text, tuple(folders))
        if cache_key not in self._resolved:
            try:
                self._resolved[cache_key] = self._resolver.resolve(text, folders)
            except ValueError:
                self.skip_row("no image name", location, f"what cannot be a file's name: {text[:60]!r}")
                return None
        resolved = self._resolved[cache_key]
        entry = self._entries.get(resolved.key)
        if entry is None:
            root = self.folders[0]
            relative = resolved.path.relative_to(root) if resolved.path.is_relative_to(root) else resolved.path
            # The folder may be moved; an absolute path would not stay.
            unique_name = self._unique_name(
                relative.as_posix() if os.path.isabs(text) else clean_name(text), relative.as_posix()
            )
            entry = self._entries[resolved.key] = ImageEntry(unique_name, resolved.path, location, text)
            search_folders = list(folders) or self.folders
            if resolved.exists:
                self._missing_files.add(text, resolved.path, search_folders)
            else:
                self._missing.append((entry, search_folders))
        if resolved.difference and text not in entry.names:
            message = f"'{text}' is read as {resolved.path}, which differs in {resolved.difference}"
            self.report("name spelled otherwise", location, message, "mended")
        entry.names |= {text, clean_name(text)}
        return entry

    def _embedded_entry(self, name: str, location: str, image: bytes) -> ImageEntry:
        """An image that a row holds itself, known by its bytes."""
        digest = hashlib.sha256(image).hexdigest()
        entry = self._entries.get(f"bytes {digest}")
        if entry is None:
            path = Path(clean_name(name))
            if path.name in ("", ".."):
                # No path, or that of a folder.
                path = Path(f"image-{digest[:12]}")
            unique_name = self._unique_name(path.as_posix(), path.with_stem(f"{path.stem}-{digest[:12]}").as_posix())
            entry = self._entries[f"bytes {digest}"] = ImageEntry(unique_name, image, location, name or location)
        entry.names |= {name, clean_name(name)} if name else {location}
        return entry

    def expect_names(self, names: Iterable[str]) -> None:
        """Announce the names of all rows to come, see `NameResolver.expect_names`.

        Args:
            names: The names, as they are written.
        """
        self._resolver.expect_names(names)

    def has_file(self, name: str) -> bool:
        """Whether a name stands for a file that exists.

        Args:
            name: The name, as it is written.

        Returns:
            Whether it does.
        """
        try:
            return self._resolver.resolve(name).exists
        except ValueError:
            return False

    def _unique_name(self, *names: str) -> str:
        """The first of some names that no other image has."""
        numbered = (f"{names[0]} ({number})" for number in count(2))
        unique_name = next(name for name in chain(names, numbered) if name not in self._used_names)
        self._used_names.add(unique_name)
        return unique_name

    def add_split_list(self, names: Iterable[str], split: str, location: str) -> None:
        """Add a list of the images of one split, which is applied when the table is finished.

        Args:
            names: The names on the list.
            split: The split.
            location: The list's file, for messages.

        Raises:
            DataError: A name is on the list of another split as well.
        """
        for name in names:
            previous = self.split_lists.setdefault(clean_name(name), (split, location))
            if previous[0] != split:
                raise DataError(
                    f"{self.source}: {name} is in the split '{split}' by {location}, and in '{previous[0]}' "
                    f"by {previous[1]}: "
                    "an image stands in one split"
                )

    def report_unread(self, paths: Iterable[Path]) -> None:
        """Add a warning for each file that may hold captions and of which no row was read.

        There is none where `source` is a file: a file that is named is read alone.

        Args:
            paths: Such files.
        """
        if not self.source.is_dir():
            return
        for path in sorted(set(paths) - self.files_read):
            location = path.relative_to(self.source).as_posix() if path.is_relative_to(self.source) else str(path)
            read = next((file.name for file in sorted(self.files_read)), "what is read")
            hint = "to read it, name it instead of the folder"
            if path.suffix.lower() == ".json" and not _READABLE_JSON.fullmatch(path.stem):
                hint = (
                    "a JSON file is read by its name: data_captions.json (RSTPReid), dataset_*.json (Karpathy) or "
                    "captions_*.json (COCO); one object a line is read from a .jsonl file"
                )
            message = f"lies beside {read}, and no row of it is read; {hint}"
            self.report("file not read", location, message, "warning")

    def note(self, text: str) -> None:
        """Add a note on what was ignored and is no row.

        Args:
            text: The note.
        """
        self.notes.append(text)

    def finish(self) -> CaptionedImages:
        """Assign splits and make the data set.

        Returns:
            The data set; images without a caption or a split are problems of it.

        Raises:
            DataError: No image is left, or sources of splits contradict each other.
        """
        for entry, folders in self._missing:
            entry.image = self._missing_files.path(entry.name_as_written, folders)
        self._apply_split_lists()
        entries = []
        for entry in self._entries.values():
            if entry.captions:
                entries.append(entry)
            else:
                self.report("no captions", entry.name, "the image has no caption left")
        official = any(entry.get("split") for entry in self._entries.values())
        by_file = self._apply_split_file(entries, official)
        if not official:
            split_by_group(entries, self.split_rule, by_class=bool(self.class_names))
        official = official or by_file
        rows = []
        for entry in entries:
            split, why = entry.attributes.get("split", ("", "no split is given for it"))
            if split not in SPLITS:
                message = f"its split is called '{split}'" if split else why
                self.report(
                    "in no split", entry.name, f"{message}; the splits are {', '.join(SPLITS)}", rows=entry.row_count
                )
                continue
            location = entry.location if isinstance(entry.image, bytes) else ""
            captions = tuple(entry.captions)
            identity, group = entry.get("identity"), entry.get("group")
            rows.append(
                CaptionedImage(entry.name, entry.image, captions, split, identity, location, entry.row_count, group)
            )
        if not rows:
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            raise DataError(f"{self.source}: read as '{self.layout}', it holds no image with a caption{first}")
        return CaptionedImages(
            rows, self.source, self.layout, official, self.problems, rows_in_files=self.rows, notes=self.notes,
            split_rule=SPLIT_RULE if by_file else min(self.split_rule, HASH_RULE), class_names=self.class_names,
        )  # fmt: skip

    def _apply_split_lists(self) -> None:
        """Splits from lists beside the captions."""
        named = {name: entry for entry in self._entries.values() for name in entry.names}
        unknown: Counter[str] = Counter()
        for name, (split, location) in self.split_lists.items():
            entry = named.get(name)
            if entry is None:
                unknown[location] += 1
            else:
                entry.set_attribute("split", split, location, self.source)
        for location, unknown_count in unknown.items():
            self.note(f"{unknown_count:,} names of {location} are of no image with a caption")

    def _apply_split_file(self, entries: Sequence[ImageEntry], official: bool) -> bool:
        """Read the file of `write_splits`, where there is one and the rule uses it; whether it has any entries.

        official: whether the data set has splits of its own, which it may not contradict.
        """
        path = split_file_path(self.source)
        if self.split_rule <= HASH_RULE or path == self.source or not path.is_file():
            return False
        named = {name: entry for entry in entries for name in (*entry.names, entry.name)}
        unknown = []
        for name, (split, location) in read_split_file(path).items():
            entry = named.get(name) or named.get(clean_name(name)) or self._entries.get(self._file_key(name))
            if entry is None:
                unknown.append(name)
            else:
                entry.set_attribute("split", split, location, self.source)
        if unknown:
            self.note(f"{len(unknown):,} names of {path.name} are of no image with a caption, such as {unknown[0]}")
        remaining = sum(entry.get("split") is None for entry in entries)
        fallback_note = (
            f", and by their group or a hash for {remaining:,} images that it lacks"
            if remaining and not official
            else ""
        )
        self.note(f"splits by {path.name}{fallback_note}")
        return True

    def _file_key(self, name: str) -> str:
        try:
            return self._resolver.resolve(name).key
        except ValueError:
            return ""


def _attribute_text(value: Any) -> str | None:
    """The identity of an image, as text, 1.0 as 1; None where it has none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = _cell_text(value)
    return None if text is None or text.lower() in MISSING_VALUES else text


def _cell_text(value: Any) -> str | None:
    """A cell as text; None for an empty one."""
    if isinstance(value, (bytes, bytearray)):
        value = decode(bytes(value)).text
    if value is None or value != value or isinstance(value, (Mapping, list, tuple)):
        return None
    return str(value).strip() or None
