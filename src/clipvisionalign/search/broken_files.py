"""Files that are in no index because they could not be read or decoded, and when each is tried again.

A fault of the content stays while the content and the decoders stay what they are. A fault of the reading, such as an
I/O error or a permission, and a package that was missing, may go at any time without a trace in the file: they are
tried again every time.
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from clipvisionalign.images import ImageError
from clipvisionalign.search.storage import Storage, as_storage, decode_path

BROKEN_FILES_NAME = "broken.jsonl"

#: What was at fault: "io", reading the file; "package", one that is missing; "content", what stands in the file.
Fault = Literal["io", "package", "content"]

#: Packages that decode, or that Pillow decodes with.
_DECODERS = ("pillow", "pi-heif", "pillow-heif", "pillow-avif-plugin", "pillow-jxl-plugin", "rawpy")


@cache
def decoder_versions() -> str:
    """The versions of the packages that decode images here.

    Returns:
        Such as "pillow 12.0.0, pi-heif 1.1.0".
    """

    def version(name: str) -> str:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            return ""

    return ", ".join(filter(None, map(version, _DECODERS)))


def classify_fault(error: BaseException) -> Fault:
    """What was at fault when a file could not be decoded.

    Args:
        error: The error; those that it came from count too.

    Returns:
        "package" for one that is missing, "io" for reading the file, "content" for what is in it.

    >>> classify_fault(OSError(5, "Input/output error")), classify_fault(ValueError("damaged"))
    ('io', 'content')
    """
    error_chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in error_chain:
        error_chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(each, ImportError) or _needs_package(each) for each in error_chain):
        return "package"
    # Decoders raise OSError without a number for what they find in a file; a file that leads them before its own
    # beginning makes the system refuse with EINVAL.
    error_numbers = {each.errno for each in error_chain if isinstance(each, OSError)} - {None, errno.EINVAL}
    is_transient = any(
        isinstance(each, ImageError) and (each.passing or each.kind == "missing image") for each in error_chain
    )
    return "io" if error_numbers or is_transient else "content"


def _needs_package(error: BaseException) -> bool:
    return isinstance(error, ImageError) and bool(error.missing_decoder)


class BrokenFiles:
    """Files that could not be read or decoded, by the bytes of their paths.

    Args:
        text: What broken.jsonl holds; "" for none.
    """

    def __init__(self, text: str = "") -> None:
        self.entries: dict[bytes, dict[str, Any]] = {}
        for line in filter(None, text.split("\n")):
            entry = json.loads(line)
            raw = entry.get("raw", entry["path"]).encode("utf-8", "surrogateescape")
            self.entries[raw] = entry

    def __contains__(self, raw: bytes) -> bool:
        return raw in self.entries

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self.entries))

    def add(
        self, raw: bytes, reason: str, fault: Fault, size: int = -1, mtime_ns: int = 0, missing_decoder: str = ""
    ) -> None:
        """List a file, or replace its entry.

        Args:
            raw: Its path below the folder, in bytes.
            reason: Why it could not be read or decoded.
            fault: What was at fault.
            size: Its size in bytes; -1 if unknown.
            mtime_ns: Time of its last change, in nanoseconds.
            missing_decoder: The format whose decoder is not installed; "" for any other reason.
        """
        entry = {"path": decode_path(raw), "reason": reason, "size": size, "mtime_ns": mtime_ns, "fault": fault,
                 "decoders": decoder_versions()}  # fmt: skip
        if missing_decoder:
            entry["missing_decoder"] = missing_decoder
        # The path as text is the file's own name only where its bytes are UTF-8.
        text = raw.decode("utf-8", "surrogateescape")
        self.entries[raw] = entry if text == entry["path"] else entry | {"raw": text}

    def remove(self, raw: bytes) -> None:
        """Remove a file from the list, if it is listed.

        Args:
            raw: Its path below the folder, in bytes.
        """
        self.entries.pop(raw, None)

    def is_unchanged(self, raw: bytes, size: int, mtime_ns: int) -> bool:
        """Whether a listed file need not be tried again.

        That is, its content was at fault, and content and decoders are as they were.

        Args:
            raw: Its path below the folder, in bytes.
            size: Its size now, in bytes.
            mtime_ns: Time of its last change now, in nanoseconds.

        Returns:
            Whether it is listed and unchanged; false where reading it, or a package, was at fault.
        """
        entry = self.entries.get(raw)
        if entry is None or (entry["size"], entry["mtime_ns"]) != (size, mtime_ns):
            return False
        return entry.get("fault") == "content" and entry.get("decoders") == decoder_versions()

    def missing_decoders(self) -> dict[str, int]:
        """Number of files whose decoder was not installed when they were tried.

        Returns:
            {format: number}, such as {"HEIC": 3}, the most first.
        """
        formats = (entry.get("missing_decoder", "") for entry in self.entries.values())
        return dict(Counter(filter(None, formats)).most_common())

    def is_undecodable(self, raw: bytes) -> bool:
        """Whether a listed file was read, and holds nothing that can be decoded here.

        Args:
            raw: Its path below the folder, in bytes.

        Returns:
            Whether it is such a file.
        """
        return raw in self.entries and self.entries[raw].get("fault", "content") != "io"

    def write(self, index: Storage) -> None:
        """Write broken.jsonl.

        Args:
            index: The storage of the index.
        """
        index.write(BROKEN_FILES_NAME, "".join(json.dumps(entry) + "\n" for entry in self.entries.values()))


def read_broken_files(index: str | Path | Storage) -> list[dict[str, Any]]:
    """The files of an index's source that could not be read or decoded.

    Args:
        index: Path, URL or storage of an index.

    Returns:
        For each file its path, reason, size, mtime_ns, fault and decoders.
    """
    return list(BrokenFiles(as_storage(index).read(BROKEN_FILES_NAME) or "").entries.values())
