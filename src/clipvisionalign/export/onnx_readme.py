"""README.md of an export: its files, the formula of a score, and a program without this project."""

from __future__ import annotations

from typing import Any

_START = r'''import json
import re

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

about = json.load(open("onnx.json"))
image_tower, text_tower = (onnxruntime.InferenceSession(f"{name}.onnx") for name in ("image_tower", "text_tower"))
tokenizer = Tokenizer.from_file("tokenizer/tokenizer.json")
tokenizer.enable_truncation(about["max_tokens"], direction=about["truncation_side"])
tokenizer.no_padding()
size, mean, std = (about["pixels"][key] for key in ("size", "mean", "std"))


def pixels_of(path):
    """(3, S, S): the image upright, white where it is transparent, squeezed into the square that the tower sees."""
    image = Image.open(path)
    image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a half of its size, or less
    if image.mode[0] in "IF":
        raise ValueError(f"{path}: scale its greys of more than 8 bits to 8 bits first")
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp", b"").decode("utf-8", "replace")
    found = re.search(r"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])", xmp)  # Pillow reads double quotes alone
    if found and 274 not in image.getexif():
        image.getexif()[274] = int(found[1])
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return ((np.asarray(image, np.float32) / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32)


def run(session, **inputs):
    """What a file gives, by name."""
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs)))


def encode_images(paths, batch=32):
    """Arrays of all images, by name."""
    batches = [paths[start : start + batch] for start in range(0, len(paths), batch)]
    found = [run(image_tower, pixels=np.stack([pixels_of(path) for path in some])) for some in batches]
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def encode_caption(caption):
    """Arrays of one caption, by name."""
    ids = np.array([tokenizer.encode(caption).ids], np.int64)
    mask = np.ones_like(ids)
    return run(text_tower, ids=ids, mask=mask) | {"mask": mask}
'''

#: Lines of the program for a pretrained dual encoder in the place of others: its own preprocessing and padding.
_PRETRAINED = {
    "    image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a half of its size, or less\n": "",
    "squeezed into the square that the tower sees": "resized as the model was trained",
    'image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)': 'resized(image.convert("RGB"))',
    "def pixels_of(path):": '''def resized(image):
    """The shorter side resized and a square from the middle; or the whole image squeezed into the square."""
    short, method = about["pixels"]["shorter_side"], Image.Resampling[about["pixels"]["resize"].upper()]
    if not short:
        return image.resize((size, size), method)
    long = int(short * max(image.size) / min(image.size))
    image = image.resize((short, long) if image.width <= image.height else (long, short), method)
    to_even = about["pixels"]["rounds_half_to_even"]
    left, top = ((round if to_even and side > size else int)((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def pixels_of(path):''',
}
_FIXED_LENGTH = {
    "tokenizer.no_padding()": """tokenizer.enable_padding(
    direction=about["padding_side"], pad_id=about["pad"], length=about["padded_to"]
)""",
    """    ids = np.array([tokenizer.encode(caption).ids], np.int64)
    mask = np.ones_like(ids)
""": """    encoding = tokenizer.encode(caption)
    ids, mask = (np.array([row], np.int64) for row in (encoding.ids, encoding.attention_mask))
""",
}

_VECTORS = '''

def score(images, caption):
    """(N,): cosines of all images with the caption."""
    return images["vectors"] @ caption["vectors"][0]
'''

_LATE = '''

def score(images, caption):
    """(N,): the dual encoder's score, and the sum of each token's best match among an image's patches."""
    cosines = images["vectors"] @ caption["vectors"][0]
    best = (images["patches"] @ caption["parts"][0].T).max(axis=1)
    late = best @ caption["weights"][0]
    return cosines / about["temperature"] + about["late"]["weight"] / about["late"]["temperature"] * late
'''

_FIRST = '''

def first(images, caption, count=10):
    """The numbers of the images that match best, the best first."""
    return np.argsort(-score(images, caption), kind="stable")[:count]
'''

_FUSION = '''

fusion = onnxruntime.InferenceSession("fusion.onnx")


def fused_score(images, caption):
    """(N,): `score` and the fusion's correction."""
    inputs = {name: images[name] for name in ("patches", "key_values")}
    inputs |= {name: np.repeat(caption[name], len(images["vectors"]), axis=0) for name in ("tokens", "mask")}
    return score(images, caption) + about["fusion"]["weight"] * run(fusion, **inputs)["corrections"]


def first(images, caption, count=10):
    """The numbers of the images that match best, the best first: the dual encoder's first candidates re-ranked."""
    order = np.argsort(-images["vectors"] @ caption["vectors"][0], kind="stable")
    some = order[: about["fusion"]["candidates"]]
    scores = fused_score({name: array[some] for name, array in images.items()}, caption)
    return np.concatenate([some[np.argsort(-scores, kind="stable")], order[len(some) :]])[:count]
'''

_END = """

images = encode_images(["a.jpg"])
print(first(images, encode_caption("a dog on the grass")))
"""

_ARRAYS = {
    "vectors": ("(B, D)", "unit vectors of images, of captions"),
    "patches": ("(B, P, E)", "unit vectors of an image's patches"),
    "key_values": ("(B, L, P, 2 W)", "an image's patches as each layer of the fusion attends to them"),
    "parts": ("(B, T, E)", "unit vectors of a caption's tokens"),
    "weights": ("(B, T)", "what each token counts: they sum to 1, 0 on padding and on tokens that are left out"),
    "tokens": ("(B, T, W')", "a caption's tokens for the fusion"),
    "corrections": ("(B,)", "what the fusion adds to a pair's score"),
}
_OF_DESIGN = {
    "late": ("patches", "parts", "weights"),
    "cross": ("patches", "key_values", "parts", "weights", "tokens", "corrections"),
}


def render_readme(manifest: dict[str, Any]) -> str:
    """The README.md of an export, with a program that does not use this project.

    Args:
        manifest: What onnx.json holds.

    Returns:
        Markdown.
    """
    design = manifest["design"]
    start = _START
    is_pretrained, is_fixed = "shorter_side" in manifest["pixels"], "padded_to" in manifest
    for lines in (_PRETRAINED if is_pretrained else {}, _FIXED_LENGTH if is_fixed else {}):
        for former, line in lines.items():
            start = start.replace(former, line)
    scoring = {"late": _LATE + _FIRST, "cross": _LATE + _FUSION}.get(design, _VECTORS + _FIRST)
    names = ("vectors", *_OF_DESIGN.get(design, ()))
    rows = "\n".join(f"| `{name}` | {_ARRAYS[name][0]} | {_ARRAYS[name][1]} |" for name in names)
    lengths = f"captions of {manifest['padded_to']} tokens" if is_fixed else "captions of 2 tokens and\nmore"
    takes = f"Needs onnxruntime, tokenizers, Pillow and NumPy. The files take any batch, and {lengths}."
    stated = (
        "Temperatures, the weights of a score's parts (chosen on dev), sizes, mean and deviation stand in onnx.json."
    )
    int8_note = ""
    if "int8" in manifest:
        int8_note = (
            "\n`image_tower.int8.onnx` and `text_tower.int8.onnx` give the same arrays with products in 8 bits; what "
            "that costs on dev stands in onnx.json under `int8`.\n"
        )
    unfinished = ""
    if "unfinished" in manifest:
        unfinished = "**Its run was not finished when it was exported: this is the best epoch so far.**"
        unfinished += " Weights of pairs' parts are not chosen yet.\n\n" if "late" in manifest else "\n\n"
    return f"""# An image-caption aligner as ONNX, design `{design}`

{unfinished}{takes} {stated} onnx.json.

```python
{start}{scoring}{_END}```

| array | shape | what it holds |
|---|---|---|
{rows}
{int8_note}"""
