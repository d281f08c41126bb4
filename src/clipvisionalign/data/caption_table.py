"""What every reader fills, one row of a file at a time: `CaptionTable` gathers images, and lists what it leaves out."""

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
from clipvisionalign.data.captions import NO_TEXT, caption_texts
from clipvisionalign.data.names import NameResolver, ResolvedName, clean_name
from clipvisionalign.data.split_file import SPLIT_FILE, split_file_of
from clipvisionalign.data.splits import (
    HASH_RULE,
    SPLIT_RULE,
    groups_of,
    keys_of,
    read_split_file,
    split_of_name,
    split_word,
    strength,
)
from clipvisionalign.data.text_files import decode

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass
class _Entry:
    """An image as far as it is known: its names in the files, its captions, and who says in which split it stands."""

    name: str
    image: Path | bytes
    place: str
    written: str
    names: set[str] = field(default_factory=set)
    captions: list[str] = field(default_factory=list)
    rows: int = 0
    #: By "split", "identity" and "group": what is said of it, and where.
    said: dict[str, tuple[str, str]] = field(default_factory=dict)

    def get(self, what: str) -> str | None:
        """Its "split", "identity" or "group"; None where nobody says."""
        return self.said.get(what, (None, ""))[0]


@dataclass
class CaptionTable:
    """Gathers captions by image. folders: where images are looked for; split_rule: see `data/splits.py`.

    Each row of a file is one call: `add_row`, or `skip_row` for one that cannot be read; so that `rows` are all there
    are, and each is read or left out by a problem.
    """

    source: Path
    layout: str
    folders: Sequence[Path] = ()
    split_rule: int = SPLIT_RULE
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    #: The files that rows were read from.
    files_read: set[Path] = field(default_factory=set)
    #: By a name that a list gives: the split and the list.
    split_lists: dict[str, tuple[str, str]] = field(default_factory=dict)
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _resolved: dict[tuple[str, tuple[Path, ...]], ResolvedName] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _resolver: NameResolver = field(init=False)

    def __post_init__(self) -> None:
        self.folders = list(self.folders) or [self.source if self.source.is_dir() else self.source.parent]
        self._resolver = NameResolver(self.folders)

    def report(self, kind: str, place: str, message: str, effect: str = "left out", rows: int = 0) -> None:
        """Put one problem on the list."""
        self.problems.append(Problem(kind, place, message, effect, rows))

    def skip_row(self, kind: str, place: str, message: str) -> None:
        """A row that is left out."""
        self.rows += 1
        self.report(kind, place, message, rows=1)

    def add_row(
        self, name: Any, captions: Any, place: str, *, split: Any = None, identity: Any = None, group: Any = None,
        image: bytes | None = None, folders: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        """One row: captions of the image `name`, in any form that `caption_texts` takes.

        image: its bytes, where the row holds them. folders: where this image is looked for, instead of the table's.
        Raises DataError where the row contradicts an earlier one about the image's split or identity.
        """
        entry = self._entry(name, place, image, folders)
        if entry is None:
            return
        self.rows += 1
        for what, value in (("split", split_word(split)), ("identity", _known(identity)), ("group", _known(group))):
            if value:
                self._set(entry, what, value, place)
        texts, wrong = caption_texts(captions)
        for number, reason in enumerate(wrong):
            if texts:
                self.report("empty caption", place, f"{reason} among those for {entry.name}", "mended")
            else:
                # The first one stands for the row, of which nothing is left.
                self.report("empty caption", place, f"{reason} for {entry.name}", rows=int(number == 0))
        entry.rows += bool(texts)
        for text in texts:
            self._add_caption(entry, text, place)

    def _add_caption(self, entry: _Entry, text: str, place: str) -> None:
        if _LONE_SURROGATES.search(text):
            text = _LONE_SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text)
        if "\N{REPLACEMENT CHARACTER}" in text:
            self.report("broken encoding", place, f"undecodable characters in '{text[:60]}'", "warning")
        if text.lower() in NO_TEXT:
            self.report("odd caption", place, f"the caption of {entry.name} is the word '{text}'", "warning")
        if text in entry.captions:
            # Kept all the same: a gallery has all of its captions, or its figures compare with nobody's.
            self.report("duplicate row", place, f"{entry.name} has the caption '{text[:60]}' already", "warning")
        entry.captions.append(text)

    def _entry(self, name: Any, place: str, image: bytes | None, folders: Sequence[Path]) -> _Entry | None:
        """The image that a row is about; None, and the row is left out, where it names none."""
        text = _text_of(name) or ""
        if image is not None:
            return self._embedded(text, place, image)
        if not text:
            self.skip_row("no image name", place, "the row names no image")
            return None
        wanted = (text, tuple(folders))
        if wanted not in self._resolved:
            try:
                self._resolved[wanted] = self._resolver.resolve(text, folders)
            except ValueError:
                self.skip_row("no image name", place, f"what cannot be a file's name: {text[:60]!r}")
                return None
        found = self._resolved[wanted]
        entry = self._entries.get(found.key)
        if entry is None:
            root = self.folders[0]
            below = found.path.relative_to(root) if found.path.is_relative_to(root) else found.path
            # The folder may be moved; an absolute path would not stay.
            known = self._free_name(below.as_posix() if os.path.isabs(text) else clean_name(text), below.as_posix())
            entry = self._entries[found.key] = _Entry(known, found.path, place, text)
        if found.how and text not in entry.names:
            message = f"'{text}' is read as {found.path}, which differs in {found.how}"
            self.report("name spelled otherwise", place, message, "mended")
        entry.names |= {text, clean_name(text)}
        return entry

    def _embedded(self, name: str, place: str, image: bytes) -> _Entry:
        """An image that a row holds itself, known by its bytes."""
        digest = hashlib.sha256(image).hexdigest()
        entry = self._entries.get(f"bytes {digest}")
        if entry is None:
            own = Path(clean_name(name))
            if own.name in ("", ".."):
                # No path, or that of a folder.
                own = Path(f"image-{digest[:12]}")
            known = self._free_name(own.as_posix(), own.with_stem(f"{own.stem}-{digest[:12]}").as_posix())
            entry = self._entries[f"bytes {digest}"] = _Entry(known, image, place, name or place)
        entry.names |= {name, clean_name(name)} if name else {place}
        return entry

    def expect(self, names: Iterable[str]) -> None:
        """The names of all rows to come, see `NameResolver.expect`."""
        self._resolver.expect(names)

    def has_file(self, name: str) -> bool:
        """Whether a name means a file that is there."""
        try:
            return self._resolver.resolve(name).exists
        except ValueError:
            return False

    def _free_name(self, *names: str) -> str:
        """The first of some names that no other image has."""
        more = (f"{names[0]} ({number})" for number in count(2))
        found = next(name for name in chain(names, more) if name not in self._taken)
        self._taken.add(found)
        return found

    def _set(self, entry: _Entry, what: str, value: str, place: str) -> None:
        """What a row says of an image. Raises DataError where another row says otherwise."""
        before = entry.said.setdefault(what, (value, place))
        if before[0] != value:
            raise DataError(
                f"{self.source}: {entry.name} has the {what} '{value}' by {place}, and '{before[0]}' by {before[1]}: "
                f"an image has one {what}"
            )

    def list_splits(self, names: Iterable[str], split: str, place: str) -> None:
        """The names that a list of one split gives. Raises DataError for one that another list has as well."""
        for name in names:
            before = self.split_lists.setdefault(clean_name(name), (split, place))
            if before[0] != split:
                raise DataError(
                    f"{self.source}: {name} is in the split '{split}' by {place}, and in '{before[0]}' by {before[1]}: "
                    "an image stands in one split"
                )

    def report_unread(self, paths: Iterable[Path]) -> None:
        """Of some files that may hold captions, list those of which no row was read. A file that was named itself is
        read alone."""
        if not self.source.is_dir():
            return
        for path in sorted(set(paths) - self.files_read):
            place = path.relative_to(self.source).as_posix() if path.is_relative_to(self.source) else str(path)
            read = next((file.name for file in sorted(self.files_read)), "what is read")
            message = f"lies beside {read}, and no row of it is read; to read it, name it instead of the folder"
            self.report("file not read", place, message, "warning")

    def note(self, text: str) -> None:
        """Something that was passed over, and is no row."""
        self.notes.append(text)

    def finish(self) -> CaptionedImages:
        """The data set. Raises DataError if no image is left."""
        self._read_lists()
        entries = []
        for entry in self._entries.values():
            if entry.captions:
                entries.append(entry)
            else:
                self.report("no captions", entry.name, "the image has no caption left")
        official = any(entry.get("split") for entry in self._entries.values())
        by_file = self._read_split_file(entries, official)
        if not official:
            self._split_by_group(entries)
        official = official or by_file
        rows = []
        for entry in entries:
            split, why = entry.said.get("split", ("", "nothing says in which split it stands"))
            if split not in SPLITS:
                told = f"its split is called '{split}'" if split else why
                self.report("in no split", entry.name, f"{told}; known are {', '.join(SPLITS)}", rows=entry.rows)
                continue
            place = entry.place if isinstance(entry.image, bytes) else ""
            captions = tuple(entry.captions)
            identity, group = entry.get("identity"), entry.get("group")
            rows.append(CaptionedImage(entry.name, entry.image, captions, split, identity, place, entry.rows, group))
        if not rows:
            first = f"; the first problem: {self.problems[0]}" if self.problems else ""
            raise DataError(f"{self.source}: read as '{self.layout}', it holds no image with a caption{first}")
        return CaptionedImages(
            rows, self.source, self.layout, official, self.problems, rows_in_files=self.rows, notes=self.notes,
            split_rule=SPLIT_RULE if by_file else min(self.split_rule, HASH_RULE),
        )  # fmt: skip

    def _read_lists(self) -> None:
        """Splits from lists beside the captions."""
        named = {name: entry for entry in self._entries.values() for name in entry.names}
        unknown: Counter[str] = Counter()
        for name, (split, place) in self.split_lists.items():
            entry = named.get(name)
            if entry is None:
                unknown[place] += 1
            else:
                self._set(entry, "split", split, place)
        for place, number in unknown.items():
            self.note(f"{number:,} names of {place} are of no image with a caption")

    def _read_split_file(self, entries: Sequence[_Entry], official: bool) -> bool:
        """What a file of `write_splits` says, where there is one and the rule goes by it; whether it says anything.

        official: whether the data set has splits of its own, which it may not contradict.
        """
        path = split_file_of(self.source)
        if self.split_rule <= HASH_RULE or path == self.source or not path.is_file():
            return False
        named = {name: entry for entry in entries for name in (*entry.names, entry.name)}
        unknown = []
        for name, (split, place) in read_split_file(path).items():
            entry = named.get(name) or named.get(clean_name(name)) or self._entries.get(self._key_of(name))
            if entry is None:
                unknown.append(name)
            else:
                self._set(entry, "split", split, place)
        if unknown:
            self.note(f"{len(unknown):,} names of {path.name} are of no image with a caption, such as {unknown[0]}")
        left = sum(entry.get("split") is None for entry in entries)
        more = f", and by their group or a hash for {left:,} images that it lacks" if left and not official else ""
        self.note(f"splits by {path.name}{more}")
        return True

    def _key_of(self, name: str) -> str:
        try:
            return self._resolver.resolve(name).key
        except ValueError:
            return ""

    def _split_by_group(self, entries: Sequence[_Entry]) -> None:
        """Images that nothing places: with the others of their group, or where its hash puts it."""
        if self.split_rule < HASH_RULE:
            for entry in entries:
                entry.said["split"] = (split_of_name(entry.written), "a hash of its name")
            return
        keys = [keys_of(each.name, each.image, each.get("group"), each.get("identity")) for each in entries]
        members: dict[int, list[int]] = {}
        for place, group in enumerate(groups_of(keys)):
            members.setdefault(group, []).append(place)
        for places in members.values():
            given = {split for place in places if (split := entries[place].get("split"))}
            # Of the strongest kind that anything here has: what is added with it moves nothing.
            strongest = min((key for place in places for key in keys[place]), key=strength)
            told = (next(iter(given)) if given else split_of_name(strongest), "its group")
            if len(given) > 1:
                told = ("", f"others of its group stand in {' and '.join(sorted(given))} by {SPLIT_FILE}")
            for place in places:
                entries[place].said.setdefault("split", told)


def _known(value: Any) -> str | None:
    """Whom or what an image shows, as text, 1.0 as 1; None where nobody knows."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = _text_of(value)
    return None if text is None or text.lower() in NO_TEXT else text


def _text_of(value: Any) -> str | None:
    """A cell as text; None for an empty one."""
    if isinstance(value, (bytes, bytearray)):
        value = decode(bytes(value)).text
    if value is None or value != value or isinstance(value, (Mapping, list, tuple)):
        return None
    return str(value).strip() or None
