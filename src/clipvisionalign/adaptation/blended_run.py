"""The run folder of a blended model, which every command opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from clipvisionalign.adaptation.alpha_curve import AlphaPoint
from clipvisionalign.adaptation.comparison import Comparison
from clipvisionalign.data.run_data import run_settings
from clipvisionalign.data.training_images import TRAINED_ON_FILE, TrainedOnImages
from clipvisionalign.files import atomic_write, folders_above, run_lock
from clipvisionalign.json_io import write_json
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.device import best_device
from clipvisionalign.models.io import is_pretrained
from clipvisionalign.models.run_files import CONFIG_FILE
from clipvisionalign.retrieval.evaluate import RANKS_FILE
from clipvisionalign.training.cross_fit import DevChoice, choices_to_dict, combine_halves, make_evaluation
from clipvisionalign.training.dev_scores import DevScores
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.init_run import INIT_FILE, InitRun
from clipvisionalign.training.overlap import training_overlap_note
from clipvisionalign.training.pair_weights import set_pair_weights
from clipvisionalign.training.selection_notes import epochs_measured, init_selection_note, one_epoch
from clipvisionalign.training.validation import DistributedAligner

#: The curve, the choice and the comparison, in the folder of a blended run.
BLEND_FILE = "blend.json"
#: What the blended run has of the run: what it was trained on, where its towers came from, how its training went.
_KEPT_FILES = ("data.json", "environment.json", "weights.json", "metrics.jsonl", INIT_FILE)


def check_output(out: str, run: str, base: str, overwrite: bool) -> None:
    """Check that a blended run can be written.

    Args:
        out: the folder to write.
        run: the run that was tuned.
        base: what it is blended with.
        overwrite: whether an earlier blended run may be replaced.

    Raises:
        FileExistsError: something else is there.
        ValueError: run or base lie in it.
    """
    target = Path(out)
    for source in (run, base):
        if Path(source).exists() and Path(source).resolve().is_relative_to(target.resolve()):
            raise ValueError(f"--out {out}: {source} lies in it; give another folder")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{out}: is there already; give another --out, or --overwrite to replace it")
    if not (target / BLEND_FILE).is_file():
        raise FileExistsError(f"{out}: holds no blended run, which is all that --overwrite replaces")


@contextmanager
def blended_folder(out: str, run: str, base: str, overwrite: bool) -> Iterator[Path]:
    """A folder where the body writes a blended run, which then takes the place of `out`, whole or not at all.

    Args:
        out: the folder to write.
        run: the run that is blended.
        base: what it is blended with.
        overwrite: whether a blended run that is there is replaced.

    Yields:
        The folder beside it, empty.
    """
    target = Path(out).resolve()
    lock = target.with_name(f"{target.name}.lock")
    with folders_above(target), run_lock(lock, f"writes {out}"):
        # Another process may have written it since.
        check_output(out, run, base, overwrite)
        with atomic_write(target) as aside:
            aside.mkdir()
            yield aside


def write_blended_run(comparison: Comparison, out: str, folder: Path, device: str) -> dict[str, Any]:
    """Write the chosen model as a run, with its dev figures and what was chosen where.

    Args:
        comparison: with a chosen alpha.
        out: where the folder will be.
        folder: where its files are written.
        device: where the model is measured.

    Returns:
        What its results.json holds.
    """
    path, point = comparison.path, comparison.points[0]
    model = path.unpacked_model_at(point.alpha)
    set_pair_weights(model, point.weights[0])
    run = Path(path.run)
    settings = run_settings(run) | {"out": out}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    model.save(folder)
    for name in _KEPT_FILES:
        if (run / name).is_file():
            shutil.copy2(run / name, folder / name)
    _save_trained_on([run, Path(path.base)], folder)
    results = _dev_results(comparison, model, out, folder, device)
    write_json(folder / "results.json", results)
    write_json(folder / BLEND_FILE, comparison.document)
    return results


def _dev_results(comparison: Comparison, model: Aligner, out: str, folder: Path, device: str) -> dict[str, Any]:
    """What results.json holds, as that of a training run: cross-fitted figures of dev, and what was chosen there."""
    path, points, gallery = comparison.path, comparison.points, comparison.dev[0]
    model.to(best_device(device)).show_progress = True
    distributed = Distributed(best_device(device))
    candidates = model.config.fusion.candidates if model.fusion is not None else 0
    scores = DevScores(DistributedAligner(model, distributed), gallery.part, candidates)
    choices = _choices(path.run, points)
    halves = gallery.halves
    ranking = combine_halves(halves, choices[1].ranking, choices[2].ranking) if halves else choices[0].ranking
    evaluation = make_evaluation(scores, ranking)
    evaluation.save_ranks(folder / RANKS_FILE)
    run = Path(path.run)
    own = json.loads((run / "results.json").read_text(encoding="utf-8")).get("chosen", {})
    epoch_by = "last epoch" if one_epoch(own, epochs_measured(run)) else own.get("epoch_by", "rsum")
    selected_by = dict.fromkeys([init_selection_note(run, gallery.part), own.get("with_init")])
    with_init = "; and ".join(filter(None, selected_by)) or None
    trained_on, alpha = _trained_on_note(path.run, path.base, comparison), comparison.document["alpha"]
    chosen = choices_to_dict(choices, scores, halves, epoch_by, with_init, trained_on, "alpha and weights")
    chosen["alpha"] = {"model": alpha["model"], "halves": alpha["halves"], "given": alpha["given"]}
    if alpha["given"]:
        # Nothing was chosen among models, at most the weights of a pair's parts.
        selected = (
            [chosen["figures"]] if "weights" in chosen else [f"but {each}" for each in (with_init, trained_on) if each]
        )
        chosen["figures"] = "; ".join([alpha["figures"], *selected])
    blend = {"run": path.run, "base": path.base, "alpha": points[0].alpha}
    data = json.loads((run / "data.json").read_text(encoding="utf-8"))
    header = {"run": out, "data": str(data.get("source", gallery.source)), "split": "dev"}
    return header | gallery.data.texts_entry | evaluation.to_dict() | {"chosen": chosen, "blend": blend}


def _choices(run: str, points: list[AlphaPoint]) -> list[DevChoice]:
    """What all of dev and each half chose, in the form of a training's choices: the epoch is the run's own."""
    results = json.loads((Path(run) / "results.json").read_text(encoding="utf-8"))
    epoch = int(results.get("chosen", {}).get("epoch", {}).get("model", 0))
    return [
        DevChoice(epoch, point.weights[which], point.galleries[0].rankings[which])
        for which, point in enumerate(points)
    ]  # fmt: skip


def _trained_on_note(run: str, base: str, comparison: Comparison) -> str | None:
    """That what the blend is made of was trained on its dev images; None where that is not known to be so."""
    init, gallery = InitRun.load(Path(run)), comparison.dev[0]
    notes = [init.trained_on if init else None]
    if not is_pretrained(base):
        overlap = training_overlap_note(Path(base), gallery.data, gallery.part)
        notes.append(f"{base}: {overlap.note}" if overlap else None)
    return "; and ".join(dict.fromkeys(note for note in notes if note)) or None


def _save_trained_on(runs: list[Path], folder: Path) -> None:
    """Keep the hashes of the training images of both, so that an audit finds them in any gallery."""
    if not (runs[0] / TRAINED_ON_FILE).is_file():
        # A run of an earlier version: its images are recognised by data.json, unless there are hashes.
        return
    records = [TrainedOnImages.load(run / TRAINED_ON_FILE) for run in runs if (run / TRAINED_ON_FILE).is_file()]
    TrainedOnImages.merged(records).save(folder / TRAINED_ON_FILE)
