"""What comparisons of pixels gave, kept beside an index by the content of the images.

Three archives in the folder `duplicates` of an index: whether pairs are copies, how good single images are, and which
pairs of a large index are alike by their vectors. They hold nothing that cannot be computed again.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipvisionalign.search.duplicates.neighbours import VectorPairs
from clipvisionalign.search.storage import Storage

logger = logging.getLogger(__name__)

CACHE_FOLDER = "duplicates"
#: Raised when the comparison changes: results of another version are computed again.
COMPARISON_VERSION = 2
#: Characters of a content hash.
_HASH_TYPE = "S32"


@dataclass(frozen=True)
class ImageQuality:
    """What is measured of a single image's file.

    Attributes:
        sharpness: `sharpness_of` its pixels.
        format: Of the file, as Pillow names it, such as "JPEG".
    """

    sharpness: float
    format: str


class ComparisonCache:
    """The archives of one index.

    Args:
        index: The storage of the index.
    """

    def __init__(self, index: Storage) -> None:
        self.index = index

    def read_verdicts(self) -> dict[tuple[str, str], int]:
        """What comparisons of pairs gave.

        Returns:
            By two content hashes, the smaller first, a value of `Appearance`.
        """
        arrays = self._read("pairs")
        if not {"hashes", "verdicts"} <= set(arrays):
            return {}
        hashes = arrays["hashes"].astype(str).tolist()
        return {
            (first, second): verdict
            for (first, second), verdict in zip(hashes, arrays["verdicts"].tolist(), strict=True)
        }

    def write_verdicts(self, verdicts: Mapping[tuple[str, str], int]) -> None:
        """Replace what comparisons of pairs gave.

        Args:
            verdicts: As `read_verdicts` returns them.
        """
        hashes = np.array(list(verdicts), dtype=_HASH_TYPE).reshape(-1, 2)
        self._write("pairs", {"hashes": hashes, "verdicts": np.array(list(verdicts.values()), dtype=np.uint8)})

    def read_qualities(self) -> dict[str, ImageQuality]:
        """What was measured of single images.

        Returns:
            By content hash.
        """
        arrays = self._read("qualities")
        if not {"hashes", "sharpness", "formats"} <= set(arrays):
            return {}
        columns = (arrays["hashes"].astype(str).tolist(), arrays["sharpness"].tolist(), arrays["formats"].tolist())
        return {hash_: ImageQuality(sharpness, str(name)) for hash_, sharpness, name in zip(*columns, strict=True)}

    def write_qualities(self, qualities: Mapping[str, ImageQuality]) -> None:
        """Replace what was measured of single images.

        Args:
            qualities: By content hash.
        """
        self._write(
            "qualities",
            {
                "hashes": np.array(list(qualities), dtype=_HASH_TYPE),
                "sharpness": np.array([each.sharpness for each in qualities.values()], dtype=np.float64),
                "formats": np.array([each.format for each in qualities.values()], dtype=str),
            },
        )

    def read_pairs(self, key: str) -> VectorPairs | None:
        """The pairs that are alike by their vectors.

        Args:
            key: `pairs_key` of the images.

        Returns:
            The pairs; None where they are of other images or settings.
        """
        arrays = self._read("neighbours")
        if not {"key", "pairs", "cosines", "full", "threshold"} <= set(arrays) or str(arrays["key"]) != key:
            return None
        return VectorPairs(arrays["pairs"], arrays["cosines"], int(arrays["full"]), float(arrays["threshold"]))

    def write_pairs(self, key: str, pairs: VectorPairs) -> None:
        """Replace the pairs that are alike by their vectors.

        Args:
            key: `pairs_key` of the images.
            pairs: The pairs.
        """
        arrays = {
            "key": np.array(key), "pairs": pairs.pairs, "cosines": pairs.cosines, "full": np.array(pairs.full),
            "threshold": np.array(pairs.threshold),
        }  # fmt: skip
        self._write("neighbours", arrays)

    def _read(self, name: str) -> dict[str, np.ndarray]:
        file = f"{CACHE_FOLDER}/{name}.npz"
        if not self.index.has_folder(CACHE_FOLDER):
            return {}
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "archive.npz"
            try:
                self.index.get_file(file, copy)
                with np.load(copy, allow_pickle=False) as archive:
                    arrays = dict(archive)
            except FileNotFoundError:
                return {}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                logger.info(f"{self.index}/{file}: cannot be read, and is computed again: {error}")
                return {}
        return arrays if int(arrays.get("version", np.array(0))) == COMPARISON_VERSION else {}

    def _write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "archive.npz"
            contents = {"version": np.array(COMPARISON_VERSION), **arrays}
            np.savez(archive, **contents)  # type: ignore[arg-type]
            try:
                self.index.put_file(f"{CACHE_FOLDER}/{name}.npz", archive)
            except OSError as error:
                logger.info(f"{self.index}: what was compared is not kept, the next call repeats it: {error}")


def pairs_key(hashes: np.ndarray, aligner: str, threshold: float | None) -> str:
    """What stands for the images and settings that pairs are of.

    Args:
        hashes: Content hashes, in their order.
        aligner: Fingerprint of the model.
        threshold: Cosine from which two images are alike; None for the pairs that are alike most.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.blake2b(f"{aligner} {threshold!r} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(hashes).tobytes())
    return digest.hexdigest()
