"""The files in a study's folder, and its locks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from clipvisionalign.files import folders_above, run_lock

#: In a study's folder: its plan, the scenes that it drew, the steps that its seconds pay for.
PLAN_FILE, SCENES_FOLDER, BUDGET_FILE = "plan.yaml", "scenes", "budget.json"
#: There too: which process carries out the study, and which one writes its report.
LOCK, REPORT_LOCK = "lock", "report.lock"


@contextmanager
def study_held(study: Path) -> Iterator[None]:
    """Let this process alone carry out a study within a block; folders that were made for that are not left empty.

    Args:
        study: The study's folder.

    Yields:
        Nothing.

    Raises:
        Held: Another process carries it out.
    """
    with folders_above(study):
        study.mkdir(exist_ok=True)
        with run_lock(study / LOCK, "carries out this study"):
            yield


@contextmanager
def report_held(study: Path, waits: bool = False) -> Iterator[None]:
    """Let this process alone write the report of a study within a block.

    Args:
        study: The study's folder; nothing is locked where there is none.
        waits: Whether another process that writes it is waited for.

    Yields:
        Nothing.

    Raises:
        Held: Another process writes it, and it is not waited for.
    """
    with run_lock(study / REPORT_LOCK, "writes the report of this study", waits) if study.is_dir() else nullcontext():
        yield
