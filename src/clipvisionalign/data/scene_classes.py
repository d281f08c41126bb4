"""Class folders of drawn scenes: like shapes in one cell of an image, by shape, by colour, or by both."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.scene_dataset import check_drawing
from clipvisionalign.data.scenes import BACKGROUNDS, SHAPE_COLOURS, SHAPES, SIZES, Group, Scene, draw_scene
from clipvisionalign.progress import progress

#: What a class has in common, and the classes.
CLASSES_BY: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(SHAPE_COLOURS),
    "both": tuple(f"{colour}_{shape}" for colour in SHAPE_COLOURS for shape in SHAPES),
}

#: The splits of ten images of a class, in their order.
_SPLITS = ("train",) * 8 + ("val", "test")


def write_scene_classes(out: str | Path, by: str, images: int, seed: int = 0, size: int = 224) -> Path:
    """Draw class folders: SPLIT/CLASS/*.png, eight of ten images in train, one each in val and test.

    Args:
        out: The folder to write.
        by: "shape", "colour" or "both": what the images of a class have in common.
        images: Number of images, shared evenly between the classes.
        seed: Another seed draws other images.
        size: Pixels on a side.

    Returns:
        The folder.

    Raises:
        DataError: Fewer than ten images for a class, too small ones, or a folder that holds something.

    >>> len(CLASSES_BY["shape"]), len(CLASSES_BY["both"])
    (6, 48)
    """
    classes = CLASSES_BY[by]
    folder = check_drawing(out, images, size)
    if images < len(_SPLITS) * len(classes):
        raise DataError(
            f"scenes: {images} images are too few for {len(classes)} classes: at least {len(_SPLITS) * len(classes)}"
        )
    rng = random.Random(seed)
    drawn: set[tuple[str, frozenset[Group]]] = set()
    for number in progress(range(images), "drawing scenes", images):
        name = classes[number % len(classes)]
        scene = _random_scene(rng, name)
        for _ in range(100):
            if scene.key() not in drawn:
                break
            scene = _random_scene(rng, name)
        drawn.add(scene.key())
        split = _SPLITS[number // len(classes) % len(_SPLITS)]
        path = folder / split / name / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_scene(scene, size).save(path)
    return folder


def _random_scene(rng: random.Random, class_name: str) -> Scene:
    """One to four like shapes in a cell, of the shape and colour that the name of a class has."""
    words = class_name.split("_")
    shape = next((word for word in words if word in SHAPES), None) or rng.choice(SHAPES)
    colour = next((word for word in words if word in SHAPE_COLOURS), None) or rng.choice(list(SHAPE_COLOURS))
    count = rng.choice((1, 1, 2, 3, 4))
    size = rng.choice(list(SIZES)) if count == 1 else "small"
    group = Group(shape, colour, size, count, rng.randrange(3), rng.randrange(3))
    return Scene(rng.choice(list(BACKGROUNDS)), (group,), rng.randrange(1 << 30))
