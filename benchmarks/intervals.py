"""Do the intervals of a study hold? Studies with known means are simulated: the rule of now beside others.

    python benchmarks/intervals.py [--studies 4000] [--images 1000] [--interaction 0] [--json]

A simulated study has two variants of S seeds each on N images with five captions each. What an image brings to rsum
is made as in a real study: a query is found within the first k where its ease (of the image, of the caption, of this
run by chance) is above a threshold, so that the contributions are multiples of 20 and most of the differences between
two runs are zero. Thresholds and spreads give the recalls of the published Flickr8k study (rsum 235), about 190 for the
standard deviation of an image's contribution, and about 120 for that of the difference between two runs. A seed moves
all queries of a run; how much in rsum (standard deviation) is the cell of the table. Seeds of the two variants are
independent. The variants do not differ; --interaction gives each variant images that suit it better than the other.

Told of each rule: how often a difference is flagged where there is none (5 % is promised; the interval of the
difference covers it in the rest), how often the interval of one variant's mean covers it (95 % is promised), and how
often a difference of so much rsum is flagged, every image moved by that much.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import ndtr
from scipy.stats import t as student

from clipvisionalign.progress import progress
from clipvisionalign.study.statistics import SIGNIFICANCE_LEVEL, half_width, mean_squares

SEEDS, EFFECTS, DIFFERENCES = (2, 3, 5), (0, 3, 7, 14), (5, 10, 20, 40)
CAPTIONS = 5
#: What a query needs to be found within the first 1, 5 and 10, both ways: quantiles of the published recalls.
THRESHOLDS = {"image": (0.80, 0.10, -0.22), "caption": (1.06, 0.26, -0.13)}
#: Standard deviations of a query's ease: of its image, its caption, and this run's chance.
IMAGE_STD, CAPTION, CHANCE = 0.76, 0.50, 0.56


def old_rule(squares: tuple[Any, Any, Any], seeds: int, images: int, level: float = SIGNIFICANCE_LEVEL) -> Any:
    """The rule before: Satterthwaite's degrees of freedom; seeds that differ no more than the rest are left out."""
    ms_image, ms_seed, ms_rest = squares
    total = ms_image + ms_seed - ms_rest
    each = ms_image**2 / (images - 1) + ms_seed**2 / (seeds - 1) + ms_rest**2 / ((seeds - 1) * (images - 1))
    counted = ms_seed > ms_rest
    variance, freedom = np.where(counted, total, ms_image), np.where(counted, total**2 / each, images - 1)
    return student.isf(level / 2, freedom) * np.sqrt(variance / (seeds * images))


def satterthwaite(squares: tuple[Any, Any, Any], seeds: int, images: int, level: float = SIGNIFICANCE_LEVEL) -> Any:
    """Satterthwaite's degrees of freedom, the rest not subtracted."""
    ms_image, ms_seed, _ = squares
    total = ms_image + ms_seed
    freedom = total**2 / (ms_image**2 / (images - 1) + ms_seed**2 / (seeds - 1))
    return student.isf(level / 2, freedom) * np.sqrt(total / (seeds * images))


def unsubtracted(squares: tuple[Any, Any, Any], seeds: int, images: int, level: float = SIGNIFICANCE_LEVEL) -> Any:
    """The rule of now with the rest not subtracted."""
    return half_width((squares[0], squares[1], 0.0), seeds, images, level)


def over_seeds(squares: tuple[Any, Any, Any], seeds: int, images: int, level: float = SIGNIFICANCE_LEVEL) -> Any:
    """Student's t of the seeds' means: the images count as given."""
    return student.isf(level / 2, seeds - 1) * np.sqrt(squares[1] / (seeds * images))


RULES: dict[str, Callable[..., Any]] = {
    "old": old_rule, "new": half_width, "new, rest not subtracted": unsubtracted,
    "Satterthwaite, rest not subtracted": satterthwaite, "t over seeds alone": over_seeds,
}  # fmt: skip


def chance_of_three(threshold: tuple[float, ...], spread: float, shift: Any) -> Any:
    """Expected number of the three recalls that a query counts in, its run moved by `shift`."""
    return sum(ndtr((shift - bound) / spread) for bound in threshold)


def mean_rsum(shift: Any, interaction: float) -> Any:
    """The mean over all images there could be, of a run that is moved by `shift`."""
    variance = IMAGE_STD**2 + CHANCE**2 + interaction**2
    image = chance_of_three(THRESHOLDS["image"], np.sqrt(variance), shift)
    return 100 * (image + chance_of_three(THRESHOLDS["caption"], np.sqrt(variance + CAPTION**2), shift))


def contributions(of_image: np.ndarray, of_caption: np.ndarray) -> np.ndarray:
    """Ease of queries (..., N) and (..., N, K) -> what each image brings to rsum (..., N)."""
    image_hits = sum((of_image > bound).astype(np.int8) for bound in THRESHOLDS["image"])
    captions = sum((of_caption > bound).astype(np.int8) for bound in THRESHOLDS["caption"])
    return 100.0 * image_hits + (100.0 / CAPTIONS) * captions.sum(axis=-1)


def drawn(
    rng: np.random.Generator, studies: int, seeds: int, images: int, effects: tuple[float, ...], interaction: float
) -> dict[float, np.ndarray]:
    """By the effect of a seed: what each image brings in each run, (studies, 2 variants, S, N)."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    image_effect = IMAGE_STD * normal(studies, 1, 1, images)
    if interaction:
        image_effect = image_effect + interaction * normal(studies, 2, 1, images)
    of_image = image_effect + CHANCE * normal(studies, 2, seeds, images)
    of_caption = CAPTION * normal(studies, 1, 1, images, CAPTIONS) + image_effect[..., None]
    of_caption = of_caption + CHANCE * normal(studies, 2, seeds, images, CAPTIONS)
    slope = (mean_rsum(1e-3, interaction) - mean_rsum(-1e-3, interaction)) / 2e-3
    seed = normal(studies, 2, seeds)[..., None] / np.float32(slope)
    return {
        effect: contributions(of_image + effect * seed, of_caption + (effect * seed)[..., None]) for effect in effects
    }


def simulate(
    studies: int,
    images: int,
    seeds: tuple[int, ...] = SEEDS,
    effects: tuple[float, ...] = EFFECTS,
    interaction: float = 0.0,
    seed: int = 0,
    shown: bool = True,
) -> list[dict[str, Any]]:
    """A row for each number of seeds and effect of a seed: shares of the studies, by rule."""
    rng = np.random.default_rng(seed)
    studies_per_chunk = max(1, 40_000 // (images * max(seeds)))
    chunks = [(number, start) for number in seeds for start in range(0, studies, studies_per_chunk)]
    kept: dict[tuple[int, float], list[tuple[np.ndarray, ...]]] = {}
    for number, start in progress(chunks, f"studies on {images:,} images", len(chunks), shown):
        tables = drawn(rng, min(studies_per_chunk, studies - start), number, images, effects, interaction)
        for effect, table in tables.items():
            gap, one = table[:, 0] - table[:, 1], table[:, 0]
            kept.setdefault((number, effect), []).append(
                (gap.mean(axis=(1, 2)), *mean_squares(gap), one.mean(axis=(1, 2)), *mean_squares(one))
            )
    slope = (mean_rsum(1e-3, interaction) - mean_rsum(-1e-3, interaction)) / 2e-3
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    rows = []
    for (number, effect), parts in kept.items():
        gap, g_image, g_seed, g_rest, one, o_image, o_seed, o_rest = (
            np.concatenate(several) for several in zip(*parts, strict=True)
        )
        # Recalls are not linear in what moves them: the mean over all seeds is not quite that of the middle one.
        true = float((weights * mean_rsum(points * effect / slope, interaction)).sum() / weights.sum())
        row: dict[str, Any] = {"seeds": number, "effect": effect, "images": images, "studies": len(gap), "rules": {}}
        row["picture"] = round(float(np.sqrt(np.mean(o_image - o_rest) / number + np.mean(o_rest))), 1)
        row["difference of two runs"] = round(float(np.sqrt(np.mean(g_rest))), 1)
        for name, rule in RULES.items():
            reach = rule((g_image, g_seed, g_rest), number, images)
            covered = np.abs(one - true) <= rule((o_image, o_seed, o_rest), number, images)
            row["rules"][name] = {
                "type_1": float((np.abs(gap) > reach).mean()),
                "coverage": float(covered.mean()),
                "half_width": float(np.median(reach)),
                "power": {str(moved): float((gap + moved > reach).mean()) for moved in DIFFERENCES},
            }
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rules before and now as a Markdown table, in percent."""
    lines = ["| seeds | a seed, rsum | flagged without a difference | mean covered | difference of 5 | 10 | 20 | 40 |",
             "|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in rows:
        old, new = row["rules"]["old"], row["rules"]["new"]
        cells = [f"{100 * old[kind]:.1f} / {100 * new[kind]:.1f}" for kind in ("type_1", "coverage")]
        cells += [f"{100 * old['power'][str(d)]:.0f} / {100 * new['power'][str(d)]:.0f}" for d in DIFFERENCES]
        lines.append(f"| {row['seeds']} | {row['effect']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=4000, help="simulated studies of each cell")
    parser.add_argument("--images", type=int, default=1000, help="pictures in the gallery")
    parser.add_argument("--interaction", type=float, default=0.0, help="ease of images that suit one variant, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    rows = simulate(given.studies, given.images, interaction=given.interaction, seed=given.seed)
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{given.studies:,} studies a row on {given.images:,} images, in percent: the rule before / now")
    print(table_of(rows))
    print("\nflagged without a difference at most, mean covered at least, median half-width over all rows:")
    for name in RULES:
        several = [row["rules"][name] for row in rows]
        most, least = max(each["type_1"] for each in several), min(each["coverage"] for each in several)
        width = np.median([each["half_width"] for each in several])
        print(f"  {name:<36} {100 * most:5.1f} {100 * least:6.1f} {width:6.1f}")
    first = rows[0]
    print(f"standard deviations: an image {first['picture']}, two runs' difference {first['difference of two runs']}")


if __name__ == "__main__":
    main()
