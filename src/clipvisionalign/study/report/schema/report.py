"""A study's report.json, typed and validated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from clipvisionalign.study.report.schema.block import Block
from clipvisionalign.study.report.schema.cost import Frontier, Total, VariantCost
from clipvisionalign.study.report.schema.inputs import DataSummary, PlanSummary, Truncation
from clipvisionalign.study.report.schema.parts import (
    ClaimText,
    Curve,
    Examples,
    FlawedProtocols,
    MissingPart,
    PretrainedModel,
    Reference,
    Seal,
    SearchShare,
)
from clipvisionalign.study.report.schema.results import FoilShare, Results, TrialReason, TrialState

#: How many faults of a document are listed.
MAX_LISTED_FAULTS = 5


class ReportError(ValueError):
    """A document is not a report of a study."""


class StudyReport(Block):
    """A study's report.json."""

    format: Literal[1]
    title: str
    plan: PlanSummary
    data: DataSummary
    results: Results
    pretraining: tuple[PretrainedModel, ...] = ()
    seal: Seal | None = None
    cut_captions: dict[str, Truncation] = Field(default_factory=dict)
    blind_baseline: dict[str, tuple[FoilShare, ...]] = Field(alias="text_only")
    cost: dict[str, VariantCost]
    training_steps: dict[str, Total] = Field(default_factory=dict)
    curves: tuple[Curve, ...]
    frontier: dict[str, Frontier] = Field(default_factory=dict)
    flawed_protocols: FlawedProtocols | None = Field(alias="what_it_would_have_looked_like")
    examples: Examples
    search: SearchShare | None = None
    trials: tuple[TrialState, ...] | None = Field(default=None, alias="cells")
    failed: tuple[TrialReason, ...]
    missing_parts: tuple[MissingPart, ...] = Field(default=(), alias="not_made")
    claims: tuple[ClaimText, ...] = ()
    machine: dict[str, Any]
    versions: dict[str, Any]
    measured_by: dict[str, tuple[dict[str, Any], ...]] | None = None
    commands: tuple[str, ...]
    references: tuple[Reference, ...]

    _document: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(cls, report: StudyReport | Mapping[str, Any]) -> StudyReport:
        """The report that a document holds.

        Args:
            report: What report.json holds, or a report, which is returned as it is.

        Returns:
            The report, which keeps the document itself as `document`.

        Raises:
            ReportError: A key is missing, or its value is of another type; the message has the first five such keys.

        >>> StudyReport.of({"format": 1})
        Traceback (most recent call last):
        ...
        clipvisionalign.study.report.schema.report.ReportError: no report of a study: title: Field required; ...
        """
        if isinstance(report, StudyReport):
            return report
        try:
            typed = cls.model_validate(report)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            more = f"; and {len(faults) - MAX_LISTED_FAULTS} more" if len(faults) > MAX_LISTED_FAULTS else ""
            raise ReportError(f"no report of a study: {'; '.join(faults[:MAX_LISTED_FAULTS])}{more}") from None
        typed._document = report
        return typed

    @property
    def document(self) -> Mapping[str, Any]:
        """All that report.json holds: what sentences cite, and the parts that are shown as they are."""
        return self._document


#: What a reader of a report takes: the report, or the document that report.json holds.
ReportLike = StudyReport | Mapping[str, Any]


class _UntitledFields(GenerateJsonSchema):
    """A JSON schema without a title for each field, which repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> str:
    """The JSON schema of report.json, as docs/reference/report.schema.json holds it.

    Returns:
        JSON with a final newline.
    """
    properties = StudyReport.model_json_schema(schema_generator=_UntitledFields)
    schema = {"$schema": GenerateJsonSchema.schema_dialect, **properties}
    return json.dumps(schema, indent=2) + "\n"
