"""A run as a folder for the Hugging Face hub, with its model card; `load_aligner` reads it back."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from clipvisionalign.export.audits import audits_of, is_of_unknown_model
from clipvisionalign.export.folders import export_folder
from clipvisionalign.json_io import read_json
from clipvisionalign.models.aligner_config import read_recorded_settings
from clipvisionalign.models.hub import is_hub_name
from clipvisionalign.models.io import is_pretrained
from clipvisionalign.models.pretrained.known_checkpoints import base_checkpoint, pretraining_of
from clipvisionalign.models.run_files import ADAPTERS_FILE, MODEL_FOLDERS, WEIGHTS_FILE
from clipvisionalign.models.run_names import display_name, resolve_run


def export_huggingface(run: str | Path, out: str | Path) -> Path:
    """Write a folder for the Hugging Face hub: model, settings, tokenizer and a model card.

    `load_aligner` reads it back. Nothing is uploaded.

    Args:
        run: The folder of a finished run.
        out: The folder to write.

    Returns:
        The folder.

    Raises:
        FileExistsError: `out` is not empty.
        FileNotFoundError: It is no finished run.
        Held: Another process exports to `out`.
    """
    source = Path(resolve_run(run))
    if not (source / "results.json").is_file():
        if is_pretrained(run):
            raise FileNotFoundError(
                f"{run}: a pretrained model, of which there are no figures for a card: --transformers or --open-clip "
                "writes it as it is; for a card, measure it first: clipvisionalign train DATA --model.pretrained "
                f"{run} --epochs 0"
            )
        raise FileNotFoundError(f"{run}: not a finished run: no results.json in it")
    if not (source / "data.json").is_file():
        raise FileNotFoundError(
            f"{display_name(source)}: has no data.json, so the data that it was trained on are unknown, as those of a "
            "published run are, and there is no card of it: give the folder that 'clipvisionalign train' wrote"
        )
    with export_folder(out) as aside:
        (aside / "README.md").write_text(model_card(source), encoding="utf-8")
        for name in (WEIGHTS_FILE, ADAPTERS_FILE, "config.yaml", "results.json", "environment.json", "weights.json"):
            if (source / name).is_file():
                shutil.copy(source / name, aside / name)
        for name in MODEL_FOLDERS:
            if (source / name).is_dir():
                shutil.copytree(source / name, aside / name)
    return Path(out)


def _interval(estimate: dict[str, Any], factor: float = 1.0) -> str:
    """A figure with its 95% interval, or alone where none was computed."""
    low, high = estimate.get("low"), estimate.get("high")
    value_text = f"{factor * estimate['value']:.1f}"
    return value_text if low is None or high is None else f"{value_text} [{factor * low:.1f}, {factor * high:.1f}]"


def model_card(run: Path) -> str:
    """The model card of a run, from the template `model_card.md`: the model, its training data, figures with intervals,
    audits, limits.

    Args:
        run: The folder of a finished run.

    Returns:
        Markdown with a YAML header, as the Hugging Face hub reads it.
    """
    import yaml
    from huggingface_hub import ModelCard, ModelCardData

    results = json.loads((run / "results.json").read_text())
    data = json.loads((run / "data.json").read_text())
    model = read_recorded_settings(yaml.safe_load((run / "config.yaml").read_text())["model"])
    metrics = results.get("reranked", results)
    # Results from before chance was recorded have none.
    chance = results.get("chance", {})
    selection_note = results.get("chosen", {}).get("figures", "in-sample: what was chosen on dev is measured on it")
    # Its path is of this machine; that it is another data set is what counts.
    dev_origin = (
        "another data set than trained on" if data.get("dev_source") else f"the training data ({data['layout']})"
    )
    own_audit, other_audits = audits_of(run)
    pretraining = pretraining_of(run)
    card_data = ModelCardData(
        library_name="clipvisionalign",
        pipeline_tag="zero-shot-image-classification",
        tags=["image-text-retrieval", model["design"]],
        base_model=base_checkpoint(run) or None,
        license=_licence_of_base(run) or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_str=files("clipvisionalign.export").joinpath("model_card.md").read_text(encoding="utf-8"),
        model=model,
        pretraining=None if pretraining is None else pretraining.to_dict(),
        text_tower=Path(str(model["text_tower"].get("name", ""))).name,
        width=model.get("width") or _own_width(run),
        blend=_blend_of(results),
        data=data,
        dev_origin=dev_origin,
        selection_note=selection_note[0].upper() + selection_note[1:],
        rsum=_interval(metrics["rsum"]),
        chance_rsum=chance.get("rsum"),
        rows=_figure_rows(metrics, chance),
        own_audit=own_audit,
        other_audits=other_audits,
        audit_of_unknown_model=is_of_unknown_model(run),
    )
    return f"{card.content}\n"


def _own_width(run: Path) -> int | None:
    """The width of a pretrained model that kept its own; None where a run of before did not record it."""
    path = run / "weights.json"
    recorded = read_json(path).get("common_space", {}) if path.is_file() else {}
    return recorded.get("width")


def _blend_of(results: dict[str, Any]) -> dict[str, Any] | None:
    """Between which models the weights of a blended run are; None for a run whose weights are trained ones."""
    blend = results.get("blend")
    if blend is None:
        return None
    base = str(blend["base"])
    # A path is of this machine.
    return {"alpha": blend["alpha"], "base": base if is_hub_name(base) else Path(base).name}


def _licence_of_base(run: Path) -> str:
    """The licence of the pretrained model that a run started from, as its repository states it; "" for none."""
    path = run / "weights.json"
    towers = read_json(path) if path.is_file() and pretraining_of(run) is not None else {}
    return next((str(tower["licence"]) for tower in towers.values() if tower.get("licence")), "")


def _figure_rows(metrics: dict[str, Any], chance: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table of figures: direction, name, value with its interval, chance ("" if unknown)."""
    rows = []
    for direction in ("image_to_text", "text_to_image"):
        for name, estimate in metrics[direction].items():
            factor = 100 if name.startswith(("recall", "map")) else 1
            by_chance = f"{100 * chance[direction][name]:.1f}" if name in chance.get(direction, {}) else ""
            rows.append((direction.replace("_", " "), name.replace("_", " "), _interval(estimate, factor), by_chance))
    return rows
