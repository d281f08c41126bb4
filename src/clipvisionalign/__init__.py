"""CLIPVisionAlign: train image-caption aligners, compare attention designs, search images, audit retrieval figures.

    >>> from clipvisionalign import load_aligner                              # doctest: +SKIP
    >>> aligner = load_aligner("runs/self")                                   # doctest: +SKIP
    >>> aligner.score(["a.jpg", "b.jpg"], ["a dog on the grass"])             # doctest: +SKIP

Nothing heavy is imported here: torch and the model libraries load when a name below is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Aligner",
    "Callback",
    "CaptionedImages",
    "RunConfig",
    "Trainer",
    "__version__",
    "load_aligner",
    "read_captioned_images",
    "train",
]

if TYPE_CHECKING:
    from clipvisionalign.data.captioned import CaptionedImages
    from clipvisionalign.data.formats import read_captioned_images
    from clipvisionalign.models.aligner import Aligner
    from clipvisionalign.models.io import load_aligner
    from clipvisionalign.training.callbacks import Callback
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train
    from clipvisionalign.training.trainer import Trainer

_HOMES = {
    "Aligner": "clipvisionalign.models.aligner",
    "load_aligner": "clipvisionalign.models.io",
    "CaptionedImages": "clipvisionalign.data.captioned",
    "read_captioned_images": "clipvisionalign.data.formats",
    "Callback": "clipvisionalign.training.callbacks",
    "RunConfig": "clipvisionalign.training.config",
    "Trainer": "clipvisionalign.training.trainer",
    "train": "clipvisionalign.training.train",
}


def _install_deprecated_names() -> None:
    import json
    from pathlib import Path

    from clipvisionalign.deprecated import install_deprecated_names

    names, members = (
        json.loads(Path(__file__).with_name(f"deprecated_{table}.json").read_text(encoding="utf-8"))
        for table in ("names", "members")
    )
    install_deprecated_names(names, members)


_install_deprecated_names()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipvisionalign' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
