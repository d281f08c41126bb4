"""The report of an audit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Check:
    """One check of an audit.

    Attributes:
        name: What was checked, and through which interface: "shuffled partners (vectors)".
        passed: Whether the model passed it.
        figure: The figure that decided: a recall (0 to 1), a change of a score, or a count; NaN if the model raised an
            error.
        meaning: The figure and its bound in a sentence.
    """

    name: str
    passed: bool
    figure: float
    meaning: str


@dataclass(frozen=True)
class AuditReport:
    """All checks of one model on one data set.

    Attributes:
        checks: The checks, in the order in which they are printed.
    """

    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The report as `--json` prints it.

        Returns:
            "passed", and "checks" with the fields of each `Check`.
        """
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


class Finding(NamedTuple):
    """A check without its name.

    Attributes:
        passed: Whether the model passed it.
        figure: The figure that decided.
        meaning: The figure and its bound in a sentence.
    """

    passed: bool
    figure: float
    meaning: str
