"""A sentence of the summary: its text, and the figures that it cites from report.json.

Each figure is kept with its path in report.json and with the text that shows it, so that every number of a sentence can
be checked against the report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from clipvisionalign.counts import plural
from clipvisionalign.number_format import decimal_format, p_value_format
from clipvisionalign.study.report.schema import StudyReport

CLAIM_LEVEL = 0.05


#: Figures that are nearer to each other than this are equal: what is between them is rounding.
EQUALITY_TOLERANCE = 1e-6


def lookup(document: Mapping[str, Any], path: str) -> Any:
    """The value at a path of a document.

    Args:
        document: Of a study or of another command.
        path: Such as "results/variants/self/figures/rsum/value".

    Returns:
        The value.

    Raises:
        KeyError, IndexError: the document has no such path.
    """
    node: Any = document
    for key in path.split("/"):
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


class CitedSentence:
    """A sentence in the making: each `cite` method returns a value of a document as it is shown, and records it.

    Args:
        document: what is cited.
        topic: what the sentence is about.
    """

    def __init__(self, document: Mapping[str, Any], topic: str) -> None:
        self.document, self.topic = document, topic
        self.citations: list[dict[str, str]] = []
        self.text = ""

    def cite(self, path: str, form: str = "", factor: float = 1.0) -> str:
        """Cite a figure.

        Args:
            path: Of the figure in the document.
            form: A format; "" for one decimal, or as many as distinguish it from zero.
            factor: What the figure is multiplied by, such as 100 for percent.

        Returns:
            The figure as it is shown.
        """
        value = lookup(self.document, path) * factor
        form = form or decimal_format(value)
        text = format(round(value) if form.endswith("d") else value, form)
        self.citations.append({"path": path, "shown": text, "form": form, "factor": str(factor)})
        return text

    def cite_count(self, path: str) -> str:
        """Cite how many entries a list has.

        Args:
            path: Of the list in the document.

        Returns:
            The number.
        """
        text = str(len(lookup(self.document, path)))
        self.citations.append({"path": path, "shown": text, "form": "count", "factor": "1"})
        return text

    def cite_with_noun(self, path: str, noun: str) -> str:
        """Cite a whole number, or how many entries a list has, with its noun.

        Args:
            path: Of the number or the list in the document.
            noun: In the singular.

        Returns:
            Such as "1 image" or "2 images".
        """
        value = lookup(self.document, path)
        text = self.cite_count(path) if isinstance(value, list) else self.cite(path, ",d")
        return f"{text} {noun if text == '1' else plural(noun)}"

    def cite_interval(self, path: str, sign: float = 1.0) -> str:
        """Cite the value and the 95% interval of an estimate.

        Args:
            path: Of the estimate in the document.
            sign: -1 to change its sign; another factor also scales it.

        Returns:
            Such as "3.1 [1.0, 5.2]"; without the interval where it has none.
        """
        if lookup(self.document, path)["low"] is None:
            return f"{self.cite(f'{path}/value', factor=sign)} (no interval)"
        low, high = ("low", "high") if sign > 0 else ("high", "low")
        value, low, high = (self.cite(f"{path}/{end}", factor=sign) for end in ("value", low, high))
        return f"{value} [{low}, {high}]"

    def cite_p_value(self, path: str) -> str:
        """Cite a p value, with as many digits as show on which side of the level it is.

        Args:
            path: Of the value in the document.

        Returns:
            The value as it is shown.
        """
        return self.cite(path, p_value_format(lookup(self.document, path), CLAIM_LEVEL))

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds of it."""
        return {"about": self.topic, "text": self.text, "figures": self.citations}


class Claim(CitedSentence):
    """A sentence of a study's summary.

    Args:
        report: the report that is cited.
        topic: what the sentence is about: accuracy, length, composition, cost, search or belief.
    """

    def __init__(self, report: StudyReport, topic: str) -> None:
        super().__init__(report.document, topic)
        self.report = report


def numbers_in(text: str) -> list[str]:
    """Every number that a sentence shows, names such as `late-2` and R@1 left out.

    Args:
        text: The sentence.

    Returns:
        The numbers as they stand.
    """
    bare = re.sub(r"`[^`]*`|R@\d+|seed \d+|1,000 pairs", " ", text)
    return re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?", bare)


def as_code(name: str) -> str:
    """A name as the page shows it as code.

    Args:
        name: The name.

    Returns:
        It in backquotes.
    """
    return f"`{name}`"


def list_names(names: Sequence[str]) -> str:
    """Names of variants, or of runs, as a list with commas and "and".

    Args:
        names: The names.

    Returns:
        The list as text.
    """
    return join_words([name if "`" in name else as_code(name) for name in names])


def join_words(parts: Sequence[str]) -> str:
    """A list in words.

    Args:
        parts: What is listed.

    Returns:
        Such as "a, b and c".
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
