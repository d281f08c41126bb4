"""Towers with 8-bit products, and their loss on a dev split."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.run_data import read_data_of_run
from clipvisionalign.export.onnx_aligner import CAPTIONS, IMAGES, OnnxAligner
from clipvisionalign.retrieval import rsum_gain
from clipvisionalign.retrieval.evaluate import evaluate

logger = logging.getLogger(__name__)


def quantize(folder: Path) -> list[str]:
    """Write towers with 8-bit products beside the exact ones; convolutions stay exact.

    Args:
        folder: The folder of the export.

    Returns:
        Names of the files.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = []
    for name in (IMAGES, CAPTIONS):
        out = name.replace(".onnx", ".int8.onnx")
        # Products only: convolutions in 8 bits are slower on most CPUs, and lose more.
        quantize_dynamic(
            folder / name,
            folder / out,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"],
        )
        made.append(out)
    return made


def int8_loss(folder: Path, run: Path, data: str | Path) -> dict[str, Any]:
    """Measure what 8-bit towers lose on a dev split, ranked as the design ranks.

    Args:
        folder: The folder of the export, with both kinds of towers.
        run: The run folder, by whose splits and identities the data is read.
        data: The data set; "" for the one that the run was trained on.

    Returns:
        "rsum", "exact_rsum" and their paired difference "rsum_change", each with its interval; or "not measured" with
        the reason, where the run's own data is not there.

    Raises:
        ValueError: `data` is given and cannot be read.
    """
    try:
        dev = read_data_of_run(run, data, split="dev").split("dev")
    except ValueError as error:
        if data:
            raise
        logger.info(f"what the 8-bit towers lose is not measured: {error}; give the data set with --data")
        return {"not measured": str(error)}
    logger.info(f"measuring 8-bit towers on {len(dev):,} dev images and {len(dev.captions):,} captions ...")
    exact, small = (_evaluate_export(OnnxAligner(folder, int8=is_small), dev) for is_small in (False, True))
    change = rsum_gain(small.ranks, exact.ranks, dev.caption_image, unit=dev.image_identity)
    return {"rsum": small.rsum.to_dict(), "exact_rsum": exact.rsum.to_dict(), "rsum_change": change.to_dict()}


def _evaluate_export(model: OnnxAligner, dev: CaptionedImages) -> Any:
    model.show_progress = True
    candidates = model.manifest.get("fusion", {}).get("candidates", 0)
    return evaluate(
        model, dev.images, dev.captions, dev.caption_image, dev.image_identity, candidates,
        caption_group=dev.shared_text_ids,
    ).metrics  # fmt: skip
