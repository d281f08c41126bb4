"""The code speaks the field's words: names that only this project used are gone, and stay away.

What a name is bound to is read from the syntax tree: classes, functions, parameters, variables, fields and attributes.
Words that are terms elsewhere (`count` of a list, `total` of a sum) are looked for where they had a meaning of ours.
"""

from __future__ import annotations

import ast
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
