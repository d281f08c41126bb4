"""Docstrings of the public reference: every parameter, what is returned, and every error that is raised by name.

Held to this are all public functions and classes with their public methods.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from docstring_parser import DocstringMeta, DocstringParam, DocstringRaises, DocstringReturns
from docstring_parser.google import parse

PACKAGE = Path(__file__).parents[1] / "src" / "clipvisionalign"

#: Methods without a name that are called by their object's.
CALLED_BY_OBJECT = ("__call__",)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Documented(NamedTuple):
    """A function or class with a docstring, and where it is."""

    where: str
    node: FunctionNode | ast.ClassDef


@cache
def syntax_trees() -> dict[str, ast.Module]:
    """The syntax tree of every file, by its path below the package."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def exported_names(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """File and name of everything that is in a package's `__all__`."""
    exported = set()
    for file, tree in trees.items():
        if not file.endswith("__init__.py"):
            continue
        listed: list[str] = []
        sources: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                listed = ast.literal_eval(node.value)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipvisionalign."):
                sources |= {alias.asname or alias.name: str(node.module) for alias in node.names}
        for name in listed:
            module = sources.get(name, "").partition(".")[2].replace(".", "/")
            exported.add((f"{module}.py" if f"{module}.py" in trees else f"{module or '.'}/__init__.py", name))
    return exported


def documented() -> Iterator[Documented]:
    """Every public function, class and method."""
    for file, tree in syntax_trees().items():
        for node in tree.body:
            if not isinstance(node, FunctionNode | ast.ClassDef) or node.name.startswith("_"):
                continue
            yield Documented(f"{file}: {node.name}", node)
            for member in node.body if isinstance(node, ast.ClassDef) else []:
                is_public = isinstance(member, FunctionNode) and (
                    not member.name.startswith("_") or member.name in CALLED_BY_OBJECT
                )
                if is_public:
                    yield Documented(f"{file}: {node.name}.{member.name}", member)


def decorators(node: FunctionNode | ast.ClassDef) -> set[str]:
    """The names of a definition's decorators, without their arguments."""
    called = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return {ast.unparse(each).rpartition(".")[2] for each in called}


def parameters(node: FunctionNode | ast.ClassDef) -> list[str]:
    """Parameters of a function, of a method without its object; of a class those of its `__init__`, or its fields."""
    if isinstance(node, ast.ClassDef):
        constructor = next((each for each in node.body if getattr(each, "name", "") == "__init__"), None)
        if isinstance(constructor, ast.FunctionDef):
            return parameters(constructor)
        is_record = "dataclass" in decorators(node) or is_named_tuple(node)
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each)]
        names = [ast.unparse(each.target) for each in fields] if is_record else []
        return [name for name in names if not name.startswith("_")]
    arguments = node.args
    variadic = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    positional = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *variadic]
    implicit = {"self"} | ({"cls"} if "classmethod" in decorators(node) else set())
    return [each.arg for each in positional if each.arg not in implicit and not each.arg.startswith("_")]


def is_named_tuple(node: FunctionNode | ast.ClassDef) -> bool:
    """Whether a class is a NamedTuple, whose fields are no parameters to the site's generator."""
    return isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "NamedTuple" for base in node.bases)


def returns_something(node: FunctionNode | ast.ClassDef) -> bool:
    """Whether a function's annotation promises a value."""
    if isinstance(node, ast.ClassDef) or node.returns is None:
        return False
    return ast.unparse(node.returns) not in ("None", "Never", "NoReturn")


def raised_names(node: FunctionNode | ast.ClassDef) -> set[str]:
    """Exceptions that the body of a function raises by name; of a class, its `__init__` and `__post_init__`.

    Not those of functions within it, nor those that it catches itself, nor NotImplementedError of a base class.
    """
    if isinstance(node, ast.ClassDef):
        makers = [each for each in node.body if getattr(each, "name", "") in ("__init__", "__post_init__", "__enter__")]
        return set().union(*(raised_names(each) for each in makers if isinstance(each, ast.FunctionDef)))
    names: set[str] = set()

    def visit(part: ast.AST, caught: frozenset[str]) -> None:
        if isinstance(part, FunctionNode | ast.ClassDef | ast.Lambda):
            return
        if isinstance(part, ast.Raise) and part.exc is not None:
            error = part.exc.func if isinstance(part.exc, ast.Call) else part.exc
            name = ast.unparse(error).rpartition(".")[2]
            if name[:1].isupper() and name not in caught:
                names.add(name)
        inner = caught
        if isinstance(part, ast.Try):
            handled = {ast.unparse(each.type) for each in part.handlers if each.type is not None}
            for statement in part.body:
                visit(statement, caught | handled)
            for rest in (*part.handlers, *part.orelse, *part.finalbody):
                visit(rest, inner)
            return
        for child in ast.iter_child_nodes(part):
            visit(child, inner)

    for statement in node.body:
        visit(statement, frozenset({"NotImplementedError"}))
    return names


def documented_errors(sections: list[DocstringMeta]) -> list[str]:
    """The errors that a docstring names: one in a line, or several with commas between."""
    lines = [str(section.type_name) for section in sections if isinstance(section, DocstringRaises)]
    return [name.strip() for line in lines for name in line.split(",")]


def faults(node: FunctionNode | ast.ClassDef) -> list[str]:
    """What a docstring lacks, or names that is not there."""
    text = ast.get_docstring(node) or ""
    sections = parse(text).meta
    named, described = (
        [
            name.strip().lstrip("*").partition(" (")[0]
            for section in sections
            if isinstance(section, DocstringParam) and section.args[0] == kind
            for name in section.arg_name.split(",")
        ]
        for kind in ("param", "attribute")
    )
    expected = parameters(node)
    # Fields of a dataclass are its attributes as well; other classes have attributes beside their arguments.
    lacking = [f"no argument {name}" for name in expected if name not in (*named, *described)]
    lacking += [f"{name} is no parameter" for name in named if name not in expected and expected]
    lacking += ["Args of a NamedTuple, whose fields are Attributes"] if named and is_named_tuple(node) else []
    lacking += [f"raises {name}" for name in sorted(raised_names(node) - set(documented_errors(sections)))]
    is_property = bool({"property", "cached_property"} & decorators(node))
    if expected and returns_something(node) and not is_property:
        result = any(isinstance(section, DocstringReturns) for section in sections)
        lacking += [] if result else ["no Returns or Yields"]
    return lacking


def test_docstrings_of_the_reference_name_parameters_results_and_errors():
    items = list(documented())
    assert len(items) > 1500
    wrong = [f"{item.where}: {', '.join(lacking)}" for item in items if (lacking := faults(item.node))]
    assert not wrong, "\n".join(wrong)


def test_every_name_of_the_package_has_an_example():
    """`make test-docs` runs them."""
    trees = syntax_trees()
    names = {name for file, name in exported_names({"__init__.py": trees["__init__.py"]}) if not name.startswith("__")}
    homes = {
        name: node for tree in trees.values() for node in tree.body if (name := getattr(node, "name", "")) in names
    }
    assert set(homes) == names
    lines = {name: (ast.get_docstring(node) or "").splitlines() for name, node in homes.items()}  # type: ignore[arg-type]
    run = [name for name in names if any(">>>" in line and "SKIP" not in line for line in lines[name])]
    assert sorted(run) == sorted(names)


def test_errors_that_are_documented_exist():
    """Of the reference; a name that was changed in the code is changed in its docstring."""
    known = {name for name in dir(builtins) if isinstance(getattr(builtins, name), type)}
    for tree in syntax_trees().values():
        known |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    of_libraries = {"HTTPException", "yaml.YAMLError"}
    wrong = [
        f"{item.where}: {name}"
        for item in documented()
        for name in documented_errors(parse(ast.get_docstring(item.node) or "").meta)
        if name not in known | of_libraries
    ]
    assert not wrong, "\n".join(wrong)


FUNCTION = '''
def f(a: int, *rest: int, key: str = "") -> int:
    """Do it.

    Args:
        a: (N,) first.
        *rest: others.
        key: a word.

    Returns:
        A number: of them.

    Raises:
        ValueError: never mind.
    """
    if a:
        raise ValueError(a)
    try:
        raise KeyError(a)
    except KeyError:
        return 1
'''


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("", "", None),
        ("        key: a word.\n", "", "no argument key"),
        ("key: a word", "kay: a word", "no argument key, kay is no parameter"),
        ("    Returns:\n        A number: of them.\n", "", "no Returns or Yields"),
        ("a: int", "cls: int", "no argument cls, a is no parameter"),
        ("ValueError: never", "TypeError: never", "raises ValueError"),
        ("except KeyError", "except IndexError", "raises KeyError"),
    ],
)
def test_a_fault_of_a_docstring_is_found(old: str, new: str, fault: str | None):
    node: Any = ast.parse(FUNCTION.replace(old, new) if old else FUNCTION).body[0]
    assert ", ".join(faults(node)) == (fault or "")


def test_fields_of_a_named_tuple_are_attributes():
    text = 'class A(NamedTuple):\n    """One.\n\n    Args:\n        a: First.\n    """\n\n    a: int\n'
    by_section: list[Any] = [ast.parse(each).body[0] for each in (text, text.replace("Args", "Attributes"))]
    assert list(map(faults, by_section)) == [["Args of a NamedTuple, whose fields are Attributes"], []]
