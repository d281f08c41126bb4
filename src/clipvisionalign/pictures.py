"""Deprecated: the former place of `clipvisionalign.images`."""

from clipvisionalign.deprecated import deprecated_names

#: For each old name the present one in `clipvisionalign.images`.
PRESENT_NAMES = {
    "HEAD_BYTES": "HEAD_BYTES",
    "MAX_PIXELS": "MAX_PIXELS",
    "NotTaken": "NotTaken",
    "Picture": "Picture",
    "PictureError": "PictureError",
    "PictureInput": "PictureInput",
    "describe_picture": "describe_picture",
    "files_below": "files_below",
    "first_bytes": "first_bytes",
    "image_files": "image_files",
    "looks_like_image": "looks_like_image",
    "not_for_images": "not_for_images",
    "open_header": "open_header",
    "open_picture": "open_picture",
    "to_rgb": "to_rgb",
    "why_no_image": "why_no_image",
}

__getattr__ = deprecated_names(__name__, {old: f"clipvisionalign.images:{new}" for old, new in PRESENT_NAMES.items()})
