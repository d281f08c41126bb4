"""A step with synthetic images for each variant, which finds faults before any trial is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from clipvisionalign.progress import progress_step
from clipvisionalign.study.config import Plan, Trial
from clipvisionalign.study.plan_checks import place_of_fault
from clipvisionalign.study.validation import PlanError
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.dry_run import try_step

#: Variants that have taken such a step in this process, by all that it depends on.
_TRIED: set[str] = set()


def refuse_unstartable(plan: Plan, cells: Sequence[Trial]) -> None:
    """Check that the training of every variant could take its first step.

    Finished trials are not asked about: whatever has become of their towers' weights since, they stay.

    Args:
        plan: The plan.
        cells: All trials.

    Raises:
        PlanError: Some could not; all faults are named.
    """
    open_cells = {cell.variant: cell for cell in cells if not (cell.folder / "results.json").is_file()}
    by_name = {(cell.variant, cell.seed): cell for cell in cells}
    faults = []
    with progress_step("trying a step of each variant", visible=bool(open_cells)):
        for name, cell in open_cells.items():
            base = by_name.get((plan.variants[name].base, cell.seed))
            try:
                _try(cell.config, None if base is None else base.config)
            except (ValueError, OSError) as error:
                faults.append((place_of_fault(plan, name, str(error)), f"'{name}' cannot be trained: {error}"))
    if faults:
        raise PlanError(*faults)


def _try(config: RunConfig, base: RunConfig | None) -> None:
    own: dict[str, Any] = {"out": "", "init": "", "cache": "", "data": "", "dev_data": "", "seed": 0}
    asked = repr([each and replace(each, **own) for each in (config, base)])
    if asked not in _TRIED:
        try_step(config, base)
        _TRIED.add(asked)
