"""`make demo`: draws scenes, trains two designs, writes the report, indexes other scenes and searches them, in a few
minutes on two cores.

It carries out the ready plan `demo`, whose one question stands in it before anything is trained. Then the run with the
best dev rsum indexes the gallery, and `scene_search` counts what a search finds of what it was asked for. What is
finished is not done again. The README has the figures of real images.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipvisionalign.data.scene_dataset import read_scenes
from clipvisionalign.data.scenes import Scene
from clipvisionalign.log import configure_command_line
from clipvisionalign.models.aligner import TowerOutputCache
from clipvisionalign.progress import progress_step
from clipvisionalign.scene_search import draw_queries, search_quality
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.terms import parse_term
from clipvisionalign.study.config import Plan, trials_of
from clipvisionalign.study.plan_file import read_plan
from clipvisionalign.study.report.schema import StudyReport
from clipvisionalign.study.report.states import find_primary, missing_parts
from clipvisionalign.study.report.summary import report_claims
from clipvisionalign.study.report.tables import print_tables
from clipvisionalign.study.runner import ADDED_PART, run_study

DEMO_FOLDER = Path("demo")
#: How many first images of a query are put into a new order by pair scores.
RERANK_DEPTH = 32

logger = logging.getLogger(__name__)


def demo(folder: Path = DEMO_FOLDER, plan: Plan | None = None) -> dict[str, Any]:
    """Carry out a plan, index its gallery and search it; what is finished there already is not done again.

    Args:
        folder: Takes a study and an index.
        plan: The plan; None for the plan `demo`.

    Returns:
        The study's report.
    """
    start = time.perf_counter()

    plan = plan or read_plan("demo")

    def search(report: dict[str, Any]) -> None:
        run = best_run(plan, folder)
        logger.info(f"--- {run.name} has the best dev rsum: it indexes and searches the {plan.split} images ---")
        report["search"] = index_and_search(run, folder, plan)
        report["claims"] = report_claims(report)

    with progress_step("demo", in_terminal=False):
        report = run_study(plan, folder, extend_report=search)
    print_tables(report)
    logger.info(f"done in {(time.perf_counter() - start) / 60:.1f} min")
    print("\n".join(closing_lines(report, folder)))
    return report


def best_run(plan: Plan, folder: Path) -> Path:
    """The run that is chosen: by its dev rsum, which is not of the images that are searched.

    Args:
        plan: The plan.
        folder: The study's folder.

    Returns:
        The run folder.
    """
    runs = [cell.folder for cell in trials_of(plan, folder) if (cell.folder / "results.json").is_file()]
    return max(runs, key=lambda run: json.loads((run / "results.json").read_text())["rsum"]["value"])


def index_and_search(run: Path, folder: Path, plan: Plan) -> dict[str, Any]:
    """Index the measured split's images with a run, and count what a search for two things finds there.

    Args:
        run: The run folder.
        folder: The demo's folder.
        plan: The plan.

    Returns:
        Counts, as the report holds them.
    """
    image_folder, index = folder / "scenes" / "images" / plan.split, folder / "index"
    build_index(run, image_folder, index)
    scenes = gallery_scenes(folder, plan.split)
    searcher = Searcher(index)
    # Of an image that is among the first of several queries the towers give the same each time.
    searcher.aligner.tower_cache = TowerOutputCache()
    rerank = RERANK_DEPTH if searcher.aligner.late is not None else 0

    def find(query: str, limit: int) -> Sequence[str]:
        return [hit.path for hit in searcher.search([parse_term(query)], limit, rerank=rerank)]

    queries = draw_queries(scenes, seed=plan.drawing.seed)
    with progress_step("searching", len(queries)) as step:
        done = 0

        def find_with_progress(query: str, limit: int) -> Sequence[str]:
            nonlocal done
            paths = find(query, limit)
            done += 1
            step.update(done)
            return paths

        quality = search_quality(queries, len(scenes), find_with_progress)
    return {"run": str(run), "index": str(index), "rerank": rerank, **quality}


def gallery_scenes(folder: Path, split: str) -> dict[str, Scene]:
    """The scenes of a split by the names that the index has for their images.

    Args:
        folder: The folder of the scenes.
        split: The split.

    Returns:
        Scenes by name.
    """
    prefix = f"images/{split}/"
    scenes = read_scenes(folder / "scenes")
    return {name.removeprefix(prefix): scene for name, scene in scenes.items() if name.startswith(prefix)}


def closing_lines(report: dict[str, Any], folder: Path) -> list[str]:
    """What was asked and found, and what to type next.

    Args:
        report: The study's report.
        folder: The demo's folder.

    Returns:
        The lines.
    """
    typed, search_result = StudyReport.of(report), report.get("search")
    lines = [claim.text.replace("`", "") for claim in typed.claims if claim.text.startswith("Named")][:1]
    if find_primary(typed) is None:
        lines = ["The comparison that was named beforehand was not made: its runs failed."]
    if search_result is None:
        reasons = [gap.reason for gap in missing_parts(typed) if gap.part == ADDED_PART]
        return [*lines, f"The search was not made: {'; '.join(reasons) or 'its reason stands in the report'}"]
    example = search_result["each"][0]["query"]
    lines.append(
        f"Search: {search_result['share']:.0f} % of the first answers hold all that was asked for (chance "
        f"{search_result['chance']:.1f} %): {search_result['queries']} queries drawn from the scenes, such as "
        f"'{example}', among "
        f"{search_result['gallery']:,} images that were never trained on."
    )
    program = Path(sys.executable).with_name("clipvisionalign")
    command = os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program)
    rerank = f" --rerank {search_result['rerank']}" if search_result["rerank"] else ""
    lines += [
        "",
        "next:",
        f'  {command} search {search_result["index"]} "a green star and a red ring"{rerank}',
        f"  {command} serve {search_result['index']}",
        f"  open {folder}/report.html in a browser",
    ]
    return lines


if __name__ == "__main__":
    configure_command_line()
    demo()
