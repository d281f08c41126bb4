"""The row that every study over a pretrained model has: the model as it is, to which each difference is reported."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import chain, count
from pathlib import PurePosixPath

from clipvisionalign.study.config import Plan, Variant, variant_config
from clipvisionalign.training.config import RunConfig

#: Name of that variant.
ZERO_SHOT = "zero-shot"


def add_zero_shot(plan: Plan) -> Plan:
    """Put a variant without training in front of a plan's others, for each pretrained model that they start from.

    Args:
        plan: A plan, whose variants may start from pretrained models.

    Returns:
        The plan; the same if it has such variants, or starts from no pretrained model.
    """
    configs = [variant_config(plan, name) for name in plan.variants]
    used = dict.fromkeys(config.model.pretrained for config in configs if config.model.pretrained)
    measured = {config.model.pretrained for config in configs if _is_zero_shot(config)}
    missing = [model for model in used if model not in measured]
    added: dict[str, Variant] = {}
    for model in missing:
        last = PurePosixPath(model.partition("@")[0]).name
        name = _free_name(ZERO_SHOT if len(used) == 1 else f"{ZERO_SHOT}-{last}", {*plan.variants, *added})
        # Whatever the plan sets for its variants: the model alone, as its publisher has it.
        own = {"width": None, "positions": "own", "text_tower": {"max_tokens": None}}
        model_settings = {"design": "self", "pretrained": model, **own}
        added[name] = Variant(settings={"epochs": 0, "stages": "", "model": model_settings})
    return replace(plan, variants=added | plan.variants) if added else plan


def _is_zero_shot(config: RunConfig) -> bool:
    """Whether a variant is a pretrained model as it is."""
    model = config.model
    as_published = model.positions == "own" and model.width is None and model.text_tower.max_tokens is None
    return not config.epochs and not config.init and model.design == "self" and as_published


def _free_name(name: str, taken: Collection[str]) -> str:
    """A variant's name that no other has: numbered, where it is taken."""
    numbered = (f"{name}-{number}" for number in count(2))
    return next(each for each in chain([name], numbered) if each not in taken)
