"""Re-ranking within a time: recall and milliseconds of queries, beside vectors alone and fixed depths.

    python benchmarks/within.py RUN --data DATA [--split dev] [--times 20ms,50ms,100ms] [--captions 1000] [--json]

RUN re-ranks (designs late and cross) and was not trained on the split. Its images are divided at random. The margin is
calibrated on one half; the images of the other half are indexed with their patches, and searched by their captions, one
after the other in this process, as the service does. The ways take turns at each caption, so that what else the machine
does meets all of them alike. Told of each way: recall at 1, 5 and 10 of captions to images, and their sum with its
difference to the deepest fixed re-ranking (95 % interval, bootstrap over images); milliseconds a query, mean, p50 and
p99; how many hits were re-ranked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.formats import read_captioned_images
from clipvisionalign.model_calibration import rerank_margin
from clipvisionalign.models.io import load_aligner
from clipvisionalign.search.calibrate import calibrate_captions
from clipvisionalign.search.calibration_files import write_calibration
from clipvisionalign.search.indexer import build_index
from clipvisionalign.search.manifest import aligner_fingerprint
from clipvisionalign.search.queries import SearchQuery
from clipvisionalign.search.searcher import Searcher
from clipvisionalign.search.storage import Storage
from clipvisionalign.search.terms import Term
from clipvisionalign.search.time_limit import parse_seconds
from clipvisionalign.study.frontier import recall_difference, recall_sum

#: Fixed depths; 0 is vectors alone.
DEPTHS = (0, 8, 32)
RANKS = (1, 5, 10)
#: The rank of an own image that is not among the first hits.
MISSING = 10


def halves(data: CaptionedImages, seed: int) -> tuple[CaptionedImages, CaptionedImages]:
    """The data set in two random halves."""
    order = np.random.default_rng(seed).permutation(len(data))
    return tuple(  # type: ignore[return-value]
        replace(data, rows=[data.rows[each] for each in sorted(part)])
        for part in (order[: len(data) // 2], order[len(data) // 2 :])
    )


def calibrated_index(run: str, first: CaptionedImages, second: CaptionedImages, folder: Path) -> tuple[Path, Any]:
    """An index of the second half with patches, calibrated on the first one, and the margin."""
    aligner = load_aligner(run)
    scorer = aligner.pair_scorer(first.images, first.captions)
    images, captions = scorer.image_vectors.numpy(), scorer.caption_vectors.numpy()
    owners = np.asarray(first.caption_image)
    margin = rerank_margin(scorer, images, captions, owners)
    source = folder / "images"
    source.mkdir()
    for number, image in enumerate(second.images):
        shutil.copy(image, source / f"{number:06d}{Path(image).suffix}")
    build_index(run, str(source), folder / "index", patches=0)
    calibration = calibrate_captions(images, captions, owners, aligner_fingerprint(run))
    write_calibration(Storage(folder / "index"), replace(calibration, rerank=margin))
    return folder / "index", margin


def search_all(
    index: Path, captions: Sequence[str], owners: Sequence[int], ways: dict[str, SearchQuery]
) -> dict[str, Any]:
    """By way: (M,) ranks of the own images, 10 where they are not among the first ten; milliseconds; hits re-ranked."""
    searcher = Searcher(index)
    results: dict[str, Any] = {name: {"rank": [], "ms": [], "images": []} for name in ways}
    rng = np.random.default_rng(0)
    # Not measured: what is loaded once.
    for query in [*ways.values()] * 2:
        searcher.search_one(replace(query, terms=[Term(captions[0])]))
    for caption, owner in zip(captions, owners, strict=True):
        for name in rng.permutation(list(ways)):
            query = replace(ways[str(name)], terms=[Term(caption)])
            start = time.perf_counter()
            hits = searcher.search_one(query)
            milliseconds = 1000 * (time.perf_counter() - start)
            row = results[str(name)]
            numbers = [int(Path(hit.path).stem) for hit in hits]
            row["rank"].append(numbers.index(owner) if owner in numbers else MISSING)
            row["ms"].append(milliseconds)
            row["images"].append(query.rerank if hits.spent is None else hits.spent.reranked)
    return {name: {key: np.array(values) for key, values in row.items()} for name, row in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--times", default="20ms,50ms,100ms", help="times of a query, with commas between them")
    parser.add_argument("--captions", type=int, default=1000, help="captions that are searched for, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    first, second = halves(read_captioned_images(args.data).split(args.split), args.seed)
    rng = np.random.default_rng(args.seed)
    drawn = np.sort(rng.permutation(len(second.captions))[: args.captions])
    captions, owners = [second.captions[each] for each in drawn], np.asarray(second.caption_image)[drawn]
    ways = {f"first {depth}" if depth else "vectors": SearchQuery([Term("a")], rerank=depth) for depth in DEPTHS}
    ways |= {f"within {text}": SearchQuery([Term("a")], within=parse_seconds(text)) for text in args.times.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        index, margin = calibrated_index(args.run, first, second, Path(folder))
        results = search_all(index, captions, owners.tolist(), ways)
    reference = results[f"first {max(DEPTHS)}"]
    rows = {}
    for name, row in results.items():
        rows[name] = {
            **{f"recall_at_{k}": 100.0 * float((row["rank"] < k).mean()) for k in RANKS},
            "recall_sum": recall_sum(row["rank"], MISSING),
            "against_deepest": recall_difference(row["rank"], reference["rank"], MISSING, owners),
            "ms": {"mean": float(row["ms"].mean()), "p50": float(np.median(row["ms"])),
                   "p99": float(np.quantile(row["ms"], 0.99))},
            "of_deepest_ms": float(row["ms"].mean() / reference["ms"].mean()),
            "images": float(row["images"].mean()), "queries": float((row["images"] > 0).mean()),
        }  # fmt: skip
    about = {"run": args.run, "gallery": len(second), "captions": len(captions), "calibrated_on": len(first)}
    if args.json:
        print(json.dumps(about | {"margin": margin.to_dict(), "ways": rows}, indent=2))
        return
    print(
        f"{args.run}: gallery of {len(second)}, {len(captions)} captions; margin {margin.margin:.4f}, by {len(first)}"
    )
    print(f"{'':14}{'R@1':>6}{'R@5':>7}{'R@10':>7}{'sum':>8}{'against the deepest':>25}{'ms':>8}{'p50':>7}{'p99':>7}"
          f"{'share':>7}{'images':>8}{'queries':>9}")  # fmt: skip
    for name, row in rows.items():
        gain, ms = row["against_deepest"], row["ms"]
        interval = f"{gain['value']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]"
        print(f"{name:14}{row['recall_at_1']:6.1f}{row['recall_at_5']:7.1f}{row['recall_at_10']:7.1f}"
              f"{row['recall_sum']:8.1f}{interval:>25}{ms['mean']:8.1f}{ms['p50']:7.1f}{ms['p99']:7.1f}"
              f"{row['of_deepest_ms']:7.2f}{row['images']:8.1f}{100 * row['queries']:8.0f}%")  # fmt: skip


if __name__ == "__main__":
    main()
