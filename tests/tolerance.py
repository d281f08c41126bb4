"""How far two computations of one thing may differ by rounding alone, on any processor.

Which kernel runs, how many threads share a sum, and whether a product and a sum are rounded together decide in which
order terms are added, and so how a result is rounded. They do not decide by how much it may be off: a sum of n terms in
a format of unit roundoff u is off by at most

    c sqrt(n) u (|t_1| + ... + |t_n|)

with a probability above 1 - 2 exp(-c^2 / 2) for whichever order (Higham and Mary, "A new approach to probabilistic
rounding error analysis", SIAM Journal on Scientific Computing 41, 2019, theorem 3.1), and operations that follow one
another add up their errors. c = 8 leaves 2e-14. So no tolerance in these tests is a figure that one machine showed:

- `rounding` is that bound, for one operation or a few whose terms are known.
- Through a whole network the terms are not known, but they are the same for everybody who computes the same thing. Both
  sides are compared with the same network in float64, and ours may be off by what the rival is off by, times `TIMES`:
  errors of two orders of summation have one distribution, and the largest of many such errors seldom differs twofold.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: c of the bound above.
SURE = 8.0
#: By how much the largest error of one order of summation may exceed that of another.
TIMES = 4.0

Numbers = Tensor | np.ndarray


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to the nearest number of a format."""
    return torch.finfo(dtype).eps / 2


def rounding(terms: int, size: float = 1.0, steps: int = 1, dtype: torch.dtype = torch.float32) -> float:
    """By how much a number may be off that `steps` operations make, one after the other.

    terms: how many terms each operation sums. size: the largest sum of the terms' absolute values; 1 for a product of
    unit vectors, for a mean of numbers up to 1.
    """
    return SURE * steps * float(terms) ** 0.5 * unit_roundoff(dtype) * size


def off(actual: Numbers, exact: Numbers) -> float:
    """The largest difference, taken in float64; infinite where shapes differ or something is no number."""
    first, second = (torch.as_tensor(each).detach().double().cpu() for each in (actual, exact))
    if first.shape != second.shape:
        return float("inf")
    return float((first - second).abs().nan_to_num(torch.inf).max()) if first.numel() else 0.0


def assert_rounds_to(
    actual: Numbers, exact: Numbers, terms: int, size: float | None = None, steps: int = 1,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """`found` is `exact` but for the rounding of `steps` operations; size: unless told, the largest number in `exact`."""
    size = float(torch.as_tensor(exact).detach().abs().max()) if size is None else size
    error, allowed = off(actual, exact), rounding(terms, size, steps, dtype)
    assert error <= allowed, f"off by {error:.3g}, where rounding allows {allowed:.3g}"


def assert_as_exact(
    actual: Numbers, rival: Numbers, exact: Numbers, size: float | None = None, terms: int = 1,
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """`found` is as near to `exact`, which is float64, as the same thing computed by a rival in the tests' format is.

    The rival may have been lucky to the last bit, so that one operation over `terms` terms of `size` (unless told, the
    largest number in `exact`) is granted in any case. That the rival computes the same thing is part of the claim: its
    own error has to be one of rounding, a share of sqrt(u) of `size` at most.
    """
    size = float(torch.as_tensor(exact).detach().abs().max()) if size is None else size
    error, theirs = off(actual, exact), off(rival, exact)
    allowed = TIMES * theirs + rounding(terms, size, 1, dtype)
    assert theirs <= unit_roundoff(dtype) ** 0.5 * size, f"the rival is off by {theirs:.3g}: it computes something else"
    assert error <= allowed, f"off by {error:.3g}, where the rival is by {theirs:.3g} and {allowed:.3g} are allowed"


def assert_same(first: Numbers, second: Numbers, exact: Numbers, size: float | None = None) -> None:
    """Two ways to one thing are equally near to it."""
    assert_as_exact(first, second, exact, size)
    assert_as_exact(second, first, exact, size)


def in_float64(aligner: Any) -> Any:
    """A copy of an aligner, or of a tower, that computes in float64 from the same pixels and words."""
    exact = copy.deepcopy(aligner).double()
    tower = getattr(exact, "image_tower", exact)
    if hasattr(tower, "feature_map"):
        tower.feature_map = lambda pixels: tower.backbone.forward_features(
            tower.image_transform.normalize(pixels).double()
        )
    return exact
