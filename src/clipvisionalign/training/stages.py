"""Stages of a fine-tuning: what each of them trains, for how many epochs, at which learning rate.

A linear probe before the whole model is tuned keeps features that large first gradients of new heads would distort
(Kumar et al., "Fine-tuning can distort pretrained features", arXiv:2202.10054).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: What a stage may train, each with the setting `freeze` that keeps the rest as it is.
FREEZE_OF_STAGE = {"heads": "both", "text": "image", "image": "text", "all": "none", "fusion": "all"}
#: Settings that a stage has of its own.
SET_BY_STAGES = ("epochs", "freeze", "steps")
#: The runs of all stages but the last, in the folder of the run that they are stages of.
STAGES_FOLDER = "stages"

#: The settings that the rates of a stage are for, in their order.
RATES = ("text_lr", "image_lr", "head_lr")

_FORM = (
    "stages have the form WHAT:EPOCHS or WHAT:EPOCHS@RATE, separated by commas, such as heads:1,all:3@1e-5, where WHAT "
    f"is one of {', '.join(FREEZE_OF_STAGE)}, and RATE is one learning rate, or TEXT/IMAGE/HEADS"
)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        trains: What it trains, a key of `FREEZE_OF_STAGE`; heads, late interaction and fusion are trained with each of
            "heads", "text", "image" and "all".
        epochs: Passes over the training images.
        rates: Learning rates of the text tower, the image tower and the heads; None for those of the run.
    """

    trains: str
    epochs: int
    rates: tuple[float, float, float] | None = None

    @property
    def freeze(self) -> str:
        """The setting `freeze` of the stage's run."""
        return FREEZE_OF_STAGE[self.trains]

    def __str__(self) -> str:
        return f"{self.trains}:{self.epochs}" + (f"@{self.rates_text}" if self.rates else "")

    @property
    def rates_text(self) -> str:
        """Its rates as the setting has them: one, where all are equal, or three; empty for those of the run."""
        rates = [repr(float(rate)) for rate in self.rates or ()]
        return "/".join(rates if len(set(rates)) > 1 else rates[:1])

    @property
    def recorded_rates(self) -> float | dict[str, float] | None:
        """Its rates as results.json has them: one, where all are equal, else by setting; None for those of the run."""
        if self.rates is None:
            return None
        return dict(zip(RATES, self.rates, strict=True)) if len(set(self.rates)) > 1 else self.rates[0]


def parse_stages(text: str) -> list[Stage]:
    """Read the setting `stages`.

    Args:
        text: Stages as `WHAT:EPOCHS` or `WHAT:EPOCHS@RATE`, separated by commas; empty for none. A rate is one for all
            that the stage trains, or `TEXT/IMAGE/HEADS`, one for each tower and one for the heads.

    Returns:
        The stages in their order.

    Raises:
        ValueError: A stage has another form, trains something unknown, or has no epoch.

    >>> [str(stage) for stage in parse_stages("heads:1, all:3@1e-5")]
    ['heads:1', 'all:3@1e-05']
    >>> parse_stages("all:3@5e-5/1e-4/3e-4")[0].rates
    (5e-05, 0.0001, 0.0003)
    """
    return [_parse_stage(text, part.strip()) for part in text.split(",")] if text.strip() else []


def _parse_stage(text: str, part: str) -> Stage:
    trains, colon, schedule = part.partition(":")
    count, at, rate_text = schedule.partition("@")
    if trains not in FREEZE_OF_STAGE:
        near = difflib.get_close_matches(trains, FREEZE_OF_STAGE, 1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise ValueError(f"--stages {text}: nothing is called '{trains}'{hint}: {_FORM}")
    if not colon or not count.strip().isdecimal():
        raise ValueError(f"--stages {text}: '{part}' has no number of epochs: {_FORM}")
    if int(count) < 1:
        raise ValueError(f"--stages {text}: '{part}' has no epoch: give it at least one, or leave it out")
    if not at:
        return Stage(trains, int(count))
    try:
        rates = [float(rate) for rate in rate_text.split("/")]
    except ValueError:
        rates = [-1.0]
    if not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"--stages {text}: the learning rate of '{part}' should be above 0 and at most 1")
    if len(rates) not in (1, len(RATES)):
        raise ValueError(f"--stages {text}: '{part}' has {len(rates)} learning rates: {_FORM}")
    text_rate, image_rate, head_rate = rates * (len(RATES) // len(rates))
    return Stage(trains, int(count), (text_rate, image_rate, head_rate))


def total_epochs(stages: str, epochs: int) -> int:
    """The epochs of a run.

    Args:
        stages: The setting `stages`; empty for a run without stages.
        epochs: The setting `epochs`.

    Returns:
        Those of all stages, where the run has stages, else `epochs`.

    Raises:
        ValueError: `stages` has another form.

    >>> total_epochs("heads:1,all:3", 6), total_epochs("", 6)
    (4, 6)
    """
    return sum(stage.epochs for stage in parse_stages(stages)) or epochs


def check_stages(text: str, others: Sequence[str], design: str, has_start: bool, adapted: str) -> None:
    """Check stages against the other settings of a run.

    Args:
        text: The setting `stages`.
        others: Settings that a stage has of its own, and that are given beside it.
        design: The design of the model.
        has_start: Whether the run starts from another run.
        adapted: The towers that LoRA adapts: "text", "image" or "both"; "" without LoRA.

    Raises:
        ValueError: They do not fit each other.
    """
    stages = parse_stages(text)
    if others:
        flags = ", ".join(f"--{name}" for name in others)
        raise ValueError(f"--stages {text} gives each stage its own {flags}: leave {flags} out, or --stages")
    names = [stage.trains for stage in stages]
    if "fusion" in names and design != "cross":
        raise ValueError(f"--stages {text}: only the design 'cross' has a fusion, and this run's design is '{design}'")
    if names[0] == "fusion" and not has_start:
        raise ValueError(
            f"--stages {text}: a first stage of the fusion alone would keep heads as drawn at random; put another "
            "stage before it, or give --init"
        )
    if adapted and not any(adapted_in_stage(stage, adapted) for stage in stages):
        raise ValueError(
            f"--stages {text} with --peft lora: no stage trains what --lora.towers {adapted} adapts; give a stage of "
            "'all', or leave --peft out"
        )


def adapted_in_stage(stage: Stage, towers: str) -> str:
    """The towers that LoRA adapts in a stage, of those that the run adapts.

    Args:
        stage: The stage.
        towers: Those that the run adapts: "image", "text" or "both".

    Returns:
        "image", "text" or "both"; "" for none.

    >>> adapted_in_stage(Stage("text", 1), "both"), adapted_in_stage(Stage("heads", 1), "both")
    ('text', '')
    """
    trained = {"text": ("text",), "image": ("image",), "all": ("text", "image")}.get(stage.trains, ())
    chosen = [tower for tower in trained if towers in (tower, "both")]
    return "both" if len(chosen) == 2 else "".join(chosen)


def stage_folder(out: Path, number: int, stage: Stage) -> Path:
    """The folder of the run of a stage that is not the last.

    Args:
        out: The folder of the run.
        number: The stage's place, from 0.
        stage: The stage.

    Returns:
        The folder, which need not be there.
    """
    return out / STAGES_FOLDER / f"{number + 1}-{stage.trains}"
