"""Checks of a plan before anything is loaded: every fault with the key of the value at fault."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import reduce
from typing import Any

from clipvisionalign.data.captioned import SPLITS
from clipvisionalign.data.scene_difficulty import difficulty_faults
from clipvisionalign.study.config import DESIGNS, Plan, variant_config
from clipvisionalign.study.statistics import COMPARED_METRICS
from clipvisionalign.study.validation import KeyPath, PlanError, suggest_name, validate_as
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.ineffective_settings import effective
from clipvisionalign.training.stages import SET_BY_STAGES, total_epochs


def check_plan(plan: Plan) -> None:
    """Check that a plan can be carried out, and as it is written.

    Args:
        plan: The plan.

    Raises:
        PlanError: It cannot; all faults are named.
    """
    validate_as(Plan, plan.to_dict())
    for field_name in ("variants", "seeds"):
        if not getattr(plan, field_name):
            raise PlanError(((field_name,), "one at least is needed"))
    for index, seed in enumerate(plan.seeds):
        if seed in plan.seeds[:index]:
            raise PlanError((("seeds", index), f"{seed} stands there twice"))
    for name in plan.drawing.splits:
        if name not in SPLITS:
            raise PlanError((("drawing", "splits", name), f"no such split{suggest_name(name, list(SPLITS))}"))
    if faults := difficulty_faults(plan.drawing.difficulty):
        raise PlanError(*((("drawing", "difficulty", name), message) for name, message in faults))
    scene_count = sum(plan.drawing.splits.values())
    if scene_count and scene_count != plan.scenes:
        raise PlanError((("drawing", "splits"), f"{scene_count} scenes in all, where 'scenes' is {plan.scenes}"))
    needed: dict[str, None] = dict.fromkeys(("train", "dev", plan.split))
    if scene_count and (missing := [split for split in needed if not plan.drawing.splits.get(split)]):
        raise PlanError((("drawing", "splits"), f"no scenes for {' and '.join(missing)}"))
    if plan.measure.minimal_pair_images and not plan.measure.minimal_pairs:
        raise PlanError((("measure", "minimal_pair_images"), "counts beside 'minimal_pairs' alone: give that too"))
    if plan.captions == "joined" and plan.identity == "caption":
        message = "joined texts are not compared word by word: give 'identity: auto', or 'captions: each'"
        raise PlanError((("captions",), message))
    _check_settings(("settings",), plan.settings)
    if plan.settings.get("dev_data") and plan.split == "dev":
        message = (
            "with 'split: dev' the data set's own dev split would be measured, another chosen by: give 'split: test'"
        )
        raise PlanError((("settings", "dev_data"), message))
    for name, variant in plan.variants.items():
        key: KeyPath = ("variants", name)
        if not name.replace("-", "").replace("_", "").isalnum():
            raise PlanError((key, "a name is of letters, digits, - and _"))
        _check_settings((*key, "settings"), variant.settings)
        for setting in ALIKE:
            if setting in variant.settings:
                message = "is the same for all variants: give it in the plan's own 'settings'"
                raise PlanError(((*key, "settings", setting), message))
        _check_design(plan, name)
        if variant.base and variant.base not in plan.variants:
            message = (
                f"stands on '{variant.base}', which is not in the plan{suggest_name(variant.base, list(plan.variants))}"
            )
            raise PlanError(((*key, "base"), message))
    for name in plan.variants:
        _check_base_cycle(plan, name, ())
    _check_comparison(plan)
    if plan.until.width and not plan.compare.a:
        message = "adds seeds for the comparison that the plan names: give 'compare: {a: ..., b: ...}' too"
        raise PlanError((("until", "width"), message))
    if plan.until.width and len(plan.seeds) > plan.until.max_seeds:
        raise PlanError((("until", "max_seeds"), f"below the {len(plan.seeds)} seeds of the plan"))
    for name in plan.variants:
        _check_resolved(plan, name)
    _check_equal(plan)


def _check_equal(plan: Plan) -> None:
    """Raises PlanError for a variant that another one is already, under another name, unless it is marked so."""
    kinds: dict[str, list[str]] = {}
    for name, variant in plan.variants.items():
        settings = effective(variant_config(plan, name))
        if plan.budget.same == "seconds":
            settings = replace(settings, epochs=0, steps=0)
        kinds.setdefault(repr((settings, variant.base)), []).append(name)
    alike = {name: names for names in kinds.values() for name in names}
    for name, variant in plan.variants.items():
        key: KeyPath = ("variants", name)
        same = variant.same_as
        if same and (same not in plan.variants or same == name):
            near = suggest_name(same, [each for each in plan.variants if each != name])
            raise PlanError(((*key, "same_as"), f"'{same}' is no other variant of the plan{near}"))
        if same and same not in alike[name]:
            raise PlanError(((*key, "same_as"), f"'{name}' is to repeat '{same}', and has other settings"))
        first = alike[name][0]
        if name != first and not same and plan.variants[first].same_as != name:
            message = f"trains the same as '{first}' under another name, so that what differs would be chance"
            raise PlanError((key, f"{message}: leave one out, or, for a control, give it 'same_as: {first}'"))


#: Settings that a study gives to each of its runs itself, or that would leave it without one.
RESERVED_SETTINGS = ("data", "out", "seed", "init", "layout", "group", "identity", "captions", "overwrite")


#: Settings that all runs of a study have alike: figures of other images are not to be compared.
ALIKE = ("dev_data",)


def _check_settings(key: KeyPath, settings: dict[str, Any]) -> None:
    """Settings by themselves: those of a plan and those of a variant are each a part of a run's."""
    faults = [
        ((*key, name), "is the study's own, and not one of its settings")
        for name in RESERVED_SETTINGS
        if name in settings
    ]
    if faults:
        raise PlanError(*faults)
    config = validate_as(RunConfig, settings, key)
    if config.profile:
        raise PlanError(((*key, "profile"), "leaves no run, which a study is made of"))


def _check_design(plan: Plan, name: str) -> None:
    """A name that has a design's among its words, in whatever case and with whatever number, promises it."""
    own_design = _lookup(plan.variants[name].settings, ("model", "design"))
    design = own_design or _lookup(plan.settings, ("model", "design"))
    name_parts = [re.sub(r"\d+$", "", word) for word in re.split("[-_]", name.lower())]
    promised = [word for word in name_parts if word in DESIGNS]
    key: KeyPath = ("variants", name)
    if design is None and name not in DESIGNS:
        hint = "give it settings (model: design: ...)"
        if promised:
            raise PlanError((key, f"the name promises '{promised[0]}', and no design is set: {hint}"))
        if "model" not in plan.variants[name].settings:
            raise PlanError((key, f"unknown variant '{name}': {hint}; designs are {', '.join(DESIGNS)}"))
    if design is not None and promised and design not in promised:
        key = ("variants", name, "settings", "model", "design") if own_design else ("settings", "model", "design")
        hint = "leave it out, or give the variant another name"
        raise PlanError((key, f"'{design}', where the name of the variant '{name}' promises '{promised[0]}': {hint}"))


def _lookup(settings: dict[str, Any], key: KeyPath) -> Any:
    """What stands at a key, if something does."""
    value: Any = settings
    for key_part in key:
        value = value.get(key_part) if isinstance(value, dict) else None
    return value


def _check_resolved(plan: Plan, name: str) -> None:
    """The settings of a variant's runs, put together: as `train` checks them before its first step."""
    config = replace(variant_config(plan, name), init=plan.variants[name].base, captions=plan.captions)
    if config.stages:
        _check_nothing_beside_stages(plan, name)
    try:
        if config.stages and plan.budget.same == "seconds":
            raise ValueError("--stages gives each stage its epochs: a budget of seconds does not")
        check_settings(config)
        if config.freeze == "all" and not plan.variants[name].base:
            raise ValueError(
                "--freeze all would keep heads as drawn at random: give the variant a 'base', or train them"
            )
    except ValueError as error:
        raise PlanError((place_of_fault(plan, name, str(error)), str(error))) from None
    base = plan.variants[name].base
    if base:
        base_model, own_model = variant_config(plan, base).model.resolved(), config.model.resolved()
        for setting in ("width", "image_tower", "text_tower"):
            if getattr(own_model, setting) != getattr(base_model, setting):
                message = f"is another than that of '{base}', on which '{name}' stands: it starts from those weights"
                key_path = _key_of_setting(plan, name, f"model.{setting}") or ("variants", name)
                raise PlanError((key_path, f"model.{setting} {message}"))


def _check_nothing_beside_stages(plan: Plan, name: str) -> None:
    """Nothing that each stage of a variant has of its own is given beside them, whatever its value: it would have no
    effect."""
    own, shared = plan.variants[name].settings, plan.settings
    for setting in SET_BY_STAGES:
        if setting in own:
            way = "" if own.get("stages") else ", or give the variant 'stages: \"\"' for a training without stages"
            key: KeyPath = ("variants", name, "settings", setting)
        elif setting in shared and not own.get("stages"):
            key, way = ("settings", setting), ", or 'stages'"
        else:
            continue
        raise PlanError((key, f"stages have {setting} of their own, and '{name}' has stages: leave it out{way}"))


def _key_of_setting(plan: Plan, name: str, setting: str) -> KeyPath | None:
    """Where a setting of a variant's is given: its own, or the plan's; None where it is not."""
    parts = tuple(setting.split("."))
    if parts == ("init",) and plan.variants[name].base:
        return "variants", name, "base"
    for key, settings in (
        (("variants", name, "settings"), plan.variants[name].settings),
        (("settings",), plan.settings),
    ):
        if _lookup(settings, parts) is not None:
            return (*key, *parts)
    return None


#: Settings that errors of `train` name by their values.
NAMES = (
    "model.image_tower.name", "model.image_tower.weights", "model.text_tower.name", "model.text_tower.weights",
    "loss.name", "device", "trackers",
)  # fmt: skip


def place_of_fault(plan: Plan, name: str, message: str) -> KeyPath:
    """The location in the plan of a variant's fault, from the error of `train`.

    It is found by the flags in the message, by the names of towers in it, else it is the variant itself.

    Args:
        plan: The plan.
        name: The variant.
        message: The error's.

    Returns:
        The key.
    """
    config = variant_config(plan, name)
    flags = [flag.rstrip(".") for flag in re.findall(r"--([\w.]+)", message)]
    named = {setting: str(reduce(getattr, setting.split("."), config)) for setting in NAMES}
    flags += [setting for setting, value in named.items() if value not in ("auto", "random", "") and value in message]
    key_paths = [key_path for setting in flags if (key_path := _key_of_setting(plan, name, setting)) is not None]
    # What a variant has of its own is what it fails by.
    return next((key_path for key_path in key_paths if key_path[0] == "variants"), (*key_paths, ("variants", name))[0])


#: Settings that decide how often a run sees which images.
SCHEDULE_SETTINGS = ("epochs", "steps", "train_images", "batch")


#: And which of them end it before its last epoch.
STOPS = ("patience", "best_by")


def _check_comparison(plan: Plan) -> None:
    comparison = plan.compare
    if not comparison.a and not comparison.b:
        return
    for side, name in (("a", comparison.a), ("b", comparison.b)):
        if name not in plan.variants:
            message = f"'{name}' is no variant of the plan{suggest_name(name, list(plan.variants))}"
            raise PlanError((("compare", side), message))
    if comparison.a == comparison.b:
        raise PlanError((("compare", "b"), f"'{comparison.a}' with itself"))
    if comparison.figure not in COMPARED_METRICS:
        raise PlanError(
            (
                ("compare", "figure"),
                f"no figure '{comparison.figure}'{suggest_name(comparison.figure, list(COMPARED_METRICS))}",
            )
        )
    if comparison.passes == "any":
        return
    key: KeyPath = ("compare", "passes")
    variants = [plan.variants[name] for name in (comparison.a, comparison.b)]
    if any(variant.base for variant in variants):
        raise PlanError((key, "passes are not equal where a variant stands on another; write 'passes: any'"))
    if plan.budget.same == "seconds":
        raise PlanError((key, "passes are not equal where the seconds are; write 'passes: any'"))
    configs = [variant_config(plan, name) for name in (comparison.a, comparison.b)]
    configs = [replace(each, epochs=total_epochs(each.stages, each.epochs)) for each in configs]
    stops = STOPS if any(config.patience < config.epochs for config in configs) else ()
    for setting in (*SCHEDULE_SETTINGS, *stops):
        value_a, value_b = (getattr(config, setting) for config in configs)
        if value_a != value_b:
            raise PlanError((key, f"passes are not equal: {setting} {value_a} and {value_b}; or write 'passes: any'"))


def _check_base_cycle(plan: Plan, name: str, chain: tuple[str, ...]) -> None:
    if name in chain:
        message = f"variants stand on each other in a circle: {' -> '.join([*chain, name])}"
        raise PlanError((("variants", chain[-1], "base"), message))
    if plan.variants[name].base:
        _check_base_cycle(plan, plan.variants[name].base, (*chain, name))
