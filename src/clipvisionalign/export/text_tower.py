"""Writing the text tower of an aligner as ONNX, for searches by words without PyTorch (`onnx_text.py` runs it)."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.batch import TokenGroup
from clipvisionalign.export.graphs import CaptionExport, fixed_length, random_tokens, without_fast_path
from clipvisionalign.export.onnx_text import (
    LATE_OUTPUTS,
    TEXT_FORMAT,
    TEXT_GRAPH,
    TEXT_MANIFEST,
    TEXT_TOKENIZER,
    OnnxTextTower,
    tokenize_padded,
)
from clipvisionalign.export.onnx_tokenizer import write_tokenizer
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.longformer import Longformer
from clipvisionalign.models.pretrained import PretrainedTextTower
from clipvisionalign.models.pretrained.open_clip_towers import OpenClipTextTower

logger = logging.getLogger(__name__)

#: How far a number of an exported vector may be from PyTorch's.
TEXT_TOLERANCE = 1e-4
#: Captions by which an exported text tower is compared with PyTorch: short, long, cut, in other scripts, of odd marks.
CAPTION_SAMPLES = (
    "a dog on the grass", "red", "Zwölf  Boxkämpfer, jagen!", "\u72ac \U0001f415 e\u0301 it\u2019s", "",
    "two children in front of a swing, one of them with a red and white ball & a hat", "the dog sees a cat " * 11,
    "word " * 500,
)  # fmt: skip


class CaptionVectors(nn.Module):
    """The text tower as a graph of vectors alone.

    Args:
        aligner: The model.
    """

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode captions.

        Args:
            ids: (M, T) token ids.
            mask: (M, T) 1 on tokens, 0 on padding.

        Returns:
            Vectors (M, D), unit length.
        """
        group = TokenGroup(ids, mask, torch.empty(0, dtype=torch.long))
        return self.aligner.embed_caption_group(group).vectors


def describe_captions(aligner: Aligner) -> dict[str, Any]:
    """What the tokenizer of an export needs beside tokenizer.json.

    Args:
        aligner: The model.

    Returns:
        "max_tokens", "truncation_side" and "pad"; for captions of a fixed length "padded_to" and "padding_side".
    """
    tower = aligner.text_tower
    described: dict[str, Any] = {
        "max_tokens": tower.max_tokens,
        "truncation_side": getattr(tower.tokenizer, "truncation_side", "right"),
        "pad": tower.pad,
    }
    if isinstance(tower, PretrainedTextTower) and tower.fixed_length:
        described |= {"padded_to": tower.max_positions, "padding_side": tower.tokenizer.padding_side}
    return described


def check_text_export(aligner: Aligner, run: str | Path) -> None:
    """Check that a text tower has a form in ONNX.

    Args:
        aligner: The model.
        run: Its name, for the message.

    Raises:
        ValueError: It is a Longformer.
    """
    if isinstance(aligner.text_tower.encoder, Longformer):
        # How many of its tokens are global depends on the batch.
        raise ValueError(
            f"{run}: Longformer is not exported to ONNX; sliding windows over another text tower are, such as "
            "--model.design sparse --model.text_tower.name distilbert-base-uncased"
        )


def write_text_tower(aligner: Aligner, fingerprint: str, folder: Path) -> dict[str, Any]:
    """Write the text tower of an aligner as ONNX, and compare it with PyTorch.

    Args:
        aligner: The model, on the CPU, its weights not packed.
        fingerprint: Of the aligner, which the manifest records.
        folder: Where the files are written.

    Returns:
        The manifest: the content of text.json.

    Raises:
        ValueError: The text tower has no form in ONNX.
        RuntimeError: What was exported differs from what PyTorch computes.
        ModuleNotFoundError: onnx, onnxruntime or tokenizers is not installed.
    """
    check_text_export(aligner, aligner.text_tower.config.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(aligner.text_tower, folder / "whole")
    (folder / "whole" / TEXT_TOKENIZER).replace(folder / TEXT_TOKENIZER)
    for file in (folder / "whole").iterdir():
        file.unlink()
    (folder / "whole").rmdir()
    manifest = {
        "format": TEXT_FORMAT, "aligner": fingerprint, "design": aligner.config.design,
        "reranks": aligner.late is not None, "width": aligner.width, **describe_captions(aligner),
    }  # fmt: skip
    if aligner.late_scales is not None:
        manifest["late"] = dict(zip(("scale", "late_scale"), aligner.late_scales, strict=True))
    if isinstance(aligner.text_tower, OpenClipTextTower):
        manifest["cleaning"] = "open_clip"
    (folder / TEXT_MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    manifest["difference"] = _write_graph(aligner, folder)
    manifest["bytes"] = sum((folder / name).stat().st_size for name in (TEXT_GRAPH, TEXT_TOKENIZER))
    (folder / TEXT_MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _write_graph(aligner: Aligner, folder: Path) -> float:
    """Write the graph; how far its vectors are from PyTorch's.

    Tracing takes a tenth of the time of `torch.export` and fixes what depends on the number of tokens: where that shows
    in the comparison, the tower is exported again.
    """
    difference = float("inf")
    for trace in (True, False):
        try:
            _export_graph(_graph_module(aligner), aligner, folder / TEXT_GRAPH, trace)
            difference = _difference(aligner, folder)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            if not trace:
                raise
            logger.debug(f"the text tower is not traced: {error}")
        if difference <= TEXT_TOLERANCE:
            return difference
    raise RuntimeError(
        f"what is exported of {aligner.text_tower.config.name} differs from PyTorch's by {difference:.2g}"
    )


def _graph_module(aligner: Aligner) -> nn.Module:
    """What is exported: vectors, and for late interaction alone what pairs are scored with."""
    return CaptionVectors(aligner) if aligner.late_scales is None else CaptionExport(aligner)


def _export_graph(module: nn.Module, aligner: Aligner, path: Path, trace: bool) -> None:
    """Write the graph of one module for any number of captions and tokens; trace: by TorchScript's exporter."""
    fixed = fixed_length(aligner)
    example = random_tokens(aligner, 3, fixed or min(9, aligner.text_tower.max_tokens))
    outputs = ["vectors", *(() if aligner.late_scales is None else LATE_OUTPUTS)]
    names: dict[str, Any] = {"input_names": ["ids", "mask"], "output_names": outputs}
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), torch.no_grad(), without_fast_path():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            if trace:
                axes = {0: "batch", **({} if fixed else {1: "length"})}
                shapes = {"ids": axes, "mask": axes, "vectors": {0: "batch"}} | dict.fromkeys(outputs[1:], axes)
                torch.onnx.export(module.eval(), example, str(path), dynamo=False, dynamic_axes=shapes, **names)
                return
            batch = torch.export.Dim("batch", min=1, max=4096)
            length = {} if fixed else {1: torch.export.Dim("length", min=2, max=aligner.text_tower.max_tokens)}
            torch.onnx.export(
                module.eval(), example, str(path), dynamo=True, dynamic_shapes=({0: batch, **length},) * 2,
                external_data=False, verbose=False, **names,
            )  # fmt: skip
        finally:
            logging.getLogger("torch.onnx").setLevel(level)


def _difference(aligner: Aligner, folder: Path, samples: Sequence[str] = CAPTION_SAMPLES) -> float:
    """The largest difference of a number of a vector, over captions alone and together.

    Raises RuntimeError where the tokenizers differ.
    """
    exported = OnnxTextTower(folder)
    for text in samples:
        ids, mask = tokenize_padded(exported.tokenizer, [exported.clean(text)])
        expected = list(aligner.text_tower.tokenize([text])[0])
        if ids[0].tolist() != expected and ids[0][mask[0] > 0].tolist() != expected:
            raise RuntimeError(f"the exported tokenizer reads {text[:40]!r} otherwise than the model's own")
    texts = [text for text in samples if text]
    vectors = aligner.encode_captions(texts).cpu().numpy()
    alone = np.concatenate([exported.encode_captions([text]) for text in texts])
    differences = [np.abs(alone - vectors).max(), np.abs(exported.encode_captions(texts) - vectors).max()]
    # Lengths that the samples may lack, in other batches.
    fixed = fixed_length(aligner)
    with torch.no_grad(), without_fast_path():
        for count, length in ((1, fixed or 2), (2, fixed or 3), (5, fixed or 17), (33, fixed or 40)):
            tokens = random_tokens(aligner, count, min(length, aligner.text_tower.max_tokens), seed=count)
            inputs = dict(zip(("ids", "mask"), (each.numpy() for each in tokens), strict=True))
            expected_outputs = _graph_module(aligner.eval())(*tokens)
            for graph, output in zip(
                exported.session.run(None, inputs),
                [expected_outputs] if isinstance(expected_outputs, Tensor) else expected_outputs,
                strict=True,
            ):
                differences.append(np.abs(graph - output.numpy()).max())
    return float(np.max(differences)) if np.isfinite(differences).all() else float("inf")
