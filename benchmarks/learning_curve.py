"""Does the interval of an extrapolated learning curve hold? Real trainings, predicted and then measured.

    python benchmarks/learning_curve.py [--data flickr8k] [--scenes 0,1] [--seeds 0,1] [--designs self,late]
        [--work FOLDER] [--json]

A case is a data set, a design and a seed. A run is trained on all of the training captions, and on 1/8, 1/4 and 1/2 of
them (`learning_curve`). From these three alone the figure of the run itself is predicted with a 90 % interval, and
compared with what was measured on the same dev images. Told of each case: the four figures, the prediction, whether the
interval holds the run's figure, and its half-width beside that of the run's own 95 % bootstrap interval. The towers are
the default ones, frozen, with images at 96 pixels, so that a case takes about a minute once their outputs are cached.

The cases by default are those of docs/results.md; the method's prior (`adaptation/extrapolation.py`) was set on others:
scenes with the seeds 10 and above. --work keeps the trainings: what is finished there is used again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from clipvisionalign.adaptation.extrapolation import LEVEL
from clipvisionalign.adaptation.learning_curve import LearningCurve, learning_curve
from clipvisionalign.data.scene_dataset import write_scenes
from clipvisionalign.models.aligner_config import AlignerConfig
from clipvisionalign.models.device import machine_info
from clipvisionalign.models.image_tower import ImageTowerConfig
from clipvisionalign.models.tower_cache import TowerOutputCache
from clipvisionalign.progress import progress
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.train import resume, train

#: Scenes that are drawn, and images of --data that are trained on.
SCENES, TRAIN_IMAGES = 1200, 1000


@dataclass(frozen=True)
class Case:
    """A training whose figure is predicted. data: the data set; name: as it is printed."""

    data: Path
    name: str
    design: Literal["self", "late"]
    seed: int

    def config(self, work: Path) -> RunConfig:
        """The settings of the run on all captions."""
        model = AlignerConfig(design=self.design, image_tower=ImageTowerConfig(size=96))
        out = str(work / f"{self.name}-{self.design}-{self.seed}")
        return RunConfig(
            data=str(self.data), out=out, freeze="both", augment="none", precision="float32", batch=64, epochs=2,
            seed=self.seed, model=model, trackers="", cache=str(work / "cache"),
            train_images=0 if self.name.startswith("scenes") else TRAIN_IMAGES,
        )  # fmt: skip


def all_cases(args: argparse.Namespace, work: Path) -> Iterator[Case]:
    """Every data set with every design and seed; scenes that are not there are drawn."""
    sources = [(Path(args.data), Path(args.data).name)] if args.data else []
    for seed in filter(None, args.scenes.split(",")):
        folder = work / f"scenes-{seed}"
        if not folder.is_dir():
            write_scenes(folder, SCENES, int(seed), 112)
        sources.append((folder, f"scenes{seed}"))
    for folder, name in sources:
        for design in args.designs.split(","):
            for seed in args.seeds.split(","):
                yield Case(folder, name, design, int(seed))


def run_case(case: Case, work: Path, towers: TowerOutputCache) -> LearningCurve:
    """The learning curve of a case; what is finished is used again."""
    config = case.config(work)
    run = Path(config.out)
    if (run / "config.yaml").is_file():
        resume(run, encodings_cache=towers)
    else:
        train(config, encodings_cache=towers)
    return learning_curve(run, encodings_cache=towers)


def row_of(case: Case, curve: LearningCurve) -> dict[str, Any]:
    """What is told of a case."""
    own, test = curve.points[-1].rsum, curve.test
    return {
        "data": case.name, "design": case.design, "seed": case.seed, "images": curve.images, "chance": curve.chance,
        "captions": [point.captions for point in curve.points],
        "rsum": [point.rsum.value for point in curve.points],
        "predicted": test.value, "low": test.low, "high": test.high, "measured": own.value, "holds": curve.holds,
        "half_width": (test.high - test.low) / 2,
        "own_half_width": ((own.high or 0.0) - (own.low or 0.0)) / 2,
        "twice": curve.summary(),
    }  # fmt: skip


def print_row(row: dict[str, Any]) -> None:
    """A line of the table."""
    name = f"{row['data']} {row['design']} {row['seed']}"
    figures = "  ".join(f"{value:6.1f}" for value in row["rsum"])
    interval = f"{row['predicted']:6.1f} [{row['low']:6.1f}, {row['high']:6.1f}]"
    ratio = row["half_width"] / row["own_half_width"]
    holds = "yes" if row["holds"] else "no"
    widths = f"{row['half_width']:10.1f} {row['own_half_width']:6.1f} {ratio:5.2f}"
    print(f"{name:20} {figures}  {interval}  {holds:5} {widths}", flush=True)


def main() -> None:
    """Train all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="a data set beside the scenes, such as the folder of Flickr8k")
    parser.add_argument("--scenes", default="0,1", help="seeds of drawn data sets (default 0,1)")
    parser.add_argument("--seeds", default="0,1", help="seeds of the trainings (default 0,1)")
    parser.add_argument("--designs", default="self,late", help="designs (default self,late)")
    parser.add_argument("--work", default="", help="folder that keeps the trainings (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        cases, towers = list(all_cases(args, work)), TowerOutputCache()
        if not args.json:
            parts = "  ".join(f"{part:>6}" for part in ("1/8", "1/4", "1/2", "all"))
            print(f"{'case':20} {parts}  {'predicted, 90 %':>23}  holds half-width    own ratio")
        rows = []
        for case in progress(cases, "learning curves", len(cases)):
            rows.append(row_of(case, run_case(case, work, towers)))
            if not args.json:
                print_row(rows[-1])
    held = sum(row["holds"] for row in rows)
    ratio = median(row["half_width"] / row["own_half_width"] for row in rows)
    if args.json:
        print(json.dumps({"machine": machine_info(), "level": LEVEL, "cases": rows, "held": held, "ratio": ratio}))
    else:
        print(
            f"{held} of {len(rows)} hold; the half-width is {ratio:.2f} times the run's own bootstrap interval (median)"
        )


if __name__ == "__main__":
    main()
