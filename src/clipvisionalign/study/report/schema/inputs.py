"""What a study was made of: its plan, its data set, the captions that are truncated."""

from __future__ import annotations

from pydantic import Field

from clipvisionalign.study.report.schema.block import Block, Number
from clipvisionalign.study.report.schema.results import Gallery


class PlanVariant(Block):
    """A variant of a plan; base: the variant that it is trained from; same_as: the one that it repeats as a control."""

    base: str = ""
    same_as: str = ""


class PlanComparison(Block):
    """The comparison that a plan names before anything is trained."""

    metric: str = Field(default="rsum", alias="figure")
    a: str = ""
    b: str = ""
    passes: str = ""


class PlanSummary(Block):
    """What is read of a plan; the document has all of it."""

    data: str = ""
    scenes: int = 0
    seeds: tuple[int, ...]
    variants: dict[str, PlanVariant]
    compare: PlanComparison | None = None


class EqualCaptions(Block):
    """Equal captions of different images, the highest rsum that they allow, and what that is short of 600."""

    captions: int
    texts: int
    images: int
    best_rsum: Number
    cost: Number


class DataSummary(Block):
    """The data set; contents: hashes of its captions, images and positives; drawn: whether its images are scenes;
    texts: "joined" where several captions of an image are one text."""

    source: str
    layout: str
    official_splits: bool
    splits: dict[str, int]
    fingerprint: str
    contents: dict[str, str] | None = None
    gallery: Gallery
    identity: str | None = None
    texts: str | None = None
    equal_captions: EqualCaptions | None = None
    drawn: bool | None = None
    left_out: tuple[str, ...]


class SplitTruncation(Block):
    """Captions of a split that are longer than `max_tokens`; share: from 0 to 1."""

    captions: int
    cut: int
    tokens_lost: int
    longest: int
    share: Number


class Truncation(Block):
    """Captions that a variant truncates, by split."""

    max_tokens: int
    splits: dict[str, SplitTruncation]
