"""Colours of heat maps: lightness grows evenly with the value, so that the order shows in greyscale too."""

from __future__ import annotations

import numpy as np
from PIL import Image

#: sRGB at equal steps of the value from 0 to 1: CIELAB lightness 14, 24, ..., 93, hue from violet over teal to yellow.
COLOUR_ANCHORS = (
    (37, 24, 88), (36, 50, 122), (21, 77, 155), (1, 109, 162), (8, 139, 173), (1, 171, 175), (19, 204, 152),
    (144, 228, 115), (242, 242, 84),
)  # fmt: skip
#: Share of a map's colour in an overlay; the rest is the image.
MAP_OPACITY = 0.6


def colour_map(values: np.ndarray) -> np.ndarray:
    """Values as colours.

    Args:
        values: Any shape; what is below 0 or above 1 is clipped.

    Returns:
        The shape with a last dimension of 3, float32, 0 to 255.

    >>> colour_map(np.array([0.0, 0.5, 1.0])).tolist()
    [[37.0, 24.0, 88.0], [8.0, 139.0, 173.0], [242.0, 242.0, 84.0]]
    """
    anchors = np.asarray(COLOUR_ANCHORS, dtype=np.float32)
    steps = np.linspace(0.0, 1.0, len(anchors))
    clipped = np.clip(values, 0.0, 1.0)
    return np.stack([np.interp(clipped, steps, channel) for channel in anchors.T], axis=-1).astype(np.float32)


def colour_scale(width: int, height: int) -> Image.Image:
    """The scale of the colours, 0 at the left and 1 at the right.

    Args:
        width: In pixels.
        height: In pixels.

    Returns:
        An RGB image.

    >>> colour_scale(100, 10).size
    (100, 10)
    """
    row = colour_map(np.linspace(0.0, 1.0, width)).round().astype(np.uint8)
    return Image.fromarray(np.repeat(row[None], height, axis=0))
