"""Commands that measure a run: evaluate, encode, audit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipvisionalign.cli.output import _print_audit, _print_figures, _print_trained_on, say
from clipvisionalign.cli.parser import OFFLINE, OFFLINE_HELP, PROGRAM, _parser
from clipvisionalign.counts import with_noun

if TYPE_CHECKING:
    from clipvisionalign.data.captioned import CaptionedImages
    from clipvisionalign.retrieval.evaluate import Evaluation


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
    given = evaluate_parser().parse_args(arguments)
    if given.vectors:
        return _evaluate_vectors(given)
    if given.run is None or given.partners or given.distractors:
        raise ValueError("give a run, or --vectors IMAGES CAPTIONS --partners FILE (--distractors FILE)")
    from clipvisionalign.data.of_run import unfinished_note
    from clipvisionalign.retrieval.evaluate import evaluate as measure
    from clipvisionalign.training.cross_fit import in_sample_note
    from clipvisionalign.training.trained_on import trained_note

    aligner, data, source, differs = _open_run(given)
    part = _checked_split(data, given.split)
    candidates = 0
    if aligner.fusion is not None:
        candidates = aligner.config.fusion.candidates if given.candidates is None else given.candidates
    elif given.candidates:
        if aligner.late is None:
            raise ValueError(f"{given.run}: its design '{aligner.config.design}' has nothing to re-rank with")
        candidates = given.candidates
    say(f"{source}, {given.split}: {with_noun(len(part), 'image')}, {with_noun(len(part.captions), 'caption')}")
    found: Evaluation = measure(
        aligner, part.images, part.captions, part.caption_image, part.image_identity, candidates,
        caption_group=part.caption_group,
    )  # fmt: skip
    results = {"run": given.run, "data": source, "split": given.split, **found.to_dict(), **differs}
    trained = trained_note(Path(given.run), data, part)
    notes = {
        "in_sample": in_sample_note(Path(given.run), part),
        "trained_on": trained.note if trained else None,
        "unfinished": unfinished_note(given.run),
    }
    results |= {name: note for name, note in notes.items() if note}
    if trained and trained.matches:
        results["trained_on_images"] = trained.to_dict()
    if given.json:
        print(json.dumps(results, indent=2))
        return 0
    _print_figures(results)
    for note in filter(None, notes.values()):
        print(note)
    _print_trained_on(results)
    return 0


def _evaluate_vectors(given: argparse.Namespace) -> int:
    """Figures and audit of vectors that lie in files."""
    if given.run or given.data or given.candidates:
        raise ValueError("--vectors takes the place of a run and its data: leave run, --data and --candidates out")
    from clipvisionalign.retrieval.vector_files import read_gallery
    from clipvisionalign.retrieval.vectors import audit_vectors, evaluate_vectors

    gallery = read_gallery(given.vectors, given.partners, given.distractors)
    found = evaluate_vectors(gallery, given.identity or "auto")
    checks = audit_vectors(gallery)
    about = {"run": " ".join(given.vectors), "data": given.partners or "their own partners", "split": "vectors"}
    results = {**about, "vectors": given.vectors, **found.to_dict(), "audit": checks.to_dict()}
    if given.json:
        print(json.dumps(results, indent=2))
    else:
        _print_figures(results)
        _print_audit({**about, **checks.to_dict()})
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
    given = encode_parser().parse_args(arguments)
    from clipvisionalign.retrieval.vector_files import refuse_present, write_vectors

    if given.data_set and given.data:
        raise ValueError(f"two data sets: {given.data_set} and --data {given.data}")
    given.data = given.data_set or given.data
    refuse_present(given.out, given.overwrite)
    more = _distractors(given.distractors)
    aligner, data, source, differs = _open_run(given)
    part = _checked_split(data, given.split)
    if not len(part):
        raise ValueError(f"{source}: no image of the split '{given.split}' is left to be encoded")
    images = aligner.encode_images([*part.images, *more]).numpy()
    captions = aligner.encode_captions(part.captions).numpy()
    files = write_vectors(given.out, part, images, captions, [str(path) for path in more], given.overwrite)
    counts = {"images": len(part), "distractors": len(more), "captions": len(part.captions)}
    if given.json:
        told = {"run": given.run, "data": source, "split": given.split, "files": list(map(str, files)), **counts}
        told |= differs
        print(json.dumps(told, indent=2))
        return 0
    print(f"{', '.join(map(str, files))}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
    given_as = files[0] if len(files) == 1 else f"{files[0]} {files[1]} --partners {files[2]}"
    print(f"next: {PROGRAM} evaluate --vectors {given_as}")
    return 0


def _distractors(folder: str) -> list[Path]:
    """The images below a folder that can be decoded, in order of their paths; the others are told."""
    if not folder:
        return []
    from clipvisionalign.images import NotTaken, PictureError, image_files, open_picture
    from clipvisionalign.progress import progress

    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--distractors {folder}: no such folder")
    others = NotTaken()
    found = image_files(root, others)
    for line in others.lines():
        say(f"{folder}: not taken: {line}")
    good = []
    for path in progress(found, "checking distractors", len(found), True):
        try:
            open_picture(path)
        except PictureError as error:
            say(f"left out: {error}")
        else:
            good.append(path)
    if not good:
        raise ValueError(f"--distractors {folder}: no image in it")
    return good


def audit_parser() -> argparse.ArgumentParser:
    parser = _evaluation_parser(
        "audit",
        "Is a run's figure real? Checks that the model sees nothing that it must not, and that splits are apart.",
    )
    parser.add_argument("--sample", type=int, default=48, help="images in the checks (default 48)")
    return parser


def audit(arguments: list[str]) -> int:
    """Check that a model sees nothing that it must not; the exit status is 1 where a check fails."""
    given = audit_parser().parse_args(arguments)
    from clipvisionalign.data.check import check as check_data
    from clipvisionalign.data.of_run import unfinished_note
    from clipvisionalign.export.audits import keep_audit
    from clipvisionalign.retrieval.audit import AuditReport, Check
    from clipvisionalign.retrieval.audit import audit as audit_model
    from clipvisionalign.training.trained_on import trained_note

    aligner, data, source, differs = _open_run(given)
    kept, report = check_data(data, full=True, shown=True)
    overlap = [problem.message for problem in report.problems if "two splits" in problem.kind]
    part = kept.split(given.split)
    apart = overlap if len(kept.split_sizes()) > 1 else None
    found = audit_model(
        aligner, part.images, part.captions, part.caption_image, part.image_identity, apart, given.sample,
        caption_group=part.caption_group,
    )  # fmt: skip
    trained = trained_note(Path(given.run), data, part)
    if given.split != "train":
        count = len(trained.matches) or trained.images if trained else 0
        told = trained.note if trained else "no image of it is known to be one that the run was trained on"
        found = AuditReport([*found.checks, Check("gallery not trained on", not trained, float(count), told)])
    results = {"run": given.run, "data": source, "split": given.split, **found.to_dict(), **differs}
    results |= {"trained_on": trained.note, "trained_on_images": trained.to_dict()} if trained else {}
    unfinished = unfinished_note(given.run)
    results |= {"unfinished": unfinished} if unfinished else {}
    # For the card of a model that is exported.
    keep_audit(Path(given.run), results, part)
    if given.json:
        print(json.dumps(results, indent=2))
    else:
        _print_audit(results)
        _print_trained_on(results)
        if unfinished:
            print(unfinished)
    return 0 if found.passed else 1


def _evaluation_parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = _parser(name, description=description)
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


def _open_run(given: argparse.Namespace) -> tuple[Any, CaptionedImages, str, dict[str, str]]:
    """The aligner, the data set whole, of a stream the split alone, where it was read from, and what of it is otherwise
    than the run has recorded it, as a note among the results."""
    from clipvisionalign.data.of_run import differs_from_run, read_data_of_run
    from clipvisionalign.models.io import load_aligner

    # Data first: what is wrong with it is known sooner than a model is loaded.
    _check_run(given.run, getattr(given, "candidates", None))
    data = read_data_of_run(given.run, given.data or "", given.layout, given.identity, given.split)
    data.split(given.split)
    aligner = load_aligner(given.run, given.device)
    aligner.show_progress = True
    differs = differs_from_run(given.run, data, given.split)
    for line in differs:
        say(f"note: {line}")
    return aligner, data, str(data.source), {"differs_from_run": "; ".join(differs)} if differs else {}


def _check_run(run: str, candidates: int | None) -> None:
    """Raises what `load_aligner` raises where a folder is no run, and ValueError for settings that cannot be read, or
    for a number of candidates where the design has nothing to re-rank with."""
    import yaml

    from clipvisionalign.data.of_run import settings_of
    from clipvisionalign.models.io import load_aligner

    try:
        settings = settings_of(run)
    except yaml.YAMLError as error:
        raise ValueError(f"{run}/config.yaml: no settings of an aligner: {error}") from None
    if not settings:
        load_aligner(run)
    design = (settings.get("model") or {}).get("design", "")
    if candidates and design in ("self", "sparse"):
        raise ValueError(f"{run}: its design '{design}' has nothing to re-rank with")


def _checked_split(data: CaptionedImages, split: str) -> CaptionedImages:
    from clipvisionalign.data.check import check as check_data

    kept, report = check_data(data.split(split), full=True, shown=True)
    dropped = [problem for problem in report.problems if problem.effect == "left out" and problem not in data.problems]
    for problem in dropped[:10]:
        say(f"check: {problem}")
    if len(dropped) > 10:
        say(f"check: and {len(dropped) - 10} more left out")
    before = sum(problem.rows for problem in data.problems)
    if before:
        rows = f"{with_noun(before, 'row')} {'was' if before == 1 else 'were'}"
        say(f"{rows} left out when the data set was read: '{PROGRAM} check {data.source}' lists them")
    return kept
