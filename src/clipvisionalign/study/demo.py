"""`make demo`: draw scenes, train the four designs on them, compare; the whole way in a few minutes.

The scenes are small in number and the training short, so that the demo ends soon on two cores: it shows the way and the
form of the answer, not the answer. What the figures of real pictures are, the README says.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from clipvisionalign.data.captioned import DataError
from clipvisionalign.data.scenes import write_scenes
from clipvisionalign.study.compare import compare, print_table
from clipvisionalign.training.train import RunConfig

FOLDER = Path("demo")
SCENES, SEED = 320, 7


def demo(folder: Path = FOLDER) -> None:
    """Leave `folder`/scenes and `folder`/study; what is finished there already is not done again."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    data = folder / "scenes"
    try:
        write_scenes(data, SCENES, SEED)
        say(f"{data}: {SCENES} scenes drawn, five captions each")
    except DataError:
        say(f"{data}: drawn already")
    config = RunConfig(
        data=str(data), out=str(folder / "study"), epochs=3, batch=32, augment="none", cache=str(folder / "cache"),
        text_lr=3e-4, head_lr=2e-3, ema=0.9, negatives=2,
    )  # fmt: skip
    study = compare(config, ("self", "sparse", "late", "cross"), say)
    print_table(study)
    say(f"done in {(time.perf_counter() - start) / 60:.1f} min; look at {folder}/study/comparison.png")


if __name__ == "__main__":
    demo()
