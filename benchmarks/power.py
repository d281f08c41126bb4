"""Do the promises of a study hold? Studies with known spread are simulated.

    python benchmarks/power.py [--studies 2000] [--json]

Stopping: seeds are added until the interval of a difference is narrow enough, at the level of now beside 95 %. Kinds
are all of images (100, 500, 1,000), standard deviations over images (10 to 120 rsum), between seeds (0 to 14) and of
the rest (60), and widths of 1.15 to 6 times what the images leave. Told is how often the interval at the stop misses
the difference, which is zero: at the worst of all kinds, and in how many kinds above 6 %.

Widths: a study to come has an interval no wider than was promised from a study before, whose seeds are few. Told is in
what share, at the least of all kinds; 90 % are promised. And how often the difference that 80 % are to show is shown.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from typing import Any

import numpy as np

from clipvisionalign.progress import progress
from clipvisionalign.study.power import ASSURANCE, POWER, DifferenceSpread, promised_half_width, shown_difference
from clipvisionalign.study.sequential import FIRST_LOOK, SEQUENTIAL_LEVEL
from clipvisionalign.study.statistics import SIGNIFICANCE_LEVEL, half_width

IMAGES, IMAGE_STDS, SEED_STDS, REST_STD = (100, 500, 1000), (10, 20, 60, 120), (0, 1, 3, 7, 14), 60.0
#: Widths in units of what the images alone leave.
WIDTHS, MAX_SEEDS = (1.15, 1.3, 2, 3, 4, 6), 20
PROBES, SEEDS = ((2, 500), (3, 500), (5, 1000)), (3, 5, 8)


def draw(kind: tuple[int, float, float], number: int, seeds: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Means by seed (number, S), and the mean squares of images and rest, as those of tables of that spread."""
    images, image_std, seed_std = kind
    of_images = rng.normal(0, image_std / np.sqrt(images), (number, 1))
    of_seeds = rng.normal(0, np.sqrt(seed_std**2 + REST_STD**2 / images), (number, seeds))
    image_variance = image_std**2 * rng.chisquare(images - 1, number) / (images - 1)
    return of_images + of_seeds, image_variance, np.full(number, REST_STD**2)


def squares(drawn: tuple[np.ndarray, ...], seeds: int, images: int) -> tuple[Any, Any, Any]:
    """Mean squares of the first seeds."""
    means, image_variance, rest = drawn
    of_seeds = images * means[:, :seeds].var(axis=1, ddof=1)
    return seeds * image_variance + rest, of_seeds, rest


def missed(kind: tuple[int, float, float], width: float, level: float, number: int, rng: Any) -> tuple[float, float]:
    """How often the interval at the stop misses zero, and the mean number of seeds."""
    images, drawn = kind[0], draw(kind, number, MAX_SEEDS, rng)
    stopped, is_missed, seeds_used = (np.zeros(number, dtype) for dtype in (bool, bool, int))
    for seeds in range(FIRST_LOOK, MAX_SEEDS + 1):
        margin = half_width(squares(drawn, seeds, images), seeds, images, level)
        ends = ~stopped & ((2 * margin <= width) | (seeds == MAX_SEEDS))
        is_missed[ends] = np.abs(drawn[0][:, :seeds].mean(axis=1))[ends] > margin[ends]
        seeds_used[ends] = seeds
        stopped |= ends
    return float(is_missed.mean()), float(seeds_used.mean())


def stopping(number: int) -> list[dict[str, Any]]:
    """A row for each level."""
    rows = []
    for level in (SEQUENTIAL_LEVEL, SIGNIFICANCE_LEVEL):
        rng = np.random.default_rng(0)
        kinds = list(product(IMAGES, IMAGE_STDS, SEED_STDS, WIDTHS))
        outcomes = []
        for images, image_std, seed_std, factor in progress(kinds, f"stopping at {level}", len(kinds)):
            width = 2 * 1.96 * image_std / np.sqrt(images) * factor
            outcomes.append(missed((images, image_std, seed_std), width, level, number, rng))
        misses, seeds = np.array(outcomes).T
        rows.append({
            "level": level, "kinds": len(kinds), "worst": 100 * misses.max(), "mean": 100 * misses.mean(),
            "kinds_above_6": int((misses > 0.06).sum()), "seeds": seeds.mean(),
        })  # fmt: skip
    return rows


def promises(number: int) -> list[dict[str, Any]]:
    """A row for each probe and number of seeds: the least of all kinds."""
    rows, rng = [], np.random.default_rng(1)
    for (probe_seeds, probe_images), seeds in progress(list(product(PROBES, SEEDS)), "widths", 9):
        kept, shown = [], []
        for images, image_std, seed_std in product(IMAGES, IMAGE_STDS, SEED_STDS):
            probe = draw((probe_images, image_std, seed_std), number, probe_seeds, rng)
            study = draw((images, image_std, seed_std), number, seeds, rng)
            margin = half_width(squares(study, seeds, images), seeds, images)
            seed_stds = probe[0].std(axis=1, ddof=1)
            # The promise depends on the probe by these three alone; its own images hardly vary.
            spreads = [
                DifferenceSpread(float(np.sqrt(variance)), REST_STD, float(std), probe_seeds, probe_images, "")
                for variance, std in zip(probe[1], seed_stds, strict=True)
            ]
            promised = np.array([promised_half_width(spread, seeds, images) for spread in spreads])
            kept.append((margin <= promised).mean())
            truth = float(np.sqrt(seed_std**2 + REST_STD**2 / images))
            difference = shown_difference(
                DifferenceSpread(image_std, REST_STD, truth, 10**6, images, ""), seeds, images
            )
            shown.append((np.abs(study[0].mean(axis=1) + difference) > margin).mean())
        rows.append({
            "probe": f"{probe_seeds} seeds, {probe_images} images", "seeds": seeds, "kept_least": 100 * min(kept),
            "kept_mean": 100 * float(np.mean(kept)), "shown_least": 100 * min(shown), "shown_most": 100 * max(shown),
        })  # fmt: skip
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {"studies": args.studies, "stopping": stopping(args.studies), "promises": promises(args.studies)}
    if args.json:
        print(json.dumps(results, indent=2))
        return
    print(f"{args.studies:,} studies of each kind; missed, in percent:")
    for row in results["stopping"]:
        print(
            f"  looks at {100 * row['level']:.1f} %: {row['worst']:.1f} at the worst of {row['kinds']} kinds, "
            f"{row['mean']:.1f} on average, above 6 in {row['kinds_above_6']} kinds; {row['seeds']:.1f} seeds"
        )
    print(f"widths within the promise ({100 * ASSURANCE:.0f} %), and differences shown ({100 * POWER:.0f} %):")
    for row in results["promises"]:
        print(
            f"  by {row['probe']:<22} {row['seeds']} seeds: within in {row['kept_mean']:.1f} %, at the least "
            f"{row['kept_least']:.1f}; shown in {row['shown_least']:.1f} to {row['shown_most']:.1f}"
        )


if __name__ == "__main__":
    main()
