"""What a camera writes beside the pixels: when, with which camera, and where; of EXIF, else of XMP.

Nothing is raised for damaged metadata: what cannot be read is None, and the result states that something was damaged.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from PIL import ExifTags, Image

#: The year of the oldest photograph, and how far cameras' clocks are ahead at most, time zones included.
_FIRST_PHOTOGRAPH, _CLOCK_SLACK = 1826, timedelta(days=2)
_DATE = re.compile(r"(\d{4})[:/.-](\d{2})[:/.-](\d{2})[ T](\d{2}):(\d{2})(?::(\d{2}))?", re.ASCII)
#: Company forms in the name of a maker.
_COMPANY = re.compile(
    r"(?:[\s,]+(?:corporation|corp|co|ltd|inc|gmbh|ag|company|imaging|electronics)\b\.?)+$", re.IGNORECASE
)
_XMP_TEXT = r"""\s*(?:=\s*["']|>)\s*([^"'<>]+)"""
_XMP_COORDINATE = re.compile(r"(\d{1,3}),(\d{1,2}(?:\.\d+)?)(?:,(\d{1,2}(?:\.\d+)?))?([NSEW])", re.ASCII)
_MAX_TEXT = 100


@dataclass(frozen=True)
class CameraMetadata:
    """What a camera wrote into one image; None for what it did not, or what is damaged.

    Attributes:
        taken: Date and time as the camera's clock showed them where the image was taken, without a time zone.
        camera: Make and model.
        lens: Model of the lens.
        latitude: Degrees, north positive.
        longitude: Degrees, east positive.
        is_damaged: Whether something is there that cannot be read or makes no sense.
    """

    taken: datetime | None = None
    camera: str | None = None
    lens: str | None = None
    latitude: float | None = None
    longitude: float | None = None
    is_damaged: bool = False


def camera_metadata(opened: Image.Image) -> CameraMetadata:
    """The metadata of an opened image.

    Args:
        opened: Pillow's image, as `open_header` returns it.

    Returns:
        The metadata.

    >>> image = Image.new("RGB", (1, 1))
    >>> image.getexif().update({271: "Canon", 272: "Canon EOS 5D"})
    >>> camera_metadata(image).camera
    'Canon EOS 5D'
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A PNG's own method decodes the image to look behind its pixels.
            exif = Image.Image.getexif(opened) if opened.format == "PNG" else opened.getexif()
            tags, details = dict(exif), dict(exif.get_ifd(ExifTags.IFD.Exif))
            position = dict(exif.get_ifd(ExifTags.IFD.GPSInfo))
    except Exception:  # of damaged bytes Pillow raises all sorts
        return CameraMetadata(is_damaged=True)
    xmp = _xmp(opened)
    taken, damaged_date = _first_date(details, xmp)
    latitude, longitude, damaged_position = _position(position, xmp)
    make, model = _text(tags.get(ExifTags.Base.Make)), _text(tags.get(ExifTags.Base.Model))
    return CameraMetadata(
        taken,
        camera_name(make or _xmp_text(xmp, "tiff:Make"), model or _xmp_text(xmp, "tiff:Model")),
        _text(details.get(ExifTags.Base.LensModel)) or _xmp_text(xmp, "aux:Lens"),
        latitude,
        longitude,
        damaged_date or damaged_position or any(
            tag in tags and not isinstance(tags[tag], (str, bytes)) for tag in (ExifTags.Base.Make, ExifTags.Base.Model)
        ),
    )  # fmt: skip


def camera_name(make: str | None, model: str | None) -> str | None:
    """Make and model as one name, without repetitions and company forms.

    Args:
        make: Of the camera; None if unknown.
        model: Of the camera; None if unknown.

    Returns:
        The name; None where neither is known.

    >>> camera_name("NIKON CORPORATION", "NIKON D850"), camera_name("Apple", "iPhone 15"), camera_name(None, None)
    ('NIKON D850', 'Apple iPhone 15', None)
    """
    make = _COMPANY.sub("", make) if make else ""
    if not model:
        return make or None
    return model if not make or model.casefold().startswith(make.casefold()) else f"{make} {model}"


def _text(value: Any) -> str | None:
    """A text without padding and control characters; None where nothing is left."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return None
    plain = "".join(each if each.isprintable() else " " for each in value.partition("\0")[0])
    return " ".join(plain.split())[:_MAX_TEXT] or None


def _xmp(opened: Image.Image) -> str:
    packet = opened.info.get("XML:com.adobe.xmp") or opened.info.get("xmp") or b""
    if isinstance(packet, bytes):
        return packet.decode("utf-8", "replace")
    return packet if isinstance(packet, str) else ""


def _xmp_text(xmp: str, name: str) -> str | None:
    match = re.search(name + _XMP_TEXT, xmp) if xmp else None
    return _text(match[1]) if match else None


def _first_date(details: Mapping[int, Any], xmp: str) -> tuple[datetime | None, bool]:
    """When the image was taken, or else digitised; and whether a date is damaged."""
    is_damaged = False
    candidates = [details.get(ExifTags.Base.DateTimeOriginal), _xmp_text(xmp, "exif:DateTimeOriginal"),
                  _xmp_text(xmp, "photoshop:DateCreated"), details.get(ExifTags.Base.DateTimeDigitized)]  # fmt: skip
    for value in candidates:
        text = _text(value)
        # Blanks between the colons are EXIF's own way to say that a date is unknown.
        if value is None or (text is not None and not text.replace(":", "").strip()):
            continue
        match = _DATE.match(text or "")
        try:
            if match:
                taken = datetime(*(int(group or 0) for group in match.groups()))  # type: ignore[arg-type]
                # What a clock that was never set writes, and what would stand before all newest images for ever.
                if taken.year >= _FIRST_PHOTOGRAPH and taken <= datetime.now() + _CLOCK_SLACK:
                    return taken, is_damaged
        except ValueError:
            pass
        is_damaged = True
    return None, is_damaged


def _position(tags: Mapping[int, Any], xmp: str) -> tuple[float | None, float | None, bool]:
    """Latitude and longitude, both or none; and whether they are damaged."""
    keys = ((ExifTags.GPS.GPSLatitude, ExifTags.GPS.GPSLatitudeRef, "NS", 90.0),
            (ExifTags.GPS.GPSLongitude, ExifTags.GPS.GPSLongitudeRef, "EW", 180.0))  # fmt: skip
    if any(key in tags for key, *_ in keys):
        values = [_degrees(tags.get(key), tags.get(mark), letters, limit) for key, mark, letters, limit in keys]
    else:
        texts = [_xmp_text(xmp, f"exif:GPS{name}") for name in ("Latitude", "Longitude")]
        if texts == [None, None]:
            return None, None, False
        values = [_xmp_degrees(text, letters, limit) for text, (_, _, letters, limit) in zip(texts, keys, strict=True)]
    latitude, longitude = values
    if latitude is None or longitude is None:
        return None, None, True
    # Zero and zero is what a receiver without a position writes.
    return (None, None, False) if latitude == longitude == 0 else (latitude, longitude, False)


def _degrees(value: Any, reference: Any, letters: str, limit: float) -> float | None:
    """Degrees, minutes and seconds as degrees; None where one is no number or out of range."""
    letter = (_text(reference) or "?")[0].upper()
    try:
        degrees, minutes, seconds = [float(part) for part in (*value, 0, 0)][:3]
    except (TypeError, ValueError, ArithmeticError):
        return None
    if letter not in letters or not all(map(math.isfinite, (degrees, minutes, seconds))):
        return None
    total = degrees + minutes / 60 + seconds / 3600
    if min(degrees, minutes, seconds) < 0 or minutes > 60 or seconds > 60 or total > limit:
        return None
    return round(-total if letter in "SW" else total, 7)


def _xmp_degrees(text: str | None, letters: str, limit: float) -> float | None:
    match = _XMP_COORDINATE.fullmatch((text or "").replace(" ", ""))
    return _degrees([float(group or 0) for group in match.groups()[:3]], match[4], letters, limit) if match else None
