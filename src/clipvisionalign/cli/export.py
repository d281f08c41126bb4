"""The command export."""

from __future__ import annotations

import argparse
from typing import Literal

from clipvisionalign.cli.parser import MODEL_HELP, add_offline_flag, command_parser


def export_parser() -> argparse.ArgumentParser:
    """The parser of `export`."""
    parser = command_parser(
        "export",
        description="Write a model for use elsewhere: as ONNX, checked against PyTorch, with tokenizer and\n"
        "preprocessing; as a folder for a hub, with its model card; if it started from a pretrained dual encoder,\n"
        "in the layout of the library that it came from; or as a run folder of a few megabytes.",
    )
    parser.add_argument("run", help=MODEL_HELP)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--onnx", metavar="DIR", help="folder to write ONNX files to (needs clipvisionalign[onnx])")
    how.add_argument("--huggingface", metavar="DIR", help="folder to write model, settings, tokenizer and card to")
    how.add_argument("--transformers", metavar="DIR", help="folder to write what transformers' own class opens")
    how.add_argument("--open-clip", metavar="DIR", help="folder to write what open_clip opens")
    how.add_argument(
        "--adapters", metavar="DIR",
        help="run folder to write with low-rank adapters in the place of the towers' weights, "
        "which are found by name when it is opened",
    )  # fmt: skip
    parser.add_argument(
        "--rank", type=int, help="with --adapters: highest rank of an adapter, in half precision (default 16)"
    )
    parser.add_argument(
        "--megabytes", type=float, metavar="MB",
        help="with --adapters, in the place of --rank: size of the weights, at most; adapters of 8 bits",
    )  # fmt: skip
    parser.add_argument(
        "--int8", action="store_true", help="with --onnx: also towers with 8-bit products, and what they lose on dev"
    )
    parser.add_argument("--data", default="", help="with --int8: the data set to measure on (default: the run's own)")
    parser.add_argument(
        "--push",
        default="",
        metavar="OWNER/NAME",
        help="also upload the folder to this repository of the hub",
    )
    parser.add_argument("--private", action="store_true", help="with --push: if it is created, for its owner alone")
    parser.add_argument("--overwrite", action="store_true", help="with --push: although the repository has files")
    add_offline_flag(parser)
    return parser


def export(arguments: list[str]) -> int:
    """Write a model as ONNX, as a folder for a hub, or in the layout of its library.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    args = export_parser().parse_args(arguments)
    if args.int8 and not args.onnx:
        raise ValueError("--int8 goes with --onnx")
    if args.rank is not None and not args.adapters:
        raise ValueError("--rank goes with --adapters")
    if args.megabytes is not None and not args.adapters:
        raise ValueError("--megabytes goes with --adapters")
    if args.megabytes is not None and args.rank is not None:
        raise ValueError("--rank or --megabytes: not both")
    if args.data and not args.int8:
        raise ValueError("--data goes with --int8: it is what the 8-bit towers are measured on")
    if (args.private or args.overwrite) and not args.push:
        raise ValueError(f"--{'private' if args.private else 'overwrite'} goes with --push OWNER/NAME")
    if not args.push:
        _write(args)
        return 0
    from clipvisionalign.models.hub.upload import check_upload, upload_folder

    check_upload(args.push, args.overwrite)
    folder = _write(args)
    print(f"{upload_folder(folder, args.push, args.private, args.overwrite)}: uploaded")
    return 0


def _write(args: argparse.Namespace) -> str:
    """Write the folder that is asked for, and tell where it is."""
    from clipvisionalign.export.huggingface import export_huggingface
    from clipvisionalign.export.library_layouts import export_library_layout
    from clipvisionalign.export.onnx import export_onnx

    if args.adapters:
        from clipvisionalign.export.adapters import export_adapters

        report = export_adapters(args.run, args.adapters, 16 if args.rank is None else args.rank, args.megabytes)
        print(
            f"{args.adapters}: {report['bytes'] / 1e6:.1f} MB; {100 * report['error']:.2g} % of a matrix's difference "
            f"is lost at most; captions' vectors have a cosine of {report['cosine']:.6f} or more with the run's"
        )
    elif args.onnx:
        manifest = export_onnx(args.run, args.onnx, args.int8, args.data)
        print(f"{args.onnx}: at most {manifest['difference']:.1e} from PyTorch's; README.md describes its use")
        if loss := manifest.get("int8", {}).get("rsum_change"):
            known = loss["low"] is not None and loss["high"] is not None
            interval_text = "[{low:+.1f}, {high:+.1f}]" if known else "(no interval: too few images)"
            print(f"8-bit towers: dev rsum {{value:+.1f}} {interval_text}".format(**loss))
    elif args.transformers or args.open_clip:
        layout: Literal["transformers", "open_clip"] = "transformers" if args.transformers else "open_clip"
        folder = export_library_layout(args.run, args.transformers or args.open_clip, layout)
        print(f"{folder}: config, weights, tokenizer, preprocessing, as {layout} reads them")
    else:
        print(f"{export_huggingface(args.run, args.huggingface)}: model, settings, tokenizer, README.md")
    return str(args.adapters or args.onnx or args.transformers or args.open_clip or args.huggingface)
