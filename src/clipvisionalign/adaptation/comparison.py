"""A tuned run beside what it started from and beside the best model between the two, on its own data and on others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clipvisionalign.adaptation.alpha_curve import (
    DEFAULT_ALPHAS,
    DEFAULT_KEEP,
    AlphaPoint,
    choices_of_curve,
    cross_fitted,
    measure_as_it_is,
    measure_point,
)
from clipvisionalign.adaptation.galleries import Gallery, check_foreign, check_galleries, read_galleries
from clipvisionalign.adaptation.paired_bootstrap import PairedSamples
from clipvisionalign.adaptation.start import WeightPath, check_base, check_tuned, start_of, starts_before
from clipvisionalign.counts import count_noun
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.models.device import best_device
from clipvisionalign.progress import progress
from clipvisionalign.retrieval.metrics import SIGNIFICANCE_LEVEL
from clipvisionalign.retrieval.ranks import PositiveRanks
from clipvisionalign.study.statistics import holm_correction_of_tested
from clipvisionalign.training.distributed import Distributed
from clipvisionalign.training.pair_weights import PairWeights

logger = logging.getLogger(__name__)

#: The split that alpha is chosen on.
CHOICE_SPLIT = "dev"


@dataclass(frozen=True)
class ComparisonRequest:
    """What is compared, and on what.

    Attributes:
        run: a finished run.
        base: what it is compared with; "" for what it started from.
        foreign: data sets that it was not tuned on.
        alphas: models between the two, from 0 (the base) to 1 (the run); both ends are always measured. Empty: none.
        alpha: the one to take; None to choose it on dev.
        keep: the share of the base's rsum that has to be kept on each foreign data set.
        split: what is measured: "dev", cross-fitted, or a split on which nothing was chosen.
        source: the run's data set, where it is no longer where it was.
        layout: of `source`.
        identity: which captions belong to which images; None for the run's setting.
        device: "auto", "cpu", "cuda" and so on.
    """

    run: str
    base: str = ""
    foreign: list[str] = field(default_factory=list)
    alphas: Sequence[float] = DEFAULT_ALPHAS
    alpha: float | None = None
    keep: float = DEFAULT_KEEP
    split: str = CHOICE_SPLIT
    source: str = ""
    layout: str = "auto"
    identity: str | None = None
    device: str = "auto"

    def base_name(self) -> str:
        """What the run is compared with."""
        return self.base or start_of(self.run)

    @property
    def chooses(self) -> bool:
        """Whether anything is chosen on dev, or measured with what dev chooses."""
        return bool(self.alphas) or self.alpha is not None or self.split == CHOICE_SPLIT

    def grid(self) -> list[float]:
        """The alphas that are measured, in ascending order."""
        between = self.alphas if self.alpha is None else [self.alpha]
        return sorted({0.0, 1.0, *map(float, between)})

    def check(self) -> None:
        """Check what can be checked before a data set is read.

        Raises:
            ValueError, FileNotFoundError: with what to give instead.
            ModuleNotFoundError: the packages of a study's statistics are missing.
        """
        import scipy  # noqa: F401

        for each in self.grid():
            if not 0.0 <= each <= 1.0:
                raise ValueError(f"alpha {each:g}: has to be from 0 (the base) to 1 (the run)")
        if not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"--keep {self.keep:g}: a share from 0 to 1 of the base's rsum")
        check_tuned(self.run)
        check_base(self.base_name(), self.run)


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        path: the models between base and run.
        dev: the galleries that alpha is chosen on, the run's own first; where nothing is chosen, those measured.
        curve: every model between the two on them, in ascending order of alpha.
        chosen: positions in the curve: by all of dev, then by each half; empty where none was asked for.
        document: the figures, as blend.json and worth.json have them.
    """

    path: WeightPath
    dev: list[Gallery]
    curve: list[AlphaPoint]
    chosen: list[int]
    document: dict[str, Any]

    @property
    def points(self) -> list[AlphaPoint]:
        """What was chosen by all of dev, then by each half."""
        return [self.curve[position] for position in self.chosen]


def compare_with_base(request: ComparisonRequest) -> Comparison:
    """Measure a run, its base, and the models between them.

    Args:
        request: what is compared.

    Returns:
        Figures of the base, the run and the chosen model between them, on the run's own data and on each foreign data
        set, with paired differences. Each model encodes each gallery once.

    Raises:
        ValueError, FileNotFoundError: as `ComparisonRequest.check`; the base is of another architecture; alpha is to be
            chosen by a foreign data set most of whose images are the run's own.
        DataError: a data set cannot be read, or has not the split.
    """
    request.check()
    run, base = request.run, request.base_name()
    reading = request.source, request.layout, request.identity, base
    data_sets = read_galleries(run, request.foreign, CHOICE_SPLIT, *reading) if request.chooses else []
    split_sets = [] if request.split == CHOICE_SPLIT else read_galleries(run, request.foreign, request.split, *reading)
    path = WeightPath(run, base, request.device, ends_alone=not request.alphas and request.alpha is None)
    distributed = Distributed(best_device(request.device))
    if not request.chooses:
        return _compare_as_they_are(request, path, check_galleries(run, path.tuned, split_sets, request.split))
    dev = check_galleries(run, path.tuned, data_sets, CHOICE_SPLIT)
    if request.alphas and request.alpha is None:
        check_foreign(dev)
    candidates = path.tuned.config.fusion.candidates if path.tuned.fusion is not None else 0
    grid = request.grid()
    _announce(grid, dev, base, run)
    curve = [
        _measure(path.model_at(alpha), alpha, dev, distributed, candidates)
        for alpha in progress(grid, "models between base and run", len(grid))
    ]
    own_base = _measure_base(path, dev, distributed, curve[0])
    chosen = _choose(request, grid, curve, own_base)
    if split_sets:
        galleries = check_galleries(run, path.tuned, split_sets, request.split)
        measured = _measure_split(path, galleries, distributed, curve, chosen, candidates)
    else:
        galleries, measured = dev, (own_base, [curve[position] for position in chosen], curve[-1])
    document = _document(request, galleries, *measured)
    if chosen:
        document |= _choice_document(request, curve, own_base, chosen, dev)
    return Comparison(path, dev, curve, chosen, document)


def _compare_as_they_are(request: ComparisonRequest, path: WeightPath, galleries: list[Gallery]) -> Comparison:
    """Base and run on a split on which nothing is chosen, with the weights of a pair's parts that they have."""
    distributed = Distributed(best_device(request.device))
    _announce([0.0, 1.0], galleries, path.base, path.run)
    curve = []
    for end in progress([0.0, 1.0], f"measuring {request.split}", 2):
        model = path.model_at(end) if end else path.base_model() or path.model_at(end)
        point = measure_as_it_is(model, galleries, distributed, 1, _candidates_of(model))
        curve.append(replace(point, alpha=end))
    return Comparison(path, galleries, curve, [], _document(request, galleries, curve[0], [], curve[1]))


def _document(
    request: ComparisonRequest, galleries: list[Gallery], base: AlphaPoint, points: list[AlphaPoint], tuned: AlphaPoint
) -> dict[str, Any]:
    """The figures on all galleries."""
    run, name = request.run, request.base_name()
    blocks = [
        _gallery_document(gallery, number, base, points, tuned, run, name) for number, gallery in enumerate(galleries)
    ]
    _correct_p_values([row for block in blocks for row in block["differences"]])
    return {"run": run, "base": name, "earlier": starts_before(name), "split": request.split, "galleries": blocks}


def _measure(
    model: Aligner, alpha: float, galleries: list[Gallery], distributed: Distributed, candidates: int,
    weights: Sequence[PairWeights] | None = None,
) -> AlphaPoint:  # fmt: skip
    """A model of the curve; one without a fusion re-ranks nothing."""
    return measure_point(alpha, model, galleries, distributed, weights, candidates if model.fusion is not None else 0)


def _announce(grid: Sequence[float], galleries: Sequence[Gallery], base: str, run: str) -> None:
    images = sum(len(gallery.part) for gallery in galleries)
    captions = sum(len(gallery.part.captions) for gallery in galleries)
    logger.info(
        "%d models from %s to %s, each measured on %s and %s", len(grid), base, run,
        count_noun(images, "image"), count_noun(captions, "caption"),
    )  # fmt: skip


def _measure_base(
    path: WeightPath, galleries: list[Gallery], distributed: Distributed, first: AlphaPoint
) -> AlphaPoint:
    """The base by itself; the first point of the curve, where that is the same model."""
    base = path.base_model()
    if base is None:
        return first
    return measure_as_it_is(base, galleries, distributed, len(first.weights), _candidates_of(base))


def _candidates_of(aligner: Aligner) -> int:
    return aligner.config.fusion.candidates if aligner.fusion is not None else 0


def _choose(
    request: ComparisonRequest, grid: list[float], curve: list[AlphaPoint], base: AlphaPoint
) -> list[int]:  # fmt: skip
    """Positions in the curve: by all of dev, then by each half."""
    if request.alpha is not None:
        return [grid.index(float(request.alpha))] * len(base.weights)
    return choices_of_curve(curve, base, request.keep) if request.alphas else []


def _measure_split(
    path: WeightPath, galleries: list[Gallery], distributed: Distributed, curve: list[AlphaPoint], chosen: list[int],
    candidates: int,
) -> tuple[AlphaPoint, list[AlphaPoint], AlphaPoint]:  # fmt: skip
    """Base, chosen model and run on a split on which nothing is chosen: with the pair weights that dev chose."""

    def measure(position: int) -> AlphaPoint:
        point = curve[position]
        model, weights = path.model_at(point.alpha), point.weights[:1]
        return _measure(model, point.alpha, galleries, distributed, candidates, weights)

    positions = dict.fromkeys([0, *chosen[:1], len(curve) - 1])
    measured = {
        position: measure(position)
        for position in progress(list(positions), f"measuring {galleries[0].split}", len(positions))
    }
    base = _measure_base(path, galleries, distributed, measured[0])
    return base, [measured[position] for position in chosen[:1]], measured[len(curve) - 1]


def _gallery_document(
    gallery: Gallery, number: int, base: AlphaPoint, points: list[AlphaPoint], tuned: AlphaPoint, run: str,
    base_name: str,
) -> dict[str, Any]:  # fmt: skip
    """The figures on one gallery."""
    models = {"base": [base] * len(base.weights), "run": [tuned] * len(tuned.weights)} | (
        {"blend": points} if points else {}
    )
    ranks: dict[str, PositiveRanks] = {
        name: cross_fitted(each, number, gallery.halves).ranks for name, each in models.items()
    }
    figures = {name: gallery.figures(each) for name, each in ranks.items()}
    document = gallery.header() | {"chance": gallery.chance(ranks["base"]), "notes": gallery.notes(run, base_name)}
    if gallery.halves is None and gallery.split == CHOICE_SPLIT and points:
        document["notes"].append(f"{gallery.source}: too small to be halved, so that the blend is in-sample on it")
    for name, each in figures.items():
        document[name] = {key: each[key] for key in ("rsum", "image_to_text", "text_to_image")}
    pairs = [(a, b) for a, b in (("run", "base"), ("blend", "base"), ("run", "blend")) if a in ranks and b in ranks]
    paired = gallery.paired(ranks)
    document["differences"] = [{"a": a, "b": b, **_difference(paired, a, b, models[a], models[b])} for a, b in pairs]
    document["kept"] = {name: paired.share(name, "base") for name in ranks if name != "base"}
    return document


def _difference(
    paired: PairedSamples, a: str, b: str, points: list[AlphaPoint], other: list[AlphaPoint]
) -> dict[str, Any]:
    """The difference of two models, of these points; zero, and no test, where both are one model."""
    if all(point is each for point, each in zip(points, other, strict=True)):
        return {"value": 0.0, "low": 0.0, "high": 0.0, "p": None, "same_model": True}
    return {**paired.difference(a, b), "same_model": False}


def _correct_p_values(rows: list[dict[str, Any]]) -> None:
    """Add p by Holm's correction over all differences of a document, and whether each is shown."""
    corrected = holm_correction_of_tested([row["p"] for row in rows])
    for row, p in zip(rows, corrected, strict=True):
        row |= {"p_holm": p, "shown": p is not None and p < SIGNIFICANCE_LEVEL}


def _choice_document(
    request: ComparisonRequest, curve: list[AlphaPoint], base: AlphaPoint, chosen: list[int], dev: list[Gallery]
) -> dict[str, Any]:
    """The curve, and what was chosen from it."""
    alphas = [curve[position].alpha for position in chosen]
    is_fixed = request.alpha is not None
    return {
        "alpha": {
            "model": alphas[0],
            "halves": alphas[1:],
            "given": is_fixed,
            "keep": None if is_fixed or not request.foreign else request.keep,
            "figures": _describe_choice(request, alphas),
        },
        "curve": [{"alpha": point.alpha, "rsum": [ranking.rsums[0] for ranking in point.galleries]} for point in curve],
        "curve_data": [
            {
                "data": gallery.source,
                "split": gallery.split,
                "base": of_base.rsums[0],
                "chance": gallery.chance(of_base.rankings[0].ranks),
            }
            for gallery, of_base in zip(dev, base.galleries, strict=True)
        ],
    }


def _describe_choice(request: ComparisonRequest, alphas: list[float]) -> str:
    """How alpha was chosen, and whether the figures are of what it was chosen on."""
    if request.alpha is not None:
        return f"alpha {alphas[0]:g} was given, not chosen"
    rule = "the alpha with the best rsum on the run's own dev split"
    if request.foreign:
        rule += f" among those that keep {100 * request.keep:g} % of the base's rsum on the foreign ones"
    if request.split != CHOICE_SPLIT:
        return f"{rule}: {alphas[0]:g}; measured on {request.split}, on which nothing was chosen"
    if len(alphas) < 3:
        return f"{rule}: {alphas[0]:g}; in-sample: dev is too small to be halved"
    halves = " and ".join(f"{alpha:g}" for alpha in alphas[1:])
    return f"{rule}: {alphas[0]:g}, by its halves {halves}; cross-fitted: each half's queries by the other half's alpha"
