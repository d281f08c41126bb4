"""`CaptionedImages`: the one table that every data set is read into.

A row is one image with its captions, its split, and (where the data set has it) the identity shown on it: images of
one identity are positives of each other's captions. Which captions belong to which images is decided here, by the
table's `identity`, for losses, figures, audits and minimal pairs alike. What a reader had to leave out or mend stands
in `problems`, row by row, with its place; nothing is dropped without a word: the rows of the files are those that were
read and those that a problem leaves out (`Problem.rows`).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from clipvisionalign.counts import count_noun
from clipvisionalign.data.split_file import write_splits_command

SPLITS = ("train", "dev", "test")

#: Which captions belong to which images. "auto": an image's own, and those of all images of the identity that the data
#: set gives it; "caption": those, and every caption that is equal to one of them word by word; "none": its own alone.
IdentityMode = Literal["auto", "caption", "none"]

#: What stands for an image's captions: "each" of them, or texts of several "joined" (`data/joined_captions.py`).
CaptionMode = Literal["each", "joined"]

#: Marks at a caption's end that make no difference.
FINAL_PUNCTUATION = ".!?,;:\N{HORIZONTAL ELLIPSIS}\N{IDEOGRAPHIC FULL STOP}\N{IDEOGRAPHIC COMMA}\N{DEVANAGARI DANDA}"


def normalize_caption(caption: str) -> str:
    """What two captions have in common if and only if they are equal word by word.

    Letters are compared without case and in Unicode's NFC form; any white space is one blank; punctuation at the end
    does not count. A caption of punctuation alone is compared as it is.

    Args:
        caption: The caption.

    Returns:
        Its normal form.

    Source of the comparison without case: The Unicode Standard, section 3.13, D145 (canonical caseless matching).

    >>> normalize_caption("A dog runs .") == normalize_caption("a  DOG runs")
    True
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", caption).casefold())
    text = " ".join(folded.split())
    return text.rstrip(f" {FINAL_PUNCTUATION}") or text


def text_id(caption: str) -> int:
    """A number that is equal for captions that are equal word by word, on every process and machine.

    Args:
        caption: The caption.

    Returns:
        `hash_text` of its normal form.
    """
    return hash_text(normalize_caption(caption))


def hash_text(text: str) -> int:
    """56 bits of a text's SHA-256.

    Args:
        text: The text; lone surrogates are allowed.

    Returns:
        A number from 0 to 2^56 - 1.
    """
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:7], "big")


class DataError(ValueError):
    """A data set that cannot be read at all: the message names the thing, the place and the way out."""


@dataclass(frozen=True)
class Problem:
    """One fault of a data set.

    Attributes:
        kind: Short name, the same for every problem of its sort, such as "empty caption".
        place: Where it is, such as "captions.txt, line 812".
        message: What is wrong there.
        effect: "left out" (the row is not used), "mended" (used after a repair) or "warning" (used as it is).
        rows: Number of rows of the data set's files that are left out by it.
    """

    kind: str
    place: str
    message: str
    effect: str = "left out"
    rows: int = 0

    def __str__(self) -> str:
        return f"{self.place}: {self.message} ({self.effect})"


@dataclass(frozen=True)
class CaptionedImage:
    """One image and the captions that belong to it.

    Attributes:
        name: Its name in the data set.
        image: Its file, or the bytes of one.
        captions: Its K captions, in the order in which they were read.
        split: "train", "dev" or "test".
        identity: What it shows, equal for images whose captions are each other's positives; None if unknown.
        location: Where it was read, for an image that is no file; "" otherwise.
        row_count: Number of rows of the data set's files that it was read from.
        group: Value of the column `--group`; images of one value are in one split. None without it.
        parts: The captions that `captions` are joined of; empty where these are as they were read.
    """

    name: str
    image: Path | bytes
    captions: tuple[str, ...]
    split: str
    identity: str | None = None
    location: str = ""
    row_count: int = 0
    group: str | None = None
    parts: tuple[str, ...] = ()


@dataclass
class CaptionedImages:
    """A data set: one row per image, in a fixed order; N images with M captions.

    It is read by `read_captioned_images`, or made from Python. `len` is the number of images, and iteration yields the
    rows (`CaptionedImage`); images are paths or bytes, which are not opened here.

    >>> rows = [CaptionedImage(f"{n}.jpg", Path(f"{n}.jpg"), ("a dog", f"photo {n}"), "train") for n in range(3)]
    >>> data = CaptionedImages(rows)
    >>> len(data), data.captions[:2], data.caption_image.tolist()
    (3, ['a dog', 'photo 0'], [0, 0, 1, 1, 2, 2])
    >>> data.with_identity("caption").positive_texts()[0] == {"a dog", "photo 0"}
    True

    Attributes:
        rows: The images with their captions.
        source: Where it was read from.
        layout: Name of the reader; "memory" for one that was made from Python.
        official_splits: Whether the data set has splits of its own; False where a hash assigned them
            (`data/splits.py`).
        problems: What was left out or mended, row by row.
        identity: Which captions belong to which images, see `IdentityMode`.
        rows_in_files: Number of rows of its files, read or left out; 0 if unknown.
        notes: What was ignored that is no row, such as columns.
        split_rule: Number of the rule by which a hash assigned splits.
        class_names: Of class folders, the name of each class by its folder, the identity of its images; else empty.
        caption_mode: What stands for an image's captions, see `CaptionMode`.
        near_duplicates: Groups of images that are equal or nearly equal, by their names, where they were compared.
    """

    rows: list[CaptionedImage]
    source: Path = Path(".")
    layout: str = "memory"
    official_splits: bool = True
    problems: list[Problem] = field(default_factory=list)
    identity: IdentityMode = "auto"
    rows_in_files: int = 0
    notes: list[str] = field(default_factory=list)
    split_rule: int = 0
    class_names: dict[str, str] = field(default_factory=dict)
    caption_mode: CaptionMode = "each"
    near_duplicates: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[CaptionedImage]:
        return iter(self.rows)

    def split(self, name: str) -> CaptionedImages:
        """The images of one split, with their captions.

        Args:
            name: "train", "dev" or "test".

        Returns:
            A data set of these rows in their order, with all problems and notes of this one.

        Raises:
            DataError: The split is empty; the message names those that are not.
        """
        rows = [row for row in self.rows if row.split == name]
        if not rows:
            available = ", ".join(
                f"{split} ({count_noun(count, 'image')})" for split, count in sorted(self.split_sizes().items())
            )
            message = f"the split '{name}' is empty; this data set has: {available or 'no images'}{self.splits_hint()}"
            raise DataError(f"{self.source}: {message}")
        return replace(self, rows=rows)

    def splits_hint(self) -> str:
        """How to get other splits, where a hash assigned these.

        Returns:
            The end of a message; "" where the data set has splits of its own.
        """
        return "" if self.official_splits else f"; {write_splits_command(self.source)} shares the images out"

    def first_by_hash(self, count: int) -> CaptionedImages:
        """A subset of the images, drawn by a hash of their names: a larger subset contains every smaller one.

        Args:
            count: Number of images; all if there are fewer.

        Returns:
            A data set of these images, in the order that they have here.
        """
        ordered = sorted(self.rows, key=lambda row: hashlib.sha256(row.name.encode("utf-8", "surrogatepass")).digest())
        selected = {row.name for row in ordered[:count]}
        return replace(self, rows=[row for row in self.rows if row.name in selected])

    def split_sizes(self) -> dict[str, int]:
        """Number of images in each split that has any.

        Returns:
            Numbers by the names of splits.
        """
        return dict(Counter(row.split for row in self.rows))

    @property
    def captions(self) -> list[str]:
        """(M,) all captions, image after image."""
        return [caption for row in self.rows for caption in row.captions]

    @property
    def texts_entry(self) -> dict[str, str]:
        """The form of the captions as an entry of a report; empty where each stands as it is."""
        return {} if self.caption_mode == "each" else {"texts": self.caption_mode}

    @property
    def images(self) -> list[Path | bytes]:
        """(N,) all images, as paths or bytes."""
        return [row.image for row in self.rows]

    @property
    def caption_image(self) -> np.ndarray:
        """(M,) index of each caption's image among `images`."""
        return np.repeat(np.arange(len(self.rows)), [len(row.captions) for row in self.rows])

    def with_identity(self, identity: str) -> CaptionedImages:
        """The same rows with another rule for which captions belong to which images.

        Args:
            identity: "auto", "caption" or "none", see `IdentityMode`.

        Returns:
            A data set that shares the rows.

        Raises:
            ValueError: It is none of these.
        """
        return replace(self, identity=validate_identity(identity))

    @property
    def image_identity(self) -> np.ndarray | None:
        """(N,) number of each image's identity; None where there are none, or `identity` is "none"."""
        if self.identity == "none" or not any(row.identity is not None for row in self.rows):
            return None
        ids: dict[str, int] = {}
        keys = [f"identity {row.identity}" if row.identity is not None else f"image {row.name}" for row in self.rows]
        return np.array([ids.setdefault(key, len(ids)) for key in keys])

    @property
    def caption_text_ids(self) -> np.ndarray:
        """(M,) int64, a number for each caption: equal where captions are equal word by word."""
        return np.array([text_id(caption) for caption in self.captions], dtype=np.int64)

    @property
    def shared_text_ids(self) -> np.ndarray | None:
        """`caption_text_ids` where equal captions belong to the same images ("caption"), else None."""
        return self.caption_text_ids if self.identity == "caption" else None

    def positive_texts(self) -> list[set[str]]:
        """The captions that are true of each image: its own, and those of other images of its identity.

        Returns:
            N sets of captions in the form of `normalize_caption`.
        """
        identity = self.image_identity
        owners = list(range(len(self.rows))) if identity is None else identity.tolist()
        texts: dict[int, set[str]] = {}
        for owner, row in zip(owners, self.rows, strict=True):
            texts.setdefault(owner, set()).update(map(normalize_caption, row.captions))
        return [texts[owner] for owner in owners]

    def fingerprint(self) -> str:
        """A hash of names, captions, splits, identities and images.

        An image in memory counts by its bytes, a file by its size alone, or as missing.

        Returns:
            16 hex digits.
        """
        digest = hashlib.sha256()
        for row in self.rows:
            if isinstance(row.image, bytes):
                content = hashlib.sha256(row.image).hexdigest()
            else:
                content = str(row.image.stat().st_size) if row.image.is_file() else "missing"
            for part in (row.name, row.split, row.identity or "", content, *row.captions):
                digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()[:16]


def validate_identity(identity: str) -> IdentityMode:
    """Check a rule for which captions belong to which images.

    Args:
        identity: A word.

    Returns:
        The same word.

    Raises:
        ValueError: It is none of `IdentityMode`.
    """
    mode: IdentityMode = _one_of("--identity", identity, get_args(IdentityMode))
    return mode


def validate_caption_mode(mode: str) -> CaptionMode:
    """Check a form of captions.

    Args:
        mode: A word.

    Returns:
        The same word.

    Raises:
        ValueError: It is none of `CaptionMode`.
    """
    valid: CaptionMode = _one_of("--captions", mode, get_args(CaptionMode))
    return valid


def _one_of(flag: str, word: str, words: Sequence[Any]) -> Any:
    """A word that is one of those that a flag takes. Raises ValueError, which names them."""
    if word not in words:
        raise ValueError(f"{flag} {word}: it is one of {', '.join(words)}")
    return word
