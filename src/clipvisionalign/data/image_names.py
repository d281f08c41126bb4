"""Resolves names of images in tables to files: links, `./`, backslashes, Unicode forms, case."""

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
    """A file that a name stands for.

    Attributes:
        path: The file.
        key: Equal for all names of one file.
        difference: In what the file's name differs from the given one, such as "slashes"; "" for nothing.
        exists: Whether the file is there.
    """

    path: Path
    key: str
    difference: str = ""
    exists: bool = True


def clean_name(name: str) -> str:
    """A name without `./`, `x/../` and doubled slashes; a path that leaves its folder stays as it is.

    Args:
        name: A relative or absolute path.

    Returns:
        The name with slashes.

    >>> clean_name("./sub/../p0.jpg")
    'p0.jpg'
    """
    return os.path.normpath(name).replace(os.sep, "/") if name else name


_EXTENSION = re.compile(r"\S\.(?=\d*[A-Za-z])[A-Za-z0-9]{2,5}(?:[#?]\S*)?\s*$")


@dataclass
class ImageNameMatcher:
    """Distinguishes names of images from other text.

    By an ending, by a file of that name, or by being written as the names before it are, such as `17` after `5`.

    Args:
        folders: Folders in which files are searched.
    """

    folders: Sequence[Path]
    _patterns: set[str] = field(default_factory=set)

    def add(self, name: str) -> None:
        """Add a name that a row has; one without digits is ignored, as words alone may be anything.

        Args:
            name: The name.
        """
        form = _name_pattern(name)
        # Words alone may be anything.
        if "0" in form:
            self._patterns.add(form)

    def matches(self, text: str) -> bool:
        """Whether a text may be the name of an image.

        Args:
            text: The text.

        Returns:
            Whether it may be.
        """
        name = text.strip()
        if not name or _EXTENSION.search(name) or _name_pattern(name) in self._patterns:
            return bool(name)
        return len(os.fsencode(name)) <= LONGEST_PATH and any(_resolve_path(folder / name) for folder in self.folders)


def _name_pattern(name: str) -> str:
    """How a name is written: its runs of digits and of letters alike."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", name.strip()))


@dataclass
class MissingFiles:
    """Where files should be that are not there: beside those whose names are written alike.

    Of `img/1.jpg` that is `data/Images/img/1.jpg` it is learned that `img` is `data/Images/img`, and `data/Images` the
    folder of all such names. `img/2.jpg` and `b/3.jpg` have their paths by that, whichever files are there.
    """

    _folder_of: dict[tuple[tuple[Path, ...], tuple[str, ...]], Path] = field(default_factory=dict)

    def add(self, name: str, path: Path, folders: Sequence[Path]) -> None:
        """Learn from a file that is there.

        Args:
            name: Its name, as it is written.
            path: The file.
            folders: Folders in which it was searched.
        """
        parts = _name_parts(name)
        while parts and parts[-1] and _casefolded(parts[-1]) == _casefolded(path.name):
            parts, path = parts[:-1], path.parent
            if self._folder_of.setdefault((tuple(folders), parts), path) is not path:
                return

    def path(self, name: str, folders: Sequence[Path]) -> Path:
        """The path of a file that is not there.

        Args:
            name: Its name, as it is written.
            folders: Folders in which it was searched.

        Returns:
            The path by what was learned; else below the first folder that has the folder of its name, or the first.
        """
        parts = _name_parts(name)
        for depth in range(len(parts) - 1, -1, -1):
            folder = self._folder_of.get((tuple(folders), parts[:depth]))
            # A file that is there is another's: the name was not resolved to it.
            if folder is not None and not os.path.lexists(path := folder.joinpath(*parts[depth:])):
                return path
        paths = [folder / clean_name(name) for folder in folders]
        return next((path for path in paths if path.parent.is_dir()), paths[0])


def _name_parts(name: str) -> tuple[str, ...]:
    """The parts of a name with either kind of slashes; the first one of an absolute name is empty."""
    return tuple(clean_name(name.replace("\\", "/")).split("/"))


@dataclass
class NameResolver:
    """Finds files by the names that a table has for them.

    A name is taken as it is written; where no file has it, with backslashes as slashes, in another Unicode form, in
    another case if one file alone has it so, and an absolute path of another machine by what of it is below a folder.

    Args:
        folders: Folders in which files are searched, in this order.
    """

    folders: Sequence[Path]
    _folder_names: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    _claimed_files: dict[str, str] = field(default_factory=dict)
    _case_sensitive: set[str] = field(default_factory=set)

    def expect_names(self, names: Iterable[str]) -> None:
        """Announce all names that a table has.

        Those that differ in nothing but case are several images: none of them is then found in another case, or an
        image would get another's captions where a file is missing.

        Args:
            names: The names.
        """
        first: dict[str, str] = {}
        for name in map(clean_name, names):
            if first.setdefault(_casefolded(name), unicodedata.normalize("NFC", name)) != unicodedata.normalize(
                "NFC", name
            ):
                self._case_sensitive.add(_casefolded(name))

    def resolve(self, name: str, folders: Sequence[Path] = ()) -> ResolvedName:
        """The file that a name stands for.

        Args:
            name: The name.
            folders: Folders to search instead of the resolver's.

        Returns:
            The file; the path as it is written in the first folder, with `exists` false, where there is none.

        Raises:
            ValueError: No file can have this name: it is too long, or has a zero byte.
        """
        parts = os.fsencode(name).replace(b"\\", b"/").split(b"/")
        if sum(map(len, parts)) + len(parts) > LONGEST_PATH or max(map(len, parts)) > LONGEST_NAME or "\0" in name:
            raise ValueError("a name that no file can have")
        search_folders = list(folders) or list(self.folders)
        for folder in search_folders:
            resolved = _resolve_path(folder / name)
            if resolved:
                return resolved
        for difference, variants_of in (
            ("slashes", _slash_variants),
            ("spelling", None),
            ("its folder", _tail_variants),
        ):
            resolved = (
                self._resolve_spelling(name, search_folders)
                if variants_of is None
                else self._resolve_variant(name, search_folders, variants_of, difference)
            )
            if resolved:
                return resolved
        return ResolvedName(search_folders[0] / clean_name(name), f"name {clean_name(name)}", exists=False)

    def _resolve_variant(
        self, name: str, folders: Sequence[Path], variants_of: Callable[[str], Iterable[str]], difference: str
    ) -> ResolvedName | None:
        for variant in variants_of(name):
            for folder in folders:
                resolved = _resolve_path(folder / variant) or self._resolve_spelling(variant, [folder])
                if resolved and (difference == "slashes" or self._claimed_files.setdefault(resolved.key, name) == name):
                    return ResolvedName(resolved.path, resolved.key, difference)
        return None

    def _resolve_spelling(self, name: str, folders: Sequence[Path]) -> ResolvedName | None:
        """A file whose path is the same but for Unicode's form, or for upper and lower case where that is unique."""
        for folder in folders:
            path: Path | None = folder
            difference = "its Unicode form"
            for part in PurePosixPath(clean_name(name)).parts:
                assert path is not None
                if part in ("/", "..") or (path / part).exists():
                    path = path / part
                    continue
                candidates = self._names_in(path, "NFC").get(unicodedata.normalize("NFC", part), [])
                if len(candidates) != 1 and _casefolded(clean_name(name)) in self._case_sensitive:
                    path = None
                    break
                if len(candidates) != 1:
                    candidates = self._names_in(path, "case").get(_casefolded(part), [])
                    difference = "upper and lower case"
                path = path / candidates[0] if len(candidates) == 1 else None
                if path is None:
                    break
            resolved = _resolve_path(path) if path is not None and path != folder else None
            if resolved:
                return ResolvedName(resolved.path, resolved.key, difference)
        return None

    def _names_in(self, folder: Path, form: str) -> dict[str, list[str]]:
        """What a folder holds, by its names in one form."""
        key = f"{form} {folder}"
        if key not in self._folder_names:
            try:
                names = os.listdir(folder)
            except OSError:
                names = []
            fold = _casefolded if form == "case" else lambda name: unicodedata.normalize("NFC", name)
            by_form: dict[str, list[str]] = {}
            for name in names:
                by_form.setdefault(fold(name), []).append(name)
            self._folder_names[key] = by_form
        return self._folder_names[key]


def _casefolded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _resolve_path(path: Path) -> ResolvedName | None:
    """The system's key of the file at a path; None where there is none."""
    try:
        stat_result = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(stat_result.st_mode):
        return None
    key = f"file {stat_result.st_dev} {stat_result.st_ino}" if stat_result.st_ino else f"file {os.path.realpath(path)}"
    return ResolvedName(path, key)


def _slash_variants(name: str) -> Iterable[str]:
    return [name.replace("\\", "/")] if "\\" in name else []


def _tail_variants(name: str) -> Iterable[str]:
    """What of an absolute path may lie below a folder here: all but its root, then less and less of it."""
    is_windows = re.match(r"[A-Za-z]:[\\/]|\\\\", name)
    if not is_windows and not name.startswith("/"):
        return []
    parts = (PureWindowsPath(name) if is_windows else PurePosixPath(name)).parts[1:]
    return ["/".join(parts[start:]) for start in range(len(parts))]
