"""The nearest town of a position, by a gazetteer that is installed; nothing is requested from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

#: Kilometres up to which a town is near enough to name a position.
MAX_TOWN_DISTANCE = 100.0
_EARTH_RADIUS = 6371.0


def has_gazetteer() -> bool:
    """Whether towns can be named: the package reverse-geocode is installed."""
    return find_spec("reverse_geocode") is not None


def nearest_towns(positions: Sequence[tuple[float, float]]) -> list[str | None]:
    """The nearest town of each position.

    Args:
        positions: N pairs of latitude and longitude, in degrees.

    Returns:
        N names, such as "Munich, Germany"; None where no town is within `MAX_TOWN_DISTANCE`.

    Raises:
        ModuleNotFoundError: The gazetteer is not installed.
    """
    if not positions:
        return []
    import reverse_geocode

    return [
        f"{town['city']}, {town['country']}".rstrip(", ")
        if _distance(position, (town["latitude"], town["longitude"])) <= MAX_TOWN_DISTANCE
        else None
        for position, town in zip(positions, reverse_geocode.search(list(positions)), strict=True)
    ]


def _distance(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Kilometres on the great circle."""
    one, other = map(math.radians, first), map(math.radians, second)
    (latitude, longitude), (other_latitude, other_longitude) = one, other
    half = math.sin((latitude - other_latitude) / 2) ** 2
    half += math.cos(latitude) * math.cos(other_latitude) * math.sin((longitude - other_longitude) / 2) ** 2
    return 2 * _EARTH_RADIUS * math.asin(min(1.0, math.sqrt(half)))
