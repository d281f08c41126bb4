"""The form in which the lists keep vectors: full numbers, bytes or bits, of all of a vector or of its beginning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

CodeName = Literal["float32", "float16", "int8", "binary"]
#: The forms, from the largest to the smallest.
CODES: tuple[CodeName, ...] = get_args(CodeName)
#: Candidates that are compared again by their full vectors, per row that is wanted: the more, the coarser the form.
_REFINE: dict[CodeName, int] = {"float32": 1, "float16": 2, "int8": 4, "binary": 32}
#: The same for vectors of which the beginning alone is in the lists.
_REFINE_SHORTENED = 24
#: Rows whose greatest number is taken at a time, and bytes' greatest value.
_SCALE_ROWS, _INT8_MAX = 20_000, 127


@dataclass(frozen=True)
class VectorSettings:
    """How the lists keep vectors.

    Attributes:
        code: "float32", "float16", "int8" or "binary" (the signs alone).
        width: Numbers of a vector that are kept, from its beginning; 0 for all.
    """

    code: CodeName = "int8"
    width: int = 0


def check_code(code: str) -> CodeName:
    """A form of vectors by its name.

    Args:
        code: The name; "" for int8.

    Returns:
        It.

    Raises:
        ValueError: There is no such form.
    """
    form = next((each for each in CODES if each == (code or "int8")), None)
    if form is None:
        raise ValueError(f"--vectors {code}: one of {', '.join(CODES)}")
    return form


def check_settings(code: str, width: int, full_width: int, current: VectorSettings | None = None) -> VectorSettings:
    """The settings of an index that is about to be written.

    Args:
        code: A form of `CODES`; "" for that of the index, or int8.
        width: Numbers of a vector that the lists keep; 0 for those of the index, or all.
        full_width: D, the width of the vectors.
        current: The settings of the index so far, if there are any.

    Returns:
        The settings.

    Raises:
        ValueError: There is no such form, or vectors are not so wide.
    """
    settings = current or VectorSettings()
    if code:
        settings = replace(settings, code=check_code(code))
    if width:
        if not 8 <= width <= full_width or width % 8:
            raise ValueError(f"--vector-width {width}: a multiple of 8 from 8 to {full_width}, the vectors' own width")
        settings = replace(settings, width=0 if width == full_width else width)
    return settings


@dataclass(frozen=True)
class Encoder:
    """Encodes vectors into the form of the lists, and compares them in it.

    Attributes:
        code: The form.
        width: W, the numbers of a vector that are kept.
        scale: For int8: by what a number is multiplied.
        refine: Candidates that are compared again by their full vectors, per row that is wanted.
    """

    code: CodeName
    width: int
    scale: float
    refine: int

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Encode vectors.

        Args:
            vectors: (N, D), float32, unit length.

        Returns:
            (N, W) of float32, float16 or int8; of bits (N, W / 8), uint8.
        """
        vectors = _shortened(vectors, self.width)
        if self.code == "binary":
            return np.packbits(vectors > 0, axis=1)
        if self.code == "int8":
            return np.clip(np.rint(vectors * self.scale), -_INT8_MAX, _INT8_MAX).astype(np.int8)
        return np.ascontiguousarray(vectors, dtype=self.code)

    def shorten(self, vectors: np.ndarray) -> np.ndarray:
        """The beginnings of vectors that are kept.

        Args:
            vectors: (N, D), float32, unit length.

        Returns:
            (N, W), float32, unit length.
        """
        return _shortened(vectors, self.width)

    def scorer(self, query: np.ndarray) -> Callable[[Sequence[np.ndarray]], np.ndarray]:
        """What compares encoded vectors with a query.

        Args:
            query: (D,), float32, unit length.

        Returns:
            From parts of codes, each (N, ...), to the cosines of all with the query, (M,), as far as the form has them.
        """
        if self.code == "int8":
            products, unit = byte_products(self.shorten(query[None])[0], self.scale)
            return lambda parts: np.concatenate([products(codes) for codes in parts]) * unit
        code = self.encode(query[None])
        if self.code == "binary":
            bits = 8 * code.shape[1]

            def angle(codes: np.ndarray) -> np.ndarray:
                """Of two directions that many signs differ in it is that share of a half-turn, about."""
                return np.asarray(np.pi / bits * np.bitwise_count(codes ^ code[0]).sum(axis=1, dtype=np.int32))

            return lambda parts: np.cos(np.concatenate([angle(codes) for codes in parts]))
        if self.code == "float32":
            return lambda parts: np.concatenate([codes @ code[0] for codes in parts])
        half_products = inner_products(code[0])
        return lambda parts: np.concatenate([half_products(codes) for codes in parts])


def byte_products(query: np.ndarray, scale: float) -> tuple[Callable[[np.ndarray], np.ndarray], np.float32]:
    """What multiplies rows of bytes with a query, which is rounded by its own greatest number: none of it is cut.

    Args:
        query: (W,) float32.
        scale: By what the rows were multiplied.

    Returns:
        From (N, W) int8 to (N,) int32; and what these are multiplied by to be inner products.
    """
    steps = _INT8_MAX / max(float(np.abs(query).max()), 1e-6)
    return inner_products(np.rint(query * steps).astype(np.int8)), np.float32(1 / (scale * steps))


def inner_products(code: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What multiplies rows of bytes, or in half precision, with one; by one thread.

    Args:
        code: (W,) int8 or float16.

    Returns:
        From (N, W) to (N,), int32 or float32.
    """
    import numkong

    packed = numkong.dots_pack(code[None])
    return lambda codes: np.asarray(numkong.dots_packed(codes, packed))[:, 0]


def _shortened(vectors: np.ndarray, width: int) -> np.ndarray:
    """The beginnings of vectors, of unit length again."""
    if width >= vectors.shape[1]:
        return vectors
    vectors = vectors[:, :width]
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def make_encoder(settings: VectorSettings, width: int, scale: float) -> Encoder:
    """The encoder of an index.

    Args:
        settings: Its settings.
        width: D, the width of its vectors.
        scale: For int8: by what a number is multiplied (`int8_scale`).

    Returns:
        The encoder.
    """
    kept = settings.width or width
    refine = max(_REFINE[settings.code], _REFINE_SHORTENED if kept < width else 0)
    return Encoder(settings.code, kept, scale, refine)


def int8_scale(vectors: np.ndarray, settings: VectorSettings) -> float:
    """By what numbers are multiplied so that the greatest of them fits into a byte.

    One number for all dimensions keeps the order of inner products, of rows with queries and of rows with rows.

    Args:
        vectors: (N, D), all rows.
        settings: Of the index.

    Returns:
        The factor.
    """
    greatest = 0.0
    for start in range(0, len(vectors), _SCALE_ROWS):
        rows = np.asarray(vectors[start : start + _SCALE_ROWS], dtype=np.float32)
        greatest = max(greatest, float(np.abs(_shortened(rows, settings.width or rows.shape[1])).max()))
    return _INT8_MAX / max(greatest, 1e-6)
