"""Which images a run was trained on, known by content: what a gallery is compared with, wherever its images come from.

A run keeps a hash of each training image's bytes, and, for up to `PERCEPTUAL` images, by what `check` tells
near-duplicates: a gradient hash and a thumbnail. A hash takes the time of reading a file, those take that of decoding
it, about as long as in one epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImage
from clipvisionalign.data.check import PictureMark, mark_picture, near_pairs
from clipvisionalign.data.fingerprint import hash_of_file
from clipvisionalign.files import written_aside
from clipvisionalign.images import PictureError
from clipvisionalign.progress import progress

#: The file of a run folder that has them.
TRAINED_ON = "trained_on.npz"

#: Most images of which more than the bytes' hash is kept: 850 bytes each, and the time of decoding them once.
PERCEPTUAL = 50_000

#: Images in memory at a time.
CHUNK = 256


@dataclass(frozen=True)
class Match:
    """An image of a gallery that was trained on. trained_on: its name then; same: with the same bytes, else nearly."""

    image: str
    trained_on: str
    same: bool


@dataclass(frozen=True)
class TrainedOn:
    """What a run was trained on. names, exact: of N images, hashes as hexadecimal; marks: N, or none."""

    names: list[str]
    exact: list[str]
    marks: list[PictureMark]

    @classmethod
    def of(cls, images: Iterable[tuple[str, Path | bytes]], count: int, shown: bool = False) -> TrainedOn:
        """Look at images, by name. Those that cannot be read are none that were trained on."""
        perceptual = count <= PERCEPTUAL
        names, exact, marks = [], [], []
        told = "recording what was trained on"
        for (name, _), digest, mark in progress(_looked_at(images, perceptual), told, count, shown):
            if digest and (mark is not None or not perceptual):
                names.append(name)
                exact.append(digest)
                marks += [mark] if mark is not None else []
        return cls(names, exact, marks)

    def save(self, path: Path) -> None:
        """Write them; equal ones give equal files."""
        # Names by their bytes: no format of NumPy's takes them without their longest one's width for each.
        names = np.frombuffer("\0".join(self.names).encode("utf-8", "surrogatepass"), dtype=np.uint8)
        digests = np.frombuffer(bytes.fromhex("".join(self.exact)), dtype=np.uint8).reshape(-1, 16)
        found: dict[str, Any] = {"names": names, "exact": digests}
        if self.marks:
            found["gradient"] = np.stack([mark.gradient for mark in self.marks])
            found["thumbnail"] = np.stack([mark.thumbnail for mark in self.marks])
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **found)

    @classmethod
    def load(cls, path: Path, marks: bool = True) -> TrainedOn:
        """Read what `save` wrote; without `marks` hashes of bytes alone. Raises OSError, ValueError."""
        with np.load(path, allow_pickle=False) as kept:
            found = {name: kept[name] for name in kept.files if marks or name in ("names", "exact")}
        names = found["names"].tobytes().decode("utf-8", "surrogatepass").split("\0") if len(found["exact"]) else []
        exact = [row.tobytes().hex() for row in found["exact"]]
        shown = zip(exact, found.get("gradient", ()), found.get("thumbnail", ()), strict=False)
        return cls(names, exact, [PictureMark(*each) for each in shown])

    def changed(self, rows: Sequence[CaptionedImage], shown: bool = False) -> list[str]:
        """The names of rows whose image is another one by now than that of this name was in training."""
        known: dict[str, set[str]] = {}
        for name, digest in zip(self.names, self.exact, strict=True):
            known.setdefault(name, set()).add(digest)
        given = [(row.name, row.image) for row in rows if row.name in known]
        told = "comparing images with those that were trained on"
        looked = progress(_looked_at(given, perceptual=False), told, len(given), shown)
        return [name for (name, _), digest, _ in looked if digest not in known[name]]

    def among(self, rows: Sequence[CaptionedImage], shown: bool = False) -> list[Match]:
        """The rows of a gallery that are among them, those with the same bytes first, each with one of its equals."""
        known = dict(zip(reversed(self.exact), reversed(self.names), strict=True))
        looked = list(_looked_at([(row.name, row.image) for row in rows], bool(self.marks)))
        same = [Match(name, known[digest], True) for (name, _), digest, _ in looked if digest in known]
        left = [(name, mark) for (name, _), digest, mark in looked if digest not in known and mark is not None]
        near: dict[int, int] = {}
        for here, there, _ in near_pairs([mark for _, mark in left], self.marks, shown):
            near.setdefault(here, there)
        return same + [Match(left[here][0], self.names[there], False) for here, there in near.items()]


def other_than_trained_on(run: Path, rows: Sequence[CaptionedImage], shown: bool = False) -> str:
    """Which training images are others by now than when a run was trained on them, in words; empty where none is known
    to be. A run that has not kept their hashes, or whose file of them cannot be read, has none to compare with."""
    try:
        found = TrainedOn.load(run / TRAINED_ON, marks=False).changed(rows, shown)
    except (OSError, ValueError, KeyError):
        return ""
    named = ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
    return f"pictures ({len(found):,}: {named})" if found else ""


Looked = tuple[tuple[str, Path | bytes], str, PictureMark | None]


def _looked_at(images: Iterable[tuple[str, Path | bytes]], perceptual: bool) -> Iterator[Looked]:
    """Each image with the hash of its bytes, "" where it cannot be read, and its mark, if that is wanted and there."""

    def look(each: tuple[str, Path | bytes]) -> Looked:
        image = each[1]
        if isinstance(image, bytes):
            digest = hashlib.blake2b(image, digest_size=16).hexdigest()
            mark = _mark_of(image, digest) if perceptual else None
        else:
            digest = hash_of_file(image).replace("missing", "")
            mark = _mark_of_file(image, digest) if perceptual and digest else None
        return each, digest, mark

    rest = iter(images)
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(rest, CHUNK)):
            yield from pool.map(look, chunk)


def _mark_of(image: Path | bytes, digest: str) -> PictureMark | None:
    try:
        found = mark_picture(image)
    except PictureError:
        return None
    return PictureMark(digest, found.gradient, found.thumbnail)


@lru_cache(PERCEPTUAL)
def _mark_of_file(image: Path, digest: str) -> PictureMark | None:
    """The mark of a file with this content: the runs of a study are trained on the same images."""
    return _mark_of(image, digest)
