"""A stage of a training: its settings as those of a run, and its place in the run's folder and results."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from clipvisionalign.counts import count_noun
from clipvisionalign.files import remove, run_lock
from clipvisionalign.training.config import RunConfig, starts_from_model
from clipvisionalign.training.run_folder import LOCK_FILE, check_output, prepare_folder, write_begun
from clipvisionalign.training.stages import RATES, STAGES_FOLDER, Stage, adapted_in_stage, parse_stages, stage_folder

logger = logging.getLogger(__name__)

#: Figures of a stage that add up to those of the run.
_SUMMED = ("training_seconds", "steps", "steps_skipped", "images_left_out")


def stage_settings(config: RunConfig, number: int = -1) -> RunConfig:
    """The settings of one stage, as those of a run without stages.

    Args:
        config: The settings of a run.
        number: Which of its stages, from 0; the last one by default.

    Returns:
        The settings of the stage; `config` itself if it has no stages. All stages but the last keep their last epoch.
    """
    stages = parse_stages(config.stages)
    if not stages:
        return config
    number %= len(stages)
    stage, is_last = stages[number], number == len(stages) - 1
    towers = adapted_in_stage(stage, config.lora.towers) if config.peft == "lora" else ""
    settings: dict[str, Any] = {"stages": "", "epochs": stage.epochs, "freeze": stage.freeze}
    settings |= {"peft": "lora", "lora": replace(config.lora, towers=cast(Any, towers))} if towers else {"peft": "none"}
    if stage.rates is not None:
        settings |= dict(zip(RATES, stage.rates, strict=True))
    out = Path(config.out)
    if number:
        settings |= {"init": str(stage_folder(out, number - 1, stages[number - 1])), "overwrite": False}
    if not is_last:
        settings |= {"out": str(stage_folder(out, number, stage)), "best_by": "last"}
    return replace(config, **settings)


@dataclass
class RunStage:
    """A stage of a run in stages.

    Args:
        config: The settings of the run.
        number: The stage's place, from 0.
        is_new: Whether the run begins with this stage, and is not resumed.
        previous: What `summary` gave for the stages before.
    """

    config: RunConfig
    number: int
    is_new: bool = False
    previous: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stages(self) -> list[Stage]:
        """All stages of the run."""
        return parse_stages(self.config.stages)

    @property
    def is_last(self) -> bool:
        """Whether the run of this stage is the run itself."""
        return self.number == len(self.stages) - 1

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return Path(self.config.out)

    def title(self) -> str:
        """What is printed when the stage begins.

        Returns:
            A line.
        """
        stage = self.stages[self.number]
        rate = f" at {stage.rates_text}" if stage.rates else ""
        epochs = count_noun(stage.epochs, "epoch")
        return f"stage {self.number + 1} of {len(self.stages)}: {stage.trains}, {epochs}{rate}"

    def prepare_folder(self, stack: ExitStack) -> None:
        """Make the run's folder, where the stage has another one; what is interrupted from here on can be resumed.

        The stages of a run that is there already stay resumable until `begin`.

        Args:
            stack: Given what undoes this where the call is refused.

        Raises:
            FileExistsError: The folder holds something that the stage may not replace.
            ValueError: The run needs something of the folder.
        """
        if not self.is_new or self.is_last:
            return
        if (self.out / STAGES_FOLDER).is_dir():
            check_output(self.config)
        else:
            prepare_folder(self.config, False, stack)

    def lock(self, stack: ExitStack) -> None:
        """Lock the run's folder, where the stage has another one.

        Args:
            stack: Releases the lock when it is left.

        Raises:
            OSError: Another process holds it.
        """
        if not self.is_last:
            stack.enter_context(run_lock(self.out / LOCK_FILE, "trains this run"))

    def begin(self) -> None:
        """Write the run's settings into its folder, by which it can be resumed; what could be refused has been."""
        if not self.is_new or self.is_last:
            return
        # Of a run that is replaced; one that is left would be taken for a stage of this run.
        own = stage_folder(self.out, self.number, self.stages[self.number])
        for path in (self.out / STAGES_FOLDER).iterdir():
            if path != own:
                remove(path)
        remove(own / "results.json")
        write_begun(self.config)

    def recorded(self, config: RunConfig) -> RunConfig:
        """The settings that config.yaml of the stage's run records, by which that run is repeated.

        Args:
            config: The settings of the stage, with the commits of its towers.

        Returns:
            Those of the whole run for its last stage, else those of the stage.
        """
        return replace(self.config, model=config.model) if self.is_last else config

    def recorded_start(self, config: RunConfig) -> RunConfig:
        """The settings whose `init`, or pretrained model, is what the first stage starts from.

        Args:
            config: The settings of the stage.

        Returns:
            The settings of the stage, with the `init` of the run.
        """
        return replace(config, init=self.config.init)

    def summary(self, results: dict[str, Any]) -> dict[str, Any]:
        """What results.json of the run holds of the stage.

        Args:
            results: What results.json of the stage's own run holds.

        Returns:
            What it trained, for how many epochs and at what rate, its figures and those of the model that it started
            from, and where its run is.
        """
        stage = self.stages[self.number]
        summary: dict[str, Any] = {
            "trains": stage.trains,
            "epochs": stage.epochs,
            "learning_rate": stage.recorded_rates,
        }
        summary |= {name: results[name] for name in ("rsum", "start", "best_epoch", *_SUMMED) if name in results}
        folder = stage_folder(self.out, self.number, stage)
        return summary | {"run": "." if self.is_last else str(folder.relative_to(self.out))}

    def whole_results(self, results: dict[str, Any]) -> dict[str, Any]:
        """The results of a stage's run, and for the last stage what all stages were and took.

        Args:
            results: What results.json holds of the stage alone.

        Returns:
            What it holds of the run.
        """
        if not self.is_last:
            return results
        rows = [*self.previous, self.summary(results)]
        start = _recorded_start(self.config, rows)
        whole = {name: value for name, value in results.items() if name != "start"}
        whole |= {"start": start} if start else {}
        return whole | {name: round(sum(row[name] for row in rows), 1) for name in _SUMMED} | {"stages": rows}

    def destroyed_start(self, own: list[float | None]) -> list[float | None]:
        """What the stage's learning rates destroy, where its dev rsum falls below: the better of the two models that
        the run and the stage start from.

        Args:
            own: Dev rsum before the stage's first step, and its interval: value, low and high, those None without one;
                empty for none.

        Returns:
            The same of the one or the other; of a run whose start was lost in an earlier stage, which told so, `own`.
        """
        start = _recorded_start(self.config, self.previous)
        first = [start["rsum"][name] for name in ("value", "low", "high")] if start else []
        value, low, _ = own or (None, None, None)
        if not first or first[1] is None or value is None or low is None or value < first[1]:
            return own
        return first if first[1] > low else own


def _recorded_start(config: RunConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the first stages (`RunStage.summary`) recorded of the model that the run starts from; empty for none."""
    # A fusion alone leaves the figures as they are, which the next stage records.
    first: dict[str, Any] = next((row for row in rows if row["trains"] != "fusion"), {})
    start: dict[str, Any] = first.get("start", {})
    return start if starts_from_model(config) else {}
