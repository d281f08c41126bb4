"""Sheets of pictures: what was found, and what a model looked at, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from clipvisionalign.explain.heatmaps import Explanation, overlay
from clipvisionalign.images import Picture, open_picture

CELL, GAP, LINE = 220, 12, 18


def sheet(pictures: Sequence[tuple[Image.Image, str]], title: str = "", across: int = 5) -> Image.Image:
    """Pictures with a line of words under each, in rows of `across`, under a title."""
    across = max(1, min(across, len(pictures)))
    rows = -(-len(pictures) // across)
    top = GAP + (LINE + GAP if title else 0)
    size = (GAP + across * (CELL + GAP), top + rows * (CELL + LINE + 2 * GAP))
    page = Image.new("RGB", size, "white")
    pencil, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    if title:
        pencil.text((GAP, GAP), _fitting(title, font, size[0] - 2 * GAP), fill="black", font=ImageFont.load_default(15))
    for number, (picture, words) in enumerate(pictures):
        x, y = GAP + number % across * (CELL + GAP), top + number // across * (CELL + LINE + 2 * GAP)
        small = picture.copy()
        small.thumbnail((CELL, CELL))
        page.paste(small, (x + (CELL - small.width) // 2, y + CELL - small.height))
        pencil.text((x, y + CELL + 4), _fitting(words, font, CELL), fill="#333", font=font)
    return page


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of a text as fits, its end cut off."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def sheet_of_thumbnails(found: Sequence[tuple[bytes, str]], title: str) -> Image.Image:
    """A sheet of an index's thumbnails."""
    return sheet([(Image.open(BytesIO(data)).convert("RGB"), words) for data, words in found], title)


def sheet_of_explanation(image: Picture, found: Explanation) -> Image.Image:
    """The picture, the whole caption's map, and each word's."""
    shown = [(open_picture(image), "the picture"), (Image.fromarray(overlay(image, found.whole)), "the caption")]
    shown += [(Image.fromarray(overlay(image, grid)), word) for word, grid in found.words]
    return sheet(shown, f"{found.caption} ({found.method}, score {found.score:.3f})", across=5)
