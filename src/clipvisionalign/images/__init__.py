"""Images: decoded to upright 8-bit RGB, listed below a folder, and transformed for an image tower."""

from clipvisionalign.images.camera_metadata import CameraMetadata, camera_metadata
from clipvisionalign.images.decoding import (
    HEAD_BYTES,
    JPEG_DRAFT_SCALE,
    MAX_PIXELS,
    UNSUPPORTED_FORMATS,
    DecodedImage,
    ImageError,
    ImageSource,
    decode_image,
    describe_image,
    first_bytes,
    is_image_content,
    open_header,
    open_image,
)
from clipvisionalign.images.formats import INSTALL_DECODERS
from clipvisionalign.images.listing import (
    HIDDEN,
    IMAGE_SUFFIXES,
    NON_IMAGE_CONTENT,
    NON_IMAGE_SUFFIX,
    RAW_SUFFIXES,
    SYSTEM_FILE,
    UNDECODED_SUFFIX,
    ExcludedFiles,
    exclusion_reason,
    image_files,
    name_exclusion_reason,
    walk_files,
)
from clipvisionalign.images.rgb import OVERSHOOT, to_rgb
from clipvisionalign.images.transform import ImageTransform

__all__ = [
    "HEAD_BYTES",
    "HIDDEN",
    "IMAGE_SUFFIXES",
    "INSTALL_DECODERS",
    "JPEG_DRAFT_SCALE",
    "MAX_PIXELS",
    "NON_IMAGE_CONTENT",
    "NON_IMAGE_SUFFIX",
    "OVERSHOOT",
    "RAW_SUFFIXES",
    "SYSTEM_FILE",
    "UNDECODED_SUFFIX",
    "UNSUPPORTED_FORMATS",
    "CameraMetadata",
    "DecodedImage",
    "ExcludedFiles",
    "ImageError",
    "ImageSource",
    "ImageTransform",
    "camera_metadata",
    "decode_image",
    "describe_image",
    "exclusion_reason",
    "first_bytes",
    "image_files",
    "is_image_content",
    "name_exclusion_reason",
    "open_header",
    "open_image",
    "to_rgb",
    "walk_files",
]
