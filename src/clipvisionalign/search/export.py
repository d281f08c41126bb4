"""An aligner for use elsewhere: as ONNX, or a folder as Hugging Face's hub has them, with its model card.

The ONNX files take any batch and any length, hold all that the design's scores are made of, and are checked against
PyTorch before they are left. Beside them lie the tokenizer and what the images have to look like: onnxruntime,
tokenizers, Pillow and NumPy are all that is needed.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.batch import TokenGroup
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.of_run import read_data_of_run, unfinished_note
from clipvisionalign.files import files_written_aside, folders_above
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.heads import CaptionStates
from clipvisionalign.models.io import load_aligner
from clipvisionalign.models.late_interaction import pruned_weights
from clipvisionalign.models.longformer import Longformer
from clipvisionalign.models.pair_scorer import EncodedCaption, EncodedImages, PairScorer
from clipvisionalign.retrieval import rsum_gain
from clipvisionalign.retrieval.evaluate import evaluate
from clipvisionalign.search.audits import audits_of, is_of_unknown_model
from clipvisionalign.search.onnx_aligner import (
    ABOUT,
    CAPTIONS,
    FUSION,
    IMAGES,
    OnnxAligner,
    OnnxPairs,
    rows_of,
    session,
)
from clipvisionalign.search.onnx_readme import readme

__all__ = ["CAPTIONS", "FUSION", "IMAGES", "OnnxAligner", "checked", "export_huggingface", "export_onnx", "session"]

#: How far a number of an export may be from PyTorch's, as a share of the largest of its kind, or of 1.
TOLERANCE = 1e-4

#: Texts by which an exported tokenizer is compared with the run's.
TEXTS = ("a dog on the grass", "", "Zwölf  Boxkämpfer, jagen!", "\u72ac \U0001f415 e\u0301", "word " * 500)


class _Images(nn.Module):
    """Scaled pixels -> vectors; for a design that scores pairs also patches, and their keys and values."""

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        states = self.aligner.image_states(self.aligner.image_tower(pixels))
        if self.aligner.late is None:
            return (states.vectors,)
        parts = self.aligner.image_parts(states)
        return tuple(part for part in parts if part is not None)


class _Captions(nn.Module):
    """Token numbers and mask -> vectors; for a design that scores pairs also the late interaction's parts with their
    weights, and the tokens for a fusion."""

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        aligner = self.aligner
        states = aligner.caption_states(TokenGroup(ids, mask, torch.empty(0, dtype=torch.long)))
        if aligner.late is None:
            return (states.vectors,)
        assert states.tokens is not None
        found = aligner.late.all_tokens(states.tokens, mask)
        weights = pruned_weights(found.weights, aligner.late.config.keep_tokens)
        tokens = () if aligner.fusion is None else (states.tokens,)
        return states.vectors, found.vectors, weights, *tokens


class _Pairs(nn.Module):
    """Patches, keys and values, and tokens of pairs -> the fusion's corrections."""

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, patches: Tensor, key_values: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        late, fusion = self.aligner.late, self.aligner.fusion
        assert late is not None
        assert fusion is not None
        return fusion(tokens, mask, key_values, late.matches(tokens, patches))


def export_onnx(
    run: str | Path, out: str | Path, int8: bool = False, data: str | Path = "", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Write the towers of a run, and its fusion, into a new folder; returns what its onnx.json holds.

    int8: also write towers whose products are done in 8 bits, and measure on the dev split of `data` (else of what the
    run was trained on, if it is there) what they lose. Raises FileExistsError where `out` holds something,
    ValueError for a model that cannot be exported, RuntimeError where what was exported is not what PyTorch computes;
    nothing is left then.
    """
    target = _new_folder(out)
    aligner = load_aligner(run, "cpu", packed=False)
    if isinstance(aligner.text_tower.encoder, Longformer):
        # How many of its tokens are global is known from a batch alone.
        raise ValueError(
            f"{run}: Longformer is not exported to ONNX; sliding windows over another text tower are, such as "
            "--model.design sparse --model.text_tower.name distilbert-base-uncased"
        )
    with folders_above(target), files_written_aside(target) as aside:
        aside.mkdir()
        about = _about(aligner, run)
        if "unfinished" in about:
            say(f"note: {about['unfinished']}")
        _write_graphs(aligner, aside)
        aligner.text_tower.tokenizer.save_pretrained(aside / "tokenizer")
        _write_about(aside, about)
        about["difference"] = checked(aligner, aside)
        if int8:
            about["int8"] = {"files": _quantize(aside)}
            about["int8"] |= _loss_of_int8(aside, Path(run), data, say)
        _write_about(aside, about)
        (aside / "README.md").write_text(readme(about), encoding="utf-8")
    return about


def _new_folder(out: str | Path) -> Path:
    """Where an export goes. Raises FileExistsError where something is there."""
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{out}: is there already and not empty; give another folder, or remove it first")
    return target


def _about(aligner: Aligner, run: str | Path) -> dict[str, Any]:
    """What onnx.json holds of the model itself."""
    wanted, tower, late, fusion = aligner.image_tower.input, aligner.text_tower, aligner.late, aligner.fusion
    unfinished = unfinished_note(run)
    about: dict[str, Any] = {
        **({"unfinished": unfinished} if unfinished else {}),
        "run": str(run), "design": aligner.config.design, "width": aligner.config.width,
        "pixels": {"size": wanted.size, "mean": list(wanted.mean), "std": list(wanted.std), "resize": "bicubic"},
        "max_tokens": tower.max_tokens, "truncation_side": tower.tokenizer.truncation_side, "pad": tower.pad,
        "temperature": 1 / aligner.scale().item(),
    }  # fmt: skip
    if late is not None:
        about["late"] = {
            "temperature": 1 / late.scale().item(), "weight": late.weight.item(), "keep_tokens": late.config.keep_tokens
        }  # fmt: skip
    if fusion is not None:
        about["fusion"] = {"weight": fusion.weight.item(), "candidates": aligner.config.fusion.candidates}
    return about


def _write_about(folder: Path, about: dict[str, Any]) -> None:
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _write_graphs(aligner: Aligner, folder: Path) -> None:
    """The towers, and the fusion where there is one."""
    size = aligner.image_tower.input.size
    pixels = torch.randn(3, 3, size, size)
    ids, mask = _some_tokens(aligner, 3, 9)
    batch, length = (
        torch.export.Dim("batch", min=1, max=4096),
        torch.export.Dim("length", min=2, max=aligner.text_tower.max_tokens),
    )
    scores_pairs, fuses = aligner.late is not None, aligner.fusion is not None
    of_patches = ["patches"] * scores_pairs + ["key_values"] * fuses
    of_tokens = ["parts", "weights"] * scores_pairs + ["tokens"] * fuses
    _export(_Images(aligner), (pixels,), folder / IMAGES, ["pixels"], ["vectors", *of_patches], ({0: batch},))
    both = {0: batch, 1: length}
    _export(_Captions(aligner), (ids, mask), folder / CAPTIONS, ["ids", "mask"], ["vectors", *of_tokens], (both, both))
    if not fuses:
        return
    with torch.no_grad():
        _, patches, key_values = _Images(aligner)(pixels)
        tokens = _Captions(aligner)(ids, mask)[-1]
    names = ["patches", "key_values", "tokens", "mask"]
    shapes = ({0: batch}, {0: batch}, both, both)
    _export(_Pairs(aligner), (patches, key_values, tokens, mask), folder / FUSION, names, ["corrections"], shapes)


def _some_tokens(aligner: Aligner, captions: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Made-up captions of up to `length` tokens, one of them whole, the others padded."""
    rng = np.random.default_rng(seed)
    top = aligner.text_tower.encoder.config.vocab_size
    ids = torch.from_numpy(rng.integers(5, top, (captions, length)))
    lengths = torch.from_numpy(np.concatenate([[length], rng.integers(1, length + 1, captions - 1)]))
    mask = (torch.arange(length) < lengths[:, None]).long()
    return torch.where(mask.bool(), ids, aligner.text_tower.pad), mask


def _export(
    module: nn.Module, example: tuple[Tensor, ...], path: Path, inputs: list[str], outputs: list[str], shapes: Any
) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), example, str(path), input_names=inputs, output_names=outputs, dynamic_shapes=shapes,
            dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip


def checked(
    aligner: Aligner, folder: Path, batches: Sequence[int] = (1, 2, 33), lengths: Sequence[int] = (2, 9, 77)
) -> float:
    """The largest difference between what is exported and PyTorch, over batches and lengths: every array that the files
    give, and the parts of pairs' scores; as a share of the largest number of its kind, or of 1.

    Raises RuntimeError where it is larger than `TOLERANCE`, or where the tokenizers differ.
    """
    found = OnnxAligner(folder)
    for text in TEXTS:
        if found.tokenizer.encode(text).ids != list(aligner.text_tower.tokenize([text])[0]):
            raise RuntimeError(f"{folder}: the exported tokenizer reads {text[:40]!r} otherwise than the run's own")
    worst = 0.0
    with torch.no_grad():
        for batch in batches:
            pixels = torch.randn(
                batch, 3, *2 * (aligner.image_tower.input.size,), generator=torch.Generator().manual_seed(batch)
            )
            expected = _Images(aligner.eval())(pixels)
            images = _outputs(found.images, pixels=pixels)
            worst = max(worst, *map(_difference, images.values(), expected))
            for length in lengths:
                size = min(length, aligner.text_tower.max_tokens)
                ids, mask = _some_tokens(aligner, batch, size, seed=batch + length)
                group = TokenGroup(ids, mask, torch.arange(batch))
                states = aligner.caption_states(group)
                arrays = _outputs(found.captions, ids=ids, mask=mask)
                captions = rows_of(list(arrays), list(arrays.values()), mask.numpy())
                worst = max(worst, _difference(arrays["vectors"], states.vectors))
                if aligner.late is not None and "parts" in arrays:
                    worst = max(worst, _difference_of_pairs(aligner, found, expected, states, images, captions))
    if worst > TOLERANCE or ("late" in found.about) != (aligner.late is not None):
        raise RuntimeError(f"{folder}: what is exported differs from PyTorch's by {worst:.2g}")
    return worst


def _outputs(of: Any, **inputs: Tensor) -> dict[str, np.ndarray]:
    """What a file gives, by name."""
    names = [each.name for each in of.get_outputs()]
    return dict(zip(names, of.run(names, {name: given.numpy() for name, given in inputs.items()}), strict=True))


def _difference(found: np.ndarray, expected: Tensor | np.ndarray) -> float:
    """The largest, as a share of the largest number that is expected, or of 1."""
    right = np.asarray(expected)
    if found.shape != right.shape:
        return float("inf")
    return float(np.abs(found - right).max() / max(1.0, np.abs(right).max()))


def _difference_of_pairs(
    aligner: Aligner, exported: OnnxAligner, parts: Sequence[Tensor], states: CaptionStates,
    images: dict[str, np.ndarray], captions: list[dict[str, np.ndarray]],
) -> float:  # fmt: skip
    """The largest difference of captions' arrays, and of the score's parts of each caption with two images."""
    encoded = aligner.caption_parts(states)
    worst = max(map(_difference_of_caption, captions, encoded))
    here = PairScorer(
        aligner, EncodedImages(parts[0], parts[1], parts[2] if aligner.fusion is not None else None), encoded
    )
    there = OnnxPairs(exported.about, exported.fusion, images, captions)
    index = np.arange(len(captions))
    pairs = np.concatenate([index, index[::-1]]), np.concatenate([index, index])
    return max(
        worst,
        _difference(there.parts(*pairs), here.parts(*pairs)),
        _difference(there.weights(), here.weights()),
    )


def _difference_of_caption(found: dict[str, np.ndarray], expected: EncodedCaption) -> float:
    """The largest difference of what is exported of a caption's tokens; those that are pruned have to count nothing."""
    every = slice(None) if expected.positions is None else expected.positions.numpy()
    weights = np.zeros_like(found["weights"])
    weights[every] = expected.weights.numpy()
    worst = max(_difference(found["weights"], weights), _difference(found["parts"][every], expected.parts))
    return worst if expected.tokens is None else max(worst, _difference(found["tokens"], expected.tokens))


def _quantize(folder: Path) -> list[str]:
    """8-bit towers beside the exact ones: weights by their rows, activations as they come."""
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


def _loss_of_int8(folder: Path, run: Path, data: str | Path, say: Callable[[str], None]) -> dict[str, Any]:
    """What both kinds of towers find on a dev split, as the design ranks, and the change from one to the other; why
    not, where it is not there. Captions belong to images, and images stand in splits, as the run was trained."""
    try:
        dev = read_data_of_run(run, data, split="dev").split("dev")
    except ValueError as error:
        if data:
            raise
        say(f"what the 8-bit towers lose is not measured: {error}; --data says where the data set is")
        return {"not measured": str(error)}
    say(f"measuring 8-bit towers on {len(dev):,} dev images and {len(dev.captions):,} captions ...")
    exact, small = (_measured(OnnxAligner(folder, int8=is_small), dev) for is_small in (False, True))
    change = rsum_gain(small.ranks, exact.ranks, dev.caption_image, unit=dev.image_identity)
    return {"rsum": small.rsum.to_dict(), "exact_rsum": exact.rsum.to_dict(), "rsum_change": change.to_dict()}


def _measured(model: OnnxAligner, dev: CaptionedImages) -> Any:
    model.show_progress = True
    candidates = model.about.get("fusion", {}).get("candidates", 0)
    return evaluate(
        model, dev.images, dev.captions, dev.caption_image, dev.image_identity, candidates,
        caption_group=dev.caption_group,
    ).metrics  # fmt: skip


def export_huggingface(run: str | Path, out: str | Path) -> Path:
    """A folder for a hub: the run's model, its settings and tokenizer, and a model card; `load_aligner` reads it back.

    Raises FileExistsError where `out` holds something, FileNotFoundError for what is no finished run.
    """
    source = Path(run)
    if not (source / "results.json").is_file():
        raise FileNotFoundError(f"{run}: not a finished run: no results.json in it")
    target = _new_folder(out)
    with folders_above(target), files_written_aside(target) as aside:
        aside.mkdir()
        (aside / "README.md").write_text(model_card(source), encoding="utf-8")
        for name in ("model.safetensors", "config.yaml", "results.json", "environment.json", "weights.json"):
            if (source / name).is_file():
                shutil.copy(source / name, aside / name)
        for name in ("text_tower", "image_tower"):
            if (source / name).is_dir():
                shutil.copytree(source / name, aside / name)
    return Path(out)


def _audit_of(run: Path) -> str:
    """The checks that the run's model went through, by the command or in a study: on its dev split, whose figures stand
    above, and whether it passed on other data; "Not audited." without any."""
    own, others = audits_of(run)
    told = []
    if own is not None:
        told = ["Passed." if own["passed"] else "**Failed: do not believe the figures above.**", ""]
        told += [
            f"- {'passed' if each['passed'] else 'FAILED'}: {each['name']}: {each['meaning']}" for each in own["checks"]
        ]
    else:
        told = ["Not audited on that dev split." if others else "Not audited."]
        if is_of_unknown_model(run):
            told = ["Audited by an earlier version, which did not keep of which weights and data: audit it again."]
    for each in others:
        failed = [check["name"] for check in each["checks"] if not check["passed"]]
        verdict = f"failed ({', '.join(failed)})" if failed else "passed"
        told += ["", f"On the {each['split']} split of other data than that dev split: {verdict}."]
    return "\n".join(told)


def _interval(figure: dict[str, Any], factor: float = 1.0) -> str:
    """A figure with its 95% interval, or alone where none was computed."""
    low, high = figure.get("low"), figure.get("high")
    told = f"{factor * figure['value']:.1f}"
    return told if low is None or high is None else f"{told} [{factor * low:.1f}, {factor * high:.1f}]"


def model_card(run: Path) -> str:
    """What the model is, what it was trained on, what it finds with intervals, and what it is not for."""
    import yaml

    results = json.loads((run / "results.json").read_text())
    data = json.loads((run / "data.json").read_text())
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    figures = results.get("reranked", results)
    rows = []
    # Results from before chance was told have none.
    chance = results.get("chance", {})
    for way in ("image_to_text", "text_to_image"):
        for name, found in figures[way].items():
            factor = 100 if name.startswith(("recall", "map")) else 1
            by_chance = f"{100 * chance[way][name]:.1f}" if name in chance.get(way, {}) else ""
            cells = (way.replace("_", " "), name.replace("_", " "), _interval(found, factor), by_chance)
            rows.append(f"| {' | '.join(cells)} |")
    rsum = _interval(figures["rsum"]) + (f" (a random ranking: {chance['rsum']:.1f})" if chance else "")
    chosen = results.get("chosen", {}).get("figures", "in-sample: what was chosen on dev is measured on it")
    chosen = chosen[0].upper() + chosen[1:]
    kept = f"{data['dev']['images']:,} images, {data['dev']['captions']:,} captions"
    # Its place is the machine's; that it is another data set is what counts.
    of_dev = (
        f"the training data ({data['layout']})" if not data.get("dev_source") else "another data set than trained on"
    )
    return f"""---
library_name: clipvisionalign
pipeline_tag: zero-shot-image-classification
tags: [image-text-retrieval, {model["design"]}]
---

# Image-caption aligner, design `{model["design"]}`

{model["image_tower"]["name"]} and {Path(str(model["text_tower"]["name"])).name} in one {model["width"]}-wide space.

```python
from clipvisionalign import load_aligner

aligner = load_aligner("this folder")
scores = aligner.score(["a.jpg"], ["a dog on the grass", "two people at a table"])
```

## Figures

Dev split of {of_dev}, by which the checkpoint was chosen: whole gallery ({kept}), all
captions, ties against the model, 95% intervals by bootstrap over images. {chosen}. Rsum {rsum}.

| direction | figure | value | chance |
|---|---|---:|---:|
{chr(10).join(rows)}

## Audit

{_audit_of(run)}

Put it to the test on your own data: `clipvisionalign audit FOLDER --data DATA`.

## Training data

{data["train"]["images"]:,} pictures, layout {data["layout"]}; {len(data["left_out"])} rows left out. Fingerprint
`{data["train"]["fingerprint"]}`. The data's own licence governs what may be done with a model of it.

## Limits

Trained on captions of this kind in this language; what is rare in them it does not know. It takes over what its towers'
pretraining and its captions say about people. Recall on other pictures is another figure than the one above.
"""
