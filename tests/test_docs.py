"""README and docs: every command block is run as it stands, the site is built, and the built wheel searches.

What takes long has the mark `docs` and is run by `make test-docs`.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import (
    LANGUAGES,
    NOT_RUN,
    PAGES,
    ROOT,
    STATUS,
    arguments_of,
    blocks_of,
    command_in,
    examples_in,
    python_in,
    quick,
    reason_not_to_run,
)
from forked import Forked

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [
    (f"{block.page}:{block.line}", command)
    for block in BLOCKS
    for command in block.commands
    if block.language == "bash"
]
#: How often something is trained or run by each page that runs something: the longest first, so that no process of the tests
#: is left alone with one of them at the end.
RUN_PAGES = [page for page, _ in Counter(
    block.page
    for block in BLOCKS
    for command in (block.commands if block.language == "bash" else ["python"])
    if block.language in ("bash", "python") and not reason_not_to_run(command)
).most_common()]  # fmt: skip


class Parsed(BaseException):
    """Ends a command once its command line is parsed."""


def test_every_block_names_its_language():
    assert {f"{block.page}:{block.line}" for block in BLOCKS if block.language not in LANGUAGES} == set()
    programs = ("clipvisionalign ", "make ", "python ", "torchrun ", "pip ")
    texts = [block for block in BLOCKS if block.language == "text"]
    assert [f"{block.page}:{block.line}" for block in texts if block.text.startswith(programs)] == []


def test_every_reason_is_needed():
    used = {pattern for pattern in NOT_RUN for _, command in COMMANDS if re.match(pattern, command)}
    assert set(NOT_RUN) == used


def test_every_command_line_parses(monkeypatch, capsys):
    """Those that are not run, too: their flags exist and their values have the right form."""
    import jsonargparse

    from clipvisionalign.cli import main

    kinds = (argparse.ArgumentParser, jsonargparse.ArgumentParser)
    for kind, method in [*((kind, "parse_args") for kind in kinds), (kinds[0], "parse_intermixed_args")]:
        parse = getattr(kind, method)

        def checked(self: Any, *given: Any, parse: Any = parse, **more: Any) -> None:
            parse(self, *given, **more)
            raise Parsed

        monkeypatch.setattr(kind, method, checked)
    wrong = []
    for block_line, command in COMMANDS:
        arguments = arguments_of(command)
        if arguments is None or "--config" in arguments:
            continue
        try:
            status = main(arguments)
        except Parsed:
            continue
        except SystemExit as ended:
            status = ended.code
        wrong.append(f"{block_line}: {command}: status {status}: {capsys.readouterr().err}")
    assert wrong == []


def test_links_of_the_root_folder_lead_somewhere():
    """Those of docs/ are checked when the site is built."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_architecture_has_a_row_for_every_module():
    package = ROOT / "src" / "clipvisionalign"
    rows = [line for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if line.startswith("| `")]
    named: set[str] = set()
    for row in rows:
        folder = ""
        for name in re.findall(r"`([\w./]+)`", row.split(" | ")[0]):
            if "/" in name[:-1]:
                folder = name.rstrip("/").rpartition("/")[0]
            elif folder:
                name = f"{folder}/{name}"
            named.add(name)
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    listed = {name for name in named if name.endswith(".py")}
    folders = tuple(name for name in named if name.endswith("/"))
    assert listed - modules == set()
    assert {name for name in modules - listed if not name.startswith(folders)} == set()


# --- what `make test-docs` runs --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, tiny_runs: dict[str, Path]) -> Path:
    """A folder with all that the pages take for given: data sets, images, the demo's run and index, a study."""
    from clipvisionalign.cli import main
    from clipvisionalign.data.scene_dataset import write_scenes

    data = write_scenes(tmp_path / "DATA", 48, seed=3, size=64, splits={"train": 24, "dev": 12, "test": 12})
    (tmp_path / "flickr8k").symlink_to(data)
    # Other images: what is kept of a run's own data is not what is kept of foreign data.
    write_scenes(tmp_path / "flickr30k", 48, seed=4, size=64, splits={"train": 24, "dev": 12, "test": 12})
    images = tmp_path / "images"
    shutil.copytree(data / "images" / "test", images)
    files = sorted(images.iterdir())
    shutil.copy(files[0], images / "example.png")
    shutil.copy(files[0], tmp_path / "a.jpg")
    (tmp_path / "words.txt").write_text("a red circle\na blue star\n")
    scenes = tmp_path / "demo" / "scenes"
    shutil.copytree(data, scenes)
    for source, name in zip(files, ("002303.png", "002310.png"), strict=False):
        shutil.copy(source, scenes / "images" / "test" / name)
    for design in ("self", "late"):
        shutil.copytree(tiny_runs[design], tmp_path / "demo" / "cells" / f"{design}-0")
    index = [
        "index",
        str(tmp_path / "demo/cells/late-0"),
        str(scenes / "images"),
        "--out",
        str(tmp_path / "demo/index"),
    ]
    assert main(index) == 0
    shutil.copytree(ROOT / "tests" / "data" / "v0.1" / "study", tmp_path / "study")
    shutil.copytree(tmp_path / "study", tmp_path / "other")
    return tmp_path


def given_run(page: str) -> bool:
    """Whether a page takes the run `runs/self` for given: it does not train it."""
    commands = [command for block in blocks_of(ROOT / page) for command in block.commands]
    return not any("--out runs/self" in command and not reason_not_to_run(command) for command in commands)


@pytest.mark.docs
@pytest.mark.parametrize("page", RUN_PAGES)
def test_the_blocks_of_a_page_run_in_order(page: str, folder: Path, tiny_runs: dict[str, Path]):
    if given_run(page):
        shutil.copytree(tiny_runs["self"], folder / "runs" / "self")
    if "--write-splits" in (ROOT / page).read_text():
        # It is for a data set without splits.
        table = folder / "DATA" / "metadata.csv"
        with table.open(newline="") as file:
            rows = [row[:2] for row in csv.reader(file)]
        with table.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    # A home of its own: for caches, and for the script that completes commands.
    own = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / ".cache"), "MPLBACKEND": "agg"}
    (folder / ".local" / "share" / "bash-completion" / "completions").mkdir(parents=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for number, block in enumerate(block for block in blocks_of(ROOT / page)):
        out = folder.with_name(f"{folder.name}-{number}.out")
        if block.language == "yaml" and "variants:" in block.text:
            (folder / "plan.yaml").write_text(block.text)
        if block.language == "python":
            Forked(python_in, str(folder), block.text, out=out, environment=own).ended(1800)
        for command in block.commands if block.language == "bash" else []:
            if reason_not_to_run(command):
                continue
            arguments = arguments_of(command)
            begun = time.monotonic()
            if arguments is None or " | " in command or " > " in command:
                done = subprocess.run(
                    ["bash", "-ec", command],
                    cwd=folder,
                    env={**os.environ, **own, "PATH": path},
                    capture_output=True,
                    text=True,
                )
                status, output = done.returncode, done.stdout + done.stderr
            else:
                process = Forked(command_in, str(folder), *quick(arguments, folder), out=out, environment=own)
                status = process.wait(1800)
                output = process.said
                process.kill()
            print(f"{time.monotonic() - begun:4.0f} s  {command}", flush=True)
            allowed = next((statuses for start, statuses in STATUS.items() if command.startswith(start)), (0,))
            shown = f"{page}:{block.line}: {command}: status {status}\n{output[-3000:]}"
            assert status in allowed, shown
            # A negative result is no error.
            assert not re.search(r"^(clipvisionalign: error|Traceback)", output, re.MULTILINE), shown


@pytest.mark.docs
def test_the_examples_of_docstrings_hold(tmp_path: Path):
    """In a process of their own: they import everything, and some write a run."""
    process = Forked(
        examples_in, str(tmp_path), out=tmp_path / "out", environment={"CLIPVISIONALIGN_CACHE": str(tmp_path)}
    )
    examples = re.search(r"^(\d+) examples hold$", process.ended(800), re.MULTILINE)
    assert examples is not None
    assert int(examples[1]) > 190


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a broken link or a docstring that does not fit its function is an error."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.docs
@pytest.mark.xdist_group("site")
def test_the_reference_of_the_site_is_complete(site: Path):
    from clipvisionalign.cli import COMMANDS as REGISTERED

    commands = (site / "reference" / "commands" / "index.html").read_text()
    assert [name for name in REGISTERED if f'id="{name}"' not in commands] == []
    settings = (site / "reference" / "settings" / "index.html").read_text()
    for name in ("--model.design", "--loss.name", "--text_lr", "--model.image_tower.name"):
        assert f">{name}</code>" in settings
    assert (
        "load_aligner" in (site / "reference" / "python" / "clipvisionalign.models.aligner" / "index.html").read_text()
    )
    assert "Add a loss" in (site / "contributing" / "index.html").read_text()


@pytest.mark.docs
@pytest.mark.xdist_group("site")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_site_asks_nobody_else_fits_its_window_and_is_legible(browser: Any, address: str, width: int, scheme: Any):
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    elsewhere, errors = [], []
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:", "blob:")) else elsewhere.append(request.url),
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    for name in (
        "",
        "training/",
        "reference/commands/",
        "reference/settings/",
        "reference/python/clipvisionalign.models.aligner/",
    ):
        page.goto(f"{address}/{name}")
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), name
        contrast = Axe().run(page, options={"runOnly": ["color-contrast", "link-in-text-block"]})
        assert contrast.violations_count == 0, f"{name}: {contrast.generate_report()[:2000]}"
    if width > 1000:
        page.goto(f"{address}/reference/commands/")
        usage = "[...document.querySelectorAll('.md-content pre > code')].slice(0, 2)"
        assert page.evaluate(f"{usage}.every(lines => lines.scrollWidth <= lines.clientWidth)"), "usage is cut"
    assert page.evaluate("getComputedStyle(document.body).colorScheme || document.body.dataset.mdColorScheme")
    page.close()
    assert elsewhere == []
    assert errors == []


@pytest.mark.docs
def test_the_wheel_searches_in_a_fresh_environment(tmp_path: Path, tiny_runs: dict[str, Path], scenes_folder: Path):
    """Built from the tree, with the starter model's, and installed without dependencies, which come from the
    environment of the tests."""
    wheels = []
    for project, package in ((ROOT, "clipvisionalign"), (ROOT / "starter", "clipvisionalign_starter")):
        out = tmp_path / "dist" / package
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(project)]
        done = subprocess.run(build, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        wheels += out.iterdir()
        with zipfile.ZipFile(wheels[-1]) as packed:
            names = set(packed.namelist())
        source = project / "src"
        tracked = [path.relative_to(source).as_posix() for path in (source / package).rglob("*") if path.is_file()]
        assert [name for name in tracked if "__pycache__" not in name and name not in names] == []
        assert {name.partition("/")[0].partition("-")[0] for name in names} == {package}

    environment = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (own,) = environment.glob("lib/python*/site-packages")
    # By pip for that environment: with --prefix it would uninstall the package that these tests run.
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", *map(str, wheels)], check=True)
    find = [sys.executable, "-c", "import importlib.metadata; importlib.metadata.distribution('clipvisionalign')"]
    subprocess.run(find, check=True, cwd=tmp_path)
    # As plain lines of a .pth file: .pth files there, such as that of an editable installation, are not read.
    (own / "dependencies.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}

    def run(*arguments: str) -> str:
        done = subprocess.run([str(python), *arguments], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert str(environment) in run("-c", "import clipvisionalign; print(clipvisionalign.__file__)")
    program = str(environment / "bin" / "clipvisionalign")
    run(program, "index", str(tiny_runs["late"]), str(scenes_folder / "images"), "--out", "index")
    assert ".png" in run(program, "search", "index", "a red circle", "--paths")
    run(program, "index", str(scenes_folder / "images"), "--out", "started")
    assert ".png" in run(program, "search", "started", "a red circle", "--paths")
