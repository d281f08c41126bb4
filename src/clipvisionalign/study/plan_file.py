"""Plans as YAML files: read, with file and line of each fault, and written.

Ready plans are in `plans/`, and are named without their path and ending.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from clipvisionalign.plain_yaml import safe_load
from clipvisionalign.study.config import Comparison, Plan
from clipvisionalign.study.plan_checks import check_plan
from clipvisionalign.study.validation import KeyPath, MarkedYaml, PlanError, format_json, suggest_name, validate_as


@cache
def ready_names() -> tuple[str, ...]:
    """Names of the plans that come along, in order."""
    names = (path.name for path in files("clipvisionalign.study").joinpath("plans").iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def ready_plans() -> dict[str, str]:
    """The plans that come along: name -> title."""
    return {name: safe_load(_ready_plan(name))["title"] for name in ready_names()}


def _ready_plan(name: str) -> str:
    return files("clipvisionalign.study").joinpath("plans", f"{name}.yaml").read_text(encoding="utf-8")


def read_plan(name: str | Path) -> Plan:
    """A plan from a YAML file, or a ready one by its name.

    Args:
        name: The file, or the name.

    Returns:
        The plan.

    Raises:
        ValueError: All that is wrong in it: file, line and key of each fault, one a line.
    """
    document = _opened(name)
    try:
        plan: Plan = validate_as(Plan, _normalize_variants(document.values))
        _check_raw_values(document.values)
        check_plan(plan)
    except PlanError as error:
        raise document.with_lines(error) from None
    return plan


def read_kept_plan(path: Path) -> Plan:
    """The plan of a study that was begun, from its folder: whether it would be carried out now, and here, is not
    checked.

    Args:
        path: The file.

    Returns:
        The plan.

    Raises:
        ValueError: It is no plan.
    """
    source = _opened(path)
    try:
        plan: Plan = validate_as(Plan, _normalize_variants(source.values))
    except PlanError as error:
        raise source.with_lines(error) from None
    return plan


@contextmanager
def told_with_lines(name: str | Path) -> Iterator[None]:
    """Errors in a plan's settings that occur when it is carried out get file and line, as from `read_plan`;
    what flags of the command line ask for has none.

    Args:
        name: The plan's file, or the name of a ready one.

    Yields:
        Nothing.
    """
    try:
        yield
    except PlanError as error:
        if all(key[0] in ("variants", "settings") for key, _ in error.faults):
            raise _opened(name).with_lines(error) from None
        raise


def _opened(name: str | Path) -> MarkedYaml:
    """A plan's file, or a ready plan by its name. Raises ValueError where there is none, or it holds no keys."""
    path = Path(name)
    if str(name) in ready_names():
        source = MarkedYaml(str(name), _ready_plan(str(name)).encode())
    elif path.is_file():
        source = MarkedYaml.read(path)
    else:
        raise ValueError(f"{name}: no such file, and no ready plan{suggest_name(str(name), list(ready_names()))}")
    if not isinstance(source.values, dict):
        raise ValueError(f"{name}: not a plan: it should hold 'variants', 'seeds', 'settings' and so on")
    return source


def _normalize_variants(values: dict[str, Any]) -> dict[str, Any]:
    """A list of names stands for variants without settings, and so does a name without anything after it."""
    variants = values.get("variants", {})
    if isinstance(variants, list):
        for index, name in enumerate(variants):
            key: KeyPath = ("variants", index)
            if not isinstance(name, str):
                message = (
                    f"a list holds names alone, not {format_json(name)}; settings go with 'NAME: {{settings: ...}}'"
                )
                raise PlanError((key, message))
            if name in variants[:index]:
                raise PlanError((key, f"'{name}' stands there twice"))
        variants = dict.fromkeys(variants)
    if "variants" in values and not isinstance(variants, dict):
        message = "nothing stands there" if variants is None else f"not {format_json(variants)}"
        raise PlanError((("variants",), f"should be names with their settings, or a list of names: {message}"))
    normalized = {name: {} if settings is None else settings for name, settings in variants.items()}
    return values | ({"variants": normalized} if "variants" in values else {})


def _check_raw_values(values: dict[str, Any]) -> None:
    """Raises PlanError for what is asked by the file alone, before defaults stand beside it."""
    budget, compare = values.get("budget", {}), values.get("compare", {})
    if "seconds" in budget and "same" not in budget:
        raise PlanError((("budget", "seconds"), "counts for 'same: seconds' alone: write that beside it"))
    if compare and not compare.get("a") and not compare.get("b") and compare != asdict(Comparison()):
        raise PlanError((("compare",), "names no variants: give 'a' and 'b'"))


def plan_text(plan: Plan) -> str:
    """A plan as its YAML file.

    Args:
        plan: The plan.

    Returns:
        YAML.
    """
    import yaml

    return yaml.safe_dump(plan.to_dict(), sort_keys=False)
