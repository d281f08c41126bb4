"""The plan of a study: which variants, on which data, with which seeds and budget, measured how.

A plan is a YAML file; ready ones lie in `plans/` and go by name. A cell is one training: one variant with one seed.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from clipvisionalign.data.captioned import Identity, checked_identity
from clipvisionalign.models.aligner import AlignerConfig, config_from_dict
from clipvisionalign.study.statistics import FIGURES
from clipvisionalign.training.train import RunConfig

DESIGNS: tuple[str, ...] = get_args(get_type_hints(AlignerConfig)["design"])


@dataclass
class Variant:
    """What one variant has of its own.

    Args:
        settings: settings of `train` in which it differs from the plan's.
        base: a variant whose run with the same seed this one starts from; its time is counted here too.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    base: str = ""


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
    seconds: float = 300.0


@dataclass
class Measurements:
    """What is measured beside recall.

    Args:
        composition: minimal pairs of each kind at most, 0 for none.
        minimal_pairs: a published set as well (ARO, SugarCrepe, Winoground), where it lies on disk.
        minimal_pair_images: where its pictures are, if not beside it.
        audit_images: images in the audit of each cell.
        rounds: how often time and memory are measured in a fresh process; variants take turns.
        brief: measure them on fewer captions and pictures, no caption above 64 tokens, in a quarter of the time.
        protocol: also show what other protocols would have made of the same models, apart from all results.
        examples: pictures in the report.
    """

    composition: int = 250
    minimal_pairs: str = ""
    minimal_pair_images: str = ""
    audit_images: int = 24
    rounds: int = 3
    brief: bool = False
    protocol: bool = True
    examples: int = 6


@dataclass
class Drawing:
    """How scenes are drawn.

    Args:
        seed: another one draws other scenes.
        pixels: on a side.
        plain: every group is one large shape, with two captions a scene instead of five.
        splits: how many scenes each split gets, `scenes` in all; a hash of each name decides where this is empty.
    """

    seed: int = 7
    pixels: int = 224
    plain: bool = False
    splits: dict[str, int] = field(default_factory=dict)


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
    scenes: int = 0
    drawing: Drawing = field(default_factory=Drawing)
    layout: str = "auto"
    group: str = ""
    identity: Identity = "auto"
    split: str = "dev"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    variants: dict[str, Variant] = field(
        default_factory=lambda: {"self": Variant(), "sparse": Variant(), "late": Variant(), "cross": Variant()}
    )
    settings: dict[str, Any] = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    measure: Measurements = field(default_factory=Measurements)
    compare: Comparison = field(default_factory=Comparison)

    def to_dict(self) -> dict[str, Any]:
        """The plan as YAML and JSON have it."""
        return asdict(self)


@dataclass(frozen=True)
class Cell:
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

    found = {}
    for path in sorted(files("clipvisionalign.study").joinpath("plans").iterdir(), key=lambda path: path.name):
        if path.name.endswith(".yaml"):
            found[path.name.removesuffix(".yaml")] = yaml.safe_load(path.read_text())["title"]
    return found


def read_plan(name: str | Path) -> Plan:
    """A plan from a YAML file, or a ready one by its name. Raises ValueError with what is wrong in it."""
    import yaml

    path = Path(name)
    if str(name) in ready_plans():
        text = files("clipvisionalign.study").joinpath("plans", f"{name}.yaml").read_text()
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ValueError(f"{name}: no such file, and no ready plan; those are {', '.join(ready_plans())}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name}: not a plan: it should hold 'variants', 'seeds', 'settings' and so on")
    variants = values.pop("variants", {})
    if isinstance(variants, list):
        variants = {variant: {} for variant in variants}
    try:
        plan: Plan = config_from_dict(Plan, values)
        own = {str(variant): config_from_dict(Variant, found or {}) for variant, found in variants.items()}
        plan = replace(plan, variants=own or plan.variants)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    check_plan(plan)
    return plan


def check_plan(plan: Plan) -> None:
    """Raises ValueError for a plan that cannot be carried out."""
    if not plan.variants or not plan.seeds:
        raise ValueError("a plan needs at least one variant and one seed")
    if len(set(plan.seeds)) < len(plan.seeds):
        raise ValueError(f"seeds {plan.seeds}: one stands there twice")
    for name, variant in plan.variants.items():
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"variant '{name}': a name is of letters, digits, - and _")
        if "model" not in variant.settings and name not in DESIGNS:
            told = ", ".join(DESIGNS)
            raise ValueError(f"unknown variant '{name}': give it settings (model: design: ...); designs are {told}")
        if variant.base and variant.base not in plan.variants:
            raise ValueError(f"variant '{name}' stands on '{variant.base}', which is not in the plan")
    for name in plan.variants:
        _stands(plan, name, ())
    _check_comparison(plan)
    drawn = sum(plan.drawing.splits.values())
    if drawn and drawn != plan.scenes:
        raise ValueError(f"drawing: splits of {drawn} scenes in all, where 'scenes' is {plan.scenes}")
    if plan.budget.seconds <= 0:
        raise ValueError(f"a budget of {plan.budget.seconds} seconds trains nothing")
    checked_identity(plan.identity)
    for where, settings in {"": plan.settings, **{n: each.settings for n, each in plan.variants.items()}}.items():
        for taken in ("data", "out", "seed", "init", "layout", "group", "identity"):
            if taken in settings:
                told = f"variant '{where}'" if where else "settings"
                raise ValueError(f"{told}: '{taken}' is the study's own, and not one of its settings")


#: Settings that decide how often a run sees which images.
PASSES = ("epochs", "steps", "train_images", "batch")


def _check_comparison(plan: Plan) -> None:
    asked = plan.compare
    if not asked.a and not asked.b:
        return
    for name in (asked.a, asked.b):
        if name not in plan.variants:
            raise ValueError(f"compare: '{name}' is no variant of the plan; it has {', '.join(plan.variants)}")
    if asked.a == asked.b:
        raise ValueError(f"compare: '{asked.a}' with itself")
    if asked.figure not in FIGURES:
        raise ValueError(f"compare: no figure '{asked.figure}'; there are {', '.join(FIGURES)}")
    if asked.passes == "any":
        return
    both = [plan.variants[name] for name in (asked.a, asked.b)]
    if any(variant.base for variant in both):
        raise ValueError("compare: passes are not equal where a variant stands on another; say 'passes: any'")
    if plan.budget.same == "seconds":
        raise ValueError("compare: passes are not equal where the seconds are; say 'passes: any'")
    for setting in PASSES:
        first, second = (merged(plan.settings, variant.settings).get(setting) for variant in both)
        if first != second:
            raise ValueError(f"compare: passes are not equal: {setting} {first} and {second}; or say 'passes: any'")


def _stands(plan: Plan, name: str, seen: tuple[str, ...]) -> None:
    if name in seen:
        raise ValueError(f"variants stand on each other in a circle: {' -> '.join([*seen, name])}")
    if plan.variants[name].base:
        _stands(plan, plan.variants[name].base, (*seen, name))


def data_of(plan: Plan, study: Path) -> str:
    """Where the plan's data set is, or will be drawn. Raises ValueError where there is none."""
    if plan.data:
        return plan.data
    if not plan.scenes:
        raise ValueError("the plan names no data set: give it one with --data, or 'scenes: 1000' in the plan")
    return str(study / "scenes")


def cells_of(plan: Plan, study: Path, steps: dict[str, int] | None = None) -> list[Cell]:
    """All cells in the order in which they are trained: seed after seed, what others stand on first.

    steps: by variant, where the budget is one of seconds. Raises ValueError for settings that `train` does not know.
    """
    order = sorted(plan.variants, key=lambda name: _depth(plan, name))
    return [
        Cell(name, seed, _config(plan, study, name, seed, (steps or {}).get(name, 0)))
        for seed in plan.seeds
        for name in order
    ]


def _depth(plan: Plan, name: str) -> int:
    base = plan.variants[name].base
    return 1 + _depth(plan, base) if base else 0


def cell_folder(study: Path, variant: str, seed: int) -> Path:
    """The run folder of a cell."""
    return study / "cells" / f"{variant}-{seed}"


def _config(plan: Plan, study: Path, name: str, seed: int, steps: int) -> RunConfig:
    variant = plan.variants[name]
    settings = merged(plan.settings, variant.settings)
    if name in DESIGNS:
        settings = merged({"model": {"design": name}}, settings)
    settings = merged({"cache": str(study / "cache"), "trackers": ""}, settings)
    try:
        config: RunConfig = config_from_dict(RunConfig, settings)
    except ValueError as error:
        raise ValueError(f"variant '{name}': {error}") from None
    init = str(cell_folder(study, variant.base, seed)) if variant.base else ""
    config = replace(config, data=data_of(plan, study), layout=plan.layout, group=plan.group, identity=plan.identity)
    config = replace(config, seed=seed, init=init)
    # A time is turned into steps, and epochs that are enough for them.
    config = replace(config, steps=steps, epochs=10**6) if steps else config
    return replace(config, out=str(cell_folder(study, name, seed)))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, those of `above` counting more."""
    found = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else copy.deepcopy(value)
    return found
