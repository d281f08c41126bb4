"""Do the maps of `explain` say what the model used? Three checks on trained runs.

    python benchmarks/explain.py RUN ... [--data DATA] [--images 100] [--json]

- Pointing game (drawn scenes only, exact ground truth): does the map's peak lie in the cell of the group that the
  caption names? Beside it chance (a peak anywhere), a peak always in the centre, and one on any of the scene's groups.
- Deletion: the marked fifth of the image is greyed; how much does the score fall, against a fifth drawn at random?
- Weights drawn anew: how alike are the maps of the trained and of the random model (rank correlation)?
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from over_runs import over_runs

SHARE, DRAWS = 0.2, 5


def deleted(image: Any, marked: np.ndarray) -> Any:
    """The image with the marked patches grey. marked: (h, w) bool."""
    from PIL import Image

    pixels = np.asarray(image).copy()
    rows = np.arange(pixels.shape[0]) * marked.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * marked.shape[1] // pixels.shape[1]
    pixels[marked[np.ix_(rows, columns)]] = 127
    return Image.fromarray(pixels)


def top(grid: np.ndarray, count: int) -> np.ndarray:
    """The `count` greatest places of a map, as a mask."""
    mask = np.zeros(grid.size, dtype=bool)
    mask[np.argsort(-grid.ravel(), kind="stable")[:count]] = True
    return mask.reshape(grid.shape)


def interval(values: list[float]) -> dict[str, float]:
    """Mean and 95% interval over images."""
    array = np.array(values, dtype=float)
    reach = 1.96 * array.std(ddof=1) / np.sqrt(len(array))
    return {name: round(float(value), 4) for name, value in
            (("value", array.mean()), ("low", array.mean() - reach), ("high", array.mean() + reach))}  # fmt: skip


def checks(run: str, source: str, count: int) -> dict[str, Any]:
    import torch
    from scipy.stats import spearmanr

    from clipvisionalign.data.run_data import read_data_of_run
    from clipvisionalign.data.scene_dataset import read_scenes
    from clipvisionalign.explain.heatmaps import explain
    from clipvisionalign.images import open_image
    from clipvisionalign.models.io import load_aligner

    aligner = load_aligner(run)
    data, scenes = read_data_of_run(run, source, split="dev").split("dev"), read_scenes(source)
    rng = np.random.default_rng(0)
    rows = data.rows[:count]
    hits, centre, any_group, falls, random_falls, maps = [], [], [], [], [], []
    index = np.zeros(1, dtype=int)
    for row in rows:
        if row.name in scenes:
            for group in scenes[row.name].groups:
                grid = explain(aligner, row.image, group.phrase(with_size=False)).heatmap
                y, x = np.unravel_index(int(grid.argmax()), grid.shape)
                cell = int(3 * (x + 0.5) / grid.shape[1]), int(3 * (y + 0.5) / grid.shape[0])
                hits.append(float(cell == (group.column, group.row)))
                centre.append(float((group.column, group.row) == (1, 1)))
                any_group.append(1 / len(scenes[row.name].groups))
        caption = row.captions[0]
        explanation = explain(aligner, row.image, caption)
        maps.append((row.image, caption, explanation.heatmap))
        opened_image, number = open_image(row.image), round(SHARE * explanation.heatmap.size)

        def score(image: Any, text: str = caption) -> float:
            return float(aligner.score_pairs([image], [text], index, index)[0])

        full_score = score(opened_image)
        falls.append(full_score - score(deleted(opened_image, top(explanation.heatmap, number))))
        drawn = [top(rng.random(explanation.heatmap.shape), number) for _ in range(DRAWS)]
        random_falls.append(full_score - float(np.mean([score(deleted(opened_image, mask)) for mask in drawn])))
    torch.manual_seed(0)
    with torch.no_grad():
        for module in aligner.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    alike = []
    for image, caption, grid in maps[:30]:
        other = explain(aligner, image, caption).heatmap
        if grid.std() > 0 and other.std() > 0:
            alike.append(float(spearmanr(grid.ravel(), other.ravel()).statistic))
    result: dict[str, Any] = {"run": run, "method": explanation.method, "pictures": len(rows)}
    if hits:
        result["pointing game"] = {
            "hits": interval(hits), "chance": round(1 / 9, 4), "always the centre": interval(centre),
            "any group of the scene": interval(any_group), "captions": len(hits),
        }  # fmt: skip
    gaps = [fall - other for fall, other in zip(falls, random_falls, strict=True)]
    result["deletion"] = {
        "fall": interval(falls),
        "at random": interval(random_falls),
        "more than at random": interval(gaps),
    }
    result["rank correlation with drawn weights"] = interval(alike) if len(alike) > 1 else None
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=100, help="of the dev split (default 100)")
    over_runs(parser, lambda run, source, given: checks(run, source, given.pictures))


if __name__ == "__main__":
    from clipvisionalign.progress import progress_step

    with progress_step("benchmarks/explain.py", in_terminal=False):
        main()
