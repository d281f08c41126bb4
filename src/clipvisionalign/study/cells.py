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

from clipvisionalign.batch import CutCaptions
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.fingerprint import changed, data_contents, hash_of, hash_of_file, run_contents
from clipvisionalign.data.minimal_pairs import MinimalPair
from clipvisionalign.data.of_run import about_data
from clipvisionalign.files import written_aside
from clipvisionalign.models.aligner import Aligner, Remembered
from clipvisionalign.models.device import versions
from clipvisionalign.models.io import load_aligner, pin_towers
from clipvisionalign.models.tokens import open_tokenizer
from clipvisionalign.retrieval.audit import LEAST, audit
from clipvisionalign.retrieval.evaluate import RANKS, Evaluation, evaluate, load_ranks
from clipvisionalign.retrieval.minimal_pairs import outscored
from clipvisionalign.retrieval.ranks import PartnerRanks
from clipvisionalign.settings import config_from_dict
from clipvisionalign.study.plan import Cell
from clipvisionalign.training.checkpoint import checkpoints_in
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.cross_fit import PairWeights, set_weights, weights_of
from clipvisionalign.training.halves import halves_of
from clipvisionalign.training.init_run import InitRun
from clipvisionalign.training.results import can_be_remembered
from clipvisionalign.training.run_folder import begun_in
from clipvisionalign.training.train import resume, train
from clipvisionalign.training.training_data import refuse_changed
from clipvisionalign.training.without_effect import NO_EFFECT

Say = Callable[[str], None]

#: What a cell's folder holds beside the run, once it is measured.
MEASURED = "measured.json"
#: In a study's folder: the commits that its runs take their towers from.
TOWERS = "towers.json"


def write_json(path: Path, found: Any) -> None:
    """A study that is killed leaves no half of a file."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, way_out: str = "put back a whole one, or remove it") -> Any:
    """What a file of the study's own holds. Raises ValueError with its name and the way out where that cannot be
    read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error}); {way_out}") from None


def with_commits(cells: Sequence[Cell], study: Path, say: Say) -> list[Cell]:
    """The cells that are to be trained with one commit of the hub for each tower's name, whenever they are trained.

    What cannot be had now is left as it is: those cells say why when their turn comes. Raises FileExistsError, before
    anything is written, where another run is in a cell's place (`refuse_other`).
    """
    for cell in cells:
        refuse_other(cell)
    kept = study / TOWERS
    known: dict[str, list[str]] = read_json(kept) if kept.is_file() else {}
    before, found = dict(known), []
    for cell in cells:
        model = cell.config.model
        towers = (model.image_tower, model.text_tower)
        asked = json.dumps([[tower.name, tower.weights, tower.revision] for tower in towers])
        if asked not in known and not (cell.folder / "config.yaml").is_file():
            try:
                pinned = pin_towers(model, say)
            except (OSError, ValueError):
                found.append(cell)
                continue
            known[asked] = [pinned.image_tower.revision, pinned.text_tower.revision]
        image, text = known.get(asked, [tower.revision for tower in towers])
        model = replace(
            model, image_tower=replace(towers[0], revision=image), text_tower=replace(towers[1], revision=text)
        )
        found.append(replace(cell, config=replace(cell.config, model=model)))
        if found[-1] != cell:
            refuse_other(found[-1])
    if known != before:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, known)
    return found


def refuse_other(cell: Cell) -> None:
    """Raises FileExistsError where a run with other settings, or of another base, stands in a cell's place."""
    import yaml

    settings = cell.folder / "config.yaml"
    if not settings.is_file():
        return
    there = config_from_dict(RunConfig, yaml.safe_load(settings.read_text()))
    # A run records the commits that it took its towers from, whichever its settings left open.
    towers = ("image_tower", "text_tower")
    asked = {name: getattr(cell.config.model, name) for name in towers}
    taken = {name: getattr(there.model, name) for name in towers}
    same = {
        name: replace(taken[name], revision=asked[name].revision)
        for name in towers
        if not asked[name].revision or not taken[name].revision
    }
    there = replace(there, model=replace(there.model, **same))
    # One that left its layout open has recorded which one it was.
    if "auto" in (layouts := {there.layout, cell.config.layout}) and layouts <= {"auto", recorded_layout(cell.folder)}:
        there = replace(there, layout=cell.config.layout)
    if _as_it_lies(there, begun_in(cell.folder)) != _as_it_lies(cell.config, Path.cwd()):
        raise FileExistsError(f"{cell.folder}: a run with other settings is there; give another --out, or remove it")
    if cell.config.init and (Path(cell.config.init) / "results.json").is_file():
        # One that is yet to be trained is looked at when it is.
        refuse_other_base(cell)


def _as_it_lies(config: RunConfig, directory: Path) -> RunConfig:
    """A cell's settings with each path as it lies, however the study, or the data, was named: what is within the study
    by its place there. directory: that paths are relative to."""
    study = (directory / config.out).resolve().parent.parent

    def lies(name: str) -> str:
        if name in ("", "auto", "off"):
            return name
        found = (directory / name).resolve()
        return f"STUDY/{found.relative_to(study)}" if found.is_relative_to(study) else str(found)

    def there(name: str) -> str:
        # It may be a name of the hub's, or a word.
        return lies(name) if name and (directory / name).exists() else name

    image, text = config.model.image_tower, config.model.text_tower
    model = replace(
        config.model,
        image_tower=replace(image, weights=there(image.weights)),
        text_tower=replace(text, name=there(text.name), weights=there(text.weights)),
    )
    paths: dict[str, Any] = {name: lies(getattr(config, name)) for name in ("data", "dev_data", "out", "init", "cache")}
    return replace(config, model=model, **paths)


def settings_hash(cell: Cell) -> str:
    """What the runs of a variant have in common, whatever the study is named by: all settings but seed, folders and the
    number of steps."""
    config = replace(_as_it_lies(cell.config, Path.cwd()), seed=0, out="", init="", steps=0, epochs=0)
    return hash_of([repr(config)])


def refuse_other_base(cell: Cell, say: Say = lambda line: None) -> None:
    """Raises FileExistsError where a cell's run, finished or stopped, was begun from other weights than those of the
    cell that it stands on: that one was trained anew since. A run from before this was recorded cannot be compared:
    that is said."""
    begun = (cell.folder / "results.json").is_file() or checkpoints_in(cell.folder)
    if not cell.config.init or not begun:
        return
    base, kept = Path(cell.config.init), InitRun.load(cell.folder)
    if kept is None:
        told = f"whether {base.name} is still what it stands on was not compared"
        say(f"{cell.folder}: from before that was recorded: {told}")
    elif kept.contents != run_contents(base):
        raise FileExistsError(
            f"{cell.folder}: stands on other weights than {base} has now, which was trained anew since; remove "
            f"{cell.folder}, to train it anew too, or give another --out"
        )


def recorded_layout(run: Path) -> str:
    """The layout that a run's data set was read in; "" where that is not recorded."""
    try:
        return str(about_data(run).get("layout", ""))
    except ValueError:
        return ""


def refuse_changed_data(cells: Sequence[Cell]) -> None:
    """Raises DataError where finished cells were trained on other data than lies there now: figures of both would stand
    beside each other. Of those that recorded the same, one is compared; what cannot be compared is told of when its
    turn comes (`train_cell`)."""
    finished: dict[str, Cell] = {}
    for cell in cells:
        if (cell.folder / "results.json").is_file():
            with suppress(ValueError):
                finished.setdefault(json.dumps(about_data(cell.folder).get("as_read")), cell)
    for cell in finished.values():
        refuse_changed(cell.folder, cell.config, lambda line: None, ("train",))


def train_cell(cell: Cell, say: Say, remembered: dict[str, Remembered] | None = None) -> None:
    """Train a cell, or go on with it where it was stopped; a finished one stays.

    remembered: as in `measure_cell`.
    Raises what `train` raises, DataError where a finished one was trained on other data than lies there now, and
    FileExistsError where it stands on another base. A dev split that changed is measured anew (`measure_cell`).
    """
    refuse_other_base(cell, say)
    if (cell.folder / "results.json").is_file():
        try:
            refuse_changed(cell.folder, cell.config, say, ("train",))
        except json.JSONDecodeError as error:
            told = f"what it was trained on cannot be read ({error}); put back a whole one, or remove {cell.folder}"
            raise ValueError(f"{cell.folder / 'data.json'}: {told}") from None
        say(f"{cell.folder}: finished already")
    elif (cell.folder / "config.yaml").is_file():
        resume(cell.folder, say, _remembered(cell, remembered))
    else:
        # A study's settings are those of all its variants: what has no effect on one is another's.
        train(
            cell.config, lambda line: None if line.startswith(NO_EFFECT) else say(line),
            remembered=_remembered(cell, remembered),
        )  # fmt: skip


def _remembered(cell: Cell, kept: dict[str, Remembered] | None, what: str = "") -> Remembered | None:
    """What is remembered of the cell's towers, if they are frozen; None where each cell may have its own.

    what: is asked, where the batches of something else would change the last digits.
    """
    config, model = cell.config, cell.config.model
    drawn = "random" in (model.image_tower.weights, model.text_tower.weights)
    # Drawn at random, a tower is another one for each seed.
    if kept is None or config.init or drawn:
        return None
    sparse = model.design == "sparse"
    return kept.setdefault(repr((model.image_tower, model.text_tower, sparse, config.device, what)), Remembered())


def asked_of(
    cell: Cell, part: CaptionedImages, split: str, pairs: dict[str, list[MinimalPair]], overlap: list[str] | None,
    audit_images: int,
) -> dict[str, Any]:  # fmt: skip
    """What the figures of a cell are made from, by content: kept beside them, so that others are not taken for them."""
    return {
        "model": run_contents(cell.folder),
        **data_contents(part),
        "minimal pairs": {name: _hash_of_pairs(some) for name, some in pairs.items()},
        "overlap of splits": overlap,
        "split": split,
        "audit": audit_images,
    }


def _hash_of_pairs(pairs: Sequence[MinimalPair]) -> str:
    images = (hash_of([p.image]) if isinstance(p.image, bytes) else hash_of_file(p.image) for p in pairs)
    return hash_of(part for p, image in zip(pairs, images, strict=True) for part in (image, p.true, p.twin, p.kind))


def reusable(kept: Path, asked: dict[str, Any], say: Say, what: str) -> Any:
    """What the file `kept` holds, if it was made from what is `asked` now; else None, and why is said in one line."""
    if not kept.is_file():
        return None
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        before = found.get("asked")
    except (OSError, ValueError, AttributeError):
        say(f"{what}: measured again: {kept} cannot be read")
        return None
    differing = changed(before, asked)
    if not differing:
        return found
    if not isinstance(before, dict) or not set(asked) <= set(before):
        say(f"{what}: measured again: an earlier version kept the figures, and not what they were made from")
    else:
        say(f"{what}: measured again: not the same as before: {', '.join(differing)}")
    return None


def measure_cell(
    cell: Cell, part: CaptionedImages, split: str, pairs: dict[str, list[MinimalPair]], overlap: list[str] | None,
    audit_images: int, say: Say = print, remembered: dict[str, Remembered] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is asked of one trained cell but time and memory; kept in its folder, with what it was made from.

    remembered: what frozen towers gave in other cells, by their settings, to be used and added to.
    part: the split that is measured; pairs: sets of minimal pairs by name; overlap: pictures in two splits.
    """
    kept = cell.folder / MEASURED
    asked = asked_of(cell, part, split, pairs, overlap, audit_images)
    found = _kept_of(cell, asked, split, say)
    if found is not None:
        return found
    trained = read_json(cell.folder / "results.json", f"remove {cell.folder}, to train it anew")
    aligner = load_aligner(cell.folder, cell.config.device)
    aligner.show_progress = True
    # Before anything else is asked, as a model that had been shown true partners could give those back; and by the
    # towers each time: that they always give the same is a part of what is checked.
    checks = audit(
        aligner, part.images, part.captions, part.caption_image, part.image_identity, overlap, max(audit_images, LEAST),
        caption_group=part.caption_group,
    )  # fmt: skip
    chosen = {name: told for name, told in trained.get("chosen", {}).items() if name != "model_in_sample"}
    same = can_be_remembered(cell.config, part)
    aligner.remembered = _remembered(cell, remembered) if same else None
    figures: dict[str, Any] = trained
    evaluated: Evaluation | None = None
    # The training has measured dev already, and kept the ranks: of this very dev, unless it has changed since.
    if split != "dev" or not _readable(cell.folder / RANKS) or _measured_on(cell.folder) != data_contents(part):
        # Not cross-fitted: this is the run's own model.
        chosen = chosen if split != "dev" else {}
        candidates = aligner.config.fusion.candidates if aligner.fusion is not None else 0
        evaluated = evaluate(
            aligner, part.images, part.captions, part.caption_image, part.image_identity, candidates,
            caption_group=part.caption_group,
        )  # fmt: skip
        figures = evaluated.to_dict()
    halves = HalfWeights.of(part, chosen) if split == "dev" else None
    # In every cell the same batches: those of halves would not be.
    aligner.remembered = _remembered(cell, remembered, "minimal pairs") if same and split != "dev" else None
    # Not asked for: what it takes to find other figures is another model or other data. But told.
    measured_by = [versions()]
    if evaluated is None and (trained_by := _trained_by(cell.folder)) not in measured_by:
        measured_by.append(trained_by)
    found = {
        "asked": asked,
        "measured_by": measured_by,
        **{name: trained[name] for name in ("training_seconds", "steps", "best_epoch")},
        **{name: figures[name] for name in ("images", "captions", "candidates", "gain", "depths") if name in figures},
        "audit": checks.to_dict(),
        "chosen": chosen,
        "composition": {name: twins_found(aligner, some, halves) for name, some in pairs.items()},
        "curves": curves(cell.folder),
    }
    # What is there is of something else, and stays until there is more: but none of it may stand beside new figures,
    # whenever this is cut off.
    kept.unlink(missing_ok=True)
    own_ranks(cell.folder, split).unlink(missing_ok=True)
    if evaluated is not None:
        evaluated.save_ranks(own_ranks(cell.folder, split))
    write_json(kept, found)
    return found


def _trained_by(folder: Path) -> dict[str, str]:
    """The versions that a run was begun with, by which its dev figures are; none where they were not kept."""
    try:
        return dict(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def kept_figures(
    cell: Cell, part: CaptionedImages, split: str, pairs: dict[str, list[MinimalPair]], overlap: list[str] | None,
    audit_images: int, say: Say,
) -> dict[str, Any] | None:  # fmt: skip
    """What `measure_cell` has kept of this very data and model; None where it has to measure, and why is said."""
    return _kept_of(cell, asked_of(cell, part, split, pairs, overlap, audit_images), split, say)


def _kept_of(cell: Cell, asked: dict[str, Any], split: str, say: Say) -> dict[str, Any] | None:
    found = reusable(cell.folder / MEASURED, asked, say, cell.folder.name)
    if found is None:
        return None
    ranks = ranks_file(cell.folder, split)
    if not _readable(ranks):
        say(f"{cell.folder.name}: measured again: {ranks} cannot be read")
        return None
    return found


def _readable(ranks: Path) -> bool:
    try:
        return "ranks" in load_ranks(ranks)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
        return False


def _measured_on(folder: Path) -> dict[str, str] | None:
    """The contents of the dev split that a training has measured; None where that is not known."""
    try:
        return json.loads((folder / "data.json").read_text(encoding="utf-8"))["dev"].get("contents")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def cut_captions(folder: Path, part: CaptionedImages, split: str) -> dict[str, Any]:
    """How many captions a run's `max_tokens` cuts, by split: as its training has counted, and of the split measured."""
    kept = folder / "data.json"
    told = json.loads(kept.read_text()) if kept.is_file() else {}
    known = told.get("cut_captions", {})
    tokenizer = open_tokenizer(folder)
    splits = {name: found for name, found in known.items() if name != "max_tokens"}
    # A run from before they were counted has none, and dev may have other captions by now.
    if split not in splits or (split == "dev" and told["dev"].get("contents") != data_contents(part)):
        splits[split] = CutCaptions.of(tokenizer.tokenize(part.captions)).to_dict()
    return {"max_tokens": tokenizer.max_tokens, "splits": splits}


def own_ranks(folder: Path, split: str) -> Path:
    """Where the ranks are that a study measured itself."""
    return folder / f"ranks-{split}.npz"


def ranks_file(folder: Path, split: str) -> Path:
    """Where the ranks of a split are kept: the study's own, or those of dev that the training kept."""
    own = own_ranks(folder, split)
    return own if own.is_file() or split != "dev" else folder / RANKS


def ranks_of(cell: Cell, split: str) -> dict[str, PartnerRanks]:
    """The ranks of a measured cell: "ranks", and "dual" for one that re-ranks."""
    return load_ranks(ranks_file(cell.folder, split))


@dataclass(frozen=True)
class HalfWeights:
    """The weights of a pair's parts that each half of dev chose. half: the half that an image is in, 0 or 1."""

    half: dict[Any, int]
    weights: list[PairWeights]

    @classmethod
    def of(cls, part: CaptionedImages, chosen: dict[str, Any]) -> HalfWeights | None:
        """Of a run's dev images, from what its results say was chosen; None where nothing was, or not by halves."""
        halves = halves_of(part) if chosen.get("by") == "halves" and "weights" in chosen else None
        if halves is None:
            return None
        told = chosen["weights"]
        weights = [PairWeights(**{kind: told[kind]["halves"][half] for kind in told}) for half in (0, 1)]
        return cls(dict(zip(part.images, halves.image.tolist(), strict=True)), weights)


def twins_found(
    aligner: Aligner, pairs: Sequence[MinimalPair], halves: HalfWeights | None = None
) -> dict[str, list[float]]:
    """By kind, for each pair whether its true caption outscores the twin: 1, 0, or 0.5 for a tie.

    halves: images that took part in choosing the weights are scored by those that the other half chose.
    """
    if not pairs:
        return {}
    scored, found = _PairsOf(aligner), np.empty(len(pairs))
    of_pair = np.array([-1 if halves is None else halves.half.get(pair.image, -1) for pair in pairs])
    own = weights_of(aligner)
    for half in np.unique(of_pair).tolist():
        some = [pairs[place] for place in np.flatnonzero(of_pair == half).tolist()]
        set_weights(aligner, own if half < 0 or halves is None else halves.weights[1 - half])
        found[of_pair == half] = outscored(
            scored, [p.image for p in some], [p.true for p in some], [p.twin for p in some]
        )
    set_weights(aligner, own)
    kinds = dict.fromkeys(pair.kind for pair in pairs)
    return {kind: [float(found[i]) for i, pair in enumerate(pairs) if pair.kind == kind] for kind in kinds}


class _PairsOf:
    """An aligner asked for pairs: a picture that is in several of them is encoded once."""

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner

    def score_pairs(
        self, images: Sequence[Any], captions: Sequence[str], image_index: np.ndarray, caption_index: np.ndarray
    ) -> np.ndarray:
        place: dict[Any, int] = {}
        which = np.array([place.setdefault(image, len(place)) for image in images])
        return self.aligner.score_pairs(list(place), captions, which[image_index], caption_index)


def curves(folder: Path) -> dict[str, list[float]]:
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
