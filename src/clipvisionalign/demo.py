"""`make demo`: draw scenes, train two designs on them, write the report, index pictures that were never trained on, and
search them; the whole way in a few minutes on two cores.

It carries out the ready plan `demo`, whose one question stands in it before anything is trained. Then the run with the
best dev rsum indexes the gallery, and `scene_search` counts what a search finds of what it was asked for. What is
finished is not done again. What the figures of real pictures are, the README says.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clipvisionalign.data.scenes import Scene, read_scenes
from clipvisionalign.models.aligner import Remembered
from clipvisionalign.progress import long_step
from clipvisionalign.scene_search import draw_queries, search_quality
from clipvisionalign.search.index import build_index
from clipvisionalign.search.query import Searcher, parse_term
from clipvisionalign.study.gaps import not_made
from clipvisionalign.study.plan import Plan, cells_of, read_plan
from clipvisionalign.study.primary import primary_of
from clipvisionalign.study.run import MORE, run_study
from clipvisionalign.study.tables import print_tables
from clipvisionalign.study.words import claims_of

FOLDER = Path("demo")
#: How many first pictures of a query are put into a new order by pair scores.
RERANK = 32

Say = Callable[[str], None]


def demo(folder: Path = FOLDER, plan: Plan | None = None) -> dict[str, Any]:
    """Leave a study and an index in `folder`; returns the report. What is finished there already is not done again."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    plan = plan or read_plan("demo")

    def search(report: dict[str, Any]) -> None:
        run = best_run(plan, folder)
        say(f"--- {run.name} has the best dev rsum: it indexes and searches the {plan.split} pictures ---")
        report["search"] = searched(run, folder, plan, say)
        report["claims"] = claims_of(report)

    with long_step("demo", in_terminal=False):
        report = run_study(plan, folder, say, search)
    print_tables(report)
    say(f"done in {(time.perf_counter() - start) / 60:.1f} min")
    print("\n".join(last_lines(report, folder)))
    return report


def best_run(plan: Plan, folder: Path) -> Path:
    """The run that is chosen: by its dev rsum, which is not of the pictures that are searched."""
    runs = [cell.folder for cell in cells_of(plan, folder) if (cell.folder / "results.json").is_file()]
    return max(runs, key=lambda run: json.loads((run / "results.json").read_text())["rsum"]["value"])


def searched(run: Path, folder: Path, plan: Plan, say: Say) -> dict[str, Any]:
    """Index the measured split's pictures with a run, and count what a search for two things finds there."""
    pictures, index = folder / "scenes" / "images" / plan.split, folder / "index"
    build_index(run, pictures, index, say)
    scenes = gallery_of(folder, plan.split)
    searcher = Searcher(index)
    # Of an image that is among the first of several queries the towers give the same each time.
    searcher.aligner.remembered = Remembered()
    rerank = RERANK if searcher.aligner.late is not None else 0

    def find(words: str, count: int) -> Sequence[str]:
        return [found.path for found in searcher.search([parse_term(words)], count, rerank=rerank)]

    queries = draw_queries(scenes, seed=plan.drawing.seed)
    with long_step("searching", len(queries)) as step:
        done = 0

        def counted(words: str, count: int) -> Sequence[str]:
            nonlocal done
            found = find(words, count)
            done += 1
            step.update(done)
            return found

        found = search_quality(queries, len(scenes), counted)
    return {"run": str(run), "index": str(index), "rerank": rerank, **found}


def gallery_of(folder: Path, split: str) -> dict[str, Scene]:
    """The scenes of a split by the names that the index has for their pictures."""
    prefix = f"images/{split}/"
    scenes = read_scenes(folder / "scenes")
    return {name.removeprefix(prefix): scene for name, scene in scenes.items() if name.startswith(prefix)}


def last_lines(report: dict[str, Any], folder: Path) -> list[str]:
    """What was asked and found, and what to type next."""
    named, found = primary_of(report), report.get("search")
    lines = [claim["text"].replace("`", "") for claim in report["claims"] if claim["text"].startswith("Named")][:1]
    if named is None:
        lines = ["The comparison that was named beforehand was not made: its runs failed."]
    if found is None:
        reasons = [each["reason"] for each in not_made(report) if each["part"] == MORE]
        return [*lines, f"The search was not made: {'; '.join(reasons) or 'its reason stands in the report'}"]
    example = found["each"][0]["query"]
    lines.append(
        f"Search: {found['share']:.0f} % of the first answers hold all that was asked for (chance "
        f"{found['chance']:.1f} %): {found['queries']} queries drawn from the scenes, such as '{example}', among "
        f"{found['gallery']:,} pictures that were never trained on."
    )
    program = Path(sys.executable).with_name("clipvisionalign")
    shown = os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program)
    rerank = f" --rerank {found['rerank']}" if found["rerank"] else ""
    lines += [
        "",
        "next:",
        f'  {shown} search {found["index"]} "a green star and a red ring"{rerank}',
        f"  {shown} serve {found['index']}",
        f"  open {folder}/report.html in a browser",
    ]
    return lines


if __name__ == "__main__":
    demo()
