"""The block "cost" of report.json: time, memory, storage and arithmetic."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from clipvisionalign.study.report.schema.block import Block, Number
from clipvisionalign.study.report.schema.results import Estimate


class MedianTime(Block):
    """The median of repeated measurements, in milliseconds."""

    median: Number


class Timing(MedianTime):
    """The median of repeated measurements with the fastest and the slowest, in milliseconds."""

    low: Number
    high: Number


class Latency(Block):
    """Percentiles of one item at a time, in milliseconds."""

    p50: Number
    p95: Number
    p99: Number


class LengthTiming(Block):
    """Milliseconds of one caption of so many tokens."""

    tokens: int
    ms_alone: Number


class BatchTiming(Block):
    """Milliseconds per caption in batches of so many."""

    batch: int
    ms_per_caption: MedianTime


class Total(Block):
    """Seconds or steps of a training, with those of the runs that it starts from: mean over seeds, and each."""

    mean: Number
    each: tuple[Number, ...] | None = None


class Energy(Block):
    """Joules, where the machine reports them."""

    joules_per_1000_captions: Number | None = None


class CostRound(Block):
    """What is compared between variants, of one round of the measurement: one process."""

    ms_per_caption: Number | None = None
    ms_per_image: Number | None = Field(default=None, alias="ms_per_picture")
    ms_per_1000_pairs: Number | None = None
    ms_per_query: Number | None = None
    peak_memory_mib: Number | None = None
    peak_device_memory_mib: Number | None = None
    by_length: tuple[LengthTiming, ...] = ()


class FixedDepth(Block):
    """Re-ranking of the first candidates of every search, 0 for vectors alone; percent, and milliseconds."""

    candidates: int
    recall_sum: Number
    ms_per_query: Number | None = None


class WithinMargin(Block):
    """Re-ranking of the hits within a margin of the first one.

    images: mean number that is re-ranked; queries: share of which any are.
    """

    images: Number
    queries: Number
    recall_sum: Number
    ms_per_query: Number | None = None


class MarginPoint(WithinMargin):
    """One margin, the same for all searches."""

    margin: Number


class ChosenMargin(WithinMargin):
    """The margins that the halves of the gallery chose, each measured on the captions of the other half."""

    margins: tuple[Number, ...]
    against_deepest: Estimate
    against_vectors: Estimate


class Frontier(Block):
    """What re-ranking finds and costs, of one seed of a variant.

    recall_sum: recall at 1, 5 and 10 of captions to images, added up, in percent.
    """

    seed: int
    captions: int
    depth: int
    fixed: tuple[FixedDepth, ...]
    margins: tuple[MarginPoint, ...]
    chosen: ChosenMargin | None = None


class VariantCost(Block):
    """Time, memory, storage and arithmetic of a variant, medians over rounds.

    measured_under: machine and versions of the measurement; trained_under: of the training runs, each once.
    """

    ms_per_caption: Timing
    ms_per_image: Timing = Field(alias="ms_per_picture")
    ms_per_1000_pairs: Timing
    ms_per_query: Number
    caption_latency_ms: Latency
    image_latency_ms: Latency = Field(alias="picture_latency_ms")
    by_length: tuple[LengthTiming, ...]
    by_batch: tuple[BatchTiming, ...]
    bytes_per_image: Number = Field(alias="bytes_per_picture")
    bytes_per_caption: Number
    peak_memory_mib: Number
    peak_device_memory_mib: Number | None = None
    parameters: Number
    flops_per_caption: Number
    flops_per_image: Number = Field(alias="flops_per_picture")
    energy: Energy = Energy()
    training_seconds: Total | None = None
    training_steps: Total | None = None
    rounds: tuple[CostRound, ...] = ()
    measured_under: dict[str, Any] | None = None
    machine: dict[str, Any] | None = None
    trained_under: tuple[dict[str, Any], ...] = ()
