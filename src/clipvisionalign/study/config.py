"""The plan of a study: which variants, on which data, with which seeds and budget, measured how.

A plan is a YAML file; ready ones lie in `plans/` and go by name. A cell is one training: one variant with one seed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import Field

from clipvisionalign.data.captioned import SPLITS, IdentityMode
from clipvisionalign.models.aligner import AlignerConfig
from clipvisionalign.study.statistics import COMPARED_METRICS
from clipvisionalign.study.validation import (
    KeyPath,
    MarkedYaml,
    NestedDataclass,
    PlanError,
    format_json,
    suggest_name,
    validate_as,
)
from clipvisionalign.training.config import RunConfig, check_settings
from clipvisionalign.training.ineffective_settings import effective

DESIGNS: tuple[str, ...] = get_args(get_type_hints(AlignerConfig)["design"])

Settings = Annotated[dict[str, Any], NestedDataclass(RunConfig)]
Count = Annotated[int, Field(ge=0)]
#: What PyTorch and NumPy both take.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass
class Variant:
    """What one variant has of its own.

    Args:
        settings: settings of `train` in which it differs from the plan's.
        base: a variant whose run with the same seed this one starts from; its time is counted here too.
        same_as: a variant that this one repeats, setting by setting, as a control: what differs is chance.
    """

    settings: Settings = field(default_factory=dict)
    base: str = ""
    same_as: str = ""


@dataclass
class Budget:
    """What every cell may spend: which answers different questions.

    Args:
        same: "pictures", every variant sees the same number of pictures, as the settings say (which design makes more
            of the same data?), or "seconds", every variant trains for about as long (which makes more of the same
            time?).
        seconds: of a training, for "seconds"; a short probe turns them into steps, the same in every seed.
    """

    same: Literal["pictures", "seconds"] = "pictures"
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0


@dataclass
class Measurements:
    """What is measured beside recall.

    Args:
        composition: minimal pairs of each kind at most, 0 for none.
        minimal_pairs: a published set as well (ARO, SugarCrepe, Winoground), where it lies on disk.
        minimal_pair_images: where its pictures are, if not beside it.
        audit_images: images in the audit of each cell, 10 at least: plans from before that ask for fewer get those.
        rounds: how often time and memory are measured in a fresh process; variants take turns.
        brief: measure them on fewer captions and pictures, no caption above 64 tokens, in a quarter of the time.
        protocol: also show what other protocols would have made of the same models, apart from all results.
        examples: pictures in the report.
    """

    composition: Count = 250
    minimal_pairs: str = ""
    minimal_pair_images: str = ""
    audit_images: Annotated[int, Field(ge=8)] = 24
    rounds: Count = 3
    brief: bool = False
    protocol: bool = True
    examples: Count = 6


@dataclass
class Drawing:
    """How scenes are drawn.

    Args:
        seed: another one draws other scenes.
        pixels: on a side.
        plain: every group is one large shape, with two captions a scene instead of five.
        splits: how many scenes each split gets, `scenes` in all; a hash of each name decides where this is empty.
    """

    seed: Count = 7
    pixels: Annotated[int, Field(ge=32)] = 224
    plain: bool = False
    splits: dict[str, Count] = field(default_factory=dict)


@dataclass
class Comparison:
    """The one comparison that a study is made for, named before it begins: tested alone, the others are corrected among
    themselves.

    Args:
        figure: what is compared, rsum or such as "image_to_text recall_at_1".
        a: a variant; empty for a study that compares all alike.
        b: the variant that it is compared with.
        passes: "equal" asks both to see the same images as often, in batches of the same size; "any" does not.
    """

    figure: str = "rsum"
    a: str = ""
    b: str = ""
    passes: Literal["equal", "any"] = "equal"


@dataclass
class Plan:
    """A study.

    Args:
        title: what the report is called.
        data: the data set, in any layout that `train` reads; empty to draw scenes.
        scenes: how many scenes to draw, where there is no data.
        drawing: how they are drawn.
        layout: how the data set lies there.
        group: a column of its table whose images stand in one split, as in `train`.
        identity: which captions belong to which images, as in `train`: the same for all variants.
        split: which split is measured; checkpoints are chosen on dev in any case.
        seeds: one training of every variant for each.
        variants: by name; a design's name alone stands for that design with the plan's settings.
        settings: settings of `train` for all of them.
        budget: what every cell may spend.
        measure: what is measured beside recall.
        compare: the comparison that the study is made for, if there is one.
    """

    title: str = "Which attention design is worth it"
    data: str = ""
    scenes: Count = 0
    drawing: Drawing = field(default_factory=Drawing)
    layout: str = "auto"
    group: str = ""
    identity: IdentityMode = "auto"
    split: Literal["dev", "test"] = "dev"
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    variants: dict[str, Variant] = field(
        default_factory=lambda: {"self": Variant(), "sparse": Variant(), "late": Variant(), "cross": Variant()}
    )
    settings: Settings = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    measure: Measurements = field(default_factory=Measurements)
    compare: Comparison = field(default_factory=Comparison)

    def to_dict(self) -> dict[str, Any]:
        """The plan as YAML and JSON have it."""
        values = asdict(self)
        for variant in values["variants"].values():
            if not variant["same_as"]:
                del variant["same_as"]
        return values


@dataclass(frozen=True)
class Trial:
    """One training: a variant with a seed."""

    variant: str
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.out)


def ready_plans() -> dict[str, str]:
    """The plans that come along: name -> title."""
    import yaml

    titles = {}
    for path in sorted(files("clipvisionalign.study").joinpath("plans").iterdir(), key=lambda path: path.name):
        if path.name.endswith(".yaml"):
            titles[path.name.removesuffix(".yaml")] = yaml.safe_load(path.read_text())["title"]
    return titles


def read_plan(name: str | Path) -> Plan:
    """A plan from a YAML file, or a ready one by its name.

    Raises ValueError with all that is wrong in it: file, line and key of each fault, one a line.
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
    """The plan of a study that was begun, from its folder: it is not asked whether it would be carried out now, and
    here. Raises ValueError for what is no plan."""
    source = _opened(path)
    try:
        plan: Plan = validate_as(Plan, _normalize_variants(source.values))
    except PlanError as error:
        raise source.with_lines(error) from None
    return plan


@contextmanager
def told_with_lines(name: str | Path) -> Iterator[None]:
    """What comes to light of a plan's settings where it is carried out is told with file and line, as by `read_plan`;
    what flags of the command line ask for has none."""
    try:
        yield
    except PlanError as error:
        if all(key[0] in ("variants", "settings") for key, _ in error.faults):
            raise _opened(name).with_lines(error) from None
        raise


def _opened(name: str | Path) -> MarkedYaml:
    """A plan's file, or a ready plan by its name. Raises ValueError where there is none, or it holds no keys."""
    path = Path(name)
    if str(name) in ready_plans():
        source = MarkedYaml(str(name), files("clipvisionalign.study").joinpath("plans", f"{name}.yaml").read_bytes())
    elif path.is_file():
        source = MarkedYaml.read(path)
    else:
        raise ValueError(f"{name}: no such file, and no ready plan{suggest_name(str(name), list(ready_plans()))}")
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


def check_plan(plan: Plan) -> None:
    """Raises PlanError for a plan that cannot be carried out, or that would be carried out other than it is written."""
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
    scene_count = sum(plan.drawing.splits.values())
    if scene_count and scene_count != plan.scenes:
        raise PlanError((("drawing", "splits"), f"{scene_count} scenes in all, where 'scenes' is {plan.scenes}"))
    needed: dict[str, None] = dict.fromkeys(("train", "dev", plan.split))
    if scene_count and (missing := [split for split in needed if not plan.drawing.splits.get(split)]):
        raise PlanError((("drawing", "splits"), f"no scenes for {' and '.join(missing)}"))
    if plan.measure.minimal_pair_images and not plan.measure.minimal_pairs:
        raise PlanError((("measure", "minimal_pair_images"), "counts beside 'minimal_pairs' alone: give that too"))
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
    for name in plan.variants:
        _check_resolved(plan, name)
    _check_equal(plan)


def _check_equal(plan: Plan) -> None:
    """Raises PlanError for a variant that another one is already, under another name, unless it says so."""
    kinds: dict[str, list[str]] = {}
    for name, variant in plan.variants.items():
        settings = effective(_variant_config(plan, name))
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
RESERVED_SETTINGS = ("data", "out", "seed", "init", "layout", "group", "identity", "overwrite")
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
    config = _variant_config(plan, name)
    try:
        check_settings(config)
        if config.freeze == "all" and not plan.variants[name].base:
            raise ValueError(
                "--freeze all would keep heads as drawn at random: give the variant a 'base', or train them"
            )
    except ValueError as error:
        raise PlanError((place_of_fault(plan, name, str(error)), str(error))) from None
    base = plan.variants[name].base
    if base:
        base_model = _variant_config(plan, base).model
        for setting in ("width", "image_tower", "text_tower"):
            if getattr(config.model, setting) != getattr(base_model, setting):
                message = f"is another than that of '{base}', on which '{name}' stands: it starts from those weights"
                key_path = _key_of_setting(plan, name, f"model.{setting}") or ("variants", name)
                raise PlanError((key_path, f"model.{setting} {message}"))


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


#: Settings that errors of `train` tell of by their values.
NAMES = (
    "model.image_tower.name", "model.image_tower.weights", "model.text_tower.name", "model.text_tower.weights",
    "loss.name", "device", "trackers",
)  # fmt: skip


def place_of_fault(plan: Plan, name: str, message: str) -> KeyPath:
    """Where in the plan a variant's fault stands, of which `train` tells: by the flags in the message, by the names of
    towers in it, else the variant itself."""
    config = _variant_config(plan, name)
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
    configs = [_variant_config(plan, name) for name in (comparison.a, comparison.b)]
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


def data_source(plan: Plan, study: Path) -> str:
    """Where the plan's data set is, or will be drawn. Raises ValueError where there is none."""
    if plan.data:
        return plan.data
    if not plan.scenes:
        raise ValueError("the plan names no data set: give it one with --data, or 'scenes: 1000' in the plan")
    return str(study / "scenes")


def trials_of(plan: Plan, study: Path, steps: dict[str, int] | None = None) -> list[Trial]:
    """All cells in the order in which they are trained: seed after seed, what others stand on first.

    steps: by variant, where the budget is one of seconds. Raises ValueError for settings that `train` does not know.
    """
    order = sorted(plan.variants, key=lambda name: _base_depth(plan, name))
    return [
        Trial(name, seed, _trial_config(plan, study, name, seed, (steps or {}).get(name, 0)))
        for seed in plan.seeds
        for name in order
    ]


def _base_depth(plan: Plan, name: str) -> int:
    base = plan.variants[name].base
    return 1 + _base_depth(plan, base) if base else 0


def trial_folder(study: Path, variant: str, seed: int) -> Path:
    """The run folder of a cell."""
    return study / "cells" / f"{variant}-{seed}"


def _trial_config(plan: Plan, study: Path, name: str, seed: int, steps: int) -> RunConfig:
    base = plan.variants[name].base
    init = str(trial_folder(study, base, seed)) if base else ""
    config = _variant_config(plan, name, {"cache": str(study / "cache")})
    config = replace(
        config, data=data_source(plan, study), layout=plan.layout, group=plan.group, identity=plan.identity
    )
    config = replace(config, seed=seed, init=init)
    # A time is turned into steps, and epochs that are enough for them.
    config = replace(config, steps=steps, epochs=10**6) if steps else config
    return replace(config, out=str(trial_folder(study, name, seed)))


def _variant_config(plan: Plan, name: str, extra_defaults: dict[str, Any] | None = None) -> RunConfig:
    """A variant's settings over the plan's over the study's own. usual: more of those."""
    defaults: dict[str, Any] = {"trackers": "", **(extra_defaults or {})}
    if name in DESIGNS:
        defaults["model"] = {"design": name}
    settings = merge_settings(merge_settings(defaults, plan.settings), plan.variants[name].settings)
    config: RunConfig = validate_as(RunConfig, settings, ("variants", name, "settings"))
    return config


def merge_settings(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, those of `above` counting more."""
    result = copy.deepcopy(base)
    for key, value in override.items():
        are_dicts = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge_settings(result[key], value) if are_dicts else copy.deepcopy(value)
    return result
