"""What the tests share: tiny towers saved in their publishers' own layouts, and a small drawn data set."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from forked import use_fork_server
from optional_parts import BROWSER

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models: a second thread each costs more than it brings, and the tests run on all cores anyway.
os.environ.setdefault("OMP_NUM_THREADS", "1")

use_fork_server()

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # What Inductor has compiled for one processor it would take for another that PyTorch is told to be.
    kept = Path(tempfile.gettempdir()) / f"inductor-{getpass.getuser()}-{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept))

# How long an example takes depends on what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

#: How the reasons begin of skips that no installation can undo: everything else is set up by `make test`.
HARDWARE = ("no GPU", "no small disk")


#: Fixtures that take seconds and serve many tests: with xdist those tests run in one process, one after the other. The
#: first of a test's fixtures counts: what is made from the study stays with it, so that it is carried out once.
SHARED = (
    "study", "alone", "page_file", "indexes", "indexed", "exported", "undisturbed", "hundred", "hub", "world",
    "timed_indexes",
)  # fmt: skip
#: What takes a minute to make, or a browser beside the test: tests that ask for it are run by `make test-slow`.
SLOW_FIXTURES = ("study", "exported", "browser")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slowest first, so that no process is left alone with one of them at the end."""
    if not config.getoption("--docs"):
        items[:] = [item for item in items if item.get_closest_marker("docs") is None]
    for item in items:
        if set(SLOW_FIXTURES) & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    # Among those of the docs are pages that take minutes.
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("docs", "slow")])
    for item in items:
        if shared := next((name for name in SHARED if name in getattr(item, "fixturenames", ())), None):
            item.add_marker(pytest.mark.xdist_group(shared))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--docs", action="store_true", help="also run the tests of `make test-docs`")
    parser.addoption("--no-skips", action="store_true", help="fail if a test was skipped that needs no GPU")


def skipped(config: pytest.Config) -> Counter[str]:
    """How many tests, or modules of tests, were skipped for each reason."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    # A reason is the third part of a report's place, as "Skipped: reason".
    reasons = (report.longrepr for report in reporter.stats.get("skipped", []))
    return Counter(str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ") for where in reasons)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was not run, and the line that brings what it needs."""
    for reason, count in skipped(config).items():
        terminalreporter.write_line(f"{count} skipped: {reason}", yellow=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With --no-skips a test that was skipped for anything but missing hardware is a failure."""
    config = session.config
    if config.getoption("--no-skips") and not hasattr(config, "workerinput") and exitstatus == pytest.ExitCode.OK:
        reasons = [reason for reason in skipped(config) if not reason.startswith(HARDWARE)]
        if reasons:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            print(f"\n--no-skips: tests were skipped that should have run: {'; '.join(reasons)}")


WORDS = (  # noqa: SIM905
    "a an the two three four small large red blue green yellow purple orange pink brown circle square triangle star "
    "cross ring circles squares triangles stars crosses rings left right above below of to on in picture dog grass"
).split()


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder is one of the tests, which all of their processes share."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "user-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPVISIONALIGN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and a word-piece tokenizer, in transformers' layout."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("text")
    letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(dict.fromkeys(vocabulary)), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 drawn scenes of 64 pixels."""
    from clipvisionalign.data.scene_dataset import write_scenes

    with made_once(tmp_path_factory, "scenes") as (folder, there):
        return folder / "data" if there else write_scenes(folder / "data", 120, seed=1, size=64)


@pytest.fixture(scope="session")
def tiny_model(text_folder: Path):
    """Settings of an aligner that trains in seconds: random towers at 64 pixels."""
    from clipvisionalign.models.aligner import AlignerConfig
    from clipvisionalign.models.fusion import FusionConfig
    from clipvisionalign.models.image_tower import ImageTowerConfig
    from clipvisionalign.models.late_interaction import LateConfig
    from clipvisionalign.models.text_tower import TextTowerConfig

    def build(design: str = "self") -> AlignerConfig:
        return AlignerConfig(
            design=design,
            image_tower=ImageTowerConfig("test_resnet", weights="random", size=64),
            text_tower=TextTowerConfig(str(text_folder), window=4),
            late=LateConfig(width=16),
            fusion=FusionConfig(layers=1, heads=2, width=32, candidates=5),
            width=32,
        )

    return build


@pytest.fixture(scope="module")
def tiny_settings(tmp_path_factory, scenes_folder: Path, tiny_model):
    """Makes what makes settings: of tiny runs into one folder of the module's, whose features are shared."""
    from clipvisionalign.training.config import RunConfig

    folder = tmp_path_factory.mktemp("runs")

    def of(default: str, **usual: Any):
        def made(name: str, design: str = default, **more: Any) -> RunConfig:
            given = {
                "data": str(scenes_folder), "out": str(folder / name), "model": tiny_model(design), "batch": 16,
                "augment": "none", "precision": "float32", "cache": str(folder / "cache"), "checkpoint_minutes": 0.0,
                "trackers": "", "workers": 0, **usual, **more,
            }  # fmt: skip
            return RunConfig(**given)

        return made

    return of


@contextmanager
def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder of all processes of the tests, and whether it is there already: else its maker holds it meanwhile."""
    import fcntl

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        yield folder, (folder / "made").exists()
        (folder / "made").touch()


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, scenes_folder: Path, tiny_model) -> dict[str, Path]:
    """A trained run of each design, trained once; each process of the tests has copies, into which tests may write."""
    from clipvisionalign.training.config import RunConfig
    from clipvisionalign.training.train import train

    designs = ("self", "sparse", "late", "cross")
    with made_once(tmp_path_factory, "tiny-runs") as (folder, there):
        for design in () if there else designs:
            config = RunConfig(
                data=str(scenes_folder), out=str(folder / design), model=tiny_model(design), epochs=2, batch=16,
                augment="none", precision="float32", cache=str(folder / "cache"),
            )  # fmt: skip
            train(config)
    own = tmp_path_factory.mktemp("runs")
    return {design: shutil.copytree(folder / design, own / design) for design in designs}


@pytest.fixture(scope="session")
def plan(scenes_folder: Path, text_folder: Path) -> Any:
    """A study of four tiny designs and one that cannot be trained, two seeds."""
    from clipvisionalign.study.config import Measurements, Plan, Variant

    model = {
        "image_tower": {"name": "test_resnet", "weights": "random", "size": 64}, "width": 32,
        "text_tower": {"name": str(text_folder), "window": 4}, "late": {"width": 16},
        "fusion": {"layers": 1, "heads": 2, "width": 32, "candidates": 5},
    }  # fmt: skip
    return Plan(
        title="A tiny study", data=str(scenes_folder), seeds=[0, 1],
        variants={
            "self": Variant(), "sparse": Variant(), "late": Variant(),
            "cross": Variant({"freeze": "all", "epochs": 1}, "late"),
            "broken": Variant({"model": {"design": "self"}, "loss": {"name": "failing_loss:of_more_than_two"}}),
        },
        settings={"epochs": 2, "batch": 16, "augment": "none", "precision": "float32", "model": model},
        measure=Measurements(rounds=1, brief=True, composition=20, audit_images=12, examples=2),
    )  # fmt: skip


@pytest.fixture(scope="session")
def study(plan: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That study, finished. Who changes something in it works on a copy."""
    from many_processes import Costs

    from clipvisionalign.study.runner import run_study

    folder = tmp_path_factory.mktemp("study") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "clipvisionalign.study.cost_rounds.profile_run", Costs(tmp_path_factory.mktemp("costs"), "self-0")
        )
        run_study(plan, folder)
    return folder


@pytest.fixture(scope="session")
def report(study: Path) -> dict[str, Any]:
    """What its report.json holds. Who changes something in it works on a copy."""
    return json.loads((study / "report.json").read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium; skips where none starts."""
    from playwright.sync_api import Error, sync_playwright

    from clipvisionalign.study.report.html import browser_path

    with sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        except Error:
            pytest.skip(BROWSER.missing)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pretrained dual encoders: a folder a family, as its library saves it, made when it is first asked for."""
    from pretrained_models import make_pretrained

    base = tmp_path_factory.mktemp("pretrained")

    def get(family: str) -> Path:
        return base / family if (base / family).is_dir() else make_pretrained(family, base / family)

    return get
