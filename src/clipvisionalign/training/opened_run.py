"""A run opened with a data set: its figures and its audit on a split, with the notes that belong to them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipvisionalign.counts import count_noun
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.check import check
from clipvisionalign.data.run_data import differences_from_run, read_data_of_run, run_settings, unfinished_note
from clipvisionalign.data.sealed_split import warn_of_look
from clipvisionalign.export.audits import keep_audit
from clipvisionalign.images import ExcludedFiles, ImageError, image_files, open_image
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import is_pretrained
from clipvisionalign.models.pretrained.known_checkpoints import pretraining_of
from clipvisionalign.models.run_names import display_name, is_of_publisher, resolve_run
from clipvisionalign.progress import progress
from clipvisionalign.retrieval.audit import AuditReport, Check, audit
from clipvisionalign.retrieval.evaluate import evaluate
from clipvisionalign.training.overlap import training_overlap_note
from clipvisionalign.training.selection_notes import in_sample_note

logger = logging.getLogger(__name__)

#: Images of a data set that are named where they are left out.
MAX_NAMED_PROBLEMS = 10


@dataclass(frozen=True)
class OpenedRun:
    """A run with a data set to measure it on.

    Attributes:
        run: the run folder.
        aligner: its model.
        data: the data set whole; of a stream the split alone.
        split: the split that is measured.
        differences: what of the data set is otherwise than the run has recorded it, a line each.
    """

    run: str
    aligner: Aligner
    data: CaptionedImages
    split: str
    differences: list[str]

    @property
    def source(self) -> str:
        """The data set's file or folder."""
        return str(self.data.source)

    def header(self) -> dict[str, Any]:
        """What a report on this run begins with."""
        return {"run": display_name(self.run), "data": self.source, "split": self.split, **self.data.texts_entry}

    def differences_entry(self) -> dict[str, str]:
        """The differences as an entry of a report; empty where there are none."""
        return {"differs_from_run": "; ".join(self.differences)} if self.differences else {}

    def pretraining_entry(self) -> dict[str, Any]:
        """What the model was pretrained on, as far as that is known, as an entry of a report; empty for a model that
        started from no pretrained dual encoder."""
        pretraining = pretraining_of(self.run)
        return {} if pretraining is None else {"pretraining": pretraining.to_dict()}

    def gallery(self) -> CaptionedImages:
        """Return the split without images that cannot be decoded; logs which these are."""
        return decodable_images(self.data, self.data.split(self.split))

    def evaluate(self, candidates: int | None = None) -> dict[str, Any]:
        """Measure retrieval on the whole gallery of the split, in both directions.

        Args:
            candidates: how many first candidates are re-ranked; None for the model's own setting.

        Returns:
            What `clipvisionalign evaluate --json` prints. "in_sample", "trained_on" and "unfinished", where present,
            are notes that the figures have to be read with.

        Raises:
            ValueError: candidates for a design without pair scores.
        """
        aligner, eval_data = self.aligner, self.gallery()
        count = self._candidates(candidates)
        images, captions = count_noun(len(eval_data), "image"), count_noun(len(eval_data.captions), "caption")
        logger.info("%s, %s: %s, %s", self.source, self.split, images, captions)
        evaluation = evaluate(
            aligner, eval_data.images, eval_data.captions, eval_data.caption_image, eval_data.image_identity, count,
            caption_group=eval_data.shared_text_ids,
        )  # fmt: skip
        results = {
            **self.header(), **evaluation.to_dict(), **self.differences_entry(), **self.pretraining_entry()
        }  # fmt: skip
        overlap = training_overlap_note(Path(self.run), self.data, eval_data)
        notes = {
            "in_sample": in_sample_note(Path(self.run), eval_data),
            "trained_on": overlap.note if overlap else None,
            "unfinished": unfinished_note(self.run),
        }
        results |= {name: note for name, note in notes.items() if note}
        if overlap and overlap.matches:
            results["trained_on_images"] = overlap.to_dict()
        return results

    def _candidates(self, asked: int | None) -> int:
        if self.aligner.fusion is not None:
            return self.aligner.config.fusion.candidates if asked is None else asked
        if asked and self.aligner.late is None:
            raise ValueError(f"{self.run}: its design '{self.aligner.config.design}' has nothing to re-rank with")
        return asked or 0

    def audit(self, sample: int = 48) -> dict[str, Any]:
        """Audit the model on the split, and keep the audit in the run folder.

        Args:
            sample: images in the checks.

        Returns:
            What `clipvisionalign audit --json` prints; "passed" is the verdict.
        """
        clean_data, report = check(self.data, full=True, show_progress=True)
        overlap = [problem.message for problem in report.problems if "two splits" in problem.kind]
        eval_data = clean_data.split(self.split)
        split_overlap = overlap if len(clean_data.split_sizes()) > 1 else None
        audit_report = audit(
            self.aligner, eval_data.images, eval_data.captions, eval_data.caption_image, eval_data.image_identity,
            split_overlap, sample, caption_group=eval_data.shared_text_ids,
        )  # fmt: skip
        trained_on = training_overlap_note(Path(self.run), self.data, eval_data)
        if self.split != "train":
            count = len(trained_on.matches) or trained_on.images if trained_on else 0
            unknown = "no image of it is known to be one that the run was trained on"
            message = trained_on.note if trained_on else unknown
            not_trained_on = Check("gallery not trained on", not trained_on, float(count), message)
            audit_report = AuditReport([*audit_report.checks, not_trained_on])
        results = {
            **self.header(), **audit_report.to_dict(), **self.differences_entry(), **self.pretraining_entry()
        }  # fmt: skip
        if trained_on:
            results |= {"trained_on": trained_on.note, "trained_on_images": trained_on.to_dict()}
        if unfinished := unfinished_note(self.run):
            results["unfinished"] = unfinished
        # For the card of a model that is exported. The folder of a pretrained model is its publisher's.
        if not is_pretrained(self.run) and not is_of_publisher(self.run):
            keep_audit(Path(self.run), results, eval_data)
        return results


def decodable_images(data: CaptionedImages, part: CaptionedImages) -> CaptionedImages:
    """Return the images of a part of a data set that can be decoded; logs which are left out, and how many rows were
    when the data set was read.

    Args:
        data: The data set.
        part: Some of its images, such as a split.

    Returns:
        The part without images that cannot be decoded.
    """
    clean_data, report = check(part, full=True, show_progress=True)
    known = data.problems
    dropped = [problem for problem in report.problems if problem.effect == "left out" and problem not in known]
    for problem in dropped[:MAX_NAMED_PROBLEMS]:
        logger.info("check: %s", problem)
    if len(dropped) > MAX_NAMED_PROBLEMS:
        logger.info("check: and %d more left out", len(dropped) - MAX_NAMED_PROBLEMS)
    before = sum(problem.rows for problem in known)
    if before:
        rows = f"{count_noun(before, 'row')} {'was' if before == 1 else 'were'}"
        hint = f"'clipvisionalign check {data.source}' lists them"
        logger.info("%s left out when the data set was read: %s", rows, hint)
    return clean_data


def open_run(
    run: str, source: str = "", layout: str = "auto", identity: str | None = None, split: str = "dev",
    device: str = "auto", candidates: int | None = None, captions: str | None = None,
) -> OpenedRun:  # fmt: skip
    """Open a run and a data set to measure it on.

    Args:
        run: run folder, pretrained model, or `starter`.
        source: data set; the run's own by default.
        layout: its dataset layout; "auto" for the run's.
        identity: which captions belong to which images, as in `RunConfig`; None for the run's setting.
        split: the split to measure.
        device: for the model.
        candidates: of the evaluation to come, if there are any.
        captions: "each" or "joined", as in `RunConfig`; None for the run's setting.

    Raises:
        DataError: the data set cannot be read.
        ValueError: the settings of the run cannot be read, its design has nothing to re-rank candidates with, or
            `captions` cannot be joined by this `identity`.
        FileNotFoundError: the folder is no run.

    Returns:
        The run with its model and data set.
    """
    from clipvisionalign.models.io import load_aligner

    run = resolve_run(run)
    # Data first: its faults are found before a model is loaded.
    check_run(run, candidates)
    data = read_data_of_run(run, source, layout, identity, split, captions)
    data.split(split)
    aligner = load_aligner(run, device)
    aligner.show_progress = True
    differences = differences_from_run(run, data, split)
    for line in differences:
        logger.info("note: %s", line)
    warn_of_look(run, data.split(split))
    return OpenedRun(run, aligner, data, split, differences)


def check_run(run: str, candidates: int | None) -> None:
    """Check a run or a pretrained model before its data are read and its weights are loaded.

    Args:
        run: The run folder or pretrained model.
        candidates: Number of candidates to re-rank; None or 0 for none.

    Raises:
        FileNotFoundError: The folder is no run.
        ValueError: Its settings cannot be read, or its design has nothing to re-rank with.
    """
    import yaml

    from clipvisionalign.models.io import load_aligner

    if is_pretrained(run):
        if candidates:
            raise ValueError(f"{run}: a pretrained dual encoder has nothing to re-rank with")
        return
    try:
        settings = run_settings(run)
    except yaml.YAMLError as error:
        raise ValueError(f"{run}/config.yaml: no settings of an aligner: {error}") from None
    if not settings:
        load_aligner(run)
    design = (settings.get("model") or {}).get("design", "")
    if candidates and design in ("self", "sparse"):
        raise ValueError(f"{run}: its design '{design}' has nothing to re-rank with")


def read_distractors(folder: str) -> list[Path]:
    """The images below a folder that can be decoded; logs which are left out.

    Args:
        folder: The folder.

    Returns:
        Their paths, in order.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--distractors {folder}: no such folder")
    skipped = ExcludedFiles()
    paths = image_files(root, skipped)
    for line in skipped.lines():
        logger.info("%s: not taken: %s", folder, line)
    decodable = []
    for path in progress(paths, "checking distractors", len(paths), True):
        try:
            open_image(path)
        except ImageError as error:
            logger.info("left out: %s", error)
        else:
            decodable.append(path)
    if not decodable:
        raise ValueError(f"--distractors {folder}: no image in it")
    return decodable
