"""The command explain."""

from __future__ import annotations

import argparse
import json

from clipvisionalign.cli.parser import _parser


def explain_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "explain",
        description="Which parts of a picture carry which word of a caption: the late interaction's matches, the\n"
        "fusion's attention; a gradient map of the whole caption for one vector a side and for a fusion. A map says\n"
        "what the model used, not what is there.",
    )
    parser.add_argument("run", help="run folder that 'train' wrote")
    parser.add_argument("image", help="the picture")
    parser.add_argument("caption", help="the caption")
    parser.add_argument("--out", default="explanation.png", help="PNG to write (default explanation.png)")
    parser.add_argument("--json", action="store_true", help="print the maps as JSON")
    return parser


def explain(arguments: list[str]) -> int:
    """Write a sheet of maps: which patches carry which word."""
    given = explain_parser().parse_args(arguments)
    if not given.caption.strip():
        raise ValueError("a caption needs words")
    from clipvisionalign.data.of_run import unfinished_note
    from clipvisionalign.explain.contact_sheet import sheet_of_explanation
    from clipvisionalign.explain.heatmaps import explain as explain_pair
    from clipvisionalign.images import open_picture
    from clipvisionalign.models.io import load_aligner

    # What is no image is refused before a model is loaded.
    open_picture(given.image)
    unfinished = unfinished_note(given.run)
    found = explain_pair(load_aligner(given.run), given.image, given.caption)
    sheet_of_explanation(given.image, found).save(given.out, "PNG")
    if given.json:
        words = [{"word": word, "map": grid.round(4).tolist()} for word, grid in found.words]
        told = {"caption": found.caption, "score": found.score, "method": found.method, "words": words}
        told |= {"not_counted": found.not_counted, **({"unfinished": unfinished} if unfinished else {})}
        print(json.dumps(told | {"map": found.whole.round(4).tolist(), "sheet": given.out}, indent=2))
    else:
        print(f"{given.out}: score {found.score:.3f}, by {found.method}")
        if found.not_counted:
            print(f"no part in the score, as cut off or beyond keep_tokens: {', '.join(found.not_counted)}")
        if unfinished:
            print(unfinished)
    return 0
