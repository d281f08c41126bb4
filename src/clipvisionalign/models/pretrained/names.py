"""Names by which pretrained models are asked for in vain, and what was meant."""

from __future__ import annotations

import re
from pathlib import Path

#: The names of OpenAI's own package and of open_clip, without case and with - for /, and what the hub calls them.
_HUB_NAMES = {
    "vit-b-32": "openai/clip-vit-base-patch32",
    "vit-b-16": "openai/clip-vit-base-patch16",
    "vit-l-14": "openai/clip-vit-large-patch14",
    "vit-l-14@336px": "openai/clip-vit-large-patch14-336",
    "vit-l-14-336": "openai/clip-vit-large-patch14-336",
    "vit-h-14": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "vit-b-16-siglip": "google/siglip-base-patch16-224",
    "vit-so400m-14-siglip-384": "google/siglip-so400m-patch14-384",
}

#: Endings of the files in a model's folder.
_MODEL_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json", ".model", ".yaml")


def hint_for_name(name: str) -> str:
    """What to write instead of a name that no model has.

    Args:
        name: What was given as a model's name.

    Returns:
        The hint, for a message; "" for a name that a model may have.

    >>> hint_for_name("ViT-B/32")
    "that is the name in OpenAI's own package or in open_clip; on the hub it is openai/clip-vit-base-patch32"
    >>> hint_for_name("https://huggingface.co/google/siglip-base-patch16-224/tree/main")
    'an address: write google/siglip-base-patch16-224'
    """
    path, plain = Path(name).expanduser(), name.removeprefix("hf-hub:")
    if path.is_dir():
        return ""
    if address := re.match(r"https?://([^/]+)/(.*)", as_given(name)):
        parts = [part for part in address[2].partition("?")[0].split("/") if part]
        if address[1].removeprefix("www.") in ("huggingface.co", "hf.co") and len(parts) >= 2:
            revision = f"@{parts[3]}" if parts[2:3] in (["tree"], ["blob"], ["resolve"]) and len(parts) > 3 else ""
            return f"an address: write {parts[0]}/{parts[1]}{'' if revision == '@main' else revision}"
        return "an address: give the model's name on the hub, OWNER/NAME, or a folder"
    if known := _HUB_NAMES.get(plain.lower().replace("/", "-")):
        return f"that is the name in OpenAI's own package or in open_clip; on the hub it is {known}"
    if plain.endswith("@"):
        return f"a branch, a tag or a commit should follow the @; leave it out for the main branch: {plain[:-1]}"
    if path.is_file() and path.suffix in _MODEL_FILES:
        return f"a file: give the folder that it is in, {path.parent}"
    return ""


def as_given(name: str) -> str:
    """A name as it was given, whose two slashes behind a protocol a path has made one.

    Args:
        name: A name that may have been a path.

    Returns:
        The name.

    >>> as_given("https:/huggingface.co/google/siglip-base-patch16-224")
    'https://huggingface.co/google/siglip-base-patch16-224'
    """
    return re.sub(r"^(https?):/(?!/)", r"\1://", name)
