"""Zero-shot classification of drawn shapes and colours by models that were trained on captions of scenes.

    python benchmarks/classification.py RUN [RUN ...] [--images 480] [--seed 0] [--device auto]

Draws class folders by shape, by colour and by both (each image holds like shapes in one cell) and classifies all images
with templates in the words of the scenes' captions. Prints top-1 and the mean per class with 95% intervals beside
chance, and, for two runs or more, the paired difference of each from the first.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from clipvisionalign.data.scene_classes import CLASSES_BY, write_scene_classes
from clipvisionalign.retrieval import accuracy_gain
from clipvisionalign.retrieval.metrics import MetricEstimate
from clipvisionalign.training.opened_classes import load_model, open_classes

#: In the words of the captions of scenes, which never name a shape without its colour or a colour without its shape.
TEMPLATES = {
    "shape": ["a {} on a white background", "there is a large {} in the centre of the picture"],
    "colour": ["a {} shape on a white background", "there is a large {} shape in the centre of the picture"],
    "both": ["a {} on a white background", "there is a large {} in the centre of the picture"],
}


def cell(estimate: MetricEstimate, sign: str = "") -> str:
    """A share in percent with its interval."""
    assert estimate.low is not None
    assert estimate.high is not None
    return f"{100 * estimate.value:{sign}.1f} [{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]"


def main() -> None:
    """Print a row for each kind of classes and each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    print("| classes | run | top-1 | mean per class | chance | difference in top-1 |\n|---|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for by, classes in CLASSES_BY.items():
            data = str(write_scene_classes(Path(folder) / by, by, max(args.images, 10 * len(classes)), args.seed))
            (templates := Path(folder) / f"{by}.txt").write_text("\n".join(TEMPLATES[by]))
            opened = open_classes(args.runs[0], data, "all", str(templates), device=args.device)
            first = opened.classify()
            for run in args.runs:
                results = first
                if run != args.runs[0]:
                    results = replace(opened, run=run, model=load_model(run, args.device)).classify()
                gain = "" if results is first else cell(accuracy_gain(results, first)["top_1"], "+")
                chance = f"{100 * results.chance['top_1']:.1f}"
                print(f"| {by} ({len(classes)}) | {run} | {cell(results.top[1])} | {cell(results.mean_per_class)} | "
                      f"{chance} | {gain} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
