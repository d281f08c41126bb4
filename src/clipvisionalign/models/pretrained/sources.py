"""Where a pretrained dual encoder is: a folder, the hub's local cache, or the hub."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

from clipvisionalign.models.hub import (
    HubUnreachable,
    NoSuchRepository,
    WeightsNotFound,
    has_hub_form,
    is_hub_name,
    snapshot,
    split_revision,
)
from clipvisionalign.models.pretrained import open_clip
from clipvisionalign.models.pretrained.families import (
    KNOWN,
    check_is_dual_encoder,
    is_open_clip_layout,
    load_dual_encoder,
)
from clipvisionalign.models.pretrained.names import hint_for_name
from clipvisionalign.models.pretrained.parts import DualEncoderParts
from clipvisionalign.models.pretrained.transforms import PROCESSOR_FILES
from clipvisionalign.models.run_files import CONFIG_FILE
from clipvisionalign.models.tokenizer import TOKENIZER_FILE_SETS, TOKENIZER_FILES
from clipvisionalign.models.weight_files import choose_weight_files, weights_files
from clipvisionalign.models.weights import WeightsOrigin

#: What is taken from the hub beside the weights, where a repository has it.
_SMALL_FILES = ("config.json", open_clip.CONFIG_FILE, *PROCESSOR_FILES, *TOKENIZER_FILES)

#: Models that people ask for, for whoever mistypes one.
_SUGGESTED = (
    "openai/clip-vit-base-patch32", "openai/clip-vit-base-patch16", "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "facebook/metaclip-b32-400m", "google/siglip-base-patch16-224",
    "google/siglip-so400m-patch14-384", "google/siglip2-base-patch16-224", "google/siglip2-base-patch16-naflex",
    "OFA-Sys/chinese-clip-vit-base-patch16", "apple/DFN5B-CLIP-ViT-H-14",
)  # fmt: skip


def describe_missing(name: str) -> str:
    """What a name that is no folder could have been on the hub, for a message.

    Args:
        name: The name.

    Returns:
        The end of a sentence.
    """
    if hint := hint_for_name(name):
        return f"nor a name of the hub, which has the form OWNER/NAME: {hint}"
    if not has_hub_form(name):
        return "nor a name of the hub, which has the form OWNER/NAME"
    return f"for the hub's model of that name, write hf-hub:{name}, since a folder {name.split('/')[0]} is here"


def open_pretrained(name: str, saved: Path | None = None, load_weights: bool = True) -> tuple[DualEncoderParts, str]:
    """Open a pretrained dual encoder, fetching it where it is not on this machine.

    Args:
        name: A folder, or a hub name, also with @REVISION.
        saved: The files that a run keeps of it, which are read instead, without weights; None for a model as it is. If
            the folder does not exist, `name` is opened.
        load_weights: Whether to read the weights.

    Returns:
        Its parts, and the name with the hub's commit, by which a run is repeated from the same weights.

    Raises:
        WeightsNotFound: There is no such model here or on the hub.
        ValueError: It is a model of another kind, or its files are not whole; see `load_dual_encoder`.
        OSError: A download failed; see `hub.snapshot`.
    """
    if saved is not None and saved.is_dir():
        parts, pinned, origin = load_dual_encoder(saved, load_weights=False), name, WeightsOrigin("files", name)
    else:
        folder, pinned, origin = find_pretrained(name)
        parts = load_dual_encoder(folder, load_weights)
    parts.image_tower.config = replace(parts.image_tower.config, name=pinned)
    parts.text_tower.config = replace(parts.text_tower.config, name=pinned)
    parts.image_tower.origin = parts.text_tower.origin = origin
    return parts, pinned


def find_pretrained(name: str, weights: bool = True) -> tuple[Path, str, WeightsOrigin]:
    """Find a pretrained dual encoder, fetching it where it is not on this machine.

    A model of another kind is refused before its weights are fetched.

    Args:
        name: A folder, or a hub name, also with @REVISION.
        weights: Whether the weights are fetched; else the folder may have its small files alone.

    Returns:
        Its folder, its name with the commit (of a folder its absolute path), and where the weights came from.

    Raises:
        WeightsNotFound: There is no such model here or on the hub.
        HubUnreachable: It is not in the local cache, and the hub may not be asked or does not answer.
        FileNotFoundError: The folder has no config.
        ValueError: It is a model of another kind.
        OSError: A download failed; see `hub.snapshot`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_is_dual_encoder(folder)
        return folder, str(folder.resolve()), WeightsOrigin("files", name, files=_weights_of(folder, weights))
    if hint_for_name(name) or not is_hub_name(name):
        kind = "a file, and no folder" if folder.exists() else "no such folder"
        raise WeightsNotFound(f"{name}: {kind}, {describe_missing(name)}")
    plain, revision = split_revision(name.removeprefix("hf-hub:"), "")
    check = partial(check_is_dual_encoder, source=plain)
    try:
        fetched = snapshot(plain, revision, partial(_choose_files, plain, weights), check=check)
    except WeightsNotFound as error:
        raise explain_missing(plain, error) from None
    files = _weights_of(fetched.folder, weights)
    origin = WeightsOrigin("hub", name, fetched.repository, fetched.revision, fetched.licence, files)
    # With its prefix the name is the hub's wherever it is read again, whatever folders are there.
    prefix = "hf-hub:" if name.startswith("hf-hub:") else ""
    return fetched.folder, f"{prefix}{plain}@{fetched.revision}", origin


def explain_missing(name: str, error: WeightsNotFound) -> WeightsNotFound:
    """The error for a name that is no folder, and could not be fetched either.

    Args:
        name: The name, without a revision.
        error: Why it could not be fetched.

    Returns:
        The error with what can be done; `error` itself where it names that.
    """
    if isinstance(error, HubUnreachable):
        return HubUnreachable(
            f"{name}: no such folder, no such model in the hub's local cache, and {error}. What can be done: give the "
            "path of a run folder or of the model's folder, or run this once where the hub can be reached."
        )
    if isinstance(error, NoSuchRepository):
        hint = NoSuchRepository(error.name, error.hub, difflib.get_close_matches(name, _SUGGESTED, 3))
        return WeightsNotFound(f"no folder '{name}' is here, and as a name of the hub, {hint}")
    return error


def _weights_of(folder: Path, wanted: bool) -> tuple[Path, ...]:
    """The files with the weights in the folder of a dual encoder, if they are wanted. Raises WeightsNotFound."""
    if not wanted:
        return ()
    names = [path.name for path in folder.iterdir()]
    return (open_clip.weight_file(folder),) if is_open_clip_layout(names) else tuple(weights_files(folder))


def _choose_files(repository: str, weights: bool, names: Collection[str]) -> list[str]:
    """The files of a dual encoder, by a repository's names; the weights, if they are wanted, last."""
    chosen = _choose_all_files(repository, names)
    return chosen if weights else [name for name in chosen if name in _SMALL_FILES]


def _choose_all_files(repository: str, names: Collection[str]) -> list[str]:
    small = [name for name in _SMALL_FILES if name in names]
    if is_open_clip_layout(names):
        weights = next((name for name in open_clip.WEIGHT_FILES if name in names), None)
        if weights is None:
            raise WeightsNotFound(
                f"{repository}: has {open_clip.CONFIG_FILE}, and none of {', '.join(open_clip.WEIGHT_FILES)}"
            )
        # Beside config.json they would make the folder one in transformers' layout.
        return [*(name for name in small if name not in PROCESSOR_FILES), weights]
    if CONFIG_FILE in names and "config.json" not in names:
        raise WeightsNotFound(
            f"{repository}: holds a run of this project, and no pretrained dual encoder: a training starts from it by "
            f"--init {repository}"
        )
    if "config.json" not in names:
        raise WeightsNotFound(f"{repository}: has neither config.json nor {open_clip.CONFIG_FILE}; known are {KNOWN}")
    weight_files = choose_weight_files(repository, names)
    if not any(wanted <= set(names) for wanted in TOKENIZER_FILE_SETS):
        raise WeightsNotFound(f"{repository}: no tokenizer: none of {', '.join(TOKENIZER_FILES[3:])} is there")
    if not set(PROCESSOR_FILES) & set(names):
        raise WeightsNotFound(
            f"{repository}: no {PROCESSOR_FILES[0]}, so how the model takes images is not known; copy the repository's "
            "files into a folder, add the publisher's, and give the folder"
        )
    return [*small, *weight_files]
