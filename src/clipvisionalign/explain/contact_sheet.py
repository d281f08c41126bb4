"""Sheets of images, of hits or of heat maps, as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from clipvisionalign.explain.colours import colour_scale
from clipvisionalign.explain.heatmaps import Explanation, overlay
from clipvisionalign.images import ImageSource, open_image

CELL, GAP, LINE = 220, 12, 18


def contact_sheet(entries: Sequence[tuple[Image.Image, str]], title: str = "", columns: int = 5) -> Image.Image:
    """Images with a line of text under each, in rows.

    Args:
        entries: Images, each with its text; a text that is too long is cut.
        title: A line above; "" for none.
        columns: Images in a row at most.

    Returns:
        One RGB image; each image is shrunk to at most 220 pixels on a side.
    """
    columns = max(1, min(columns, len(entries)))
    rows = -(-len(entries) // columns)
    top = GAP + (LINE + GAP if title else 0)
    size = (GAP + columns * (CELL + GAP), top + rows * (CELL + LINE + 2 * GAP))
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    if title:
        draw.text((GAP, GAP), _truncate(title, font, size[0] - 2 * GAP), fill="black", font=ImageFont.load_default(15))
    for index, (image, caption) in enumerate(entries):
        x, y = GAP + index % columns * (CELL + GAP), top + index // columns * (CELL + LINE + 2 * GAP)
        small = image.copy()
        small.thumbnail((CELL, CELL))
        page.paste(small, (x + (CELL - small.width) // 2, y + CELL - small.height))
        draw.text((x, y + CELL + 4), _truncate(caption, font, CELL), fill="#333", font=font)
    return page


def _truncate(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """As much of a text as fits, its end cut off."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def thumbnail_sheet(thumbnails: Sequence[tuple[bytes, str]], title: str) -> Image.Image:
    """A sheet of an index's thumbnails.

    Args:
        thumbnails: JPEG bytes, each with its text; one that cannot be decoded is a grey cell.
        title: A line above; "" for none.

    Returns:
        One RGB image.
    """
    return contact_sheet([(_decode(data), caption) for data, caption in thumbnails], title)


def _decode(thumbnail: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(thumbnail)).convert("RGB")
    except (OSError, ValueError, SyntaxError):
        # One that is damaged takes its cell, and the others are shown.
        return Image.new("RGB", (CELL, CELL), "#ddd")


def explanation_sheet(image: ImageSource, explanation: Explanation) -> Image.Image:
    """The image, the caption's map over it, and the map of each word.

    Args:
        image: The image that was explained.
        explanation: Its maps.

    Returns:
        One RGB image, titled with caption, method and score.

    Raises:
        ImageError: The image cannot be opened.
    """
    entries = [
        (open_image(image), "the image"),
        (Image.fromarray(overlay(image, explanation.heatmap)), "the caption"),
    ]
    entries += [(Image.fromarray(overlay(image, grid)), word) for word, grid in explanation.word_heatmaps]
    title = f"{explanation.caption} ({explanation.method}, score {explanation.score:.3f})"
    return _add_scale(contact_sheet(entries, title, columns=5))


def _add_scale(sheet: Image.Image) -> Image.Image:
    """A sheet of heat maps with the scale of their colours below."""
    page = Image.new("RGB", (sheet.width, sheet.height + LINE + GAP), "white")
    page.paste(sheet, (0, 0))
    draw, font, y = ImageDraw.Draw(page), ImageFont.load_default(13), sheet.height - GAP // 2
    draw.text((GAP, y), "least", fill="#333", font=font)
    left = GAP + round(font.getlength("least")) + GAP // 2
    scale = colour_scale(CELL // 2, LINE - 4)
    page.paste(scale, (left, y + 2))
    draw.text((left + scale.width + GAP // 2, y), "most, each map by itself", fill="#333", font=font)
    return page
