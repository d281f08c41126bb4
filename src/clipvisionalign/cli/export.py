"""The command export."""

from __future__ import annotations

import argparse

from clipvisionalign.cli.parser import command_parser


def export_parser() -> argparse.ArgumentParser:
    """The parser of `export`."""
    parser = command_parser(
        "export",
        description="Write a run for use elsewhere: as ONNX, checked against PyTorch, with tokenizer and\n"
        "preprocessing; or as a folder for a hub, with its model card.",
    )
    parser.add_argument("run", help="run folder that 'train' wrote")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--onnx", metavar="DIR", help="folder to write ONNX files to (needs clipvisionalign[onnx])")
    how.add_argument("--huggingface", metavar="DIR", help="folder to write model, settings, tokenizer and card to")
    parser.add_argument(
        "--int8", action="store_true", help="with --onnx: also towers with 8-bit products, and what they lose on dev"
    )
    parser.add_argument("--data", default="", help="with --int8: the data set to measure on (default: the run's own)")
    return parser


def export(arguments: list[str]) -> int:
    """Write a run as ONNX, or as a folder for a hub."""
    args = export_parser().parse_args(arguments)
    if args.int8 and not args.onnx:
        raise ValueError("--int8 goes with --onnx")
    if args.data and not args.int8:
        raise ValueError("--data goes with --int8: it is what the 8-bit towers are measured on")
    from clipvisionalign.export.huggingface import export_huggingface
    from clipvisionalign.export.onnx import export_onnx

    if args.onnx:
        manifest = export_onnx(args.run, args.onnx, args.int8, args.data)
        print(f"{args.onnx}: at most {manifest['difference']:.1e} from PyTorch's; README.md describes its use")
        if loss := manifest.get("int8", {}).get("rsum_change"):
            known = loss["low"] is not None and loss["high"] is not None
            interval_text = "[{low:+.1f}, {high:+.1f}]" if known else "(no interval: too few images)"
            print(f"8-bit towers: dev rsum {{value:+.1f}} {interval_text}".format(**loss))
    else:
        print(f"{export_huggingface(args.run, args.huggingface)}: model, settings, tokenizer, README.md")
    return 0
