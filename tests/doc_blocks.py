"""The fenced code blocks of README and docs: which commands they hold, and which of them cannot be run by a test."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "starter" / "README.md", *(ROOT / "docs").rglob("*.md")]
)

#: The languages that a block may have; "text" is what a program prints or a file holds, and is not run.
LANGUAGES = {"bash", "python", "yaml", "text"}

#: Commands that no test runs as they stand, by how they begin (as a pattern), with the reason. Those of `clipvisionalign` are parsed.
NOT_RUN = {
    r"starter/train\.sh": "Flickr8k and half an hour; tests/test_starter.py",
    r"make ": "calls these tests, or what calls them: .ci/run, tests/test_demo.py",
    r"pip install|\.venv/bin/(pre-commit|pytest)": "changes the environment, or calls these tests",
    r"(ATEN_CPU_CAPABILITY|MKL_ENABLE_INSTRUCTIONS)": "all tests again on other kernels",
    r"(torchrun|accelerate launch)": "8 GPUs or several machines; tests/test_processes.py trains on two processes",
    r"#!/bin/bash|#SBATCH|head=|srun": "a Slurm script",
    r"clipvisionalign serve": "serves until it is stopped; tests/test_service.py",
    r"clipvisionalign index \S+ s3://": "a bucket; tests/test_files.py indexes one on this machine",
    r"clipvisionalign index .* --ray": "Ray takes long to start; tests/test_search.py indexes through it",
    r"clipvisionalign study (scenes|flickr8k|flickr8k-small) (--data flickr8k )?(--seeds 0 )?--out": "takes 30 minutes and more; tests/test_study.py",
    r"clipvisionalign study plan.yaml --out study": "trains several models; tests/test_study.py",
    r"clipvisionalign report study --pdf": "a browser; tests/test_page.py",
    r"clipvisionalign (calibrate|search .* --promise)": "25 images that were not trained on; tests/test_promise.py",
    r"clipvisionalign duplicates index --(not|keep|forget)": "images of a reader's; tests/test_duplicates.py",
    r"clipvisionalign export runs/self --adapters": "a run of pretrained towers, not of random ones; tests/test_starter.py",
    r"clipvisionalign curve": "three trainings; tests/test_learning_curve.py",
    r"clipvisionalign train .*(--recipe original|resnet50|hf-hub:|allenai/|/models/)": "towers from the hub or a private folder; tests/test_weights_by_name.py",
    r"clipvisionalign train flickr8k --out runs/(self|all)": "77 minutes; tutorials/fine-tune.md runs the same on fewer images",
    r"clipvisionalign (evaluate|classify|audit|index|train) .*openai/": "a model of the hub; tests/test_pretrained_by_name.py",
    r'clipvisionalign train "shards/train-\{': "a hundred shards; tests/test_streams.py",
    r"clipvisionalign train DATA --batch 4096 --chunk 64": "4,096 images; tests/test_gradient_cache.py",
}

#: Exit statuses other than 0 of commands that are run, with the reason.
STATUS: dict[str, tuple[int, ...]] = {
    # A model of a few steps on drawn scenes may fail an audit, and a search may find nothing.
    "clipvisionalign audit": (0, 1),
    "clipvisionalign evaluate --vectors": (0, 1),
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: its file below the root folder.
        line: the line of its opening fence.
        language: what stands behind the fence.
        text: its lines.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of a bash block, each in one line and without its comment."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = (re.sub(r"(^|\s)#(?!!|SBATCH).*$", "", line).strip() for line in joined.splitlines())
        return [line for line in lines if line]


def blocks_of(path: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    blocks: list[Block] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
        else:
            language = lines[start].removeprefix("```").strip()
            page = path.relative_to(ROOT).as_posix()
            blocks.append(Block(page, start + 1, language, "\n".join(lines[start + 1 : number]) + "\n"))
            start = None
    assert start is None, f"{path}: the block of line {start} is not closed"
    return blocks


def reason_not_to_run(command: str) -> str | None:
    """Return why no test runs a command, or None if one does."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.match(pattern, command)), None)


def arguments_of(command: str) -> list[str] | None:
    """Return the arguments of `clipvisionalign` in a command, None where it calls something else."""
    words = shlex.split(re.split(r"\s[|;]\s|\s>\s", command)[0])
    words = [word for word in words if word != "..."]
    if words[:1] == ["clipvisionalign"]:
        return words[1:]
    if "clipvisionalign" in words and words[words.index("clipvisionalign") - 1] == "-m":
        return words[words.index("clipvisionalign") + 1 :]
    return None


#: Settings of a training of one pass over small images, which those of the command come after.
ONE_PASS, SMALL_IMAGES = "epochs: 1\n", "model:\n  image_tower:\n    size: 64\n"


def quick(arguments: list[str], folder: Path) -> list[str]:
    """Return a command's arguments; a training that names no settings of its own has one pass over small images."""
    if arguments[:1] != ["train"] or {"--config", "--recipe", "--resume"} & set(arguments):
        return arguments
    # Stages have epochs of their own.
    settings = folder / ("stages.yaml" if "--stages" in arguments else "quick.yaml")
    settings.write_text(SMALL_IMAGES if "--stages" in arguments else ONE_PASS + SMALL_IMAGES)
    # After the data set, which comes first.
    return [*arguments[:2], "--config", settings.name, *arguments[2:]]


def command_in(folder: str, *arguments: str) -> int:
    """Run `clipvisionalign ARGUMENTS` in a folder, as the work of a forked process."""
    from clipvisionalign.cli import main

    os.chdir(folder)
    return main(list(arguments))


def python_in(folder: str, code: str) -> int:
    """Run a Python block in a folder, as the work of a forked process."""
    os.chdir(folder)
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})
    return 0


def examples_in(folder: str) -> int:
    """Run the examples of all docstrings in a folder, as the work of a forked process."""
    import clipvisionalign
    from clipvisionalign.data.scene_dataset import write_scenes

    os.chdir(folder)
    # Some read the data set "scenes".
    write_scenes("scenes", 12, size=32, splits={"train": 8, "dev": 4})
    names = [each.name for each in pkgutil.walk_packages(clipvisionalign.__path__, "clipvisionalign.")]
    tested = 0
    for name in [each for each in names if not each.endswith("__main__")]:
        failed, count = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        if failed:
            print(f"{name}: {failed} of {count} examples do not hold")
            return 1
        tested += count
    print(f"{tested} examples hold")
    return 0
