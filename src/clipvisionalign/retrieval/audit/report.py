"""The report of an audit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Check:
    """One check: whether it passed, the figure that decided, and its explanation."""

    name: str
    passed: bool
    figure: float
    meaning: str


@dataclass(frozen=True)
class AuditReport:
    """All checks of one model on one data set."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        """Whether all checks passed."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


class Finding(NamedTuple):
    """A check without its name."""

    passed: bool
    figure: float
    meaning: str
