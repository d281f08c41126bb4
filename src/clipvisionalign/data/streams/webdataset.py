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
    """A file within a shard. name: without "./"; tar_info: its entry in the archive."""

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
    """The members of one sample of a shard, the key before their endings."""

    key: str
    stem: str
    members: list[Member]

    def read(self, tar: tarfile.TarFile, shard: str) -> Sample:
        """The sample itself."""
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
    """The samples of a shard in the order in which they begin; skipped_files: names of files that are of none."""

    samples: list[ShardSample]
    skipped_files: list[str]

    @property
    def unused_images(self) -> list[str]:
        """Names of images whose sample has another one, which is read."""
        images = ([m.name for m in sample.members if m.extension in IMAGE_EXTENSIONS] for sample in self.samples)
        return [name for names in images for name in names[1:]]


def index_shard(tar: tarfile.TarFile) -> ShardIndex:
    """Which members make which samples, by their names alone."""
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
    """A shard. Raises DataError where it is no whole tar file."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a whole tar file: {error}") from None
