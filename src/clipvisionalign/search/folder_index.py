"""Indexes without a run that is named: which model encodes them, and where that of a served folder is kept.

PyTorch is imported where something is encoded: `serve` of an index does without.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from clipvisionalign.files import user_cache_folder
from clipvisionalign.models.run_files import is_run_folder
from clipvisionalign.search.manifest import aligner_fingerprint, has_index, read_manifest, read_shards
from clipvisionalign.search.storage import InvalidIndexError, printable
from clipvisionalign.starter import INSTALL_HINT, STARTER, StarterNotInstalled, is_installed, is_starter

logger = logging.getLogger(__name__)

#: Beginning of what may be a name in the cache: the letters, digits and signs of a folder's name that any disk takes.
_MAX_SLUG = 40


def default_run(source: str, out: str) -> str:
    """The model that encodes images where none is named.

    Args:
        source: What is to be indexed, as it was given.
        out: The index that is to be written or updated.

    Returns:
        The model of the index that is there already; else `starter`.

    Raises:
        StarterNotInstalled: A new index would be encoded by the starter model, which is not installed.
        FileNotFoundError: `source` is not there.
        ValueError: `source` is a model, and no images are named.
    """
    _check_is_no_model(source)
    if has_index(out):
        run = (read_shards(out) or read_manifest(out)).run
        logger.info(f"{printable(str(out))}: updated with the model that it was made with, {printable(run)}")
        return run
    _require_starter(f"clipvisionalign index RUN {source} --out {out}")
    logger.info("no run is named: the starter model encodes ('clipvisionalign index RUN FOLDER' takes another)")
    return STARTER


def _check_is_no_model(source: str) -> None:
    """Raises ValueError for a run or a pretrained model, FileNotFoundError for what is not there."""
    from clipvisionalign.models.io import is_pretrained

    path, way_out = Path(source), f"clipvisionalign index {source} FOLDER --out INDEX"
    if "://" in source or path.is_file():
        return
    has_weights = path.is_dir() and any(each.suffix in (".safetensors", ".bin") for each in path.iterdir())
    if is_run_folder(path) or (has_weights and is_pretrained(source)):
        raise ValueError(f"{source}: a model, and no images: {way_out}")
    if path.is_dir():
        return
    if is_starter(source) or is_pretrained(source):
        raise FileNotFoundError(f"{source}: no such folder of images; if it is a model, name the images: {way_out}")
    raise FileNotFoundError(f"{source}: no such folder of images")


def _require_starter(way_out: str) -> None:
    if not is_installed():
        raise StarterNotInstalled(
            f"no run is named, and the starter model is not installed: {INSTALL_HINT}; or name a run: {way_out}"
        )


def is_image_folder(name: str) -> bool:
    """Whether a name is a folder of this machine that holds no index.

    Args:
        name: A path or a URL.

    Returns:
        Whether it is one.

    Raises:
        InvalidIndexError: It is a run folder.
    """
    folder = Path(name)
    if "://" in name or not folder.is_dir() or has_index(folder):
        return False
    if is_run_folder(folder):
        raise InvalidIndexError(
            f"{name}: a run, and no index: 'clipvisionalign index {name} FOLDER --out INDEX' makes one"
        )
    return True


def index_folder(folder: str, run: str = "") -> Path:
    """Make an index of a folder of images in the user's cache folder, or bring it up to date.

    Args:
        folder: The folder.
        run: The model that encodes; "" for the starter model.

    Returns:
        The index; another one for every folder and every model.

    Raises:
        StarterNotInstalled: No run is named, and the starter model is not installed.
        DataError: There is no image in the folder.
        InvalidIndexError: Too many of its rows would be dropped, or it cannot be written.
    """
    from clipvisionalign.models.io import resolve_model
    from clipvisionalign.search.indexer import build_index

    if not run:
        _require_starter(f"clipvisionalign serve {folder} --run RUN")
    run, source = run or STARTER, Path(folder).resolve()
    key = "\0".join([str(source), resolve_model(run), aligner_fingerprint(run)])
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).strip("-.")[:_MAX_SLUG]
    out = user_cache_folder() / "indexes" / f"{slug or 'images'}-{digest}"
    model = "the starter model" if run == STARTER else run
    logger.info(f"{printable(str(source))}: indexed with {model} in {printable(str(out))}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        build_index(run, source, out)
    except InvalidIndexError as error:
        if "--allow-drop" not in str(error):
            raise
        command = f"clipvisionalign index {folder} --out {out} --allow-drop"
        raise InvalidIndexError(f"{error}: {command}") from None
    return out
