"""Images for the report: found by all, found by none, where the variants disagree, and what attends to what."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from clipvisionalign.data.captioned import CaptionedImages, hash_text
from clipvisionalign.explain.heatmaps import explain, overlay
from clipvisionalign.images import open_image
from clipvisionalign.models.io import load_aligner
from clipvisionalign.study.aggregate import TrialResult
from clipvisionalign.study.config import Trial
from clipvisionalign.study.documents import ExampleDocument, ExamplesDocument
from clipvisionalign.study.report.example_groups import EXAMPLE_GROUPS

#: Pixels of an image's longer side, and words that an example is explained by.
EXAMPLE_SIZE, EXPLAINED_WORDS = 200, 3
#: Words that carry nothing that could be seen.
STOP_WORDS = set("a an and are at be by from in into is it its of on or that the their there this to with".split())  # noqa: SIM905


def build_examples(
    trials: Sequence[Trial], trial_results: Sequence[TrialResult], eval_data: CaptionedImages, count: int
) -> ExamplesDocument:
    """The examples of report.json: captions with their image's rank in every variant, and maps.

    Of the first seed that all variants have; where there is none, of each variant's first ("seeds").

    Args:
        trials: All trials of the study.
        trial_results: Those that have results.
        eval_data: The split that is measured.
        count: Number of captions in a group.

    Returns:
        The block of the report.
    """
    names = dict.fromkeys(trial.variant for trial in trials)
    shared = [
        seed
        for seed in dict.fromkeys(trial.seed for trial in trials)
        if all(any((trial.variant, trial.seed) == (name, seed) for trial in trials) for name in names)
    ]
    first_by_variant: dict[str, tuple[Trial, TrialResult]] = {}
    for trial, result in zip(trials, trial_results, strict=True):
        if not shared or trial.seed == shared[0]:
            first_by_variant.setdefault(trial.variant, (trial, result))
    ranks = {name: result.ranks["ranks"].text_to_image[:, 0] for name, (_, result) in first_by_variant.items()}
    selected = choose_examples(
        np.stack(list(ranks.values())), eval_data.caption_image, count, _content_order(eval_data)
    )
    captions, caption_image = eval_data.captions, eval_data.caption_image
    groups: dict[str, list[ExampleDocument]] = {
        kind: [
            {
                "image": eval_data.rows[caption_image[caption_index]].name,
                "caption": captions[caption_index],
                "ranks": {name: int(variant_ranks[caption_index]) for name, variant_ranks in ranks.items()},
                "picture": jpeg_data_uri(eval_data.images[caption_image[caption_index]]),
            }
            for caption_index in caption_indices
        ]
        for kind, caption_indices in selected.items()
    }
    # One that all found, and one that they disagree on: a second one of the same image would show little more.
    map_indices = [
        caption_index for kind in ("found by all", "where they disagree") for caption_index in selected[kind][:1]
    ]
    seeds = {name: trial.seed for name, (trial, _) in first_by_variant.items()}
    return {
        "groups": groups,
        "seeds": seeds,
        "maps": [_explain_example(first_by_variant, eval_data, caption_index) for caption_index in map_indices],
    }


def choose_examples(
    ranks: np.ndarray, caption_image: np.ndarray, count: int, order: np.ndarray | None = None
) -> dict[str, list[int]]:
    """Captions to show, of different images, by the groups of `EXAMPLE_GROUPS`, the clearest first.

    Args:
        ranks: (variants, M) rank of each caption's image.
        caption_image: (M,) number of each caption's image.
        count: Number of captions in a group.
        order: (M,) which of equal ones comes first; as they stand by default.

    Returns:
        Numbers of captions, by group.
    """
    order = np.arange(len(caption_image)) if order is None else order
    low, high = ranks.min(axis=0), ranks.max(axis=0)
    selected: dict[str, list[int]] = {}
    for kind, (_, fits) in EXAMPLE_GROUPS.items():
        # Not found by any: the nearest rank as far away as there is. Else the variants as far apart as there is.
        key = -low if kind == "found by none" else -high
        indices = [index for index in np.lexsort((order, key)).tolist() if fits(int(low[index]), int(high[index]))]
        used_images: set[int] = set()
        selected[kind] = []
        for index in indices:
            if len(selected[kind]) < count and int(caption_image[index]) not in used_images:
                used_images.add(int(caption_image[index]))
                selected[kind].append(index)
    return selected


def _content_order(eval_data: CaptionedImages) -> np.ndarray:
    """An order of captions that does not depend on the order of a file (M,)."""
    names = [eval_data.rows[owner].name for owner in eval_data.caption_image]
    return np.argsort(
        np.argsort([hash_text(f"{name}\0{text}") for name, text in zip(names, eval_data.captions, strict=True)])
    )


def _explain_example(
    first_by_variant: dict[str, tuple[Trial, TrialResult]], eval_data: CaptionedImages, caption_index: int
) -> dict[str, Any]:
    """One example's maps in every variant: of the caption, and of the words that stand out most."""
    image, caption = eval_data.images[eval_data.caption_image[caption_index]], eval_data.captions[caption_index]
    example_maps: dict[str, Any] = {
        "caption": caption,
        "image": eval_data.rows[eval_data.caption_image[caption_index]].name,
        "variants": {},
    }
    for name, (trial, _) in first_by_variant.items():
        try:
            explanation = explain(load_aligner(trial.folder), image, caption)
        except ValueError:
            continue  # patches that are on no square have no map
        content_words = [
            word for word in explanation.word_heatmaps if word[0].lower() not in STOP_WORDS and word[0].isalnum()
        ]
        top_words = sorted(content_words, key=lambda word: -float(word[1].std()))[:EXPLAINED_WORDS]
        example_maps["variants"][name] = {
            "method": explanation.method,
            "maps": [{"of": "the caption", "picture": _encode_jpeg(overlay(image, explanation.heatmap, EXAMPLE_SIZE))}]
            + [{"of": word, "picture": _encode_jpeg(overlay(image, grid, EXAMPLE_SIZE))} for word, grid in top_words],
        }
    return example_maps


def jpeg_data_uri(image: Any) -> str:
    """A small copy of an image, as a data URI.

    Args:
        image: A Pillow image.

    Returns:
        The URI.
    """
    pil_image = open_image(image).copy()
    pil_image.thumbnail((EXAMPLE_SIZE, EXAMPLE_SIZE))
    return _encode_jpeg(np.asarray(pil_image))


def _encode_jpeg(pixels: np.ndarray) -> str:
    out = BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()
