"""When two candidates of a query score alike: a difference within what rounding can do to those two, and no more.

Three things round. What follows is free of scale: no floor, and nothing that another pair's size decides.

- *The product of vectors.* Vectors are the exact numbers that they are, and their products are computed in float64. A
  product of D terms is wrong by at most about D u |x| |y| (u = 2**-53), in whatever order a machine adds up: two
  scores closer than twice what that can do to both are equal (`product_rounding`).
- *The format of the vectors.* Two vectors whose distance is within the rounding of the format that they came in are one
  vector: |a - b| <= r max(|a|, |b|) (`Alike`). A model that says the same of every caption finds nothing, though a
  caption that is encoded in another batch may differ in its last digits.
- *The format of a table of scores.* Two scores of one query are equal where |a - b| <= r max(|a|, |b|)
  (`lowest_tying`).

r is eps in float16 and bfloat16, whose numbers were computed in more digits and then rounded once: two neighbouring
numbers of the format. It is 8 eps in float32 and float64, in which the arithmetic itself rounds as it goes.

Source of the bound: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition (2002), section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

#: Unit roundoff of float64.
UNIT = 2.0**-53

#: eps of the formats that NumPy has no name for, by torch's and ml_dtypes' names.
NARROW = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
ARITHMETIC = 8.0

#: Pairs of vectors that are looked at together, and directions in which they are compared first.
PAIRS, SKETCH = 1 << 14, 8


@dataclass(frozen=True)
class Numbers:
    """An array that knows in which format its numbers came.

    values: float32 or float64, exactly the numbers given. rounding: the share of its size by which a number may have
    been rounded in that format.
    """

    values: np.ndarray
    format: str
    rounding: float


def numbers_of(found: Any) -> Numbers:
    """An array, a tensor on any device (of bfloat16, with a gradient), or a list of such, as NumPy's numbers.

    What a masked array hides is -inf. Whole numbers are taken as float64. Raises ValueError for what is no array of
    real numbers, or a list of arrays of different shapes.

    >>> numbers_of(np.ones(2, np.float16)).format
    'float16'
    """
    if isinstance(found, Numbers):
        return found
    if hasattr(found, "detach"):
        return _of_tensor(found.detach())
    if isinstance(found, (list, tuple)) and _holds_arrays(found):
        parts = [numbers_of(part) for part in found]
        for number, part in enumerate(parts):
            if part.values.shape != parts[0].values.shape:
                told = f"entry {number} has the shape {part.values.shape}, entry 0 {parts[0].values.shape}"
                raise ValueError(f"a list of arrays should hold arrays of one shape: {told}")
        coarsest = max(parts, key=lambda part: part.rounding)
        return Numbers(np.stack([part.values for part in parts]), coarsest.format, coarsest.rounding)
    if isinstance(found, np.ma.MaskedArray):
        shown = numbers_of(found.data)
        return Numbers(np.where(np.ma.getmaskarray(found), -np.inf, shown.values), shown.format, shown.rounding)
    array = np.asarray(found)
    # As this machine writes numbers, whatever machine wrote the file.
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    name = array.dtype.name
    if name in NARROW:
        return Numbers(array.astype(np.float32), name, NARROW[name])
    if array.dtype.kind in "biu" or name == "longdouble" or array.dtype.itemsize > 8:
        if array.dtype.kind not in "biuf":
            raise ValueError(f"an array of real numbers belongs here, not of {array.dtype}")
        array = array.astype(np.float64)
        name = name if name[:3] in ("int", "uin", "boo") else "float64"
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"an array of real numbers belongs here, not of {array.dtype}")
    return Numbers(array, name, ARITHMETIC * float(np.finfo(array.dtype).eps))


def as_array(found: Any) -> np.ndarray:
    """The values of `numbers_of`."""
    return numbers_of(found).values


def _of_tensor(tensor: Any) -> Numbers:
    name = str(tensor.dtype).rpartition(".")[2]
    if tensor.layout != _strided():
        tensor = tensor.to_dense()
    if not tensor.is_floating_point() or name in ("float32", "float64"):
        return numbers_of(tensor.cpu().numpy())
    import torch

    return Numbers(tensor.cpu().float().numpy(), name, float(torch.finfo(tensor.dtype).eps))


def _strided() -> Any:
    import torch

    return torch.strided


def _holds_arrays(found: Any) -> bool:
    while isinstance(found, (list, tuple)) and found:
        found = found[0]
    return hasattr(found, "detach") or isinstance(found, np.ndarray)


def vectors_of(found: Any, kind: str) -> Numbers:
    """Vectors (number, width), checked; those beyond float64's square root by a power of two brought within.

    Raises ValueError for what is no table of floating-point numbers, and for numbers that are not finite.
    """
    numbers = numbers_of(found)
    values = numbers.values
    if values.ndim != 2 or numbers.format.startswith(("int", "uint", "bool")):
        raise ValueError(
            f"{kind} vectors should be floating-point (number, width), not {numbers.format} {values.shape}"
        )
    largest = 0.0
    for start in range(0, len(values), 1 << 14):
        largest = max(largest, float(np.abs(values[start : start + (1 << 14)]).max(initial=0.0)))
        if not np.isfinite(values[start : start + (1 << 14)]).all():
            row = start + int(np.flatnonzero(~np.isfinite(values[start : start + (1 << 14)]).all(axis=1))[0])
            more = "; float16 ends at 65,504: give them in float32" if numbers.format == "float16" else ""
            raise ValueError(f"some {kind} vectors are not finite numbers, number {row} is the first{more}")
    if largest and not 2.0**-256 < largest < 2.0**256:
        # No rank changes, and no product overflows.
        values = np.ldexp(values, -int(np.frexp(largest)[1]))
    return Numbers(values, numbers.format, numbers.rounding)


def lengths_of(vectors: np.ndarray) -> np.ndarray:
    """Euclidean lengths (N,) of vectors (N, D), in float64."""
    found = np.empty(len(vectors))
    for start in range(0, len(vectors), PAIRS):
        part = vectors[start : start + PAIRS].astype(np.float64)
        found[start : start + PAIRS] = np.sqrt(np.einsum("nd,nd->n", part, part))
    return found


def product_rounding(width: int) -> float:
    """What share of |x| |y| a product of `width` terms in float64 may be wrong by, twice over."""
    return 2.0 * (width + 2) * UNIT


def lowest_tying(scores: np.ndarray, rounding: float) -> np.ndarray:
    """The lowest float64 that still ties with each score: |a - b| <= rounding max(|a|, |b|), to the last digit."""
    mantissa, exponent = np.frexp(scores)
    exponent = np.where(np.isfinite(scores), exponent, 0)

    def ties(lower: np.ndarray) -> np.ndarray:
        # Scaled by a power of two, which changes no digit: a share of a score near the smallest number would.
        scaled = np.ldexp(lower, -exponent)
        return np.abs(mantissa - scaled) <= rounding * np.maximum(np.abs(mantissa), np.abs(scaled))

    found = np.where(scores > 0, scores - rounding * scores, scores / (1.0 - rounding))
    found = np.where(ties(found), found, np.nextafter(found, np.inf))
    below = np.nextafter(found, -np.inf)
    return np.where(ties(below), below, found)


class Alike:
    """Asks which vectors of a table are equal up to the rounding of their format.

    vectors: (N, D); lengths: (N,) their lengths.
    """

    def __init__(self, vectors: Numbers, lengths: np.ndarray) -> None:
        self.values, self.rounding, self.lengths = vectors.values, vectors.rounding, lengths
        self._sketch: np.ndarray | None = None

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Pairs of numbers of vectors (Q,) and (Q,) -> whether they are one vector (Q,)."""
        found = np.zeros(len(a), dtype=bool)
        close = np.concatenate(
            [
                start + self._close(a[start : start + PAIRS], b[start : start + PAIRS])
                for start in range(0, len(a), PAIRS)
            ]
            or [np.empty(0, dtype=np.int64)]
        )
        if len(close) > 4 * PAIRS:
            # Where most are alike, as in a model that says the same of everything, products are quicker than pairs.
            sure, same = self._by_products(a[close], b[close])
            found[close[sure]] = same[sure]
            close = close[~sure]
        for start in range(0, len(close), PAIRS):
            part = close[start : start + PAIRS]
            difference = self.values[a[part]].astype(np.float64) - self.values[b[part]]
            found[part] = np.einsum("qd,qd->q", difference, difference) <= self._reach(a[part], b[part]) ** 2
        return found

    def _reach(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.rounding * np.maximum(self.lengths[a], self.lengths[b])

    def _close(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Which pairs may be alike: seen in a few directions a distance is never larger, and most pairs end here."""
        gap = self.sketch[a] - self.sketch[b]
        slack = 2 * product_rounding(self.values.shape[1]) * np.maximum(self.lengths[a], self.lengths[b])
        return np.flatnonzero(np.einsum("qs,qs->q", gap, gap) <= (self._reach(a, b) + slack) ** 2)

    def _by_products(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each pair whether its distance by |a|^2 + |b|^2 - 2 a b is sure, and whether the two are alike."""
        left, a_row = np.unique(a, return_inverse=True)
        right, b_row = np.unique(b, return_inverse=True)
        if len(left) * len(right) > 16 * len(a):
            return np.zeros(len(a), dtype=bool), np.zeros(len(a), dtype=bool)
        # Seen from one of them, vectors that lie together are short, and so is what rounding does to their products.
        origin = self.values[left[0]].astype(np.float64)
        one, other = self.values[left] - origin, self.values[right] - origin
        one_square, other_square = np.einsum("nd,nd->n", one, one), np.einsum("nd,nd->n", other, other)
        products = (one @ other.T)[a_row, b_row]
        square = one_square[a_row] + other_square[b_row] - 2 * products
        error = 4 * product_rounding(one.shape[1]) * (one_square[a_row] + other_square[b_row])
        reach = self._reach(a, b) ** 2
        return np.abs(square - reach) > error, square <= reach

    @property
    def sketch(self) -> np.ndarray:
        """Every vector in a few directions at right angles, drawn at random (N, 8)."""
        if self._sketch is None:
            width = self.values.shape[1]
            directions = np.linalg.qr(np.random.default_rng(0).standard_normal((width, min(SKETCH, width))))[0]
            self._sketch = np.concatenate(
                [self.values[i : i + PAIRS].astype(np.float64) @ directions for i in range(0, len(self.values), PAIRS)]
            )
        return self._sketch
