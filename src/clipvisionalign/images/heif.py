"""The thumbnail that cameras embed in a HEIC file (ISO/IEC 23008-12), where it shows what the image shows.

No Python package decodes it. The container is rewritten in memory instead, so that the thumbnail is the primary image:
the decoder then decodes it as any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

#: Kinds of properties that turn an image.
_TRANSFORMS = (b"irot", b"imir")


@dataclass
class _Items:
    """What the meta box contains about a file's images.

    Attributes:
        primary: Number of the primary image; its bytes in the file are at `primary_at`.
        thumbnails: Numbers of the thumbnails of the primary image.
        references: Where in the file the kind of each reference to the primary image as a thumbnail stands.
        sizes: Width and height by number, after cropping, before they are turned.
        transforms: What turns each image, in order.
        end: The end of the last byte of any image.
    """

    primary: int = -1
    primary_at: slice = field(default_factory=lambda: slice(0))
    thumbnails: list[int] = field(default_factory=list)
    references: list[int] = field(default_factory=list)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    transforms: dict[int, list[bytes]] = field(default_factory=dict)
    end: int = 0


def with_thumbnail_as_primary(data: bytes, shorter: int, longer: int) -> bytes:
    """A HEIC file whose primary image is the smallest embedded thumbnail that is large enough.

    A thumbnail counts only if it has the shape of the image and is turned as it is, and if nothing of the file is cut
    off.

    Args:
        data: The file.
        shorter: Pixels that the shorter side requires.
        longer: Pixels that the longer side requires.

    Returns:
        The file, changed in a copy; b"" where there is no such thumbnail.
    """
    try:
        items = _read_items(data)
    except (IndexError, ValueError):
        return b""
    if items.primary not in items.sizes or items.end > len(data):
        return b""
    large_enough = []
    for number in items.thumbnails:
        small, large = items.sizes.get(number, (0, 0)), items.sizes[items.primary]
        same_shape = abs(small[0] * large[1] - small[1] * large[0]) <= 0.02 * small[1] * large[0]
        turned_alike = items.transforms.get(number, []) == items.transforms.get(items.primary, [])
        if min(small) >= shorter and max(small) >= longer and same_shape and turned_alike:
            large_enough.append((small[0] * small[1], number))
    if not large_enough:
        return b""
    changed = bytearray(data)
    width = items.primary_at.stop - items.primary_at.start
    changed[items.primary_at] = min(large_enough)[1].to_bytes(width, "big")
    for at in items.references:
        changed[at : at + 4] = b"skip"  # a thumbnail is no image of its own
    return bytes(changed)


def _read_items(data: bytes) -> _Items:
    meta = next((content for kind, content in _boxes(data, slice(0, len(data))) if kind == b"meta"), None)
    items = _Items()
    if meta is None:
        return items
    boxes = dict(_boxes(data, slice(meta.start + 4, meta.stop)))
    required = (b"pitm", b"iprp", b"iref", b"iloc")
    if not all(kind in boxes for kind in required):
        return items
    pitm, iprp, iref, iloc = (boxes[kind] for kind in required)
    items.primary_at = slice(pitm.start + 4, pitm.start + (6 if data[pitm.start] == 0 else 8))
    items.primary = _number(data, items.primary_at.start, items.primary_at.stop - items.primary_at.start)
    _read_properties(data, iprp, items)
    _read_references(data, iref, items)
    items.end = _last_byte(data, iloc)
    return items


def _boxes(data: bytes, inside: slice) -> Iterator[tuple[bytes, slice]]:
    """The kind of each box and where its content lies."""
    start = inside.start
    while start + 8 <= inside.stop:
        length, header = _number(data, start, 4), 8
        if length == 1:
            length, header = _number(data, start + 8, 8), 16
        end = inside.stop if length == 0 else start + length
        if end < start + header:
            raise ValueError("a box that is shorter than its header")
        yield data[start + 4 : start + 8], slice(start + header, min(end, inside.stop))
        start = end


def _number(data: bytes, start: int, width: int) -> int:
    if start + width > len(data):
        raise IndexError(start)
    return int.from_bytes(data[start : start + width], "big")


def _read_properties(data: bytes, iprp: slice, items: _Items) -> None:
    """Sizes and transforms of every item, by the associations of the ipma box."""
    parts = list(_boxes(data, iprp))
    properties = [box for kind, inside in parts if kind == b"ipco" for box in _boxes(data, inside)]
    cropped: dict[int, tuple[int, ...]] = {}
    for _, inside in (part for part in parts if part[0] == b"ipma"):
        wide_numbers, wide_indices = data[inside.start] >= 1, data[inside.start + 3] & 1
        count, at = _number(data, inside.start + 4, 4), inside.start + 8
        for _ in range(count):
            item = _number(data, at, 4 if wide_numbers else 2)
            at += 4 if wide_numbers else 2
            associations, at = data[at], at + 1
            for _ in range(associations):
                index = _number(data, at, 2) & 0x7FFF if wide_indices else data[at] & 0x7F
                at += 2 if wide_indices else 1
                if not 0 < index <= len(properties):
                    continue
                kind, content = properties[index - 1]
                if kind == b"clap":
                    cropped[item] = tuple(
                        _number(data, content.start + start, 4) // max(1, _number(data, content.start + start + 4, 4))
                        for start in (0, 8)
                    )
                elif kind == b"ispe":
                    items.sizes[item] = _number(data, content.start + 4, 4), _number(data, content.start + 8, 4)
                elif kind in _TRANSFORMS:
                    items.transforms.setdefault(item, []).append(kind + data[content])
    items.sizes |= {item: (size[0], size[1]) for item, size in cropped.items()}


def _read_references(data: bytes, iref: slice, items: _Items) -> None:
    """Thumbnails of the primary image."""
    width = 2 if data[iref.start] == 0 else 4
    for kind, inside in _boxes(data, slice(iref.start + 4, iref.stop)):
        if kind != b"thmb":
            continue
        source, count = _number(data, inside.start, width), _number(data, inside.start + width, 2)
        targets = [_number(data, inside.start + width + 2 + width * n, width) for n in range(count)]
        if items.primary in targets:
            items.thumbnails.append(source)
            items.references.append(inside.start - 4)


def _last_byte(data: bytes, iloc: slice) -> int:
    """The end of the last part of any item that lies in the file itself."""
    version, sizes, more = data[iloc.start], data[iloc.start + 4], data[iloc.start + 5]
    offset_size, length_size, base_size, index_size = sizes >> 4, sizes & 15, more >> 4, more & 15 if version else 0
    number_size = 2 if version < 2 else 4
    count, at, last = _number(data, iloc.start + 6, number_size), iloc.start + 6 + number_size, 0
    for _ in range(count):
        at += number_size
        method = _number(data, at, 2) & 15 if version else 0
        at += 4 if version else 2
        base, extents = _number(data, at, base_size), _number(data, at + base_size, 2)
        at += base_size + 2
        for _ in range(extents):
            at += index_size
            offset, length = _number(data, at, offset_size), _number(data, at + offset_size, length_size)
            at += offset_size + length_size
            if method == 0:
                last = max(last, base + offset + length)
    return last
