"""Training and dev data of a run: read, checked, and divided into batches."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.batch import TruncationStats
from clipvisionalign.data.batches import CaptionedBatches
from clipvisionalign.data.captioned import CaptionedImages, DataError
from clipvisionalign.data.check import check
from clipvisionalign.data.formats import LAYOUTS, STREAM, is_stream, read_captioned_images
from clipvisionalign.data.hashes import dataset_hashes
from clipvisionalign.data.joined_captions import log_single_captions, with_captions
from clipvisionalign.data.run_data import data_record, split_rule_of
from clipvisionalign.data.splits import SPLIT_RULE, SPLIT_RULES
from clipvisionalign.data.streams.in_memory import read_stream_split
from clipvisionalign.data.streams.loader import SampleCounts, StreamedBatches
from clipvisionalign.data.streams.sources import SavedDatasetStream, ShardStream, open_stream
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.tokenizer import without_weights
from clipvisionalign.progress import progress_step
from clipvisionalign.training.cached_features import AnyFeatureCache
from clipvisionalign.training.config import DatasetConfig, RunConfig
from clipvisionalign.training.distributed import Distributed

logger = logging.getLogger(__name__)


@dataclass
class TrainingData:
    """The training split and the dev split of a data set, checked.

    Args:
        source: The data set.
        train: The training split, in memory or as a stream, its captions as they are.
        dev: The dev split; its captions are joined where those of training are.
        left_out: What is not used, with its place.
        as_read: What both splits held before anything was left out.
        max_tokens: Where the text tower cuts captions.
        cut_captions: By split, how many captions it cuts.
        split_rule: Number of the rule for images without a split.
        group: The column whose values are kept within one split; "" for none.
        dev_source: The data set of the dev split, where that is another one.
    """

    source: str
    train: CaptionedImages | ShardStream | SavedDatasetStream
    dev: CaptionedImages
    left_out: list[str]
    as_read: dict[str, dict[str, str]]
    max_tokens: int = 0
    cut_captions: dict[str, TruncationStats] = field(default_factory=dict)
    split_rule: int = SPLIT_RULE
    group: str = ""
    dev_source: str = ""

    def contents(self, by_content: bool, shown: bool = True) -> dict[str, dict[str, str]]:
        """What both splits hold, as they were opened: before it turns out what of them cannot be decoded.

        Args:
            by_content: Whether training images are hashed by their bytes; else by name and size, as are a stream's
                files.
            shown: Whether progress is shown.

        Returns:
            Hashes by split and kind.
        """
        if not isinstance(self.train, CaptionedImages):
            return {"train": {"shards": self.train.fingerprint()}, "dev": dataset_hashes(self.dev)}
        with progress_step("reading the images, to recognise them", visible=shown):
            return {"train": dataset_hashes(self.train, by_content), "dev": dataset_hashes(self.dev)}

    def batches(
        self, augment: str, aligner: Aligner, features: AnyFeatureCache | None, seed: int = 0
    ) -> CaptionedBatches | StreamedBatches:
        """What deals the training split into batches; no image is opened where features are on disk.

        Args:
            augment: How training images vary: "none", "crop" or "flip+crop".
            aligner: Its towers give the tokenizer and the transform.
            features: The image tower's outputs on disk; None where it is trained.
            seed: By which captions are joined, if they are.

        Returns:
            The batches, of a data set in memory or of a stream.
        """
        tower = without_weights(aligner.text_tower)
        flip = 0.5 if augment == "flip+crop" else 0.0
        transform = (
            None if features else aligner.image_tower.image_transform.image_loader(augment=augment != "none", flip=flip)
        )
        joined_seed = seed if self.joined else None
        if isinstance(self.train, CaptionedImages):
            return CaptionedBatches(self.train, tower.tokenize, tower.pad, transform, joined_seed)
        return StreamedBatches(self.train, tower.tokenize, tower.pad, transform, self.dev.identity, joined_seed)

    @property
    def joined(self) -> bool:
        """Whether captions are joined to long texts."""
        return self.dev.caption_mode == "joined"

    def to_dict(self) -> dict[str, Any]:
        """What data.json of a run folder holds."""
        train: dict[str, Any] = {"layout": "stream", "official_splits": True}
        if isinstance(self.train, CaptionedImages):
            train = {"layout": self.train.layout, "official_splits": self.train.official_splits}
            train["train"] = _split_summary(self.train)
        else:
            train["train"] = {"images": self.train.count, "fingerprint": self.train.fingerprint()}
        dev_source = str(Path(self.dev_source).resolve()) if self.dev_source else ""
        read = {
            "source": str(Path(self.source).resolve()), "dev_source": dev_source, "identity": self.dev.identity,
            "texts": self.dev.caption_mode, "split_rule": self.split_rule, "group": self.group,
        }  # fmt: skip
        cut = {
            "max_tokens": self.max_tokens,
            **{split: counts.to_dict() for split, counts in self.cut_captions.items()},
        }
        dev = {**_split_summary(self.dev), "contents": dataset_hashes(self.dev)}
        counts = {**read, **train, "dev": dev, "cut_captions": cut, "left_out": self.left_out}
        return {**counts, "as_read": self.as_read}

    def count_cut_captions(self, aligner: Aligner, batches: CaptionedBatches | StreamedBatches) -> None:
        """Count the captions that the text tower cuts, and log them; a stream's are counted as they pass.

        Args:
            aligner: The model.
            batches: What deals the training split.
        """
        tower = aligner.text_tower
        self.max_tokens = tower.max_tokens
        if isinstance(batches, CaptionedBatches):
            self.cut_captions["train"] = batches.truncation
        self.cut_captions["dev"] = TruncationStats.from_tokens(tower.tokenize(self.dev.captions))
        for split, counts in self.cut_captions.items():
            if counts.cut:
                name = f"{split}, as joined in the first epoch" if self.joined and split == "train" else split
                logger.info(counts.summary(name, tower.max_tokens))
        asked = aligner.config.text_tower.max_tokens or 0
        if asked > tower.max_tokens and any(counts.cut for counts in self.cut_captions.values()):
            logger.info(
                f"note: captions of {asked:,} tokens are asked for, and the text tower has {tower.max_tokens:,} "
                "positions: --model.positions repeated (or stretched) makes them more"
            )

    def count_stream(self, batches: CaptionedBatches | StreamedBatches, distributed: Distributed) -> bool:
        """Count and log the cut captions and complaints of a stream as they have passed; every process calls this.

        Args:
            batches: What deals the training split.
            distributed: This process.

        Returns:
            Whether there is a stream.
        """
        if isinstance(batches, CaptionedBatches):
            return False
        self.cut_captions["train"] = sum(distributed.all_gather_object(batches.truncation), TruncationStats())
        if self.cut_captions["train"].cut:
            logger.info(self.cut_captions["train"].summary("train, as it passed", self.max_tokens))
        passed = sum(distributed.all_gather_object(batches.sample_counts), SampleCounts())
        if passed.complaints:
            message = f"{passed.complaints:,} parts of samples, as they passed, were left out or mended"
            self.left_out.append(f"{message}; the first: {passed.first[0]}")
            logger.info(f"check: {self.left_out[-1]}")
        return True

    def resume_counts(
        self, batches: CaptionedBatches | StreamedBatches, state: dict[str, Any], distributed: Distributed
    ) -> None:
        """Resume counting from a checkpoint: each process from its own count.

        Where there were more or fewer processes, the first one continues from all of their counts.

        Args:
            batches: What deals the training split.
            state: The checkpoint.
            distributed: This process.
        """
        counted = state.get("counted", [])
        if isinstance(batches, CaptionedBatches) or not counted:
            return
        if len(counted) == distributed.world_size:
            batches.restore_counters([counted[distributed.rank]])
        elif distributed.is_main:
            batches.restore_counters(counted)

    def drop_unreadable(self, features: AnyFeatureCache) -> None:
        """Leave out the training images of which the image tower's cache has nothing.

        Args:
            features: The cache.

        Raises:
            DataError: Fewer than two images are left.
        """
        if not features.failures or not isinstance(self.train, CaptionedImages):
            return
        self.left_out += features.failures.values()
        for reason in features.failures.values():
            logger.info(f"left out: {reason}")
        good = np.array([index for index in range(len(self.train)) if index not in features.failures])
        features.select(good)
        if len(good) < 2:
            reason = next(iter(features.failures.values()))
            raise DataError(f"{self.source}: {len(good)} of {len(self.train)} images can be read; the first: {reason}")
        self.train = replace(self.train, rows=[self.train.rows[index] for index in good])


def _split_summary(data: CaptionedImages) -> dict[str, Any]:
    return {"images": len(data), "captions": len(data.captions), "fingerprint": data.fingerprint()}


def open_data(config: RunConfig, distributed: Distributed, is_new_run: bool = True) -> TrainingData:
    """Open and check both splits; every process calls this.

    Args:
        config: The settings of the run.
        distributed: This process.
        is_new_run: Whether the run starts; else it resumes.

    Returns:
        The data.

    Raises:
        DataError: There is no such data set, a split is empty, or too little of it can be read.
        ValueError: `train_images` is given for a stream.
    """
    if not config.data:
        raise DataError("no data set given: clipvisionalign train DATA --out RUN")
    if not is_new_run:
        config = replace(config, layout=distributed.run_on_all(lambda: resolve_layout(Path(config.out), config)))
    streams = distributed.run_and_gather(lambda: is_stream(config.data, config.layout))
    if len(set(streams)) > 1:
        with_stream, missing = (
            ", ".join(str(n) for n, each in enumerate(streams) if each is kind) for kind in (True, False)
        )
        raise DataError(
            f"{config.data}: a stream for process {with_stream} of {distributed.world_size}, and none for "
            f"{missing}: it has to be "
            f"at this place on every machine"
        )
    if not streams[0]:
        folder = None if is_new_run else Path(config.out)
        return distributed.run_on_all(lambda: _open_images(config.dataset, distributed, folder), long_timeout=True)
    if config.train_images:
        raise ValueError("--train_images picks images of a data set in memory; a stream has all of its own")
    # The main process counts what no index tells, and leaves the index to the others.
    stream = distributed.run_on_main(lambda: open_stream(config.data))
    return distributed.run_on_all(lambda: _open_stream(config.dataset, stream, distributed), long_timeout=True)


def resolve_layout(run: Path, config: DatasetConfig) -> str:
    """The layout in which the data set of a run is read again.

    Args:
        run: The run folder.
        config: How the data is read.

    Returns:
        The layout that it was read in before, whatever is beside it by now; that of the settings where these name one,
        or where dev is of another data set.
    """
    recorded = str(data_record(run).get("layout", ""))
    is_open = config.layout == "auto" and not config.dev_data
    return recorded if is_open and recorded in LAYOUTS else config.layout


def _open_images(config: DatasetConfig, distributed: Distributed, resumed_run: Path | None) -> TrainingData:
    """Both splits of a data set in memory. resumed_run: the folder of a run that resumes, whose split rule holds."""
    rule = SPLIT_RULE if resumed_run is None else split_rule_of(resumed_run)
    data = read_captioned_images(config.data, config.layout, config.group, rule).with_identity(config.identity)
    has_official_splits = data.official_splits and data.split_rule != SPLIT_RULE
    split_source = "its own splits" if has_official_splits else SPLIT_RULES[data.split_rule]
    sizes = ", ".join(f"{split} {count:,}" for split, count in sorted(data.split_sizes().items()))
    logger.info(f"{config.data}: read as '{data.layout}', {split_source}: {sizes} images")
    # The dev gallery is decoded as a whole, since every figure is over all of it; training images by their headers.
    train, _ = check(data.split("train"), full=False, show_progress=distributed.is_main)
    elsewhere = read_dev_data(config, rule) if config.dev_data else data
    dev, dev_report = check(elsewhere.split("dev"), full=True, show_progress=distributed.is_main)
    problems = dict.fromkeys([*train.problems, *dev_report.problems])
    left_out = [str(problem) for problem in problems if problem.effect != "warning"]
    for line in left_out[:5]:
        logger.info(f"check: {line}")
    if len(left_out) > 5:
        logger.info(f"check: and {len(left_out) - 5} more; 'clipvisionalign check {config.data}' lists all")
    if config.train_images >= len(train) and config.train_images and resumed_run is None:
        logger.info(f"no effect of --train_images: there are {len(train):,}")
    elif 0 < config.train_images < len(train):
        train = train.first_by_hash(config.train_images)
    if len(train) < 2 or len(dev) < 2:
        remaining = f"{len(train)} train, {len(dev)} dev images"
        raise DataError(f"{config.data}: too little is left to train on: {remaining}{data.splits_hint()}")
    as_read = hashes_as_read(data, elsewhere)
    dev = _in_form(config, dev, train)
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


def read_dev_data(config: DatasetConfig, rule: int) -> CaptionedImages:
    """Read the data set that the dev split is of, where that is another one; its table has columns of its own.

    Args:
        config: How the data is read, with `dev_data`.
        rule: Number of the rule for images without a split.

    Returns:
        The whole data set.
    """
    return read_captioned_images(config.dev_data, config.layout, split_rule=rule).with_identity(config.identity)


def hashes_as_read(data: CaptionedImages, elsewhere: CaptionedImages) -> dict[str, dict[str, str]]:
    """Hash captions, positives and images of each split; training images, too many to read, by their size.

    Args:
        data: The data set of train and test.
        elsewhere: The data set of dev, which may be the same.

    Returns:
        By split what `dataset_hashes` returns; a test split is not required to be there.
    """
    settings = {
        "train": dataset_hashes(data.split("train"), read_images=False),
        "dev": dataset_hashes(elsewhere.split("dev")),
    }
    # Nothing is trained on it, and it need not be there.
    if "test" in data.split_sizes():
        settings["test"] = dataset_hashes(data.split("test"))
    return settings


def _open_stream(
    config: DatasetConfig, stream: ShardStream | SavedDatasetStream, distributed: Distributed
) -> TrainingData:
    """A stream to train on, and its dev split in memory: its own, or that of another data set."""
    # The layout of the stream is not that of another data set.
    layout = "auto" if config.layout == STREAM else config.layout
    if not config.dev_data or is_stream(config.dev_data, layout):
        dev_data = read_stream_split(config.dev_data or config.data, "dev")
    else:
        dev_data = read_captioned_images(config.dev_data, layout, config.group).split("dev")
    dev, report = check(dev_data.with_identity(config.identity), full=True, show_progress=distributed.is_main)
    logger.info(f"{config.data}: a stream of {stream.count:,} images; dev {len(dev):,} images")
    left_out = [str(problem) for problem in report.problems if problem.effect != "warning"]
    for line in left_out[:5]:
        logger.info(f"check: {line}")
    dev = _in_form(config, dev)
    return TrainingData(config.data, stream, dev, left_out, {}, dev_source=config.dev_data)


def _in_form(config: DatasetConfig, dev: CaptionedImages, train: CaptionedImages | None = None) -> CaptionedImages:
    """The dev split with its captions as they are, or joined; what cannot be joined is logged."""
    if config.captions == "joined":
        log_single_captions({"dev": dev} if train is None else {"train": train, "dev": dev})
    return with_captions(dev, config.captions)
