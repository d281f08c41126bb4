"""Drawn scenes with captions, generated from a seed; `scene_dataset.py` makes a data set of them.

A scene is a background and two to four groups of shapes on a 3 x 3 grid; a group is a count of like shapes in one cell
(`a large red circle`, `three small blue stars`). Five captions describe it, from a bare relation to a long account of
everything that is there.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SHAPE_COLOURS = {
    "red": (214, 40, 40), "blue": (38, 84, 200), "green": (44, 150, 70), "yellow": (240, 200, 30),
    "purple": (130, 60, 170), "orange": (240, 130, 30), "pink": (240, 130, 180), "brown": (120, 75, 40),
}  # fmt: skip
BACKGROUNDS = {"white": (248, 248, 246), "grey": (190, 192, 196), "black": (28, 28, 32)}
SIZES = {"small": 0.11, "large": 0.21}
COUNT_WORDS = {1: "a", 2: "two", 3: "three", 4: "four"}
GRID_COLUMNS = ("left", "middle", "right")
GRID_ROWS = ("top", "centre", "bottom")


@dataclass(frozen=True)
class Group:
    """Some shapes of one kind in one cell of the grid.

    Args:
        shape: One of `SHAPES`.
        colour: A key of `SHAPE_COLOURS`.
        size: "small" or "large".
        count: Number of shapes, 1 to 4.
        column: Column of the cell, 0 (left) to 2 (right).
        row: Row of the cell, 0 (top) to 2 (bottom).
    """

    shape: str
    colour: str
    size: str
    count: int
    column: int
    row: int

    def phrase(self, with_size: bool = True) -> str:
        """The group as a phrase: "a large red circle", "three small blue stars".

        Args:
            with_size: Whether the size is named.

        Returns:
            The phrase.
        """
        plural = {"cross": "crosses"}.get(self.shape, f"{self.shape}s")
        noun = self.shape if self.count == 1 else plural
        article = "an" if self.count == 1 and not with_size and self.colour[0] in "aeiou" else COUNT_WORDS[self.count]
        return " ".join([article, *([self.size] if with_size else []), self.colour, noun])

    def position_phrase(self) -> str:
        """The cell as a phrase: "in the top left corner", "in the centre of the picture"."""
        if self.column == 1:
            middle = "in the centre of the picture"
            return middle if self.row == 1 else f"in the middle of the {GRID_ROWS[self.row]} edge"
        if self.row == 1:
            return f"halfway up the {GRID_COLUMNS[self.column]} side"
        return f"in the {GRID_ROWS[self.row]} {GRID_COLUMNS[self.column]} corner"


@dataclass(frozen=True)
class Scene:
    """A background and the groups before it.

    Args:
        background: A key of `BACKGROUNDS`.
        groups: Two groups or more, each in a cell of its own.
        seed: Places and turns the shapes within their cells, and selects the words of its captions.
    """

    background: str
    groups: tuple[Group, ...]
    seed: int

    def key(self) -> tuple[str, frozenset[Group]]:
        """The background and the set of groups: equal for scenes that show the same, whatever their order and seed."""
        return self.background, frozenset(self.groups)


def spatial_relation(a: Group, b: Group) -> str | None:
    """How one group lies to another, along the axis that separates them more.

    Args:
        a: The group that is placed.
        b: The group that it is placed by.

    Returns:
        "to the left of", "to the right of", "above" or "below"; None if both are in one cell.
    """
    across, down = a.column - b.column, a.row - b.row
    if across == down == 0:
        return None
    if abs(across) >= abs(down):
        return "to the left of" if across < 0 else "to the right of"
    return "above" if down < 0 else "below"


_INVERSE = {
    "to the left of": "to the right of", "to the right of": "to the left of", "above": "below", "below": "above",
}  # fmt: skip


def swap_first_groups(scene: Scene) -> Scene:
    """The scene with its first two groups in swapped cells: the same words, another image.

    Args:
        scene: The scene.

    Returns:
        A new scene, with the next seed.
    """
    first, second, *others = scene.groups
    swapped = (
        replace(first, column=second.column, row=second.row),
        replace(second, column=first.column, row=first.row),
    )
    return replace(scene, groups=(*swapped, *others), seed=scene.seed + 1)


def random_scene(rng: random.Random, groups: int = 0) -> Scene:
    """Groups that differ in shape or colour, each in a cell of its own.

    Args:
        rng: The source of randomness.
        groups: Number of groups, at most 9; 0 for two to four.

    Returns:
        The scene, which `draw_scene` draws and `scene_captions` describes.
    """
    groups = groups or rng.choice((2, 2, 3, 3, 4))
    cells = rng.sample([(column, row) for column in range(3) for row in range(3)], groups)
    kinds: list[tuple[str, str]] = []
    while len(kinds) < len(cells):
        kind = (rng.choice(SHAPES), rng.choice(list(SHAPE_COLOURS)))
        if kind not in kinds:
            kinds.append(kind)
    drawn = []
    for (shape, colour), (column, row) in zip(kinds, cells, strict=True):
        count = rng.choice((1, 1, 1, 2, 3, 4))
        size = "small" if count > 1 else rng.choice(list(SIZES))
        drawn.append(Group(shape, colour, size, count, column, row))
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(drawn), rng.randrange(1 << 30))


def scene_captions(scene: Scene) -> list[str]:
    """Five different captions that are true of a scene; the last one describes all of it.

    Args:
        scene: The scene.

    Returns:
        The captions.

    >>> len(set(scene_captions(random_scene(random.Random(0)))))
    5
    """
    rng = random.Random(scene.seed)
    first, second = scene.groups[:2]
    relation_phrase = spatial_relation(first, second)
    assert relation_phrase is not None, "groups of a scene lie in different cells"
    order = rng.sample(scene.groups, len(scene.groups))
    listed = [group.phrase(with_size=False) for group in order]
    everything = ", ".join(listed[:-1]) + " and " + listed[-1]
    return [
        f"{first.phrase(with_size=False)} {relation_phrase} {second.phrase(with_size=False)}",
        f"{second.phrase()} {_INVERSE[relation_phrase]} {first.phrase()}, on a {scene.background} background",
        f"{everything} on {scene.background}, with {first.phrase(with_size=False)} {first.position_phrase()}",
        f"there is {order[0].phrase()} {order[0].position_phrase()}"
        + (f" and {order[1].phrase()} {order[1].position_phrase()}"),
        _long_caption(scene, order),
    ]


def plain_scene_captions(scene: Scene) -> list[str]:
    """Two of the captions of a scene: how its first two groups lie to each other, and all that it shows.

    Args:
        scene: The scene.

    Returns:
        The first and the third of `scene_captions`.
    """
    captions = scene_captions(scene)
    return [captions[0], captions[2]]


def _long_caption(scene: Scene, order: list[Group]) -> str:
    total = sum(group.count for group in order)
    sentences = [f"a drawing with {total} shapes in {len(order)} places on a plain {scene.background} background"]
    sentences += [f"{group.phrase()} can be seen {group.position_phrase()}" for group in order]
    for a, b in pairwise(order):
        verb = "lies" if a.count == 1 else "lie"
        sentences.append(f"{a.phrase(with_size=False)} {verb} {spatial_relation(a, b)} {b.phrase(with_size=False)}")
    return "; ".join(sentences)


def draw_scene(scene: Scene, size: int = 224) -> Image.Image:
    """Draw a scene, with edges smoothed by drawing at twice the size.

    Args:
        scene: The scene.
        size: Pixels on a side.

    Returns:
        An RGB image.

    >>> draw_scene(random_scene(random.Random(0)), size=32).size
    (32, 32)
    """
    scale = 2 * size
    image = Image.new("RGB", (scale, scale), BACKGROUNDS[scene.background])
    pencil = ImageDraw.Draw(image)
    rng = random.Random(scene.seed)
    for group in scene.groups:
        for x, y, radius in _shape_positions(group, rng):
            turn = rng.uniform(-0.15, 0.15)
            base = SHAPE_COLOURS[group.colour]
            shade = rng.uniform(0.9, 1.1)
            colour = (_shade(base[0], shade), _shade(base[1], shade), _shade(base[2], shade))
            _PAINTERS[group.shape](pencil, x * scale, y * scale, radius * scale, turn, colour)
            if group.shape == "ring":
                inner = radius * scale * 0.55
                box = (x * scale - inner, y * scale - inner, x * scale + inner, y * scale + inner)
                pencil.ellipse(box, fill=BACKGROUNDS[scene.background])
    return image.resize((size, size), Image.Resampling.LANCZOS)


def _shade(channel: int, factor: float) -> int:
    return max(0, min(255, round(channel * factor)))


def _shape_positions(group: Group, rng: random.Random) -> Iterator[tuple[float, float, float]]:
    """Centre and radius of each shape of a group, as shares of the image's width."""
    x, y = (group.column + 0.5) / 3, (group.row + 0.5) / 3
    radius = SIZES[group.size] * (0.72 if group.size == "large" else 0.8)
    if group.count == 1:
        slack = max(0.0, 1 / 6 - radius)
        yield x + rng.uniform(-slack, slack), y + rng.uniform(-slack, slack), radius
        return
    around = {2: ((-1, 0), (1, 0)), 3: ((-1, 0.8), (1, 0.8), (0, -0.9)), 4: ((-1, -1), (1, -1), (-1, 1), (1, 1))}
    for across, down in around[group.count]:
        yield x + across * 0.078 + rng.uniform(-0.006, 0.006), y + down * 0.078 + rng.uniform(-0.006, 0.006), 0.066


Colour = tuple[int, int, int]
Painter = Callable[[ImageDraw.ImageDraw, float, float, float, float, Colour], None]


def _polygon(corners: int, start: float, inner: float = 1.0) -> Painter:
    """A painter of a regular polygon, or of a star where `inner` < 1 pulls every other corner in."""

    def paint(pencil: ImageDraw.ImageDraw, x: float, y: float, r: float, turn: float, colour: Colour) -> None:
        points = []
        for corner in range(corners):
            reach = r * (inner if inner < 1.0 and corner % 2 else 1.0)
            angle = start + turn + 2 * math.pi * corner / corners
            points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
        pencil.polygon(points, fill=colour)

    return paint


def _circle(pencil: ImageDraw.ImageDraw, x: float, y: float, r: float, turn: float, colour: Colour) -> None:
    pencil.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _cross(pencil: ImageDraw.ImageDraw, x: float, y: float, r: float, turn: float, colour: Colour) -> None:
    pencil.rectangle((x - r, y - r * 0.34, x + r, y + r * 0.34), fill=colour)
    pencil.rectangle((x - r * 0.34, y - r, x + r * 0.34, y + r), fill=colour)


_PAINTERS: dict[str, Painter] = {
    "circle": _circle,
    "ring": _circle,
    "square": _polygon(4, math.pi / 4),
    "triangle": _polygon(3, -math.pi / 2),
    "star": _polygon(10, -math.pi / 2, inner=0.42),
    "cross": _cross,
}
