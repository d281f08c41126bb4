"""A run as ONNX for onnxruntime.

The ONNX files take any batch and any length, hold all that the design's scores are made of, and are checked against
PyTorch before they are left. Beside them lie the tokenizer and what the images have to look like: onnxruntime,
tokenizers, Pillow and NumPy are all that is needed.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from clipvisionalign.data.run_data import unfinished_note
from clipvisionalign.export.folders import export_folder, target_folder
from clipvisionalign.export.graphs import write_graphs
from clipvisionalign.export.onnx_aligner import ABOUT
from clipvisionalign.export.onnx_pixels import describe_pixels
from clipvisionalign.export.onnx_readme import render_readme
from clipvisionalign.export.onnx_tokenizer import write_tokenizer
from clipvisionalign.export.quantization import int8_loss, quantize
from clipvisionalign.export.text_tower import check_text_export, describe_captions
from clipvisionalign.export.verification import verify_export
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.pretrained.transforms import PatchTransform
from clipvisionalign.models.run_names import resolve_run

logger = logging.getLogger(__name__)


def export_onnx(run: str | Path, out: str | Path, int8: bool = False, data: str | Path = "") -> dict[str, Any]:
    """Write the towers of a run, and its fusion, as ONNX into a new folder.

    The graphs are compared with PyTorch before they are left; after an error nothing is left.

    Args:
        run: A run folder, or a pretrained dual encoder.
        out: The folder to write.
        int8: Whether towers with 8-bit products are written too, and what they lose is measured on a dev split.
        data: The data set of that split; "" for the one that the run was trained on, if it is there.

    Returns:
        What onnx.json holds.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: The model cannot be exported: Longformer, NaFlex, or a tokenizer without tokenizer.json.
        RuntimeError: What was exported differs from what PyTorch computes.
        Held: Another process exports to `out`.
    """
    target_folder(out)
    run = resolve_run(run)
    aligner = load_aligner(run, "cpu", packed=False)
    check_text_export(aligner, run)
    if isinstance(aligner.image_tower.image_transform, PatchTransform):
        # Its table of positions is resized for each image by itself.
        raise ValueError(
            f"{run}: a model that takes images of any shape (NaFlex) is not exported to ONNX; --transformers writes it"
        )
    with export_folder(out) as aside:
        manifest = _about(aligner, run)
        if "unfinished" in manifest:
            logger.info(f"note: {manifest['unfinished']}")
        # First what may be refused, then what takes long.
        write_tokenizer(aligner.text_tower, aside / "tokenizer")
        write_graphs(aligner, aside)
        _write_manifest(aside, manifest)
        manifest["difference"] = verify_export(aligner, aside)
        if int8:
            manifest["int8"] = {"files": quantize(aside)}
            manifest["int8"] |= int8_loss(aside, Path(run), data)
        _write_manifest(aside, manifest)
        (aside / "README.md").write_text(render_readme(manifest), encoding="utf-8")
    return manifest


def _about(aligner: Aligner, run: str | Path) -> dict[str, Any]:
    """What onnx.json holds of the model itself."""
    image_transform, late, fusion = aligner.image_tower.image_transform, aligner.late, aligner.fusion
    unfinished = unfinished_note(run)
    manifest: dict[str, Any] = {
        **({"unfinished": unfinished} if unfinished else {}),
        "run": str(run),
        "design": aligner.config.design,
        "width": aligner.width,
        "pixels": describe_pixels(image_transform),
        **describe_captions(aligner),
        "temperature": 1 / aligner.scale().item(),
    }
    if late is not None:
        manifest["late"] = {
            "temperature": 1 / late.scale().item(), "weight": late.weight.item(), "keep_tokens": late.config.keep_tokens
        }  # fmt: skip
    if fusion is not None:
        manifest["fusion"] = {"weight": fusion.weight.item(), "candidates": aligner.config.fusion.candidates}
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / ABOUT).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
