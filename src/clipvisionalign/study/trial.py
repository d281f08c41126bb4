"""The cells of a study: each trained once, each measured alike; what is finished is never done again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from clipvisionalign.batch import TruncationStats
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.foils import MinimalPair
from clipvisionalign.data.hashes import changed_keys, dataset_hashes, hash_file, hash_parts, run_hash
from clipvisionalign.data.run_data import data_record
from clipvisionalign.files import atomic_write
from clipvisionalign.models.aligner import Aligner, TowerOutputCache
from clipvisionalign.models.caption_tokenizer import open_tokenizer
from clipvisionalign.models.device import library_versions
from clipvisionalign.models.io import load_aligner, pin_revisions
from clipvisionalign.retrieval.audit import MIN_SAMPLE, audit
from clipvisionalign.retrieval.evaluate import RANKS_FILE, Evaluation, evaluate, load_ranks
from clipvisionalign.retrieval.minimal_pairs import score_minimal_pairs
from clipvisionalign.retrieval.ranks import PositiveRanks
from clipvisionalign.settings import config_from_dict
from clipvisionalign.study.config import Trial
from clipvisionalign.training.checkpoint import list_checkpoints
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.cross_fit import PairWeights, get_pair_weights, set_pair_weights
from clipvisionalign.training.data import check_data_unchanged
from clipvisionalign.training.halves import split_halves
from clipvisionalign.training.ineffective_settings import NO_EFFECT
from clipvisionalign.training.init_run import InitRun
from clipvisionalign.training.results import can_cache_encodings
from clipvisionalign.training.run_folder import start_directory
from clipvisionalign.training.train import resume, train

Log = Callable[[str], None]

#: What a cell's folder holds beside the run, once it is measured.
MEASUREMENTS_FILE = "measured.json"
#: In a study's folder: the commits that its runs take their towers from.
PINNED_TOWERS_FILE = "towers.json"


def write_json(path: Path, value: Any) -> None:
    """A study that is killed leaves no half of a file."""
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_study_json(path: Path, hint: str = "put back a whole one, or remove it") -> Any:
    """What a file of the study's own holds. Raises ValueError with its name and the way out where that cannot be
    read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error}); {hint}") from None


def pin_tower_commits(trials: Sequence[Trial], study: Path, say: Log) -> list[Trial]:
    """The cells that are to be trained with one commit of the hub for each tower's name, whenever they are trained.

    What cannot be had now is left as it is: those cells say why when their turn comes. Raises FileExistsError, before
    anything is written, where another run is in a cell's place (`refuse_other_settings`).
    """
    for trial in trials:
        refuse_other_settings(trial)
    towers_file = study / PINNED_TOWERS_FILE
    commits: dict[str, list[str]] = read_study_json(towers_file) if towers_file.is_file() else {}
    before, pinned_trials = dict(commits), []
    for trial in trials:
        model = trial.config.model
        towers = (model.image_tower, model.text_tower)
        key = json.dumps([[tower.name, tower.weights, tower.revision] for tower in towers])
        if key not in commits and not (trial.folder / "config.yaml").is_file():
            try:
                pinned = pin_revisions(model, say)
            except (OSError, ValueError):
                pinned_trials.append(trial)
                continue
            commits[key] = [pinned.image_tower.revision, pinned.text_tower.revision]
        image, text = commits.get(key, [tower.revision for tower in towers])
        model = replace(
            model, image_tower=replace(towers[0], revision=image), text_tower=replace(towers[1], revision=text)
        )
        pinned_trials.append(replace(trial, config=replace(trial.config, model=model)))
        if pinned_trials[-1] != trial:
            refuse_other_settings(pinned_trials[-1])
    if commits != before:
        towers_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(towers_file, commits)
    return pinned_trials


def refuse_other_settings(trial: Trial) -> None:
    """Raises FileExistsError where a run with other settings, or of another base, stands in a cell's place."""
    import yaml

    settings = trial.folder / "config.yaml"
    if not settings.is_file():
        return
    existing = config_from_dict(RunConfig, yaml.safe_load(settings.read_text()))
    # A run records the commits that it took its towers from, whichever its settings left open.
    towers = ("image_tower", "text_tower")
    requested = {name: getattr(trial.config.model, name) for name in towers}
    recorded = {name: getattr(existing.model, name) for name in towers}
    same = {
        name: replace(recorded[name], revision=requested[name].revision)
        for name in towers
        if not requested[name].revision or not recorded[name].revision
    }
    existing = replace(existing, model=replace(existing.model, **same))
    # One that left its layout open has recorded which one it was.
    if "auto" in (layouts := {existing.layout, trial.config.layout}) and layouts <= {
        "auto",
        recorded_layout(trial.folder),
    }:
        existing = replace(existing, layout=trial.config.layout)
    if _with_resolved_paths(existing, start_directory(trial.folder)) != _with_resolved_paths(trial.config, Path.cwd()):
        raise FileExistsError(f"{trial.folder}: a run with other settings is there; give another --out, or remove it")
    if trial.config.init and (Path(trial.config.init) / "results.json").is_file():
        # One that is yet to be trained is looked at when it is.
        refuse_other_base(trial)


def _with_resolved_paths(config: RunConfig, directory: Path) -> RunConfig:
    """A cell's settings with each path as it lies, however the study, or the data, was named: what is within the study
    by its place there. directory: that paths are relative to."""
    study = (directory / config.out).resolve().parent.parent

    def resolve(name: str) -> str:
        if name in ("", "auto", "off"):
            return name
        path = (directory / name).resolve()
        return f"STUDY/{path.relative_to(study)}" if path.is_relative_to(study) else str(path)

    def resolve_if_exists(name: str) -> str:
        # It may be a name of the hub's, or a word.
        return resolve(name) if name and (directory / name).exists() else name

    image, text = config.model.image_tower, config.model.text_tower
    model = replace(
        config.model,
        image_tower=replace(image, weights=resolve_if_exists(image.weights)),
        text_tower=replace(text, name=resolve_if_exists(text.name), weights=resolve_if_exists(text.weights)),
    )
    paths: dict[str, Any] = {
        name: resolve(getattr(config, name)) for name in ("data", "dev_data", "out", "init", "cache")
    }
    return replace(config, model=model, **paths)


def settings_hash(trial: Trial) -> str:
    """What the runs of a variant have in common, whatever the study is named by: all settings but seed, folders and the
    number of steps."""
    config = replace(_with_resolved_paths(trial.config, Path.cwd()), seed=0, out="", init="", steps=0, epochs=0)
    return hash_parts([repr(config)])


def refuse_other_base(trial: Trial, say: Log = lambda line: None) -> None:
    """Raises FileExistsError where a cell's run, finished or stopped, was begun from other weights than those of the
    cell that it stands on: that one was trained anew since. A run from before this was recorded cannot be compared:
    that is said."""
    has_run = (trial.folder / "results.json").is_file() or list_checkpoints(trial.folder)
    if not trial.config.init or not has_run:
        return
    base, init_run = Path(trial.config.init), InitRun.load(trial.folder)
    if init_run is None:
        note = f"whether {base.name} is still what it stands on was not compared"
        say(f"{trial.folder}: from before that was recorded: {note}")
    elif init_run.contents != run_hash(base):
        raise FileExistsError(
            f"{trial.folder}: stands on other weights than {base} has now, which was trained anew since; remove "
            f"{trial.folder}, to train it anew too, or give another --out"
        )


def recorded_layout(run: Path) -> str:
    """The layout that a run's data set was read in; "" where that is not recorded."""
    try:
        return str(data_record(run).get("layout", ""))
    except ValueError:
        return ""


def refuse_changed_data(cells: Sequence[Trial]) -> None:
    """Raises DataError where finished cells were trained on other data than lies there now: figures of both would stand
    beside each other. Of those that recorded the same, one is compared; what cannot be compared is told of when its
    turn comes (`train_trial`)."""
    finished: dict[str, Trial] = {}
    for cell in cells:
        if (cell.folder / "results.json").is_file():
            with suppress(ValueError):
                finished.setdefault(json.dumps(data_record(cell.folder).get("as_read")), cell)
    for cell in finished.values():
        check_data_unchanged(cell.folder, cell.config, lambda line: None, ("train",))


def train_trial(trial: Trial, say: Log, tower_caches: dict[str, TowerOutputCache] | None = None) -> None:
    """Train a cell, or go on with it where it was stopped; a finished one stays.

    remembered: as in `measure_trial`.
    Raises what `train` raises, DataError where a finished one was trained on other data than lies there now, and
    FileExistsError where it stands on another base. A dev split that changed is measured anew (`measure_trial`).
    """
    refuse_other_base(trial, say)
    if (trial.folder / "results.json").is_file():
        try:
            check_data_unchanged(trial.folder, trial.config, say, ("train",))
        except json.JSONDecodeError as error:
            reason = f"what it was trained on cannot be read ({error}); put back a whole one, or remove {trial.folder}"
            raise ValueError(f"{trial.folder / 'data.json'}: {reason}") from None
        say(f"{trial.folder}: finished already")
    elif (trial.folder / "config.yaml").is_file():
        resume(trial.folder, say, _tower_cache(trial, tower_caches))
    else:
        # A study's settings are those of all its variants: what has no effect on one is another's.
        train(
            trial.config, lambda line: None if line.startswith(NO_EFFECT) else say(line),
            encodings_cache=_tower_cache(trial, tower_caches),
        )  # fmt: skip


def _tower_cache(
    trial: Trial, tower_caches: dict[str, TowerOutputCache] | None, purpose: str = ""
) -> TowerOutputCache | None:
    """What is remembered of the cell's towers, if they are frozen; None where each cell may have its own.

    what: is asked, where the batches of something else would change the last digits.
    """
    config, model = trial.config, trial.config.model
    has_random_tower = "random" in (model.image_tower.weights, model.text_tower.weights)
    # Drawn at random, a tower is another one for each seed.
    if tower_caches is None or config.init or has_random_tower:
        return None
    sparse = model.design == "sparse"
    return tower_caches.setdefault(
        repr((model.image_tower, model.text_tower, sparse, config.device, purpose)), TowerOutputCache()
    )


def measurement_inputs(
    trial: Trial,
    eval_data: CaptionedImages,
    split: str,
    pairs: dict[str, list[MinimalPair]],
    overlap: list[str] | None,
    audit_images: int,
) -> dict[str, Any]:
    """What the figures of a cell are made from, by content: kept beside them, so that others are not taken for them."""
    return {
        "model": run_hash(trial.folder),
        **dataset_hashes(eval_data),
        "minimal pairs": {name: _pairs_hash(pair_list) for name, pair_list in pairs.items()},
        "overlap of splits": overlap,
        "split": split,
        "audit": audit_images,
    }


def _pairs_hash(pairs: Sequence[MinimalPair]) -> str:
    images = (hash_parts([p.image]) if isinstance(p.image, bytes) else hash_file(p.image) for p in pairs)
    return hash_parts(
        item for p, image in zip(pairs, images, strict=True) for item in (image, p.caption, p.foil, p.kind)
    )


def read_if_current(path: Path, inputs: dict[str, Any], say: Log, label: str) -> Any:
    """What the file `kept` holds, if it was made from what is `asked` now; else None, and why is said in one line."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        previous_inputs = content.get("asked")
    except (OSError, ValueError, AttributeError):
        say(f"{label}: measured again: {path} cannot be read")
        return None
    changed_inputs = changed_keys(previous_inputs, inputs)
    if not changed_inputs:
        return content
    if not isinstance(previous_inputs, dict) or not set(inputs) <= set(previous_inputs):
        say(f"{label}: measured again: an earlier version kept the figures, and not what they were made from")
    else:
        say(f"{label}: measured again: not the same as before: {', '.join(changed_inputs)}")
    return None


def measure_trial(
    trial: Trial,
    eval_data: CaptionedImages,
    split: str,
    pairs: dict[str, list[MinimalPair]],
    overlap: list[str] | None,
    audit_images: int,
    say: Log = print,
    tower_caches: dict[str, TowerOutputCache] | None = None,
) -> dict[str, Any]:
    """Everything that is asked of one trained cell but time and memory; kept in its folder, with what it was made from.

    remembered: what frozen towers gave in other cells, by their settings, to be used and added to.
    part: the split that is measured; pairs: sets of minimal pairs by name; overlap: pictures in two splits.
    """
    path = trial.folder / MEASUREMENTS_FILE
    inputs = measurement_inputs(trial, eval_data, split, pairs, overlap, audit_images)
    measurements = _load_measurements(trial, inputs, split, say)
    if measurements is not None:
        return measurements
    train_results = read_study_json(trial.folder / "results.json", f"remove {trial.folder}, to train it anew")
    aligner = load_aligner(trial.folder, trial.config.device)
    aligner.show_progress = True
    # Before anything else is asked, as a model that had been shown true partners could give those back; and by the
    # towers each time: that they always give the same is a part of what is checked.
    checks = audit(
        aligner,
        eval_data.images,
        eval_data.captions,
        eval_data.caption_image,
        eval_data.image_identity,
        overlap,
        max(audit_images, MIN_SAMPLE),
        caption_group=eval_data.shared_text_ids,
    )
    selection = {name: value for name, value in train_results.get("chosen", {}).items() if name != "model_in_sample"}
    cacheable = can_cache_encodings(trial.config, eval_data)
    aligner.tower_cache = _tower_cache(trial, tower_caches) if cacheable else None
    metrics: dict[str, Any] = train_results
    evaluation: Evaluation | None = None
    # The training has measured dev already, and kept the ranks: of this very dev, unless it has changed since.
    if (
        split != "dev"
        or not _has_ranks(trial.folder / RANKS_FILE)
        or _dev_contents(trial.folder) != dataset_hashes(eval_data)
    ):
        # Not cross-fitted: this is the run's own model.
        selection = selection if split != "dev" else {}
        candidates = aligner.config.fusion.candidates if aligner.fusion is not None else 0
        evaluation = evaluate(
            aligner,
            eval_data.images,
            eval_data.captions,
            eval_data.caption_image,
            eval_data.image_identity,
            candidates,
            caption_group=eval_data.shared_text_ids,
        )
        metrics = evaluation.to_dict()
    halves = HalfWeights.of(eval_data, selection) if split == "dev" else None
    # In every cell the same batches: those of halves would not be.
    aligner.tower_cache = _tower_cache(trial, tower_caches, "minimal pairs") if cacheable and split != "dev" else None
    # Not asked for: what it takes to find other figures is another model or other data. But told.
    measured_by = [library_versions()]
    if evaluation is None and (trained_by := _trained_by(trial.folder)) not in measured_by:
        measured_by.append(trained_by)
    measurements = {
        "asked": inputs,
        "measured_by": measured_by,
        **{name: train_results[name] for name in ("training_seconds", "steps", "best_epoch")},
        **{name: metrics[name] for name in ("images", "captions", "candidates", "gain", "depths") if name in metrics},
        "audit": checks.to_dict(),
        "chosen": selection,
        "composition": {name: foil_accuracy(aligner, pair_list, halves) for name, pair_list in pairs.items()},
        "curves": read_curves(trial.folder),
    }
    # What is there is of something else, and stays until there is more: but none of it may stand beside new figures,
    # whenever this is cut off.
    path.unlink(missing_ok=True)
    study_ranks_file(trial.folder, split).unlink(missing_ok=True)
    if evaluation is not None:
        evaluation.save_ranks(study_ranks_file(trial.folder, split))
    write_json(path, measurements)
    return measurements


def _trained_by(folder: Path) -> dict[str, str]:
    """The versions that a run was begun with, by which its dev figures are; none where they were not kept."""
    try:
        return dict(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def load_measurements(
    trial: Trial,
    eval_data: CaptionedImages,
    split: str,
    pairs: dict[str, list[MinimalPair]],
    overlap: list[str] | None,
    audit_images: int,
    say: Log,
) -> dict[str, Any] | None:
    """What `measure_trial` has kept of this very data and model; None where it has to measure, and why is said."""
    return _load_measurements(
        trial, measurement_inputs(trial, eval_data, split, pairs, overlap, audit_images), split, say
    )


def _load_measurements(trial: Trial, inputs: dict[str, Any], split: str, say: Log) -> dict[str, Any] | None:
    measurements = read_if_current(trial.folder / MEASUREMENTS_FILE, inputs, say, trial.folder.name)
    if measurements is None:
        return None
    ranks = ranks_file(trial.folder, split)
    if not _has_ranks(ranks):
        say(f"{trial.folder.name}: measured again: {ranks} cannot be read")
        return None
    return measurements


def _has_ranks(ranks: Path) -> bool:
    try:
        return "ranks" in load_ranks(ranks)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return False


def _dev_contents(folder: Path) -> dict[str, str] | None:
    """The contents of the dev split that a training has measured; None where that is not known."""
    try:
        return json.loads((folder / "data.json").read_text(encoding="utf-8"))["dev"].get("contents")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def count_truncated_captions(folder: Path, eval_data: CaptionedImages, split: str) -> dict[str, Any]:
    """How many captions a run's `max_tokens` cuts, by split: as its training has counted, and of the split measured."""
    data_file = folder / "data.json"
    data_info = json.loads(data_file.read_text()) if data_file.is_file() else {}
    counted = data_info.get("cut_captions", {})
    tokenizer = open_tokenizer(folder)
    splits = {name: counts for name, counts in counted.items() if name != "max_tokens"}
    # A run from before they were counted has none, and dev may have other captions by now.
    if split not in splits or (split == "dev" and data_info["dev"].get("contents") != dataset_hashes(eval_data)):
        splits[split] = TruncationStats.from_tokens(tokenizer.tokenize(eval_data.captions)).to_dict()
    return {"max_tokens": tokenizer.max_tokens, "splits": splits}


def study_ranks_file(folder: Path, split: str) -> Path:
    """Where the ranks are that a study measured itself."""
    return folder / f"ranks-{split}.npz"


def ranks_file(folder: Path, split: str) -> Path:
    """Where the ranks of a split are kept: the study's own, or those of dev that the training kept."""
    study_file = study_ranks_file(folder, split)
    return study_file if study_file.is_file() or split != "dev" else folder / RANKS_FILE


def load_trial_ranks(trial: Trial, split: str) -> dict[str, PositiveRanks]:
    """The ranks of a measured cell: "ranks", and "dual" for one that re-ranks."""
    return load_ranks(ranks_file(trial.folder, split))


@dataclass(frozen=True)
class HalfWeights:
    """The weights of a pair's parts that each half of dev chose. half: the half that an image is in, 0 or 1."""

    half: dict[Any, int]
    weights: list[PairWeights]

    @classmethod
    def of(cls, eval_data: CaptionedImages, selection: dict[str, Any]) -> HalfWeights | None:
        """Of a run's dev images, from what its results say was chosen; None where nothing was, or not by halves."""
        halves = split_halves(eval_data) if selection.get("by") == "halves" and "weights" in selection else None
        if halves is None:
            return None
        weights_by_kind = selection["weights"]
        weights = [
            PairWeights(**{kind: weights_by_kind[kind]["halves"][half] for kind in weights_by_kind}) for half in (0, 1)
        ]
        return cls(dict(zip(eval_data.images, halves.image_half.tolist(), strict=True)), weights)


def foil_accuracy(
    aligner: Aligner, pairs: Sequence[MinimalPair], halves: HalfWeights | None = None
) -> dict[str, list[float]]:
    """By kind, for each pair whether its true caption outscores the twin: 1, 0, or 0.5 for a tie.

    halves: images that took part in choosing the weights are scored by those that the other half chose.
    """
    if not pairs:
        return {}
    scorer, outcomes = _DedupedPairs(aligner), np.empty(len(pairs))
    half_of_pair = np.array([-1 if halves is None else halves.half.get(pair.image, -1) for pair in pairs])
    own_weights = get_pair_weights(aligner)
    for half in np.unique(half_of_pair).tolist():
        pair_list = [pairs[index] for index in np.flatnonzero(half_of_pair == half).tolist()]
        set_pair_weights(aligner, own_weights if half < 0 or halves is None else halves.weights[1 - half])
        outcomes[half_of_pair == half] = score_minimal_pairs(
            scorer, [p.image for p in pair_list], [p.caption for p in pair_list], [p.foil for p in pair_list]
        )
    set_pair_weights(aligner, own_weights)
    kinds = dict.fromkeys(pair.kind for pair in pairs)
    return {kind: [float(outcomes[i]) for i, pair in enumerate(pairs) if pair.kind == kind] for kind in kinds}


class _DedupedPairs:
    """An aligner asked for pairs: a picture that is in several of them is encoded once."""

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner

    def score_pairs(
        self, images: Sequence[Any], captions: Sequence[str], image_index: np.ndarray, caption_index: np.ndarray
    ) -> np.ndarray:
        position_by_image: dict[Any, int] = {}
        positions = np.array([position_by_image.setdefault(image, len(position_by_image)) for image in images])
        return self.aligner.score_pairs(list(position_by_image), captions, positions[image_index], caption_index)


def read_curves(folder: Path) -> dict[str, list[float]]:
    """The training's loss, dev loss and dev rsum after each epoch, from metrics.jsonl; none where it cannot be read."""
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        ends = [line for line in lines if "dev" in line]
    except (OSError, ValueError, TypeError):
        ends = []
    return {
        "step": [line["step"] for line in ends],
        "loss": [line["train_loss"] for line in ends],
        "rsum": [line["dev"]["rsum"]["value"] for line in ends],
        "dev_loss": [line.get("dev_loss") for line in ends],
    }
