"""Patches beside an index: bytes, what eight bits and pooling lose, and the time of re-ranking with and without them.

    python benchmarks/patches.py --run RUN --data DATA [--split dev] [--images 300] [--json]

RUN has the design late or cross. For `late` every caption is scored with every image of the split, as `evaluate` does,
with patches as the model makes them and as an index would keep them: rsum, and the paired difference by a bootstrap
over images. The time is of a search by words whose first 32 hits are re-ranked, over an index of the first images,
without patches and with them in one run, beside the text tower's own time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

POOLS = (1, 2, 3, 4, 7)
RERANKED, SEARCHES, RESAMPLES = 32, 30, 2000
QUERIES = ("a dog runs on the grass", "two children in a red boat", "a man on a street at night")


def losses(aligner: Any, data: Any) -> list[dict[str, Any]]:
    """Rsum by patches as they are, and the difference of each way of keeping them."""
    import torch

    from clipvisionalign.models.heads import ImageEmbeddings
    from clipvisionalign.models.pair_scorer import PairScorer
    from clipvisionalign.retrieval.ranks import ranks_of_scores
    from clipvisionalign.search.patch_vectors import encode_stored, packed_patches, patch_settings
    from clipvisionalign.search.patches import unpack_patches
    from clipvisionalign.study.statistics import image_contributions
    from clipvisionalign.training.halves import positives_of

    chunks = list(aligner.image_chunks([row.image for row in data.rows]))
    embeddings = ImageEmbeddings(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
    captions = aligner.encode_captions_for_pairs(data.captions)
    positives = positives_of(data)

    def contributions(images: Any) -> np.ndarray:
        scores = PairScorer(aligner, images, captions).score_matrix().numpy()
        return image_contributions(ranks_of_scores(scores, positives), positives.caption_image, "rsum")

    whole = contributions(aligner.project_images_for_pairs(embeddings))
    random = np.random.default_rng(0)
    drawn = random.integers(len(whole), size=(RESAMPLES, len(whole)))
    found = [{"patches": "float32", "rsum": round(float(whole.mean()), 2)}]
    for pool in POOLS:
        settings = patch_settings(aligner, pool)
        packed = packed_patches(aligner, embeddings, settings)
        patches = [unpack_patches(each, settings.width) for each in packed]
        difference = contributions(encode_stored(aligner, embeddings.vectors.numpy(), patches, settings)) - whole
        low, high = np.percentile(difference[drawn].mean(axis=1), [2.5, 97.5])
        figures = {"rsum": (whole + difference).mean(), "difference": difference.mean(), "low": low, "high": high}
        found.append(
            {"patches": f"8 bits, {pool} as one", "bytes": len(packed[0])}
            | {name: round(float(value), 2) for name, value in figures.items()}
        )
    return found


def milliseconds(run: str, images: list[Path], work: Path) -> dict[str, float]:
    """Median milliseconds of a search: its text tower alone, and re-ranked with and without patches, in turn."""
    from clipvisionalign.search.indexer import build_index
    from clipvisionalign.search.queries import SearchQuery
    from clipvisionalign.search.searcher import Searcher
    from clipvisionalign.search.terms import parse_term

    folder = work / "images"
    folder.mkdir()
    for path in images:
        shutil.copy(path, folder)
    searchers = {}
    for name, patches in (("from the images", None), ("from patches", 0), ("from patches, 3 as one", 3)):
        build_index(run, folder, work / name, patches=patches)
        searchers[name] = Searcher(work / name)
    encoder = searchers["from patches"].encoder
    ways: dict[str, Any] = {"text tower": lambda words: encoder.encode_words([words])}
    for name, searcher in searchers.items():
        for rerank in (0, RERANKED):
            ways[f"{name}, first {rerank} re-ranked"] = lambda words, s=searcher, r=rerank: s.search_one(
                SearchQuery([parse_term(words)], 40, rerank=r)
            )
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(SEARCHES + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way(QUERIES[number % len(QUERIES)])
            if number >= 2:
                taken[name].append(1000 * (time.perf_counter() - started))
    return {name: round(statistics.median(times), 2) for name, times in taken.items()}


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder of the design late or cross")
    parser.add_argument("--data", required=True, help="data set")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--images", type=int, default=300, help="images of the index that is searched")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from clipvisionalign import load_aligner, read_captioned_images

    aligner, data = load_aligner(args.run), read_captioned_images(args.data).split(args.split)
    report: dict[str, Any] = {"design": aligner.config.design, "images": len(data.rows)}
    if aligner.fusion is None:
        report["losses"] = losses(aligner, data)
    with tempfile.TemporaryDirectory() as folder:
        images = [Path(row.image) for row in data.rows[: args.images]]
        report["milliseconds"] = milliseconds(args.run, images, Path(folder))
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for row in report.get("losses", []):
        difference = "{difference:+.2f} [{low:+.2f}, {high:+.2f}]".format(**row) if "low" in row else ""
        print(f"{row['patches']:>18}  {row.get('bytes', ''):>7} bytes  rsum {row['rsum']:7.2f}  {difference}")
    for name, value in report["milliseconds"].items():
        print(f"{value:8.2f} ms  {name}")


if __name__ == "__main__":
    main()
