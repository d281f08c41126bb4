"""Notes for figures on dev images by which something was selected, read from the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.hashes import changed_keys, dataset_hashes
from clipvisionalign.data.joined_captions import with_captions
from clipvisionalign.data.run_data import is_unfinished, texts_of_run


def nothing_chosen(chosen: dict[str, Any], epochs: int) -> bool:
    """Whether nothing was chosen on dev: of a run, and of those that it starts from.

    Args:
        chosen: The block "chosen" of the run's results.json.
        epochs: After how many epochs it was measured; 0 if unknown.

    Returns:
        Whether that is known to be so.
    """
    return (
        bool(chosen)
        and one_epoch(chosen, epochs)
        and not {"weights", "with_init", "init_trained_on"} & set(chosen)
        and not _alphas(chosen)
    )


def one_epoch(chosen: dict[str, Any], epochs: int) -> bool:
    """Whether there was no choice between epochs: there is one, or the last was taken in any case.

    Args:
        chosen: The block "chosen" of the run's results.json.
        epochs: After how many epochs it was measured; 0 if unknown.

    Returns:
        Whether that is known to be so.
    """
    return epochs == 1 or chosen.get("epoch_by") == "last epoch"


def epochs_measured(run: Path) -> int:
    """After how many epochs a run was measured on dev.

    Args:
        run: The run folder.

    Returns:
        The number; 0 if unknown.
    """
    kept = run / "metrics.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    # The figures before the first step are of no epoch.
    starts = [line for line in lines if '"epoch": 0,' in line and '"train_loss"' not in line]
    return sum('"dev": {' in line for line in lines) - len(starts)


def in_sample_note(run: Path, data: CaptionedImages) -> str | None:
    """What a figure of a run on these images has to be read with.

    Args:
        run: The run folder.
        data: The images.

    Returns:
        A note where they are the dev images that the run was chosen by; None where nothing was chosen on them.
    """
    results = run / "results.json"
    differing = changed_dev_parts(run, data)
    if not set(differing) <= {"partners"}:
        return None
    saved_results = json.loads(results.read_text()) if results.is_file() else {}
    chosen = saved_results.get("chosen", {})
    parts = [
        "" if chosen and one_epoch(chosen, epochs_measured(run)) else "epoch",
        "alpha" if _alphas(chosen) else "",
        "weights of its pairs' parts" if "weights" in chosen else "",
    ]
    what = " and ".join(filter(None, parts))
    if chosen and not what:
        return chosen.get("with_init")
    if not chosen:
        what = (
            "epoch" if is_unfinished(run) else "epoch (and, with a late interaction, the weights of its pairs' parts)"
        )
    message = f"by these images was chosen: the run's {what}; its figure on them is in-sample"
    same_texts = data.caption_mode == texts_of_run(run)
    if chosen.get("by") == "halves" and not differing and same_texts:
        message += f"; cross-fitted, its rsum is {saved_results['rsum']['value']:.1f} (results.json)"
    return message


def init_selection_note(init: Path, data: CaptionedImages) -> str | None:
    """Why a run that starts from another (`--init`) is not cross-fitted on these dev images.

    Args:
        init: The folder of the other run.
        data: The dev images.

    Returns:
        A note where the other one's epoch was chosen by all of them, while its halves would have chosen another; None
        where that is not so.
    """
    if not set(changed_dev_parts(init, data)) <= {"partners"}:
        return None
    if not (init / "results.json").is_file():
        return f"it starts from {init}, which was not finished: its epoch so far may have been chosen by these images"
    chosen = json.loads((init / "results.json").read_text()).get("chosen", {})
    is_halved, is_last = chosen.get("by") == "halves", chosen.get("epoch_by") == "last epoch"
    same_alpha = not _alphas(chosen) or (is_halved and _halves_agree(_alphas(chosen)))
    if is_last and same_alpha:
        # Nothing was chosen there, but perhaps in the run that it starts from itself.
        return chosen.get("with_init")
    if "with_init" not in chosen and is_halved and same_alpha and _halves_agree(chosen.get("epoch", {})):
        return None
    what = "epoch" if same_alpha else "alpha"
    return f"it starts from {init}, whose {what} was chosen by all of these images: in-sample as far as that goes"


def _alphas(chosen: dict[str, Any]) -> dict[str, Any]:
    """The alphas that dev and its halves chose, of a blended run; nothing for a run, or where alpha was given."""
    alphas = chosen.get("alpha", {})
    return {} if alphas.get("given") else alphas


def _halves_agree(choices: dict[str, Any]) -> bool:
    """Whether the halves of dev chose as all of dev did."""
    return set(choices.get("halves", [])) <= {choices.get("model")}


def changed_dev_parts(run: Path, data: CaptionedImages) -> list[str]:
    """In what the dev images of a run differ from these.

    Args:
        run: The run folder.
        data: The images.

    Returns:
        The keys of `dataset_hashes` that differ; all where nothing is known.
    """
    data_file = run / "data.json"
    dev = json.loads(data_file.read_text()).get("dev", {}) if data_file.is_file() else {}
    if "contents" in dev:
        texts = texts_of_run(run)
        if data.identity == "caption" and texts == "joined":
            data = data.with_identity("auto")
        return changed_keys(dev["contents"], dataset_hashes(with_captions(data, texts)))
    # A run from before contents were recorded: images by their sizes.
    return [] if dev.get("fingerprint") == data.fingerprint() else ["captions", "partners", "pictures"]
