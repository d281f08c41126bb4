"""The run of `--init`: compatibility of its weights, and its influence on the figures of the new run.

Both are looked at when a run begins, and kept in its folder: by the time that it is measured, the other one may be
gone, or be another.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.hashes import run_hash
from clipvisionalign.data.run_data import is_unfinished, run_settings, working_directory_of
from clipvisionalign.models.aligner import PAIR_SCORER_PREFIXES, Aligner
from clipvisionalign.models.io import load_aligner, read_weights
from clipvisionalign.models.run_files import WEIGHTS_FILE, weights_file
from clipvisionalign.models.run_names import resolve_run
from clipvisionalign.starter import StarterNotInstalled
from clipvisionalign.training.overlap import training_overlap_note
from clipvisionalign.training.selection_notes import changed_dev_parts, init_selection_note

#: What a run folder keeps of the run that it started from.
INIT_FILE = "init.json"
#: What is drawn at random where no weights bring it; a tower is only where the settings ask for that by name.
RANDOM_PREFIXES = ("image_head.", "text_head.", *PAIR_SCORER_PREFIXES)

#: Shown to both models: capitals, accents, numbers, signs, another script, and more words than a window sees.
_CAPTIONS = (
    "a dog", "Two Children in the GRASS, 3 of 12!", "un café près de l'église; 图片 of a \u00e5ngstr\u00f6m",
    "on the left of a small red ring there are three large blue squares and above them a yellow star in the picture",
)  # fmt: skip
#: How far a number of a unit vector may be off where one model is asked twice in a process: no two additions differ.
MAX_VECTOR_DIFFERENCE = 5e-6


# --- what the figures owe to it --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InitRun:
    """What a run's figures owe to the run that it started from.

    Attributes:
        run: It, as the settings name it.
        contents: A hash of its model; "missing" where it was no longer there.
        chosen_on: Why figures of these dev images are not out of sample, as its epoch was chosen by them; None where
            they are.
        trained_on: That it, or one before it, was trained on them; None where none was.
    """

    run: str
    contents: str
    chosen_on: str | None = None
    trained_on: str | None = None

    @classmethod
    def of(cls, out: Path, name: str, init: Path, dev: CaptionedImages) -> InitRun:
        """What a run owes to another.

        Args:
            out: The folder of the run, whose settings and data are recorded there.
            name: The other one, as the settings name it.
            init: The folder of the other one.
            dev: The dev images of the run.

        Returns:
            What is known of it.
        """
        if weights_file(init) is None:
            reason = "which is no longer there: whether its epoch was chosen by these images is unknown"
            return cls(name, "missing", f"it starts from {name}, {reason}")
        note, previous = training_overlap_note(out, dev, dev), cls.load(init)
        notes = [note.note] if note else []
        if previous is not None and previous.trained_on and set(changed_dev_parts(init, dev)) <= {"partners"}:
            # What that one started from may be gone by now.
            notes.append(previous.trained_on)
        trained = "; and ".join(dict.fromkeys(notes)) or None
        return cls(name, run_hash(init), init_selection_note(init, dev), trained)

    def save(self, out: Path) -> None:
        """Write it into a run folder.

        Args:
            out: The folder.

        Raises:
            OSError: It cannot be written.
        """
        (out / INIT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, run: Path) -> InitRun | None:
        """What a run folder keeps.

        Args:
            run: The folder.

        Returns:
            It; None where the folder keeps nothing, as one of an earlier version.
        """
        try:
            return cls(**json.loads((run / INIT_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


# --- what is taken of it ---------------------------------------------------------------------------------------------


def check_init(run: str) -> None:
    """Check that a run can be started from.

    Args:
        run: The folder of that run.

    Raises:
        FileNotFoundError: It is no run folder.
        ValueError: The run is not finished, or its settings cannot be read.
    """
    if weights_file(run) is None:
        raise FileNotFoundError(f"--init {run}: not a run folder: no {WEIGHTS_FILE} in it")
    import yaml

    try:
        unfinished = is_unfinished(run)
    except yaml.YAMLError as error:
        raise ValueError(f"--init {run}: its config.yaml cannot be read: {str(error).splitlines()[0]}") from None
    if unfinished:
        raise ValueError(
            f"--init {run}: that run is not finished (it has no results.json): finish it first, with clipvisionalign "
            f"train --resume {run}"
        )


def model_settings_of(run: str | Path) -> dict[str, Any]:
    """The settings of a run's model, as its folder holds them.

    Args:
        run: The folder, or `starter`.

    Returns:
        What stands under `model` in its config.yaml, folders of towers as paths from here; {} where it cannot be read,
        or has none.

    Raises:
        StarterNotInstalled: It is `starter`, and the package is not installed.
    """
    import yaml

    try:
        settings = run_settings(run := resolve_run(run)).get("model")
    except StarterNotInstalled:
        raise
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(settings, dict):
        return {}
    directory = working_directory_of(run)

    def from_here(values: dict[str, Any], name: str) -> dict[str, Any]:
        path = Path(str(values.get(name) or ""))
        is_below = path.parts and not path.exists() and (directory / path).exists()
        return values | {name: str(directory / path)} if is_below else values

    towers = {
        tower: from_here(settings[tower], "name")
        for tower in ("image_tower", "text_tower")
        if isinstance(settings.get(tower), dict)
    }
    return from_here(settings, "pretrained") | towers


def load_init_weights(aligner: Aligner, run: str, model: Aligner | None = None) -> set[str]:
    """Take the weights of a finished run, as far as it has them.

    Args:
        aligner: The model that takes them, on the CPU.
        run: The folder of the finished run.
        model: The run's model, on the CPU, where it is not to be read from its folder.

    Returns:
        The names of the weights that were taken.

    Raises:
        ValueError: Its towers are others: by the shapes of their weights, or by what is made of them.
    """
    state, own_state = (
        read_weights(run) if model is None else model.state_dict(),
        aligner.state_dict(),
    )
    shared = {
        name: tensor for name, tensor in state.items() if name in own_state and own_state[name].shape == tensor.shape
    }
    mismatched = [name for name in {*state, *own_state} - set(shared) if not name.startswith(PAIR_SCORER_PREFIXES)]
    if mismatched:
        pretrained = (run_settings(run).get("model") or {}).get("pretrained", "")
        way_out = "; give this run the towers and the settings of its config.yaml"
        if pretrained and not aligner.config.pretrained:
            way_out = f": it started from a pretrained model; give --model.pretrained {pretrained} beside --init {run}"
        raise ValueError(f"--init {run}: other towers than this run's: {sorted(mismatched)[0]} does not fit{way_out}")
    aligner.load_state_dict(shared, strict=False)
    # What is drawn at random after this is drawn as if there had been no other model.
    with torch.random.fork_rng(devices=[]):
        check_same_encodings(aligner, model or load_aligner(run, "cpu", packed=False), run)
    return set(shared)


def check_same_encodings(aligner: Aligner, other: Aligner, run: str) -> None:
    """Check that one model's weights, which the other has too, give the same vectors in it.

    They would not with another tokenizer, pooling, or scaling of the images, and whatever else no weight's shape
    determines.

    Args:
        aligner: The model that has taken the weights, on the CPU.
        other: The model that they are from, on the CPU.
        run: The run of that model, for the message.

    Raises:
        ValueError: A setting or a vector differs.
    """
    for what, (own_value, other_value, remedy) in _compared_settings(aligner, other).items():
        if own_value != other_value:
            message = f"its {what} is {other_value}, this run's {own_value}; give {remedy}, or another --init"
            raise ValueError(f"--init {run}: other towers than this run's: {message}")
    for what, own_value, other_value in zip(
        ("images", "captions"), probe_vectors(aligner), probe_vectors(other), strict=True
    ):
        difference = float((own_value - other_value).abs().max())
        # Written so that nan is refused too.
        if not difference <= MAX_VECTOR_DIFFERENCE:
            raise ValueError(
                f"--init {run}: other towers than this run's: with the same weights its {what} have other vectors (off "
                f"by {difference:.2g}); give this run the towers and the settings of {run}/config.yaml, or "
                "another --init"
            )


def _compared_settings(aligner: Aligner, other: Aligner) -> dict[str, tuple[Any, Any, str]]:
    """What decides what weights mean and has a name: here, there, and the setting that would make it the same."""
    image, text = "--model.image_tower", "--model.text_tower"

    def both(read: Any) -> tuple[Any, Any]:
        return read(aligner), read(other)

    name, tower = other.config.text_tower.name, f"{image}.name {other.config.image_tower.name}"
    vocabularies = both(lambda a: a.text_tower.vocabulary())
    pretrained = both(lambda a: a.config.pretrained)
    if any(pretrained):
        # Whatever a pretrained model has of its own is set by its name alone.
        model = f"--model.pretrained {pretrained[1]}" if pretrained[1] else "the towers of that run"
        settings = {
            "preprocessing": (*both(lambda a: repr(a.image_tower.image_transform)), model),
            "pooling": (*both(lambda a: a.text_tower.pooling), model),
            "window": (*both(lambda a: a.text_tower.window or "none"), f"--model.design and {text}.window of that run"),
        }
        if vocabularies[0] != vocabularies[1]:
            settings["tokenizer"] = "another", "of other words", model
        return settings | _compared_heads(aligner, other)
    settings = {
        "image size": (
            *both(lambda a: a.image_tower.image_transform.size),
            f"{image}.size {other.image_tower.image_transform.size}",
        ),
        "images' mean": (*both(lambda a: a.image_tower.image_transform.mean), tower),
        "images' deviation": (*both(lambda a: a.image_tower.image_transform.std), tower),
        "number of blocks": (*both(lambda a: a.config.image_tower.blocks), f"{image}.blocks of that run"),
        "look at mirrored images": (
            *both(lambda a: str(a.config.image_tower.mirrored).lower()), f"{image}.mirrored of that run",
        ),
        "pooling": (*both(lambda a: a.text_tower.pooling), f"{text}.pooling {other.text_tower.pooling}"),
        "window": (
            *both(lambda a: a.text_tower.window or "none"), f"{text}.attention and {text}.window of that run",
        ),
    }  # fmt: skip
    settings |= _compared_heads(aligner, other)
    if vocabularies[0] != vocabularies[1]:
        settings["tokenizer"] = "another", "of other words", f"{text}.name {name}, with the tokenizer that it had"
    return settings


def _compared_heads(aligner: Aligner, other: Aligner) -> dict[str, tuple[Any, Any, str]]:
    """The heads of two fusions, as `_compared_settings` has them."""
    if aligner.fusion is None or other.fusion is None:
        return {}
    own, heads = aligner.config.fusion.heads, other.config.fusion.heads
    return {"fusion's number of heads": (own, heads, f"--model.fusion.heads {heads}")}


@torch.no_grad()
def probe_vectors(aligner: Aligner) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors of a grey ramp, a coloured one, and a few captions.

    Args:
        aligner: The model.

    Returns:
        Those of the images (2, D), and of the captions.
    """
    ramp = Image.linear_gradient("L")
    images = [ramp.convert("RGB"), Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))]
    return aligner.encode_images(images), aligner.encode_captions(_CAPTIONS)


def check_frozen_initialised(aligner: Aligner, loaded: set[str], freeze: str, layers: list[str], init: str) -> None:
    """Check that no weights that were drawn at random would stay as they are.

    Constants, such as a temperature's start, are not random.

    Args:
        aligner: The model, frozen as it is trained.
        loaded: Names of the weights that are from another run.
        freeze: The setting `freeze`, for the message.
        layers: The setting `freeze_layers`, likewise.
        init: The run that `loaded` are from; "" for none.

    Raises:
        ValueError: Some are neither trained nor from another run.
    """

    # A pretrained model brings its heads.
    prefixes = PAIR_SCORER_PREFIXES if aligner.config.pretrained else RANDOM_PREFIXES

    def is_random(name: str, weight: torch.Tensor) -> bool:
        return name.startswith(prefixes) and name not in loaded and bool((weight != weight.flatten()[0]).any())

    uninitialised = [
        name for name, each in aligner.named_parameters() if not each.requires_grad and is_random(name, each)
    ]
    if not uninitialised:
        return
    parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in uninitialised))
    flag = "--freeze all" if freeze == "all" else f"--freeze_layers {' '.join(layers)}"
    design = "cross" if "fusion" in parts else "late" if "late" in parts else ""
    why = f"--init {init} brings none of it" if init else "there is no --init"
    remedy = f"give --init a finished run of the design '{design}'" if design else "give --init a finished run"
    other = ", or --freeze both, which trains them" if freeze == "all" else ", or leave it out"
    raise ValueError(f"{flag} would keep {parts} as drawn at random ({uninitialised[0]}), as {why}: {remedy}{other}")
