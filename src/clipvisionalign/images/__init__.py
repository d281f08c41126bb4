"""Images: opened safely to upright 8-bit RGB, found below a folder, and transformed to what an image tower takes."""

from clipvisionalign.images.decoding import (
    HEAD_BYTES,
    MARGIN,
    MAX_PIXELS,
    NOT_OPENED,
    Picture,
    PictureError,
    describe_picture,
    first_bytes,
    looks_like_image,
    open_header,
    open_picture,
)
from clipvisionalign.images.listing import (
    HIDDEN,
    NO_IMAGE,
    NOT_DECODED,
    OF_THE_SYSTEM,
    OTHER_FILE,
    PICTURE_SUFFIXES,
    NotTaken,
    files_below,
    image_files,
    not_for_images,
    why_no_image,
)
from clipvisionalign.images.rgb import OVERSHOOT, to_rgb
from clipvisionalign.images.transform import PictureInput

__all__ = [
    "HEAD_BYTES",
    "HIDDEN",
    "MARGIN",
    "MAX_PIXELS",
    "NOT_DECODED",
    "NOT_OPENED",
    "NO_IMAGE",
    "OF_THE_SYSTEM",
    "OTHER_FILE",
    "OVERSHOOT",
    "PICTURE_SUFFIXES",
    "NotTaken",
    "Picture",
    "PictureError",
    "PictureInput",
    "describe_picture",
    "files_below",
    "first_bytes",
    "image_files",
    "looks_like_image",
    "not_for_images",
    "open_header",
    "open_picture",
    "to_rgb",
    "why_no_image",
]
