"""Names and prose in the field's words: those that only this project used are not used again.

What a name is bound to is read from the syntax tree: classes, functions, parameters, variables, fields and attributes.
Words that are terms elsewhere (`count` of a list, `total` of a sum) are looked for where they had a meaning of ours.
Prose is what people read: docs, help texts, docstrings, messages, the search page.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: A name, and what is written instead.
REPLACED = {
    "Whole": "TrainState", "Place": "TrainProgress, Storage", "Known": "PrecomputedFeatures", "Knowledge": "FeatureLookup",
    "States": "TowerOutputs", "take_step": "forward_backward", "_hand_back": "_scatter_gradients",
    "Processes": "Distributed", "first_does": "run_on_main", "WeightAverage": "ExponentialMovingAverage",
    "keep_frozen_still": "set_frozen_eval", "find_formats": "choose_dtypes", "Records": "MetricsLogger",
    "asked_to_stop": "stop_signal", "look": "transform, embed, check_header, decode", "dots": "global_attention_mask",
    "reaches_all": "window_covers", "put_rows": "scatter", "late_scores": "maxsim", "Partners": "Positives",
    "strangers": "negatives", "Figure": "MetricEstimate", "Depth": "RerankResult", "forth": "i2t", "back": "t2i",
    "About": "IndexManifest", "Todo": "PendingFile", "Found": "Hit", "answers": "search_batch",
    "Guard": "RequestMiddleware", "do": "translate_errors", "life": "lifespan", "Cell": "Trial", "Measured": "TrialResult",
    "check_fence": "check_results", "Drawn": "Plot", "Probe": "StepTiming", "thirds": "terciles",
    "text_only": "blind_baseline", "found": "what it holds", "told": "message", "place": "index, location", "places": "indices",
    "twin": "sliding_window, foil", "twins": "foils", "anew": "reinitialised", "goes_on": "resumes",
}  # fmt: skip

#: Parts of names: none may hold one.
PARTS = {"picture": "image", "Picture": "Image", "PICTURE": "IMAGE"}

#: Terms elsewhere: not as members of these classes.
MEMBERS = {
    "Distributed": {"number", "count", "many", "first", "objects", "total", "wait"},
    "Step": {"whole", "cached", "pieces"},
    "PairScorer": {"parts", "some", "table"},
    "Searcher": {"answers", "place", "picture"},
    "Plot": {"words", "told"},
}

#: What bears such a name for a reason, which docs/architecture.md gives: `file:name`, the file without its ending.
EXCEPTIONS = {
    "captioned:place",  # a field of `check --json`
    "routes:picture",  # the form field of an upload
}


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a file binds, with its line: definitions, parameters, variables, fields and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno


def members(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """The methods and fields of every class: class, name, line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield node.name, inner.name, inner.lineno
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    yield node.name, inner.target.id, inner.lineno


def replaced_names(path: Path) -> list[str]:
    """The names of a file that ought to bear others, as `file, line: name -> instead`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    complaints = []
    for name, line in bound_names(tree):
        instead = REPLACED.get(name) or next((good for bad, good in PARTS.items() if bad in name), None)
        if instead and f"{path.stem}:{name}" not in EXCEPTIONS:
            complaints.append(f"{path.relative_to(ROOT)}, line {line}: {name} -> {instead}")
    complaints += [
        f"{path.relative_to(ROOT)}, line {line}: {owner}.{name}"
        for owner, name, line in members(tree)
        if name in MEMBERS.get(owner, ())
    ]
    return complaints


FILES = sorted(path for folder in ("src", "tests") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_no_name_is_one_that_the_field_has_a_word_for(folder: str):
    complaints = [line for path in FILES if ROOT / folder in path.parents for line in replaced_names(path)]
    assert not complaints, "\n".join(complaints)


@pytest.mark.slow
def test_every_exception_is_still_needed_and_has_its_reason():
    needed = {
        f"{path.stem}:{name}"
        for path in FILES
        for name, _ in bound_names(ast.parse(path.read_text(encoding="utf-8")))
        if name in REPLACED or any(part in name for part in PARTS)
    }
    assert needed >= EXCEPTIONS, f"no longer there: {sorted(EXCEPTIONS - needed)}"
    reasons = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert not [name for name in EXCEPTIONS if f"`{name.split(':')[1]}`" not in reasons]


def test_a_name_of_ours_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The test itself: each way of binding a name is looked at."""
    monkeypatch.setattr("test_names.ROOT", tmp_path)
    source = tmp_path / "example.py"
    source.write_text(
        "class Whole:\n    pass\n"
        "def f(told, *places, look=1):\n    found = [place for place in places]\n    return found\n"
        "class Distributed:\n    count: int\n"
        "def g(self):\n    self.open_picture = 1\n"
    )
    seen = " ".join(replaced_names(source))
    for name in ("Whole", "told", "places", "look", "found", "place", "open_picture", "Distributed.count"):
        assert f": {name}" in seen, name


# --- prose ------------------------------------------------------------------------------------------------------------

#: A phrase, as a pattern, and what is written instead.
PHRASES = {
    "pictures?": "image",
    "(go|goes|going|went|gone) on|(starts?|begins?) anew|anew|made again": "resumes, continues, is reinitialised, re-run",
    "(lies|lie) (there|here|on disk)|as (it|they) (lies?|stands?) on disk": "dataset layout",
    "(goes|go|going) wrong in a training": "training diagnostics",
    "wrong words": "usage error",
    "number formats?": "dtype",
    "twins?": "sliding-window variant, foil",
    "strangers?": "negatives",
    "says|knows|speaks|tells": "has, contains, supports, reports",
    "house|floors|ground floor|rooms|doors": "package, layer",
    "first process|the first does": "main process",
}

#: Texts that stay, with the reason; `file: text`, the file by a part of its path.
STAYING = {
    "data/scenes.py: in the centre of the picture": "a caption of drawn scenes, whose figures were measured with it",
    "training/init_run.py: yellow star in the picture": "a caption by which two runs are compared",
    "audit/chance.py: a picture": "a caption that audits have asked models about",
    "data/text_files.py: it says": "a caption in an example",
    "data/hashes.py: pictures": "a key in data.json of runs",
    'training/: "partners", "pictures"': "keys in data.json of runs",
    'study/config: same: "pictures"': "a value in plans",
    "docs/study.md: same: pictures": "a value in plans",
    "reference/formats.md: `pictures.lance`": "a table of an index",
    "docs/architecture.md: `picture`": "the name of a form field",
    "docs/architecture.md: `pictures.lance`": "a table of an index",
    "docs/architecture.md: `same: pictures`": "a value in plans",
    "CHANGELOG.md: `clipvisionalign.pictures`": "the module's name in version 0.1",
}


def phrases_in(where: str, text: str) -> list[str]:
    """The phrases of a text that ought to be others, as `where: phrase -> instead`, without those that stay."""
    for staying in STAYING:
        part, _, kept = staying.partition(": ")
        if part in where:
            text = text.replace(kept, "").replace(kept.capitalize(), "")
    return [
        f"{where}: {match.group()!r} -> {instead}"
        for pattern, instead in PHRASES.items()
        for match in re.finditer(rf"(?<![-`\w/])(?:{pattern})(?![\w/])", text, re.IGNORECASE)
    ]


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """The docstrings and messages of a file, each with its line: strings of several words."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def test_docstrings_and_messages_are_in_the_words_of_the_field():
    complaints = [
        complaint
        for path in (ROOT / "src").rglob("*.py")
        for line, text in texts_of(path)
        for complaint in phrases_in(f"{path.relative_to(ROOT)}, line {line}", text)
    ]
    assert not complaints, "\n".join(complaints)


def test_docs_are_in_the_words_of_the_field():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    complaints = [
        complaint
        for path in pages
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for complaint in phrases_in(f"{path.relative_to(ROOT)}, line {line}", text)
    ]
    assert not complaints, "\n".join(complaints)


def test_help_texts_are_in_the_words_of_the_field():
    from clipvisionalign.cli.commands import COMMANDS, PARSERS

    complaints = [line for name, (summary, _) in COMMANDS.items() for line in phrases_in(name, summary)]
    for name, make in PARSERS.items():
        parser: argparse.ArgumentParser = make()
        values = re.compile(r"\{[^{}]*\}|same: \"?pictures\"?")
        complaints += phrases_in(name, values.sub("", parser.format_help()))
    assert not complaints, "\n".join(complaints)


def test_the_search_page_is_in_the_words_of_the_field():
    static = ROOT / "src" / "clipvisionalign" / "search" / "server" / "static"
    visible = {name: re.sub(r"<[^>]*>", " ", (static / name).read_text()) for name in ("index.html", "docs.html")}
    script = (static / "page.js").read_text()
    literals = re.findall(r"\"(?:[^\"\\\n]|\\.)*\"|`(?:[^`\\]|\\.)*`", script)
    visible["page.js"] = "\n".join(re.sub(r"\$\{[^{}]*\}", "", text) for text in literals if " " in text)
    complaints = [line for name, text in visible.items() for line in phrases_in(name, text)]
    assert not complaints, "\n".join(complaints)


def test_every_text_that_stays_is_still_there():
    files = [path for folder in ("src", "docs") for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    read = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [*files, ROOT / "CHANGELOG.md"]}
    gone = [
        staying
        for staying in STAYING
        if not any(
            part in name and kept in text for part, _, kept in [staying.partition(": ")] for name, text in read.items()
        )
    ]
    assert not gone


@pytest.mark.parametrize(
    "text", ["A picture of it.", "The run goes on.", "the file says so", "as it lies on disk", "Twins"]
)
def test_a_phrase_of_ours_is_seen(text: str):
    assert phrases_in("anywhere", text)
