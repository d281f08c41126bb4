"""What fine-tuning forgets: each recipe on the new data, and on the data that the model was trained on before.

    python benchmarks/forgetting.py --flickr8k FOLDER --work FOLDER [--seeds 0,1,2] [--directions ...] [--json]

A model is trained on one data set (the old one) and tuned on another one (the new one), both ways round between
Flickr8k and drawn scenes, with the image tower frozen and three seeds. No recipe sees old data while it tunes. Rates,
weights and alphas are chosen on one half of both dev splits, rates and the weight of distillation on a seed of their
own; every figure is of the other half, as a gallery of its own. Intervals are of a bootstrap over its images, the same
ones for all models and seeds. What is finished in --work is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: Shares that one recipe should keep of the old rsum, and reach of plain tuning's gain on the new data.
KEPT_OLD, REACHED_NEW = 0.90, 0.95
RESAMPLES = 2000
DEV_IMAGES = 500

Settings = dict[str, str]


@dataclass(frozen=True)
class Direction:
    """From old data to new: how the first model is trained, and what all recipes share."""

    old: str
    new: str
    base: Settings
    tuning: Settings
    epochs: int


#: All runs: one view without augmentation, so that outputs of the frozen image tower are computed once.
SHARED: Settings = {"augment": "none", "views": "1", "trackers": "", "patience": "100"}
DIRECTIONS = {
    "flickr8k-scenes": Direction("flickr8k", "scenes", {"freeze": "both", "epochs": "2"}, {}, 4),
    "scenes-flickr8k": Direction("scenes", "flickr8k", {"epochs": "6"}, {"train_images": "600"}, 4),
}


def recipes(epochs: int) -> dict[str, list[Settings]]:
    """The recipes with the settings that each chooses from."""
    rates = ("1e-4", "3e-5")
    plain = [{"epochs": str(epochs), "text_lr": rate} for rate in rates]
    lora = {"epochs": str(epochs), "peft": "lora", "lora.towers": "text"}
    return {
        "plain": plain,
        "stages": [{"stages": f"heads:1,text:{epochs - 1}", "text_lr": rate} for rate in rates],
        "lora": [{**lora, "text_lr": rate} for rate in ("1e-3", "3e-4")],
        "distillation": [{**plain[0], "distill": weight} for weight in ("1", "10")],
    }


#: Recipes of which weights between them and the old model are tried as well.
BLENDED = ("plain", "distillation")
ALPHAS = (0.2, 0.4, 0.6, 0.8)


def train(data: Path, out: Path, settings: Mapping[str, str], seed: int) -> Path:
    """Train a run, or resume it, unless it is finished."""
    if (out / "results.json").is_file():
        return out
    words = [f"--{name}={value}" for name, value in {**SHARED, **settings, "seed": str(seed)}.items()]
    command = [
        sys.executable,
        "-m",
        "clipvisionalign",
        "train",
        str(data),
        "--out",
        str(out),
        "--overwrite=true",
        *words,
    ]
    print(f"{out.name}: {' '.join(words)}", file=sys.stderr, flush=True)
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{out}: {ended.stderr[-2000:]}")
    return out


class Gallery:
    """Some dev images of a data set, in two halves that are galleries of their own."""

    def __init__(self, name: str, data: Path) -> None:
        from clipvisionalign import read_captioned_images
        from clipvisionalign.models.aligner import TowerOutputCache
        from clipvisionalign.training.halves import split_halves

        dev = read_captioned_images(data).split("dev").first_by_hash(DEV_IMAGES)
        halves = split_halves(dev)
        assert halves is not None
        self.name, self.dev, self.halves = name, dev, halves
        self._cache_type = TowerOutputCache
        self._images: dict[Any, Any] = {}

    def contributions(self, aligner: Any) -> list[np.ndarray]:
        """What each image of each half brings to rsum, (n,) each: the mean is the half's rsum."""
        from clipvisionalign.retrieval.ranks import ranks_of_vectors
        from clipvisionalign.study.statistics import image_contributions

        # The image tower is the same frozen one in all models; captions are read by each.
        aligner.tower_cache = self._cache_type(images=self._images)
        images = aligner.encode_images([row.image for row in self.dev.rows]).numpy()
        aligner.tower_cache = None
        captions = aligner.encode_captions(self.dev.captions).numpy()
        found = []
        for part in self.halves.parts:
            ranks = ranks_of_vectors(images[part.images], captions[part.captions], part.positives)
            found.append(image_contributions(ranks, part.positives.caption_image, "rsum"))
        return found


class Figures:
    """Contributions of models on galleries, kept on disk."""

    def __init__(self, work: Path, galleries: Mapping[str, Gallery]) -> None:
        self.work, self.galleries = work, galleries

    def of(self, key: str, run: Path, base: Path | None = None, alpha: float = 1.0) -> dict[str, list[np.ndarray]]:
        """By data set, the contributions of both halves: of a run, or of weights between it and its base."""
        file = self.work / "figures" / f"{key}.npz"
        if not file.is_file():
            aligner = _blended(run, base, alpha)
            arrays = {
                f"{name}_{half}": values
                for name, gallery in self.galleries.items()
                for half, values in enumerate(gallery.contributions(aligner))
            }
            file.parent.mkdir(exist_ok=True)
            np.savez(file, **arrays)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: [arrays[f"{name}_{half}"] for half in (0, 1)] for name in self.galleries}


def _blended(run: Path, base: Path | None, alpha: float) -> Any:
    from clipvisionalign import load_aligner
    from clipvisionalign.adaptation.interpolation import interpolate_weights

    aligner = load_aligner(run)
    if base is not None:
        weights = interpolate_weights(aligner.state_dict(), load_aligner(base).state_dict(), alpha)
        aligner.load_state_dict(weights)
    return aligner


class Study:
    """One direction: its models, and the figures of each."""

    def __init__(self, name: str, data: Mapping[str, Path], work: Path, figures: Figures) -> None:
        self.name, self.data, self.work, self.figures = name, data, work / name, figures
        self.direction = DIRECTIONS[name]
        self.work.mkdir(parents=True, exist_ok=True)

    def base(self, seed: int) -> Path:
        """The model as it was before."""
        return train(self.data[self.direction.old], self.work / f"base-{seed}", self.direction.base, seed)

    def tuned(self, recipe: str, number: int, seed: int) -> Path:
        """The base of a seed, tuned by a recipe with its settings of that number."""
        settings = recipes(self.direction.epochs)[recipe][number]
        start = {"init": str(self.base(seed)), **self.direction.tuning}
        out = self.work / f"{recipe}-{number}-{seed}"
        return train(self.data[self.direction.new], out, {**start, **settings}, seed)

    def measure(self, run: Path, alpha: float = 1.0, seed: int = 0) -> dict[str, list[np.ndarray]]:
        """Contributions on both data sets; with alpha below 1, of the weights between a run and its base."""
        key = f"{self.name}-{run.name}" + ("" if alpha == 1.0 else f"-{alpha:g}")
        return self.figures.of(key, run, None if alpha == 1.0 else self.base(seed), alpha)

    def worth(self, model: Mapping[str, Any], base: Mapping[str, Any], plain: Mapping[str, Any], half: int) -> float:
        """By what a recipe is chosen: the smaller of its two shares, each of the share that it should have."""
        old, new = self.direction.old, self.direction.new
        kept = model[old][half].mean() / base[old][half].mean()
        reached = (model[new][half].mean() - base[new][half].mean()) / (
            plain[new][half].mean() - base[new][half].mean()
        )
        return float(min(kept / KEPT_OLD, reached / REACHED_NEW))

    def choose(self, seed: int) -> dict[str, int]:
        """The settings of each recipe, on the first half of both dev splits and a seed that is not reported."""
        new = self.direction.new
        base = self.measure(self.base(seed))
        tried = {
            recipe: [self.measure(self.tuned(recipe, number, seed)) for number in range(len(settings))]
            for recipe, settings in recipes(self.direction.epochs).items()
        }
        best_plain = int(np.argmax([each[new][0].mean() for each in tried["plain"]]))
        plain = tried["plain"][best_plain]
        chosen = {
            recipe: int(np.argmax([self.worth(each, base, plain, 0) for each in models]))
            for recipe, models in tried.items()
        }
        # Plain tuning knows nothing of the old data: it is what one does without a thought of it.
        return {**chosen, "plain": best_plain}

    def rows(self, seeds: Sequence[int], chosen: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """By model, its contributions on the second half of both data sets, (S, n) each, and its alphas."""
        models: dict[str, list[dict[str, list[np.ndarray]]]] = {"base": [self.measure(self.base(s)) for s in seeds]}
        alphas: dict[str, list[float]] = {}
        for recipe, number in chosen.items():
            models[recipe] = [self.measure(self.tuned(recipe, number, seed)) for seed in seeds]
        for recipe in BLENDED:
            blended, alphas[recipe] = [], []
            for position, seed in enumerate(seeds):
                run = self.tuned(recipe, chosen[recipe], seed)
                curve = {alpha: self.measure(run, alpha, seed) for alpha in ALPHAS}
                curve[1.0] = models[recipe][position]
                base, plain = models["base"][position], models["plain"][position]
                best = max(curve, key=lambda alpha: self.worth(curve[alpha], base, plain, 0))
                alphas[recipe].append(best)
                blended.append(curve[best])
            models[f"{recipe}, blended"] = blended
        table = {}
        for name, measured in models.items():
            of_data = {data: np.stack([each[data][1] for each in measured]) for data in self.figures.galleries}
            table[name] = {**of_data, "alphas": alphas.get(name.removesuffix(", blended")) if "," in name else None}
        return table

    def result(self, seeds: Sequence[int], develop: int) -> dict[str, Any]:
        """All figures with their intervals."""
        chosen = self.choose(develop)
        table = self.rows(seeds, chosen)
        old, new = self.direction.old, self.direction.new
        generator = np.random.default_rng(0)
        weights = {
            data: generator.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
            for data, n in ((old, table["base"][old].shape[1]), (new, table["base"][new].shape[1]))
        }
        settings = {recipe: recipes(self.direction.epochs)[recipe][number] for recipe, number in chosen.items()}
        base, plain = table["base"], table["plain"]

        def row_of(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
            gain = _estimate(
                lambda mean: (mean(row[new]) - mean(base[new])) / (mean(plain[new]) - mean(base[new])), weights[new]
            )
            return {
                "old": _estimate(lambda mean: mean(row[old]), weights[old]),
                "new": _estimate(lambda mean: mean(row[new]), weights[new]),
                "kept": _estimate(lambda mean: mean(row[old]) / mean(base[old]), weights[old]),
                "reached": gain,
                "alphas": row["alphas"],
                "settings": settings.get(name),
                "by_seed": {"old": row[old].mean(axis=1).tolist(), "new": row[new].mean(axis=1).tolist()},
            }

        rows = {name: row_of(name, row) for name, row in table.items()}
        return {"direction": self.name, "old": old, "new": new, "seeds": list(seeds), "rows": rows}


def _estimate(figure: Any, weights: np.ndarray) -> dict[str, float]:
    """A figure of means over images and seeds, with its 95 % interval by the bootstrap over images."""
    value = figure(lambda table: table.mean())
    low, high = np.percentile(figure(lambda table: weights @ table.mean(axis=0)), [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def text(result: Mapping[str, Any]) -> str:
    """A table, a line a recipe."""

    def cell(row: Mapping[str, float], factor: float = 1.0, digits: int = 0) -> str:
        return (
            f"{factor * row['value']:.{digits}f} [{factor * row['low']:.{digits}f}, {factor * row['high']:.{digits}f}]"
        )

    lines = [
        f"{result['old']} -> {result['new']}, {len(result['seeds'])} seeds",
        f"{'recipe':24s}{'rsum old':>22s}{'rsum new':>22s}{'% of the old kept':>22s}{'% of plain gain':>22s}",
    ]
    for name, row in result["rows"].items():
        cells = [cell(row["old"]), cell(row["new"]), cell(row["kept"], 100), cell(row["reached"], 100)]
        both = row["kept"]["value"] >= KEPT_OLD and row["reached"]["value"] >= REACHED_NEW
        alphas = f"  alpha {', '.join(f'{alpha:g}' for alpha in row['alphas'])}" if row["alphas"] else ""
        settings = f"  {row['settings']}" if row["settings"] else ""
        lines.append(f"{name:24s}" + "".join(f"{each:>22s}" for each in cells) + " *" * both + alphas + settings)
    lines.append(f"* keeps {KEPT_OLD:.0%} of the old rsum, and has {REACHED_NEW:.0%} of plain tuning's gain")
    return "\n".join(lines)


def main() -> None:
    """Train, tune and measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flickr8k", required=True, type=Path, help="Flickr8k with its official splits")
    parser.add_argument("--work", required=True, type=Path, help="where runs and figures are kept")
    parser.add_argument("--seeds", default="0,1,2", help="seeds that are reported (default: %(default)s)")
    parser.add_argument("--develop", default=9, type=int, help="seed that rates are chosen with (default: %(default)s)")
    parser.add_argument("--directions", default=",".join(DIRECTIONS), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    from clipvisionalign.data.scene_dataset import write_scenes

    data = {"flickr8k": args.flickr8k, "scenes": args.work / "scenes"}
    if not data["scenes"].exists():
        splits = {"train": 600, "dev": 400, "test": 100}
        write_scenes(data["scenes"], 1100, seed=5, size=128, plain=True, splits=splits)
    figures = Figures(args.work, {name: Gallery(name, path) for name, path in data.items()})
    seeds = [int(seed) for seed in args.seeds.split(",")]
    results = []
    for name in args.directions.split(","):
        results.append(Study(name, data, args.work, figures).result(seeds, args.develop))
        if not args.json:
            print(text(results[-1]) + "\n", flush=True)
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
