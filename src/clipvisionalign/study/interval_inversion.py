"""p from intervals: the level at which one ends at zero."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def level_at_zero(value: float, margin: Callable[[float], float], images: int) -> float:
    """The level at which an interval around a value ends at zero.

    Args:
        value: The middle of the interval.
        margin: Half of the interval by its level.
        images: Number N of images.

    Returns:
        At least 2^(1 - N), at most 1.
    """
    from scipy.optimize import brentq

    def excess(log_level: float) -> float:
        return abs(value) - margin(float(np.exp(log_level)))

    # Below 1e-100 the quantiles leave what floating-point numbers hold.
    min_log_level = max((1 - images) * np.log(2), np.log(1e-100))
    if not value:
        return 1.0
    if excess(min_log_level) >= 0:
        return float(np.exp(min_log_level))
    return float(np.exp(brentq(excess, min_log_level, 0.0, xtol=1e-12))) if excess(0.0) > 0 else 1.0
