"""The built-in data set: drawn scenes with captions, written to a folder and read from one.

Why a bag of words does not solve it: about half of the scenes have a counterpart in the same split with the same groups
in swapped places. `a red circle left of a blue square` and `a blue square left of a red circle` hold the same words,
and only one is true of each image.

Everything that is drawn is also written down (`scenes.jsonl`), so that a caption can be checked against it.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.scenes import (
    Group,
    Scene,
    draw_scene,
    plain_scene_captions,
    random_scene,
    scene_captions,
    swap_first_groups,
)
from clipvisionalign.data.splits import hash_split
from clipvisionalign.data.text_files import split_lines
from clipvisionalign.progress import progress

#: Beside a drawn data set: what its images show.
_GRAPHS = "scenes.jsonl"


def _duplicate_key(scene: Scene, plain: bool) -> tuple[str, frozenset[Group]]:
    """Equal for scenes of which only one is drawn.

    Large shapes fill their cells, and yellow is near to orange: plain scenes that differ in nothing else would be
    near-duplicates.
    """
    if not plain:
        return scene.key()
    groups = (replace(group, colour="orange") if group.colour == "yellow" else group for group in scene.groups)
    return scene.background, frozenset(groups)


def random_scenes(
    images: int, seed: int, plain: bool = False, splits: Mapping[str, int] | None = None
) -> Iterator[tuple[str, str, Scene]]:
    """Draw scenes at random, no two alike; about half are pairs with swapped groups, both in one split.

    Args:
        images: Number of scenes.
        seed: The same seed gives the same scenes.
        plain: Whether every group is one large shape.
        splits: How many scenes each split has, one split after the other, `images` in all; None for a division by a
            hash of each pair's number.

    Yields:
        The name of the scene's image ("images/000000.png"; with `splits` "images/train/000000.png"), its split, and the
        scene.
    """
    rng = random.Random(seed)
    split_names = [split for split, count in (splits or {}).items() for _ in range(count)]
    used_keys: set[tuple[str, frozenset[Group]]] = set()
    number = 0
    while number < images:
        scene = random_scene(rng)
        if plain:
            scene = replace(scene, groups=tuple(replace(group, count=1, size="large") for group in scene.groups))
        family = [scene, swap_first_groups(scene)] if rng.random() < 0.34 else [scene]
        unique = {key: member for member in family if (key := _duplicate_key(member, plain)) not in used_keys}
        family = list(unique.values())[: images - number]
        used_keys.update(list(unique)[: len(family)])
        split = hash_split(f"scene-{seed}-{number:06d}")
        # A family stays together: where it would not fit its split any more, its second member is left out.
        if split_names and len({split_names[number + offset] for offset in range(len(family))}) > 1:
            family = family[:1]
        for member in family:
            split = split_names[number] if split_names else split
            yield f"images/{f'{split}/' if split_names else ''}{number:06d}.png", split, member
            number += 1


def check_drawing(out: str | Path, images: int, size: int) -> Path:
    """Check where images are to be drawn.

    Args:
        out: The folder to draw into.
        images: Number of images.
        size: Pixels on a side.

    Returns:
        The folder.

    Raises:
        DataError: It holds something already, or there are no images, or too small ones.
    """
    folder = Path(out)
    if images < 1 or size < 32:
        raise DataError(f"scenes: at least 1 image of at least 32 pixels, not {images} of {size}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: is there already and not empty; give another folder, or remove it first")
    return folder


def write_scenes(
    out: str | Path, images: int, seed: int = 0, size: int = 224, plain: bool = False,
    splits: Mapping[str, int] | None = None,
) -> Path:  # fmt: skip
    """Draw a data set of scenes into a folder: `images/`, `metadata.csv` and `scenes.jsonl`.

    metadata.csv has the columns file_name, caption and split; scenes.jsonl has the scene of each image.

    Args:
        out: The folder, which must not exist or be empty.
        images: Number of images.
        seed: The same seed gives the same data set.
        size: Pixels on a side of each image, at least 32.
        plain: Whether every group is one large shape; a scene then has two captions, those of `plain_scene_captions`,
            else five.
        splits: How many images each split has, `images` in all; they are then in `images/SPLIT/`. None for a division
            by a hash.

    Returns:
        The folder.

    Raises:
        DataError: The folder holds something, there are no images or too small ones, or the splits have another sum.
    """
    if splits and sum(splits.values()) != images:
        raise DataError(f"scenes: splits of {sum(splits.values())} images, where {images} are to be drawn")
    folder = check_drawing(out, images, size)
    for part in splits or [""]:
        (folder / "images" / part).mkdir(parents=True)
    with (
        (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as table_file,
        (folder / _GRAPHS).open("w", encoding="utf-8") as graphs,
    ):
        rows = csv.writer(table_file)
        rows.writerow(["file_name", "caption", "split"])
        for name, split, scene in progress(random_scenes(images, seed, plain, splits), "drawing scenes", images):
            draw_scene(scene, size).save(folder / name)
            captions = plain_scene_captions(scene) if plain else scene_captions(scene)
            rows.writerows([name, caption, split] for caption in captions)
            graphs.write(json.dumps({"file_name": name, "split": split, **asdict(scene)}) + "\n")
    return folder


def is_scene_dataset(folder: str | Path) -> bool:
    """Whether a folder is a data set of drawn scenes, as `write_scenes` leaves it.

    Args:
        folder: The folder.

    Returns:
        Whether it has the file `scenes.jsonl`.
    """
    return (Path(folder) / _GRAPHS).is_file()


def read_scenes(folder: str | Path) -> dict[str, Scene]:
    """Read which scene each image of a drawn data set shows.

    Args:
        folder: The folder that `write_scenes` wrote.

    Returns:
        The scenes by file name, as in metadata.csv; empty for a data set that was not drawn.
    """
    if not is_scene_dataset(folder):
        return {}
    scenes = {}
    for line in split_lines((Path(folder) / _GRAPHS).read_text(encoding="utf-8")):
        row = json.loads(line)
        groups = tuple(Group(**group) for group in row["groups"])
        scenes[row["file_name"]] = Scene(row["background"], groups, row["seed"])
    return scenes
