"""A model opened with class folders: zero-shot classification of a split, and its difference from another model's."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.counts import count_noun
from clipvisionalign.data.caption_templates import OWN, read_templates
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.formats.classes import LAYOUT, read_classes
from clipvisionalign.data.run_data import is_data_of_run, read_options_of_run, unfinished_note
from clipvisionalign.data.sealed_split import warn_of_look
from clipvisionalign.data.splits import canonical_split
from clipvisionalign.export.onnx_aligner import ABOUT, OnnxAligner
from clipvisionalign.files import atomic_write
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.pretrained.known_checkpoints import pretraining_of
from clipvisionalign.models.run_names import display_name, resolve_run
from clipvisionalign.retrieval.classification import (
    Classification,
    ClassifyBy,
    accuracy_gain,
    classify,
    default_template,
)
from clipvisionalign.training.opened_run import check_run, decodable_images
from clipvisionalign.training.overlap import training_overlap_note
from clipvisionalign.training.selection_notes import in_sample_note

logger = logging.getLogger(__name__)

#: All images of class folders, whatever their split.
ALL_SPLITS = "all"

#: Files of a folder that `write_classification` writes.
RESULTS_FILE, PREDICTIONS_FILE = "classification.json", "predictions.csv"


@dataclass(frozen=True)
class OpenedClasses:
    """A model with class folders to measure it on.

    Attributes:
        run: Run folder, pretrained model or ONNX export.
        model: The model.
        data: The class folders whole.
        images: The images that are measured, without those that cannot be decoded.
        split: Their split, or "all".
        templates: The templates; empty for the model's own.
        templates_source: Where they come from: "own", the name of a set, or a file.
    """

    run: str
    model: Any
    data: CaptionedImages
    images: CaptionedImages
    split: str
    templates: Sequence[str] = ()
    templates_source: str = OWN

    @property
    def folders(self) -> list[str]:
        """The class folders, in the order of the class numbers."""
        return list(self.data.class_names)

    def classify(self, by: ClassifyBy = "auto") -> Classification:
        """Classify the images.

        Args:
            by: "vectors", "score" or "auto", as in `retrieval.classify`.

        Returns:
            Accuracies with intervals, and the ranks behind them.
        """
        number = {folder: index for index, folder in enumerate(self.folders)}
        labels = np.array([number[row.identity] for row in self.images if row.identity is not None])
        names = list(self.data.class_names.values())
        counts = f"{count_noun(len(self.images), 'image')}, {len(names):,} classes"
        logger.info("%s, %s: %s", self.data.source, self.split, counts)
        return classify(self.model, self.images.images, labels, names, self.templates, by)

    def results(self, classification: Classification) -> dict[str, Any]:
        """The figures of a classification with the notes that belong to them.

        Args:
            classification: What `classify` returned.

        Returns:
            What `clipvisionalign classify --json` prints.
        """
        figures = classification.to_dict()
        for folder, row in zip(self.folders, figures["per_class"], strict=True):
            row["class"] = folder
        templates = list(self.templates) or [default_template(self.model)]
        header = {"run": display_name(self.run), "data": str(self.data.source), "split": self.split}
        return {**header, "templates": {"source": self.templates_source, "captions": templates},
                "names": self.data.notes, **figures, **self._notes()}  # fmt: skip

    def _notes(self) -> dict[str, Any]:
        """What the figures have to be read with: images that were trained on, or by which the model was chosen."""
        run = Path(self.run)
        overlap = training_overlap_note(run, self.data, self.images)
        notes: dict[str, Any] = {
            "in_sample": in_sample_note(run, self.images),
            "trained_on": overlap.note if overlap else None,
            "unfinished": unfinished_note(run),
        }
        if overlap and overlap.matches:
            notes["trained_on_images"] = overlap.to_dict()
        if not _is_export(self.run) and (pretraining := pretraining_of(self.run)) is not None:
            notes["pretraining"] = pretraining.to_dict()
        return {name: note for name, note in notes.items() if note}


def open_classes(
    run: str, source: str, split: str = "", templates: str = OWN, names: str = "", device: str = "auto"
) -> OpenedClasses:
    """Open a model and class folders to measure it on.

    Args:
        run: Run folder, `starter`, pretrained model (folder or hub name) or ONNX export.
        source: Folder of the classes, or of the splits with their classes.
        split: "train", "dev" or "test" (or "val", ...), or "all"; by default "test", and all images of class folders
            without splits unless the run was trained on them.
        templates: "own", "openai", "simple", or a file with a template in each line.
        names: A names file, or "openai"; by default the data set's own names.
        device: For the model.

    Returns:
        Both, the images decoded once.

    Raises:
        DataError: Templates, class folders or names cannot be read, or the split is empty.
        FileNotFoundError: The folder is no model.
        ValueError: No image of the split can be decoded.
    """
    run = resolve_run(run)
    chosen = [] if templates == OWN else read_templates(templates)
    if not _is_export(run):
        check_run(run, None)
    options = read_options_of_run(run, source, LAYOUT)
    data = read_classes(Path(source), split_rule=options.split_rule, names=names)
    for note in data.notes:
        logger.info("%s: %s", source, note)
    split_name, part = _choose_split(run, data, split)
    model = load_model(run, device)
    images = decodable_images(data, part)
    if not len(images):
        raise ValueError(
            f"{source}: no image of '{split_name}' can be decoded; 'clipvisionalign check {source}' lists why"
        )
    warn_of_look(run, images)
    return OpenedClasses(run, model, data, images, split_name, chosen, templates)


def load_model(run: str, device: str = "auto") -> Any:
    """Load a run, a pretrained model, or an ONNX export.

    Args:
        run: Its folder or hub name.
        device: For a run or a pretrained model; an export runs on the CPU.

    Returns:
        The model, which shows its progress.

    Raises:
        FileNotFoundError: The folder is no model.
    """
    model = OnnxAligner(run) if _is_export(run) else load_aligner(run, device)
    model.show_progress = True
    return model


def compare_classification(
    run: str,
    baseline: str,
    source: str,
    split: str = "",
    templates: str = OWN,
    names: str = "",
    by: ClassifyBy = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Classify the same images by two models, such as a tuned one and the one that it started from.

    Args:
        run: The model to compare, as in `open_classes`.
        baseline: The model that it is compared with.
        source: Class folders.
        split: As in `open_classes`.
        templates: As in `open_classes`.
        names: As in `open_classes`.
        by: As in `retrieval.classify`.
        device: For the models.

    Returns:
        "run" and "baseline", each as `classify --json` prints it, and "difference": "top_1", "top_5" (if it is there)
        and "mean_per_class" of `run` minus `baseline`, from -1 to 1, with paired 95% intervals.

    Raises:
        DataError: As `open_classes`.
        FileNotFoundError: One of the folders is no model.
    """
    opened = open_classes(run, source, split, templates, names, device)
    other = replace(opened, run=resolve_run(baseline), model=load_model(baseline, device))
    measured, compared = opened.classify(by), other.classify(by)
    gains = {name: estimate.to_dict() for name, estimate in accuracy_gain(measured, compared).items()}
    return {"run": opened.results(measured), "baseline": other.results(compared), "difference": gains}


def check_output_folder(folder: str, overwrite: bool) -> None:
    """Check that `write_classification` may write.

    Args:
        folder: The folder.
        overwrite: Whether existing files may be replaced.

    Raises:
        FileExistsError: One of its files is there, or the folder is a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"--out {folder}: is a file; give a folder")
    existing = [name for name in (RESULTS_FILE, PREDICTIONS_FILE) if (target / name).exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{target / existing[0]}: is there already: give another --out, or --overwrite")


def write_classification(folder: str, opened: OpenedClasses, classification: Classification) -> None:
    """Write the figures, and the prediction for each image.

    Args:
        folder: The folder, which is made.
        opened: The model and the images.
        classification: Its classification of them.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with atomic_write(target / RESULTS_FILE) as aside:
        aside.write_text(json.dumps(opened.results(classification), indent=2) + "\n", encoding="utf-8")
    ranks, folders = classification.label_ranks, opened.folders
    with (
        atomic_write(target / PREDICTIONS_FILE) as aside,
        aside.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(["image", "class", "predicted", "rank"])
        for row, predicted, rank in zip(opened.images, ranks.predictions, ranks.ranks, strict=True):
            rows.writerow([row.name, row.identity, folders[predicted], rank])


def _is_export(run: str) -> bool:
    return (Path(run) / ABOUT).is_file()


def _choose_split(run: str, data: CaptionedImages, asked: str) -> tuple[str, CaptionedImages]:
    split = canonical_split(asked)
    if not split and not data.official_splits and not is_data_of_run(run, data.source):
        split = ALL_SPLITS
    if split == ALL_SPLITS:
        return split, data
    split = split or "test"
    return split, data.split(split)
