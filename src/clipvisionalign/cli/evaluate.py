"""Commands that measure a run: evaluate, classify, encode, audit."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from clipvisionalign.cli.output import (
    print_audit,
    print_classification,
    print_metrics,
    print_pretraining,
    print_trained_on,
)
from clipvisionalign.cli.parser import MODEL_HELP, PROGRAM, add_offline_flag, command_parser

if TYPE_CHECKING:
    from clipvisionalign.training.opened_run import OpenedRun


def evaluate_parser() -> argparse.ArgumentParser:
    """The parser of `evaluate`."""
    parser = _evaluation_parser(
        "evaluate",
        "Measure a run or a pretrained model on the whole gallery of a split, both ways, with 95% intervals.",
    )
    parser.add_argument(
        "--candidates", type=int, help="number of candidates to re-rank (default: the run's own; 0: none)"
    )
    parser.add_argument(
        "--vectors", nargs="+", metavar="FILE",
        help="instead of a run: vectors of any program, IMAGES CAPTIONS as .npy or .parquet, or one .parquet of both",
    )  # fmt: skip
    parser.add_argument(
        "--partners", default="", metavar="FILE",
        help="with --vectors: the number of each caption's image, from 0 (.json, .csv or .npy)",
    )  # fmt: skip
    parser.add_argument(
        "--distractors", default="", metavar="FILE", help="with --vectors: more images in the gallery, without captions"
    )
    return parser


def evaluate(arguments: list[str]) -> int:
    """Measure a run, or vectors of any program, on a whole gallery.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    args = evaluate_parser().parse_args(arguments)
    if args.vectors:
        return _evaluate_vectors(args)
    if args.run is None or args.partners or args.distractors:
        raise ValueError("give a run, or --vectors IMAGES CAPTIONS --partners FILE (--distractors FILE)")
    results = _open_run(args).evaluate(args.candidates)
    if args.json:
        print(json.dumps(results, indent=2))
        return 0
    print_metrics(results)
    _print_notes(results)
    return 0


def _print_notes(results: dict[str, Any]) -> None:
    """What figures have to be read with."""
    for name in ("in_sample", "trained_on", "unfinished"):
        if name in results:
            print(results[name])
    print_trained_on(results)
    print_pretraining(results)


def _evaluate_vectors(args: argparse.Namespace) -> int:
    """Figures and audit of vectors that lie in files."""
    if args.run or args.data or args.candidates:
        raise ValueError("--vectors takes the place of a run and its data: leave run, --data and --candidates out")
    if args.captions:
        raise ValueError("--captions is of a run's data: vectors are of texts that are joined already, or are not")
    from clipvisionalign.retrieval.vector_files import read_gallery
    from clipvisionalign.retrieval.vectors import audit_vectors, evaluate_vectors

    gallery = read_gallery(args.vectors, args.partners, args.distractors)
    evaluation = evaluate_vectors(gallery, args.identity or "auto")
    checks = audit_vectors(gallery)
    header = {"run": " ".join(args.vectors), "data": args.partners or "their own partners", "split": "vectors"}
    results = {**header, "vectors": args.vectors, **evaluation.to_dict(), "audit": checks.to_dict()}
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print_metrics(results)
        print_audit({**header, **checks.to_dict()})
        print("whether a model saw what it must not see can be tested with the model only; this tests its vectors")
    return 0 if checks.passed else 1


def classify_parser() -> argparse.ArgumentParser:
    """The parser of `classify`."""
    parser = command_parser(
        "classify",
        description="Measure zero-shot classification: each image of class folders (SPLIT/CLASS/*.jpg or CLASS/*.jpg) "
        "is assigned\nto the class whose captions fit it best. Top-1 and top-5 accuracy, mean accuracy per class, "
        "95% intervals.",
        epilog="a class's captions are made of templates; a file of them has one in each line, such as:\n"
        "  a photo of a {}.\n  a drawing of a {}.\n\n"
        f"example:\n  {PROGRAM} scenes shapes --classes shape\n  {PROGRAM} classify runs/self shapes --split test",
    )
    parser.add_argument("run", help=f"{MODEL_HELP}; or the folder of 'export --onnx'")
    parser.add_argument("data", help="folder of the classes, or of the splits with their classes")
    parser.add_argument(
        "--split", default="",
        help="train, dev (val) or test, or all (default: test; without folders of splits all, or test if the run was "
        "trained on them)",
    )  # fmt: skip
    parser.add_argument(
        "--templates", default="own",
        help="own: the model's (CLIP's 'a photo of a {}.', SigLIP's 'this is a photo of {}.'); openai or simple: the "
        "sets of 80 and 7 of open_clip; or a file (default own)",
    )  # fmt: skip
    parser.add_argument(
        "--names", default="", metavar="FILE",
        help="names of the classes, a line each: a folder and its name, or in the order of the folders; or openai: the "
        "names of ImageNet's 1,000 classes in open_clip (default: classes.txt, LOC_synset_mapping.txt or "
        "imagenet_class_index.json in the data set's folder, else the folders' names)",
    )  # fmt: skip
    parser.add_argument(
        "--by", default="auto", choices=("auto", "vectors", "score"),
        help="vectors: a class's vector is the mean of its captions'; score: its score is the mean of theirs, for "
        "designs that score pairs (default auto: as the model ranks a gallery)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--out", default="", metavar="DIR", help="also write classification.json and predictions.csv")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files of --out")
    add_offline_flag(parser)
    return parser


def classify(arguments: list[str]) -> int:
    """Measure zero-shot classification of class folders.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    args = classify_parser().parse_args(arguments)
    from clipvisionalign.training.opened_classes import check_output_folder, open_classes, write_classification

    if args.out:
        check_output_folder(args.out, args.overwrite)
    elif args.overwrite:
        raise ValueError("--overwrite is for the files of --out DIR, which is not given")
    opened = open_classes(args.run, args.data, args.split, args.templates, args.names, args.device)
    classification = opened.classify(args.by)
    results = opened.results(classification)
    if args.out:
        write_classification(args.out, opened, classification)
    if args.json:
        print(json.dumps(results, indent=2))
        return 0
    print_classification(results)
    _print_notes(results)
    return 0


def encode_parser() -> argparse.ArgumentParser:
    """The parser of `encode`."""
    parser = _evaluation_parser(
        "encode",
        "Write the vectors of a data set's images and captions, for any program: as .parquet, or as .npy files with\n"
        "their partners. 'evaluate --vectors' measures such files.",
    )
    parser.add_argument("data_set", nargs="?", metavar="DATA", help="the same as --data")
    parser.add_argument("--out", required=True, help="NAME.parquet, or NAME.npy for NAME-images.npy and so on")
    parser.add_argument(
        "--distractors", default="", metavar="FOLDER", help="folder of images without captions, added to the gallery"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


def encode(arguments: list[str]) -> int:
    """Write the vectors of a data set's images and captions.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    args = encode_parser().parse_args(arguments)
    from clipvisionalign.retrieval.vector_files import vector_output_files, write_vectors
    from clipvisionalign.training.opened_run import read_distractors

    if args.data_set and args.data:
        raise ValueError(f"two data sets: {args.data_set} and --data {args.data}")
    args.data = args.data_set or args.data
    vector_output_files(args.out, args.overwrite)
    distractors = read_distractors(args.distractors) if args.distractors else []
    opened = _open_run(args)
    eval_data = opened.gallery()
    if not len(eval_data):
        raise ValueError(f"{opened.source}: no image of the split '{args.split}' is left to be encoded")
    images = opened.aligner.encode_images([*eval_data.images, *distractors]).numpy()
    captions = opened.aligner.encode_captions(eval_data.captions).numpy()
    files = write_vectors(args.out, eval_data, images, captions, [str(path) for path in distractors], args.overwrite)
    counts = {"images": len(eval_data), "distractors": len(distractors), "captions": len(eval_data.captions)}
    if args.json:
        summary = {**opened.header(), "files": list(map(str, files)), **counts, **opened.differences_entry()}
        print(json.dumps(summary, indent=2))
        return 0
    print(f"{', '.join(map(str, files))}: " + ", ".join(f"{count:,} {noun}" for noun, count in counts.items()))
    given_as = files[0] if len(files) == 1 else f"{files[0]} {files[1]} --partners {files[2]}"
    print(f"next: {PROGRAM} evaluate --vectors {given_as}")
    return 0


def audit_parser() -> argparse.ArgumentParser:
    """The parser of `audit`."""
    parser = _evaluation_parser(
        "audit",
        "Check that the figures of a run or a pretrained model are sound: that the model uses nothing but an\n"
        "image and a caption, and that no image is in two splits.",
    )
    parser.add_argument("--sample", type=int, default=48, help="images in the checks (default 48)")
    return parser


def audit(arguments: list[str]) -> int:
    """Check that the figures of a run are sound.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status: 1 if a check fails, else 0.
    """
    args = audit_parser().parse_args(arguments)
    results = _open_run(args).audit(args.sample)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print_audit(results)
        print_trained_on(results)
        print_pretraining(results)
        if "unfinished" in results:
            print(results["unfinished"])
    return 0 if results["passed"] else 1


def _evaluation_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = command_parser(name, description=description)
    parser.add_argument("run", nargs="?" if name == "evaluate" else None, help=MODEL_HELP)
    parser.add_argument(
        "--data", help="data set (default: the one that the run was trained on; a pretrained model needs one)"
    )
    parser.add_argument(
        "--layout",
        default="auto",
        help="dataset layout (default: the run's, else recognised)",
    )
    parser.add_argument("--split", default="dev", help="train, dev or test (default dev)")
    parser.add_argument("--identity", help="auto, caption or none, as in 'train' (default: as the run was trained)")
    parser.add_argument(
        "--captions", help="each, or joined: long texts of several captions of an image, as in 'train'\n"
        "(default: as the run was trained)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_offline_flag(parser)
    return parser


def _open_run(args: argparse.Namespace) -> OpenedRun:
    from clipvisionalign.training.opened_run import open_run

    candidates = getattr(args, "candidates", None)
    return open_run(
        args.run, args.data or "", args.layout, args.identity, args.split, args.device, candidates, args.captions
    )
