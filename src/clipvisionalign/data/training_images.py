"""The training images of a run, recognised by content in any gallery.

A run keeps a hash of each training image's bytes, and, for up to `MAX_PERCEPTUAL` images, by the hash with which
`check` finds near-duplicates: a gradient hash and a thumbnail. A hash takes the time of reading a file, those take that
of decoding it, about as long as in one epoch.
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
from clipvisionalign.data.hashes import hash_file
from clipvisionalign.data.image_fingerprints import ImageFingerprint, fingerprint_image, near_pairs
from clipvisionalign.files import atomic_write
from clipvisionalign.images import ImageError
from clipvisionalign.progress import progress

#: The file of a run folder that has them.
TRAINED_ON_FILE = "trained_on.npz"

#: Most images of which more than the bytes' hash is kept: 850 bytes each, and the time of decoding them once.
MAX_PERCEPTUAL = 50_000

#: Images in memory at a time.
IMAGES_PER_CHUNK = 256


@dataclass(frozen=True)
class TrainedOnMatch:
    """An image of a gallery that a run was trained on.

    Attributes:
        image: Its name in the gallery.
        trained_on: Its name in the training data.
        same: Whether the bytes are equal, or the image nearly.
    """

    image: str
    trained_on: str
    same: bool


@dataclass(frozen=True)
class TrainedOnImages:
    """The images that a run was trained on, by their hashes.

    Attributes:
        names: (N,) names of the images.
        digests: (N,) hashes of their bytes, as hexadecimal.
        fingerprints: (N,) by which nearly equal images are recognised; empty for more than `MAX_PERCEPTUAL` images.
    """

    names: list[str]
    digests: list[str]
    fingerprints: list[ImageFingerprint]

    @classmethod
    def from_images(
        cls, images: Iterable[tuple[str, Path | bytes]], count: int, show_progress: bool = False
    ) -> TrainedOnImages:
        """Hash images; those that cannot be read are left out.

        Args:
            images: Name and file (or bytes) of each image.
            count: Their number, on which it depends whether fingerprints are taken.
            show_progress: Whether a live line is shown on standard error.

        Returns:
            The hashes.
        """
        perceptual = count <= MAX_PERCEPTUAL
        names, digests, fingerprints = [], [], []
        description = "recording what was trained on"
        for (name, _), digest, fingerprint in progress(
            _hash_images(images, perceptual), description, count, show_progress
        ):
            if digest and (fingerprint is not None or not perceptual):
                names.append(name)
                digests.append(digest)
                fingerprints += [fingerprint] if fingerprint is not None else []
        return cls(names, digests, fingerprints)

    @classmethod
    def merged(cls, records: Sequence[TrainedOnImages]) -> TrainedOnImages:
        """The images of several records, of which a model was trained on all.

        Args:
            records: The records.

        Returns:
            One record.
        """
        # The n-th fingerprint is of the n-th name: a record without fingerprints stands last.
        ordered = sorted(records, key=lambda record: not record.fingerprints)
        return cls(
            [name for record in ordered for name in record.names],
            [digest for record in ordered for digest in record.digests],
            [fingerprint for record in ordered for fingerprint in record.fingerprints],
        )

    def save(self, path: Path) -> None:
        """Write the hashes atomically; equal ones give equal files.

        Args:
            path: The file to write, a NumPy archive without pickles.
        """
        # Names by their bytes: no format of NumPy's takes them without their longest one's width for each.
        names = np.frombuffer("\0".join(self.names).encode("utf-8", "surrogatepass"), dtype=np.uint8)
        digests = np.frombuffer(bytes.fromhex("".join(self.digests)), dtype=np.uint8).reshape(-1, 16)
        arrays: dict[str, Any] = {"names": names, "exact": digests}
        if self.fingerprints:
            arrays["gradient"] = np.stack([fingerprint.gradient_hash for fingerprint in self.fingerprints])
            arrays["thumbnail"] = np.stack([fingerprint.thumbnail for fingerprint in self.fingerprints])
        with atomic_write(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path, marks: bool = True) -> TrainedOnImages:
        """Read what `save` wrote.

        Args:
            path: The file.
            marks: Whether fingerprints are read; else hashes of bytes alone.

        Returns:
            The hashes.

        Raises:
            OSError: It cannot be read.
            ValueError: It is no such archive.
            KeyError: It lacks an array.
        """
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if marks or name in ("names", "exact")}
        names = arrays["names"].tobytes().decode("utf-8", "surrogatepass").split("\0") if len(arrays["exact"]) else []
        digests = [row.tobytes().hex() for row in arrays["exact"]]
        fingerprint_fields = zip(digests, arrays.get("gradient", ()), arrays.get("thumbnail", ()), strict=False)
        return cls(names, digests, [ImageFingerprint(*each) for each in fingerprint_fields])

    def changed(self, rows: Sequence[CaptionedImage], shown: bool = False) -> list[str]:
        """Images whose content differs from that of the same name in training.

        Args:
            rows: Images; those whose name was not trained on are ignored.
            shown: Whether a live line is shown on standard error.

        Returns:
            Their names.
        """
        known: dict[str, set[str]] = {}
        for name, digest in zip(self.names, self.digests, strict=True):
            known.setdefault(name, set()).add(digest)
        given = [(row.name, row.image) for row in rows if row.name in known]
        description = "comparing images with those that were trained on"
        looked = progress(_hash_images(given, perceptual=False), description, len(given), shown)
        return [name for (name, _), digest, _ in looked if digest not in known[name]]

    def matches(self, rows: Sequence[CaptionedImage], show_progress: bool = False) -> list[TrainedOnMatch]:
        """The images of a gallery that are among these.

        Args:
            rows: The images of the gallery.
            show_progress: Whether a live line is shown on standard error.

        Returns:
            Images with equal bytes first, then nearly equal ones; each with one of its equals.
        """
        name_by_digest = dict(zip(reversed(self.digests), reversed(self.names), strict=True))
        hashed_rows = list(_hash_images([(row.name, row.image) for row in rows], bool(self.fingerprints)))
        same = [
            TrainedOnMatch(name, name_by_digest[digest], True)
            for (name, _), digest, _ in hashed_rows
            if digest in name_by_digest
        ]
        unmatched = [
            (name, fingerprint)
            for (name, _), digest, fingerprint in hashed_rows
            if digest not in name_by_digest and fingerprint is not None
        ]
        near: dict[int, int] = {}
        for here, there, _ in near_pairs(
            [fingerprint for _, fingerprint in unmatched], self.fingerprints, show_progress
        ):
            near.setdefault(here, there)
        return same + [TrainedOnMatch(unmatched[here][0], self.names[there], False) for here, there in near.items()]


def other_than_trained_on(run: Path, rows: Sequence[CaptionedImage], shown: bool = False) -> str:
    """Training images that have changed since a run was trained on them.

    Args:
        run: The run folder.
        rows: The images as they are now.
        shown: Whether a live line is shown on standard error.

    Returns:
        A phrase such as "images (12: a.jpg, b.jpg, c.jpg ...)"; "" where none has changed, or the run keeps no hashes
        that can be read.
    """
    try:
        changed = TrainedOnImages.load(run / TRAINED_ON_FILE, marks=False).changed(rows, shown)
    except (OSError, ValueError, KeyError):
        return ""
    named = ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
    return f"images ({len(changed):,}: {named})" if changed else ""


HashedImage = tuple[tuple[str, Path | bytes], str, ImageFingerprint | None]


def _hash_images(images: Iterable[tuple[str, Path | bytes]], perceptual: bool) -> Iterator[HashedImage]:
    """Each image with the hash of its bytes, "" where it cannot be read, and its mark, if that is wanted and there."""

    def hash_image(each: tuple[str, Path | bytes]) -> HashedImage:
        image = each[1]
        if isinstance(image, bytes):
            digest = hashlib.blake2b(image, digest_size=16).hexdigest()
            fingerprint = _fingerprint_or_none(image, digest) if perceptual else None
        else:
            digest = hash_file(image).replace("missing", "")
            fingerprint = _fingerprint_file(image, digest) if perceptual and digest else None
        return each, digest, fingerprint

    rest = iter(images)
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(rest, IMAGES_PER_CHUNK)):
            yield from pool.map(hash_image, chunk)


def _fingerprint_or_none(image: Path | bytes, digest: str) -> ImageFingerprint | None:
    try:
        fingerprint = fingerprint_image(image)
    except ImageError:
        return None
    return ImageFingerprint(digest, fingerprint.gradient_hash, fingerprint.thumbnail)


@lru_cache(MAX_PERCEPTUAL)
def _fingerprint_file(image: Path, digest: str) -> ImageFingerprint | None:
    """The mark of a file with this content: the runs of a study are trained on the same images."""
    return _fingerprint_or_none(image, digest)
