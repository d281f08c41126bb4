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
    """The study is this process's alone meanwhile. Folders that were made for that are not left empty. Raises Held."""
    with folders_above(study):
        study.mkdir(exist_ok=True)
        with run_lock(study / LOCK, "carries out this study"):
            yield


@contextmanager
def report_held(study: Path, waits: bool = False) -> Iterator[None]:
    """The report of a study is this process's alone to write meanwhile, so that the one that was made last stays, and
    whole. waits: for another process that writes it, which else raises Held."""
    with run_lock(study / REPORT_LOCK, "writes the report of this study", waits) if study.is_dir() else nullcontext():
        yield
