"""Calibrating a model's promises on captioned images that it was neither trained nor selected on.

Images that a run was trained on are recognised by their content and left out. Where its epoch was selected on these
images, those of one half are taken whose counterpart alone would have selected the same epoch (`training/halves.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.counts import count_noun
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.hashes import dataset_hashes, hash_parts
from clipvisionalign.models.io import is_pretrained
from clipvisionalign.models.run_names import display_name, resolve_run
from clipvisionalign.search.calibrate import calibrate_captions, first_images
from clipvisionalign.search.calibration import CALIBRATION_FILE, Calibration
from clipvisionalign.search.manifest import aligner_fingerprint
from clipvisionalign.search.rerank_margin import RerankMargin, measure_margins
from clipvisionalign.starter import STARTER
from clipvisionalign.training.halves import split_halves
from clipvisionalign.training.opened_run import open_run
from clipvisionalign.training.overlap import training_overlap_note
from clipvisionalign.training.selection_notes import in_sample_note

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnseenImages:
    """Images of a gallery that a model was neither trained nor selected on.

    Attributes:
        data: These images.
        left_out: Numbers of the others: "trained_on" and "selected_on".
        notes: Why they are left out.
    """

    data: CaptionedImages
    left_out: dict[str, int]
    notes: list[str]


def calibrate_model(
    run: str, source: str, split: str = "dev", layout: str = "auto", device: str = "auto"
) -> Calibration:
    """Calibrate a model's promises on a data set.

    Args:
        run: Run folder, or a pretrained dual encoder.
        source: The data set.
        split: Its split.
        layout: Its layout.
        device: Of the model.

    Returns:
        The calibration.

    Raises:
        DataError: The data set cannot be read, or no image is left that the model was neither trained nor selected on.
        UncalibratedError: Too few are left.
    """
    run = resolve_run(run)
    opened = open_run(run, source, layout, None, split, device)
    unseen = unseen_images(run, opened.data, opened.gallery())
    for note in unseen.notes:
        logger.info(f"note: {note}")
    data = unseen.data
    images, captions = count_noun(len(data), "image"), count_noun(len(data.captions), "caption")
    logger.info(f"{source}, {split}: {images}, {captions}")
    calibrated_on: dict[str, Any] = {
        "data": data.source.resolve().name, "split": split, "hash": hash_parts(dataset_hashes(data).values()),
        "left_out": unseen.left_out, **data.texts_entry,
    }  # fmt: skip
    aligner, owners = opened.aligner, np.asarray(data.caption_image)
    if aligner.late is None:
        vectors = aligner.encode_images(data.images).numpy(), aligner.encode_captions(data.captions).numpy()
        return calibrate_captions(*vectors, owners, aligner_fingerprint(run), calibrated_on)
    scorer = aligner.pair_scorer(data.images, data.captions)
    vectors = scorer.image_vectors.numpy(), scorer.caption_vectors.numpy()
    calibration = calibrate_captions(*vectors, owners, aligner_fingerprint(run), calibrated_on)
    return replace(calibration, rerank=rerank_margin(scorer, *vectors, owners))


def rerank_margin(
    scorer: Callable[[np.ndarray, np.ndarray], Any], images: np.ndarray, captions: np.ndarray, owners: np.ndarray
) -> RerankMargin:
    """Calibrate which first hits of a query are worth re-ranking.

    Args:
        scorer: Scores pairs of images and captions, by their numbers (Q,), (Q,).
        images: (N, D) unit length.
        captions: (M, D) unit length.
        owners: (M,) the number of each caption's image.

    Returns:
        The margin.

    Raises:
        ValueError: There are fewer than 2 images.
    """
    cosines, numbers, own = first_images(images, captions, owners)
    caption_index = np.repeat(np.arange(len(captions)), numbers.shape[1])
    scores = np.asarray(scorer(numbers.ravel(), caption_index)).reshape(numbers.shape)
    return measure_margins(cosines, scores, own)


def unseen_images(run: str, data: CaptionedImages, part: CaptionedImages) -> UnseenImages:
    """The images of a gallery that a model was neither trained nor selected on, as far as that is known.

    Args:
        run: The run folder, or a pretrained model.
        data: The data set as it was read.
        part: The gallery: one split of it.

    Returns:
        The images.

    Raises:
        DataError: None is left.
    """
    if not part.rows:
        raise DataError(f"{part.source}: nothing to calibrate on: no image of the split can be decoded")
    notes: list[str] = []
    overlap = training_overlap_note(Path(run), data, part)
    if overlap is not None and not overlap.matches:
        raise DataError(f"{part.source}: nothing to calibrate on: {overlap.note}")
    trained_on = {match.image for match in overlap.matches} if overlap is not None else set()
    selected_on: set[str] = set()
    if selection := in_sample_note(Path(run), part):
        half = _unselected_half(Path(run), part)
        if half is None:
            raise DataError(
                f"{part.source}: nothing to calibrate on: {selection}. Give images that nothing was selected on, such "
                "as another --split, or train with --best_by last"
            )
        selected_on = {row.name for row, kept in zip(part.rows, half, strict=True) if not kept}
        notes.append(
            f"{count_noun(len(selected_on), 'image')} of {len(part):,} are left out: on them the run's epoch was "
            "selected, as it was on all; the others are calibrated on"
        )
    if trained_on:
        notes.append(
            f"{count_noun(len(trained_on), 'image')} of {len(part):,} are left out: the run was trained on them"
        )
    rows = [row for row in part.rows if row.name not in trained_on | selected_on]
    if not rows:
        raise DataError(
            f"{part.source}: nothing to calibrate on: the run was trained or selected on all {len(part):,} images; "
            "give others"
        )
    left_out = {"trained_on": len(trained_on), "selected_on": len(selected_on - trained_on)}
    return UnseenImages(replace(part, rows=rows), left_out, notes)


def calibration_file(run: str, out: str = "") -> Path:
    """Where the calibration of a model is written.

    Args:
        run: The run folder, or a pretrained model.
        out: A file or folder that is given instead.

    Returns:
        The file.

    Raises:
        ValueError: The model is not a run, and no `out` is given.
    """
    if out:
        return Path(out) / CALIBRATION_FILE if Path(out).is_dir() else Path(out)
    folder = resolve_run(run)
    if is_pretrained(folder) or display_name(folder) not in (folder, STARTER):
        raise ValueError(
            f"{run}: the folder of a published model is its publisher's: give --out FILE, or calibrate the index"
        )
    return Path(folder) / CALIBRATION_FILE


def _unselected_half(run: Path, part: CaptionedImages) -> np.ndarray | None:
    """(N,) bool, the images of a half of dev whose other half alone selects the run's model; None if there is none."""
    chosen = (
        json.loads((run / "results.json").read_text()).get("chosen", {}) if (run / "results.json").is_file() else {}
    )
    halves = split_halves(part)
    if chosen.get("by") != "halves" or halves is None or {"with_init", "init_trained_on"} & set(chosen):
        return None
    choices = [chosen[name] for name in ("epoch", "alpha") if name in chosen]
    for half in (0, 1):
        # The weights of a pair's parts have no part in the vectors.
        if choices and all(choice["halves"][half] == choice["model"] for choice in choices):
            return np.asarray(halves.image_half == 1 - half)
    return None
