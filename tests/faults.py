"""A study that is disturbed in one of its stages: a stage raises, or its process is killed there.

The study is one that was finished before, of which what the stage writes is removed: nothing is trained for it.
"""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: What the fault says, as a full disk does.
TOLD = "No space left on device"


@dataclass(frozen=True)
class Stage:
    """Where a fault strikes. place: module of the study and function; removed: what is not there yet when it does;
    lacks: the cell or the part that the report has to show as missing, "" where the study ends with the error."""

    target: str
    removed: tuple[str, ...] = ()
    lacks: str = ""


ONE = ("cells/late-1/measured.json",)
STAGES = {
    "data": Stage("runner:open_study_data"),
    "minimal pairs": Stage("runner:minimal_pairs_of"),
    "commits": Stage("runner:pin_tower_commits"),
    "settings": Stage("tower_commits:refuse_other_settings"),
    "training": Stage("trial:resume", (*ONE, "cells/late-1/results.json"), "late-1"),
    "loading": Stage("trial:load_aligner", ONE, "late-1"),
    "audit": Stage("trial:audit", ONE, "late-1"),
    "evaluation": Stage("trial:evaluate", (*ONE, "cells/late-1/ranks.npz"), "late-1"),
    "twins": Stage("trial:foil_accuracy", ONE, "late-1"),
    "keeping figures": Stage("trial:write_json", ONE, "late-1"),
    "one cost": Stage("cost_rounds:profile_run", ("costs/late-0.json",), "time and memory"),
    "all costs": Stage("cost_rounds:profile_run", ("costs/late-0.json", "costs/self-0.json"), "time and memory"),
    "keeping costs": Stage("cost_rounds:write_json", ("costs/late-0.json",), "time and memory"),
    "words alone": Stage("assemble:blind_accuracy", (), "words alone"),
    "other protocols": Stage("assemble:measure_flawed_protocols", ("other-protocols.json",), "other protocols"),
    "examples": Stage("assemble:build_examples", (), "examples"),
    "maps": Stage("report.examples:_explain_example", (), "examples"),
    "cut captions": Stage("assemble:count_truncated_captions", (), "captions that are cut"),
    "report": Stage("assemble:build_report"),
    "report.json": Stage("report.build:write_json"),
    "plots": Stage("report.plots.draw:_save_plot", (), "plot"),
    "tables": Stage("report.tables.table:format_interval", (), "table"),
    "page": Stage("report.html:_environment"),
}


def disturbed(study: Path, of: Path, stage: Stage) -> None:
    """A copy of the finished study `of` in `study`, without what the stage writes. Files are shared until one is
    replaced, which is how all of a study's files are written."""
    left_out = shutil.ignore_patterns("figures", "tables", "report.*", "*.part")
    shutil.copytree(of, study, copy_function=os.link, ignore=left_out)
    for name in stage.removed:
        (study / name).unlink()


def _module(name: str) -> Any:
    return importlib.import_module(f"clipvisionalign.study.{name}")


def quick(put: Callable[[Any, str, Any], None]) -> None:
    """One plot, no maps, few resamples, the data set read once: a report in a second."""
    figures = _module("report.plots.draw")
    put(figures, "PLOTS", {"accuracy": figures.PLOTS["accuracy"]})
    put(_module("report.examples"), "_explain_example", lambda *given: {"caption": "", "image": "", "variants": {}})
    put(_module("aggregate"), "RESAMPLES", 20)
    put(_module("runner"), "open_study_data", _read_once())


@functools.cache
def _read_once() -> Callable[..., Any]:
    read, kept = _module("runner").open_study_data, {}

    def once(plan: Any, *given: Any) -> Any:
        if plan.data not in kept:
            kept[plan.data] = read(plan, *given)
        return kept[plan.data]

    return once


def strike(put: Callable[[Any, str, Any], None], stage: Stage, fault: Callable[..., Any]) -> None:
    """The stage's function does what `fault` does."""
    module, name = stage.target.split(":")
    put(_module(module), name, fault)


def raises(*given: Any, **named: Any) -> Any:
    """What a disk that is full says."""
    raise OSError(28, TOLD)


def killed(*given: Any, **named: Any) -> Any:
    """The process ends here, without another word."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed_study(study: str, stage: str) -> int:
    """The work of a process: the study goes on, and is killed in that stage."""
    from clipvisionalign.log import log_to
    from clipvisionalign.study.plan_file import read_plan
    from clipvisionalign.study.runner import run_study

    quick(setattr)
    strike(setattr, STAGES[stage], killed)
    with log_to(print):
        run_study(read_plan(Path(study) / "plan.yaml"), study)
    return 0
