"""Minimal pairs: a caption that is true of an image, and its foil, which differs in one thing and is false of it.

Whether a model encodes who is left of whom shows when two captions hold the same words and only one is true. The drawn
scenes give such pairs with exact ground truth (`scene_foils`); from captions of photographs they are made by swaps that
keep the grammar (`caption_foils`), by rule and not by a person: a few are true all the same. Three published sets are
read in their published dataset layout (`read_minimal_pairs`).

Sources: Yuksekgonul et al., "ARO", arXiv:2210.01936; Hsieh et al., "SugarCrepe", arXiv:2306.14610; Thrush et al.,
"Winoground", arXiv:2204.03162.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages, DataError, normalize_caption
from clipvisionalign.data.joined_captions import with_captions
from clipvisionalign.data.scene_dataset import read_scenes, scene_difficulty
from clipvisionalign.data.scene_descriptions import lengthen
from clipvisionalign.data.scenes import COUNT_WORDS, SHAPE_COLOURS, Group, Scene, spatial_relation
from clipvisionalign.data.text_files import decode, split_lines

FOIL_KINDS = ("relation", "attribute", "count", "negation")


@dataclass(frozen=True)
class MinimalPair:
    """A caption that is true of an image, and one that is not and differs in one thing.

    Attributes:
        image: The image's file, or the bytes of one.
        caption: The true caption.
        foil: The false one.
        kind: What differs: one of `FOIL_KINDS`, or the name of a published file.
        of: What it was drawn with, equal for pairs that are not independent: the image that parts were cut out of, the
            row of a published set, the identity that is shown. "" for its image.
    """

    image: Path | bytes
    caption: str
    foil: str
    kind: str
    of: str = ""


def drawn_together(pairs: Iterable[MinimalPair]) -> dict[str, list[int]]:
    """Number what each pair was drawn with (see `MinimalPair`).

    Pairs of one image are right or wrong together, and count as one where chance is computed.

    Args:
        pairs: The pairs.

    Returns:
        By kind, for each pair of that kind in order the number of its image, from 0.

    >>> dog, cat = MinimalPair(b"1", "a dog", "a cat", "count"), MinimalPair(b"2", "a cat", "a dog", "count")
    >>> drawn_together([dog, cat, dog])
    {'count': [0, 1, 0]}
    """
    numbers: dict[str, dict[str | Path | bytes, int]] = {}
    image_numbers: dict[str, list[int]] = {}
    for pair in pairs:
        known = numbers.setdefault(pair.kind, {})
        image_numbers.setdefault(pair.kind, []).append(known.setdefault(pair.of or pair.image, len(known)))
    return image_numbers


# --- from drawn scenes, with exact ground truth ----------------------------------------------------------------------


@dataclass(frozen=True)
class SceneFoil:
    """A caption of a scene and its foil.

    Attributes:
        caption: True of the scene.
        foil: False of it.
        foil_scene: A scene of which the foil is true, which differs from the drawn one in one thing.
    """

    caption: str
    foil: str
    foil_scene: Scene


def scene_foils(scene: Scene) -> dict[str, SceneFoil]:
    """The foils of a scene.

    "relation": its first two groups with swapped positions; "attribute": with swapped colours; "count": another number
    of the first; "negation": which of a group that is there and one that is not. Except for the count, a foil has the
    words of its caption.

    Args:
        scene: The scene; its seed decides what is drawn at random.

    Returns:
        Foils by kind; a kind that does not apply to this scene is left out.
    """
    rng = random.Random(scene.seed)
    first, second, *others = scene.groups
    foils = {}
    relation_phrase = spatial_relation(first, second)
    if relation_phrase is not None:
        one, two = first.phrase(with_size=False), second.phrase(with_size=False)
        moved = (
            replace(first, column=second.column, row=second.row),
            replace(second, column=first.column, row=first.row),
        )
        moved_scene = replace(scene, groups=(*moved, *others))
        foils["relation"] = SceneFoil(f"{one} {relation_phrase} {two}", f"{two} {relation_phrase} {one}", moved_scene)
    kinds = {(group.shape, group.colour) for group in scene.groups}
    swapped = replace(first, colour=second.colour), replace(second, colour=first.colour)
    if first.colour != second.colour and not kinds & {(group.shape, group.colour) for group in swapped}:
        foils["attribute"] = SceneFoil(_and(first, second), _and(*swapped), replace(scene, groups=(*swapped, *others)))
    count = rng.choice([number for number in COUNT_WORDS if number != first.count])
    counted = replace(first, count=count)
    ground = f"on a {scene.background} background"
    foils["count"] = SceneFoil(
        f"{first.phrase(with_size=False)} {ground}",
        f"{counted.phrase(with_size=False)} {ground}",
        replace(scene, groups=(counted, second, *others)),
    )
    colour = rng.choice([colour for colour in SHAPE_COLOURS if (first.shape, colour) not in kinds])
    absent = replace(first, colour=colour)
    foils["negation"] = SceneFoil(
        _but_no(first, absent), _but_no(absent, first), replace(scene, groups=(absent, second, *others))
    )
    return foils


def _and(a: Group, b: Group) -> str:
    return f"{a.phrase(with_size=False)} and {b.phrase(with_size=False)}"


def _but_no(present: Group, absent: Group) -> str:
    return f"{present.phrase(with_size=False)} but no {absent.phrase(with_size=False).partition(' ')[2]}"


# --- from captions of photographs, by rule ---------------------------------------------------------------------------

#: Words and their opposites, which a foil exchanges.
_OPPOSITES = {"in front of": "behind", "above": "below", "on top of": "underneath", "into": "out of", "over": "under"}
_SPATIAL_WORDS = {**_OPPOSITES, **{other: word for word, other in _OPPOSITES.items()}}
_PEOPLE = (
    "man woman boy girl child baby dog cat horse bird person lady guy player rider kid toddler men women boys girls"
)
_COLOUR_WORDS = "black white red blue green yellow brown orange pink purple grey gray tan blond blonde"
_NUMBERS = "two three four five six"
#: Between two actors: what makes a caption mean the same when they are swapped.
_SYMMETRIC = re.compile(r"\b(and|or|with|beside|near|by|next|together|,)\b|,|;")


def caption_foils(caption: str) -> dict[str, str]:
    """The foils of a caption, by rule: a few are true of the image all the same.

    "relation": two actors swapped around a verb, else a spatial word replaced by its opposite; "attribute": two colours
    swapped; "count": another number; "negation": "is" becomes "is not".

    Args:
        caption: An English caption.

    Returns:
        Foils by kind; kinds that its words do not admit are left out.

    Source of the kinds: Yuksekgonul et al., "ARO", arXiv:2210.01936; Hsieh et al., "SugarCrepe", arXiv:2306.14610.

    >>> caption_foils("A black dog chases a white cat .")["attribute"]
    'A white dog chases a black cat .'
    """
    foils: dict[str, str] = {}
    actors = _two_different(_PEOPLE, caption)
    if actors and not _SYMMETRIC.search(caption[actors[0].end() : actors[1].start()]):
        foils["relation"] = _swap(caption, *actors)
    else:
        alternatives = "|".join(sorted(_SPATIAL_WORDS, key=len, reverse=True))
        match = re.search(rf"\b({alternatives})\b", caption)
        if match:
            foils["relation"] = caption[: match.start()] + _SPATIAL_WORDS[match[1]] + caption[match.end() :]
    colours = _two_different(_COLOUR_WORDS, caption)
    # "A black and white dog" is a white and black one.
    if colours and not re.fullmatch(r",? (and )?", caption[colours[0].end() : colours[1].start()]):
        foils["attribute"] = _swap(caption, *colours)
    number = re.search(rf"\b({_NUMBERS.replace(' ', '|')})\b", caption, re.IGNORECASE)
    if number:
        names = _NUMBERS.split()
        other = names[(names.index(number[1].lower()) + 2) % len(names)]
        foils["count"] = caption[: number.start()] + _match_case(number[1], other) + caption[number.end() :]
    verb = re.search(r"\b(is|are)\b(?! not\b)", caption)
    if verb:
        foils["negation"] = f"{caption[: verb.end()]} not{caption[verb.end() :]}"
    return foils


def _two_different(vocabulary: str, caption: str) -> tuple[re.Match[str], re.Match[str]] | None:
    """The first two places of words out of `vocabulary` that differ."""
    matches = list(re.finditer(rf"\b({vocabulary.replace(' ', '|')})\b", caption, re.IGNORECASE))
    if len(matches) < 2 or matches[0][1].lower() == matches[1][1].lower():
        return None
    return matches[0], matches[1]


def _swap(text: str, a: re.Match[str], b: re.Match[str]) -> str:
    before, middle = (
        re.sub(r"\b([Aa])n?( )$", r"\1\2", part) for part in (text[: a.start()], text[a.end() : b.start()])
    )
    first, second = _match_case(a[0], b[0]), _match_case(b[0], a[0])
    return _article(before, first) + first + _article(middle, second) + second + text[b.end() :]


def _article(before: str, word: str) -> str:
    """`before`, its last "a" turned into "an" where `word` asks for it."""
    return re.sub(r"\b([Aa]) $", r"\1n ", before) if word[0].lower() in "aeiou" else before


def _match_case(model: str, word: str) -> str:
    """`word` with a capital where `model` has one."""
    return word.capitalize() if model[0].isupper() else word.lower()


def make_minimal_pairs(data: CaptionedImages, limit: int = 0, seed: int = 0) -> list[MinimalPair]:
    """The minimal pairs of a data set: of its drawn scenes, else of its captions.

    A foil that is equal, word by word, to a caption that belongs to the image (see `IdentityMode`) is not false of it,
    and is left out. Of joined captions the single ones are taken. Where captions of scenes are long, both texts of a
    pair are, and differ at their needles only.

    Args:
        data: The data set.
        limit: Pairs of each kind at most; 0 for all. An image has at most one of each kind.
        seed: Seed by which pairs are drawn if there are more.

    Returns:
        The pairs, in the order of the images.
    """
    scenes, data = read_scenes(data.source), with_captions(data, "each")
    difficulty = scene_difficulty(data.source)
    pairs = []
    identity = data.image_identity
    for row_index, (row, positive_texts) in enumerate(zip(data.rows, data.positive_texts(), strict=True)):
        candidates: dict[str, tuple[str, str]] = {}
        if row.name in scenes:
            candidates = {
                kind: (lengthen(foil.caption, difficulty), lengthen(foil.foil, difficulty))
                for kind, foil in scene_foils(scenes[row.name]).items()
            }
        elif not scenes:
            for caption in row.captions:
                for kind, foil in caption_foils(caption).items():
                    if normalize_caption(foil) not in positive_texts:
                        candidates.setdefault(kind, (caption, foil))
        of = row.name if identity is None else f"identity {identity[row_index]}"
        pairs += [MinimalPair(row.image, *texts, kind, of) for kind, texts in candidates.items()]
    return _sample_pairs(pairs, limit, seed)


def _sample_pairs(pairs: list[MinimalPair], limit: int, seed: int) -> list[MinimalPair]:
    if not limit:
        return pairs
    rng = random.Random(seed)
    sampled = []
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        of_kind = [pair for pair in pairs if pair.kind == kind]
        sampled += (
            of_kind if len(of_kind) <= limit else [of_kind[i] for i in sorted(rng.sample(range(len(of_kind)), limit))]
        )
    return sampled


# --- published sets --------------------------------------------------------------------------------------------------


def read_minimal_pairs(path: str | Path, images: str | Path = "") -> list[MinimalPair]:
    """Read a published set in its own layout: ARO's files, SugarCrepe's, Winoground's folder.

    Args:
        path: A JSON file, or a folder with such files or with examples.jsonl.
        images: Folder of the images; "" for the folder of the files.

    Returns:
        The pairs.

    Raises:
        DataError: It is none of these, or an image is missing; the message names file and entry.

    Source: Yuksekgonul et al., arXiv:2210.01936; Hsieh et al., arXiv:2306.14610; Thrush et al., arXiv:2204.03162.
    """
    source = Path(path)
    files = sorted(source.glob("*.json*")) if source.is_dir() else [source]
    if not files or not files[0].exists():
        raise DataError(f"{source}: no minimal pairs: no such file, or a folder without .json or .jsonl")
    default_images = source if source.is_dir() else source.parent
    pairs: list[MinimalPair] = []
    for file in files:
        pairs += _read_file(file, Path(images) if str(images) else default_images)
    return pairs


def _read_file(file: Path, images: Path) -> list[MinimalPair]:
    try:
        text = decode(file.read_bytes()).text
        rows = [json.loads(line) for line in split_lines(text) if line.strip()] if file.suffix == ".jsonl" else None
        rows = json.loads(text) if rows is None else rows
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not JSON: {error}") from None
    entries = list(rows.values()) if isinstance(rows, dict) else rows
    if not entries or not isinstance(entries[0], dict):
        raise DataError(f"{file}: no minimal pairs in it")
    for keys, reader in _PUBLISHED.items():
        if set(keys) <= set(entries[0]):
            return [pair for index, row in enumerate(entries) for pair in _read_row(file, index, row, images, reader)]
    known = "; ".join(", ".join(keys) for keys in _PUBLISHED)
    raise DataError(f"{file}: its rows have {', '.join(entries[0])}; supported are: {known}")


Reader = Callable[[Path, dict[str, Any], Path], Iterable[MinimalPair]]


def _read_row(file: Path, index: int, row: dict[str, Any], images: Path, reader: Reader) -> list[MinimalPair]:
    try:
        return list(reader(file, row, images))
    except (KeyError, TypeError, OSError) as error:
        raise DataError(f"{file}, entry {index + 1}: {type(error).__name__}: {error}") from None


def _sugarcrepe(file: Path, row: dict[str, Any], images: Path) -> Iterable[MinimalPair]:
    yield MinimalPair(
        _find_image(images, row["filename"]), row["caption"], row["negative_caption"], file.stem, row["filename"]
    )


def _aro(file: Path, row: dict[str, Any], images: Path) -> Iterable[MinimalPair]:
    kind = "attribute" if "attributes" in row else "relation"
    image: Path | bytes = _find_image(images, row["image_path"])
    if "bbox_x" in row:
        image = _crop(image, *(row[f"bbox_{side}"] for side in "xywh"))
    yield MinimalPair(image, row["true_caption"], row["false_caption"], kind, row["image_path"])


def _winoground(file: Path, row: dict[str, Any], images: Path) -> Iterable[MinimalPair]:
    folder = images / "images" if (images / "images").is_dir() else images
    for own, other in ((0, 1), (1, 0)):
        image = _find_image(folder, row[f"image_{own}"])
        # Both images of a row are asked the same two captions.
        of = f"{row['image_0']} {row['image_1']}"
        yield MinimalPair(image, row[f"caption_{own}"], row[f"caption_{other}"], "winoground", of)


_PUBLISHED: dict[tuple[str, ...], Reader] = {
    ("filename", "caption", "negative_caption"): _sugarcrepe,
    ("image_path", "true_caption", "false_caption"): _aro,
    ("image_0", "image_1", "caption_0", "caption_1"): _winoground,
}


def _find_image(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.png", folder / f"{name}.jpg"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no image {folder / name}")


def _crop(image: Path | bytes, x: int, y: int, width: int, height: int) -> bytes:
    """The part of an image that the two captions are about, as ARO cuts it out."""
    from clipvisionalign.images import open_image

    out = BytesIO()
    open_image(image).crop((x, y, x + width, y + height)).save(out, "PNG")
    return out.getvalue()
