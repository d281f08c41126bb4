"""When two scores of a query are equal: within the rounding of these two, and no more.

Three things round. What follows is free of scale: no threshold, and nothing that another pair's size decides.

- *The product of vectors.* Vectors are the exact numbers that they are, and their products are computed in float64. A
  product of D terms is wrong by at most about D u |x| |y| (u = 2**-53), in whatever order a machine adds up: two
  scores closer than twice what that can do to both are equal (`dot_product_error`).
- *The format of the vectors.* Two vectors whose distance is within the rounding of the format that they came in are one
  vector: |a - b| <= r max(|a|, |b|) (`VectorEquality`). A model that gives every caption the same score finds nothing,
  though a caption that is encoded in another batch may differ in its last digits.
- *The format of a table of scores.* Two scores of one query are equal where |a - b| <= r max(|a|, |b|)
  (`tie_thresholds`).

r is eps in float16 and bfloat16, whose numbers were computed in more digits and then rounded once: two neighbouring
numbers of the format. It is 8 eps in float32 and float64, in which the arithmetic itself rounds as it goes.

Source of the bound: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition (2002), section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

#: Unit roundoff of float64.
UNIT_ROUNDOFF = 2.0**-53

#: eps of the formats that NumPy has no name for, by torch's and ml_dtypes' names.
HALF_PRECISION_EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
ARITHMETIC_EPS_FACTOR = 8.0

#: Pairs of vectors that are looked at together, and directions in which they are compared first.
PAIRS_PER_BLOCK, SKETCH_WIDTH = 1 << 14, 8


@dataclass(frozen=True)
class NumericArray:
    """An array with the original dtype of its numbers.

    Attributes:
        values: Any shape, float32 or float64, exactly the numbers given.
        dtype_name: Name of the original dtype, such as "bfloat16" or "int64".
        rounding: Share of its size by which a number may have been rounded in that dtype.
    """

    values: np.ndarray
    dtype_name: str
    rounding: float


def as_numeric_array(data: Any) -> NumericArray:
    """Convert an array, tensor or list to numbers of NumPy that remember their dtype.

    Args:
        data: An array, a tensor on any device (of any real dtype, sparse, or with a gradient), a list of such of one
            shape, or nested lists of numbers. A `NumericArray` is returned as it is.

    Returns:
        The numbers: float16 and bfloat16 widened to float32, whole numbers and what is wider than 8 bytes as float64.
        Elements that a masked array hides are -inf. Of a list the coarsest dtype counts. Nothing is copied that has its
        dtype already.

    Raises:
        ValueError: It holds no real numbers, or is a list of arrays of different shapes.

    >>> as_numeric_array(np.ones(2, np.float16)).dtype_name
    'float16'
    """
    if isinstance(data, NumericArray):
        return data
    if hasattr(data, "detach"):
        return _from_tensor(data.detach())
    if isinstance(data, (list, tuple)) and _holds_arrays(data):
        parts = [as_numeric_array(part) for part in data]
        for index, part in enumerate(parts):
            if part.values.shape != parts[0].values.shape:
                message = f"entry {index} has the shape {part.values.shape}, entry 0 {parts[0].values.shape}"
                raise ValueError(f"a list of arrays should hold arrays of one shape: {message}")
        coarsest = max(parts, key=lambda part: part.rounding)
        return NumericArray(np.stack([part.values for part in parts]), coarsest.dtype_name, coarsest.rounding)
    if isinstance(data, np.ma.MaskedArray):
        unmasked = as_numeric_array(data.data)
        return NumericArray(
            np.where(np.ma.getmaskarray(data), -np.inf, unmasked.values), unmasked.dtype_name, unmasked.rounding
        )
    array = np.asarray(data)
    # As this machine writes numbers, whatever machine wrote the file.
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    name = array.dtype.name
    if name in HALF_PRECISION_EPS:
        return NumericArray(array.astype(np.float32), name, HALF_PRECISION_EPS[name])
    if array.dtype.kind in "biu" or name == "longdouble" or array.dtype.itemsize > 8:
        if array.dtype.kind not in "biuf":
            raise ValueError(f"an array of real numbers belongs here, not of {array.dtype}")
        array = array.astype(np.float64)
        name = name if name[:3] in ("int", "uin", "boo") else "float64"
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"an array of real numbers belongs here, not of {array.dtype}")
    return NumericArray(array, name, ARITHMETIC_EPS_FACTOR * float(np.finfo(array.dtype).eps))


def as_numpy(data: Any) -> np.ndarray:
    """The values of `as_numeric_array`.

    Args:
        data: As in `as_numeric_array`.

    Returns:
        The numbers, float32 or float64.

    Raises:
        ValueError: As in `as_numeric_array`.
    """
    return as_numeric_array(data).values


def _from_tensor(tensor: Any) -> NumericArray:
    name = str(tensor.dtype).rpartition(".")[2]
    if tensor.layout != _strided():
        tensor = tensor.to_dense()
    if not tensor.is_floating_point() or name in ("float32", "float64"):
        return as_numeric_array(tensor.cpu().numpy())
    import torch

    return NumericArray(tensor.cpu().float().numpy(), name, float(torch.finfo(tensor.dtype).eps))


def _strided() -> Any:
    import torch

    return torch.strided


def _holds_arrays(data: Any) -> bool:
    while isinstance(data, (list, tuple)) and data:
        data = data[0]
    return hasattr(data, "detach") or isinstance(data, np.ndarray)


def as_vectors(data: Any, kind: str) -> NumericArray:
    """Convert and check a table of vectors.

    Args:
        data: (number, width) floating-point numbers, as in `as_numeric_array`.
        kind: What the vectors are of, "image" or "caption", for messages.

    Returns:
        The vectors. If the largest number is beyond 2^256 or below 2^-256, all are scaled by one power of two, which
        changes no rank.

    Raises:
        ValueError: They are not a table of floating-point numbers, or not finite.
    """
    numbers = as_numeric_array(data)
    values = numbers.values
    if values.ndim != 2 or numbers.dtype_name.startswith(("int", "uint", "bool")):
        raise ValueError(
            f"{kind} vectors should be floating-point (number, width), not {numbers.dtype_name} {values.shape}"
        )
    largest = 0.0
    for start in range(0, len(values), 1 << 14):
        largest = max(largest, float(np.abs(values[start : start + (1 << 14)]).max(initial=0.0)))
        if not np.isfinite(values[start : start + (1 << 14)]).all():
            row = start + int(np.flatnonzero(~np.isfinite(values[start : start + (1 << 14)]).all(axis=1))[0])
            hint = "; float16 ends at 65,504: give them in float32" if numbers.dtype_name == "float16" else ""
            raise ValueError(f"some {kind} vectors are not finite numbers, number {row} is the first{hint}")
    if largest and not 2.0**-256 < largest < 2.0**256:
        # No rank changes, and no product overflows.
        values = np.ldexp(values, -int(np.frexp(largest)[1]))
    return NumericArray(values, numbers.dtype_name, numbers.rounding)


def vector_norms(vectors: np.ndarray) -> np.ndarray:
    """Euclidean lengths of vectors, computed in float64.

    Args:
        vectors: (N, D).

    Returns:
        (N,) float64.
    """
    norms = np.empty(len(vectors))
    for start in range(0, len(vectors), PAIRS_PER_BLOCK):
        part = vectors[start : start + PAIRS_PER_BLOCK].astype(np.float64)
        norms[start : start + PAIRS_PER_BLOCK] = np.sqrt(np.einsum("nd,nd->n", part, part))
    return norms


def dot_product_error(width: int) -> float:
    """Twice the share of |x| |y| by which a dot product computed in float64 may be wrong.

    Args:
        width: Number D of terms.

    Returns:
        2 (D + 2) u with u = 2^-53: two scores closer than this times |x| |y| are equal.

    Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition (2002), section 3.1.
    """
    return 2.0 * (width + 2) * UNIT_ROUNDOFF


def tie_thresholds(scores: np.ndarray, rounding: float) -> np.ndarray:
    """The lowest score that still ties with each given one.

    Args:
        scores: Any shape, finite or -inf.
        rounding: r of |a - b| <= r max(|a|, |b|), which defines a tie.

    Returns:
        float64 of the same shape, exact to the last digit: the next lower number does not tie.
    """
    mantissa, exponent = np.frexp(scores)
    exponent = np.where(np.isfinite(scores), exponent, 0)

    def ties(lower: np.ndarray) -> np.ndarray:
        # Scaled by a power of two, which changes no digit: a share of a score near the smallest number would.
        scaled = np.ldexp(lower, -exponent)
        return np.abs(mantissa - scaled) <= rounding * np.maximum(np.abs(mantissa), np.abs(scaled))

    lowest = np.where(scores > 0, scores - rounding * scores, scores / (1.0 - rounding))
    lowest = np.where(ties(lowest), lowest, np.nextafter(lowest, np.inf))
    below = np.nextafter(lowest, -np.inf)
    return np.where(ties(below), below, lowest)


class VectorEquality:
    """Decides which vectors of a table are equal up to the rounding of their format.

    Args:
        vectors: (N, D).
        norms: (N,) their lengths.
    """

    def __init__(self, vectors: NumericArray, norms: np.ndarray) -> None:
        self.values, self.rounding, self.norms = vectors.values, vectors.rounding, norms
        self._sketch: np.ndarray | None = None

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Compare pairs of vectors.

        Args:
            a: (Q,) numbers of vectors, from 0.
            b: (Q,) numbers of vectors, from 0.

        Returns:
            (Q,) whether |x_a - x_b| <= r max(|x_a|, |x_b|).
        """
        is_equal = np.zeros(len(a), dtype=bool)
        close = np.concatenate(
            [
                start + self._close(a[start : start + PAIRS_PER_BLOCK], b[start : start + PAIRS_PER_BLOCK])
                for start in range(0, len(a), PAIRS_PER_BLOCK)
            ]
            or [np.empty(0, dtype=np.int64)]
        )
        if len(close) > 4 * PAIRS_PER_BLOCK:
            # Where most are alike, as in a model that gives equal scores to everything, products are quicker than
            # pairs.
            sure, same = self._by_products(a[close], b[close])
            is_equal[close[sure]] = same[sure]
            close = close[~sure]
        for start in range(0, len(close), PAIRS_PER_BLOCK):
            part = close[start : start + PAIRS_PER_BLOCK]
            difference = self.values[a[part]].astype(np.float64) - self.values[b[part]]
            is_equal[part] = np.einsum("qd,qd->q", difference, difference) <= self._tolerance(a[part], b[part]) ** 2
        return is_equal

    def _tolerance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return self.rounding * np.maximum(self.norms[a], self.norms[b])

    def _close(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Which pairs may be alike: seen in a few directions a distance is never larger, and most pairs end here."""
        gap = self.sketch[a] - self.sketch[b]
        slack = 2 * dot_product_error(self.values.shape[1]) * np.maximum(self.norms[a], self.norms[b])
        return np.flatnonzero(np.einsum("qs,qs->q", gap, gap) <= (self._tolerance(a, b) + slack) ** 2)

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
        error = 4 * dot_product_error(one.shape[1]) * (one_square[a_row] + other_square[b_row])
        squared_tolerance = self._tolerance(a, b) ** 2
        return np.abs(square - squared_tolerance) > error, square <= squared_tolerance

    @property
    def sketch(self) -> np.ndarray:
        """Every vector in a few directions at right angles, drawn at random (N, 8)."""
        if self._sketch is None:
            width = self.values.shape[1]
            directions = np.linalg.qr(np.random.default_rng(0).standard_normal((width, min(SKETCH_WIDTH, width))))[0]
            self._sketch = np.concatenate(
                [
                    self.values[i : i + PAIRS_PER_BLOCK].astype(np.float64) @ directions
                    for i in range(0, len(self.values), PAIRS_PER_BLOCK)
                ]
            )
        return self._sketch
