"""From the cells' ranks to the results of a study, behind a fence: what is no result cannot get in.

The block "results" of report.json is made from ranks over the whole gallery, and from nothing else. A figure of recall
inside a batch, or of a model that fails the audit, is refused by `check_fence`, which stands before every writing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.retrieval.metrics import RESAMPLES, chance_of, chance_recall, figure_name, metrics_of_ranks
from clipvisionalign.retrieval.ranks import PartnerRanks
from clipvisionalign.study.plan import Comparison
from clipvisionalign.study.primary import with_primary
from clipvisionalign.study.statistics import (
    FIGURES,
    bounds_of,
    differences,
    estimate,
    holm_of_tested,
    of_units,
    ratio_shares,
    shares,
    unpaired,
)  # fmt: skip
from clipvisionalign.training.cross_fit import nothing_chosen

PROTOCOL = "whole gallery, all captions, ties against the model"
THIRDS = ("short", "middle", "long")

#: By set of minimal pairs and kind: what `minimal_pairs.drawn_together` gives.
DrawnTogether = Mapping[str, Mapping[str, Sequence[int]]]


class FenceError(ValueError):
    """Something that is no result was about to be written as one."""


@dataclass(frozen=True)
class Measured:
    """A finished cell. found: what `measure_cell` gives; ranks: "ranks", and "dual" for one that re-ranks."""

    variant: str
    seed: int
    found: dict[str, Any]
    ranks: dict[str, PartnerRanks]


def results_of(
    cells: Sequence[Measured], part: CaptionedImages, split: str, compare: Comparison | None = None,
    together: DrawnTogether | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The block "results": every variant over its seeds, and every two variants against each other, on the seeds that
    both have ("unpaired" names the others).

    compare: the comparison that the plan names. together: of the minimal pairs, see `composition`.
    A cell whose audit failed has no results; it stands in "refused" with the reason. Raises FenceError for ranks that
    are not of this gallery.
    """
    owners = part.caption_image
    # Images of one identity are drawn together: what a model knows of a person it knows in all of them.
    unit = np.arange(len(part)) if part.image_identity is None else part.image_identity
    good = [cell for cell in cells if cell.found["audit"]["passed"]]
    refused = [
        {
            "variant": cell.variant,
            "seed": cell.seed,
            "reason": "; ".join(check["meaning"] for check in cell.found["audit"]["checks"] if not check["passed"]),
        }
        for cell in cells
        if not cell.found["audit"]["passed"]
    ]
    by_variant: dict[str, list[Measured]] = {}
    for cell in good:
        check_gallery(cell, part)
        by_variant.setdefault(cell.variant, []).append(cell)
    thirds = length_thirds(part.captions)
    many = part.image_identity is not None or part.caption_group is not None
    figures = (*FIGURES, "image_to_text map", "text_to_image map") if many else FIGURES
    tables: dict[str, dict[str, dict[int, np.ndarray]]] = {figure: {} for figure in figures}
    variants = {}
    for name, several in by_variant.items():
        found: dict[str, Any] = {
            "seeds": [cell.seed for cell in several],
            "runs": [_run(cell, owners, part.image_identity) for cell in several],
        }
        for block in ("ranks", "dual"):
            if all(block in cell.ranks for cell in several):
                ours = {f: _table([cell.ranks[block] for cell in several], owners, f, unit) for f in figures}
                found["figures" if block == "ranks" else "dual"] = {
                    f: estimate(t, bounds_of(f)).to_dict() for f, t in ours.items()
                }
                if block == "ranks":
                    for figure, table in ours.items():
                        tables[figure][name] = dict(zip(found["seeds"], table, strict=True))
                elif "rsum" in tables and name in tables["rsum"]:
                    gained = np.stack(list(tables["rsum"][name].values())) - ours["rsum"]
                    found["gain"] = estimate(gained, (-600, 600)).to_dict()
        found["by_length"] = {
            third: {"captions": int(inside.sum()), **_recall_of(several, unit[owners], inside)}
            for third, inside in thirds["inside"].items()
        }
        variants[name] = found
    # Rsum is what the study asks about; the others are looked at beside it, and corrected together.
    others = {figure: tables[figure] for figure in figures if figure != "rsum"}
    compared = differences({"rsum": tables["rsum"]}) + differences(others)
    return {
        "split": split,
        "protocol": PROTOCOL,
        "choice": choice_of(good, split),
        "gallery": {"images": len(part), "captions": len(part.captions)},
        **({} if part.image_identity is None else {"identities": int(unit.max()) + 1}),
        "variants": variants,
        "chance": _chance(good),
        "differences": with_primary([difference.to_dict() for difference in compared], compare or Comparison()),
        "unpaired": unpaired({name: found["seeds"] for name, found in variants.items()}),
        "lengths": {"words": thirds["words"], "chance": _chance_by_length(good, thirds["inside"])},
        "by_length_differences": _length_differences(by_variant, unit[owners], thirds["inside"]),
        "composition": composition(good, together or {}),
        "refused": refused,
    }


#: What is said of figures of so few images that they have no interval.
NO_INTERVALS = "no intervals, as there are too few images"


def no_intervals(report: dict[str, Any]) -> bool:
    """Whether a report has results, and none of them an interval."""
    figures = [found["figures"]["rsum"] for found in report["results"]["variants"].values()]
    return bool(figures) and all(figure["low"] is None for figure in figures)


def choice_of(cells: Sequence[Measured], split: str) -> str:
    """Whether the figures are of images by which something was chosen, in words."""
    if not cells:
        return "nothing was measured"
    if split != "dev":
        return f"out of sample: nothing was chosen on the {split} split"
    chosen = {cell.variant for cell in cells if not nothing_chosen(
        cell.found.get("chosen", {}), len(cell.found.get("curves", {}).get("step", ()))
    )}  # fmt: skip
    if not chosen:
        return f"out of sample: nothing was chosen on the {split} split, as there was one epoch or the last was taken"
    halved = [cell.found.get("chosen", {}).get("by") == "halves" for cell in cells]
    if all(halved):
        told = "cross-fitted: each half of dev by the checkpoint and the pairs' weights that the other half chose"
        based = sorted({cell.variant for cell in cells if "with_init" in cell.found.get("chosen", {})})
        if based:
            told += f"; but {', '.join(based)}: the run that it starts from is of an epoch that all of dev chose"
        trained = sorted({cell.variant for cell in cells if "init_trained_on" in cell.found.get("chosen", {})})
        if trained:
            told += f"; but {', '.join(trained)}: the run that it starts from was trained on images of dev"
        if none := sorted({cell.variant for cell in cells} - chosen):
            told += f"; of {', '.join(none)} nothing was chosen"
        return told
    told = "in-sample: what was chosen on dev is measured on it"
    return told if not any(halved) else f"{told} in some runs, cross-fitted in others"


def check_gallery(cell: Measured, part: CaptionedImages) -> None:
    """Raises FenceError for ranks that are not of this gallery."""
    for ranks in cell.ranks.values():
        shape = len(ranks.image_to_text), len(ranks.text_to_image)
        if shape != (len(part), len(part.captions)):
            told = f"ranks of {shape[0]} images and {shape[1]} captions"
            raise FenceError(
                f"{cell.variant}-{cell.seed}: {told}, the gallery has {len(part)} and {len(part.captions)}"
            )


def _run(cell: Measured, owners: np.ndarray, unit: np.ndarray | None) -> dict[str, Any]:
    """One cell's own figures with bootstrap intervals, and what it is known to have been measured on."""
    found = metrics_of_ranks(cell.ranks["ranks"], owners, RESAMPLES, unit=unit).to_dict()
    return {"seed": cell.seed, "protocol": PROTOCOL, **found, "audit": cell.found["audit"]}


def length_thirds(captions: Sequence[str]) -> dict[str, Any]:
    """The data's own captions in three parts by their number of words, cut between two lengths where that is nearest to
    a third: captions of one length stand in one part. Two parts, or one ("all"), where there are no three lengths.
    "inside": (M,) bool by part; "words": from and to.

    >>> length_thirds(["a", "a b", "a b", "a b c", "a b c d"])["words"]
    {'short': [1, 1], 'middle': [2, 2], 'long': [3, 4]}
    """
    words = np.array([len(caption.split()) for caption in captions])
    lengths, counts = np.unique(words, return_counts=True)
    names = {1: ("all",), 2: (THIRDS[0], THIRDS[2])}.get(len(lengths), THIRDS)
    shorter = np.concatenate([[0], np.cumsum(counts)])
    cuts = [0]
    for part in range(1, len(names)):
        # Each part that is still to come has one length at least.
        free = range(cuts[-1] + 1, len(lengths) - len(names) + part + 1)
        cuts.append(min(free, key=lambda cut: abs(shorter[cut] - len(words) * part / len(names))))
    spans = {
        name: [int(lengths[start]), int(lengths[end - 1])]
        for name, start, end in zip(names, cuts, [*cuts[1:], len(lengths)], strict=True)
    }
    return {"inside": {name: (low <= words) & (words <= high) for name, (low, high) in spans.items()}, "words": spans}


def _chance(cells: Sequence[Measured]) -> dict[str, float]:
    """What a random ranking of the gallery shows, under the figures' names and in percent (rsum: 0 to 600)."""
    if not cells:
        return {}
    found = chance_of(cells[0].ranks["ranks"])
    ways = ("image_to_text", "text_to_image")
    return {"rsum": found["rsum"]} | {
        f"{way} {name}": 100 * share for way in ways for name, share in found[way].items()
    }


def _chance_by_length(cells: Sequence[Measured], thirds: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The same for the captions of each third."""
    if not cells:
        return {}
    ranks = cells[0].ranks["ranks"]
    partners, gallery = (ranks.text_to_image > 0).sum(axis=1), len(ranks.image_to_text)
    return {
        third: {f"recall_at_{k}": 100 * float(chance_recall(partners[inside], gallery, k).mean()) for k in (1, 5)}
        for third, inside in thirds.items()
    }


def _table(ranks: Sequence[PartnerRanks], owners: np.ndarray, figure: str, unit: np.ndarray) -> np.ndarray:
    """What each unit of images brings to a figure in each run (S, U). unit: (N,)."""
    of_images = np.stack([shares(each, owners, figure) for each in ranks])
    return of_images if unit.max() + 1 == len(unit) else of_units(of_images, unit)


def _length_table(cells: Sequence[Measured], unit: np.ndarray, inside: np.ndarray, k: int) -> np.ndarray:
    """Recall of the images by some captions only, the share (S, U) of each unit that has such captions. unit: (M,)."""
    units = np.unique(unit[inside], return_inverse=True)[1]
    found = [cell.ranks["ranks"].text_to_image[inside, 0] <= k for cell in cells]
    return np.stack([ratio_shares(hits.astype(np.float64), units, units.max() + 1) for hits in found])


def _recall_of(cells: Sequence[Measured], unit: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
    return {f"recall_at_{k}": estimate(_length_table(cells, unit, inside, k), (0, 100)).to_dict() for k in (1, 5)}


def _length_differences(
    by_variant: dict[str, list[Measured]], unit: np.ndarray, thirds: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    family = {
        third: {
            name: dict(zip([cell.seed for cell in cells], _length_table(cells, unit, inside, 5), strict=True))
            for name, cells in by_variant.items()
        }
        for third, inside in thirds.items()
    }
    found = [each.to_dict() for each in differences(family)]
    return [{**row, "third": row["figure"], "figure": "text_to_image recall_at_5"} for row in found]


def composition(cells: Sequence[Measured], together: DrawnTogether) -> dict[str, Any]:
    """By set and kind: each variant's share of pairs whose true caption outscores its twin, in percent; chance is 50.

    together: which pairs were drawn together; where it is not known nothing is tested. units: how many draws that are.
    p_holm: of its being 50, corrected over all variants and kinds of a set that are tested; None for too few draws.
    """
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for cell in cells for name in cell.found["composition"]):
        kinds: dict[str, Any] = {}
        for cell in cells:
            for kind, outcomes in cell.found["composition"][name].items():
                kinds.setdefault(kind, {}).setdefault(cell.variant, []).append(outcomes)
        rows = []
        for kind, variants in kinds.items():
            for variant, outcomes in variants.items():
                rows.append(
                    {"kind": kind, "variant": variant, **pairs_share(outcomes, together.get(name, {}).get(kind))}
                )
        for row, corrected in zip(rows, holm_of_tested([row["p"] for row in rows]), strict=True):
            row["p_holm"] = corrected
        found[name] = rows
    return found


def pairs_share(outcomes: Sequence[Sequence[float]], together: Sequence[int] | None) -> dict[str, Any]:
    """The share of pairs that were told apart, in percent, its interval, and the p of its being 50. outcomes: (S, P);
    together: (P,) the number of what each pair was drawn with, None where that is not known."""
    found = np.array(outcomes)
    about: dict[str, Any] = {"pairs": found.shape[1]}
    if together is None:
        none = dict.fromkeys(("low", "high", "spread", "p"))
        return {**about, "units": None, "value": 100.0 * float(found.mean()), **none}
    table = 100.0 * of_units(found, np.asarray(together))
    p = estimate(table - 50.0, (-50, 50)).p
    return {**about, "units": table.shape[1], **estimate(table, (0, 100)).to_dict(), "p": p}


# --- the fence -------------------------------------------------------------------------------------------------------

_ESTIMATE = dict.fromkeys(("value", "low", "high", "spread", "p"))
_FIGURES = dict.fromkeys((*FIGURES, "image_to_text map", "text_to_image map"), _ESTIMATE)
_FOUND = dict.fromkeys(
    ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank", "map", "map_at_r"), _ESTIMATE
)
_BY_LENGTH = {"captions": None, "recall_at_1": _ESTIMATE, "recall_at_5": _ESTIMATE}
_GALLERY = {"images": None, "captions": None}
_DIFFERENCE = {**_ESTIMATE, **dict.fromkeys(("a", "b", "figure", "p_holm", "seeds", "shown", "primary"))}
_RUN = {
    **_GALLERY, **dict.fromkeys(("seed", "protocol", "chance", "audit")), "rsum": _ESTIMATE,
    "image_to_text": _FOUND, "text_to_image": _FOUND,
}  # fmt: skip
#: All that the block "results" is made of: keys and what is below them. A list's one entry is of all that a list, or a
#: dict under names that are a study's own, holds; None is of what is looked into no further.
STRUCTURE: dict[str, Any] = {
    **dict.fromkeys(("split", "protocol", "identities", "choice", "unpaired", "refused", "lengths")),
    "gallery": _GALLERY,
    "variants": [{
        "seeds": None, "runs": [_RUN], "figures": _FIGURES, "dual": _FIGURES, "gain": _ESTIMATE,
        "by_length": dict.fromkeys((*THIRDS, "all"), _BY_LENGTH),
    }],
    "chance": dict.fromkeys(_FIGURES),
    "differences": [_DIFFERENCE],
    "by_length_differences": [{**_DIFFERENCE, "third": None}],
    "composition": [[{**_ESTIMATE, **dict.fromkeys(("kind", "variant", "pairs", "units", "p_holm"))}]],
}  # fmt: skip


def check_fence(report: dict[str, Any]) -> None:
    """Raises FenceError where the block "results" holds a figure that is not of the whole gallery, or of a model that
    failed its audit."""
    results = report["results"]
    _refuse_unknown(results, STRUCTURE, "results")
    gallery = report["data"]["gallery"]
    if results["gallery"] != gallery or results["protocol"] != PROTOCOL:
        raise FenceError(
            f"results: measured on {results['gallery']} by '{results['protocol']}', the data has {gallery}"
        )
    for name, variant in results["variants"].items():
        if [run["seed"] for run in variant["runs"]] != variant["seeds"]:
            raise FenceError(f"results of {name}: runs and seeds differ")
        for run in variant["runs"]:
            where = f"results of {name}, seed {run['seed']}"
            if run.get("protocol") != PROTOCOL:
                raise FenceError(f"{where}: not measured on the whole gallery")
            if {kind: run.get(kind) for kind in ("images", "captions")} != gallery:
                raise FenceError(f"{where}: a gallery of {run.get('images')} and {run.get('captions')}, not {gallery}")
            if not run.get("audit", {}).get("passed"):
                raise FenceError(f"{where}: its audit did not pass: its figures mean nothing")
        _same_means(name, variant)
    for block in ("differences", "by_length_differences"):
        for row in results[block]:
            if strange := {row["a"], row["b"]} - set(results["variants"]):
                raise FenceError(f"results.{block}: {', '.join(sorted(strange))} has no results")


def _same_means(name: str, variant: dict[str, Any]) -> None:
    """A variant's figures are the means of its audited runs, and of nothing else."""
    for figure, told in variant["figures"].items():
        way, _, kind = figure.partition(" ")
        found = [run["rsum"] if figure == "rsum" else run[way][kind] for run in variant["runs"]]
        factor = 1.0 if figure == "rsum" else 100.0
        if abs(told["value"] - factor * float(np.mean([each["value"] for each in found]))) > 1e-3:
            raise FenceError(f"results of {name}: {figure} is not the mean of its runs")


def _refuse_unknown(found: Any, structure: Any, path: str) -> None:
    """Raises FenceError for a key that the structure does not have: whatever stands there, it is no result."""
    if isinstance(structure, list):
        pairs = found.items() if isinstance(found, dict) else enumerate(found)
        for key, value in pairs:
            _refuse_unknown(value, structure[0], f"{path}.{key}")
    elif isinstance(found, dict) and structure is not None:
        for key, value in found.items():
            if key not in structure:
                raise FenceError(f"{path}.{key}: no part of a study's results")
            _refuse_unknown(value, structure[key], f"{path}.{key}")


def both_ways(figure: str) -> str:
    """A figure's name in words."""
    if figure == "rsum":
        return "rsum"
    way, name = figure.split(" ")
    return f"{figure_name(name)} {way.replace('_', ' ')}"
