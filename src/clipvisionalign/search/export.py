"""An aligner for use elsewhere: both towers as ONNX, or a folder as Hugging Face's hub has them, with its model card.

The ONNX files take any batch and any length, and are checked against PyTorch before they are left. Beside them lie the
tokenizer and what the pictures have to look like: onnxruntime, tokenizers, Pillow and NumPy are all that is needed.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipvisionalign.batch import TokenGroup
from clipvisionalign.data.of_run import read_data_of_run
from clipvisionalign.models.aligner import Aligner, load_aligner
from clipvisionalign.pictures import Picture
from clipvisionalign.progress import progress
from clipvisionalign.retrieval import retrieval_metrics, rsum_gain

#: How far an exported tower may be from PyTorch's.
TOLERANCE = 1e-4
IMAGES, CAPTIONS, FUSION = "image_tower.onnx", "text_tower.onnx", "fusion.onnx"


class _Images(nn.Module):
    """Scaled pixels -> vectors, and patches for a fusion."""

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.aligner.image_states(self.aligner.image_tower(pixels))
        assert states.patches is not None
        return states.vectors, states.patches


class _Captions(nn.Module):
    """Token numbers and mask -> vectors, and token states for a fusion."""

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        states = self.aligner.caption_states(TokenGroup(ids, mask, torch.empty(0, dtype=torch.long)))
        return (states.vectors,) if states.tokens is None else (states.vectors, states.tokens)


class _Pairs(nn.Module):
    """Patches and token states of pairs -> late scores / temperature, and the fusion's corrections."""

    def __init__(self, aligner: Aligner) -> None:
        super().__init__()
        self.aligner = aligner

    def forward(self, patches: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        late, fusion = self.aligner.late, self.aligner.fusion
        assert late is not None
        assert fusion is not None
        shown = late.patches(patches)
        return fusion(tokens, mask, fusion.project_patches(patches), late.matches(tokens, shown))


def export_onnx(
    run: str | Path, out: str | Path, int8: bool = False, data: str | Path = "", say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Write the towers of a run, and its fusion, into a new folder; returns what its onnx.json holds.

    int8: also write towers whose products are done in 8 bits, and measure on the dev split of `data` (else of what the
    run was trained on, if it is there) what they lose. Raises FileExistsError where `out` holds something,
    ValueError for a design that cannot be exported, RuntimeError where what was exported is not what PyTorch computes.
    """
    aligner = load_aligner(run, "cpu", packed=False)
    encoder = aligner.text_tower.encoder.config
    if getattr(encoder, "attention_window", 0):
        # Which tokens a window reaches is decided by the length, anew in each call; a file holds one way only.
        raise ValueError(f"{run}: sliding windows are not exported to ONNX; its twin with plain attention would be")
    target = _new_folder(out)
    # Pruned tokens are picked by their weight, which has no fixed number of them to export.
    aligner.config = replace(aligner.config, late=replace(aligner.config.late, keep_tokens=0))
    size = aligner.image_tower.input.size
    pixels = torch.randn(2, 3, size, size)
    ids, mask = _some_tokens(aligner, 3, 9)
    batch, length = (
        torch.export.Dim("batch", min=1, max=4096),
        torch.export.Dim("length", min=2, max=aligner.text_tower.max_tokens),
    )
    names = ["vectors", "patches"]
    _export(_Images(aligner), (pixels,), target / IMAGES, ["pixels"], names, ({0: batch},))
    names = ["vectors"] + (["tokens"] if aligner.late is not None else [])
    both = {0: batch, 1: length}
    _export(_Captions(aligner), (ids, mask), target / CAPTIONS, ["ids", "mask"], names, (both, both))
    if aligner.fusion is not None:
        with torch.no_grad():
            patches = _Images(aligner)(pixels)[1][:1].expand(3, -1, -1).contiguous()
            tokens = _Captions(aligner)(ids, mask)[1]
        shapes = ({0: batch}, both, both)
        _export(
            _Pairs(aligner),
            (patches, tokens, mask),
            target / FUSION,
            ["patches", "tokens", "mask"],
            ["corrections"],
            shapes,
        )
    aligner.text_tower.tokenizer.save_pretrained(target / "tokenizer")
    wanted = aligner.image_tower.input
    about: dict[str, Any] = {
        "run": str(run), "design": aligner.config.design, "width": aligner.config.width,
        "pixels": {"size": wanted.size, "mean": list(wanted.mean), "std": list(wanted.std), "resize": "bicubic"},
        "max_tokens": aligner.text_tower.max_tokens, "pad": aligner.text_tower.pad,
        "temperature": 1 / aligner.scale().item(), "difference": checked(aligner, target),
    }  # fmt: skip
    if int8:
        about["int8"] = {"files": _quantize(target)}
    (target / "onnx.json").write_text(json.dumps(about, indent=2) + "\n")
    if int8:
        trained = json.loads((Path(run) / "data.json").read_text())
        about["int8"] |= _loss_of_int8(target, Path(run), Path(data or trained["source"]), say)
        (target / "onnx.json").write_text(json.dumps(about, indent=2) + "\n")
    (target / "README.md").write_text(_HOW)
    return about


def _new_folder(out: str | Path) -> Path:
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: is there already and not empty; give another folder, or remove it first")
    target.mkdir(parents=True, exist_ok=True)
    return target


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
    """The largest difference between the exported towers and PyTorch's, over batches and lengths.

    Raises RuntimeError where it is larger than `TOLERANCE`.
    """
    size = aligner.image_tower.input.size
    images, captions = session(folder / IMAGES), session(folder / CAPTIONS)
    worst = 0.0
    with torch.no_grad():
        for batch in batches:
            pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
            expected = _Images(aligner)(pixels)[0].numpy()
            worst = max(worst, float(np.abs(images.run(["vectors"], {"pixels": pixels.numpy()})[0] - expected).max()))
            for length in lengths:
                ids, mask = _some_tokens(
                    aligner, batch, min(length, aligner.text_tower.max_tokens), seed=batch + length
                )
                expected = _Captions(aligner)(ids, mask)[0].numpy()
                found = captions.run(["vectors"], {"ids": ids.numpy(), "mask": mask.numpy()})[0]
                worst = max(worst, float(np.abs(found - expected).max()))
    if worst > TOLERANCE:
        raise RuntimeError(f"{folder}: the exported towers differ from PyTorch's by {worst:.2g}")
    return worst


def session(path: Path) -> Any:
    """An onnxruntime session on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


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


def _loss_of_int8(folder: Path, run: Path, source: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """What both kinds of towers find on a dev split, and the change from one to the other; why not, where it is not
    there. run: captions belong to images, and images stand in splits, as it was trained."""
    if not source.exists():
        say(f"{source} is not there: what the 8-bit towers lose is not measured; --data says where it is")
        return {"not measured": f"{source} is not there"}
    dev = read_data_of_run(run, source, split="dev").split("dev")
    say(f"measuring 8-bit towers on {len(dev):,} dev pictures and {len(dev.captions):,} captions ...")
    exact, small = (
        retrieval_metrics(
            _encoded(model.encode_images, dev.images, f"{name} pictures"),
            _encoded(model.encode_captions, dev.captions, f"{name} captions"),
            dev.caption_image, dev.image_identity, caption_group=dev.caption_group,
        )
        for name, model in (("exact", OnnxAligner(folder)), ("8-bit", OnnxAligner(folder, int8=True)))
    )  # fmt: skip
    assert exact.ranks is not None
    assert small.ranks is not None
    change = rsum_gain(small.ranks, exact.ranks, dev.caption_image)
    return {"rsum": small.rsum.to_dict(), "exact_rsum": exact.rsum.to_dict(), "rsum_change": change.to_dict()}


def _encoded(encode: Callable[[Any], np.ndarray], items: Sequence[Any], what: str, step: int = 256) -> np.ndarray:
    starts = progress(range(0, len(items), step), what, len(items), count=step)
    return np.concatenate([encode(items[start : start + step]) for start in starts])


class OnnxAligner:
    """The exported towers behind the contract of every model: `encode_images`, `encode_captions`."""

    def __init__(self, folder: str | Path, int8: bool = False) -> None:
        from tokenizers import Tokenizer

        from clipvisionalign.pictures import PictureInput

        source = Path(folder)
        self.about = json.loads((source / "onnx.json").read_text())
        end = ".int8.onnx" if int8 else ".onnx"
        self.images, self.captions = session(source / f"image_tower{end}"), session(source / f"text_tower{end}")
        self.tokenizer = Tokenizer.from_file(str(source / "tokenizer" / "tokenizer.json"))
        self.tokenizer.enable_truncation(self.about["max_tokens"])
        self.tokenizer.enable_padding(pad_id=self.about["pad"])
        pixels = self.about["pixels"]
        self.input = PictureInput(pixels["size"], tuple(pixels["mean"]), tuple(pixels["std"]))

    def encode_images(self, images: Sequence[Picture], batch: int = 32) -> np.ndarray:
        """Images -> unit vectors (N, D)."""
        look = self.input.look()
        found = []
        for start in range(0, len(images), batch):
            pixels = torch.stack([look(image) for image in images[start : start + batch]])
            found.append(self.images.run(["vectors"], {"pixels": self.input.scaled(pixels).numpy()})[0])
        return np.concatenate(found)

    def encode_captions(self, captions: Sequence[str], batch: int = 64) -> np.ndarray:
        """Captions -> unit vectors (M, D); those of like length go together."""
        order = np.argsort([len(caption) for caption in captions], kind="stable")
        found = np.empty((len(captions), self.about["width"]), dtype=np.float32)
        for start in range(0, len(captions), batch):
            rows = order[start : start + batch]
            encoded = self.tokenizer.encode_batch([captions[row] for row in rows])
            ids = np.array([each.ids for each in encoded], dtype=np.int64)
            mask = np.array([each.attention_mask for each in encoded], dtype=np.int64)
            found[rows] = self.captions.run(["vectors"], {"ids": ids, "mask": mask})[0]
        return found


_HOW = """# An aligner as ONNX

Needs onnxruntime, tokenizers, Pillow and NumPy. Sizes, mean and deviation stand in onnx.json.

```python
import json
import numpy as np, onnxruntime
from PIL import Image
from tokenizers import Tokenizer

about = json.load(open("onnx.json"))
images = onnxruntime.InferenceSession("image_tower.onnx")
captions = onnxruntime.InferenceSession("text_tower.onnx")
tokenizer = Tokenizer.from_file("tokenizer/tokenizer.json")
tokenizer.enable_truncation(about["max_tokens"])
tokenizer.enable_padding(pad_id=about["pad"])

size, mean, std = (about["pixels"][key] for key in ("size", "mean", "std"))
picture = Image.open("a.jpg").convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
pixels = (np.asarray(picture, np.float32) / 255 - mean) / std
pixels = pixels.transpose(2, 0, 1)[None].astype(np.float32)
encoded = tokenizer.encode_batch(["a dog on the grass", "two people"])
ids = np.array([each.ids for each in encoded], np.int64)
mask = np.array([each.attention_mask for each in encoded], np.int64)

scores = images.run(["vectors"], {"pixels": pixels})[0] @ captions.run(["vectors"], {"ids": ids, "mask": mask})[0].T
```
"""


def export_huggingface(run: str | Path, out: str | Path) -> Path:
    """A folder for a hub: the run's model, its settings and tokenizer, and a model card; `load_aligner` reads it back.

    Raises FileExistsError where `out` holds something, FileNotFoundError for what is no finished run.
    """
    source = Path(run)
    if not (source / "results.json").is_file():
        raise FileNotFoundError(f"{run}: not a finished run: no results.json in it")
    target = _new_folder(out)
    for name in ("model.safetensors", "config.yaml", "results.json", "environment.json"):
        shutil.copy(source / name, target / name)
    for name in ("text_tower", "image_tower"):
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
    if (source / "weights.json").is_file():
        shutil.copy(source / "weights.json", target / "weights.json")
    (target / "README.md").write_text(model_card(source), encoding="utf-8")
    return target


def _audit_of(run: Path) -> str:
    """The checks that the run went through, by the command or in a study; "Not audited." without any."""
    found = None
    if (run / "audit.json").is_file():
        found = json.loads((run / "audit.json").read_text())
    elif (run / "measured.json").is_file():
        found = json.loads((run / "measured.json").read_text()).get("audit")
    if not found:
        return "Not audited."
    lines = [
        f"- {'passed' if each['passed'] else 'FAILED'}: {each['name']}: {each['meaning']}" for each in found["checks"]
    ]
    verdict = "Passed." if found["passed"] else "**Failed: do not believe the figures above.**"
    return "\n".join([verdict, "", *lines])


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
    kept = f"{data['dev']['images']:,} pictures, {data['dev']['captions']:,} captions"
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

Dev split of the training data ({data["layout"]}), by which the checkpoint was chosen: whole gallery ({kept}), all
captions, ties against the model, 95% intervals by bootstrap over pictures. {chosen}. Rsum {rsum}.

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
