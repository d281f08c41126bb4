"""How images become pixels, as an ONNX export records it."""

from __future__ import annotations

from typing import Any

from clipvisionalign.images import ImageTransform


def describe_pixels(transform: ImageTransform) -> dict[str, Any]:
    """A transform as onnx.json records it.

    Args:
        transform: The transform.

    Returns:
        Its settings by name.
    """
    from clipvisionalign.models.pretrained.transforms import PretrainedTransform

    record = {
        "size": transform.size, "mean": list(transform.mean), "std": list(transform.std), "resize": "bicubic"
    }  # fmt: skip
    if isinstance(transform, PretrainedTransform):
        record |= {
            "resize": transform.interpolation,
            "shorter_side": transform.resize,
            "rounds_half_to_even": transform.rounds_half_to_even,
        }
    return record


def read_pixels(record: dict[str, Any]) -> ImageTransform:
    """The transform that onnx.json records; the inverse of `describe_pixels`.

    Args:
        record: Its settings by name; without "shorter_side" the whole image is squeezed into the square.

    Returns:
        The transform.

    >>> read_pixels(describe_pixels(ImageTransform(size=64))) == ImageTransform(size=64)
    True
    """
    size, mean, std = record["size"], tuple(record["mean"]), tuple(record["std"])
    if "shorter_side" not in record:
        return ImageTransform(size, mean, std)
    from clipvisionalign.models.pretrained.transforms import PretrainedTransform

    return PretrainedTransform(size, mean, std, record["shorter_side"], record["resize"], record["rounds_half_to_even"])
