"""Which files below a folder are images: by their ending, and by their first bytes where there is no ending.

Every file is taken or counted (`ExcludedFiles`), with the reason.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from clipvisionalign.images.decoding import UNSUPPORTED_FORMATS, first_bytes, is_image_content


def _suffixes(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


#: Endings of images that Pillow's registry does not have.
_EXTRA_SUFFIXES = _suffixes("heic heif heics heifs hif avif avifs jxl jif jfi pjpeg pjp jps jpg2")

#: Endings of raw files of cameras.
RAW_SUFFIXES = _suffixes("3fr arw cr2 cr3 crw dcr dng erf iiq kdc mrw nef nrw orf ori pef raf rw2 rwl sr2 srf srw x3f")

#: Endings of Pillow's registry that mostly stand for something else (fitness records, point clouds, circuit boards,
#: installers), and of raw files and of other data alike: such a file is looked into.
_AMBIGUOUS_SUFFIXES = _suffixes("fit pcd gbr msp raw fff mef mos")

#: Files that are no images, whatever their bytes resemble: texts and tables, documents, arrays, archives, sources,
#: sound and film, what other programs leave.
_NON_IMAGE_SUFFIXES = _suffixes("""
    txt text md rst rtf tex bib log csv tsv tab json jsonl ndjson geojson xml html htm xhtml yaml yml toml ini cfg conf
    doc docx odt xls xlsx ods ppt pptx odp epub parquet arrow feather orc avro lance db sqlite sqlite3 sql mdb
    npy npz pt pth ckpt safetensors onnx pkl pickle joblib mat h5 hdf hdf5 nc tfrecord lmdb idx
    tar tgz gz bz2 xz zst zip 7z rar iso dmg cab deb rpm whl jar
    py pyc ipynb sh bat ps1 js ts css scss c h cc cpp hpp java go rs rb php pl r m lua swift
    mp3 wav flac ogg oga opus m4a aac wma aiff mid mp4 m4v mov avi mkv webm wmv flv mpg mpeg m2ts mts 3gp ogv srt vtt
    xmp aae lrf thm url lnk desktop exe dll so dylib md5 sha1 sha256 sfv torrent ttf otf woff woff2
""")  # fmt: skip

#: Images of kinds that are not decoded: drawings and documents, projects of image editors.
_UNDECODED_SUFFIXES = _suffixes("""
    svg svgz pdf eps ps ai wmf emf cdr dxf psb xcf kra clip afphoto palm exr hdr dcm nii
""")  # fmt: skip

#: Folders and files that systems, network drives and programs put beside images; hidden ones begin with a dot.
_SYSTEM_NAMES = frozenset({
    "@eadir", "@recycle", "#recycle", "#snapshot", "@__thumb", "__macosx", "$recycle.bin", "system volume information",
    "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini",
})  # fmt: skip

HIDDEN, SYSTEM_FILE = "hidden", "of the system, a network drive or an archiver"

#: What can be opened and never be read to its end.
NOT_REGULAR = "a pipe, socket or device"

NON_IMAGE_SUFFIX, UNDECODED_SUFFIX, NON_IMAGE_CONTENT = (
    "no image by its ending",
    "of a kind that is not decoded",
    "no image by its content",
)

#: Endings, in small letters, by which a file counts as an image without a look into it.
IMAGE_SUFFIXES = (
    frozenset(ending for ending, name in Image.registered_extensions().items() if name not in UNSUPPORTED_FORMATS)
    | _EXTRA_SUFFIXES
    | RAW_SUFFIXES
) - (_AMBIGUOUS_SUFFIXES | _NON_IMAGE_SUFFIXES | _UNDECODED_SUFFIXES)


def name_exclusion_reason(name: str) -> str:
    """Why a file or folder of this name is not searched for images, by its name alone.

    Args:
        name: The last part of a path.

    Returns:
        The reason; "" if the name does not exclude it.

    >>> name_exclusion_reason("a.jpg")
    ''
    """
    if name.casefold() in _SYSTEM_NAMES:
        return SYSTEM_FILE
    return HIDDEN if name.startswith(".") and name not in (".", "..") else ""


def exclusion_reason(name: str | bytes, head: Callable[[], bytes]) -> str:
    """Why a file of a folder is not taken for an image.

    Args:
        name: Its path below the folder that is listed; every part of it counts.
        head: Returns its first `HEAD_BYTES` bytes; called only where the ending decides nothing.

    Returns:
        The reason; "" where it may be an image, or where `head` raises OSError: the reader reports that.

    >>> exclusion_reason("a.txt", bytes), exclusion_reason("b.jpg", bytes), exclusion_reason(".cache/b.jpg", bytes)
    ('no image by its ending', '', 'hidden')
    """
    parts = os.fsdecode(name).replace(os.sep, "/").split("/")
    reason = next(filter(None, map(name_exclusion_reason, parts)), "")
    if reason:
        return reason
    suffix = _suffix(parts[-1])
    if suffix in IMAGE_SUFFIXES:
        return ""
    if suffix in _NON_IMAGE_SUFFIXES:
        return NON_IMAGE_SUFFIX
    if suffix in _UNDECODED_SUFFIXES:
        return UNDECODED_SUFFIX
    try:
        return "" if is_image_content(head(), guess=suffix in _AMBIGUOUS_SUFFIXES) else NON_IMAGE_CONTENT
    except OSError:
        return ""


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@dataclass
class ExcludedFiles:
    """The files below a folder that were not taken for images: how many, by reason and ending.

    All files are those that `accept` takes and these; `check` and `index` print both.

    Attributes:
        counts: Number of files by (reason, ending), the ending in small letters or "no ending".
        unreadable_folders: Folders that could not be listed, with the reason; their content is unknown.
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    unreadable_folders: dict[str, str] = field(default_factory=dict)

    def accept(self, name: str | bytes, head: Callable[[], bytes]) -> bool:
        """Whether a file may be an image, by `exclusion_reason`; one that is not is counted.

        Args:
            name: Its path below the folder that is listed.
            head: Returns its first `HEAD_BYTES` bytes.

        Returns:
            Whether it may be one.
        """
        reason = exclusion_reason(name, head)
        if reason:
            self.exclude(name, reason)
        return not reason

    def exclude(self, name: str | bytes, reason: str) -> None:
        """Count a file that is not taken.

        Args:
            name: Its path below the folder that is listed.
            reason: Why.
        """
        last = os.fsdecode(name).replace(os.sep, "/").rpartition("/")[2]
        self.counts[reason, _suffix(last) or "no ending"] += 1

    @property
    def total(self) -> int:
        """Number of files that were not taken."""
        return self.counts.total()

    def lines(self) -> list[str]:
        """The counts as text.

        Returns:
            A line for each reason, the most files first: "12 no image by its ending: 10 .txt, 2 .json"; and one for the
                folders
            that cannot be listed.
        """
        by_reason = self.to_dict()
        order = sorted(by_reason, key=lambda reason: -sum(by_reason[reason].values()))
        return [
            f"{sum(by_reason[reason].values()):,} {reason}: "
            + ", ".join(f"{count:,} {ending}" for ending, count in by_reason[reason].items())
            for reason in order
        ] + self._unreadable_line()

    def _unreadable_line(self) -> list[str]:
        examples = [f"{folder}: {reason}" for folder, reason in self.unreadable_folders.items()][:1]
        return [
            f"{len(self.unreadable_folders):,} folders that cannot be listed, such as {example}" for example in examples
        ]

    def to_dict(self) -> dict[str, dict[str, int]]:
        """The counts as `--json` prints them.

        Returns:
            {reason: {ending: number}}, the most first.
        """
        counts: dict[str, dict[str, int]] = {}
        for (reason, ending), count in self.counts.most_common():
            counts.setdefault(reason, {})[ending] = count
        return counts


def walk_files(root: str | Path, unreadable: dict[bytes, str]) -> Iterator[tuple[bytes, os.DirEntry[bytes]]]:
    """List everything below a folder that is no folder.

    Links to folders are followed, and each folder is listed once: under its own name where it has one below `root`, and
    under a hidden name last. Within a folder entries are sorted by name, links last.

    Args:
        root: The folder.
        unreadable: Receives each folder below it that cannot be listed, with the reason.

    Yields:
        The path below `root` in the system's bytes, and the entry.

    Raises:
        OSError: `root` itself cannot be listed.
    """
    top = os.fsencode(root)
    visited: set[tuple[int, int]] = set()
    # Hidden ones last: a link elsewhere may lead to what is stored there under no name of its own.
    plain, linked, hidden = [b""], list[bytes](), list[bytes]()
    while plain or linked or hidden:
        relative = (plain or linked or hidden).pop()
        try:
            stat_result = os.stat(os.path.join(top, relative))
            inode = (stat_result.st_dev, stat_result.st_ino)
            if stat_result.st_ino and inode in visited:
                continue
            visited.add(inode)
            entries = sorted(
                os.scandir(os.path.join(top, relative)), key=lambda entry: (entry.is_symlink(), entry.name)
            )
        except OSError as error:
            if not relative:
                raise
            unreadable[relative] = error.strerror or str(error)
            continue
        folders = []
        for entry in entries:
            if _is_folder(entry):
                folders.append(entry)
            else:
                yield os.path.join(relative, entry.name), entry
        for entry in reversed(folders):
            queue = (
                hidden if name_exclusion_reason(os.fsdecode(entry.name)) else linked if entry.is_symlink() else plain
            )
            queue.append(os.path.join(relative, entry.name))


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is, or leads to, a folder; what cannot be examined is a file, and reported when it is read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_special(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is, or leads to, something that is neither a file nor a folder.

    Args:
        entry: The entry, as `walk_files` yields it.

    Returns:
        Whether it is a pipe, a socket or a device; what cannot be examined is a file, and reported when it is read.
    """
    try:
        # Of a link that leads nowhere `stat` raises.
        return not entry.is_file() and not stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False


def image_files(folder: Path, excluded_files: ExcludedFiles | None = None) -> list[Path]:
    """The files below a folder that may be images, sorted by path; links are followed as in `walk_files`.

    Args:
        folder: The folder.
        excluded_files: Takes the counts of the other files, and folders that cannot be listed.

    Returns:
        Their paths.

    Raises:
        OSError: A folder cannot be listed, and there is no `excluded_files`; folders that no image is taken from are
            exempt.
    """
    excluded = ExcludedFiles() if excluded_files is None else excluded_files
    unreadable: dict[bytes, str] = {}
    paths = []
    for relative, entry in walk_files(folder, unreadable):
        path = folder / os.fsdecode(relative)
        if is_special(entry):
            excluded.exclude(relative, NOT_REGULAR)
        elif excluded.accept(os.fsdecode(relative), partial(first_bytes, path)):
            paths.append(path)
    for relative, reason in unreadable.items():
        name = os.fsdecode(relative)
        if not any(map(name_exclusion_reason, name.split(os.sep))):
            if excluded_files is None:
                raise OSError(
                    f"{folder / name}: this folder cannot be listed: {reason}; make it readable, or move it away"
                )
            excluded.unreadable_folders[name] = reason
    return sorted(paths)
