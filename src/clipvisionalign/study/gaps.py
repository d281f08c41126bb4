"""Gaps of a report with their reasons: trials without results, and parts that could not be made.

A report is made from what is there. A cell that failed, was refused, was stopped or was never begun is shown as such,
and so is a part of the report that an error kept from being made; nothing of the rest is lost for it. Reasons of cells
that failed are kept in the study's folder, so that `clipvisionalign report` can give them after a study was killed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clipvisionalign.data.hashes import hash_file, hash_parts
from clipvisionalign.files import holder_of
from clipvisionalign.json_io import write_json
from clipvisionalign.study.config import Plan, Trial
from clipvisionalign.study.documents import MissingPartDocument, TrialReasonDocument, TrialStateDocument
from clipvisionalign.training.run_folder import LOCK_FILE
from clipvisionalign.training.stages import STAGES_FOLDER

logger = logging.getLogger(__name__)

PartResult = TypeVar("PartResult")

#: What becomes of a cell. "refused": its audit failed. "failed": an error ended its training or its measuring.
#: "unfinished": its training was stopped. "not measured": it is trained. "not trained": it was never begun.
MEASURED, REFUSED, FAILED = "measured", "refused", "failed"
UNFINISHED, NOT_MEASURED, NOT_TRAINED = "unfinished", "not measured", "not trained"

#: The reasons of the cells that failed, in a study's folder.
FAILURES_FILE = "failed.json"


class NotMeasuredError(Exception):
    """There is no such measurement yet, or one of something else, which the message names."""


def error_reason(error: BaseException) -> str:
    """An error in one line.

    Args:
        error: The error.

    Returns:
        Its type and the first line of its message; of `NotMeasuredError` the message alone.

    >>> error_reason(ValueError("no image"))
    'ValueError: no image'
    """
    if isinstance(error, NotMeasuredError):
        return str(error) or "not measured yet"
    message = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class Gaps:
    """The gaps of a study's report while it is made.

    Args:
        study: The study's folder.

    Attributes:
        states: State and reason by (variant, seed), of trials without results.
        parts: Parts that could not be made.
    """

    def __init__(self, study: Path) -> None:
        self.study = study
        self.states: dict[tuple[str, int], tuple[str, str]] = {}
        self.parts: list[MissingPartDocument] = []

    def record_failure(self, trial: Trial, reason: str) -> None:
        """Record that a trial failed; the reason is kept in the study's folder.

        Args:
            trial: The trial.
            reason: Why it failed.
        """
        self.states[trial.variant, trial.seed] = (FAILED, reason)
        self._write_failures({**read_failures(self.study), trial.folder.name: reason})

    def left(self, cell: Trial, state: str, reason: str) -> None:
        """Record that a trial is not finished and has not failed; nothing is kept of that.

        Args:
            cell: The trial.
            state: Its state, such as `UNFINISHED`.
            reason: Why it is so.
        """
        self.states[cell.variant, cell.seed] = (state, reason)

    def clear_failure(self, trial: Trial) -> None:
        """Forget an earlier failure of a trial that is finished, or is started again.

        Args:
            trial: The trial.
        """
        failures = read_failures(self.study)
        if failures.pop(trial.folder.name, None) is not None:
            self._write_failures(failures)

    def try_part(self, name: str, work: Callable[..., PartResult], *args: Any, target: str = "") -> PartResult | None:
        """Make a part of the report; an error becomes a gap.

        Args:
            name: Name of the part.
            work: Makes it.
            *args: What `work` is called with.
            target: The variant or the set that it is about; "" for none.

        Returns:
            What `work` returns; None after an error.
        """
        try:
            return work(*args)
        except Exception as error:
            self.add_missing(name, error_reason(error), target)
            return None

    def add_missing(self, name: str, reason: str, target: str = "") -> None:
        """Record that a part is not made.

        Args:
            name: Name of the part.
            reason: Why.
            target: The variant or the set that it is about; "" for none.
        """
        self.parts.append({"part": name, "of": target, "reason": reason})
        logger.info(f"{name}{f' of {target}' if target else ''}: NOT MADE: {reason}; the rest continues")

    def _write_failures(self, reasons: dict[str, str]) -> None:
        path = self.study / FAILURES_FILE
        if not reasons:
            path.unlink(missing_ok=True)
            return
        write_json(path, reasons)


def read_failures(study: Path) -> dict[str, str]:
    """Why trials failed when they were last tried.

    Args:
        study: The study's folder.

    Returns:
        Reasons by the names of the trials' folders; empty where none are recorded or the file cannot be read.
    """
    try:
        failures = json.loads((study / FAILURES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(reason) for name, reason in failures.items()} if isinstance(failures, dict) else {}


def is_begun(trial: Trial) -> bool:
    """Whether the training of a trial has been begun, in stages or not.

    Args:
        trial: The trial.

    Returns:
        Whether its folder has something to resume, or is finished.
    """
    return (trial.folder / "config.yaml").is_file() or (trial.folder / STAGES_FOLDER).is_dir()


def training_state(trial: Trial) -> tuple[str, str] | None:
    """The state of a trial that is not trained to its end.

    Args:
        trial: The trial.

    Returns:
        State and reason; None for one that is trained.
    """
    if (trial.folder / "results.json").is_file():
        return None
    reason = read_failures(trial.folder.parent.parent).get(trial.folder.name)
    if reason is not None:
        return FAILED, reason
    if not trial.folder.is_dir():
        return NOT_TRAINED, "not begun"
    step = _last_step(trial.folder / "metrics.jsonl")
    if holder := holder_of(trial.folder / LOCK_FILE):
        return UNFINISHED, f"{holder} trains it: after step {step:,}"
    return UNFINISHED, f"stopped after step {step:,}" if step else "stopped before its first step was recorded"


def _last_step(metrics: Path) -> int:
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut off
    return 0


def trial_states(
    plan: Plan, gaps: Gaps, passed: Sequence[tuple[str, int]], refused: Sequence[TrialReasonDocument]
) -> list[TrialStateDocument]:
    """The state of every trial of a plan, as report.json has it under "cells".

    Args:
        plan: The plan.
        gaps: The gaps so far.
        passed: Variant and seed of the trials that have results.
        refused: Trials whose audit failed, with the reason.

    Returns:
        A row for each trial, in the plan's order.
    """
    reasons = {(row["variant"], row["seed"]): (REFUSED, row["reason"]) for row in refused}
    states = gaps.states | reasons | dict.fromkeys(passed, (MEASURED, ""))
    rows: list[TrialStateDocument] = []
    for name in plan.variants:
        for seed in plan.seeds:
            state, reason = states.get((name, seed), (NOT_TRAINED, "not begun"))
            rows.append({"variant": name, "seed": seed, "state": state, "reason": reason})
    return rows


def measurements_hash(study: Path) -> str:
    """A hash of all measurements in a study's folder: another one than a report has means that there are others now.

    Args:
        study: The study's folder.

    Returns:
        The hash; "" where there are none, as beside a published report.
    """
    measurement_files = [
        *study.glob("cells/*/measured.json"),
        *study.glob("costs/*.json"),
        *study.glob("other-protocols.json"),
    ]
    training_files = [*study.glob("cells/*/results.json"), *study.glob(FAILURES_FILE), *study.glob("plan.yaml")]
    if not (study / "cells").is_dir():
        return ""
    unfinished = [path for path in sorted(study.glob("cells/*/")) if not (path / "results.json").is_file()]
    states = [f"{path.name} {_last_step(path / 'metrics.jsonl')}" for path in unfinished]
    files = [
        f"{path.relative_to(study).as_posix()} {hash_file(path)}" for path in sorted(measurement_files + training_files)
    ]
    return hash_parts([*files, *states])
