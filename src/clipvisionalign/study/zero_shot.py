"""The row that every study over a pretrained model has: the model as it is, to which each difference is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath

from clipvisionalign.study.config import Plan, Variant, variant_config

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
    measured = {config.model.pretrained for config in configs if not config.epochs and config.model.design == "self"}
    missing = [model for model in used if model not in measured]
    added = {}
    for model in missing:
        last = PurePosixPath(model.partition("@")[0]).name
        name = ZERO_SHOT if len(used) == 1 else f"{ZERO_SHOT}-{last}"
        added[name] = Variant(settings={"epochs": 0, "model": {"design": "self", "pretrained": model}})
    return replace(plan, variants=added | plan.variants) if added else plan
