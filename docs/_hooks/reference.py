"""Pages of the site that are generated when it is built: commands, settings, Python modules, files of the root folder.

`mkdocs.yml` names this file as a hook. Commands and settings come from the parsers of the command line, so that the
reference cannot differ from what the program accepts.
"""

from __future__ import annotations

import argparse
import ast
import html
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from clipvisionalign.cli.commands import COMMANDS, PARSERS
from clipvisionalign.training.config import SECTIONS

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "clipvisionalign"

#: Files outside of docs/ that are pages of the site.
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "starter.md": "starter/README.md"}

#: Flags of every command, which are described once.
COMMON_FLAGS = {"--quiet", "--verbose"}


def escape(text: str) -> str:
    """Return text as Markdown that shows its characters as they are, in one line."""
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", " ".join(text.split()))


def code(text: str, kind: str = "") -> str:
    """Return text as code in a cell of a table, where Markdown's own code cannot hold a vertical bar."""
    opening = f'<code class="{kind}">' if kind else "<code>"
    return f"{opening}{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def default_of(action: argparse.Action) -> str:
    """Return the default of a flag as a user would write it, or an empty text where there is none to tell."""
    value = action.default
    if value in (None, argparse.SUPPRESS, "", [], False) or "default" in (action.help or ""):
        return ""
    return code(str(value))


def rows_of(actions: list[argparse.Action], parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the rows of a table of flags."""
    formatter = argparse.HelpFormatter(parser.prog)
    for action in actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        if not COMMON_FLAGS.isdisjoint(action.option_strings):
            continue
        names = [name for name in action.option_strings if name.startswith("--")] or [action.metavar or action.dest]
        value = formatter._format_args(action, action.dest.upper()) if action.option_strings else ""
        value = value if len(value) < 40 else "VALUE"
        words = (action.help or "") % {**vars(action), "prog": parser.prog}
        flag = code(f"{', '.join(map(str, names))}{' ' + value if value else ''}", "flag")
        yield f"| {flag} | {escape(words)} | {default_of(action)} |"


def usage_of(parser: argparse.ArgumentParser) -> str:
    """Return the usage of a command without the flags of every command, in lines that fit on a page."""
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    usage = re.sub(r" \[(-h|--quiet|--verbose)\]", "", usage)
    # A flag and its value stay together.
    usage = re.sub(r"\[[^][]*(\[[^][]*\][^][]*)*\]", lambda flag: flag[0].replace(" ", "\0"), usage)
    lines = textwrap.wrap(usage, 80, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def epilog_of(epilog: str) -> list[str]:
    """Return what follows the flags in a command's help: a sentence as text, lists and examples as they are."""
    text = epilog.strip("\n")
    return ["```text", text, "```", ""] if "\n" in text else [f"{escape(text[:1].upper() + text[1:])}.", ""]


def commands_page() -> str:
    """Return the page of all commands."""
    lines = [
        "# Commands", "",
        "Generated from the program's own parsers. `clipvisionalign COMMAND --help` prints the same.", "",
        "Every command also takes `--quiet` and `--verbose`. They, exit statuses, streams and environment variables: "
        "[The command line](../command-line.md).", "",
    ]  # fmt: skip
    for name, (summary, _) in COMMANDS.items():
        parser = PARSERS[name]()
        lines += [
            f"## {name}",
            "",
            escape((parser.description or summary)[:1].upper() + (parser.description or summary)[1:]),
            "",
        ]
        if name == "train":
            lines += [
                "```text",
                parser.usage or "",
                "```",
                "",
                "Every setting: [Settings of a training](settings.md).",
                "",
            ]
            continue
        lines += ["```text", usage_of(parser), "```", "", "| argument | meaning | default |", "|---|---|---|"]
        lines += [*rows_of(parser._actions, parser), ""]
        if parser.epilog:
            lines += epilog_of(parser.epilog)
    return "\n".join(lines)


def settings_page() -> str:
    """Return the page of all settings of `train`, a section for each group of them."""
    parser = PARSERS["train"]()
    section_of = {each.name: section for section, kind in SECTIONS.items() for each in fields(kind)}
    groups: dict[str, list[str]] = {}
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction) or not action.option_strings:
            continue
        flag = next((name for name in action.option_strings if name.startswith("--")), "")
        hint = getattr(action, "_typehint", None) or action.type
        if not flag or type(action).__name__ in ("_ActionConfigLoad", "_ActionHelpClassPath", "_ActionPrintConfig"):
            continue
        kind = re.sub(r"typing\.|collections\.abc\.|<class '|'>", "", str(hint)) if hint is not None else ""
        kind = kind if "<" not in kind else ""
        default = action.default
        shown = "" if default in (None, "", argparse.SUPPRESS) else code(repr(default))
        cells = [code(flag, "flag"), escape(action.help or ""), escape(kind), shown]
        row = f"| {' | '.join(cells)} |"
        name = flag.lstrip("-")
        groups.setdefault(section_of.get(name, name.rpartition(".")[0]), []).append(row)
    lines = [
        "# Settings of a training", "",
        "Generated from the parser of `clipvisionalign train`. A setting is a flag (`--model.design late`), a key of "
        "the file of `--config` (`model: {design: late}`), a key of a study's plan under `settings`, and a field of "
        "`RunConfig` in Python. A flag takes precedence over `--config`, and `--config` over `--recipe`.", "",
        f"Settings without a prefix are in {len(SECTIONS)} sections. The file of `--config` may have them in their "
        "sections or not (`schedule: {epochs: 3}` and `epochs: 3` are the same); `RunConfig` has them both ways "
        "(`config.schedule.epochs` and `config.epochs`); flags, plans and the config.yaml of a run name none.",
        "",
    ]  # fmt: skip
    for group, rows in groups.items():
        lines += [
            f"## {f'`{group}`' if group else 'Run'}",
            "",
            *([escape(str(SECTIONS[group].__doc__).partition("\n")[0]), ""] if group in SECTIONS else []),
            "| setting | meaning | type | default |",
            "|---|---|---|---|",
        ]
        lines += [*rows, ""]
    return "\n".join(lines)


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the file of every public module that defines something."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(part.startswith("_") for part in parts) or not tree.body:
            continue
        yield ".".join(parts), path


#: Modules whose classes are shown with the members of their base classes.
WITH_INHERITED_MEMBERS = ("clipvisionalign.models.aligner", "clipvisionalign.training.trainer")


def python_page(name: str) -> str:
    """Return the page of one Python module."""
    options = "    options:\n      inherited_members: true\n" if name in WITH_INHERITED_MEMBERS else ""
    return f"# {name}\n\n::: {name}\n{options}"


def python_index(names: list[str]) -> str:
    """Return the page that lists all Python modules."""
    lines = ["# Python", "", "Every public function and class, by module.", "", "| module | purpose |", "|---|---|"]
    for name, path in modules():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        purpose = " ".join(text.partition("\n\n")[0].split())
        lines.append(f"| [`{name}`]({name}.md) | {escape(purpose)} |")
    assert names, "no module was found"
    return "\n".join(lines) + "\n"


def root_page(source: Path) -> str:
    """Return a file of the root folder with its links as a page of docs/ has them."""
    text = source.read_text(encoding="utf-8")
    text = re.sub(r"\]\((?:\.\./)?docs/([^)]+)\)", r"](\1)", text)
    text = re.sub(r"\]\(CONTRIBUTING\.md", "](contributing.md", text)
    return re.sub(r"\]\(CHANGELOG\.md", "](changelog.md", text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of all modules into the navigation."""
    reference = next(
        entry["Reference"] for entry in config.nav or [] if isinstance(entry, dict) and "Reference" in entry
    )
    python = next(entry for entry in reference if "Python" in entry)
    python["Python"] = [{"All modules": "reference/python/index.md"}, *python_navigation()]
    return config


def python_navigation() -> list[dict[str, Any]]:
    """Return the entries of all modules, those of one package together."""
    packages: dict[str, list[dict[str, str]]] = {}
    for name, _ in modules():
        package, _, rest = name.partition(".")[2].partition(".")
        packages.setdefault(package, []).append({rest or package or name: f"reference/python/{name}.md"})
    alone = [entries[0] for entries in packages.values() if len(entries) == 1]
    return [*alone, *({package: entries} for package, entries in packages.items() if len(entries) > 1)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    # The help of a command is laid out for this width.
    os.environ["COLUMNS"] = "100"
    names = [name for name, _ in modules()]
    pages = {
        "reference/commands.md": commands_page(),
        "reference/settings.md": settings_page(),
        "reference/python/index.md": python_index(names),
        **{f"reference/python/{name}.md": python_page(name) for name in names},
        **{page: root_page(ROOT / source) for page, source in ROOT_PAGES.items()},
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files
