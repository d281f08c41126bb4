"""A run as a folder for the Hugging Face hub, with its model card; `load_aligner` reads it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from clipvisionalign.export.audits import audits_of, is_of_unknown_model
from clipvisionalign.export.folders import target_folder
from clipvisionalign.files import atomic_write_files, folders_above


def export_huggingface(run: str | Path, out: str | Path) -> Path:
    """A folder for a hub: the run's model, its settings and tokenizer, and a model card; `load_aligner` reads it back.

    Raises FileExistsError where `out` holds something, FileNotFoundError for what is no finished run.
    """
    source = Path(run)
    if not (source / "results.json").is_file():
        raise FileNotFoundError(f"{run}: not a finished run: no results.json in it")
    target = target_folder(out)
    with folders_above(target), atomic_write_files(target) as aside:
        aside.mkdir()
        (aside / "README.md").write_text(model_card(source), encoding="utf-8")
        for name in ("model.safetensors", "config.yaml", "results.json", "environment.json", "weights.json"):
            if (source / name).is_file():
                shutil.copy(source / name, aside / name)
        for name in ("text_tower", "image_tower"):
            if (source / name).is_dir():
                shutil.copytree(source / name, aside / name)
    return Path(out)


def _audit_summary(run: Path) -> str:
    """The checks that the run's model went through, by the command or in a study: on its dev split, whose figures stand
    above, and whether it passed on other data; "Not audited." without any."""
    own, others = audits_of(run)
    lines = []
    if own is not None:
        lines = ["Passed." if own["passed"] else "**Failed: do not believe the figures above.**", ""]
        lines += [
            f"- {'passed' if each['passed'] else 'FAILED'}: {each['name']}: {each['meaning']}" for each in own["checks"]
        ]
    else:
        lines = ["Not audited on that dev split." if others else "Not audited."]
        if is_of_unknown_model(run):
            lines = ["Audited by an earlier version, which did not keep of which weights and data: audit it again."]
    for each in others:
        failed = [check["name"] for check in each["checks"] if not check["passed"]]
        verdict = f"failed ({', '.join(failed)})" if failed else "passed"
        lines += ["", f"On the {each['split']} split of other data than that dev split: {verdict}."]
    return "\n".join(lines)


def _interval(estimate: dict[str, Any], factor: float = 1.0) -> str:
    """A figure with its 95% interval, or alone where none was computed."""
    low, high = estimate.get("low"), estimate.get("high")
    value_text = f"{factor * estimate['value']:.1f}"
    return value_text if low is None or high is None else f"{value_text} [{factor * low:.1f}, {factor * high:.1f}]"


def model_card(run: Path) -> str:
    """What the model is, what it was trained on, what it finds with intervals, and what it is not for."""
    import yaml

    results = json.loads((run / "results.json").read_text())
    data = json.loads((run / "data.json").read_text())
    model = yaml.safe_load((run / "config.yaml").read_text())["model"]
    metrics = results.get("reranked", results)
    rows = []
    # Results from before chance was told have none.
    chance = results.get("chance", {})
    for direction in ("image_to_text", "text_to_image"):
        for name, estimate in metrics[direction].items():
            factor = 100 if name.startswith(("recall", "map")) else 1
            by_chance = f"{100 * chance[direction][name]:.1f}" if name in chance.get(direction, {}) else ""
            cells = (direction.replace("_", " "), name.replace("_", " "), _interval(estimate, factor), by_chance)
            rows.append(f"| {' | '.join(cells)} |")
    rsum = _interval(metrics["rsum"]) + (f" (a random ranking: {chance['rsum']:.1f})" if chance else "")
    selection_note = results.get("chosen", {}).get("figures", "in-sample: what was chosen on dev is measured on it")
    selection_note = selection_note[0].upper() + selection_note[1:]
    gallery_size = f"{data['dev']['images']:,} images, {data['dev']['captions']:,} captions"
    # Its place is the machine's; that it is another data set is what counts.
    dev_origin = (
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

Dev split of {dev_origin}, by which the checkpoint was chosen: whole gallery ({gallery_size}), all
captions, ties against the model, 95% intervals by bootstrap over images. {selection_note}. Rsum {rsum}.

| direction | figure | value | chance |
|---|---|---:|---:|
{chr(10).join(rows)}

## Audit

{_audit_summary(run)}

Put it to the test on your own data: `clipvisionalign audit FOLDER --data DATA`.

## Training data

{data["train"]["images"]:,} pictures, layout {data["layout"]}; {len(data["left_out"])} rows left out. Fingerprint
`{data["train"]["fingerprint"]}`. The data's own licence governs what may be done with a model of it.

## Limits

Trained on captions of this kind in this language; what is rare in them it does not know. It takes over what its towers'
pretraining and its captions say about people. Recall on other pictures is another figure than the one above.
"""
