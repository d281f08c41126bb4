"""Pictures for the report: found by all, found by none, where the variants disagree, and what attends to what."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from clipvisionalign.data.captioned import CaptionedImages, hashed
from clipvisionalign.explain.heatmaps import explain, overlay
from clipvisionalign.images import open_picture
from clipvisionalign.models.io import load_aligner
from clipvisionalign.study.plan import Cell
from clipvisionalign.study.results import Measured
from clipvisionalign.study.words import EXAMPLES

#: Pixels of a picture's longer side, and words that an example is explained by.
SIDE, WORDS = 200, 3
#: Words that carry nothing that could be seen.
SMALL = set("a an and are at be by from in into is it its of on or that the their there this to with".split())  # noqa: SIM905


def examples_of(
    cells: Sequence[Cell], measured: Sequence[Measured], part: CaptionedImages, count: int
) -> dict[str, Any]:
    """The examples of report.json: captions with their image's rank in every variant, and maps.

    Of the first seed that all variants have; where there is none, of each variant's first ("seeds").
    """
    names = dict.fromkeys(cell.variant for cell in cells)
    shared = [seed for seed in dict.fromkeys(cell.seed for cell in cells)
              if all(any((cell.variant, cell.seed) == (name, seed) for cell in cells) for name in names)]  # fmt: skip
    first: dict[str, tuple[Cell, Measured]] = {}
    for cell, found in zip(cells, measured, strict=True):
        if not shared or cell.seed == shared[0]:
            first.setdefault(cell.variant, (cell, found))
    ranks = {name: found.ranks["ranks"].text_to_image[:, 0] for name, (_, found) in first.items()}
    chosen = choose(np.stack(list(ranks.values())), part.caption_image, count, _by_content(part))
    captions, owners = part.captions, part.caption_image
    groups = {
        kind: [
            {
                "image": part.rows[owners[place]].name,
                "caption": captions[place],
                "ranks": {name: int(of[place]) for name, of in ranks.items()},
                "picture": jpeg_of(part.images[owners[place]]),
            }
            for place in places
        ]
        for kind, places in chosen.items()
    }
    # One that all found, and one that they disagree on: a twin of the same picture would show little more.
    shown = [place for kind in ("found by all", "where they disagree") for place in chosen[kind][:1]]
    seeds = {name: cell.seed for name, (cell, _) in first.items()}
    return {"groups": groups, "seeds": seeds, "maps": [_maps(first, part, place) for place in shown]}


def choose(ranks: np.ndarray, owners: np.ndarray, count: int, order: np.ndarray | None = None) -> dict[str, list[int]]:
    """Captions to show, of different images, by the groups of `words.EXAMPLES`, the clearest first. ranks: (variants,
    M); owners: (M,) each caption's image; order: (M,) which of equal ones comes first, as they stand unless told."""
    order = np.arange(len(owners)) if order is None else order
    low, high = ranks.min(axis=0), ranks.max(axis=0)
    found = {}
    for kind, (_, fits) in EXAMPLES.items():
        # Not found by any: the nearest rank as far away as there is. Else the variants as far apart as there is.
        key = -low if kind == "found by none" else -high
        places = [place for place in np.lexsort((order, key)).tolist() if fits(int(low[place]), int(high[place]))]
        seen: set[int] = set()
        found[kind] = [p for p in places if not (owners[p] in seen or seen.add(int(owners[p])))][:count]  # type: ignore[func-returns-value]
    return found


def _by_content(part: CaptionedImages) -> np.ndarray:
    """An order of captions that does not depend on the order of a file (M,)."""
    names = [part.rows[owner].name for owner in part.caption_image]
    return np.argsort(np.argsort([hashed(f"{name}\0{text}") for name, text in zip(names, part.captions, strict=True)]))


def _maps(first: dict[str, tuple[Cell, Measured]], part: CaptionedImages, place: int) -> dict[str, Any]:
    """One example's maps in every variant: of the caption, and of the words that stand out most."""
    image, caption = part.images[part.caption_image[place]], part.captions[place]
    shown: dict[str, Any] = {"caption": caption, "image": part.rows[part.caption_image[place]].name, "variants": {}}
    for name, (cell, _) in first.items():
        try:
            found = explain(load_aligner(cell.folder), image, caption)
        except ValueError:
            continue  # patches that are on no square have no map
        seen = [word for word in found.words if word[0].lower() not in SMALL and word[0].isalnum()]
        words = sorted(seen, key=lambda word: -float(word[1].std()))[:WORDS]
        shown["variants"][name] = {
            "method": found.method,
            "maps": [{"of": "the caption", "picture": _jpeg(overlay(image, found.whole, SIDE))}]
            + [{"of": word, "picture": _jpeg(overlay(image, grid, SIDE))} for word, grid in words],
        }
    return shown


def jpeg_of(image: Any) -> str:
    """A small copy of a picture, as a data URI."""
    picture = open_picture(image).copy()
    picture.thumbnail((SIDE, SIDE))
    return _jpeg(np.asarray(picture))


def _jpeg(pixels: np.ndarray) -> str:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
