"""WebDataset shards: which members of a tar file make which samples.

- The members of a sample have one name before their endings: `KEY.jpg` (or .png, .webp, ...) with `KEY.json`
  (`{"captions": [...]}`, also `caption`, `text`, ...) or `KEY.txt`, a caption a line. Captions in the .json count
  before the .txt, and a .json without any hides none.
- A shard is read by its headers first: members of a sample need not be neighbours, and a point within a key is part of
  it where two images would else become one (`x.1.jpg`, `x.2.jpg`). A name that comes again begins another sample.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.streams.samples import IMAGE_EXTENSIONS, Sample, build_sample

#: Names of files that webdataset passes over.
META = re.compile(r"__[^/]*__($|/)")


@dataclass(frozen=True)
class Member:
    """A file within a shard.

    Attributes:
        name: Its name without "./".
        tar_info: Its entry in the archive.
    """

    name: str
    tar_info: tarfile.TarInfo

    @property
    def stem(self) -> str:
        """The file's name without its extension, which all members of a sample share."""
        return self.name.rpartition(".")[0]

    @property
    def extension(self) -> str:
        """What follows the last point of the name, in lower case."""
        return self.name.rpartition(".")[2].lower()


@dataclass(frozen=True)
class ShardSample:
    """The members of one sample of a shard.

    Attributes:
        key: Name of the sample, numbered where a name is repeated.
        stem: The part of the members' names before their endings.
        members: The members, in the order of the archive.
    """

    key: str
    stem: str
    members: list[Member]

    def read(self, tar: tarfile.TarFile, shard: str) -> Sample:
        """Read the sample.

        Args:
            tar: The archive.
            shard: Its name, for messages.

        Returns:
            The sample; an invalid one with the reason where image or captions are missing.
        """
        contents: dict[str, bytes] = {}
        for member in self.members:
            extension = member.name.removeprefix(f"{self.stem}.").lower() if self.stem else member.name
            try:
                file = tar.extractfile(member.tar_info)
            except KeyError:
                # A link to what is not in the archive.
                file = None
            if file is not None:
                contents.setdefault(extension, file.read())
        return build_sample(f"{shard}, {self.key}", contents)


@dataclass(frozen=True)
class ShardIndex:
    """The samples of a shard.

    Attributes:
        samples: In the order in which they begin.
        skipped_files: Names of files that are of no sample.
    """

    samples: list[ShardSample]
    skipped_files: list[str]

    @property
    def unused_images(self) -> list[str]:
        """Names of images whose sample has another one, which is read."""
        images = ([m.name for m in sample.members if m.extension in IMAGE_EXTENSIONS] for sample in self.samples)
        return [name for names in images for name in names[1:]]


def index_shard(tar: tarfile.TarFile) -> ShardIndex:
    """Which members of a shard make which samples, by their names alone.

    Args:
        tar: The archive, of which the headers are read.

    Returns:
        The samples, and the files that are of none.
    """
    groups: dict[tuple[str, int], list[Member]] = {}
    occurrences: Counter[str] = Counter()
    skipped_files = []
    for tar_info in tar:
        name = tar_info.name.removeprefix("./")
        if tar_info.isdir() or META.match(name):
            continue
        folder, slash, file = name.rpartition("/")
        if not (tar_info.isreg() or tar_info.islnk()) or file.startswith(".") or not file.partition(".")[2]:
            skipped_files.append(name)
            continue
        key = f"{folder}{slash}{file.partition('.')[0]}"
        groups.setdefault((key, occurrences[name]), []).append(Member(name, tar_info))
        occurrences[name] += 1
    samples = []
    for (key, occurrence), members in groups.items():
        for stem, own_members in _group_members(key, members).items():
            samples.append(ShardSample(f"{stem} ({occurrence + 1})" if occurrence else stem, stem, own_members))
    return ShardIndex(sorted(samples, key=lambda sample: sample.members[0].tar_info.offset), skipped_files)


def _group_members(key: str, members: Sequence[Member]) -> dict[str, list[Member]]:
    """The members that webdataset takes for one sample, `key`, by the samples that they are: one for each image that a
    caption may belong to."""
    images = dict.fromkeys(member.stem for member in members if member.extension in IMAGE_EXTENSIONS)
    texts = {member.stem for member in members if member.extension in ("json", "txt")}
    # A second image without a caption of its own ("x.mask.png" beside "x.jpg") is another part of its sample.
    stems = [s for s in images if s in texts or not any(s.startswith(f"{other}.") for other in images)]
    groups: dict[str, list[Member]] = {stem: [] for stem in stems}
    unassigned = []
    for member in members:
        matching = [stem for stem in stems if member.name.startswith(f"{stem}.")]
        if matching:
            groups[max(matching, key=len)].append(member)
        else:
            unassigned.append(member)
    for member in unassigned:
        if not stems:
            groups.setdefault(key, []).append(member)
        elif len(stems) == 1 and (member.stem == key or stems[0] not in texts):
            groups[stems[0]].append(member)
        else:
            # Captions whose image is not there.
            groups.setdefault(member.stem, []).append(member)
    return groups


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a shard in a block.

    Args:
        path: A tar file.

    Yields:
        The archive.

    Raises:
        DataError: It is no tar file, or turns out to be cut short within the block.
    """
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole tar file: {error}") from None
