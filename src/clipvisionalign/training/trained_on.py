"""What a figure has to be read with whose images a run was trained on, or one that it starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.fingerprint import changed, data_contents
from clipvisionalign.data.of_run import about_data, directory_of, settings_of
from clipvisionalign.data.streams.sources import Saved, Shards
from clipvisionalign.data.trained_on import TRAINED_ON, Match, TrainedOn

#: Images that are named, of all that were trained on.
NAMED = 10


def keep_trained_on(
    run: Path, train: CaptionedImages | Shards | Saved, say: Callable[[str], None], shown: bool
) -> None:
    """Keep in a run folder by what its training images are known again. A run is as good without: what cannot be read
    is told."""
    try:
        if isinstance(train, CaptionedImages):
            found = TrainedOn.of(((row.name, row.image) for row in train), len(train), shown)
        else:
            good = ((each.name, each.image) for each in train.samples() if not each.bad)
            found = TrainedOn.of(good, train.count, shown)
        found.save(run / TRAINED_ON)
    except (OSError, DataError) as error:
        say(f"warning: by what its images are known again was not kept: {error}")


@dataclass(frozen=True)
class TrainedNote:
    """note: in words; matches: the images themselves, where the run has kept by what it knows them."""

    note: str
    images: int
    matches: list[Match] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Counts, and the first of the images by name."""
        same = sum(match.same for match in self.matches)
        named = [vars(match) for match in self.matches[:NAMED]]
        return {"images": self.images, "same": same, "nearly": len(self.matches) - same, "first": named}


def trained_note(run: Path, data: CaptionedImages, part: CaptionedImages) -> TrainedNote | None:
    """What a figure of a run on a gallery has to be read with, where the run was trained on images of it, or one of the
    runs was that it starts from (`--init`); None where that is not known.

    part: the gallery, checked, one split of `data` as it was read. Images are known by their content, wherever they
    come from. Of a run from before that was kept, they are known by the place of its data set, and in any other by
    their captions and the sizes of their files, where all of a training split are there.
    """
    told, split = run, part.rows[0].split
    seen: set[Path] = set()
    found_by: list[TrainedNote] = []
    while told.resolve() not in seen and (told / "data.json").is_file():
        seen.add(told.resolve())
        by = "the run" if told == run else f"{told}, which the run starts from,"
        kept = (told / TRAINED_ON).is_file()
        found = _by_content(told, by, part) if kept else _by_place(told, by, data.split(split))
        found_by += [found] if found is not None else []
        told = _init_of(told) or told
    # The run itself, unless one that it starts from was trained on more of them.
    return max(found_by, key=lambda found: len(found.matches) or found.images, default=None)


_SAYS = "figures of training images, which say nothing about any others"


def _by_content(run: Path, by: str, part: CaptionedImages) -> TrainedNote | None:
    matches = TrainedOn.load(run / TRAINED_ON).among(part.rows)
    same = sum(match.same for match in matches)
    near = len(matches) - same
    if not matches:
        return None
    which = "these images" if same == len(part) else f"{same:,} of these {len(part):,} images"
    if near:
        which = f"{which} and nearly the same as {near:,} others of them" if same else (
            f"nearly the same images as {near:,} of these {len(part):,}"
        )  # fmt: skip
    return TrainedNote(f"{by} was trained on {which}: {_SAYS}", len(part), matches)


def _by_place(run: Path, by: str, part: CaptionedImages) -> TrainedNote | None:
    about = about_data(run)
    here = part.rows[0].split == "train" and part.source.resolve() == Path(about.get("source", "")).resolve()
    if not here and not _were_trained_on(about, part):
        return None
    count = about.get("train", {}).get("images", len(part))
    which = "these images" if count >= len(part) else f"{count:,} of these {len(part):,} images"
    return TrainedNote(f"{by} was trained on {which}: {_SAYS}", len(part))


def _were_trained_on(about: dict[str, Any], part: CaptionedImages) -> bool:
    """Whether images are the training split of a run, by what its data.json has: as it was read, or as it was used."""
    known = about.get("as_read", {}).get("train")
    if about.get("train", {}).get("fingerprint") == part.fingerprint():
        return True
    # Who belongs to whom is a setting of the run, not of the images.
    return known is not None and set(changed(known, data_contents(part, pictures=False))) <= {"partners"}


def _init_of(run: Path) -> Path | None:
    """The run that a run started from, None where it started from none."""
    init = settings_of(run).get("init")
    return directory_of(run) / init if init else None
