"""The block "results" of report.json, computed from the ranks of the trials over the whole gallery alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.retrieval.metrics import RESAMPLES, chance_metrics, chance_recall, metric_label, metrics_of_ranks
from clipvisionalign.retrieval.ranks import PositiveRanks
from clipvisionalign.study.config import Comparison, Until
from clipvisionalign.study.documents import TrialMeasurements, TrialReasonDocument
from clipvisionalign.study.length_terciles import length_terciles
from clipvisionalign.study.primary_comparison import correct_for_primary
from clipvisionalign.study.results_check import PROTOCOL, ResultsError
from clipvisionalign.study.sequential import added_seeds_block, corrected_for_looks
from clipvisionalign.study.statistics import (
    COMPARED_METRICS,
    estimate,
    holm_correction_of_tested,
    image_contributions,
    metric_bounds,
    of_units,
    pairwise_differences,
    ratio_contributions,
    unpaired_seeds,
)  # fmt: skip
from clipvisionalign.study.units import image_units, units_block
from clipvisionalign.training.selection_notes import nothing_chosen

#: By set of minimal pairs and kind: what `minimal_pairs.drawn_together` gives.
DrawnTogether = Mapping[str, Mapping[str, Sequence[int]]]


@dataclass(frozen=True)
class TrialResult:
    """A finished trial.

    Attributes:
        variant: Its variant.
        seed: Its seed.
        measurements: What `measure_trial` returns.
        ranks: "ranks", and "dual" for one that re-ranks.
    """

    variant: str
    seed: int
    measurements: TrialMeasurements
    ranks: dict[str, PositiveRanks]


def aggregate_results(
    trial_results: Sequence[TrialResult], eval_data: CaptionedImages, split: str, compare: Comparison | None = None,
    together: DrawnTogether | None = None, until: Until | None = None, seeds: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Compute the block "results": every variant over its seeds, and every two variants compared.

    Two variants are compared on the seeds that both have; "unpaired" names the others. A trial whose audit failed has
    no results: it is in "refused", with the reason.

    Args:
        trial_results: The finished trials.
        eval_data: The split that was measured.
        split: Its name.
        compare: The comparison that the plan names; None for none.
        together: Which minimal pairs were drawn together, by set and kind; None where that is unknown.
        until: The width to which seeds were added; None for none.
        seeds: Seeds of the plan by now.

    Returns:
        The block as report.json has it: recall and MAP in percent, rsum from 0 to 600, with intervals.

    Raises:
        ResultsError: Ranks are not of this gallery.
    """
    caption_image = eval_data.caption_image
    unit = image_units(eval_data)
    audited = [result for result in trial_results if result.measurements["audit"]["passed"]]
    by_variant: dict[str, list[TrialResult]] = {}
    for result in audited:
        check_gallery(result, eval_data)
        by_variant.setdefault(result.variant, []).append(result)
    terciles = length_terciles(eval_data.captions)
    has_groups = eval_data.image_identity is not None or eval_data.shared_text_ids is not None
    metrics = (*COMPARED_METRICS, "image_to_text map", "text_to_image map") if has_groups else COMPARED_METRICS
    tables: dict[str, dict[str, dict[int, np.ndarray]]] = {metric: {} for metric in metrics}
    variants = {}
    for name, variant_results in by_variant.items():
        variant: dict[str, Any] = {
            "seeds": [result.seed for result in variant_results],
            "runs": [_run_entry(result, caption_image, unit) for result in variant_results],
        }
        for block in ("ranks", "dual"):
            if all(block in result.ranks for result in variant_results):
                contributions = {
                    f: contributions_table([result.ranks[block] for result in variant_results], caption_image, f, unit)
                    for f in metrics
                }
                variant["figures" if block == "ranks" else "dual"] = {
                    f: estimate(t, metric_bounds(f)).to_dict() for f, t in contributions.items()
                }
                if block == "ranks":
                    for metric, table in contributions.items():
                        tables[metric][name] = dict(zip(variant["seeds"], table, strict=True))
                elif "rsum" in tables and name in tables["rsum"]:
                    gained = np.stack(list(tables["rsum"][name].values())) - contributions["rsum"]
                    variant["gain"] = estimate(gained, (-600, 600)).to_dict()
        variant["by_length"] = _by_length(variant_results, unit[caption_image], terciles["inside"])
        variants[name] = variant
    # Rsum is what the study asks about; the others are looked at beside it, and corrected together.
    other_metrics = {metric: tables[metric] for metric in metrics if metric != "rsum"}
    comparisons = pairwise_differences({"rsum": tables["rsum"]}) + pairwise_differences(other_metrics)
    added_seeds = added_seeds_block(tables, compare or Comparison(), until, seeds)
    rows = corrected_for_looks([difference.to_dict() for difference in comparisons], added_seeds)
    return {
        "split": split,
        "protocol": PROTOCOL,
        "choice": selection_note(audited, split),
        "gallery": {"images": len(eval_data), "captions": len(eval_data.captions)},
        **units_block(eval_data, unit),
        "variants": variants,
        "chance": _chance(audited),
        "differences": correct_for_primary(rows, compare or Comparison()),
        **({"until": added_seeds} if added_seeds else {}),
        "unpaired": unpaired_seeds({name: variant["seeds"] for name, variant in variants.items()}),
        "lengths": {"words": terciles["words"], "chance": _chance_by_length(audited, terciles["inside"])},
        "by_length_differences": _length_differences(by_variant, unit[caption_image], terciles["inside"]),
        "composition": aggregate_composition(audited, together or {}),
        "refused": _refused_trials(trial_results),
    }


def _refused_trials(trial_results: Sequence[TrialResult]) -> list[TrialReasonDocument]:
    """The trials that have no results since their audit failed, each with the checks that it failed."""
    return [
        {
            "variant": result.variant,
            "seed": result.seed,
            "reason": "; ".join(
                check["meaning"] for check in result.measurements["audit"]["checks"] if not check["passed"]
            ),
        }
        for result in trial_results
        if not result.measurements["audit"]["passed"]
    ]


#: The note on figures of so few images that they have no interval.
NO_INTERVALS = "no intervals, as there are too few images"


def selection_note(trial_results: Sequence[TrialResult], split: str) -> str:
    """Whether the figures are of images by which something was chosen.

    Args:
        trial_results: The finished trials.
        split: The split that was measured.

    Returns:
        A sentence; "" where nothing was.
    """
    if not trial_results:
        return "nothing was measured"
    if split != "dev":
        return f"out of sample: nothing was chosen on the {split} split"
    chosen = {result.variant for result in trial_results if not nothing_chosen(
        result.measurements.get("chosen", {}), len(result.measurements.get("curves", {}).get("step", ()))
    )}  # fmt: skip
    if not chosen:
        return f"out of sample: nothing was chosen on the {split} split, as there was one epoch or the last was taken"
    halved = [result.measurements.get("chosen", {}).get("by") == "halves" for result in trial_results]
    if all(halved):
        note = "cross-fitted: each half of dev by the checkpoint and the pairs' weights that the other half chose"
        based = sorted(
            {result.variant for result in trial_results if "with_init" in result.measurements.get("chosen", {})}
        )
        if based:
            note += f"; but {', '.join(based)}: the run that it starts from is of an epoch that all of dev chose"
        trained = sorted(
            {result.variant for result in trial_results if "init_trained_on" in result.measurements.get("chosen", {})}
        )
        if trained:
            note += f"; but {', '.join(trained)}: the run that it starts from was trained on images of dev"
        if none := sorted({result.variant for result in trial_results} - chosen):
            note += f"; of {', '.join(none)} nothing was chosen"
        return note
    note = "in-sample: what was chosen on dev is measured on it"
    return note if not any(halved) else f"{note} in some runs, cross-fitted in others"


def check_gallery(result: TrialResult, eval_data: CaptionedImages) -> None:
    """Check that ranks are of this gallery.

    Args:
        result: A finished trial.
        eval_data: The split that was measured.

    Raises:
        ResultsError: They are not.
    """
    for ranks in result.ranks.values():
        shape = len(ranks.image_to_text), len(ranks.text_to_image)
        if shape != (len(eval_data), len(eval_data.captions)):
            shape_text = f"ranks of {shape[0]} images and {shape[1]} captions"
            raise ResultsError(
                f"{result.variant}-{result.seed}: {shape_text}, the gallery has {len(eval_data)} and "
                f"{len(eval_data.captions)}"
            )


def _run_entry(result: TrialResult, caption_image: np.ndarray, unit: np.ndarray) -> dict[str, Any]:
    """One cell's own figures with bootstrap intervals, and the conditions of its measurement."""
    metrics = metrics_of_ranks(result.ranks["ranks"], caption_image, RESAMPLES, unit=unit).to_dict()
    return {"seed": result.seed, "protocol": PROTOCOL, **metrics, "audit": result.measurements["audit"]}


def _chance(trial_results: Sequence[TrialResult]) -> dict[str, float]:
    """What a random ranking of the gallery shows, under the figures' names and in percent (rsum: 0 to 600)."""
    if not trial_results:
        return {}
    chance = chance_metrics(trial_results[0].ranks["ranks"])
    ways = ("image_to_text", "text_to_image")
    return {"rsum": chance["rsum"]} | {
        f"{direction} {name}": 100 * share for direction in ways for name, share in chance[direction].items()
    }


def _chance_by_length(
    trial_results: Sequence[TrialResult], terciles: dict[str, np.ndarray]
) -> dict[str, dict[str, float]]:
    """The same for the captions of each third."""
    if not trial_results:
        return {}
    ranks = trial_results[0].ranks["ranks"]
    positives, gallery = (ranks.text_to_image > 0).sum(axis=1), len(ranks.image_to_text)
    return {
        tercile: {f"recall_at_{k}": 100 * float(chance_recall(positives[inside], gallery, k).mean()) for k in (1, 5)}
        for tercile, inside in terciles.items()
    }


def contributions_table(
    ranks: Sequence[PositiveRanks], caption_image: np.ndarray, metric: str, unit: np.ndarray
) -> np.ndarray:
    """What each unit of images contributes to a metric in each run.

    Args:
        ranks: Ranks of S runs on N images.
        caption_image: (M,) number of each caption's image.
        metric: As for `image_contributions`.
        unit: (N,) number of each image's unit, such as its identity.

    Returns:
        (S, U).
    """
    of_images = np.stack([image_contributions(each, caption_image, metric) for each in ranks])
    return of_images if unit.max() + 1 == len(unit) else of_units(of_images, unit)


def _length_table(trial_results: Sequence[TrialResult], unit: np.ndarray, inside: np.ndarray, k: int) -> np.ndarray:
    """Recall of the images by some captions only, the share (S, U) of each unit that has such captions. unit: (M,)."""
    units = np.unique(unit[inside], return_inverse=True)[1]
    hits_by_run = [result.ranks["ranks"].text_to_image[inside, 0] <= k for result in trial_results]
    return np.stack([ratio_contributions(hits.astype(np.float64), units, units.max() + 1) for hits in hits_by_run])


def _tercile_recall(trial_results: Sequence[TrialResult], unit: np.ndarray, inside: np.ndarray) -> dict[str, Any]:
    return {
        f"recall_at_{k}": estimate(_length_table(trial_results, unit, inside, k), (0, 100)).to_dict() for k in (1, 5)
    }


def _by_length(
    trial_results: Sequence[TrialResult], unit: np.ndarray, terciles: dict[str, np.ndarray]
) -> dict[str, Any]:
    return {
        tercile: {"captions": int(inside.sum()), **_tercile_recall(trial_results, unit, inside)}
        for tercile, inside in terciles.items()
    }


def _length_differences(
    by_variant: dict[str, list[TrialResult]], unit: np.ndarray, terciles: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    family = {
        tercile: {
            name: dict(
                zip(
                    [result.seed for result in trial_results],
                    _length_table(trial_results, unit, inside, 5),
                    strict=True,
                )
            )
            for name, trial_results in by_variant.items()
        }
        for tercile, inside in terciles.items()
    }
    rows = [each.to_dict() for each in pairwise_differences(family)]
    return [{**row, "third": row["figure"], "figure": "text_to_image recall_at_5"} for row in rows]


def aggregate_composition(trial_results: Sequence[TrialResult], together: DrawnTogether) -> dict[str, Any]:
    """By set and kind: each variant's share of pairs whose true caption outscores its foil, in percent; chance is 50.

    Args:
        trial_results: The finished trials.
        together: Which pairs were drawn together; without it nothing is tested.

    Returns:
        Rows with "units", how many draws they are of, and "p_holm" of the share's being 50, corrected over all variants
        and kinds of a set that are tested; None for too few draws.
    """
    blocks: dict[str, Any] = {}
    for name in dict.fromkeys(name for result in trial_results for name in result.measurements["composition"]):
        kinds: dict[str, Any] = {}
        for result in trial_results:
            for kind, outcomes in result.measurements["composition"][name].items():
                kinds.setdefault(kind, {}).setdefault(result.variant, []).append(outcomes)
        rows = []
        for kind, variants in kinds.items():
            for variant, outcomes in variants.items():
                rows.append(
                    {"kind": kind, "variant": variant, **pairs_share(outcomes, together.get(name, {}).get(kind))}
                )
        for row, corrected in zip(rows, holm_correction_of_tested([row["p"] for row in rows]), strict=True):
            row["p_holm"] = corrected
        blocks[name] = rows
    return blocks


def pairs_share(outcomes: Sequence[Sequence[float]], together: Sequence[int] | None) -> dict[str, Any]:
    """The share of pairs that were distinguished, in percent, its interval, and the p of its being 50.

    Args:
        outcomes: (S, P) of S seeds: 1, 0, or 0.5 for a tie.
        together: (P,) number of what each pair was drawn with; None if unknown.

    Returns:
        The figures by name.
    """
    shares = np.array(outcomes)
    about: dict[str, Any] = {"pairs": shares.shape[1]}
    if together is None:
        none = dict.fromkeys(("low", "high", "spread", "p"))
        return {**about, "units": None, "value": 100.0 * float(shares.mean()), **none}
    table = 100.0 * of_units(shares, np.asarray(together))
    p = estimate(table - 50.0, (-50, 50)).p
    return {**about, "units": table.shape[1], **estimate(table, (0, 100)).to_dict(), "p": p}


def directed_metric_label(metric: str) -> str:
    """A figure's name as text.

    Args:
        metric: One of `COMPARED_METRICS`.

    Returns:
        Its label.
    """
    if metric == "rsum":
        return "rsum"
    direction, name = metric.split(" ")
    return f"{metric_label(name)} {direction.replace('_', ' ')}"
