"""Samples of a stream: one image, encoded, with its captions.

Every sample is read, or is invalid and names the reason; what of a sample was left out stands in its `complaints`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clipvisionalign.data.captioned import SPLITS, Problem
from clipvisionalign.data.captions import CAPTION_NAMES, parse_captions
from clipvisionalign.data.columns import IDENTITY_COLUMNS, SPLIT_COLUMNS, find_column
from clipvisionalign.data.splits import canonical_split
from clipvisionalign.data.text_files import decode, split_lines
from clipvisionalign.images import RAW_SUFFIXES, ImageError, open_header

#: Endings of images in a shard; a sample without any of them is asked for an image by its members' content.
IMAGE_EXTENSIONS = frozenset({
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jp2", "j2k",
    "jxl", "mpo", "ppm", "pgm", "pbm", "pnm", "tga", "qoi", "hif", "heics", "heifs", "avifs",
}) | {suffix.removeprefix(".") for suffix in RAW_SUFFIXES}  # fmt: skip

#: Under these names a .json holds captions though a .txt is there; the others may be anything about the image.
PRIMARY_CAPTION_KEYS = ("captions", "caption", "sentences", "raw", "text")


@dataclass(frozen=True)
class Sample:
    """One image, encoded, with its captions.

    Attributes:
        name: Its file, and its key or row.
        image: The bytes of the image's file.
        captions: Its K captions.
        error: Its fault; "" for none. An invalid sample has no image and no captions.
        identity: Identity that is shown; "" for none.
        split: A split of its own; "" for none.
        warnings: What was left out of a sample that is used.
    """

    name: str
    image: bytes
    captions: tuple[str, ...]
    error: str = ""
    identity: str = ""
    split: str = ""
    warnings: tuple[Problem, ...] = ()

    def for_split(self, split: str) -> Sample:
        """The sample as one of a split.

        Args:
            split: The split of its file.

        Returns:
            The same sample; an invalid one where its own split differs.
        """
        if self.error or self.split in ("", split):
            return self
        return invalid_sample(self.name, f"its split is '{self.split}', in a file of '{split}'")


def invalid_sample(name: str, reason: str) -> Sample:
    """A sample that cannot be used.

    Args:
        name: Its file, and its key or row.
        reason: Its fault.

    Returns:
        The sample.
    """
    return Sample(name, b"", (), reason)


@dataclass
class SampleMetadata:
    """The data of a sample beside its image, while they are gathered.

    Attributes:
        location: Its file, and its key or row.
        captions: Its captions so far.
        problems: What was wrong so far.
        identity: Identity that is shown; "" for none.
        split: Its split; "" for none.
    """

    location: str
    captions: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    identity: str = ""
    split: str = ""

    def add_problem(self, kind: str, message: str, effect: str = "left out") -> None:
        """Add something that is wrong, once.

        Args:
            kind: Short name of the problem, such as "empty caption".
            message: What is wrong.
            effect: "left out", "mended" or "warning", see `Problem`.
        """
        problem = Problem(kind, self.location, message, effect)
        if problem not in self.problems:
            self.problems.append(problem)

    def add_captions(self, value: Any, prefix: str = "") -> None:
        """Add captions; parts that are none are problems.

        Args:
            value: Captions in any form that `parse_captions` takes.
            prefix: Where they are, for messages.
        """
        texts, failures = parse_captions(value)
        self.captions += map(_encodable, texts)
        for reason in failures:
            self.add_problem("empty caption", f"{prefix}{reason}")

    def add_captions_from(self, record: Mapping[str, Any], names: Iterable[str]) -> None:
        """Add the captions of the first key that has any, unless there are some already.

        Args:
            record: Values by key.
            names: Keys in order of preference; case does not count.
        """
        for name in _present_names(record, names):
            if not self.captions and record[name]:
                self.add_captions(record[name], f".json, {name}: ")

    def report_other_captions(self, values: Mapping[str, Any]) -> None:
        """Report captions that are none of those that are read.

        Args:
            values: Captions in any form, by where they are.
        """
        for location, value in values.items():
            others = [text for text in parse_captions(value)[0] if _encodable(text) not in self.captions]
            if others:
                message = f"{location}: {len(others)} captions beside those that are read, such as {others[0][:40]!r}"
                self.add_problem("captions not read", message, "warning")

    def read_attributes(self, record: Mapping[str, Any]) -> None:
        """Read identity and split; a split of another name than train, dev and test is ignored.

        Args:
            record: Values by key.
        """
        for column, names in (("identity", IDENTITY_COLUMNS), ("split", SPLIT_COLUMNS)):
            name = find_column(record, names)
            value = None if name is None else record[name]
            if value is None or value == "" or value != value:
                continue
            if isinstance(value, (dict, list, tuple, bytes)):
                self.add_problem(f"odd {column}", f"{name}: {type(value).__name__} where a text or a number belongs")
                continue
            setattr(self, column, str(value).strip())
        # Other words under such names are about something else: the file's own name has the split.
        self.split = split if (split := canonical_split(self.split)) in SPLITS else ""

    def to_sample(self, image: bytes | None) -> Sample:
        """The sample with its image.

        Args:
            image: The bytes of the image's file; None where there is none.

        Returns:
            The sample; an invalid one without an image or a caption.
        """
        if image and self.captions:
            captions = tuple(self.captions)
            return Sample(self.location, image, captions, "", self.identity, self.split, tuple(self.problems))
        missing = "no caption" if image else "no image"
        return invalid_sample(
            self.location, "; ".join(dict.fromkeys([missing, *(problem.message for problem in self.problems)]))
        )


def _encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_metadata(name: str, members: Mapping[str, bytes]) -> SampleMetadata:
    """Captions, identity and split of a sample by its members' endings."""
    metadata = SampleMetadata(name)
    content: Any = None
    if "json" in members:
        try:
            content = json.loads(decode(members["json"]).text)
        except (ValueError, RecursionError) as error:
            metadata.add_problem("broken row", f".json cannot be read: {error}")
    record = content if isinstance(content, dict) else {}
    metadata.read_attributes(record)
    if content is not None and not isinstance(content, dict):
        metadata.add_captions(content, ".json: ")
    metadata.add_captions_from(record, PRIMARY_CAPTION_KEYS)
    text = members.get("txt", next((members[ending] for ending in members if ending.endswith(".txt")), None))
    if not metadata.captions and text is not None:
        decoded = decode(text)
        if decoded.repair:
            metadata.add_problem("broken encoding", f".txt: {decoded.repair}", "mended")
        metadata.add_captions([line for line in split_lines(decoded.text) if line.strip()] or None, ".txt: ")
    metadata.add_captions_from(record, [name for name in CAPTION_NAMES if name not in PRIMARY_CAPTION_KEYS])
    metadata.report_other_captions(
        {f".json, {name}": record[name] for name in _present_names(record, PRIMARY_CAPTION_KEYS)}
    )
    if text is not None:
        metadata.report_other_captions({".txt": [line for line in split_lines(decode(text).text) if line.strip()]})
    return metadata


def _present_names(record: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The names that a record has, whatever their case."""
    return list(filter(None, (find_column(record, [name]) for name in names)))


def build_sample(name: str, members: Mapping[str, bytes]) -> Sample:
    """A sample of a shard.

    Args:
        name: Its file and key.
        members: Contents by ending. The first with an ending of `IMAGE_EXTENSIONS` is the image, else the first that is
            one by its content; .json and .txt hold captions.

    Returns:
        The sample; an invalid one with the reason where image or captions are missing.
    """
    image = next((members[ending] for ending in members if ending.rpartition(".")[2] in IMAGE_EXTENSIONS), None)
    if image is None:
        others = (content for ending, content in members.items() if ending not in ("json", "txt"))
        image = next(filter(_is_image, others), None)
    return _read_metadata(name, members).to_sample(image)


def _is_image(content: bytes) -> bool:
    try:
        open_header(content).close()
    except ImageError:
        return False
    return True
