"""The table of commands, and the function that runs one of them."""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from clipvisionalign.allocator import reused_memory
from clipvisionalign.cli.adaptation import blend, blend_parser, worth, worth_parser
from clipvisionalign.cli.calibrate import calibrate, calibrate_parser
from clipvisionalign.cli.completion import completion_parser, completion_script
from clipvisionalign.cli.curve import curve, curve_parser
from clipvisionalign.cli.data import check, check_parser, scenes, scenes_parser, shards, shards_parser
from clipvisionalign.cli.duplicates import duplicates, duplicates_parser
from clipvisionalign.cli.evaluate import (
    audit,
    audit_parser,
    classify,
    classify_parser,
    encode,
    encode_parser,
    evaluate,
    evaluate_parser,
)
from clipvisionalign.cli.explain import explain, explain_parser
from clipvisionalign.cli.export import export, export_parser
from clipvisionalign.cli.output import set_verbosity
from clipvisionalign.cli.parser import OFFLINE, PROGRAM, QUIET, VERBOSE, CommandParser, add_output_flags
from clipvisionalign.cli.search import index, index_parser, search, search_parser
from clipvisionalign.cli.serve import serve, serve_parser
from clipvisionalign.cli.study import report, report_parser, study, study_parser, verify, verify_parser
from clipvisionalign.cli.train import train, train_parser
from clipvisionalign.log import is_main_process, restored_log
from clipvisionalign.progress import progress_step


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command and its arguments; None for those of the process.

    Returns:
        Its exit status: 0 done, 1 an error or a negative result, 2 a usage error, 130 interrupted; see
        docs/command-line.md.

    Raises:
        SystemExit: From argparse, for `--help` and for usage errors.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A file's name may be bytes that no encoding has; a message about it is printed all the same.
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if arguments is None else arguments)
    parser = _main_parser()
    is_quiet, is_verbose = (_take(flag, argv) for flag in (QUIET, VERBOSE))
    with restored_log():
        set_verbosity(is_quiet, is_verbose)
        if argv and argv[0] in COMMANDS:
            return _run(COMMANDS[argv[0]][1], argv[1:], is_verbose)
    parser.parse_args(argv)
    parser.print_help()
    return 2


def _take(flag: str, arguments: list[str]) -> bool:
    """Whether a flag stands among the arguments; it is taken out of them. After "--" there are no flags."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    is_there = flag in arguments[:end]
    arguments[:end] = [argument for argument in arguments[:end] if argument != flag]
    return is_there


def _main_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        PROGRAM,
        description="Train image-caption aligners, compare attention designs, search images, audit retrieval figures.",
        epilog=f"'{PROGRAM} COMMAND --help' explains a command. First steps: {PROGRAM} scenes data/scenes; "
        f"{PROGRAM} study scenes --out study",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (words, _) in COMMANDS.items():
        commands.add_parser(name, help=words, add_help=False)
    add_output_flags(parser)
    return parser


def _run(command: Callable[[list[str]], int], arguments: list[str], is_verbose: bool = False) -> int:
    """Run a command; an error that a user can correct is one line, without a traceback."""
    try:
        with ExitStack() as stack:
            if OFFLINE in arguments and command in _HUB_COMMANDS:
                from clipvisionalign.models.hub import offline

                stack.enter_context(offline())
            # Progress covers what a command does beside its counted steps; a service runs until it is stopped.
            show_progress = command is not serve and is_main_process()
            stack.enter_context(progress_step(command.__name__, visible=show_progress, in_terminal=False))
            if command not in (serve, search):
                # A service keeps little; a search ends at once.
                stack.enter_context(reused_memory())
            status = command(arguments)
            sys.stdout.flush()
            return status
    except (ValueError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141
        if is_verbose:
            traceback.print_exc()
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f'{PROGRAM}: error: this needs {error.name}: pip install "clipvisionalign[{extra}]"', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped{RESUMED.get(command, '')}", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether what reads standard output, such as `head`, has ended; then nothing more is written there."""
    output = sys.stdout.fileno()
    if hasattr(select, "poll"):
        ends = select.poll()
        ends.register(output, 0)
        if not any(event & select.POLLERR for _, event in ends.poll(0)):
            return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _version() -> str:
    from clipvisionalign import __version__

    return __version__


#: Packages that a command may lack, and the extra that brings them.
EXTRAS = {
    "matplotlib": "study", "jinja2": "study", "nltk": "study", "scipy": "study", "pyarrow": "parquet",
    "playwright": "pdf", "lancedb": "search", "textual_image": "search", "fastapi": "search", "uvicorn": "search",
    "fastapi_offline": "search", "starlette": "search", "filelock": "search", "fsspec": "search", "ray": "ray",
    "markupsafe": "study", "pydantic": "study", "tokenizers": "onnx", "prometheus_client": "search",
    "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx", "lance": "search",
    "sqlglot": "search", "usearch": "search", "numkong": "search",
    "shtab": "completion", "webdataset": "scale", "datasets": "scale", "peft": "scale",
    "open_clip": "pretrained", "sentencepiece": "pretrained",
}  # fmt: skip


#: Commands that resume when they are given again, and the hint when one is interrupted; `train` has its own.
RESUMED: dict[Callable[[list[str]], int], str] = {
    study: "; the same command resumes the study: runs that are finished are not trained again",
    curve: "; the same command resumes it: trainings that are finished are not repeated",
    index: "; the same command resumes it: what is in the index is not encoded again",
}

#: The commands that may need weights from the hub.
_HUB_COMMANDS = (
    check, train, evaluate, classify, encode, audit, study, index, search, calibrate, serve, explain, export, blend,
    worth, curve, verify,
)  # fmt: skip


def completion(arguments: list[str]) -> int:
    """Print a script by which a shell completes commands, flags and choices.

    Args:
        arguments: What stands behind the command's name.

    Returns:
        The exit status.
    """
    given = completion_parser().parse_args(arguments)
    parsers = {name: (COMMANDS[name][0], parser_of()) for name, parser_of in PARSERS.items()}
    print(completion_script(given.shell, parsers))
    return 0


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "scenes": ("draw the built-in data set: scenes of shapes with five captions each", scenes),
    "check": ("list the faults of a data set, row by row", check),
    "shards": ("write a data set as WebDataset shards, to train on as a stream", shards),
    "train": ("train an aligner: --model.design self, sparse, late or cross", train),
    "evaluate": ("measure a run on a whole gallery, with intervals", evaluate),
    "classify": ("measure zero-shot classification of class folders, with intervals", classify),
    "encode": ("write the vectors of a data set to files", encode),
    "audit": ("check that the figures of a run are sound", audit),
    "blend": ("write the best model between a fine-tuned run and what it started from", blend),
    "worth": ("tell what a fine-tuning gained on its own data, and lost on others", worth),
    "curve": ("tell what twice the captions would bring, from trainings with fewer", curve),
    "study": ("train and measure attention designs over several seeds, in one report", study),
    "report": ("re-create the report of a study, or compare two studies", report),
    "verify": ("derive the figures of a study's report again from the ranks beside it", verify),
    "index": ("encode the images of a folder into an index to search", index),
    "search": ("find images by words, by images, or by both", search),
    "calibrate": ("calibrate up to where a result holds what is meant, on captioned images", calibrate),
    "serve": ("serve a search page and an HTTP interface for an index", serve),
    "export": ("export a run as ONNX, or as a folder for the Hugging Face hub", export),
    "duplicates": ("group the duplicates of an index: the same bytes, nearly the same, one scene", duplicates),
    "explain": ("draw which parts of an image support which word of a caption", explain),
    "completion": ("print a script by which a shell completes commands and flags", completion),
}

#: What reads each command's arguments; `train` has settings of its own besides, from files.
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "scenes": scenes_parser,
    "check": check_parser,
    "shards": shards_parser,
    "train": train_parser,
    "evaluate": evaluate_parser,
    "classify": classify_parser,
    "encode": encode_parser,
    "audit": audit_parser,
    "blend": blend_parser,
    "worth": worth_parser,
    "curve": curve_parser,
    "study": study_parser,
    "report": report_parser,
    "verify": verify_parser,
    "index": index_parser,
    "search": search_parser,
    "calibrate": calibrate_parser,
    "serve": serve_parser,
    "export": export_parser,
    "duplicates": duplicates_parser,
    "explain": explain_parser,
    "completion": completion_parser,
}
