"""What is drawn at random of a gallery: images, or groups of images whose figures depend on each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.splits import connected_groups


def image_units(eval_data: CaptionedImages) -> np.ndarray:
    """What is drawn at random of a gallery: images of one identity together, and near-duplicates.

    Their figures depend on each other.

    Args:
        eval_data: N images.

    Returns:
        (N,) number of each image's unit, from 0.
    """
    unit = np.arange(len(eval_data)) if eval_data.image_identity is None else eval_data.image_identity
    if not eval_data.near_duplicates:
        return unit
    group_of = {name: number for number, names in enumerate(eval_data.near_duplicates) for name in names}
    keys = [
        [("unit", number), *([("group", group_of[row.name])] if row.name in group_of else [])]
        for number, row in zip(unit.tolist(), eval_data.rows, strict=True)
    ]
    return np.unique(connected_groups(keys), return_inverse=True)[1]


def units_block(eval_data: CaptionedImages, unit: np.ndarray) -> dict[str, Any]:
    """How many units are drawn, and what they are where they are not images.

    Args:
        eval_data: N images.
        unit: (N,) what `image_units` returns.

    Returns:
        "units", and where there are some "identities" and "near_duplicates", as report.json has them.
    """
    groups = eval_data.near_duplicates
    near = {"near_duplicates": {"images": sum(map(len, groups)), "groups": len(groups)}} if groups else {}
    identity = eval_data.image_identity
    identities = {} if identity is None else {"identities": int(identity.max()) + 1}
    return {**identities, **near, "units": int(unit.max()) + 1}
