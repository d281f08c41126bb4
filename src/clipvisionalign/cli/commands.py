"""The table of commands, and the function that runs one of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from clipvisionalign.cli.data import check, scenes, shards
from clipvisionalign.cli.evaluate import audit, encode, evaluate
from clipvisionalign.cli.explain import explain
from clipvisionalign.cli.export import export
from clipvisionalign.cli.output import _speaks
from clipvisionalign.cli.parser import OFFLINE, PROGRAM
from clipvisionalign.cli.search import duplicates, index, search, serve
from clipvisionalign.cli.study import report, study
from clipvisionalign.cli.train import train
from clipvisionalign.progress import long_step


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status: 0 done, 1 something is wrong, 2 wrong words on the command line."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A file's name may be bytes that no encoding has; a message about it is printed all the same.
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Train image-caption aligners, compare their attention designs honestly, use the best one.",
        epilog=f"'{PROGRAM} COMMAND --help' explains a command. First steps: {PROGRAM} scenes data/scenes; "
        f"{PROGRAM} study scenes --out study",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, (words, _) in COMMANDS.items():
        commands.add_parser(name, help=words, add_help=False)
    if given and given[0] in COMMANDS:
        return _run(COMMANDS[given[0]][1], given[1:])
    parser.parse_args(given)
    parser.print_help()
    return 2


def _run(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; what a user can mend is told in one line, without a traceback."""
    try:
        with ExitStack() as around:
            if OFFLINE in arguments and command in _FETCHING:
                from clipvisionalign.models.hub import offline

                around.enter_context(offline())
            # What a command does beside its counted steps is told of as well; a service ends when it is stopped.
            shown = command is not serve and _speaks()
            around.enter_context(long_step(command.__name__, shown=shown, in_terminal=False))
            return command(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f'{PROGRAM}: error: this needs {error.name}: pip install "clipvisionalign[{extra}]"', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        return 130


def _version() -> str:
    from clipvisionalign import __version__

    return __version__


#: Packages that a command may lack, and the extra that brings them.
EXTRAS = {
    "matplotlib": "study", "jinja2": "study", "nltk": "study", "scipy": "study", "pyarrow": "parquet",
    "playwright": "pdf", "lancedb": "search", "textual_image": "search", "fastapi": "search", "uvicorn": "search",
    "fastapi_offline": "search", "starlette": "search", "filelock": "search", "fsspec": "search", "ray": "ray",
    "markupsafe": "study", "pydantic": "study", "tokenizers": "onnx", "prometheus_client": "search",
    "onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx",
    "webdataset": "scale", "datasets": "scale", "peft": "scale",
}  # fmt: skip


#: The commands that may need a tower's weights.
_FETCHING = (check, train, evaluate, encode, audit, study)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "scenes": ("draw the built-in data set: scenes of shapes with five captions each", scenes),
    "check": ("list what is wrong with a data set, row by row", check),
    "shards": ("write a data set as WebDataset shards, to train on as a stream", shards),
    "train": ("train an aligner: --model.design self, sparse, late or cross", train),
    "evaluate": ("measure a run on a whole gallery, with intervals", evaluate),
    "encode": ("write a data set's vectors, for any program", encode),
    "audit": ("is a run's figure real? the checks that prove it", audit),
    "study": ("train the attention designs alike, over seeds, into one report", study),
    "report": ("write a study's report anew, or put two studies side by side", report),
    "index": ("encode the pictures of a folder into an index to search", index),
    "search": ("find pictures by words, by a picture, by several of both", search),
    "serve": ("a search page and service over an index", serve),
    "export": ("write a run for use elsewhere: ONNX, or a folder for a hub", export),
    "duplicates": ("list pictures of an index that are the same, or nearly", duplicates),
    "explain": ("which parts of a picture carry which word of a caption", explain),
}
