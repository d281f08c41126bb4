"""The built-in data set: drawn scenes with captions, written to a folder and read from one.

Why a bag of words does not solve it: about half of the scenes have a counterpart in the same split with the same groups
in swapped places. `a red circle left of a blue square` and `a blue square left of a red circle` hold the same words,
and only one is true of each image.

Everything that is drawn is also written down (`scenes.jsonl`), so that a caption can be checked against it. A data set
that was drawn with settings of difficulty has these, and what its captions came to have, in `scenes.json`.
"""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.scene_descriptions import caption_features, count_tokens, describe_scene
from clipvisionalign.data.scene_difficulty import SceneDifficulty, difficulty_faults, difficulty_of
from clipvisionalign.data.scenes import (
    Group,
    Scene,
    draw_scene,
    random_scene,
    swap_first_groups,
)
from clipvisionalign.data.splits import hash_split
from clipvisionalign.data.text_files import split_lines
from clipvisionalign.progress import progress

#: Beside a drawn data set: what its images show.
_GRAPHS = "scenes.jsonl"
#: And how hard it was drawn to be; not written for the usual data set.
_DIFFICULTY = "scenes.json"


@dataclass(frozen=True)
class SceneRecord:
    """What a drawn data set has recorded of its difficulty, and what its captions came to have.

    Attributes:
        difficulty: The settings that it was drawn with.
        captions: Number of captions.
        relations: Number of captions that state how two groups lie to each other.
        negation: Number of captions that name something that is absent.
        counts: Number of captions that state numbers.
        longest: Tokens of the longest caption.
    """

    difficulty: SceneDifficulty
    captions: int
    relations: int
    negation: int
    counts: int
    longest: int

    def __str__(self) -> str:
        """The record in one line, as `check` prints it."""
        usual = asdict(SceneDifficulty())
        settings = ", ".join(
            f"{name} {value}"
            for name, value in asdict(self.difficulty).items()
            if value != usual[name] or (name == "needle" and self.difficulty.tokens)
        )
        return (
            f"drawn scenes: {settings}; of {self.captions:,} captions {self.relations:,} have relations, "
            f"{self.negation:,} negation, {self.counts:,} counts; the longest has {self.longest:,} tokens"
        )


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
    images: int, seed: int, plain: bool = False, splits: Mapping[str, int] | None = None, groups: int = 0
) -> Iterator[tuple[str, str, Scene]]:
    """Draw scenes at random, no two alike; about half are pairs with swapped groups, both in one split.

    Args:
        images: Number of scenes.
        seed: The same seed gives the same scenes.
        plain: Whether every group is one large shape.
        splits: How many scenes each split has, one split after the other, `images` in all; None for a division by a
            hash of each pair's number.
        groups: Number of groups of each scene; 0 for two to four.

    Yields:
        The name of the scene's image ("images/000000.png"; with `splits` "images/train/000000.png"), its split, and the
        scene.
    """
    rng = random.Random(seed)
    split_names = [split for split, count in (splits or {}).items() for _ in range(count)]
    used_keys: set[tuple[str, frozenset[Group]]] = set()
    number = 0
    while number < images:
        scene = random_scene(rng, groups)
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
    splits: Mapping[str, int] | None = None, difficulty: SceneDifficulty | None = None,
) -> Path:  # fmt: skip
    """Draw a data set of scenes into a folder: `images/`, `metadata.csv` and `scenes.jsonl`.

    metadata.csv has the columns file_name, caption and split; scenes.jsonl has the scene of each image; scenes.json,
    written with settings of difficulty, has these and the counts of `SceneRecord`.

    Args:
        out: The folder, which must not exist or be empty.
        images: Number of images.
        seed: The same seed gives the same data set.
        size: Pixels on a side of each image, at least 32.
        plain: Whether every group is one large shape; a scene then has two captions, those of `plain_scene_captions`,
            else five.
        splits: How many images each split has, `images` in all; they are then in `images/SPLIT/`. None for a division
            by a hash.
        difficulty: How many groups a scene has, and of what its captions consist; None for the usual data set.

    Returns:
        The folder.

    Raises:
        DataError: The folder holds something, there are no images or too small ones, the splits have another sum, or a
            setting of the difficulty is not valid.
    """
    difficulty = difficulty or SceneDifficulty()
    is_recorded = difficulty != SceneDifficulty()
    if faults := difficulty_faults(difficulty):
        raise DataError("; ".join(f"scenes: {name}: {message}" for name, message in faults))
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
        counts: Counter[str] = Counter()
        longest = 0
        scenes = random_scenes(images, seed, plain, splits, difficulty.groups)
        for name, split, scene in progress(scenes, "drawing scenes", images):
            draw_scene(scene, size).save(folder / name)
            captions = describe_scene(scene, plain, difficulty)
            rows.writerows([name, caption, split] for caption in captions)
            graphs.write(json.dumps({"file_name": name, "split": split, **asdict(scene)}) + "\n")
            counts["captions"] += len(captions)
            for caption in captions if is_recorded else ():
                counts.update(name for name, has in caption_features(caption)._asdict().items() if has)
                longest = max(longest, count_tokens(caption))
    if is_recorded:
        record = SceneRecord(
            difficulty, counts["captions"], counts["relation"], counts["negation"], counts["counts"], longest
        )
        (folder / _DIFFICULTY).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    return folder


def is_scene_dataset(folder: str | Path) -> bool:
    """Whether a folder is a data set of drawn scenes, as `write_scenes` leaves it.

    Args:
        folder: The folder.

    Returns:
        Whether it has the file `scenes.jsonl`.
    """
    return (Path(folder) / _GRAPHS).is_file()


def read_scene_record(folder: str | Path) -> SceneRecord | None:
    """Read how hard a drawn data set is.

    Args:
        folder: The folder that `write_scenes` wrote.

    Returns:
        The record; None for a data set that was drawn without settings of difficulty, or not drawn.

    Raises:
        DataError: The record cannot be read.

    >>> data = write_scenes("hard", 4, size=32, difficulty=SceneDifficulty(captions=3, relations=1.0))
    >>> read_scene_record(data).relations
    12
    """
    path = Path(folder) / _DIFFICULTY
    if not is_scene_dataset(folder) or not path.is_file():
        return None
    names = [each.name for each in fields(SceneRecord)]
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise ValueError(f"it should have {', '.join(names)}")
        difficulty = difficulty_of(values.pop("difficulty"))
        if any(type(value) is not int for value in values.values()):
            raise ValueError("a count is no whole number")
    except ValueError as error:
        message = f"{path}: not the settings that scenes were drawn with: {error}; draw the data set again"
        raise DataError(message) from None
    return SceneRecord(difficulty, **values)


def scene_difficulty(folder: str | Path) -> SceneDifficulty:
    """The settings that a data set was drawn with.

    Args:
        folder: The folder that `write_scenes` wrote.

    Returns:
        The settings; the usual ones where none are recorded.

    Raises:
        DataError: The record cannot be read.
    """
    record = read_scene_record(folder)
    return record.difficulty if record else SceneDifficulty()


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
