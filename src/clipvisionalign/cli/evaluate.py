"""Commands that measure a run: evaluate, encode, audit."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign.cli.output import print_audit, print_metrics, print_trained_on
from clipvisionalign.cli.parser import OFFLINE, OFFLINE_HELP, PROGRAM, command_parser
from clipvisionalign.counts import count_noun

if TYPE_CHECKING:
    from clipvisionalign.data.captioned import CaptionedImages
    from clipvisionalign.retrieval.evaluate import Evaluation


logger = logging.getLogger(__name__)


def evaluate_parser() -> argparse.ArgumentParser:
    parser = _evaluation_parser(
        "evaluate", "Measure a run on the whole gallery of a split, both ways, with 95% intervals (bootstrap)."
    )
    parser.add_argument(
        "--candidates", type=int, help="re-rank so many first candidates (default: the run's own; 0: none)"
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
    """Measure a run, or vectors of any program, on a whole gallery."""
    args = evaluate_parser().parse_args(arguments)
    if args.vectors:
        return _evaluate_vectors(args)
    if args.run is None or args.partners or args.distractors:
        raise ValueError("give a run, or --vectors IMAGES CAPTIONS --partners FILE (--distractors FILE)")
    from clipvisionalign.data.run_data import unfinished_note
    from clipvisionalign.retrieval.evaluate import evaluate as measure
    from clipvisionalign.training.overlap import training_overlap_note
    from clipvisionalign.training.selection_notes import in_sample_note

    aligner, data, source, differences = _open_run(args)
    eval_data = _check_split(data, args.split)
    candidates = 0
    if aligner.fusion is not None:
        candidates = aligner.config.fusion.candidates if args.candidates is None else args.candidates
    elif args.candidates:
        if aligner.late is None:
            raise ValueError(f"{args.run}: its design '{aligner.config.design}' has nothing to re-rank with")
        candidates = args.candidates
    logger.info(
        f"{source}, {args.split}: {count_noun(len(eval_data), 'image')}, "
        f"{count_noun(len(eval_data.captions), 'caption')}"
    )
    evaluation: Evaluation = measure(
        aligner, eval_data.images, eval_data.captions, eval_data.caption_image, eval_data.image_identity, candidates,
        caption_group=eval_data.shared_text_ids,
    )  # fmt: skip
    results = {"run": args.run, "data": source, "split": args.split, **evaluation.to_dict(), **differences}
    training_overlap = training_overlap_note(Path(args.run), data, eval_data)
    notes = {
        "in_sample": in_sample_note(Path(args.run), eval_data),
        "trained_on": training_overlap.note if training_overlap else None,
        "unfinished": unfinished_note(args.run),
    }
    results |= {name: note for name, note in notes.items() if note}
    if training_overlap and training_overlap.matches:
        results["trained_on_images"] = training_overlap.to_dict()
    if args.json:
        print(json.dumps(results, indent=2))
        return 0
    print_metrics(results)
    for note in filter(None, notes.values()):
        print(note)
    print_trained_on(results)
    return 0


def _evaluate_vectors(args: argparse.Namespace) -> int:
    """Figures and audit of vectors that lie in files."""
    if args.run or args.data or args.candidates:
        raise ValueError("--vectors takes the place of a run and its data: leave run, --data and --candidates out")
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
        print("whether a model saw what it must not shows only when it is asked: this is what vectors tell of it")
    return 0 if checks.passed else 1


def encode_parser() -> argparse.ArgumentParser:
    parser = _evaluation_parser(
        "encode",
        "Write the vectors of a data set's images and captions, for any program: as .parquet, or as .npy files with\n"
        "their partners. 'evaluate --vectors' measures such files.",
    )
    parser.add_argument("data_set", nargs="?", metavar="DATA", help="the same as --data")
    parser.add_argument("--out", required=True, help="NAME.parquet, or NAME.npy for NAME-images.npy and so on")
    parser.add_argument(
        "--distractors", default="", metavar="FOLDER", help="images without captions, behind the others"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    return parser


def encode(arguments: list[str]) -> int:
    """Write the vectors of a data set's images and captions."""
    args = encode_parser().parse_args(arguments)
    from clipvisionalign.retrieval.vector_files import vector_output_files, write_vectors

    if args.data_set and args.data:
        raise ValueError(f"two data sets: {args.data_set} and --data {args.data}")
    args.data = args.data_set or args.data
    vector_output_files(args.out, args.overwrite)
    distractors = _read_distractors(args.distractors)
    aligner, data, source, differences = _open_run(args)
    eval_data = _check_split(data, args.split)
    if not len(eval_data):
        raise ValueError(f"{source}: no image of the split '{args.split}' is left to be encoded")
    images = aligner.encode_images([*eval_data.images, *distractors]).numpy()
    captions = aligner.encode_captions(eval_data.captions).numpy()
    files = write_vectors(args.out, eval_data, images, captions, [str(path) for path in distractors], args.overwrite)
    counts = {"images": len(eval_data), "distractors": len(distractors), "captions": len(eval_data.captions)}
    if args.json:
        summary = {"run": args.run, "data": source, "split": args.split, "files": list(map(str, files)), **counts}
        summary |= differences
        print(json.dumps(summary, indent=2))
        return 0
    print(f"{', '.join(map(str, files))}: " + ", ".join(f"{count:,} {noun}" for noun, count in counts.items()))
    given_as = files[0] if len(files) == 1 else f"{files[0]} {files[1]} --partners {files[2]}"
    print(f"next: {PROGRAM} evaluate --vectors {given_as}")
    return 0


def _read_distractors(folder: str) -> list[Path]:
    """The images below a folder that can be decoded, in order of their paths; the others are told."""
    if not folder:
        return []
    from clipvisionalign.images import ExcludedFiles, ImageError, image_files, open_image
    from clipvisionalign.progress import progress

    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--distractors {folder}: no such folder")
    skipped = ExcludedFiles()
    paths = image_files(root, skipped)
    for line in skipped.lines():
        logger.info(f"{folder}: not taken: {line}")
    decodable = []
    for path in progress(paths, "checking distractors", len(paths), True):
        try:
            open_image(path)
        except ImageError as error:
            logger.info(f"left out: {error}")
        else:
            decodable.append(path)
    if not decodable:
        raise ValueError(f"--distractors {folder}: no image in it")
    return decodable


def audit_parser() -> argparse.ArgumentParser:
    parser = _evaluation_parser(
        "audit",
        "Is a run's figure real? Checks that the model sees nothing that it must not, and that splits are apart.",
    )
    parser.add_argument("--sample", type=int, default=48, help="images in the checks (default 48)")
    return parser


def audit(arguments: list[str]) -> int:
    """Check that a model sees nothing that it must not; the exit status is 1 where a check fails."""
    args = audit_parser().parse_args(arguments)
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.run_data import unfinished_note
    from clipvisionalign.export.audits import keep_audit
    from clipvisionalign.retrieval.audit import AuditReport, Check
    from clipvisionalign.retrieval.audit import audit as audit_model
    from clipvisionalign.training.overlap import training_overlap_note

    aligner, data, source, differences = _open_run(args)
    clean_data, report = check_data(data, full=True, show_progress=True)
    overlap = [problem.message for problem in report.problems if "two splits" in problem.kind]
    eval_data = clean_data.split(args.split)
    split_overlap = overlap if len(clean_data.split_sizes()) > 1 else None
    audit_report = audit_model(
        aligner,
        eval_data.images,
        eval_data.captions,
        eval_data.caption_image,
        eval_data.image_identity,
        split_overlap,
        args.sample,
        caption_group=eval_data.shared_text_ids,
    )
    training_overlap = training_overlap_note(Path(args.run), data, eval_data)
    if args.split != "train":
        count = len(training_overlap.matches) or training_overlap.images if training_overlap else 0
        message = (
            training_overlap.note
            if training_overlap
            else "no image of it is known to be one that the run was trained on"
        )
        audit_report = AuditReport(
            [*audit_report.checks, Check("gallery not trained on", not training_overlap, float(count), message)]
        )
    results = {"run": args.run, "data": source, "split": args.split, **audit_report.to_dict(), **differences}
    results |= (
        {"trained_on": training_overlap.note, "trained_on_images": training_overlap.to_dict()}
        if training_overlap
        else {}
    )
    unfinished = unfinished_note(args.run)
    results |= {"unfinished": unfinished} if unfinished else {}
    # For the card of a model that is exported.
    keep_audit(Path(args.run), results, eval_data)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print_audit(results)
        print_trained_on(results)
        if unfinished:
            print(unfinished)
    return 0 if audit_report.passed else 1


def _evaluation_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = command_parser(name, description=description)
    parser.add_argument("run", nargs="?" if name == "evaluate" else None, help="run folder that 'train' wrote")
    parser.add_argument("--data", help="data set (default: the one that the run was trained on)")
    parser.add_argument(
        "--layout",
        default="auto",
        help="how the data set lies there (default: as the run has it, else recognised)",
    )
    parser.add_argument("--split", default="dev", help="train, dev or test (default dev)")
    parser.add_argument("--identity", help="auto, caption or none, as in 'train' (default: as the run was trained)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(OFFLINE, action="store_true", help=OFFLINE_HELP)
    return parser


def _open_run(args: argparse.Namespace) -> tuple[Any, CaptionedImages, str, dict[str, str]]:
    """The aligner, the data set whole, of a stream the split alone, where it was read from, and what of it is otherwise
    than the run has recorded it, as a note among the results."""
    from clipvisionalign.data.run_data import differences_from_run, read_data_of_run
    from clipvisionalign.models.io import load_aligner

    # Data first: what is wrong with it is known sooner than a model is loaded.
    _check_run(args.run, getattr(args, "candidates", None))
    data = read_data_of_run(args.run, args.data or "", args.layout, args.identity, args.split)
    data.split(args.split)
    aligner = load_aligner(args.run, args.device)
    aligner.show_progress = True
    differences = differences_from_run(args.run, data, args.split)
    for line in differences:
        logger.info(f"note: {line}")
    return aligner, data, str(data.source), {"differs_from_run": "; ".join(differences)} if differences else {}


def _check_run(run: str, candidates: int | None) -> None:
    """Raises what `load_aligner` raises where a folder is no run, and ValueError for settings that cannot be read, or
    for a number of candidates where the design has nothing to re-rank with."""
    import yaml

    from clipvisionalign.data.run_data import run_settings
    from clipvisionalign.models.io import load_aligner

    try:
        settings = run_settings(run)
    except yaml.YAMLError as error:
        raise ValueError(f"{run}/config.yaml: no settings of an aligner: {error}") from None
    if not settings:
        load_aligner(run)
    design = (settings.get("model") or {}).get("design", "")
    if candidates and design in ("self", "sparse"):
        raise ValueError(f"{run}: its design '{design}' has nothing to re-rank with")


def _check_split(data: CaptionedImages, split: str) -> CaptionedImages:
    from clipvisionalign.data.check import check as check_data

    clean_data, report = check_data(data.split(split), full=True, show_progress=True)
    dropped = [problem for problem in report.problems if problem.effect == "left out" and problem not in data.problems]
    for problem in dropped[:10]:
        logger.info(f"check: {problem}")
    if len(dropped) > 10:
        logger.info(f"check: and {len(dropped) - 10} more left out")
    before = sum(problem.rows for problem in data.problems)
    if before:
        rows = f"{count_noun(before, 'row')} {'was' if before == 1 else 'were'}"
        logger.info(f"{rows} left out when the data set was read: '{PROGRAM} check {data.source}' lists them")
    return clean_data
