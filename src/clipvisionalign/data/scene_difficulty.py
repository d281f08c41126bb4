"""How hard drawn scenes are: how many groups they have, and what their captions consist of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

#: Groups of a scene: cells of the grid that are filled.
MIN_GROUPS, MAX_GROUPS = 2, 6
MAX_CAPTIONS = 5
#: Tokens of a long description.
MIN_TOKENS, MAX_TOKENS = 128, 4096

NeedlePosition = Literal["front", "middle", "back"]


@dataclass(frozen=True)
class SceneDifficulty:
    """How hard drawn scenes are. The default is the data set as it is drawn without any of these settings.

    Args:
        groups: how many groups of shapes each scene has, 2 to 6; 0 for two to four, at random.
        captions: how many captions are composed for each scene by the settings below, 1 to 5; 0 for the usual five
            captions.
        relations: share of the composed captions, 0 to 1, that state how two groups lie to each other ("above", "to
            the left of"); the others state where one of the two lies ("in the top left corner").
        negation: share of the composed captions that name a kind of shape that is absent ("but no green rings").
        counts: share of the composed captions that state the number of shapes of each group ("one", "three"), and not
            just "a" or "some".
        tokens: length of a caption, 128 to 4,096 tokens of the embedded text tower: neutral sentences, the same in
            every caption, surround what is composed. 0 for none.
        needle: where in such a long caption the composed part stands: "front", "middle" or "back".
    """

    groups: int = 0
    captions: int = 0
    relations: float = 0.0
    negation: float = 0.0
    counts: float = 0.0
    tokens: int = 0
    needle: NeedlePosition = "back"


#: Settings of composed captions: without those they have no effect.
_OF_COMPOSED = ("relations", "negation", "counts", "tokens")


def difficulty_faults(difficulty: SceneDifficulty) -> list[tuple[str, str]]:
    """What is wrong with settings.

    Args:
        difficulty: The settings.

    Returns:
        Name of the field and message of each fault.

    >>> difficulty_faults(SceneDifficulty(captions=5, relations=1.5))
    [('relations', 'a share from 0 to 1, not 1.5')]
    """
    faults = []
    for name, low, high in (
        ("groups", MIN_GROUPS, MAX_GROUPS), ("captions", 1, MAX_CAPTIONS), ("tokens", MIN_TOKENS, MAX_TOKENS)
    ):  # fmt: skip
        value = getattr(difficulty, name)
        if value and not low <= value <= high:
            faults.append((name, f"from {low} to {high:,}, or 0 for the usual, not {value:,}"))
    for name in ("relations", "negation", "counts"):
        share = getattr(difficulty, name)
        if not 0 <= share <= 1:
            faults.append((name, f"a share from 0 to 1, not {share}"))
    positions = get_args(NeedlePosition)
    if difficulty.needle not in positions:
        faults.append(("needle", f"{', '.join(positions[:-1])} or {positions[-1]}, not '{difficulty.needle}'"))
    if not difficulty.captions:
        faults += [
            (name, "is of composed captions: set their number, 'captions' (1 to 5), too")
            for name in _OF_COMPOSED
            if getattr(difficulty, name)
        ]
    if difficulty.needle != SceneDifficulty.needle and not difficulty.tokens:
        faults.append(("needle", "is of long captions: set 'tokens', their length, too"))
    return faults


def difficulty_of(values: Any) -> SceneDifficulty:
    """The settings that a data set has recorded.

    Args:
        values: The recorded object: fields by name; those that are missing have their defaults.

    Returns:
        The settings.

    Raises:
        ValueError: It is no such object, has other fields, or values that are not valid.

    >>> difficulty_of({"groups": 4}).groups
    4
    """
    if not isinstance(values, dict):
        raise ValueError("no object of settings")
    defaults = asdict(SceneDifficulty())
    if unknown := sorted(set(values) - set(defaults)):
        raise ValueError(f"unknown settings: {', '.join(unknown)}")
    kinds = {name: (int, float) if type(default) is float else (type(default),) for name, default in defaults.items()}
    for name, value in values.items():
        if type(value) not in kinds[name]:
            raise ValueError(f"{name}: {value!r} is not valid")
    difficulty = SceneDifficulty(**values)
    if faults := difficulty_faults(difficulty):
        raise ValueError("; ".join(f"{name}: {message}" for name, message in faults))
    return difficulty


def captions_per_scene(plain: bool, difficulty: SceneDifficulty) -> int:
    """How many captions a scene has.

    Args:
        plain: Whether every group is one large shape.
        difficulty: The settings.

    Returns:
        The number.
    """
    return difficulty.captions or (2 if plain else 5)
