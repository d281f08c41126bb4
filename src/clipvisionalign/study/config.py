"""The plan of a study: variants, data, seeds, budget and measurements.

A plan is a YAML file; ready ones lie in `plans/` and go by name. A cell is one training: one variant with one seed.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import Field

from clipvisionalign.data.captioned import CaptionMode, IdentityMode
from clipvisionalign.data.scene_difficulty import SceneDifficulty
from clipvisionalign.models.aligner import AlignerConfig
from clipvisionalign.study.validation import NestedDataclass, validate_as
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.stages import SET_BY_STAGES

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
        same: "pictures", every variant sees the same number of images, as the settings say (which design makes more
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
        minimal_pairs: a published set as well (ARO, SugarCrepe, Winoground), by its path.
        minimal_pair_images: where its images are, if not beside it.
        audit_images: images in the audit of each cell, 10 at least: plans from before that ask for fewer get those.
        rounds: how often time and memory are measured in a fresh process; variants take turns.
        brief: measure them on fewer captions and images, no caption above 64 tokens, in a quarter of the time.
        protocol: also show what other protocols would have made of the same models, apart from all results.
        examples: images in the report.
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
        difficulty: how many groups a scene has, and of what its captions consist.
    """

    seed: Count = 7
    pixels: Annotated[int, Field(ge=32)] = 224
    plain: bool = False
    splits: dict[str, Count] = field(default_factory=dict)
    difficulty: SceneDifficulty = field(default_factory=SceneDifficulty)


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
class Until:
    """Seeds that are added until the interval of the comparison that the plan names (`compare`) is narrow enough.

    Args:
        width: of the interval, upper end minus lower end, in the figure's own points; 0 adds none.
        max_seeds: seeds at most, those of the plan included.
    """

    width: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_seeds: Annotated[int, Field(ge=3)] = 12


@dataclass
class Plan:
    """A study.

    Args:
        title: what the report is called.
        data: the data set, in any layout that `train` reads; empty to draw scenes.
        scenes: how many scenes to draw, where there is no data.
        drawing: how they are drawn.
        layout: the dataset layout.
        group: a column of its table whose images stand in one split, as in `train`.
        identity: which captions belong to which images, as in `train`: the same for all variants.
        captions: "each" caption as it is, or long texts of several "joined", as in `train`: the same for all variants.
        split: which split is measured; checkpoints are chosen on dev in any case.
        seeds: one training of every variant for each.
        variants: by name; a design's name alone stands for that design with the plan's settings.
        settings: settings of `train` for all of them.
        budget: what every cell may spend.
        measure: what is measured beside recall.
        compare: the comparison that the study is made for, if there is one.
        until: seeds that are added until its interval is narrow enough.
    """

    title: str = "Which attention design is worth it"
    data: str = ""
    scenes: Count = 0
    drawing: Drawing = field(default_factory=Drawing)
    layout: str = "auto"
    group: str = ""
    identity: IdentityMode = "auto"
    captions: CaptionMode = "each"
    split: Literal["dev", "test"] = "dev"
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    variants: dict[str, Variant] = field(
        default_factory=lambda: {"self": Variant(), "sparse": Variant(), "late": Variant(), "cross": Variant()}
    )
    settings: Settings = field(default_factory=dict)
    budget: Budget = field(default_factory=Budget)
    measure: Measurements = field(default_factory=Measurements)
    compare: Comparison = field(default_factory=Comparison)
    until: Until = field(default_factory=Until)

    def to_dict(self) -> dict[str, Any]:
        """The plan as YAML and JSON have it."""
        values = asdict(self)
        for variant in values["variants"].values():
            if not variant["same_as"]:
                del variant["same_as"]
        if not self.until.width:
            del values["until"]
        if self.captions == "each":
            del values["captions"]
        if self.drawing.difficulty == SceneDifficulty():
            del values["drawing"]["difficulty"]
        return values


@dataclass(frozen=True)
class Trial:
    """One training: a variant with a seed.

    Attributes:
        variant: Name of the variant.
        seed: The seed.
        config: The settings of the training.
    """

    variant: str
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """The run folder of the trial."""
        return Path(self.config.out)


def data_source(plan: Plan, study: Path) -> str:
    """Where the plan's data set is, or will be drawn.

    Args:
        plan: The plan.
        study: The study's folder.

    Returns:
        A path.

    Raises:
        ValueError: There is none.
    """
    if plan.data:
        return plan.data
    if not plan.scenes:
        raise ValueError("the plan names no data set: give it one with --data, or 'scenes: 1000' in the plan")
    return str(study / "scenes")


def trials_of(plan: Plan, study: Path, steps: dict[str, int] | None = None) -> list[Trial]:
    """All trials in the order in which they are trained: seed after seed, what others stand on first.

    Args:
        plan: The plan.
        study: The study's folder.
        steps: By variant, where the budget is one of seconds.

    Returns:
        The trials.

    Raises:
        ValueError: There are settings that `train` does not have.
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
    """The run folder of a trial.

    Args:
        study: The study's folder.
        variant: The variant.
        seed: The seed.

    Returns:
        The folder, which need not exist.
    """
    return study / "cells" / f"{variant}-{seed}"


def _trial_config(plan: Plan, study: Path, name: str, seed: int, steps: int) -> RunConfig:
    base = plan.variants[name].base
    init = str(trial_folder(study, base, seed)) if base else ""
    config = variant_config(plan, name, {"cache": str(study / "cache")})
    config = replace(
        config, data=data_source(plan, study), layout=plan.layout, group=plan.group, identity=plan.identity,
        captions=plan.captions,
    )  # fmt: skip
    config = replace(config, seed=seed, init=init)
    # A time is turned into steps, and epochs that are enough for them.
    config = replace(config, steps=steps, epochs=10**6) if steps else config
    return replace(config, out=str(trial_folder(study, name, seed)))


def variant_config(plan: Plan, name: str, extra_defaults: dict[str, Any] | None = None) -> RunConfig:
    """A variant's settings over the plan's over the study's own.

    Args:
        plan: The plan.
        name: The variant.
        extra_defaults: More of the study's own; None for none.

    Returns:
        The settings.
    """
    defaults: dict[str, Any] = {"trackers": "", **(extra_defaults or {})}
    if name in DESIGNS:
        defaults["model"] = {"design": name}
    own = plan.variants[name].settings
    # A variant's own stages take the place of the plan's schedule: they have epochs, and freeze, of their own.
    replaced = SET_BY_STAGES if own.get("stages") else ()
    shared = {key: value for key, value in plan.settings.items() if key not in replaced or key in own}
    settings = merge_settings(merge_settings(defaults, shared), own)
    config: RunConfig = validate_as(RunConfig, settings, ("variants", name, "settings"))
    return config


def merge_settings(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, those of `override` counting more.

    Args:
        base: Settings.
        override: Those that count more.

    Returns:
        Both in one.
    """
    result = copy.deepcopy(base)
    for key, value in override.items():
        are_dicts = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge_settings(result[key], value) if are_dicts else copy.deepcopy(value)
    return result
