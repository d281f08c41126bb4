"""What report.json holds, typed and validated: `StudyReport`.

A report passes between the parts of a study as the document that report.json holds; whoever reads it takes
`StudyReport.of(document)` and reads attributes. JSON keys that are not the field's words are aliases of attributes. A
key that reports lack which were written before it existed has a default; a key that is not listed stays in the document
and is ignored.

The JSON schema is published as docs/reference/report.schema.json; `python -m clipvisionalign.study.report.schema`
prints it.
"""

from clipvisionalign.study.report.schema.report import ReportError, ReportLike, StudyReport, json_schema

__all__ = ["ReportError", "ReportLike", "StudyReport", "json_schema"]
