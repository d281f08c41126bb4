"""The galleries on which a tuned model and its base are compared: a split of the run's own data, and of other data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.adaptation.paired_bootstrap import PairedSamples
from clipvisionalign.counts import count_noun
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.run_data import differences_from_run, holds_data_of_run, is_data_of_run, read_data_of_run
from clipvisionalign.data.sealed_split import warn_of_look
from clipvisionalign.data.training_images import TrainedOnImages
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import is_pretrained
from clipvisionalign.retrieval.metrics import chance_metrics, metrics_of_ranks
from clipvisionalign.retrieval.ranks import PositiveRanks, Positives
from clipvisionalign.study.statistics import image_contributions, of_units
from clipvisionalign.training.halves import DevHalves, positives_of, split_halves
from clipvisionalign.training.opened_run import OpenedRun
from clipvisionalign.training.overlap import training_overlap_note
from clipvisionalign.training.selection_notes import in_sample_note, init_selection_note

#: Resamples of a bootstrap, as for the figures of a run.
_RESAMPLES = 1000


@dataclass(frozen=True)
class Gallery:
    """A split of a data set, whole, on which models are compared.

    Attributes:
        data: the data set, as it was read.
        part: the split, without images that cannot be decoded.
        split: its name.
        is_own: whether it is the run's own data set; for the first gallery, whether it still is, by path or content.
        is_foreign: whether it was given as data that the run was not tuned on.
        own_images: how many images of a foreign one are the run's own, by content: trained on, or of its data set.
        differences: what of it is otherwise than the run has recorded it, a line each.
    """

    data: CaptionedImages
    part: CaptionedImages
    split: str
    is_own: bool
    is_foreign: bool = False
    own_images: int = 0
    differences: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The data set's file or folder."""
        return str(self.data.source)

    @cached_property
    def positives(self) -> Positives:
        """Who belongs to whom."""
        return positives_of(self.part)

    @cached_property
    def halves(self) -> DevHalves | None:
        """The halves that choose for each other; None for too few images."""
        return split_halves(self.part)

    def notes(self, run: str, base: str) -> list[str]:
        """What figures on this gallery have to be read with.

        Args:
            run: the run that was tuned.
            base: what it is compared with.

        Returns:
            A sentence each.
        """
        notes = list(self.differences)
        for model in (run, base):
            if is_pretrained(model):
                continue
            overlap = training_overlap_note(Path(model), self.data, self.part)
            notes += [f"{model}: {overlap.note}"] if overlap else []
        chosen_on = init_selection_note(Path(run), self.part)
        notes += [chosen_on.replace(f"it starts from {run}, ", f"{run}: ", 1)] if chosen_on else []
        base_note = None if is_pretrained(base) else in_sample_note(Path(base), self.part)
        return notes + ([f"{base}: {base_note}"] if base_note else [])

    def header(self) -> dict[str, Any]:
        """What a report on this gallery begins with."""
        return {
            "data": self.source,
            **self.data.texts_entry,
            "own": self.is_own,
            "foreign": self.is_foreign,
            "own_images": self.own_images,
            "split": self.split,
            "images": len(self.part),
            "captions": len(self.part.captions),
        }

    def figures(self, ranks: PositiveRanks) -> dict[str, Any]:
        """The figures of a model, with 95% intervals by bootstrap over images.

        Args:
            ranks: its ranks of this gallery.

        Returns:
            As `RetrievalMetrics.to_dict`.
        """
        owners, unit = self.positives.caption_image, self.positives.identity
        return metrics_of_ranks(ranks, owners, _RESAMPLES, unit=unit).to_dict()

    def chance(self, ranks: PositiveRanks) -> float:
        """The rsum of a random ranking.

        Args:
            ranks: of any model on this gallery.

        Returns:
            0 to 600.
        """
        return float(chance_metrics(ranks)["rsum"])

    def paired(self, ranks: Mapping[str, PositiveRanks]) -> PairedSamples:
        """The rsum of models with resamples of the images (or identities), the same for all of them.

        Args:
            ranks: Ranks of each model on this gallery, by its name.

        Returns:
            What differences and shares are computed from.
        """
        return PairedSamples.of({name: self._by_unit(self._rsum_by_image(each)) for name, each in ranks.items()})

    def _rsum_by_image(self, ranks: PositiveRanks) -> np.ndarray:
        return image_contributions(ranks, self.positives.caption_image, "rsum")

    def _by_unit(self, table: np.ndarray) -> np.ndarray:
        unit = self.positives.identity
        return table if unit is None else of_units(table, unit)


def read_galleries(
    run: str,
    foreign: list[str],
    split: str,
    source: str = "",
    layout: str = "auto",
    identity: str | None = None,
    base: str = "",
) -> list[CaptionedImages]:
    """The run's own data set, then the others, each with a split of that name; no image is opened.

    Args:
        run: a run folder.
        foreign: other data sets, read in their own layouts.
        split: the split that is to be measured.
        source: the run's data set, where it is no longer where it was.
        layout: of `source`.
        identity: which captions belong to which images; None for the run's setting.
        base: another model that is measured on them.

    Returns:
        The data sets, whole.

    Raises:
        DataError: a data set cannot be read, or has no such split.
        ValueError: the run does not record its data.
    """
    data_sets = [read_data_of_run(run, source, layout, identity, split)]
    data_sets += [read_data_of_run(run, each, "auto", identity, split) for each in foreign]
    for data in data_sets:
        try:
            data.split(split)
        except DataError as error:
            raise DataError(f"{error}{_choice_hint(data, split)}") from None
    for data in data_sets:
        for model in dict.fromkeys((run, base or run)):
            warn_of_look(model, data.split(split))
    return data_sets


def _choice_hint(data: CaptionedImages, split: str) -> str:
    """What to do about a data set without the split on which models are chosen: the end of a message."""
    other = next((name for name in ("test", *sorted(data.split_sizes())) if data.split_sizes().get(name)), "")
    if split != "dev" or not other:
        return ""
    return f"; models are chosen, and by default measured, on dev: 'worth --no-blend --split {other}' needs none"


def check_galleries(run: str, aligner: Aligner, data_sets: list[CaptionedImages], split: str) -> list[Gallery]:
    """Decode the images of a split of each data set.

    Args:
        run: the run that was tuned.
        aligner: its model.
        data_sets: the run's own, or what stands for it, then foreign ones.
        split: the split that is to be measured.

    Returns:
        A gallery of each.
    """
    own = data_sets[0]
    is_own = holds_data_of_run(run, own, split)
    differences = differences_from_run(run, own, split)
    part = OpenedRun(run, aligner, own, split, differences).gallery()
    galleries = [Gallery(own, part, split, is_own, differences=tuple(differences))]
    foreign = data_sets[1:]
    # A record of them takes the time of decoding them.
    held_out = _held_out_images(own, split) if foreign and is_own else None
    for data in foreign:
        part = OpenedRun(run, aligner, data, split, []).gallery()
        count = len(_own_images(run, data, part, held_out))
        notes = _foreign_notes(run, data, part, count)
        galleries.append(Gallery(data, part, split, False, True, count, tuple(notes)))
    return galleries


def check_foreign(galleries: list[Gallery]) -> None:
    """Check that foreign data sets show what is kept of other data than the run's own.

    Args:
        galleries: the run's own, then foreign ones.

    Raises:
        ValueError: most images of one are the run's own.
    """
    for gallery in galleries:
        if gallery.is_foreign and 2 * gallery.own_images > len(gallery.part):
            raise ValueError(
                f"--foreign {gallery.source}: {gallery.own_images:,} of its {count_noun(len(gallery.part), 'image')} "
                f"({gallery.split}) are the run's own: what is kept of them is nothing kept of other data; give "
                "another data set, leave it out, or choose nothing by it (blend --alpha A, worth --no-blend)"
            )


def _held_out_images(own: CaptionedImages, split: str) -> TrainedOnImages:
    """By what the images of the run's data set are recognised that it was chosen by, or that are measured."""
    rows = [row for row in own.rows if row.split in ("dev", split)]
    return TrainedOnImages.from_images(((row.name, row.image) for row in rows), len(rows))


def _own_images(run: str, data: CaptionedImages, part: CaptionedImages, held_out: TrainedOnImages | None) -> set[str]:
    """The images of a foreign gallery, by name, that the run was trained on, or that are in its own data set."""
    overlap = training_overlap_note(Path(run), data, part)
    # A run that keeps no hashes knows no single images.
    if holds_data_of_run(run, data, part.rows[0].split) or (overlap is not None and not overlap.matches):
        return {row.name for row in part.rows}
    trained_on = {match.image for match in overlap.matches} if overlap else set()
    return trained_on | ({match.image for match in held_out.matches(part.rows)} if held_out else set())


def _foreign_notes(run: str, data: CaptionedImages, part: CaptionedImages, own_images: int) -> list[str]:
    """That a data set is the run's own, or has images of it."""
    if is_data_of_run(run, data.source):
        return [f"--foreign {data.source}: is the run's own data set: nothing is learned of others from it"]
    if not own_images:
        return []
    return [
        f"--foreign {data.source}: {own_images:,} of these {count_noun(len(part), 'image')} are the run's own, by "
        "content: nothing is learned of other data from them"
    ]
