"""What a run trains on and chooses its checkpoint by: read, checked, and made into batches for its towers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.batch import CutCaptions
from clipvisionalign.data.batches import CaptionedBatches
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.fingerprint import changed, data_contents
from clipvisionalign.data.formats import STREAM, is_stream, read_captioned_images
from clipvisionalign.data.of_run import split_rule_of
from clipvisionalign.data.splits import SPLIT_RULE, SPLIT_RULES
from clipvisionalign.data.streams.in_memory import stream_split
from clipvisionalign.data.streams.loader import StreamedBatches, Tally
from clipvisionalign.data.streams.sources import Saved, Shards, open_stream
from clipvisionalign.data.trained_on import other_than_trained_on
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.progress import long_step
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.feature_cache import FeatureCache
from clipvisionalign.training.processes import Processes
from clipvisionalign.training.records import Say


@dataclass
class TrainingData:
    """The training split and the dev split of a data set, checked. left_out: what is not used, with its place; as_read:
    what both splits held before anything was left out, see `_as_read`; cut: by split, how many captions the text
    tower's `max_tokens` cuts; dev_source: the data set of the dev split, where that is another one."""

    source: str
    train: CaptionedImages | Shards | Saved
    dev: CaptionedImages
    left_out: list[str]
    as_read: dict[str, dict[str, str]]
    max_tokens: int = 0
    cut: dict[str, CutCaptions] = field(default_factory=dict)
    split_rule: int = SPLIT_RULE
    group: str = ""
    dev_source: str = ""

    def opened(self, by_content: bool, shown: bool = True) -> dict[str, dict[str, str]]:
        """What both splits hold, as they were opened: before it turns out what of them cannot be decoded. Training
        images by their bytes, if `by_content`, else by name and size, as are a stream's files."""
        if not isinstance(self.train, CaptionedImages):
            return {"train": {"shards": self.train.fingerprint()}, "dev": data_contents(self.dev)}
        with long_step("reading the images, to know them again", shown=shown):
            return {"train": data_contents(self.train, by_content), "dev": data_contents(self.dev)}

    def batches(
        self, augment: str, aligner: Aligner, features: FeatureCache | None
    ) -> CaptionedBatches | StreamedBatches:
        """What deals the training split for these towers; no picture is opened where their features are on disk."""
        tower = aligner.text_tower
        flip = 0.5 if augment == "flip+crop" else 0.0
        look = None if features else aligner.image_tower.input.look(augment=augment != "none", flip=flip)
        if isinstance(self.train, CaptionedImages):
            return CaptionedBatches(self.train, tower.tokenize, tower.pad, look)
        return StreamedBatches(self.train, tower.tokenize, tower.pad, look, self.dev.identity)

    def about(self) -> dict[str, Any]:
        """What data.json of a run folder holds."""
        train: dict[str, Any] = {"layout": "stream", "official_splits": True}
        if isinstance(self.train, CaptionedImages):
            train = {"layout": self.train.layout, "official_splits": self.train.official_splits}
            train["train"] = _about(self.train)
        else:
            train["train"] = {"images": self.train.count, "fingerprint": self.train.fingerprint()}
        dev_source = str(Path(self.dev_source).resolve()) if self.dev_source else ""
        read = {
            "source": str(Path(self.source).resolve()), "dev_source": dev_source, "identity": self.dev.identity,
            "split_rule": self.split_rule, "group": self.group,
        }  # fmt: skip
        cut = {"max_tokens": self.max_tokens, **{split: found.to_dict() for split, found in self.cut.items()}}
        dev = {**_about(self.dev), "contents": data_contents(self.dev)}
        found = {**read, **train, "dev": dev, "cut_captions": cut, "left_out": self.left_out}
        return {**found, "as_read": self.as_read}

    def count_cut(self, aligner: Aligner, batches: CaptionedBatches | StreamedBatches, say: Say) -> None:
        """Count the captions that the text tower cuts, and tell of them; a stream's are counted as they pass."""
        tower = aligner.text_tower
        self.max_tokens = tower.max_tokens
        if isinstance(batches, CaptionedBatches):
            self.cut["train"] = batches.cut
        self.cut["dev"] = CutCaptions.of(tower.tokenize(self.dev.captions))
        for split, found in self.cut.items():
            if found.cut:
                say(found.told(split, tower.max_tokens))

    def count_stream(self, batches: CaptionedBatches | StreamedBatches, say: Say, processes: Processes) -> bool:
        """The same for the captions of a stream that have passed, on all processes; whether there is a stream."""
        if isinstance(batches, CaptionedBatches):
            return False
        self.cut["train"] = sum(processes.objects(batches.cut), CutCaptions())
        if self.cut["train"].cut:
            say(self.cut["train"].told("train, as it passed", self.max_tokens))
        passed = sum(processes.objects(batches.tally), Tally())
        if passed.complaints:
            told = f"{passed.complaints:,} parts of samples, as they passed, were left out or mended"
            self.left_out.append(f"{told}; the first: {passed.first[0]}")
            say(f"check: {self.left_out[-1]}")
        return True

    def count_on(
        self, batches: CaptionedBatches | StreamedBatches, state: dict[str, Any], processes: Processes
    ) -> None:
        """Go on counting where a checkpoint has it: each process from its own count; where they were more or fewer, the
        first one from all together."""
        counted = state.get("counted", [])
        if isinstance(batches, CaptionedBatches) or not counted:
            return
        if len(counted) == processes.count:
            batches.count_on([counted[processes.number]])
        elif processes.first:
            batches.count_on(counted)

    def without_failures(self, features: FeatureCache, say: Say) -> None:
        """Leave out the training pictures of which the picture tower's cache has nothing."""
        if not features.failures or not isinstance(self.train, CaptionedImages):
            return
        self.left_out += features.failures.values()
        for reason in features.failures.values():
            say(f"left out: {reason}")
        good = np.array([place for place in range(len(self.train)) if place not in features.failures])
        features.keep(good)
        if len(good) < 2:
            reason = next(iter(features.failures.values()))
            raise DataError(f"{self.source}: {len(good)} of {len(self.train)} images can be read; the first: {reason}")
        self.train = replace(self.train, rows=[self.train.rows[place] for place in good])


def _about(data: CaptionedImages) -> dict[str, Any]:
    return {"images": len(data), "captions": len(data.captions), "fingerprint": data.fingerprint()}


def open_data(config: RunConfig, say: Say, processes: Processes, begins: bool = True) -> TrainingData:
    """The checked splits; every process calls this. begins: whether the run does, or goes on. Raises DataError where
    one is empty."""
    if not config.data:
        raise DataError("no data set given: clipvisionalign train DATA --out RUN")
    streams = processes.everyone(lambda: is_stream(config.data, config.layout))
    if len(set(streams)) > 1:
        there, missing = (", ".join(str(n) for n, each in enumerate(streams) if each is kind) for kind in (True, False))
        raise DataError(
            f"{config.data}: a stream for process {there} of {processes.count}, and none for {missing}: it has to be "
            f"at this place on every machine"
        )
    if not streams[0]:
        return processes.each(lambda: _open_images(config, say, processes, begins), patient=True)
    if config.train_images:
        raise ValueError("--train_images picks images of a data set in memory; a stream has all of its own")
    # The first process counts what no index tells, and leaves the index to the others.
    stream = processes.first_does(lambda: open_stream(config.data))
    return processes.each(lambda: _open_stream(config, stream, say, processes), patient=True)


def _open_images(config: RunConfig, say: Say, processes: Processes, begins: bool) -> TrainingData:
    """Both splits of a data set in memory."""
    rule = SPLIT_RULE if begins else split_rule_of(Path(config.out))
    data = read_captioned_images(config.data, config.layout, config.group, rule).with_identity(config.identity)
    own = data.official_splits and data.split_rule != SPLIT_RULE
    how = "its own splits" if own else SPLIT_RULES[data.split_rule]
    sizes = ", ".join(f"{split} {count:,}" for split, count in sorted(data.split_sizes().items()))
    say(f"{config.data}: read as '{data.layout}', {how}: {sizes} images")
    # The dev gallery is decoded as a whole, since every figure is over all of it; training pictures by their headers.
    train, _ = check(data.split("train"), full=False, shown=processes.first)
    elsewhere = _dev_data(config, rule) if config.dev_data else data
    dev, dev_report = check(elsewhere.split("dev"), full=True, shown=processes.first)
    problems = dict.fromkeys([*train.problems, *dev_report.problems])
    left_out = [str(problem) for problem in problems if problem.effect != "warning"]
    for line in left_out[:5]:
        say(f"check: {line}")
    if len(left_out) > 5:
        say(f"check: and {len(left_out) - 5} more; 'clipvisionalign check {config.data}' lists all")
    if config.train_images >= len(train) and config.train_images and begins:
        say(f"no effect of --train_images: there are {len(train):,}")
    elif 0 < config.train_images < len(train):
        train = train.first_by_hash(config.train_images)
    if len(train) < 2 or len(dev) < 2:
        left = f"{len(train)} train, {len(dev)} dev images"
        raise DataError(f"{config.data}: too little is left to train on: {left}{data.way_out()}")
    as_read = _as_read(data, elsewhere)
    return TrainingData(
        config.data,
        train,
        dev,
        left_out,
        as_read,
        split_rule=data.split_rule,
        group=config.group,
        dev_source=config.dev_data,
    )  # fmt: skip


def _dev_data(config: RunConfig, rule: int) -> CaptionedImages:
    """The data set that the dev split is of, where it is another one; it has columns of its own."""
    return read_captioned_images(config.dev_data, config.layout, split_rule=rule).with_identity(config.identity)


def _as_read(data: CaptionedImages, elsewhere: CaptionedImages) -> dict[str, dict[str, str]]:
    """Captions, partners and pictures of the splits; those of a training split, too many to read, by size."""
    found = {
        "train": data_contents(data.split("train"), pictures=False),
        "dev": data_contents(elsewhere.split("dev")),
    }
    # Nothing is trained on it, and it need not be there.
    if "test" in data.split_sizes():
        found["test"] = data_contents(data.split("test"))
    return found


def refuse_changed(run: Path, config: RunConfig, say: Say, splits: Sequence[str] = ("train", "dev")) -> None:
    """Raises DataError where the data of a finished run is no longer what it was trained on, and says what differs.

    A data set that is not there, a stream, and a run from before this was recorded cannot be compared: that is said.
    """
    told = run / "data.json"
    before = json.loads(told.read_text()).get("as_read", {}) if told.is_file() else {}
    if not before:
        stream = "a stream" if is_stream(config.data, config.layout) else "from before that was recorded"
        say(f"{run}: {stream}: whether its data is still what it was trained on was not compared")
        return
    try:
        rule = split_rule_of(run)
        data = read_captioned_images(config.data, config.layout, config.group, rule).with_identity(config.identity)
        now = _as_read(data, _dev_data(config, rule) if config.dev_data else data)
    except (OSError, DataError) as error:
        say(f"{run}: its data was not compared with what it was trained on: {error}")
        return
    for split in splits:
        differing = changed(before[split], now[split])
        if split == "train" and not differing:
            # Of an equal size another image may be: the run has kept what the bytes were.
            other = other_than_trained_on(run, data.split(split).rows, shown=True)
            differing = [other] if other else []
        if differing:
            raise DataError(
                f"{run}: finished, but {config.data} is no longer the data that it was trained on: {split} has other "
                f"{', '.join(differing)} now; its figures are of the former data. Put the data back, or train anew: "
                f"give another --out, or remove {run}"
            )


def refuse_other_data(state: dict[str, Any], opened: dict[str, dict[str, str]], config: RunConfig, out: Path) -> None:
    """Raises DataError where a run that is to go on was begun with other data than what was `opened`."""
    if "opened" not in state:
        raise DataError(f"{out}: its checkpoint is of an earlier version, which dealt its images otherwise: train anew")
    for split, now in opened.items():
        differing = changed(state["opened"].get(split), now)
        if differing:
            where = config.dev_data or config.data if split == "dev" else config.data
            raise DataError(
                f"{where}: not the {split} data that {out} was begun with: {', '.join(differing)} differ; put it back, "
                f"or train anew with another --out"
            )


def _open_stream(config: RunConfig, stream: Shards | Saved, say: Say, processes: Processes) -> TrainingData:
    """A stream to train on, and its dev split in memory: its own, or that of another data set."""
    # The layout of the stream is not that of another data set.
    layout = "auto" if config.layout == STREAM else config.layout
    if not config.dev_data or is_stream(config.dev_data, layout):
        found = stream_split(config.dev_data or config.data, "dev")
    else:
        found = read_captioned_images(config.dev_data, layout, config.group).split("dev")
    dev, report = check(found.with_identity(config.identity), full=True, shown=processes.first)
    say(f"{config.data}: a stream of {stream.count:,} images; dev {len(dev):,} images")
    left_out = [str(problem) for problem in report.problems if problem.effect != "warning"]
    for line in left_out[:5]:
        say(f"check: {line}")
    return TrainingData(config.data, stream, dev, left_out, {}, dev_source=config.dev_data)
