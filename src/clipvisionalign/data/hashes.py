"""Content hashes of what figures depend on: captions, positives, images and files.

A figure that was kept is used again only where these are as they were. Contents are hashed with blake2b (RFC 7693); a
file that was hashed before in this process, and whose size and time are as they were, is not read again.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages

_FILE_HASHES: dict[tuple[str, int, int], str] = {}


def hash_parts(parts: Iterable[str | bytes]) -> str:
    """A hash of texts and bytes in their order; where one ends and the next begins counts.

    Args:
        parts: The texts and bytes.

    Returns:
        32 hex digits (blake2b of 16 bytes, RFC 7693).

    >>> hash_parts(["ab", "c"]) == hash_parts(["a", "bc"])
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def hash_content(content: bytes) -> str:
    """A hash of the content of a file that is in memory: what `hash_file` gives of the file.

    Args:
        content: The bytes.

    Returns:
        32 hex digits.
    """
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def hash_file(path: Path) -> str:
    """A hash of the content of a file.

    A file that was hashed before in this process, and whose size and time are unchanged, is not read again.

    Args:
        path: The file.

    Returns:
        32 hex digits; "missing" where it cannot be read.
    """
    try:
        stat_result = path.stat()
        if not stat.S_ISREG(stat_result.st_mode):
            # A pipe or a device, of which reading has no end.
            return "missing"
        key = (str(path.absolute()), stat_result.st_size, stat_result.st_mtime_ns)
        if key not in _FILE_HASHES:
            with path.open("rb") as file:
                _FILE_HASHES[key] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return _FILE_HASHES[key]
    except OSError:
        return "missing"


def dataset_hashes(data: CaptionedImages, read_images: bool = True) -> dict[str, str]:
    """Hashes of what a data set holds.

    Args:
        data: The data set.
        read_images: Whether files of images are read; else their sizes on disk stand for them.

    Returns:
        "captions", "partners" (which caption and which identity belong to which image), and "pictures".

    >>> from clipvisionalign.data.captioned import CaptionedImage
    >>> one, other = (CaptionedImages([CaptionedImage("a", b"...", (text,), "dev")]) for text in ("a dog", "a cat"))
    >>> before, after = dataset_hashes(one), dataset_hashes(other)
    >>> [name for name in before if before[name] != after[name]]
    ['captions']
    """

    def image_hash(image: Path | bytes) -> str:
        if isinstance(image, bytes):
            return hash_parts([image])
        if read_images:
            return hash_file(image)
        return str(image.stat().st_size) if image.is_file() else "missing"

    owners = [f"{row.name}\0{len(row.captions)}\0{row.identity}" for row in data.rows]
    return {
        "captions": hash_parts(data.captions),
        "partners": hash_parts([data.identity, *owners]),
        "pictures": hash_parts(image_hash(row.image) for row in data.rows),
    }


def run_hash(folder: Path) -> str:
    """A hash of the model of a run folder: its weights, its settings, and the files of its towers.

    Args:
        folder: The run folder.

    Returns:
        32 hex digits.

    Raises:
        OSError: It has no config.yaml.
        KeyError: Its config.yaml has no model.
    """
    from clipvisionalign.plain_yaml import safe_load

    settings = safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"]
    # An image tower without a name of timm's has settings of its own there: how images are scaled is among them.
    names = ("text_tower", "image_tower", "pretrained")
    towers = [path for name in names for path in sorted((folder / name).rglob("*")) if path.is_file()]
    weights = [path for name in ("model.safetensors", "adapters.safetensors") if (path := folder / name).is_file()]
    files = [*weights[:1], *towers]
    return hash_parts([json.dumps(settings, sort_keys=True), *(f"{path.name} {hash_file(path)}" for path in files)])


#: Keys of records that are called otherwise in messages: files keep the key of the version that first wrote them.
_NAMES_OF_KEYS = {"pictures": "images"}


def changed_keys(previous: Any, current: dict[str, Any]) -> list[str]:
    """The keys of a record whose values differ from those of an earlier record, as messages name them.

    Args:
        previous: The earlier record; anything but a dict counts as one without keys.
        current: The present record.

    Returns:
        The names in the order of `current`.

    >>> changed_keys({"captions": 1, "pictures": 2}, {"captions": 1, "pictures": 3})
    ['images']
    """
    previous = previous if isinstance(previous, dict) else {}
    return [_NAMES_OF_KEYS.get(name, name) for name, value in current.items() if previous.get(name) != value]
