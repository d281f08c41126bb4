"""One commit of the hub for each pretrained tower or dual encoder of a study, whenever its trials are trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipvisionalign.json_io import read_json, write_json
from clipvisionalign.models.io import pin_revisions
from clipvisionalign.study.config import Trial
from clipvisionalign.study.trial_checks import refuse_other_settings

#: In a study's folder: the commits that its runs take their towers from.
PINNED_TOWERS_FILE = "towers.json"


def pin_tower_commits(trials: Sequence[Trial], study: Path) -> list[Trial]:
    """The trials that are to be trained with one commit of the hub for each name, whenever they are trained.

    What cannot be had now is left as it is: those trials raise the reason when their turn comes.

    Args:
        trials: All trials.
        study: The study's folder, which keeps the commits.

    Returns:
        The trials with commits in their settings.

    Raises:
        FileExistsError: Another run is in a trial's place (`refuse_other_settings`); nothing is written then.
    """
    for trial in trials:
        refuse_other_settings(trial)
    towers_file = study / PINNED_TOWERS_FILE
    commits: dict[str, list[str]] = read_json(towers_file) if towers_file.is_file() else {}
    before, pinned_trials = dict(commits), []
    for trial in trials:
        model = trial.config.model
        towers = (model.image_tower, model.text_tower)
        key = model.pretrained or json.dumps([[tower.name, tower.weights, tower.revision] for tower in towers])
        if key not in commits and not (trial.folder / "config.yaml").is_file():
            try:
                pinned = pin_revisions(model)
            except (OSError, ValueError):
                pinned_trials.append(trial)
                continue
            commits[key] = (
                [pinned.pretrained] if model.pretrained else [pinned.image_tower.revision, pinned.text_tower.revision]
            )
        if model.pretrained:
            model = replace(model, pretrained=commits.get(key, [model.pretrained])[0])
        else:
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
