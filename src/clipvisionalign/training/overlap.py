"""Notes for figures on images that a run, or one that it was initialised from, was trained on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.hashes import changed_keys, dataset_hashes
from clipvisionalign.data.joined_captions import with_captions
from clipvisionalign.data.run_data import data_record, run_chain
from clipvisionalign.data.streams.sources import SavedDatasetStream, ShardStream
from clipvisionalign.data.training_images import TRAINED_ON_FILE, TrainedOnImages, TrainedOnMatch

logger = logging.getLogger(__name__)

#: Images that are named, of all that were trained on.
MAX_NAMED_IMAGES = 10


def save_trained_on(run: Path, train: CaptionedImages | ShardStream | SavedDatasetStream, shown: bool) -> None:
    """Save by what the training images of a run are recognised in other galleries.

    A failure is logged, and ends nothing.

    Args:
        run: The run folder.
        train: The training data, or its stream.
        shown: Whether a live line is shown on standard error.
    """
    try:
        if isinstance(train, CaptionedImages):
            record = TrainedOnImages.from_images(((row.name, row.image) for row in train), len(train), shown)
        else:
            good = ((each.name, each.image) for each in train.samples() if not each.error)
            record = TrainedOnImages.from_images(good, train.count, shown)
        record.save(run / TRAINED_ON_FILE)
    except (OSError, DataError) as error:
        logger.warning(f"the hashes of its images were not kept: {error}")


@dataclass(frozen=True)
class TrainedNote:
    """A note for figures on images that a run was trained on.

    Attributes:
        note: The note.
        images: Number of images that the figures are of.
        matches: The images that were trained on, where the run has their hashes.
    """

    note: str
    images: int
    matches: list[TrainedOnMatch] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The note as JSON records it.

        Returns:
            Counts, and the first of the images by name.
        """
        same = sum(match.same for match in self.matches)
        named = [vars(match) for match in self.matches[:MAX_NAMED_IMAGES]]
        return {"images": self.images, "same": same, "nearly": len(self.matches) - same, "first": named}


def training_overlap_note(run: Path, data: CaptionedImages, part: CaptionedImages) -> TrainedNote | None:
    """The note for figures of a run on images that it was trained on, or a run that it started from (`--init`).

    Images are recognised by their content, wherever they come from. In runs from before that was kept, they are
    recognised by the path of the data set, else by captions and sizes of files, where all of a training split are
    there.

    Args:
        run: The run folder.
        data: The data set as it was read.
        part: The gallery: one split of it, checked.

    Returns:
        The note of the run that was trained on most of them; None if there is none, or it is unknown.
    """
    split, notes = part.rows[0].split, list[TrainedNote]()
    for current_run in run_chain(run):
        has_record = (current_run / TRAINED_ON_FILE).is_file()
        # An export in a library's layout has its record alone.
        if not has_record and not (current_run / "data.json").is_file():
            break
        by = "the run" if current_run == run else f"{current_run}, which the run starts from,"
        note = (
            _note_by_content(current_run, by, part)
            if has_record
            else _note_by_source(current_run, by, data.split(split))
        )
        notes += [note] if note is not None else []
    # The run itself, unless one that it starts from was trained on more of them.
    return max(notes, key=lambda note: len(note.matches) or note.images, default=None)


_TRAINING_IMAGES_NOTE = "figures of training images, which do not generalise to others"


def _note_by_content(run: Path, by: str, part: CaptionedImages) -> TrainedNote | None:
    matches = TrainedOnImages.load(run / TRAINED_ON_FILE).matches(part.rows)
    same = sum(match.same for match in matches)
    near = len(matches) - same
    if not matches:
        return None
    which = "these images" if same == len(part) else f"{same:,} of these {len(part):,} images"
    if near:
        which = f"{which} and nearly the same as {near:,} others of them" if same else (
            f"nearly the same images as {near:,} of these {len(part):,}"
        )  # fmt: skip
    return TrainedNote(f"{by} was trained on {which}: {_TRAINING_IMAGES_NOTE}", len(part), matches)


def _note_by_source(run: Path, by: str, part: CaptionedImages) -> TrainedNote | None:
    about = data_record(run)
    is_training_split = (
        part.rows[0].split == "train" and part.source.resolve() == Path(about.get("source", "")).resolve()
    )
    if not is_training_split and not _were_trained_on(about, part):
        return None
    count = about.get("train", {}).get("images", len(part))
    which = "these images" if count >= len(part) else f"{count:,} of these {len(part):,} images"
    return TrainedNote(f"{by} was trained on {which}: {_TRAINING_IMAGES_NOTE}", len(part))


def _were_trained_on(about: dict[str, Any], part: CaptionedImages) -> bool:
    """Whether images are the training split of a run, by what its data.json has: as it was read, or as it was used."""
    part = with_captions(part, "each")
    contents = about.get("as_read", {}).get("train")
    if about.get("train", {}).get("fingerprint") == part.fingerprint():
        return True
    # Who belongs to whom is a setting of the run, not of the images.
    return contents is not None and set(changed_keys(contents, dataset_hashes(part, read_images=False))) <= {"partners"}
