"""`make demo`: draw scenes, train the four designs on them, write the report; the whole way in a few minutes.

The ready plan `scenes` in a small form: fewer scenes, one seed, so that the demo ends soon on two cores. It shows the
way and the form of the answer, not the answer. What the figures of real pictures are, the README says.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from clipvisionalign.study.plan import read_plan
from clipvisionalign.study.run import run_study
from clipvisionalign.study.tables import print_tables

FOLDER = Path("demo")
SCENES = 256


def demo(folder: Path = FOLDER) -> None:
    """Leave a study in `folder`; what is finished there already is not done again."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    plan = read_plan("scenes")
    measure = replace(plan.measure, rounds=1, composition=150)
    plan = replace(plan, title="Attention designs on drawn scenes, in small", scenes=SCENES, seeds=[0], measure=measure)
    print_tables(run_study(plan, folder, say))
    say(f"done in {(time.perf_counter() - start) / 60:.1f} min; open {folder}/report.html in a browser")


if __name__ == "__main__":
    demo()
