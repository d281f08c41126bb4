"""One place that resolves the name of an image in a table to a file: links, `./`, backslashes, Unicode forms, case."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

#: Bytes of the longest path, and of the longest name in it, that a file system takes.
LONGEST_PATH, LONGEST_NAME = 4096, 255


@dataclass(frozen=True)
class ResolvedName:
    """A file that a name means. key: the same for all names of one file; how: in what the name was read otherwise, ""
    for nothing; exists: whether the file is there."""

    path: Path
    key: str
    how: str = ""
    exists: bool = True


def clean_name(name: str) -> str:
    """A name without `./`, `x/../` and doubled slashes; a path that leaves its folder stays as it is.

    >>> clean_name("./sub/../p0.jpg")
    'p0.jpg'
    """
    return os.path.normpath(name).replace(os.sep, "/") if name else name


_ENDING = re.compile(r"\S\.(?=\d*[A-Za-z])[A-Za-z0-9]{2,5}(?:[#?]\S*)?\s*$")


@dataclass
class NameLikeness:
    """Tells the names of images from other text: by an ending, by a file of that name in one of `folders`, or by being
    written as the names before it are, such as `17` after `5`."""

    folders: Sequence[Path]
    _forms: set[str] = field(default_factory=set)

    def add(self, name: str) -> None:
        """A name that a row has."""
        form = _form(name)
        # Words alone may be anything.
        if "0" in form:
            self._forms.add(form)

    def fits(self, text: str) -> bool:
        """Whether a text may be the name of an image."""
        name = text.strip()
        if not name or _ENDING.search(name) or _form(name) in self._forms:
            return bool(name)
        return len(os.fsencode(name)) <= LONGEST_PATH and any(_known(folder / name) for folder in self.folders)


def _form(name: str) -> str:
    """How a name is written: its runs of digits and of letters alike."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", name.strip()))


@dataclass
class NameResolver:
    """Finds files by the names that a table has for them, in `folders` in their order.

    A name is taken as it is written; where no file has it, with backslashes as slashes, in another Unicode form, in
    another case if one file alone has it so, and an absolute path of another machine by what of it lies below a folder.
    """

    folders: Sequence[Path]
    _listed: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    _claimed: dict[str, str] = field(default_factory=dict)
    _as_written: set[str] = field(default_factory=set)

    def expect(self, names: Iterable[str]) -> None:
        """All names that a table has. Those that differ in nothing but case are several images: none of them is found
        in another case, or an image gets another's captions where a file is missing."""
        first: dict[str, str] = {}
        for name in map(clean_name, names):
            if first.setdefault(_folded(name), unicodedata.normalize("NFC", name)) != unicodedata.normalize(
                "NFC", name
            ):
                self._as_written.add(_folded(name))

    def resolve(self, name: str, folders: Sequence[Path] = ()) -> ResolvedName:
        """The file that `name` means. folders: look here instead. Raises ValueError for what can name no file."""
        parts = os.fsencode(name).replace(b"\\", b"/").split(b"/")
        if sum(map(len, parts)) + len(parts) > LONGEST_PATH or max(map(len, parts)) > LONGEST_NAME or "\0" in name:
            raise ValueError("a name that no file can have")
        where = list(folders) or list(self.folders)
        for folder in where:
            found = _known(folder / name)
            if found:
                return found
        for how, ways in (("slashes", _slashed), ("spelling", None), ("its folder", _tails)):
            found = self._spelled(name, where) if ways is None else self._otherwise(name, where, ways, how)
            if found:
                return found
        return ResolvedName(where[0] / clean_name(name), f"name {clean_name(name)}", exists=False)

    def _otherwise(
        self, name: str, folders: Sequence[Path], ways: Callable[[str], Iterable[str]], how: str
    ) -> ResolvedName | None:
        for other in ways(name):
            for folder in folders:
                found = _known(folder / other) or self._spelled(other, [folder])
                if found and (how == "slashes" or self._claimed.setdefault(found.key, name) == name):
                    return ResolvedName(found.path, found.key, how)
        return None

    def _spelled(self, name: str, folders: Sequence[Path]) -> ResolvedName | None:
        """A file whose path is the same but for Unicode's form, or for upper and lower case where that is unique."""
        for folder in folders:
            path: Path | None = folder
            how = "its Unicode form"
            for part in PurePosixPath(clean_name(name)).parts:
                assert path is not None
                if part in ("/", "..") or (path / part).exists():
                    path = path / part
                    continue
                same = self._names_in(path, "NFC").get(unicodedata.normalize("NFC", part), [])
                if len(same) != 1 and _folded(clean_name(name)) in self._as_written:
                    path = None
                    break
                if len(same) != 1:
                    same = self._names_in(path, "case").get(_folded(part), [])
                    how = "upper and lower case"
                path = path / same[0] if len(same) == 1 else None
                if path is None:
                    break
            found = _known(path) if path is not None and path != folder else None
            if found:
                return ResolvedName(found.path, found.key, how)
        return None

    def _names_in(self, folder: Path, form: str) -> dict[str, list[str]]:
        """What a folder holds, by its names in one form."""
        key = f"{form} {folder}"
        if key not in self._listed:
            try:
                names = os.listdir(folder)
            except OSError:
                names = []
            fold = _folded if form == "case" else lambda name: unicodedata.normalize("NFC", name)
            found: dict[str, list[str]] = {}
            for name in names:
                found.setdefault(fold(name), []).append(name)
            self._listed[key] = found
        return self._listed[key]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _known(path: Path) -> ResolvedName | None:
    """The file at a path, known by what the system knows it by; None where there is none."""
    try:
        about = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(about.st_mode):
        return None
    key = f"file {about.st_dev} {about.st_ino}" if about.st_ino else f"file {os.path.realpath(path)}"
    return ResolvedName(path, key)


def _slashed(name: str) -> Iterable[str]:
    return [name.replace("\\", "/")] if "\\" in name else []


def _tails(name: str) -> Iterable[str]:
    """What of an absolute path may lie below a folder here: all but its root, then less and less of it."""
    is_windows = re.match(r"[A-Za-z]:[\\/]|\\\\", name)
    if not is_windows and not name.startswith("/"):
        return []
    parts = (PureWindowsPath(name) if is_windows else PurePosixPath(name)).parts[1:]
    return ["/".join(parts[start:]) for start in range(len(parts))]
