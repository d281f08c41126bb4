"""The command explain."""

from __future__ import annotations

import argparse
import json

from clipvisionalign.cli.parser import MODEL_HELP, add_offline_flag, command_parser


def explain_parser() -> argparse.ArgumentParser:
    """The parser of `explain`."""
    parser = command_parser(
        "explain",
        description="Draw which parts of an image support which word of a caption: the late interaction's matches,\n"
        "the fusion's attention; a gradient map of the whole caption for designs with one vector per side and for\n"
        "a fusion. A map shows what the model used, not what is in the image.",
    )
    parser.add_argument("run", help=MODEL_HELP)
    parser.add_argument("image", help="the image")
    parser.add_argument("caption", help="the caption")
    parser.add_argument("--out", default="explanation.png", help="PNG to write (default explanation.png)")
    parser.add_argument("--json", action="store_true", help="print the maps as JSON")
    add_offline_flag(parser)
    return parser


def explain(arguments: list[str]) -> int:
    """Write a sheet of maps: which patches carry which word.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    args = explain_parser().parse_args(arguments)
    if not args.caption.strip():
        raise ValueError("a caption needs words")
    from clipvisionalign.data.run_data import unfinished_note
    from clipvisionalign.explain.contact_sheet import explanation_sheet
    from clipvisionalign.explain.heatmaps import explain as explain_pair
    from clipvisionalign.images import open_image
    from clipvisionalign.models.io import load_aligner

    # What is no image is refused before a model is loaded.
    open_image(args.image)
    unfinished = unfinished_note(args.run)
    explanation = explain_pair(load_aligner(args.run), args.image, args.caption)
    explanation_sheet(args.image, explanation).save(args.out, "PNG")
    if args.json:
        word_maps = [{"word": word, "map": grid.round(4).tolist()} for word, grid in explanation.word_heatmaps]
        payload = {
            "caption": explanation.caption,
            "score": explanation.score,
            "method": explanation.method,
            "words": word_maps,
        }
        payload |= {"not_counted": explanation.ignored_words, **({"unfinished": unfinished} if unfinished else {})}
        print(json.dumps(payload | {"map": explanation.heatmap.round(4).tolist(), "sheet": args.out}, indent=2))
    else:
        print(f"{args.out}: score {explanation.score:.3f}, by {explanation.method}")
        if explanation.ignored_words:
            print(f"no part in the score, as cut off or beyond keep_tokens: {', '.join(explanation.ignored_words)}")
        if unfinished:
            print(unfinished)
    return 0
