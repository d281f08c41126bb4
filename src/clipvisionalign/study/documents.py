"""Types of the JSON documents that pass between the parts of a study: kept measurements, and blocks of report.json.

They are dicts, and are written as they are; a key that earlier versions did not write may be missing.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import numpy as np

#: What a training spends, in `TrialMeasurements`.
TrainingQuantity = Literal["training_seconds", "steps"]
#: By set of minimal pairs and kind: 1 for each pair that is told apart by words alone, 0 for each other, 0.5 for a tie.
BlindOutcomes = dict[str, dict[str, list[float]]]


class AuditCheckDocument(TypedDict):
    """One check of an audit."""

    name: str
    passed: bool
    meaning: str


class AuditDocument(TypedDict):
    """The audit of a model."""

    passed: bool
    checks: list[AuditCheckDocument]


class CurvesDocument(TypedDict):
    """A training after each epoch: steps, loss, dev rsum, dev loss (None if it was not recorded)."""

    step: list[int]
    loss: list[float]
    rsum: list[float]
    dev_loss: list[float | None]


class TrialMeasurements(TypedDict, total=False):
    """measured.json of a trial's folder.

    asked: what it was made from. composition: by set of minimal pairs and kind, for each pair whether the caption
    outscores its foil. chosen: what was selected on dev, and how. frontier: see `frontier.measure_frontier`.
    """

    asked: dict[str, Any]
    measured_by: list[dict[str, str]]
    training_seconds: float
    steps: int
    best_epoch: int
    images: int
    captions: int
    candidates: int
    gain: dict[str, Any]
    depths: dict[str, Any]
    audit: AuditDocument
    chosen: dict[str, Any]
    composition: dict[str, dict[str, list[float]]]
    frontier: dict[str, Any]
    curves: CurvesDocument


class LatencyDocument(TypedDict):
    """Milliseconds of one caption alone, as percentiles."""

    p50: float
    p95: float


class TimingDocument(TypedDict):
    """Milliseconds, the median of several repetitions."""

    median: float


class RoundDocument(TypedDict, total=False):
    """What is read of one round, in milliseconds and MiB."""

    ms_per_caption: float
    ms_per_1000_pairs: float
    caption_latency_ms: float
    ms_per_query: float
    by_length: list[dict[str, float]]
    peak_memory_mib: float
    peak_device_memory_mib: float


class CostDocument(TypedDict, total=False):
    """What is read of a variant's time and memory; `profile.combine_rounds` has all of it."""

    caption_latency_ms: LatencyDocument
    ms_per_1000_pairs: TimingDocument
    rounds: list[RoundDocument]


#: A caption, its image (a data URI), and the image's rank in each variant; the keys are those of report.json.
ExampleDocument = TypedDict(  # noqa: UP013
    "ExampleDocument", {"image": str, "caption": str, "ranks": dict[str, int], "picture": str}
)


class ExamplesDocument(TypedDict, total=False):
    """Examples by group, the seed of each variant that they are of, and heatmaps of a few."""

    groups: dict[str, list[ExampleDocument]]
    seeds: dict[str, int]
    maps: list[dict[str, Any]]


class TruncationDocument(TypedDict):
    """Captions that a variant truncates, by split: what `TruncationStats.to_dict` gives."""

    max_tokens: int
    splits: dict[str, dict[str, Any]]


class TrialReasonDocument(TypedDict):
    """A trial without results, with the reason."""

    variant: str
    seed: int
    reason: str


class TrialStateDocument(TrialReasonDocument):
    """What became of a trial; reason: empty for one that was measured."""

    state: str


class MissingPartDocument(TypedDict):
    """A part of a report that could not be made, what it is of, and the reason."""

    part: str
    of: str
    reason: str


class LengthTerciles(TypedDict):
    """Captions by length: for each part whether a caption is in it, (M,) bool, and its words, from and to."""

    inside: dict[str, np.ndarray]
    words: dict[str, list[int]]
