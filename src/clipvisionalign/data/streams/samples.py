"""Samples of a stream: one image, encoded, with its captions.

Every sample is read, or is invalid and names the reason; what of a sample was left out stands in its `complaints`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clipvisionalign.data.captioned import SPLITS, Problem
from clipvisionalign.data.captions import CAPTION_NAMES, caption_texts
from clipvisionalign.data.columns import IDENTITY_COLUMNS, SPLIT_COLUMNS, column_named
from clipvisionalign.data.splits import split_word
from clipvisionalign.data.text_files import decode, split_lines
from clipvisionalign.images import PictureError, open_header

#: Endings of images in a shard; a sample without any of them is asked for an image by its members' content.
IMAGE_ENDINGS = frozenset({
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jp2", "j2k",
    "jxl", "mpo", "ppm", "pgm", "pbm", "pnm", "tga", "qoi",
})  # fmt: skip

#: Under these names a .json tells captions though a .txt is there; the others may be anything about the image.
OWN_CAPTIONS = ("captions", "caption", "sentences", "raw", "text")


@dataclass(frozen=True)
class Sample:
    """One image, encoded, with its captions.

    name: its file and its key or row. bad: what is wrong with it, "" for nothing. identity: of what it shows, if known.
    split: the one that it says it is of, if it does. complaints: what was left out of a sample that is used.
    """

    name: str
    image: bytes
    captions: tuple[str, ...]
    bad: str = ""
    identity: str = ""
    split: str = ""
    complaints: tuple[Problem, ...] = ()

    def of_split(self, split: str) -> Sample:
        """The same sample, bad where it says that it is of another split than the file that it is in."""
        if self.bad or self.split in ("", split):
            return self
        return bad_sample(self.name, f"says that its split is '{self.split}', in a file of '{split}'")


def bad_sample(name: str, reason: str) -> Sample:
    """A sample that cannot be used."""
    return Sample(name, b"", (), reason)


@dataclass
class _Told:
    """What is known of a sample beside its image."""

    place: str
    captions: list[str] = field(default_factory=list)
    wrong: list[Problem] = field(default_factory=list)
    identity: str = ""
    split: str = ""

    def complain(self, kind: str, message: str, effect: str = "left out") -> None:
        """Take note of something that is wrong, once."""
        problem = Problem(kind, self.place, message, effect)
        if problem not in self.wrong:
            self.wrong.append(problem)

    def add(self, value: Any, where: str = "") -> None:
        """Captions in any form; what of them is none is told with `where` it stands."""
        texts, wrong = caption_texts(value)
        self.captions += map(_encodable, texts)
        for reason in wrong:
            self.complain("empty caption", f"{where}{reason}")

    def add_named(self, record: Mapping[str, Any], names: Iterable[str]) -> None:
        """The captions under the first of `names`, whatever its case, that has any, unless there are some already."""
        for name in _present(record, names):
            if not self.captions and record[name]:
                self.add(record[name], f".json, {name}: ")

    def pass_over(self, values: Mapping[str, Any]) -> None:
        """Take note of captions, by the place where each stands, that are none of those that are read."""
        for where, value in values.items():
            others = [text for text in caption_texts(value)[0] if _encodable(text) not in self.captions]
            if others:
                message = f"{where}: {len(others)} captions beside those that are read, such as {others[0][:40]!r}"
                self.complain("captions not read", message, "warning")

    def describe(self, about: Mapping[str, Any]) -> None:
        """Take identity and split from a record."""
        for column, names in (("identity", IDENTITY_COLUMNS), ("split", SPLIT_COLUMNS)):
            name = column_named(about, names)
            value = None if name is None else about[name]
            if value is None or value == "" or value != value:
                continue
            if isinstance(value, (dict, list, tuple, bytes)):
                self.complain(f"odd {column}", f"{name}: {type(value).__name__} where a text or a number belongs")
                continue
            setattr(self, column, str(value).strip())
        # Other words under such names are about something else: the file's own name tells the split.
        self.split = split if (split := split_word(self.split)) in SPLITS else ""

    def sample(self, image: bytes | None) -> Sample:
        """The sample with its image; bad without an image or a caption."""
        if image and self.captions:
            captions = tuple(self.captions)
            return Sample(self.place, image, captions, "", self.identity, self.split, tuple(self.wrong))
        missing = "no caption" if image else "no image"
        return bad_sample(self.place, "; ".join(dict.fromkeys([missing, *(problem.message for problem in self.wrong)])))


def _encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _told_by(name: str, parts: Mapping[str, bytes]) -> _Told:
    """Captions, identity and split of a sample by its members' endings."""
    told = _Told(name)
    about: Any = None
    if "json" in parts:
        try:
            about = json.loads(decode(parts["json"]).text)
        except (ValueError, RecursionError) as error:
            told.complain("broken row", f".json cannot be read: {error}")
    record = about if isinstance(about, dict) else {}
    told.describe(record)
    if about is not None and not isinstance(about, dict):
        told.add(about, ".json: ")
    told.add_named(record, OWN_CAPTIONS)
    text = parts.get("txt", next((parts[ending] for ending in parts if ending.endswith(".txt")), None))
    if not told.captions and text is not None:
        decoded = decode(text)
        if decoded.mended:
            told.complain("broken encoding", f".txt: {decoded.mended}", "mended")
        told.add([line for line in split_lines(decoded.text) if line.strip()] or None, ".txt: ")
    told.add_named(record, [name for name in CAPTION_NAMES if name not in OWN_CAPTIONS])
    told.pass_over({f".json, {name}": record[name] for name in _present(record, OWN_CAPTIONS)})
    if text is not None:
        told.pass_over({".txt": [line for line in split_lines(decode(text).text) if line.strip()]})
    return told


def _present(record: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names that a record has, whatever their case."""
    return list(filter(None, (column_named(record, [name]) for name in names)))


def _sample(name: str, parts: Mapping[str, bytes]) -> Sample:
    """A sample of a shard by its members' endings."""
    image = next((parts[ending] for ending in parts if ending.rpartition(".")[2] in IMAGE_ENDINGS), None)
    if image is None:
        others = (content for ending, content in parts.items() if ending not in ("json", "txt"))
        image = next(filter(_is_image, others), None)
    return _told_by(name, parts).sample(image)


def _is_image(content: bytes) -> bool:
    try:
        open_header(content).close()
    except PictureError:
        return False
    return True
