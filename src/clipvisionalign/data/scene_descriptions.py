"""Captions of drawn scenes that are composed by the settings of `SceneDifficulty`, short or thousands of tokens long.

A long caption consists of neutral sentences, the same ones in every caption of every data set, and of a needle: the
composed caption, the only part in which two of them differ. A model that does not read as far as the needle gives all
of them one vector, which ranks last.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from clipvisionalign.data.scene_difficulty import MIN_TOKENS, NeedlePosition, SceneDifficulty
from clipvisionalign.data.scenes import (
    SHAPE_COLOURS,
    Group,
    Scene,
    plain_scene_captions,
    scene_captions,
    spatial_relation,
)

#: Tokens that a long caption reserves for its needle; the longest, of six groups, has 45.
NEEDLE_TOKENS = 48
#: What a text tower adds: a token at the start and one at the end.
_SPECIAL_TOKENS = 2
_TOKEN = re.compile(r"\w+|[^\w\s]")
_NUMBERS = ("one", "two", "three", "four")
_GROUNDS = ("", ", on {}", ", on a {} background")
_RELATIONS = re.compile(r"\b(to the left of|to the right of|above|below)\b")
_NEGATION = re.compile(r"\bbut no\b")
_COUNTS = re.compile(rf"\b({'|'.join(_NUMBERS)})\b")

# Each word is one token of BERT's vocabulary, and none occurs in a caption of a scene but "the", "a", "in", "of", "on"
# and "with".
_WHO = (
    "old farmer", "young teacher", "tall doctor", "quiet sailor", "happy student", "tired soldier", "rich merchant",
    "kind nurse", "famous singer", "local judge", "poor painter", "clever lawyer",
)  # fmt: skip
_WHAT = (
    "bought a horse from", "wrote a letter about", "heard a story from", "read a book about", "sold a boat to",
    "told a secret to", "cooked a dinner for", "built a bridge for", "sang a song for", "asked a question about",
)  # fmt: skip
_WHOM = (
    "his brother", "her sister", "the captain", "the family", "an uncle", "the neighbor", "the mayor", "a friend",
    "the queen", "the guard",
)  # fmt: skip
_WHEN = (
    "during the winter", "before the war", "after the harvest", "on a monday", "in the evening", "last summer",
    "every morning", "near the river", "at the market", "without any money",
)  # fmt: skip
#: What one to three tokens that are left are filled with; more are a sentence.
_OPENINGS = {1: "so", 2: "and so", 3: "and so then"}


class CaptionFeatures(NamedTuple):
    """What a caption has of what is asked for in shares.

    Attributes:
        relation: Whether it states how two groups lie to each other.
        negation: Whether it names something that is absent.
        counts: Whether it states numbers.
    """

    relation: bool
    negation: bool
    counts: bool


def caption_features(caption: str) -> CaptionFeatures:
    """What a composed caption has, long or not.

    Args:
        caption: The caption.

    Returns:
        Its features.

    >>> caption_features("a red ring above a blue star, but no pink stars")
    CaptionFeatures(relation=True, negation=True, counts=False)
    """
    return CaptionFeatures(*(bool(pattern.search(caption)) for pattern in (_RELATIONS, _NEGATION, _COUNTS)))


def describe_scene(scene: Scene, plain: bool, difficulty: SceneDifficulty) -> list[str]:
    """The captions of a scene.

    Args:
        scene: The scene.
        plain: Whether it is a plain one: then it has the two captions of `plain_scene_captions`, and else the five of
            `scene_captions`, where none are composed.
        difficulty: The settings of composed captions.

    Returns:
        The captions, all different.
    """
    if not difficulty.captions:
        return plain_scene_captions(scene) if plain else scene_captions(scene)
    return [lengthen(caption, difficulty) for caption in composed_captions(scene, difficulty)]


def composed_captions(scene: Scene, difficulty: SceneDifficulty) -> list[str]:
    """Captions that name every group of a scene, before they are lengthened.

    Each has a relation, a negation and counts with the probabilities that the settings have as shares, independently,
    by the scene's seed. Without a relation it states where one of the first two groups lies: either way it is false of
    the scene in which these two are swapped.

    Args:
        scene: The scene.
        difficulty: The settings.

    Returns:
        As many captions as the settings have, all different and all true of the scene.

    >>> from clipvisionalign.data.scenes import random_scene
    >>> composed_captions(random_scene(random.Random(0)), SceneDifficulty(captions=1, relations=1.0, counts=1.0))
    ['one purple star to the left of three brown crosses, with one orange star, on white']
    """
    rng = random.Random(f"captions of {scene.seed}")
    first, second, *others = scene.groups
    forms = [(pair, ground) for pair in ((first, second), (second, first)) for ground in _GROUNDS]
    captions = []
    for (one, other), ground in rng.sample(forms, difficulty.captions):
        has_relation, has_negation, has_counts = (
            rng.random() < share for share in (difficulty.relations, difficulty.negation, difficulty.counts)
        )
        rest = [_mention(group, has_counts) for group in rng.sample(others, len(others))]
        here, there = _mention(one, has_counts), _mention(other, has_counts)
        parts = [
            f"{here} {spatial_relation(one, other)} {there}"
            if has_relation
            else f"{here} {one.position_phrase()} and {there}",
            f", with {_listed(rest)}" if rest else "",
            f", but no {_absent_kind(scene, rng)}" if has_negation else "",
            ground.format(scene.background),
        ]
        captions.append("".join(parts))
    return captions


def _mention(group: Group, counted: bool) -> str:
    """A group with its number, or with "a" and "some"."""
    phrase = group.phrase(with_size=False)
    if counted or group.count > 1:
        number = _NUMBERS[group.count - 1] if counted else "some"
        return f"{number} {phrase.partition(' ')[2]}"
    return phrase


def _listed(mentions: Sequence[str]) -> str:
    return " and ".join([part for part in (", ".join(mentions[:-1]), mentions[-1]) if part])


def _absent_kind(scene: Scene, rng: random.Random) -> str:
    """Shapes that the scene does not have: those of one of its groups in another colour."""
    present = {(group.shape, group.colour) for group in scene.groups}
    shape = rng.choice(scene.groups).shape
    colour = rng.choice([colour for colour in SHAPE_COLOURS if (shape, colour) not in present])
    return Group(shape, colour, "large", 2, 0, 0).phrase(with_size=False).partition(" ")[2]


# --- long captions ---------------------------------------------------------------------------------------------------


def count_tokens(text: str) -> int:
    """The number of tokens of a caption of scenes, start and end included.

    Args:
        text: The caption, whose words are all in the vocabulary of the embedded text tower (BERT's).

    Returns:
        The number.

    >>> count_tokens("a red ring, on white")
    8
    """
    return len(_TOKEN.findall(text)) + _SPECIAL_TOKENS


def lengthen(caption: str, difficulty: SceneDifficulty) -> str:
    """Put a caption into neutral sentences, as the settings have it.

    Args:
        caption: The caption, of at most `NEEDLE_TOKENS` - 1 tokens.
        difficulty: The settings; without `tokens` the caption stays as it is.

    Returns:
        A text of at most `tokens` tokens, and at most 48 fewer: the sentences are the same whatever the caption.

    Raises:
        ValueError: It is to have fewer tokens than a long caption has.

    >>> count_tokens(lengthen("a red ring", SceneDifficulty(captions=1, tokens=512)))
    468
    """
    if not difficulty.tokens:
        return caption
    if difficulty.tokens < MIN_TOKENS:
        raise ValueError(f"tokens: {difficulty.tokens}: a long caption has {MIN_TOKENS} or more")
    before, after = filler(difficulty.tokens, difficulty.needle)
    return " ".join(part for part in (before, f"{caption}.", after) if part)


@cache
def filler(tokens: int, needle: NeedlePosition) -> tuple[str, str]:
    """The neutral sentences of a long caption; those of a shorter one are the first ones of a longer one.

    Args:
        tokens: Length of the whole caption, `MIN_TOKENS` or more.
        needle: Where its needle stands.

    Returns:
        What stands before the needle, and what stands behind it.
    """
    budget = tokens - _SPECIAL_TOKENS - NEEDLE_TOKENS
    sentences: list[str] = []
    for sentence in _neutral_sentences():
        length = len(_TOKEN.findall(sentence))
        if length > budget:
            break
        sentences.append(sentence)
        budget -= length
    if budget in _OPENINGS:
        sentences[-1] = f"{_OPENINGS[budget]} {sentences[-1]}"
    elif budget:
        sentences.append(f"it was {'very ' * (budget - 4)}late.")
    split = {"front": 0, "middle": len(sentences) // 2, "back": len(sentences)}[needle]
    return " ".join(sentences[:split]), " ".join(sentences[split:])


def _neutral_sentences() -> Iterator[str]:
    rng = random.Random(0)
    while True:
        yield f"the {rng.choice(_WHO)} {rng.choice(_WHAT)} {rng.choice(_WHOM)} {rng.choice(_WHEN)}."
