"""A run as adapters: a run folder of a few megabytes, for whoever has its towers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from clipvisionalign.data.training_images import TRAINED_ON_FILE, TrainedOnImages
from clipvisionalign.export.folders import export_folder, target_folder
from clipvisionalign.json_io import read_json, write_json
from clipvisionalign.models.adapters import make_adapters, save_adapters
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.aligner_config import recorded_settings
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.run_files import ADAPTERS_FILE, CONFIG_FILE
from clipvisionalign.models.run_names import resolve_run

#: Settings of a run that are locations on the machine where it was trained.
_PATH_SETTINGS = ("data", "dev_data", "out", "init", "cache")

#: Captions of which both models' vectors are compared.
_CAPTIONS = ("a dog runs on the grass", "two children in a red boat", "a man", "a street at night, with people")


def export_adapters(run: str | Path, out: str | Path, rank: int = 16, megabytes: float | None = None) -> dict[str, Any]:
    """Write what a run's weights differ by from its towers' own as low-rank adapters.

    The folder is a run folder: `load_aligner` merges the adapters with the towers by name. It has no path of the
    machine that it was trained on, and of the training images their names and hashes alone.

    Args:
        run: A finished run with towers by name.
        out: The folder to write.
        rank: Highest rank of an adapter, in half precision; a run with LoRA of this rank or below loses nothing by it.
        megabytes: Size of the weights' file, at most, in the place of `rank`: the adapters have 8 bits, and the ranks
            with which the least is lost.

    Returns:
        "bytes" of the weights, "error", the largest relative error of a matrix's difference, and "cosine", the lowest
        between a caption's vector by the run and by the folder.

    Raises:
        FileExistsError: `out` is not empty.
        FileNotFoundError: `run` is no run folder.
        ValueError: It started from a pretrained dual encoder or from random weights, `rank` is below 1, or what is
            stored whole takes more than `megabytes`.
        Held: Another process exports to `out`.
    """
    target_folder(out)
    if rank < 1:
        raise ValueError(f"--rank should be at least 1, not {rank}")
    if megabytes is not None and not megabytes > 0:
        raise ValueError(f"--megabytes should be above 0, not {megabytes:g}")
    source = Path(resolve_run(run))
    tuned = load_aligner(source, "cpu", packed=False)
    config = tuned.config
    if config.pretrained or "random" in (config.image_tower.weights, config.text_tower.weights):
        kind = "a pretrained dual encoder" if config.pretrained else "random weights"
        raise ValueError(
            f"{run}: it started from {kind}; adapters are written of runs with two towers by name: use --huggingface"
        )
    base = Aligner(config).state_dict()
    max_bytes = None if megabytes is None else round(megabytes * 1e6)
    try:
        tensors, errors = make_adapters(tuned.state_dict(), base, rank, max_bytes)
    except ValueError as error:
        raise ValueError(f"--megabytes {megabytes:g}: {error}") from None
    with export_folder(out) as aside:
        save_adapters(aside, tensors, base)
        _write_records(source, aside, recorded_settings(config))
        reopened = load_aligner(aside, "cpu", packed=False)
        cosines = (tuned.encode_captions(_CAPTIONS) * reopened.encode_captions(_CAPTIONS)).sum(1)
        size = (aside / ADAPTERS_FILE).stat().st_size
    return {"bytes": size, "error": max(errors.values(), default=0.0), "cosine": float(cosines.min())}


def _write_records(source: Path, target: Path, model: dict[str, Any]) -> None:
    """The settings, the figures and the data of a run, without locations on a machine."""
    settings = yaml.safe_load((source / CONFIG_FILE).read_text(encoding="utf-8"))
    kept = _without(settings, _PATH_SETTINGS) | {"model": model}
    (target / CONFIG_FILE).write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")
    for name, locations in {"results.json": ("run", "data"), "data.json": ("source", "dev_source")}.items():
        if (source / name).is_file():
            write_json(target / name, _without(read_json(source / name), locations))
    if (source / TRAINED_ON_FILE).is_file():
        record = TrainedOnImages.load(source / TRAINED_ON_FILE, marks=False)
        # Without thumbnails, which are parts of the images.
        TrainedOnImages(record.names, record.digests, []).save(target / TRAINED_ON_FILE)


def _without(record: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in json.loads(json.dumps(record)).items() if name not in names}
