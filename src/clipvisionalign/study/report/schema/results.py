"""The block "results" of report.json, and the estimates of which all of a report is made."""

from __future__ import annotations

from pydantic import Field

from clipvisionalign.study.report.schema.block import Block, Number


class Estimate(Block):
    """A value with its 95% interval; spread: the standard deviation between seeds; null where not computed."""

    value: Number
    low: Number | None
    high: Number | None
    spread: Number | None = None
    p: Number | None = None


class Difference(Estimate):
    """One variant minus another in one metric, on the seeds that both have; p_holm: p after Holm's correction.

    sequential: interval and p are of the last look of a study that adds seeds. image_std, rest_std: standard deviations
    of what an image contributes, over the seeds and beside that; absent in reports from before they were recorded.
    """

    a: str
    b: str
    metric: str = Field(alias="figure")
    seeds: tuple[int, ...] | None = None
    p_holm: Number | None
    shown: bool
    primary: bool = False
    sequential: bool = False
    image_std: Number | None = None
    rest_std: Number | None = None


class LengthDifference(Difference):
    """A difference in recall by the captions of one tercile of length."""

    tercile: str = Field(alias="third")


class FoilShare(Estimate):
    """The share of minimal pairs of one kind whose true caption outscores its foil, in percent.

    units: how many draws the pairs are of; null where that is unknown, 0 in reports from before it was recorded.
    """

    kind: str
    pairs: int
    units: int | None = 0


class VariantFoilShare(FoilShare):
    """The same of one variant; p_holm: of the share being 50, after Holm's correction."""

    variant: str
    p_holm: Number | None


class Gallery(Block):
    """The sizes of a gallery."""

    images: int
    captions: int


class AuditCheck(Block):
    """One check of an audit."""

    name: str
    passed: bool
    meaning: str


class Audit(Block):
    """The audit of a model."""

    passed: bool
    checks: tuple[AuditCheck, ...]


class RunResults(Block):
    """One run's own metrics: recalls as shares from 0 to 1, rsum from 0 to 600."""

    seed: int
    protocol: str
    images: int
    captions: int
    rsum: Estimate
    image_to_text: dict[str, Estimate]
    text_to_image: dict[str, Estimate]
    audit: Audit


class LengthRecall(Block):
    """Recall of images by the captions of one tercile of length, in percent."""

    captions: int
    recall_at_1: Estimate
    recall_at_5: Estimate

    def recall_at(self, k: int) -> Estimate:
        """Recall among the first k.

        Args:
            k: 1 or 5.

        Returns:
            The estimate, in percent.
        """
        return {1: self.recall_at_1, 5: self.recall_at_5}[k]


class VariantResults(Block):
    """A variant over its seeds; dual: of its dual encoder alone, and gain: in rsum over it, where it re-ranks."""

    seeds: tuple[int, ...]
    runs: tuple[RunResults, ...]
    metrics: dict[str, Estimate] = Field(alias="figures")
    dual: dict[str, Estimate] | None = None
    gain: Estimate | None = None
    by_length: dict[str, LengthRecall]


class UnpairedSeeds(Block):
    """Two variants of which one has seeds that the other lacks."""

    a: str
    b: str
    paired: tuple[int, ...]
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]


class CaptionLengths(Block):
    """The terciles of caption length: from and to so many words, and the recall of a random ranking."""

    words: dict[str, tuple[int, int]]
    chance: dict[str, dict[str, Number]] = Field(default_factory=dict)


class TrialReason(Block):
    """A variant with a seed, and why it has no results."""

    variant: str
    seed: int
    reason: str


class TrialState(TrialReason):
    """What became of a variant with a seed: one of the states of `study.gaps`."""

    state: str


class SeedsLook(Block):
    """The named difference after so many seeds, with its interval at the level of each look."""

    seeds: tuple[int, ...]
    value: Number
    low: Number
    high: Number


class AddedSeeds(Block):
    """Seeds that were added until the interval of the named difference was narrower than `width`.

    stopped: "width" where it is, "seeds" where max_seeds were trained before, else "not yet".
    """

    a: str
    b: str
    metric: str = Field(alias="figure")
    width: Number
    max_seeds: int
    level: Number
    looks: tuple[SeedsLook, ...]
    stopped: str


class NearDuplicates(Block):
    """Images of the gallery that are equal or nearly equal; each group counts as one image in intervals and p."""

    images: int
    groups: int


class Results(Block):
    """Everything measured over the whole gallery by runs that passed their audit."""

    split: str
    protocol: str
    selection: str | None = Field(default=None, alias="choice")
    gallery: Gallery
    identities: int | None = None
    near_duplicates: NearDuplicates | None = None
    units: int | None = None
    variants: dict[str, VariantResults]
    chance: dict[str, Number] = Field(default_factory=dict)
    differences: tuple[Difference, ...]
    unpaired: tuple[UnpairedSeeds, ...] = ()
    until: AddedSeeds | None = None
    lengths: CaptionLengths
    by_length_differences: tuple[LengthDifference, ...]
    composition: dict[str, tuple[VariantFoilShare, ...]]
    refused: tuple[TrialReason, ...]

    @property
    def drawn_units(self) -> str:
        """What is drawn at random beside the seeds: images, or identities where images are of some."""
        return "images" if self.identities is None else "identities"

    @property
    def has_no_intervals(self) -> bool:
        """Whether there are results, and none of them has an interval."""
        rsum = [variant.metrics["rsum"] for variant in self.variants.values()]
        return bool(rsum) and all(estimate.low is None for estimate in rsum)
