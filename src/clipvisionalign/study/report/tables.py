"""The tables of a report: in the terminal, as Markdown, as LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipvisionalign.files import atomic_write
from clipvisionalign.number_format import p_value_format, significant_format, word_range
from clipvisionalign.study.aggregate import NO_INTERVALS, directed_metric_label, no_intervals
from clipvisionalign.study.cost import conditions_by_variant, describe_conditions, same_conditions
from clipvisionalign.study.gaps import REFUSED, error_reason, missing_parts, trials_without_results, variant_label
from clipvisionalign.study.report.summary import Claim, drawn_units, pairs_together, shared_lengths_told
from clipvisionalign.study.statistics import SIGNIFICANCE_LEVEL, two_seeds_widen

#: The row of what no model at all would find.
CHANCE_LABEL = "chance: a random ranking"


@dataclass(frozen=True)
class ReportTable:
    """A table. rows: cells as text, the first column names the row; sort: numbers to sort by, or None, of each."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]]
    sort: list[list[float | None]]
    note: str = ""

    @property
    def is_text_column(self) -> list[bool]:
        """For each column whether it holds words: nothing to sort by in any row but text."""
        count = len(self.columns)
        return [any(row[i] for row in self.rows) and all(key[i] is None for key in self.sort) for i in range(count)]


def build_tables(report: dict[str, Any]) -> list[ReportTable]:
    """Every table of a report that has rows."""
    return [table for table in (_build_table(name, report) for name in TABLES) if table.rows]


def _build_table(name: str, report: dict[str, Any]) -> ReportTable:
    """A table; where it cannot be made the reason stands in its place, and the others are made all the same."""
    try:
        return TABLES[name](report)
    except Exception as error:
        message = f"this table could not be made: {error_reason(error)}"
        return ReportTable(name, name.capitalize(), ["table", "reason"], [[name, message]], [[None, None]])


def write_tables(report: dict[str, Any], folder: Path) -> None:
    """Each table as NAME.md and NAME.tex; files of those that have no rows, as in an earlier report, are removed."""
    folder.mkdir(exist_ok=True)
    tables = {table.name: table for table in build_tables(report)}
    for name in TABLES:
        for ending, text_of in (("md", to_markdown), ("tex", to_latex)):
            path = folder / f"{name}.{ending}"
            if name not in tables:
                path.unlink(missing_ok=True)
                continue
            with atomic_write(path) as aside:
                aside.write_text(text_of(tables[name]), encoding="utf-8")


def format_interval(estimate: dict[str, Any], form: str = "z.1f") -> str:
    """Value and 95% interval, where there is one; nothing of it is minus zero.

    >>> format_interval({"value": -0.01, "low": -74.1, "high": 74.1})
    '0.0 [-74.1, 74.1]'
    """
    if estimate["low"] is None:
        return f"{estimate['value']:{form}}, no interval"
    return f"{estimate['value']:{form}} [{estimate['low']:{form}}, {estimate['high']:{form}}]"


class _TableRows:
    """Rows in the making: text, and what it sorts by."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.sort: list[list[float | None]] = []

    def add(self, *cells: tuple[str, float | None]) -> None:
        self.rows.append([text for text, _ in cells])
        self.sort.append([key for _, key in cells])

    def select_columns(self, indices: Sequence[int]) -> None:
        """These columns only."""
        self.rows = [[row[index] for index in indices] for row in self.rows]
        self.sort = [[keys[index] for index in indices] for keys in self.sort]


def _estimate_cell(estimate: dict[str, Any]) -> tuple[str, float | None]:
    return format_interval(estimate), estimate["value"]


def _number_cell(value: float | None, form: str) -> tuple[str, float | None]:
    return ("", None) if value is None else (format(value, form), value)


def _p_value_cell(p: float | None) -> tuple[str, float | None]:
    return ("not tested", None) if p is None else _number_cell(p, p_value_format(p, SIGNIFICANCE_LEVEL))


def missing_variants(report: dict[str, Any], present: Collection[str]) -> list[str]:
    """The variants of the plan that are not `there`, in the plan's order: a row each, with nothing but what became of
    them."""
    return [name for name in report["plan"]["variants"] if name not in present]


def interval_note(report: dict[str, Any]) -> str:
    """What the intervals of a report count: not the seeds where there is one only."""
    unit = drawn_units(report)
    counts = {len(variant["seeds"]) for variant in report["results"]["variants"].values()}
    one = max(counts, default=0) < 2
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts, default=0)}"
    if no_intervals(report):
        return f"{'one seed' if one else f'mean of {seeds} seeds'}; {NO_INTERVALS}"
    if one:
        return f"one seed: 95% intervals of the {unit} only, which tell nothing of what another seed would give"
    note = f"mean of {seeds} seeds with 95% intervals that count seeds and {unit}"
    return note + (f" (of one seed: the {unit} only)" if 1 in counts else "")


def _accuracy_table(report: dict[str, Any]) -> ReportTable:
    rows = _TableRows()
    variants = report["results"]["variants"]
    names: list[str] = []
    for name, variant in variants.items():
        blocks = {name: variant["figures"]}
        if "dual" in variant:
            blocks = {f"{name}, its dual encoder": variant["dual"], f"{name}, re-ranked": variant["figures"]}
        for label, metrics in blocks.items():
            names = [metric for metric in metrics if metric != "rsum"]
            rows.add(
                (variant_label(report, name, label), None),
                _estimate_cell(metrics["rsum"]),
                _number_cell(metrics["rsum"]["spread"], ".1f"),
                *(_estimate_cell(metrics[metric]) for metric in names),
            )
    for name in missing_variants(report, variants) if variants else ():
        rows.add((variant_label(report, name), None), ("no result", None), *[("", None)] * (1 + len(names)))
    # Reports from before chance was told have none.
    chance = report["results"].get("chance")
    if chance and variants:
        by_chance = (_number_cell(chance.get(metric), ".1f") for metric in names)
        rows.add((CHANCE_LABEL, None), _number_cell(chance["rsum"], ".1f"), ("", None), *by_chance)
    note = f"In percent, rsum from 0 to 600; {interval_note(report)}; spread: standard deviation between seeds."
    if "choice" in report["results"]:
        note += f" {report['results']['choice'].capitalize()}."
    columns = ["variant", "rsum", "spread", *(directed_metric_label(metric) for metric in names)]
    return ReportTable("accuracy", "What each design finds", columns, rows.rows, rows.sort, note)


def _differences_table(report: dict[str, Any]) -> ReportTable:
    rows = _TableRows()
    for row in report["results"]["differences"]:
        rows.add(
            (f"{row['a']} - {row['b']}", None),
            (directed_metric_label(row["figure"]), None),
            _estimate_cell(row),
            _p_value_cell(row["p"]),
            _p_value_cell(row["p_holm"]),
            ("not tested" if row["p"] is None else "yes" if row["shown"] else "no difference shown", None),
        )
        if row.get("primary"):
            rows.rows[-1][0] += ", named beforehand"
    columns = ["variants", "figure", "difference", "p", "p, Holm", "shown"]
    note = (
        "Same images, seed by seed; p corrected by Holm over all pairs in rsum, and over all pairs and other figures."
    )
    if any(row.get("primary") for row in report["results"]["differences"]):
        note += " The comparison that the plan names is tested alone, the others are corrected without it."
    tested = [row for row in report["results"]["differences"] if row["p"] is not None]
    paired = [len(row["seeds"]) for row in tested if "seeds" in row]
    if paired and min(paired) < 2:
        unit = drawn_units(report)
        note += f" Where there is one seed the {unit} alone are counted: another seed may give another difference."
    elif of_two := [two_seeds_widen(row) for row in tested if len(row.get("seeds", ())) == 2]:
        whose = "their intervals" if all(of_two) else "intervals that are mostly of what the seeds differ by"
        if any(of_two):
            note += f" Two seeds leave one degree of freedom: {whose} are 12.7 standard errors wide each way."
    for pair in report["results"].get("unpaired", []):
        note += f" {unpaired_note(pair)}"
    return ReportTable("differences", "Every two designs", columns, rows.rows, rows.sort, note)


def unpaired_note(pair: dict[str, Any]) -> str:
    """Which seeds of two variants were not compared, as the other lacks them."""
    only = [f"seed {seed} of {pair[side]}" for side in ("a", "b") for seed in pair[f"only_{side}"]]
    note = f"{pair['a']} - {pair['b']}: {', '.join(only)} without a partner"
    return f"{note}; not compared, as no seed is in both." if not pair["paired"] else f"{note}, left out."


def _cost_table(report: dict[str, Any]) -> ReportTable:
    rows = _TableRows()
    for name, cost in report["cost"].items():
        rows.add(
            (name, None),
            _number_cell((cost["training_seconds"] or {}).get("mean"), ",.0f"),
            _number_cell((cost.get("training_steps") or {}).get("mean"), ",.0f"),
            _number_cell(cost["ms_per_caption"]["median"], ".2f"),
            _number_cell(cost["ms_per_picture"]["median"], ".1f"),
            _number_cell(cost["ms_per_1000_pairs"]["median"], significant_format(cost["ms_per_1000_pairs"]["median"])),
            _number_cell(cost["ms_per_query"], significant_format(cost["ms_per_query"])),
            _number_cell(cost["peak_memory_mib"], ",.0f"),
            _number_cell(cost.get("peak_device_memory_mib"), ",.0f"),
            _number_cell(cost["bytes_per_picture"], ",.0f"),
            _number_cell(cost["bytes_per_caption"], ",.0f"),
            _number_cell(cost["parameters"] / 1e6, ".1f"),
            _number_cell(cost["flops_per_caption"] / 1e9, ".2f"),
            _number_cell(cost["flops_per_picture"] / 1e9, ".2f"),
            _number_cell(cost.get("energy", {}).get("joules_per_1000_captions"), ".1f"),
        )
    for name in missing_variants(report, report["cost"]) if rows.rows else ():
        rows.add((name, None), ("not measured", None), *[("", None)] * (len(rows.rows[0]) - 2))
    columns = ["variant", "training s", "training steps", "ms a caption", "ms an image", "ms 1,000 pairs", "ms a query",
               "peak MiB", "peak GPU MiB", "bytes an image", "bytes a caption", "M parameters", "GFLOP a caption",
               "GFLOP an image", "J 1,000 captions"]  # fmt: skip
    column_indices = [index for index in range(len(columns)) if index == 0 or any(row[index] for row in rows.rows)]
    rows.select_columns(column_indices)
    note = (
        "Fresh processes that take turns; medians. Times compare within this table only. A query: one caption encoded "
        "and scored with the gallery, or with the candidates that are re-ranked. Training counts what a variant starts "
        "from. Memory: the most that the whole process, or PyTorch on the GPU, has taken."
        f"{_measurement_note(report)}{_training_note(report)}"
    )
    columns = [columns[index] for index in column_indices]
    return ReportTable("cost", "What each design costs", columns, rows.rows, rows.sort, note)


def _measurement_note(report: dict[str, Any]) -> str:
    """Where time and memory were measured, and that variants that were measured elsewhere are not to be compared."""
    under = conditions_by_variant(report["cost"], report["cost"])
    description = describe_conditions(under)
    if same_conditions(under):
        return f" Measured on: {description}." if description else ""
    return f" Not measured under the same conditions, so that these variants are not to be compared: {description}."


def _training_note(report: dict[str, Any]) -> str:
    # Reports from before it was written down tell nothing of it.
    under = {name: cost["trained_under"] for name, cost in report["cost"].items() if cost.get("trained_under")}
    if same_conditions(under):
        return ""
    description = describe_conditions(under)
    return f" Not trained under the same conditions, so that seconds of training are not to be compared: {description}."


def _latency_table(report: dict[str, Any]) -> ReportTable:
    rows = _TableRows()
    for name, cost in report["cost"].items():
        latencies = (cost["caption_latency_ms"], cost["picture_latency_ms"])
        batches = {row["batch"]: row["ms_per_caption"]["median"] for row in cost["by_batch"]}
        rows.add(
            (name, None),
            *(_number_cell(latency[p], ".2f") for latency in latencies for p in ("p50", "p95", "p99")),
            *(_number_cell(value, ".2f") for value in batches.values()),
        )
    sizes = [row["batch"] for row in next(iter(report["cost"].values()))["by_batch"]] if report["cost"] else []
    columns = ["variant", *(f"{modality} {p}" for modality in ("caption", "image") for p in ("p50", "p95", "p99")),
               *(f"by {size}" for size in sizes)]  # fmt: skip
    note = "Milliseconds: one caption or image alone (percentiles), and per caption in batches of so many."
    note += _measurement_note(report)
    return ReportTable("latency", "Time of one, and in batches", columns, rows.rows, rows.sort, note)


def _length_table(report: dict[str, Any]) -> ReportTable:
    rows = _TableRows()
    word_spans = report["results"]["lengths"]["words"]
    for name, variant in report["results"]["variants"].items():
        cells = [
            _estimate_cell(variant["by_length"][tercile][f"recall_at_{k}"]) for tercile in word_spans for k in (1, 5)
        ]
        rows.add((variant_label(report, name), None), *cells)
    chance = report["results"]["lengths"].get("chance")
    if chance:
        rows.add(
            (CHANCE_LABEL, None),
            *(_number_cell(chance[tercile][f"recall_at_{k}"], ".1f") for tercile in word_spans for k in (1, 5)),
        )
    columns = [
        "variant",
        *(f"{tercile} ({word_range(span)}) R@{k}" for tercile, span in word_spans.items() for k in (1, 5)),
    ]
    note = "Recall of images by captions of one part of the data's captions, in percent; the gallery stays whole; "
    note += f"{interval_note(report)}. {shared_lengths_told(Claim(report, 'length'))}".rstrip()
    return ReportTable("length", "By the length of the caption", columns, rows.rows, rows.sort, note)


def _composition_table(report: dict[str, Any]) -> ReportTable:
    rows = _TableRows()
    for name, set_rows in report["results"]["composition"].items():
        for set_row in set_rows:
            rows.add(
                (set_row["variant"], None), (f"{set_row['kind']} ({name})", None), (f"{set_row['pairs']}",
                set_row["pairs"]), _estimate_cell(set_row), _p_value_cell(set_row["p_holm"]),
            )  # fmt: skip
        for set_row in report["text_only"].get(name, []):
            rows.add(("words alone", None), (f"{set_row['kind']} ({name})", None), (f"{set_row['pairs']}",
                     set_row["pairs"]), _estimate_cell(set_row), ("", None))  # fmt: skip
    columns = ["variant", "kind", "pairs", "true above twin, %", "p of chance, Holm"]
    note = "Chance is 50; a tie counts a half. 'words alone': a trigram model of the training captions, no image. "
    if any(pairs_together(row) for set_rows in report["results"]["composition"].values() for row in set_rows):
        note += "In intervals and p, pairs of one image, identity or published row count as one. "
    note += f"{interval_note(report).capitalize()}."
    return ReportTable("composition", "True captions against their twins", columns, rows.rows, rows.sort, note)


def _truncation_table(report: dict[str, Any]) -> ReportTable:
    rows = _TableRows()
    for name, truncation in report.get("cut_captions", {}).items():
        for split, counts in truncation["splits"].items():
            if counts["cut"]:
                rows.add(
                    (name, None),
                    (split, None),
                    _number_cell(truncation["max_tokens"], ",d"),
                    _number_cell(counts["captions"], ",d"),
                    _number_cell(counts["cut"], ",d"),
                    _number_cell(100 * counts["share"], ".1f"),
                    _number_cell(counts["longest"], ",d"),
                    _number_cell(counts["tokens_lost"], ",d"),
                )
    columns = ["variant", "split", "max_tokens", "captions", "cut", "%", "longest, tokens", "tokens lost"]
    note = (
        "Captions of more tokens than `max_tokens`, behind which nothing is read. Variants that cut none are left out."
    )
    return ReportTable("cut", "Captions that are cut", columns, rows.rows, rows.sort, note)


def _audit_table(report: dict[str, Any]) -> ReportTable:
    rows = _TableRows()
    for name, variant in report["results"]["variants"].items():
        for run in variant["runs"]:
            for check in run["audit"]["checks"]:
                verdict = "passed" if check["passed"] else "FAILED"
                rows.add((f"{name}, seed {run['seed']}", None), (check["name"], None), (verdict, None),
                         (check["meaning"], None))  # fmt: skip
    for refused_row in report["results"]["refused"]:
        rows.add((f"{refused_row['variant']}, seed {refused_row['seed']}", None), ("audit", None), ("FAILED", None),
                 (refused_row["reason"], None))  # fmt: skip
    return ReportTable(
        "audit", "The audit of every run", ["run", "check", "verdict", "what was seen"], rows.rows, rows.sort
    )


def _gaps_table(report: dict[str, Any]) -> ReportTable:
    rows = _TableRows()
    for trial in trials_without_results(report):
        rows.add((f"{trial['variant']}, seed {trial['seed']}", None), (trial["state"], None), (trial["reason"], None))
    for gap in missing_parts(report):
        suffix = f" of {gap['of']}" if gap["of"] else ""
        rows.add((f"{gap['part']}{suffix}", None), ("not made", None), (gap["reason"], None))
    note = "None of it is in the results."
    states = {trial["state"] for trial in trials_without_results(report)}
    if states != {REFUSED} or missing_parts(report):
        note += " The study's command, given again, tries what failed and goes on with the rest."
    if REFUSED in states:
        note += " A run whose audit failed stays refused: remove its folder to have it trained anew."
    return ReportTable("gaps", "What has no results", ["what", "state", "reason"], rows.rows, rows.sort, note)


#: Every table of a report, by its name.
TABLES: dict[str, Callable[[dict[str, Any]], ReportTable]] = {
    "accuracy": _accuracy_table,
    "differences": _differences_table,
    "cost": _cost_table,
    "latency": _latency_table,
    "length": _length_table,
    "composition": _composition_table,
    "cut": _truncation_table,
    "audit": _audit_table,
    "gaps": _gaps_table,
}


def one_line(text: str) -> str:
    """A cell's text without what would end its row, such as the lines of a model's error."""
    return " ".join(text.split())


def to_markdown(table: ReportTable) -> str:
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


def to_latex(table: ReportTable) -> str:
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
    selected = []
    for table in [table for table in build_tables(report) if table.name in ("accuracy", "differences", "cost", "gaps")]:
        # In the terminal the first question only: the report has the others.
        rows = [row for row in table.rows if table.name != "differences" or row[1] == "rsum"]
        selected.append(replace(table, rows=rows))
    render_tables(selected)
    for claim in report["claims"]:
        print(f"- {claim['text']}")


def render_tables(tables: Sequence[ReportTable]) -> None:
    """Tables in the terminal."""
    from rich.console import Console
    from rich.table import Table as Printed

    # Names of variants and data sets are text: their brackets are no markup.
    console = Console(markup=False)
    # A table broken over many lines is no table: wide enough where nobody's window is known.
    console = console if console.is_terminal else Console(width=220, markup=False)
    for table in tables:
        rich_table = Printed(title=table.title, title_justify="left", caption=table.note, caption_justify="left")
        for index, column in enumerate(table.columns):
            rich_table.add_column(column, justify="right" if index else "left")
        for row in table.rows:
            rich_table.add_row(*row)
        console.print(rich_table)
