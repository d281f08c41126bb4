"""The tables of a report: in the terminal, as Markdown, as LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipvisionalign.files import written_aside
from clipvisionalign.study.costs import conditions_told, same_conditions, under_of
from clipvisionalign.study.gaps import REFUSED, labelled, not_made, reason_of, without_results
from clipvisionalign.study.results import NO_INTERVALS, both_ways, no_intervals
from clipvisionalign.study.significant import p_value_form, significant, words_told
from clipvisionalign.study.statistics import LEVEL, two_seeds_widen
from clipvisionalign.study.words import Claim, drawn_units, pairs_together, shared_lengths_told

#: The row of what no model at all would find.
CHANCE = "chance: a random ranking"


@dataclass(frozen=True)
class Table:
    """A table. rows: cells as text, the first column names the row; sort: numbers to sort by, or None, of each."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    sort: list[list[float | None]]
    note: str = ""

    @property
    def words(self) -> list[bool]:
        """For each column whether it holds words: nothing to sort by in any row but text."""
        count = len(self.columns)
        return [any(row[i] for row in self.rows) and all(key[i] is None for key in self.sort) for i in range(count)]


def tables_of(report: dict[str, Any]) -> list[Table]:
    """Every table of a report that has rows."""
    return [table for table in (_made(name, report) for name in TABLES) if table.rows]


def _made(name: str, report: dict[str, Any]) -> Table:
    """A table; where it cannot be made the reason stands in its place, and the others are made all the same."""
    try:
        return TABLES[name](report)
    except Exception as error:
        told = f"this table could not be made: {reason_of(error)}"
        return Table(name, name.capitalize(), ["table", "reason"], [[name, told]], [[None, None]])


def write_tables(report: dict[str, Any], folder: Path) -> None:
    """Each table as NAME.md and NAME.tex; files of those that have no rows, as in an earlier report, are removed."""
    folder.mkdir(exist_ok=True)
    tables = {table.name: table for table in tables_of(report)}
    for name in TABLES:
        for ending, text_of in (("md", markdown), ("tex", latex)):
            path = folder / f"{name}.{ending}"
            if name not in tables:
                path.unlink(missing_ok=True)
                continue
            with written_aside(path) as aside:
                aside.write_text(text_of(tables[name]), encoding="utf-8")


def interval(found: dict[str, Any], form: str = "z.1f") -> str:
    """Value and 95% interval, where there is one; nothing of it is minus zero.

    >>> interval({"value": -0.01, "low": -74.1, "high": 74.1})
    '0.0 [-74.1, 74.1]'
    """
    if found["low"] is None:
        return f"{found['value']:{form}}, no interval"
    return f"{found['value']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


class _Rows:
    """Rows in the making: text, and what it sorts by."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.sort: list[list[float | None]] = []

    def add(self, *cells: tuple[str, float | None]) -> None:
        self.rows.append([text for text, _ in cells])
        self.sort.append([key for _, key in cells])

    def keep(self, places: Sequence[int]) -> None:
        """These columns only."""
        self.rows = [[row[place] for place in places] for row in self.rows]
        self.sort = [[keys[place] for place in places] for keys in self.sort]


def _estimate(found: dict[str, Any]) -> tuple[str, float | None]:
    return interval(found), found["value"]


def _number(value: float | None, form: str) -> tuple[str, float | None]:
    return ("", None) if value is None else (format(value, form), value)


def _tested(p: float | None) -> tuple[str, float | None]:
    return ("not tested", None) if p is None else _number(p, p_value_form(p, LEVEL))


def lacking(report: dict[str, Any], there: Collection[str]) -> list[str]:
    """The variants of the plan that are not `there`, in the plan's order: a row each, with nothing but what became of
    them."""
    return [name for name in report["plan"]["variants"] if name not in there]


def counted(report: dict[str, Any]) -> str:
    """What the intervals of a report count: not the seeds where there is one only."""
    unit = drawn_units(report)
    counts = {len(found["seeds"]) for found in report["results"]["variants"].values()}
    one = max(counts, default=0) < 2
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    if no_intervals(report):
        return f"{'one seed' if one else f'mean of {seeds} seeds'}; {NO_INTERVALS}"
    if one:
        return f"one seed: 95% intervals of the {unit} only, which tell nothing of what another seed would give"
    told = f"mean of {seeds} seeds with 95% intervals that count seeds and {unit}"
    return told + (f" (of one seed: the {unit} only)" if 1 in counts else "")


def _accuracy(report: dict[str, Any]) -> Table:
    rows = _Rows()
    variants = report["results"]["variants"]
    names: list[str] = []
    for name, found in variants.items():
        blocks = {name: found["figures"]}
        if "dual" in found:
            blocks = {f"{name}, its dual encoder": found["dual"], f"{name}, re-ranked": found["figures"]}
        for label, figures in blocks.items():
            names = [figure for figure in figures if figure != "rsum"]
            rows.add(
                (labelled(report, name, label), None),
                _estimate(figures["rsum"]),
                _number(figures["rsum"]["spread"], ".1f"),
                *(_estimate(figures[figure]) for figure in names),
            )
    for name in lacking(report, variants) if variants else ():
        rows.add((labelled(report, name), None), ("no result", None), *[("", None)] * (1 + len(names)))
    # Reports from before chance was told have none.
    chance = report["results"].get("chance")
    if chance and variants:
        by_chance = (_number(chance.get(figure), ".1f") for figure in names)
        rows.add((CHANCE, None), _number(chance["rsum"], ".1f"), ("", None), *by_chance)
    note = f"In percent, rsum from 0 to 600; {counted(report)}; spread: standard deviation between seeds."
    if "choice" in report["results"]:
        note += f" {report['results']['choice'].capitalize()}."
    columns = ["variant", "rsum", "spread", *(both_ways(figure) for figure in names)]
    return Table("accuracy", "What each design finds", columns, rows.rows, rows.sort, note)


def _differences(report: dict[str, Any]) -> Table:
    rows = _Rows()
    for found in report["results"]["differences"]:
        rows.add(
            (f"{found['a']} - {found['b']}", None),
            (both_ways(found["figure"]), None),
            _estimate(found),
            _tested(found["p"]),
            _tested(found["p_holm"]),
            ("not tested" if found["p"] is None else "yes" if found["shown"] else "no difference shown", None),
        )
        if found.get("primary"):
            rows.rows[-1][0] += ", named beforehand"
    columns = ["variants", "figure", "difference", "p", "p, Holm", "shown"]
    note = (
        "Same images, seed by seed; p corrected by Holm over all pairs in rsum, and over all pairs and other figures."
    )
    if any(found.get("primary") for found in report["results"]["differences"]):
        note += " The comparison that the plan names is tested alone, the others are corrected without it."
    tested = [found for found in report["results"]["differences"] if found["p"] is not None]
    paired = [len(found["seeds"]) for found in tested if "seeds" in found]
    if paired and min(paired) < 2:
        unit = drawn_units(report)
        note += f" Where there is one seed the {unit} alone are counted: another seed may give another difference."
    elif of_two := [two_seeds_widen(found) for found in tested if len(found.get("seeds", ())) == 2]:
        whose = "their intervals" if all(of_two) else "intervals that are mostly of what the seeds differ by"
        if any(of_two):
            note += f" Two seeds leave one degree of freedom: {whose} are 12.7 standard errors wide each way."
    for left in report["results"].get("unpaired", []):
        note += f" {unpaired_told(left)}"
    return Table("differences", "Every two designs", columns, rows.rows, rows.sort, note)


def unpaired_told(left: dict[str, Any]) -> str:
    """Which seeds of two variants were not compared, as the other lacks them."""
    only = [f"seed {seed} of {left[one]}" for one in ("a", "b") for seed in left[f"only_{one}"]]
    told = f"{left['a']} - {left['b']}: {', '.join(only)} without a partner"
    return f"{told}; not compared, as no seed is in both." if not left["paired"] else f"{told}, left out."


def _cost(report: dict[str, Any]) -> Table:
    rows = _Rows()
    for name, cost in report["cost"].items():
        rows.add(
            (name, None),
            _number((cost["training_seconds"] or {}).get("mean"), ",.0f"),
            _number((cost.get("training_steps") or {}).get("mean"), ",.0f"),
            _number(cost["ms_per_caption"]["median"], ".2f"),
            _number(cost["ms_per_picture"]["median"], ".1f"),
            _number(cost["ms_per_1000_pairs"]["median"], significant(cost["ms_per_1000_pairs"]["median"])),
            _number(cost["ms_per_query"], significant(cost["ms_per_query"])),
            _number(cost["peak_memory_mib"], ",.0f"),
            _number(cost.get("peak_device_memory_mib"), ",.0f"),
            _number(cost["bytes_per_picture"], ",.0f"),
            _number(cost["bytes_per_caption"], ",.0f"),
            _number(cost["parameters"] / 1e6, ".1f"),
            _number(cost["flops_per_caption"] / 1e9, ".2f"),
            _number(cost["flops_per_picture"] / 1e9, ".2f"),
            _number(cost.get("energy", {}).get("joules_per_1000_captions"), ".1f"),
        )
    for name in lacking(report, report["cost"]) if rows.rows else ():
        rows.add((name, None), ("not measured", None), *[("", None)] * (len(rows.rows[0]) - 2))
    columns = ["variant", "training s", "training steps", "ms a caption", "ms an image", "ms 1,000 pairs", "ms a query",
               "peak MiB", "peak GPU MiB", "bytes an image", "bytes a caption", "M parameters", "GFLOP a caption",
               "GFLOP an image", "J 1,000 captions"]  # fmt: skip
    kept = [place for place in range(len(columns)) if place == 0 or any(row[place] for row in rows.rows)]
    rows.keep(kept)
    note = (
        "Fresh processes that take turns; medians. Times compare within this table only. A query: one caption encoded "
        "and scored with the gallery, or with the candidates that are re-ranked. Training counts what a variant starts "
        "from. Memory: the most that the whole process, or PyTorch on the GPU, has taken."
        f"{_measured_under(report)}{_trained_under(report)}"
    )
    columns = [columns[place] for place in kept]
    return Table("cost", "What each design costs", columns, rows.rows, rows.sort, note)


def _measured_under(report: dict[str, Any]) -> str:
    """Where time and memory were measured, and that variants that were measured elsewhere are not to be compared."""
    under = under_of(report["cost"], report["cost"])
    told = conditions_told(under)
    if same_conditions(under):
        return f" Measured on: {told}." if told else ""
    return f" Not measured under the same conditions, so that these variants are not to be compared: {told}."


def _trained_under(report: dict[str, Any]) -> str:
    # Reports from before it was written down tell nothing of it.
    under = {name: cost["trained_under"] for name, cost in report["cost"].items() if cost.get("trained_under")}
    if same_conditions(under):
        return ""
    told = conditions_told(under)
    return f" Not trained under the same conditions, so that seconds of training are not to be compared: {told}."


def _latency(report: dict[str, Any]) -> Table:
    rows = _Rows()
    for name, cost in report["cost"].items():
        both = (cost["caption_latency_ms"], cost["picture_latency_ms"])
        batches = {row["batch"]: row["ms_per_caption"]["median"] for row in cost["by_batch"]}
        rows.add(
            (name, None),
            *(_number(latency[p], ".2f") for latency in both for p in ("p50", "p95", "p99")),
            *(_number(value, ".2f") for value in batches.values()),
        )
    sizes = [row["batch"] for row in next(iter(report["cost"].values()))["by_batch"]] if report["cost"] else []
    columns = ["variant", *(f"{what} {p}" for what in ("caption", "image") for p in ("p50", "p95", "p99")),
               *(f"by {size}" for size in sizes)]  # fmt: skip
    note = "Milliseconds: one caption or image alone (percentiles), and per caption in batches of so many."
    note += _measured_under(report)
    return Table("latency", "Time of one, and in batches", columns, rows.rows, rows.sort, note)


def _lengths(report: dict[str, Any]) -> Table:
    rows = _Rows()
    words = report["results"]["lengths"]["words"]
    for name, found in report["results"]["variants"].items():
        cells = [_estimate(found["by_length"][third][f"recall_at_{k}"]) for third in words for k in (1, 5)]
        rows.add((labelled(report, name), None), *cells)
    chance = report["results"]["lengths"].get("chance")
    if chance:
        rows.add((CHANCE, None), *(_number(chance[third][f"recall_at_{k}"], ".1f") for third in words for k in (1, 5)))
    columns = [
        "variant",
        *(f"{third} ({words_told(span)}) R@{k}" for third, span in words.items() for k in (1, 5)),
    ]
    note = "Recall of images by captions of one part of the data's captions, in percent; the gallery stays whole; "
    note += f"{counted(report)}. {shared_lengths_told(Claim(report, 'length'))}".rstrip()
    return Table("length", "By the length of the caption", columns, rows.rows, rows.sort, note)


def _composition(report: dict[str, Any]) -> Table:
    rows = _Rows()
    for name, several in report["results"]["composition"].items():
        for found in several:
            rows.add(
                (found["variant"], None), (f"{found['kind']} ({name})", None), (f"{found['pairs']}", found["pairs"]),
                _estimate(found), _tested(found["p_holm"]),
            )  # fmt: skip
        for found in report["text_only"].get(name, []):
            rows.add(("words alone", None), (f"{found['kind']} ({name})", None), (f"{found['pairs']}", found["pairs"]),
                     _estimate(found), ("", None))  # fmt: skip
    columns = ["variant", "kind", "pairs", "true above twin, %", "p of chance, Holm"]
    note = "Chance is 50; a tie counts a half. 'words alone': a trigram model of the training captions, no image. "
    if any(pairs_together(row) for several in report["results"]["composition"].values() for row in several):
        note += "In intervals and p, pairs of one image, identity or published row count as one. "
    note += f"{counted(report).capitalize()}."
    return Table("composition", "True captions against their twins", columns, rows.rows, rows.sort, note)


def _cut_captions(report: dict[str, Any]) -> Table:
    rows = _Rows()
    for name, several in report.get("cut_captions", {}).items():
        for split, found in several["splits"].items():
            if found["cut"]:
                rows.add(
                    (name, None), (split, None), _number(several["max_tokens"], ",d"), _number(found["captions"], ",d"),
                    _number(found["cut"], ",d"), _number(100 * found["share"], ".1f"), _number(found["longest"], ",d"),
                    _number(found["tokens_lost"], ",d"),
                )  # fmt: skip
    columns = ["variant", "split", "max_tokens", "captions", "cut", "%", "longest, tokens", "tokens lost"]
    note = (
        "Captions of more tokens than `max_tokens`, behind which nothing is read. Variants that cut none are left out."
    )
    return Table("cut", "Captions that are cut", columns, rows.rows, rows.sort, note)


def _audits(report: dict[str, Any]) -> Table:
    rows = _Rows()
    for name, variant in report["results"]["variants"].items():
        for run in variant["runs"]:
            for check in run["audit"]["checks"]:
                verdict = "passed" if check["passed"] else "FAILED"
                rows.add((f"{name}, seed {run['seed']}", None), (check["name"], None), (verdict, None),
                         (check["meaning"], None))  # fmt: skip
    for refused in report["results"]["refused"]:
        rows.add((f"{refused['variant']}, seed {refused['seed']}", None), ("audit", None), ("FAILED", None),
                 (refused["reason"], None))  # fmt: skip
    return Table("audit", "The audit of every run", ["run", "check", "verdict", "what was seen"], rows.rows, rows.sort)


def _gaps(report: dict[str, Any]) -> Table:
    rows = _Rows()
    for cell in without_results(report):
        rows.add((f"{cell['variant']}, seed {cell['seed']}", None), (cell["state"], None), (cell["reason"], None))
    for part in not_made(report):
        of = f" of {part['of']}" if part["of"] else ""
        rows.add((f"{part['part']}{of}", None), ("not made", None), (part["reason"], None))
    note = "None of it is in the results."
    states = {cell["state"] for cell in without_results(report)}
    if states != {REFUSED} or not_made(report):
        note += " The study's command, given again, tries what failed and goes on with the rest."
    if REFUSED in states:
        note += " A run whose audit failed stays refused: remove its folder to have it trained anew."
    return Table("gaps", "What has no results", ["what", "state", "reason"], rows.rows, rows.sort, note)


#: Every table of a report, by its name.
TABLES: dict[str, Callable[[dict[str, Any]], Table]] = {
    "accuracy": _accuracy, "differences": _differences, "cost": _cost, "latency": _latency, "length": _lengths,
    "composition": _composition, "cut": _cut_captions, "audit": _audits, "gaps": _gaps,
}  # fmt: skip


def one_line(text: str) -> str:
    """A cell's text without what would end its row, such as the lines of a model's error."""
    return " ".join(text.split())


def markdown(table: Table) -> str:
    """A table as Markdown."""
    lines = [f"## {table.title}", "", f"| {' | '.join(table.columns)} |", f"|---{'|---:' * (len(table.columns) - 1)}|"]
    lines += [f"| {' | '.join(one_line(cell).replace('|', '/') for cell in row)} |" for row in table.rows]
    return "\n".join([*lines, "", table.note, ""])


_LATEX = {
    "^": r"\textasciicircum{}",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
}


def latex(table: Table) -> str:
    """A table as LaTeX, with booktabs."""

    def escaped(text: str) -> str:
        return "".join(_LATEX.get(letter, letter) for letter in one_line(text).replace("\\", "/"))

    lines = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(f'{table.title}. {table.note}'.strip())}}}",
             rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}", r"\toprule"]  # fmt: skip
    lines += [" & ".join(map(escaped, table.columns)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escaped, row)) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def print_tables(report: dict[str, Any]) -> None:
    """The first tables and the summary, in the terminal."""
    shown = []
    for table in [table for table in tables_of(report) if table.name in ("accuracy", "differences", "cost", "gaps")]:
        # In the terminal the first question only: the report has the others.
        rows = [row for row in table.rows if table.name != "differences" or row[1] == "rsum"]
        shown.append(replace(table, rows=rows))
    show(shown)
    for claim in report["claims"]:
        print(f"- {claim['text']}")


def show(tables: Sequence[Table]) -> None:
    """Tables in the terminal."""
    from rich.console import Console
    from rich.table import Table as Printed

    # Names of variants and data sets are text: their brackets are no markup.
    console = Console(markup=False)
    # A table broken over many lines is no table: wide enough where nobody's window is known.
    console = console if console.is_terminal else Console(width=220, markup=False)
    for table in tables:
        printed = Printed(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
        for number, column in enumerate(table.columns):
            printed.add_column(column, justify="right" if number else "left")
        for row in table.rows:
            printed.add_row(*row)
        console.print(printed)
