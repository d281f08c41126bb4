"""What two images have in common by their pixels: the same photograph, its mirror image, or another image.

An image is reduced to thumbnails of its brightness (64 x 64) and colour (32 x 32). Two thumbnails are compared where
they are, and, if both have structure all over, after one was aligned with the other by a shift and a scale along each
axis, by Gauss-Newton steps from coarse to fine: so a copy that lost a margin is recognised. A copy differs nowhere by
much; an image with other content does so in one cell at least, however alike the rest is. Drawings of few strokes on a
plain ground are not aligned: a shifted stroke is another drawing.

Source of the alignment: Lucas and Kanade, "An iterative image registration technique", IJCAI 1981, from coarse to
fine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from PIL import Image

#: Sides of the thumbnails of brightness and of colour.
SIDE, COLOUR_SIDE = 64, 32
#: Bytes of an image's thumbnails.
THUMBNAIL_BYTES = SIDE * SIDE + 2 * COLOUR_SIDE * COLOUR_SIDE

#: Difference of the full range that copies do not exceed on average and in any cell, compared where they are.
MEAN_DIFFERENCE, CELL_DIFFERENCE = 0.02, 0.12
#: Likewise after an alignment, whose interpolation blurs.
ALIGNED_MEAN_DIFFERENCE, ALIGNED_CELL_DIFFERENCE = 0.02, 0.08
#: Share of the range around a cell, in both images, by which resampling may move an edge.
EDGE_TOLERANCE = 0.5
#: Share of each image that the other has to show, for a copy that was cropped.
MIN_OVERLAP = 0.65
#: Factor between the scales along the two axes, up to which an image is not stretched.
MAX_STRETCH = 1.04
#: Share of cells with structure from which images are aligned, and the range of brightness that is structure.
MIN_STRUCTURE, STRUCTURE_RANGE = 0.5, 0.01
#: Differences of the mean brightness and colour of two images up to which one may be a part of the other.
PART_BRIGHTNESS, PART_COLOUR = 0.12, 0.05
#: For each side of thumbnails, from coarse to fine: mean difference up to which aligned images are compared further,
#: and by how much more than an alignment at its end this one may stretch an image.
_LEVELS = ((8, 0.08, 1.3), (16, 0.06, 1.15), (32, 0.05, 1.05), (64, 0.05, 1.0))
#: Pairs that are compared at a time.
BATCH = 256


class Appearance(IntEnum):
    """What a comparison of two images' pixels gives."""

    DIFFERENT = 0
    NEARLY = 1
    MIRRORED = 2


@dataclass(frozen=True)
class Thumbnails:
    """Thumbnails of N images.

    Attributes:
        pixels: (N, 6144) uint8, as `thumbnail_of` returns them.
        sizes: (N, 2) width and height of the whole images, in pixels.
    """

    pixels: np.ndarray
    sizes: np.ndarray

    def select(self, rows: np.ndarray | slice) -> Thumbnails:
        """Some of the images.

        Args:
            rows: Their positions.

        Returns:
            Their thumbnails.
        """
        return Thumbnails(self.pixels[rows], self.sizes[rows])

    def brightness(self) -> np.ndarray:
        """Brightness from 0 to 1, (N, 64, 64) float32."""
        return self.pixels[:, : SIDE * SIDE].reshape(-1, SIDE, SIDE).astype(np.float32) / 255

    def colour(self) -> np.ndarray:
        """Differences of blue and red from brightness, from 0 to 1, (N, 2, 32, 32) float32."""
        return self.pixels[:, SIDE * SIDE :].reshape(-1, 2, COLOUR_SIDE, COLOUR_SIDE).astype(np.float32) / 255


def thumbnail_of(image: Image.Image) -> np.ndarray:
    """The thumbnails of an image.

    Args:
        image: Upright RGB, of any size.

    Returns:
        (6144,) uint8: brightness, then the two differences of colour, row by row.
    """
    # A triangular filter: cells of a resized copy are weighted as those of the original, wherever its pixels lie.
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("YCbCr")
    channels = np.asarray(small)
    colour = channels[..., 1:].reshape(COLOUR_SIDE, 2, COLOUR_SIDE, 2, 2).mean(axis=(1, 3)).round()
    return np.concatenate([channels[..., 0].ravel(), colour.transpose(2, 0, 1).ravel().astype(np.uint8)])


def compare(first: Thumbnails, second: Thumbnails) -> np.ndarray:
    """Compare images, pair by pair.

    Args:
        first: P images.
        second: P images.

    Returns:
        (P,) uint8, values of `Appearance`; the same if first and second are exchanged.
    """
    parts = [
        _compare_batch(first.select(np.s_[start : start + BATCH]), second.select(np.s_[start : start + BATCH]))
        for start in range(0, len(first.sizes), BATCH)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)


def _compare_batch(first: Thumbnails, second: Thumbnails) -> np.ndarray:
    verdicts = np.zeros(len(first.sizes), dtype=np.uint8)
    left, right = _Channels(first), _Channels(second)
    nearly = _same(left, right)
    verdicts[nearly] = Appearance.NEARLY
    rest = np.flatnonzero(~nearly)
    mirrored = left.select(rest).mirrored()
    verdicts[rest[_same(mirrored, right.select(rest))]] = Appearance.MIRRORED
    return verdicts


class _Channels:
    """Brightness, colour and size of a batch of images, as numbers."""

    def __init__(
        self, thumbnails: Thumbnails, brightness: np.ndarray | None = None, colour: np.ndarray | None = None
    ) -> None:
        self.thumbnails = thumbnails
        self.brightness = thumbnails.brightness() if brightness is None else brightness
        self.colour = thumbnails.colour() if colour is None else colour
        self.sizes = thumbnails.sizes.astype(np.float32)

    def select(self, rows: np.ndarray) -> _Channels:
        return _Channels(self.thumbnails.select(rows), self.brightness[rows], self.colour[rows])

    def mirrored(self) -> _Channels:
        return _Channels(self.thumbnails, self.brightness[:, :, ::-1], self.colour[..., ::-1])


def _same(left: _Channels, right: _Channels) -> np.ndarray:
    """Whether the images of each pair are copies, (P,) bool: compared where they are, else aligned."""
    same = np.zeros(len(left.sizes), dtype=bool)
    coarse = np.abs(_shrink(left.brightness, 16) - _shrink(right.brightness, 16))
    # Most pairs are other images, which a coarse comparison shows.
    rows = np.flatnonzero(
        (coarse.mean(axis=(1, 2)) <= MEAN_DIFFERENCE) & (coarse.max(axis=(1, 2)) <= 2 * CELL_DIFFERENCE)
    )
    same[rows] = _same_in_position(left.select(rows), right.select(rows))
    rows = np.flatnonzero(~same & _may_be_parts(left, right))
    some_left, some_right = left.select(rows), right.select(rows)
    # Each is aligned with the other: the result does not depend on their order.
    aligned = _same_aligned(some_left, some_right)
    others = np.flatnonzero(~aligned)
    aligned[others] = _same_aligned(some_right.select(others), some_left.select(others))
    same[rows] = aligned
    return same


def _may_be_parts(left: _Channels, right: _Channels) -> np.ndarray:
    """Whether both images have structure to be aligned by, and about the same brightness and colour, (P,) bool."""
    brightness = np.abs(left.brightness.mean(axis=(1, 2)) - right.brightness.mean(axis=(1, 2)))
    colour = np.abs(left.colour.mean(axis=(2, 3)) - right.colour.mean(axis=(2, 3))).max(axis=1)
    structure = np.minimum(_structure(left.brightness), _structure(right.brightness))
    return (brightness <= PART_BRIGHTNESS) & (colour <= PART_COLOUR) & (structure >= MIN_STRUCTURE)


def _same_in_position(left: _Channels, right: _Channels) -> np.ndarray:
    ratio = (left.sizes[:, 0] * right.sizes[:, 1]) / (left.sizes[:, 1] * right.sizes[:, 0])
    # The sides of a small copy are rounded to whole pixels.
    rounding = 1 + 1 / np.minimum(left.sizes.min(axis=1), right.sizes.min(axis=1))
    keeps_shape = np.maximum(ratio, 1 / ratio) <= MAX_STRETCH * rounding
    difference = _excess(left.brightness, right.brightness)
    colours = np.stack([_excess(left.colour[:, each], right.colour[:, each]) for each in (0, 1)])
    return (
        keeps_shape
        & (np.abs(left.brightness - right.brightness).mean(axis=(1, 2)) <= MEAN_DIFFERENCE)
        & (difference.max(axis=(1, 2)) <= CELL_DIFFERENCE)
        & (np.abs(left.colour - right.colour).mean(axis=(2, 3)).max(axis=1) <= MEAN_DIFFERENCE)
        & (colours.max(axis=(0, 2, 3)) <= CELL_DIFFERENCE)
    )


def _excess(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Differences beyond what resampling an edge makes, that both images have there; (P, S, S)."""
    tolerance = EDGE_TOLERANCE * np.minimum(_local_range(left), _local_range(right))
    return np.abs(left - right) - tolerance


def _local_range(cells: np.ndarray) -> np.ndarray:
    """The range of the values within one cell around each, (P, S, S)."""
    side = cells.shape[-1]
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = [padded[:, offset : offset + side] for offset in range(3)]
    highest, lowest = np.maximum.reduce(rows), np.minimum.reduce(rows)
    shifts = range(3)
    top = np.maximum.reduce([highest[:, :, offset : offset + side] for offset in shifts])
    bottom = np.minimum.reduce([lowest[:, :, offset : offset + side] for offset in shifts])
    return np.asarray(top - bottom)


def _structure(brightness: np.ndarray) -> np.ndarray:
    """The share of 8 x 8 parts of each image whose brightness varies, (P,)."""
    parts = brightness.reshape(-1, 8, SIDE // 8, 8, SIDE // 8)
    return np.asarray((parts.std(axis=(2, 4)) >= STRUCTURE_RANGE).mean(axis=(1, 2)))


def _same_aligned(left: _Channels, right: _Channels) -> np.ndarray:
    """Whether the left images, shifted and scaled, are the right ones, (P,) bool."""
    same = np.zeros(len(left.sizes), dtype=bool)
    rows = np.arange(len(same))
    warp = np.tile(np.array([1, 0, 1, 0], dtype=np.float32), (len(same), 1))
    for side, limit, slack in _LEVELS:
        small_left, small_right = _shrink(left.brightness[rows], side), _shrink(right.brightness[rows], side)
        warp[rows], error = _align(small_left, small_right, warp[rows])
        is_crop = _is_crop(left.sizes[rows], right.sizes[rows], warp[rows], slack)
        rows = rows[(error <= limit) & is_crop]
        if not len(rows):
            return same
    warped, inside = _sample(left.brightness[rows], warp[rows], SIDE)
    same[rows] = _close(warped, right.brightness[rows], inside, 16)
    for channel in (0, 1):
        warped, inside = _sample(left.colour[rows, channel], warp[rows], COLOUR_SIDE)
        same[rows] &= _close(warped, right.colour[rows, channel], inside, 16)
    return same


def _close(warped: np.ndarray, right: np.ndarray, inside: np.ndarray, side: int) -> np.ndarray:
    """Whether aligned images are alike in each of `side` x `side` cells that both show, (P,) bool."""
    shown = _shrink(inside.astype(np.float32), side) >= 1
    difference = np.abs(_shrink(warped, side) - _shrink(right, side)) * shown
    mean = difference.sum(axis=(1, 2)) / np.maximum(1, shown.sum(axis=(1, 2)))
    return np.asarray((mean <= ALIGNED_MEAN_DIFFERENCE) & (difference.max(axis=(1, 2)) <= ALIGNED_CELL_DIFFERENCE))


def _shrink(cells: np.ndarray, side: int) -> np.ndarray:
    """Means of cells, (P, S, S) to (P, side, side)."""
    if cells.shape[-1] == side:
        return cells
    step = cells.shape[-1] // side
    return np.asarray(cells.reshape(-1, side, step, side, step).mean(axis=(2, 4)))


def _is_crop(left: np.ndarray, right: np.ndarray, warp: np.ndarray, slack: float) -> np.ndarray:
    """Whether an alignment shows most of each image in the other, and stretches neither, (P,) bool.

    left, right: widths and heights, (P, 2); warp: (P, 4), by which coordinate x of the right image, from -1 to 1, is
    warp[0] x + warp[1] of the left one, and y likewise; slack: factor by which either bound may be missed.
    """
    scales, shifts = warp[:, ::2], warp[:, 1::2]
    usual = (scales > 0.5) & (scales < 2)
    overlap = np.minimum(1, shifts + scales) - np.maximum(-1, shifts - scales)
    of_left, of_right = (np.clip(each, 0, None).prod(axis=1) for each in (overlap / 2, overlap / (2 * scales)))
    # Pixels of the left image for one of the right, along each axis.
    pixels = scales * left / right
    stretch = np.maximum(pixels[:, 0] / pixels[:, 1], pixels[:, 1] / pixels[:, 0])
    return np.asarray(
        usual.all(axis=1) & (np.minimum(of_left, of_right) >= MIN_OVERLAP / slack) & (stretch <= MAX_STRETCH * slack)
    )


def _sample(cells: np.ndarray, warp: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Images under an alignment, by bilinear interpolation, (P, S, S), and where there are some, (P, S, S) bool."""
    axis = ((np.arange(side) + 0.5) * 2 / side - 1).astype(np.float32)
    sampled, inside = cells, []
    for dimension, (scale, shift) in ((2, warp[:, :2].T), (1, warp[:, 2:].T)):
        position = ((axis * scale[:, None] + shift[:, None] + 1) * side - 1) / 2
        inside.append((position >= -0.5) & (position <= side - 0.5))
        low = np.clip(np.floor(position), 0, side - 2).astype(np.intp)
        share = np.clip(position - low, 0, 1)
        low, share = (np.expand_dims(each, 3 - dimension) for each in (low, share))
        former = np.take_along_axis(sampled, low, dimension)
        sampled = former + share * (np.take_along_axis(sampled, low + 1, dimension) - former)
    return sampled, inside[0][:, None, :] & inside[1][:, :, None]


def _align(left: np.ndarray, right: np.ndarray, warp: np.ndarray, steps: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """The alignment of left with right images, (P, S, S), from a start (P, 4), and the mean difference left, (P,)."""
    side = left.shape[-1]
    axis = ((np.arange(side) + 0.5) * 2 / side - 1).astype(np.float32)
    down, across = np.gradient(left, 2 / side, axis=(1, 2))
    for _ in range(steps):
        warped, inside = _sample(left, warp, side)
        slope_x, slope_y = (_sample(each, warp, side)[0] * inside for each in (across, down))
        slopes = np.stack([slope_x * axis, slope_x, slope_y * axis[:, None], slope_y], axis=1).reshape(
            -1, 4, side * side
        )
        residual = ((right - warped) * inside).reshape(-1, side * side, 1)
        curvature = slopes @ slopes.transpose(0, 2, 1) + 1e-4 * side * np.eye(4, dtype=np.float32)
        step = np.linalg.solve(curvature, slopes @ residual)[..., 0]
        warp = warp + np.clip(step, -0.2, 0.2)
        warp[:, ::2] = np.clip(warp[:, ::2], 0.5, 2)
    warped, inside = _sample(left, warp, side)
    difference = np.abs(right - warped) * inside
    return warp, difference.sum(axis=(1, 2)) / np.maximum(1, inside.sum(axis=(1, 2)))
