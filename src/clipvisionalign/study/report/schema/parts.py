"""Parts of report.json beside results and cost: curves, flawed protocols, examples, search, sentences."""

from __future__ import annotations

from pydantic import Field

from clipvisionalign.study.report.schema.block import Block, Number
from clipvisionalign.study.report.schema.results import Audit


class Curve(Block):
    """Loss and dev rsum of a run by step; before: the steps of the runs that it starts from."""

    variant: str
    seed: int
    before: int | None = None
    step: tuple[int, ...]
    loss: tuple[Number, ...]
    rsum: tuple[Number, ...]
    dev_loss: tuple[Number | None, ...] | None = None


class PretrainedModel(Block):
    """A pretrained dual encoder that variants start from, and whether public sets are in its training data.

    flickr8k, flickr30k, coco: "inside", "not inside" or "unknown". trained_on: "" where it is not known.
    """

    model: str
    known: bool
    variants: tuple[str, ...]
    flickr8k: str
    flickr30k: str
    coco: str
    trained_on: str = ""
    detail: str = ""
    sources: tuple[str, ...] = ()


class SealedLook(Block):
    """A run that was measured on the sealed split; by: "study", or "command" for one that was given by hand."""

    at: str
    by: str
    run: str


class Seal(Block):
    """When a plan was sealed, its SHA-256, the sealed split, and who looked at it.

    further: the looks after which figures may have been chosen: by hand, or of a run that was measured before.
    """

    at: str
    plan: str
    split: str
    runs: tuple[str, ...]
    looks: tuple[SealedLook, ...]
    further: tuple[SealedLook, ...]


class ProtocolRecall(Block):
    """Recall under one protocol, as a share from 0 to 1, and by chance."""

    protocol: str
    honest: bool
    recall_at_1: Number
    chance: dict[str, Number] | None = None


class FlawedProtocols(Block):
    """The same towers under flawed protocols, kept apart from the results."""

    variant: str
    seed: int
    bars: tuple[ProtocolRecall, ...]
    leak_audit: Audit = Field(alias="audit_of_the_leak")


class Example(Block):
    """A caption with the rank of its own image in each variant; the image is a data URI."""

    image: str
    caption: str
    ranks: dict[str, int]
    image_uri: str = Field(alias="picture")


class Heatmap(Block):
    """A heat map of a caption or a word, as a data URI."""

    target: str = Field(alias="of")
    image_uri: str = Field(alias="picture")


class VariantHeatmaps(Block):
    """A variant's heat maps of one example."""

    method: str
    maps: tuple[Heatmap, ...]


class ExampleHeatmaps(Block):
    """The heat maps of one example by variant."""

    caption: str
    image: str
    variants: dict[str, VariantHeatmaps]


class Examples(Block):
    """Example captions by group, and heat maps; seeds: the seed of each variant's run that they are of."""

    groups: dict[str, tuple[Example, ...]] = Field(default_factory=dict)
    seeds: dict[str, int] | None = None
    maps: tuple[ExampleHeatmaps, ...] = ()


class SearchShare(Block):
    """What a search returns of what it is asked for, in percent of the first answers, and by chance."""

    gallery: int
    share: Number
    first: int
    chance: Number
    queries: int


class Citation(Block):
    """A number of a sentence: its path in report.json, as it is shown, and how that is formatted."""

    path: str
    shown: str
    form: str
    factor: str


class ClaimText(Block):
    """A sentence of the summary."""

    topic: str = Field(alias="about")
    text: str
    citations: tuple[Citation, ...] = Field(alias="figures")


class MissingPart(Block):
    """A part of a report that could not be made; target: the variant or the set that it is about."""

    part: str
    target: str = Field(alias="of")
    reason: str


class Reference(Block):
    """An entry of the bibliography."""

    author: str
    title: str
    howpublished: str
    year: str
    bibtex: str
