"""Settings without effect given the others: each is reported with the reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from clipvisionalign.data.formats import STREAM, is_stream
from clipvisionalign.training.config import (
    RunConfig,
    caches_caption_features,
    caches_image_features,
    images_per_process,
)
from clipvisionalign.training.contrastive import LOSSES
from clipvisionalign.training.fine_tuning import IMAGE_FROZEN, TEXT_FROZEN
from clipvisionalign.training.run_stage import stage_settings
from clipvisionalign.training.stages import parse_stages

#: How such a line begins.
NO_EFFECT = "no effect of"
#: The one loss that each setting of the losses is of.
LOSS_OF_SETTING = {"margin": "hardest", "beta": "hard_weighted", "smoothing": "softmax", "bias": "sigmoid"}


def ineffective_settings(config: RunConfig, world_size: int = 1) -> list[str]:
    """Reasons why settings of a run count nothing; those at their defaults are not reported.

    Args:
        config: The settings.
        world_size: Number of processes.

    Returns:
        A line for each reason.
    """
    return [f"{NO_EFFECT} --{', --'.join(names)}: {reason}" for names, reason in _idle(config, world_size)]


def effective(config: RunConfig) -> RunConfig:
    """The settings with those that count nothing at their defaults.

    Args:
        config: The settings.

    Returns:
        Settings that are equal where two runs are.
    """
    usual = type(config)()
    for names, _ in _idle(config, 1):
        for name in names:
            config = _with(config, name.split("."), usual)
    return config


def _with(config: Any, parts: list[str], usual: Any) -> Any:
    """The settings with one of them as `usual` has it."""
    first, *more = parts
    value = getattr(usual, first)
    return replace(config, **{first: _with(getattr(config, first), more, value) if more else value})


def _idle(config: RunConfig, processes: int) -> list[tuple[list[str], str]]:
    """Settings that count nothing, and why; of a run in stages, those that count nothing in any."""
    findings, *others = [
        _idle_in_run(stage_settings(config, number), processes)
        for number in range(len(parse_stages(config.stages)) or 1)
    ]
    idle = [{name for names, _ in each for name in names} for each in others]
    common = [([name for name in names if all(name in each for each in idle)], reason) for names, reason in findings]
    return [(names, reason) for names, reason in common if names]


def _idle_in_run(config: RunConfig, processes: int) -> list[tuple[list[str], str]]:
    """Settings that count nothing in a run without stages, and why."""
    usual, model, design = type(config)(), config.model, config.model.design
    findings: list[tuple[list[str], str]] = []

    def report(reason: str, *names: Iterable[str]) -> None:
        asked = [name for some in names for name in some]
        if asked:
            findings.append((asked, reason))

    def own(*names: str) -> list[str]:
        return [name for name in names if getattr(config, name) != getattr(usual, name)]

    if config.peft == "none":
        report("--peft none has no adapters", _non_default("lora", config.lora, usual.lora))
    if design not in ("late", "cross"):
        late = _non_default("model.late", model.late, usual.model.late)
        report(f"the design '{design}' has no late interaction", late, own("fusion_weight"))
    if design != "cross":
        fusion = _non_default("model.fusion", model.fusion, usual.model.fusion)
        report(f"the design '{design}' has no fusion", fusion, own("negatives"))
    text = _non_default("model.text_tower", model.text_tower, usual.model.text_tower)
    if design != "sparse" and model.text_tower.attention == "dense":
        # Longformer's too: it has windows of its own.
        report("the text tower keeps its own attention", [name for name in text if name.endswith(".window")])
    by_loss = _non_default("loss", config.loss, usual.loss)
    # A bias that is trained, and whatever a loss of one's own trains, count in the norm that gradients are cut to.
    idle = config.freeze == "all" and config.loss.name in LOSSES and config.loss.name != "sigmoid"
    if idle:
        report("--freeze all: the dual encoder is not trained", by_loss)
    for name, loss in LOSS_OF_SETTING.items():
        if config.loss.name != loss and not idle:
            report(f"it is of the loss '{loss}', not of '{config.loss.name}'", [n for n in by_loss if n.endswith(name)])

    frozen, how = [], f"--freeze {config.freeze}"
    if config.freeze in IMAGE_FROZEN and not (config.peft == "lora" and config.lora.towers != "text"):
        report(f"{how}: the image tower is not trained", own("image_lr"))
        frozen.append("image")
    if config.freeze in IMAGE_FROZEN:
        report(f"{how}: the image tower is frozen as a whole", own("freeze_blocks"))
    if config.freeze in TEXT_FROZEN and not (config.peft == "lora" and config.lora.towers != "image"):
        report(f"{how}: the text tower is not trained", own("text_lr"))
        frozen.append("text")
    if config.freeze in TEXT_FROZEN:
        report(f"{how}: the text tower drops nothing out", [name for name in text if name.endswith(".dropout")])
    if len(frozen) == 2:
        report(f"{how}: no tower is trained", own("layer_decay"))
    if config.freeze == "all":
        heads = [name for name in _non_default("model", model, usual.model) if name == "model.dropout"]
        report(f"{how}: the heads are not trained, and the last epoch is kept", heads, own("patience", "best_by"))
        report(f"{how}: the dual encoder stays as it is", own("distill"))
    # The settings of a plan's variants name no data set: "" would be the current folder, read to its last file.
    streamed = bool(config.data) and is_stream(config.data, config.layout)
    if config.augment == "none":
        report("--augment none has one view of an image", own("views"))
    elif not caches_image_features(config.freezing) or streamed:
        report("views are of features that are kept on disk, which this run's are not", own("views"))
    keeping = replace(config, cache=usual.cache)
    if not caches_caption_features(keeping.freezing) and (not caches_image_features(keeping.freezing) or streamed):
        report("what is trained, or comes as a stream, is not kept on disk", own("cache"))
    if streamed and not config.dev_data and config.layout != STREAM:
        report("a stream has its own layout", own("layout"))
    if config.best_by == "last":
        report("--best_by last keeps the last epoch", own("patience"))
    most = images_per_process(config.schedule, processes)
    whose = " of a process" if processes > 1 else ""
    if config.chunk >= most:
        report(f"a step is {most} images{whose}, one chunk", ["chunk"])
    if design == "cross" and config.negatives >= most:
        report(f"a step is {most} images{whose}: at most {most - 1} of them are negatives of one", own("negatives"))
    return findings


def _non_default(prefix: str, settings: Any, defaults: Any) -> list[str]:
    """The settings of a group that are not at their defaults, by name."""
    return [f"{prefix}.{name}" for name in vars(defaults) if getattr(settings, name) != getattr(defaults, name)]
